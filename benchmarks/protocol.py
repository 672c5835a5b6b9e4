"""The child's side: one JSON object a line on standard input, one answer a line on standard output.

    {"do": "prepare", ...} -> {..., "import_seconds": S, "seconds": S, "peak_bytes": B}
    {"do": "step", ...}    -> {..., "seconds": S, "peak_bytes": B}
    {"do": "stop"}         -> {"stopped": true, "peak_bytes": B}

`seconds` is what the child says its work took, or else the whole command; `peak_bytes` is VmHWM, the most resident since
the process began or `forget_peak` was called. A failure is answered with {"error": "..."} and exit status 1. Whatever else prints goes to standard
error. Standard library only: every environment imports this.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from typing import Any, TextIO

BEGAN = time.perf_counter()  # before anything heavy is imported
Answer = dict[str, Any]


def memory(field: str) -> int:
    """Bytes of this process by the kernel's count: VmHWM (the most resident so far) or VmRSS (resident now)."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def forget_peak(trim: bool = False) -> int:
    """Start VmHWM again from what is resident now, which is returned; with `trim`, what was freed is given back first
    (a step that is timed must find the heap as the step before left it)."""
    if trim:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as knob:
        knob.write("5")
    return memory("VmRSS")


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of those of `packages` that are there."""
    found: dict[str, str] = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


class Commands:
    """The parent at the other end. Keeps standard output to itself: libraries print there."""

    def __init__(self) -> None:
        self.out: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        with suppress(OSError, AttributeError):  # a stopped child must not outlive a parent that was killed (Linux)
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)

    def next(self) -> Answer:
        """The next command; end of input is a stop."""
        line = sys.stdin.readline()
        return json.loads(line) if line else {"do": "stop"}

    def answer(self, **said: Any) -> None:
        self.out.write(json.dumps({**said, "peak_bytes": memory("VmHWM")}) + "\n")
        self.out.flush()


def serve(prepare: Callable[..., Answer], step: Callable[..., Answer]) -> int:
    """Answer until told to stop; -> the exit status. `prepare` returns once imports, weights and data are there."""
    commands = Commands()
    verbs = {"prepare": prepare, "step": step}
    while True:
        command = commands.next()
        if command["do"] == "stop":
            commands.answer(stopped=True)
            return 0
        begin = time.perf_counter()
        try:
            said = verbs[command.pop("do")](**command)
        except Exception as error:
            commands.answer(error=f"{type(error).__name__}: {error}")
            raise
        commands.answer(**{"seconds": time.perf_counter() - begin, **said})
