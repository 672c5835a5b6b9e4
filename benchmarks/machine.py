"""This machine: what it is, how fast it is now, and how fast a phase could be at best."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Calibration:
    """What limits are computed from. peak_gflops by dtype: the best product met; read_gb_per_s: a sum over cold memory."""

    peak_gflops: dict[str, float]
    read_gb_per_s: float

    def seconds(self, flops: float, memory_bytes: float, dtype: str) -> float:
        """The least a phase takes that needs these FLOPs and, at another time, these bytes."""
        return flops / (self.peak_gflops[dtype] * 1e9) + memory_bytes / (self.read_gb_per_s * 1e9)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak_gflops": {k: round(v, 1) for k, v in self.peak_gflops.items()}}


def gauge(seconds: float = 1.0, size: int = 1024) -> float:
    """GFLOP/s of one fixed fp32 product, repeated for `seconds`: total work over total time, so that a neighbour shows."""
    import torch

    a = torch.ones(size, size)
    out = torch.empty_like(a)
    torch.mm(a, a, out=out)
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        torch.mm(a, a, out=out)
        done += 1
    return 2 * size**3 * done / (time.perf_counter() - begin) / 1e9


def best_seconds(work: Callable[[], object], repeats: int = 4) -> float:
    """The fastest of a few runs, the first one not counted."""
    work()
    taken: list[float] = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def calibrate(shapes: Sequence[tuple[int, int]], size: int = 2048) -> Calibration:
    """Best products of `size` rows with `size` x `size` and with the model's own [in, out] shapes; memory read speed."""
    import torch

    peak: dict[str, float] = {}
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        rates: list[float] = []
        for n, m in [(size, size), *shapes]:
            a, b = torch.ones(size, n, dtype=dtype), torch.ones(n, m, dtype=dtype)
            rates.append(2 * size * n * m / best_seconds(lambda a=a, b=b: torch.mm(a, b)) / 1e9)
        peak[name] = max(rates)
    cold = torch.ones(max(2**16, size**2 * 64))  # 1 GiB at 2048: beyond any cache here
    return Calibration(peak, 4 * cold.numel() / best_seconds(cold.sum) / 1e9)


def commit() -> str | None:
    """The commit measured, with `+` where the tree holds changes that are not in it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "src", "benchmarks") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def facts(threads: int) -> dict[str, Any]:
    """What every stored result says about where it was made."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            text = lines.read()
        cpu = next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
        flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag} " in text.replace("\n", " ")]
    except (OSError, StopIteration):
        cpu, flags = platform.processor() or "unknown", []
    return {
        "cpu": cpu, "flags": flags, "cores": os.cpu_count(), "threads": threads,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "platform": platform.platform(), "python": platform.python_version(), "commit": commit(),
    }  # fmt: skip


def available_bytes() -> int:
    """Memory that can be allocated without swapping."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
