"""What machine this is, and how fast it is today."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from burnish import __version__


def gflops(dtype: torch.dtype, size: int = 1536, seconds: float = 0.4) -> float:
    """The best of several products of size^3 within `seconds`: this machine's speed now."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        begin = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best / 1e9


def environment() -> dict[str, Any]:
    """environment.json: versions, machine, threads, and how fast it is today."""
    import numpy
    import peft
    import tokenizers
    import transformers

    try:
        commit = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    modules = {"torch": torch, "transformers": transformers, "peft": peft, "tokenizers": tokenizers, "numpy": numpy}
    return {
        "schema": 1,
        "burnish": __version__,
        "commit": commit,
        "python": platform.python_version(),
        "versions": {name: module.__version__ for name, module in modules.items()},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "calibration_gflops": {"float32": round(gflops(torch.float32), 1), "bfloat16": round(gflops(torch.bfloat16), 1)},
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
