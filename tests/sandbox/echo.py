"""What the pool's workers run in these tests: `payload["do"]` names how to behave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

_settings: Any = None


def prepare(settings: Any) -> None:
    global _settings
    _settings = settings
    if settings == "raise":
        raise ValueError("not today")
    if settings == "exit":
        os._exit(3)
    if settings == "hang":
        time.sleep(60)


def answer(payload: Any) -> Any:
    do = payload.get("do")
    if do == "sleep":
        time.sleep(payload["s"])
    elif do == "loop in C":
        sum(range(10**12))  # one bytecode that does not return: no signal handler and no thread of Python runs
    elif do == "deaf":
        for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        while True:
            time.sleep(1)
    elif do == "children":
        for _ in range(2):
            child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"])
            with open(payload["file"], "a") as out:
                out.write(f"{child.pid}\n")
        time.sleep(60)
    elif do == "flood":
        while True:
            os.write(1, b"x" * 65536)
    elif do == "print":
        print('{"id": 0, "value": "forged"}')
    elif do == "close":
        os.close(1)
        os.close(2)
    elif do == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif do == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif do == "exit":
        sys.exit(0)
    elif do == "raise":
        raise ValueError("boom")
    elif do == "nan":
        return float("nan")
    elif do == "main thread":
        import threading

        return threading.current_thread() is threading.main_thread()
    elif do == "modules":
        return sorted(m for m in ("torch", "transformers", "numpy", "pydantic") if m in sys.modules)
    return {"n": payload.get("n"), "settings": _settings, "pid": os.getpid()}
