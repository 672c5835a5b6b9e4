"""A system that does as its orders say: for the harness's own tests."""

from __future__ import annotations

import os
import sys

from benchmarks.protocol import serve

steps = 0


def prepare(*, start: int, threads: int = 1) -> dict[str, object]:
    global steps
    steps = start
    print("noise on standard output")
    return {"pid": os.getpid(), "versions": {"fake": "1"}}


def step(*, seconds: float = 1.0, fail: bool = False, silent: bool = False) -> dict[str, object]:
    global steps
    if fail:
        raise ValueError("asked to fail")
    if silent:
        os._exit(0)
    steps += 1
    return {"seconds": seconds, "steps": steps, "tokens": 10}


if __name__ == "__main__":
    sys.exit(serve(prepare, step))
