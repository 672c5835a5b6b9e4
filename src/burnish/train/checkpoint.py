"""Checkpoints: whole or absent, verified before they are trusted, and enough to continue bit for bit.

Written as: temporary folder -> files -> fsync -> manifest with sha256 last -> rename -> fsync of the parent. `latest` is
found by reading manifests, never by a pointer. safetensors and JSON only.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish.core.errors import StorageError
from burnish.core.runs import StageFolder, file_sha256, read_json, storage_errors, sync_folder, write_json

SCHEMA = 1


@dataclass(frozen=True)
class Checkpoint:
    """`state` is JSON: step, byte lengths of the logs, counted ledger, counters. `tensors`: masters, moments, RNG."""

    step: int
    state: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    notices: tuple[str, ...] = ()


def save(folder: StageFolder, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: int) -> Path:
    """Publish `checkpoint-<step>` and then retire older ones, keeping `keep`. Raises StorageError with the bytes needed."""
    target = folder.checkpoint(step)
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    needed = int(1.1 * sum(t.numel() * t.element_size() for t in tensors.values())) + 65536
    try:
        free = shutil.disk_usage(folder.root).free
        if free < needed:
            raise StorageError(
                f"a checkpoint needs {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free",
                where=str(target),
                remedy="free some space and continue with --resume; the previous checkpoint is intact",
            )
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        ready = {name: t.detach().contiguous() for name, t in tensors.items()}
        ready["rng/torch"] = torch.get_rng_state()
        if torch.cuda.is_initialized():
            ready["rng/cuda"] = torch.cuda.get_rng_state()
        save_file(ready, temporary / "state.safetensors")
        write_json(temporary / "state.json", dict(state))
        files: dict[str, Any] = {}
        for path in sorted(temporary.iterdir()):
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        write_json(temporary / "manifest.json", {"schema": SCHEMA, "step": step, "files": files})
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        sync_folder(folder.root)
    except StorageError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise storage_errors(error, target) from error
    retire(folder, keep)
    return target


def retire(folder: StageFolder, keep: int) -> None:
    """Delete all but the newest `keep` (at least one) published checkpoints, and temporary folders of dead processes."""
    for _, path in folder.checkpoints()[: -max(1, keep)]:
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.root.glob("checkpoint-*.tmp-*"):
        match = re.fullmatch(r"checkpoint-\d+\.tmp-(\d+)", path.name)
        if match and not _alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def verify(path: Path) -> str | None:
    """None if the checkpoint is whole, else what is wrong. Raises StorageError when it is from a newer burnish."""
    try:
        manifest = read_json(path / "manifest.json")
    except StorageError as error:
        return error.message
    if manifest["schema"] > SCHEMA:
        raise StorageError(
            f"was written by a newer burnish (schema {manifest['schema']}, this one reads up to {SCHEMA})",
            where=str(path),
            remedy="upgrade burnish",
        )
    for name, want in manifest["files"].items():
        file = path / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != want["bytes"] or file_sha256(file) != want["sha256"]:
            return f"{name} does not match its manifest (expected sha256 {want['sha256'][:12]}...)"
    return None


def latest(folder: StageFolder) -> Checkpoint | None:
    """The newest whole checkpoint, with a notice for every damaged one passed over. The RNG state is restored."""
    notices: list[str] = []
    for step, path in reversed(folder.checkpoints()):
        if wrong := verify(path):
            notices.append(f"{path.name} is damaged and was passed over: {wrong}")
            continue
        tensors = load_file(path / "state.safetensors")
        torch.set_rng_state(tensors.pop("rng/torch"))
        if (drawn := tensors.pop("rng/cuda", None)) is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(drawn)
        return Checkpoint(step, read_json(path / "state.json"), tensors, tuple(notices))
    if notices:
        raise StorageError("; ".join(notices), where=str(folder.root), remedy="no checkpoint is usable: start again under another name")
    return None
