"""`burnish doctor`: on an installation that works, and on ones that were broken on purpose."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import pytest

from burnish.cli import doctor as module
from burnish.cli import invoke
from burnish.cli.doctor import Check, numbers, packages, requirements, satisfies

Capture = pytest.CaptureFixture[str]
Needs = Callable[..., None]


@pytest.fixture
def needs(monkeypatch: pytest.MonkeyPatch) -> Needs:
    """Sets what burnish's metadata asks for."""

    def ask(*wanted: str) -> None:
        real = importlib.metadata.requires
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: list(wanted) if name == "burnish" else real(name))

    return ask


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str, str], None]:
    """Installs a package with this version and this source, before all others."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name: str, version: str, source: str) -> None:
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return install


def test_a_good_installation(capsys: Capture) -> None:
    assert invoke(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "BAD" not in text and text.rstrip().endswith("Start with: burnish quickstart")
    assert invoke(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = {check["name"]: check for check in told["checks"]}
    assert told["usable"] and {"torch", "speed", "device", "attention", "bundled model", "memory", "disk, runs", "C kernels"} <= found.keys()
    import torch

    assert found["torch"]["found"].startswith(torch.__version__) and "GFLOP/s" in found["speed"]["found"]
    assert "hub" not in found  # only when asked


@pytest.mark.parametrize(
    ("wanted", "said", "remedy"),
    [
        ("no-such-thing-at-all>=1.0", "not installed, needs >=1.0", "pip install 'no-such-thing-at-all>=1.0'"),
        ("torch>=99.1", "needs >=99.1", "pip install 'torch>=99.1'"),
    ],
)
def test_missing_and_too_old(needs: Needs, capsys: Capture, wanted: str, said: str, remedy: str) -> None:
    needs("numpy>=1.26", wanted)
    assert invoke(["doctor"]) == 4
    text = capsys.readouterr().out
    assert said in text and f"-> {remedy}" in text
    assert "not measured: the packages come first" in text and "burnish cannot be used here yet: " in text
    assert invoke(["doctor", "--json"]) == 4
    told = json.loads(capsys.readouterr().out)
    assert not told["usable"] and [c["state"] for c in told["checks"] if c["name"] in ("numpy", wanted.partition(">")[0])] == ["ok", "bad"]


def test_an_import_that_raises(needs: Needs, stub: Callable[[str, str, str], None]) -> None:
    stub("stubbed_one", "2.5.0", "raise OSError('libx.so.3: cannot open shared object file')")
    stub("stubbed_two", "2.5.0rc1+cpu", "value = 1")
    needs("stubbed_one>=2.0", "stubbed_two>=2.5", "stubbed_two<2.4")
    broken, good, new = packages()
    assert (broken.state, good.state, new.state) == ("bad", "ok", "bad")
    assert broken.found == "2.5.0 is installed and cannot be imported: libx.so.3: cannot open shared object file"
    assert broken.remedy == "pip install 'stubbed_one>=2.0' --force-reinstall" and new.remedy == "pip install 'stubbed_two<2.4'"


def test_extras_are_notes(needs: Needs) -> None:
    needs("numpy>=1", "pytest>=8; extra == 'dev'", "pytest>=99; extra == 'old'", "no-such-thing; extra == \"gone\"")
    assert module.extras() == [
        Check("extra dev", "ok", "complete"),
        Check("extra old", "note", f"not complete: pytest {importlib.metadata.version('pytest')}", "pip install 'burnish[old]'"),
        Check("extra gone", "note", "not complete: no-such-thing", "pip install 'burnish[gone]'"),
    ]


def test_our_own_metadata_can_be_read() -> None:
    found = requirements()
    assert {"torch", "transformers", "pyyaml"} <= {name.lower() for name, _, extra in found if extra is None}
    assert all(satisfies("9999", wanted) for _, wanted, _ in found)


@pytest.mark.parametrize(
    ("version", "wanted", "good"),
    [
        ("2.13.0+cpu", ">=2.11", True),
        ("2.9.1", ">=2.11", False),  # numbers, not letters
        ("3", ">=3.0.0", True),
        ("5.0.0rc1", ">=5.0", True),
        ("2.4.0", ">=2.0,<2.4", False),
        ("2.3.9", ">=2.0, <2.4", True),
        ("1.0", "==1.0.0", True),
        ("1.0", "!=1.0.0", False),
        ("1.0", "", True),
    ],
)
def test_versions(version: str, wanted: str, good: bool) -> None:
    assert satisfies(version, wanted) is good


def test_a_requirement_it_cannot_read_is_not_passed_over() -> None:
    assert numbers("v2.13.0.dev3+cu121") == (2, 13, 0)
    with pytest.raises(ValueError, match=r"~=2\.0"):
        satisfies("2.1", "~=2.0")


def test_kernels_and_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("burnish.forest.blocks._stock_works", lambda dtype: dtype.itemsize == 4)
    (attention,) = module._attention()
    assert attention.state == "note" and "cannot be used in bf16:" in attention.found
    for why, said in (("no C compiler (cc, gcc or clang) on the path", "apt-get install gcc"), ("BURNISH_NO_KERNELS is set", "unset BURNISH_NO_KERNELS")):
        monkeypatch.setattr("burnish.maths.kernels.library", lambda why=why: (None, why))
        monkeypatch.setattr("burnish.maths.kernels.kernels_for", lambda dtype: None)
        (kernels,) = module._kernels()
        assert kernels.state == "note" and why in kernels.found and said in (kernels.remedy or "")
    monkeypatch.setattr("burnish.maths.kernels.library", lambda: (object(), "built by cc"))
    monkeypatch.setattr("burnish.maths.kernels.kernels_for", lambda dtype: object() if dtype.itemsize == 4 else None)
    (kernels,) = module._kernels()
    assert kernels.state == "note" and "differ from torch in bf16" in kernels.found
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 10**10 - 10**8, 10**8))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "there"))
    assert [c.state for c in module._disk()] == ["note", "note"] and "0.1 GB free" in next(module._disk()).found


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer:
        status = 200

        def __enter__(self) -> Answer:
            return self

        def __exit__(self, *_: Any) -> None:
            return

    def raising(error: Exception) -> Callable[..., Any]:
        def call(*_: Any, **__: Any) -> Any:
            raise error

        return call

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in module._hub(raising(AssertionError("asked"))).found
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert module._hub(lambda *_, **__: Answer()).state == "ok"
    assert module._hub(raising(HTTPError("u", 404, "no", None, None))).state == "ok"  # type: ignore[arg-type]
    assert "answers 503" in module._hub(raising(HTTPError("u", 503, "no", None, None))).found  # type: ignore[arg-type]
    away = module._hub(raising(URLError("Name or service not known")))
    assert away.state == "note" and "cannot be reached" in away.found and "https_proxy" in (away.remedy or "")
