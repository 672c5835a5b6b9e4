"""The child's side of `sandbox.pool`: JSON lines in, JSON lines out, one call at a time on the main thread.

Standard input is empty and everything printed goes to the parent as plain output, so that nothing printed can be taken
for an answer. The thread that reads requests is also the lifeline: when the parent is gone, the whole group goes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import sys
import threading
import traceback
from typing import Any


def main() -> None:
    """`child.py REQUESTS_FD REPLIES_FD TARGET`, the first line being {"settings": ..., }."""
    requests, replies, target = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    for number in (requests, replies):
        os.set_inheritable(number, False)  # programs started by the call must not hold them open
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests, lines), daemon=True).start()

    def send(**said: Any) -> None:
        data = json.dumps(said, allow_nan=False).encode() + b"\n"
        while data:
            data = data[os.write(replies, data) :]

    first = json.loads(lines.get())
    try:
        module = importlib.import_module(target)
        module.prepare(first["settings"])
    except BaseException as error:
        send(unusable=f"raised {error!r} when it was loaded", traceback=traceback.format_exc()[-8000:])
        return
    send(ready=True)
    while True:
        asked = json.loads(lines.get())
        _limit_cpu(asked["cpu_s"])
        try:
            send(id=asked["id"], value=module.answer(asked["payload"]))
        except BaseException as error:  # SystemExit too: a call that leaves is a call that failed
            send(id=asked["id"], crash=repr(error)[:500], traceback=traceback.format_exc()[-8000:])


def _read(requests: int, lines: queue.SimpleQueue[bytes]) -> None:
    with open(requests, "rb", closefd=False) as stream:
        for line in stream:
            lines.put(line)
    os.killpg(0, signal.SIGKILL)  # the parent closed its end, or died


def _limit_cpu(seconds: float) -> None:
    """A second guard for a parent that died during a loop in C, which no thread of ours can interrupt."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used + seconds) + 1, hard))


if __name__ == "__main__":
    main()
