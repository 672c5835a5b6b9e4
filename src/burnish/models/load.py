"""A model folder (or hub id, or bundled name) to a Policy. Everything is checked before anything large is allocated.

safetensors only; no remote code; a file that is damaged, missing or pickled is named together with what to do.
"""

from __future__ import annotations

import json
import os
import re
import struct
import time
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch

from burnish.core.errors import BurnishError, ConfigError, MachineError, StorageError
from burnish.core.machine import uncollected
from burnish.core.runs import file_sha256, read_json
from burnish.models.policy import Policy

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npy")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
Dtype = Literal["auto", "float32", "bfloat16", "float64"]


def bundled() -> list[str]:
    """Names of the models shipped in the package."""
    root = resources.files("burnish") / "assets"
    return sorted(p.name for p in root.iterdir() if p.is_dir() and (p / "config.json").is_file())


def resolve(source: str | Path) -> Path | str:
    """A bundled name or a local folder becomes a Path; anything of the form owner/name is left to the hub."""
    text = str(source)
    if text in bundled():
        return Path(str(resources.files("burnish") / "assets" / text))
    path = Path(text).expanduser()
    if path.is_dir():
        return path.resolve()  # an adapter trained on it names it, and is loaded from anywhere
    if path.exists():
        raise ConfigError(f"{text!r} is a file; wanted a folder", where="model", remedy="name the folder that holds config.json")
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return text
    raise ConfigError(
        f"no model at {text!r}",
        where="model",
        remedy=f"wanted a folder with config.json, a hub id owner/name, or a bundled model: {', '.join(bundled()) or 'none'}",
    )


def check_safetensors(path: Path) -> None:
    """Refuse a damaged file before it is mapped: header length, JSON, offsets and size must agree. Raises StorageError."""
    size = path.stat().st_size
    again = "download or export it again"
    if size < 8:
        raise StorageError(f"has {size} bytes; a safetensors file has at least 8", where=str(path), remedy=again)
    with open(path, "rb") as source:
        (length,) = struct.unpack("<Q", source.read(8))
        if length > min(size - 8, 100_000_000):
            raise StorageError(f"declares a header of {length} bytes in a file of {size}", where=str(path), remedy=again)
        try:
            header = json.loads(source.read(length))
        except ValueError as error:
            raise StorageError(f"has a damaged header ({error})", where=str(path), remedy=again) from error
    end = 0
    entries = sorted((v["data_offsets"], k) for k, v in header.items() if k != "__metadata__")
    for (begin, stop), name in entries:
        if begin != end or stop < begin:
            raise StorageError(f"tensor {name!r} lies at {begin}..{stop}, expected to begin at {end}", where=str(path), remedy=again)
        end = stop
    if 8 + length + end != size:
        raise StorageError(
            f"is {size} bytes long; its header accounts for {8 + length + end} (interrupted download?)", where=str(path), remedy=again
        )


def check_folder(folder: Path) -> None:
    """Everything that can be known without reading weights. Raises ConfigError or StorageError."""
    config = folder / "config.json"
    adapter = folder / "adapter_config.json"
    if not config.exists() and not adapter.exists():
        raise ConfigError("has neither config.json nor adapter_config.json", where=str(folder), remedy="name a Hugging Face or PEFT folder")
    if config.exists() and "auto_map" in read_json(config):
        raise ConfigError(
            "wants to run its own Python code (auto_map in config.json)",
            where=str(folder),
            remedy="burnish never runs code from a model folder; use an architecture that transformers knows",
        )
    weights = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        wanted = set(read_json(index)["weight_map"].values())
        if missing := sorted(wanted - {p.name for p in weights}):
            raise StorageError(f"lacks {', '.join(missing)} named in {index.name}", where=str(folder), remedy="download the folder again")
    if not weights:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
        if pickled:
            raise ConfigError(
                f"holds pickled weights only ({', '.join(pickled[:3])}); opening them can run code, so burnish does not",
                where=str(folder),
                remedy="get the safetensors files of this model, or convert it where you trust it: "
                "load_state_dict from torch.load(..., weights_only=True), then model.save_pretrained(folder)",
            )
        raise StorageError("has no *.safetensors file", where=str(folder), remedy="name a folder that holds the weights")
    for path in weights:
        check_safetensors(path)
    manifest = folder / "manifest.json"
    if manifest.exists():
        for name, want in read_json(manifest)["files"].items():
            path = folder / name
            if not path.exists():
                raise StorageError(f"lacks {name}, named in its manifest", where=str(folder), remedy="export the model again")
            if (got := file_sha256(path)) != want["sha256"]:
                raise StorageError(
                    f"sha256 is {got[:12]}..., its manifest says {want['sha256'][:12]}...",
                    where=str(path),
                    remedy="the file changed after it was written; export the model again, or delete manifest.json if you changed it",
                )


def choose_device(wanted: str | torch.device = "auto") -> dict[str, Any]:
    """The device a policy lives on, as a decision: `auto` is cuda where torch sees one, else cpu.

    Raises MachineError where the one asked for is not there, ConfigError for a name that is none.
    """
    name, seen = str(wanted), torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = "cpu" + "".join(f", cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(seen))
    if name == "auto":
        value = "cuda" if seen else "cpu"
        why = f"of what is there: {there}" if seen else "torch sees no CUDA device"
        return {"value": value, "why": why, "measured": {}}
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"{name!r} is not a device", where="device", remedy="type auto, cpu or cuda")
    number = int(name.partition(":")[2] or 0)
    if name != "cpu" and number >= seen:
        built = torch.version.cuda
        why = f"torch {torch.__version__} was built without CUDA" if built is None else f"built for CUDA {built}, torch sees {seen}"
        raise MachineError(f"{name} is not there: {why}", where="device", remedy=f"type device: auto or cpu; there is: {there}")
    return {"value": name, "why": "as asked", "measured": {}}


def free_cuda_bytes(device: torch.device) -> int:
    """What can still be allocated on a GPU: what the driver has free, and what torch keeps without using it."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def choose_dtype(hidden: int, intermediate: int, device: torch.device) -> dict[str, Any]:
    """Measure this machine's GEMM in both dtypes at the model's own width; bf16 must win by a quarter to be worth its rounding.

    On CUDA it wins wherever the hardware has it.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        why = f"{torch.cuda.get_device_name(device)} {'computes' if native else 'does not compute'} in bf16"
        return {"value": "bfloat16" if native else "float32", "why": why, "measured": {}}
    times: dict[str, float] = {}
    for name in ("float32", "bfloat16", "float32", "bfloat16"):
        a = torch.randn(512, hidden, dtype=DTYPES[name])
        b = torch.randn(hidden, intermediate, dtype=DTYPES[name])
        for repeat in range(5):
            begin = time.perf_counter()
            torch.mm(a, b)
            took = time.perf_counter() - begin
            if repeat:
                times[name] = min(times.get(name, took), took)
    ratio = times["float32"] / times["bfloat16"]
    value = "bfloat16" if ratio > 1.25 and hidden >= 256 else "float32"
    why = f"a bf16 product of {hidden} x {intermediate} runs {ratio:.1f}x as fast as fp32 here"
    if hidden < 256:
        why += "; below a width of 256 products are not where the time goes, so fp32"
    return {"value": value, "why": why, "measured": {k: round(512 * hidden * intermediate * 2 / v / 1e9, 1) for k, v in times.items()}}


@uncollected()
def load_policy(source: str | Path, *, dtype: Dtype | torch.dtype = "auto", device: str | torch.device = "auto", probe: bool = True) -> Policy:
    """Load a Policy. A PEFT folder is loaded on its base model and merged (with the parity check of `adapters.merge`).

    Raises ConfigError (no such model, pickled weights, remote code), StorageError (damaged or missing files),
    MachineError (out of memory, a device or dtype that is not there, an unreachable hub).
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where, placed = resolve(source), choose_device(device)
    device = torch.device(placed["value"])
    options: dict[str, Any] = {"trust_remote_code": False}
    if isinstance(where, Path):
        check_folder(where)
        options["local_files_only"] = True
        if (where / "adapter_config.json").exists():
            return _load_adapted(where, dtype=dtype, device=device, probe=probe)
    try:
        config = AutoConfig.from_pretrained(where, **options)
        chosen: dict[str, Any] | None = None
        if isinstance(dtype, str):
            if dtype == "auto":
                text = config.get_text_config()
                chosen = choose_dtype(text.hidden_size, int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size), device)
                dtype = chosen["value"]
            dtype = DTYPES[str(dtype)]
        model: Any = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportArgumentType]  (decorated at run time)
            where, config=config, dtype=dtype, use_safetensors=True, attn_implementation="sdpa", **options
        )
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    except BurnishError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise MachineError(f"not enough memory for the weights: {error}", where=str(source), remedy="use dtype: bfloat16 or a smaller model") from error
    except (OSError, ValueError, KeyError) as error:
        if isinstance(where, str):
            raise MachineError(
                f"cannot fetch {where!r} from the hub: {str(error).splitlines()[0]}",
                where="model",
                remedy="check the name and the network, or download the folder and name its path",
            ) from error
        raise StorageError(f"cannot be loaded: {str(error).splitlines()[0]}", where=str(where)) from error
    try:
        policy = Policy(model.to(device).eval(), tokenizer, source=str(source), probe=probe)
    except torch.OutOfMemoryError as error:
        raise MachineError(f"not enough memory on {device}: {error}", where=str(source), remedy="use dtype: bfloat16, a smaller model or device: cpu") from error
    policy.decisions["device"] = placed
    if chosen is not None:
        policy.decisions["dtype"] = chosen
    return policy


def _load_adapted(folder: Path, *, dtype: Dtype | torch.dtype, device: torch.device, probe: bool) -> Policy:
    from peft import PeftModel
    from transformers import AutoTokenizer

    from burnish.models.adapters import merge

    base_name = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base_name:
        raise ConfigError("adapter_config.json names no base model", where=str(folder), remedy="set base_model_name_or_path in it")
    if not os.path.isabs(str(base_name)) and (folder / str(base_name)).is_dir():
        base_name = str(folder / str(base_name))
    base = load_policy(base_name, dtype=dtype, device=device, probe=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if (folder / "tokenizer_config.json").exists() else base.tokenizer
    adapted = Policy(PeftModel.from_pretrained(base.model, folder).eval(), tokenizer, source=str(folder), probe=probe)
    adapted.decisions.update(base.decisions)
    return merge(adapted)


def known(source: str) -> bool:
    """Whether `source` is a bundled name, a folder, or has the form of a hub id."""
    try:
        resolve(source)
    except ConfigError:
        return False
    return True


@uncollected()
def load_tokenizer(source: str | Path) -> Any:
    """A model's tokenizer alone, without its weights. Raises ConfigError, StorageError, MachineError (unreachable hub)."""
    from transformers import AutoTokenizer

    where = resolve(source)
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False, local_files_only=isinstance(where, Path))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(where, Path):
            raise StorageError(f"holds no tokenizer that can be loaded: {reason}", where=str(where)) from error
        raise MachineError(
            f"cannot fetch the tokenizer of {where!r} from the hub: {reason}",
            where="tokenizer",
            remedy="check the name and the network, or name a folder that holds it: --tokenizer FOLDER",
        ) from error
