"""Asking a run to stop: signals set a flag that every loop polls, so that the work in hand is finished and saved.

First SIGINT or SIGTERM: stop at the next safe point and save. A second one: the default action, at once.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from burnish.core.errors import Interrupted


class Stop:
    """A flag with the signal that set it. `check` raises Interrupted (exit code 128 + signal) once it is set."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def check(self) -> None:
        """Raise Interrupted if a stop was asked for."""
        if self.signal is not None:
            name = signal.Signals(self.signal).name
            raise Interrupted(f"stopped by {name}", signal=self.signal, remedy="everything done is saved: burnish run ... --resume goes on, and so does burnish quickstart")

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
