"""What this machine can still give a process: memory free, used, and at most. No torch."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # version 1 writes a huge number where there is no limit


def resident_bytes() -> int:
    """Resident memory of this process now."""
    try:
        return int((PROC / "self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most resident memory this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """From here on glibc gives memory back to the system as soon as it is freed, in pieces of 1 MB or more.

    Otherwise it keeps what was freed, in pieces that later requests do not fit: a process of 72 MB of activations held
    166 MB, one of 268 MB 347 MB (bundled model, 4,096 tokens). Fresh pages cost time, so it is for where memory is short.
    """
    try:
        ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD, which glibc then no longer raises by itself
    except (OSError, AttributeError):
        return  # another C library: freed memory is kept or returned as it sees fit


def return_freed_heap() -> None:
    """Give back what is free in glibc's heap now: after a training stage that is its activations, in pieces."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


@contextmanager
def uncollected() -> Generator[None]:
    """Without cyclic garbage collection: imports and vocabularies make millions of objects that stay, and looking through them again
    and again is a third of loading them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def free_host_bytes() -> int:
    """Bytes this process can still allocate: what the machine has without swapping, within every control group's limit.

    A group's file pages can be taken back and do not count as used.
    """
    try:
        lines = (PROC / "meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return max(0, min(free, *_left_in_groups(), free))


def _left_in_groups() -> Iterator[int]:
    """Limit less use of each memory control group this process is in, from its own to the outermost."""
    try:
        lines = (PROC / "self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used, reclaimable = CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used, reclaimable = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # inside a container the group's own path may not be visible: its limit then stands at the root
        for folder in [root / path.strip("/"), *(root / path.strip("/")).parents]:
            if root != folder and root not in folder.parents:
                break
            try:
                most = (folder / limit).read_text(encoding="ascii").strip()
                if most == "max" or int(most) >= UNLIMITED:
                    continue
                stat = dict(row.split() for row in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
                yield int(most) - int((folder / used).read_text(encoding="ascii")) + int(stat.get(reclaimable, 0))
            except (OSError, ValueError):
                continue
