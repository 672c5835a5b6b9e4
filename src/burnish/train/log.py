"""What a person sees while a run works: a progress line with the time left and the cost so far; plain lines elsewhere."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from burnish.train.loop import State


def count(value: float) -> str:
    """1234567 -> '1.23 M'."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def hush() -> None:
    """One voice at a time: transformers' bars and advice are for its own users."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


class Progressing:
    """Where the run speaks. On a terminal a live line; otherwise one plain line at most every `every` seconds."""

    def __init__(self, quiet: bool = False, every: float = 5.0) -> None:
        hush()
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
        self.live = sys.stderr.isatty() and not quiet
        self.every, self._last = every, -1e9
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._begin = 0.0

    def say(self, text: str) -> None:
        """One line."""
        (self._progress.console if self._progress else self.console).print(text, markup=False)

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Start a bar of `total` steps."""
        self.end()
        self._begin, self._last, self._done0 = time.monotonic(), -1e9, done
        self._what, self._total = what, total
        if self.live:
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[note]}"), TimeRemainingColumn(), console=self.console, transient=True,
            )  # fmt: skip
            self._progress.start()
            self._task = self._progress.add_task(what, total=total, completed=done, note="")

    def advance(self, done: int, note: str = "") -> None:
        """Now `done` of the total; `note` is what it did and cost so far."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if now - self._last >= self.every or done == self._total:
            fresh = done - self._done0
            left = f"  {(now - self._begin) / fresh * (self._total - done):4.0f} s left" if fresh and done < self._total else ""
            self._last = now
            self.say(f"{self._what:<12} {done:>6}/{self._total:<6} {note}{left}")

    def end(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None

    def step(self, row: Mapping[str, Any], timing: Mapping[str, Any], state: State) -> None:
        """What the loop reports after every step."""
        loss = "  none" if row["loss"] is None else f"{row['loss']:6.3f}"
        norm = "  none" if row["grad_norm"] is None else f"{row['grad_norm']:6.3f}"
        if row.get("router_loss") is not None:
            loss += f" (router {row['router_loss']:.3f})"
        note = f"loss {loss}  |grad| {norm}  {timing['train_tokens_per_s']:7.0f} tok/s  {count(state.ledger.flops)}FLOP so far"
        self.advance(state.step, note)
