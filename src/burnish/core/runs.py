"""The run folder: its layout, its lock, and writes that are whole or absent. Nobody else joins these paths.

    runs/<name>/  recipe.yaml resolved.yaml environment.json decisions.json run.json
                  00-base/ 01-sft/ ... report.html report.json
    <stage>/      stage.json metrics.jsonl timing.jsonl ledger.json evals/<eval>.json checkpoint-<step>/ model/
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from burnish.core.errors import ConfigError, LockedError, StorageError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
TEMPORARY = re.compile(r"(\..+|checkpoint-\d+)\.tmp-\d+")
RESERVED = {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(1, 10)), *(f"lpt{i}" for i in range(1, 10))}


def check_name(name: str, where: str = "run name") -> str:
    """A run or stage name is one plain path component. Raises ConfigError with a slug to use instead."""
    if NAME.fullmatch(name) and name.split(".")[0] not in RESERVED and ".." not in name and not name.endswith("."):
        return name
    slug = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._").replace("..", ".")[:64] or "run"
    if slug.split(".")[0] in RESERVED:
        slug = f"run-{slug}"
    raise ConfigError(
        f"{name[:80]!r} cannot name a folder: wanted 1 to 64 of a-z 0-9 . _ - beginning with a letter or digit",
        where=where,
        remedy=f"use {slug!r}",
    )


def storage_errors(error: OSError, path: Path) -> StorageError:
    """An OSError said in our terms: what was being written, and how much room there is."""
    try:
        free = f"{shutil.disk_usage(path.parent).free / 1e6:.0f} MB free"
    except OSError:
        free = "the folder is gone"
    remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check that the folder exists and is writable"
    return StorageError(f"cannot write: {error.strerror or error} ({free})", where=str(path), remedy=remedy)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, text: str | bytes) -> None:
    """Write a whole file or nothing: temporary file, fsync, rename, fsync of the folder. Raises StorageError."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    data = text.encode() if isinstance(text, str) else text
    try:
        with open(temporary, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise storage_errors(error, path) from error


def write_json(path: Path, value: Any) -> None:
    """Stable JSON: sorted keys, finite numbers only."""
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises StorageError when the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot be read: {error}", where=str(path)) from error


def append_json(path: Path, row: Mapping[str, Any]) -> None:
    """One JSON object on one line, in one write, so that a killed process leaves whole lines."""
    line = json.dumps(row, allow_nan=False) + "\n"
    try:
        with open(path, "ab", buffering=0) as out:
            out.write(line.encode())
    except OSError as error:
        raise storage_errors(error, path) from error


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file we wrote; a torn last line is left out."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield json.loads(line)


def cut(path: Path, size: int) -> None:
    """Forget everything after byte `size`: what an interrupted run wrote past its checkpoint is made again."""
    if path.exists():
        with open(path, "r+b") as out:
            out.truncate(size)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


@dataclass(frozen=True)
class StageFolder:
    """One stage of a run: `<run>/NN-<name>/`."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.name.split("-", 1)[1]

    @property
    def stage(self) -> Path:
        return self.root / "stage.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def timing(self) -> Path:
        return self.root / "timing.jsonl"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.json"

    @property
    def model(self) -> Path:
        return self.root / "model"

    def trajectories(self, number: int) -> Path:
        """What round `number` of a stage that samples drew."""
        return self.root / "trajectories" / f"round-{number:06d}.jsonl.gz"

    def credit(self, number: int, part: int) -> Path:
        """What training made of one part of that round: its prompts, and the advantages of its samples."""
        return self.root / "trajectories" / f"round-{number:06d}-credit-{part}.jsonl.gz"

    def rounds(self) -> list[int]:
        """The rounds whose trajectories are kept."""
        names = (re.fullmatch(r"round-(\d{6,})\.jsonl\.gz", p.name) for p in self.root.glob("trajectories/*"))
        return sorted(int(m[1]) for m in names if m)

    def of_round(self, number: int) -> list[Path]:
        """Its trajectories and what was made of them, as far as they are kept."""
        credit = self.root.glob(f"trajectories/round-{number:06d}-credit-*.jsonl.gz")
        return sorted(p for p in (self.trajectories(number), *credit) if p.exists())

    def evaluation(self, name: str) -> Path:
        return self.root / "evals" / f"{check_name(name, 'eval name')}.json"

    def checkpoint(self, step: int) -> Path:
        return self.root / f"checkpoint-{step}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of every published checkpoint, oldest first. Names we did not make are ignored."""
        found = [(int(m[1]), p) for p in self.root.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
        return sorted(found)

    def make(self) -> StageFolder:
        (self.root / "evals").mkdir(parents=True, exist_ok=True)
        return self


class RunFolder:
    """`runs/<name>/`, held by one process at a time. Use as a context manager to take the lock.

    The lock is the kernel's (flock), so a killed process leaves none behind; the file says who holds it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock: IO[str] | None = None

    @classmethod
    def named(cls, name: str, under: Path = Path("runs")) -> RunFolder:
        return cls(under / check_name(name))

    recipe = property(lambda self: self.root / "recipe.yaml")
    resolved = property(lambda self: self.root / "resolved.yaml")
    environment = property(lambda self: self.root / "environment.json")
    decisions = property(lambda self: self.root / "decisions.json")
    run = property(lambda self: self.root / "run.json")
    report_html = property(lambda self: self.root / "report.html")
    report_json = property(lambda self: self.root / "report.json")

    def stage(self, index: int, name: str) -> StageFolder:
        return StageFolder(self.root / f"{index:02d}-{check_name(name, 'stage name')}")

    def stages(self) -> list[StageFolder]:
        found = [p for p in self.root.glob("[0-9][0-9]-*") if p.is_dir()]
        return [StageFolder(p) for p in sorted(found)]

    def __enter__(self) -> RunFolder:
        if self.root.is_symlink():
            raise StorageError("is a symbolic link; a run folder must be a real folder", where=str(self.root))
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            handle = open(self.root / ".lock", "a+", encoding="utf-8")
        except OSError as error:
            raise storage_errors(error, self.root / ".lock") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            handle.close()
            raise LockedError(
                f"is in use by {holder}",
                where=str(self.root),
                remedy="wait for it, or start under another name with --set name=...",
            ) from error
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%dT%H:%M:%S%z')}")
        handle.flush()
        self._lock = handle
        self._sweep()
        return self

    def _sweep(self) -> None:
        """We hold the lock, so a temporary file or folder of ours belongs to a process that was killed."""
        for path in [p for p in self.root.rglob("*.tmp-*") if TEMPORARY.fullmatch(p.name)]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def __exit__(self, *exc: object) -> None:
        if self._lock is not None:
            self._lock.truncate(0)
            self._lock.close()
            self._lock = None
