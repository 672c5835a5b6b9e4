"""`burnish doctor`: what is installed here, what is supported, what this machine can do, and what to type where it is not enough."""

from __future__ import annotations

import importlib
import importlib.metadata
import operator
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import typer

from burnish.cli import reply

HUB = "https://huggingface.co"
NETWORK_S = 10.0
LITTLE_BYTES = 2 * 10**9
MODULES = {"pyyaml": "yaml"}  # where a package is imported by another name
COMPARISONS = {">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True)
class Check:
    """One thing looked at. `bad`: burnish does not work like this; `note`: it does, and you may want to know."""

    name: str
    state: Literal["ok", "note", "bad"]
    found: str
    remedy: str | None = None


def doctor(
    network: Annotated[bool, typer.Option("--network", help="Also ask whether the hub can be reached.")] = False,
) -> int:
    """Look at the installation and the machine: what works, what does not, and the command that mends it."""
    checks = [*_python(), *packages()]
    ready = not any(check.state == "bad" for check in checks)
    checks += extras()
    if ready:
        checks += [*_torch(), *_attention(), *_kernels(), *_bundled(), *_memory()]
    else:
        checks.append(Check("machine", "note", "not measured: the packages come first"))
    checks += _disk()
    if network:
        checks.append(_hub())
    usable = not any(check.state == "bad" for check in checks)
    data = {"usable": usable, "checks": [asdict(check) for check in checks]}
    reply(data, "\n".join([*map(_line, checks), "", _verdict(checks)]))
    return 0 if usable else 4


def _line(check: Check) -> str:
    mark = {"ok": "ok  ", "note": "note", "bad": "BAD "}[check.state]
    line = f"{mark}  {check.name:<15}{check.found}"
    return f"{line}\n{'':21}-> {check.remedy}" if check.remedy else line


def _verdict(checks: list[Check]) -> str:
    wrong = [check.name for check in checks if check.state == "bad"]
    if not wrong:
        return "burnish can be used here. Start with: burnish quickstart"
    return f"burnish cannot be used here yet: {', '.join(wrong)}"


# ---- what is installed, held against burnish's own metadata


def numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0); a pre-release counts as its release."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-z-]", version.lstrip("v"))[0]))


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version lies in `>=2.9,<3`. Raises ValueError for an operator that is not a comparison."""
    for part in filter(None, (p.strip() for p in wanted.split(","))):
        found = re.fullmatch(r"(>=|<=|==|!=|>|<)\s*v?(\d[\w.+]*)", part)
        if found is None:
            raise ValueError(f"cannot read the requirement {part!r}")
        pairs = list(zip_longest(numbers(version), numbers(found[2]), fillvalue=0))
        if not COMPARISONS[found[1]]([a for a, _ in pairs], [b for _, b in pairs]):
            return False
    return True


def requirements() -> list[tuple[str, str, str | None]]:
    """(package, versions, extra or None) of everything burnish's metadata names; empty where it is not installed."""
    try:
        needs = importlib.metadata.requires("burnish") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    made: list[tuple[str, str, str | None]] = []
    for need in needs:
        head, _, marker = need.partition(";")
        found = re.match(r"\s*([A-Za-z0-9_.-]+)\s*(?:\[[^\]]*\])?\s*(.*)", head)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
        if found is not None:
            made.append((found[1], found[2].strip(" ()"), extra[1] if extra else None))
    return made


def _python() -> Iterator[Check]:
    from burnish import __version__

    version = platform.python_version()
    try:
        wanted = importlib.metadata.metadata("burnish")["Requires-Python"] or ""
    except importlib.metadata.PackageNotFoundError:
        yield Check("burnish", "note", f"{__version__}, run from a folder: what it needs is not known", "pip install -e FOLDER, or: make install")
        wanted = ""
    else:
        yield Check("burnish", "ok", f"{__version__} in {Path(__file__).parents[1]}")
    if satisfies(version, wanted):
        yield Check("python", "ok", f"{version}{f' (needs {wanted})' if wanted else ''}, {platform.system()} {platform.machine()}")
    else:
        yield Check("python", "bad", f"{version}, needs {wanted}", "make an environment with a newer Python")


def packages() -> list[Check]:
    """Each package burnish needs: there, new enough, and importable."""
    return [_package(name, wanted) for name, wanted, extra in requirements() if extra is None]


def _package(name: str, wanted: str) -> Check:
    install = f"pip install '{name}{wanted}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "bad", f"not installed, needs {wanted or 'any version'}", install)
    if not satisfies(version, wanted):
        return Check(name, "bad", f"{version}, needs {wanted}", install)
    try:
        importlib.import_module(MODULES.get(name.lower(), name.replace("-", "_")))
    except Exception as error:  # whatever a broken installation raises
        said = " ".join(str(error).split())[:200] or type(error).__name__
        return Check(name, "bad", f"{version} is installed and cannot be imported: {said}", f"{install} --force-reinstall")
    return Check(name, "ok", f"{version} (needs {wanted})" if wanted else version)


def extras() -> list[Check]:
    """Optional sets of packages, and the command that completes each."""
    missing: dict[str, list[str]] = {}
    for name, wanted, extra in requirements():
        if extra is None:
            continue
        short = missing.setdefault(extra, [])
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            short.append(name)
            continue
        if not satisfies(version, wanted):
            short.append(f"{name} {version}")
    return [
        Check(f"extra {extra}", "note", f"not complete: {', '.join(short)}", f"pip install 'burnish[{extra}]'")
        if short
        else Check(f"extra {extra}", "ok", "complete")
        for extra, short in missing.items()
    ]


# ---- what the machine can do


def _torch() -> Iterator[Check]:
    import torch

    from burnish.machine import cpu_name, gflops
    from burnish.models.load import choose_device, choose_dtype

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU"
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    yield Check("torch build", "ok", f"{build}; {threads} threads on {cores} cores, {cpu_name()}")
    speed = {name: gflops(dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    chosen = choose_dtype(512, 2048, torch.device(choose_device()["value"]))
    rates = ", ".join(f"{name} {value:.0f} GFLOP/s" for name, value in speed.items())
    yield Check("speed", "ok", f"{rates} now; dtype auto means {chosen['value']}: {chosen['why']}")
    yield from _devices(torch)


def _devices(torch: Any) -> Iterator[Check]:
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            yield Check(f"device cuda:{i}", "ok", f"{torch.cuda.get_device_name(i)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    elif torch.version.cuda:
        yield Check("device", "note", "cpu: this torch is built for CUDA and finds no device", "nvidia-smi says whether the driver works")
    elif Path("/proc/driver/nvidia/version").exists():
        yield Check("device", "note", "cpu: an NVIDIA driver is here, and this torch has no CUDA", "install the CUDA build of torch")
    else:
        yield Check("device", "ok", "cpu")


def _attention() -> Iterator[Check]:
    import torch

    from burnish.forest.blocks import _stock_works

    works = {"fp32": _stock_works(torch.float32), "bf16": _stock_works(torch.bfloat16)}
    if all(works.values()):
        yield Check("attention", "ok", "torch's CPU flash kernel is there and agrees with plain products")
    else:
        wrong = " and ".join(name for name, works_so in works.items() if not works_so)
        found = f"torch's CPU flash kernel cannot be used in {wrong}: plain products are, which are right and slower"
        yield Check("attention", "note", found, "use a version of torch that burnish is tested with (constraints/cpu.txt)")


def _kernels() -> Iterator[Check]:
    """The C kernels, which are built when first asked for; torch's operations do their work where there are none."""
    import torch

    from burnish.maths.kernels import OFF, kernels_for, library

    found, why = library()
    works = {"fp32": kernels_for(torch.float32), "bf16": kernels_for(torch.bfloat16)}
    wrong = " and ".join(name for name, kernels in works.items() if kernels is None)
    if not wrong:
        yield Check("C kernels", "ok", f"{why}, and agree with torch")
    elif found is None:
        remedy = "apt-get install gcc, or what your system calls a C compiler" if "compiler" in why else f"unset {OFF}" if OFF in why else "rm -r ~/.cache/burnish/kernels, and look at that message"
        yield Check("C kernels", "note", f"none ({why}): torch's operations are used, which are right and slower", remedy)
    else:
        yield Check("C kernels", "note", f"{why}, and differ from torch in {wrong}, where they are not used", "try another C compiler: export CC=...")


def _bundled() -> Iterator[Check]:
    from burnish.core.errors import BurnishError
    from burnish.models.load import bundled, check_folder, resolve

    for name in bundled():
        try:
            check_folder(Path(resolve(name)))
        except BurnishError as error:
            yield Check("bundled model", "bad", f"{name}: {error.message}", "pip install --force-reinstall burnish")
        else:
            yield Check("bundled model", "ok", name)
    if not bundled():
        yield Check("bundled model", "bad", "none", "pip install --force-reinstall burnish")


def _memory() -> Iterator[Check]:
    from burnish.core.machine import free_host_bytes

    free, total = free_host_bytes(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    enough = free >= LITTLE_BYTES
    remedy = None if enough else "close something, or use a small model and few micro_tokens"
    yield Check("memory", "ok" if enough else "note", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free", remedy)


def _disk() -> Iterator[Check]:
    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    for name, folder in (("disk, runs", Path.cwd()), ("disk, models", cache)):
        there = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield Check(name, "note", f"{folder} cannot be written to", "name another folder: --runs FOLDER" if name == "disk, runs" else "export HF_HOME=FOLDER")
        elif free < LITTLE_BYTES:
            yield Check(name, "note", f"{free / 1e9:.1f} GB free in {folder}", "a checkpoint takes about four times its model")
        else:
            yield Check(name, "ok", f"{free / 1e9:.1f} GB free in {folder}")


def _hub(open_url: Callable[..., Any] = urlopen) -> Check:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Check("hub", "note", "HF_HUB_OFFLINE is set: nothing is fetched", "unset HF_HUB_OFFLINE")
    url = os.environ.get("HF_ENDPOINT") or HUB
    try:
        with open_url(Request(f"{url}/robots.txt", method="HEAD"), timeout=NETWORK_S) as answer:
            status = answer.status
    except HTTPError as error:  # it answered
        status = error.code
    except (OSError, ValueError) as error:
        remedy = "check the network and the proxy (https_proxy); bundled models and local folders need neither"
        return Check("hub", "note", f"{url} cannot be reached: {error}", remedy)
    if status >= 500:
        return Check("hub", "note", f"{url} answers {status}", "try again later; local folders work without it")
    return Check("hub", "ok", f"{url} answers")
