"""How a completion is cut into the steps that process rewards score.

A row is `f(text) -> list[int]`: where steps end, in characters, ascending; what follows the last end is the last step.
Blank steps are joined to the one before. Yours (`file.py:function`) runs in a killable worker, as your rewards do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

from burnish.config.schema import Choice
from burnish.core.errors import ConfigError, RewardError
from burnish.core.table import USER_ROW, About, Table, bind, describe_row, load_row
from burnish.sandbox.pool import Job, Pool, Unusable

_NUMBERED = re.compile(r"^[ \t#*]*step[ \t]+\d+[ \t]*[:.)]", re.MULTILINE | re.IGNORECASE)
START_S = 60.0  # how long a file may take to load, its imports included


def lines(text: str) -> list[int]:
    """Every line is a step, its line end included."""
    return [i + 1 for i, letter in enumerate(text) if letter == "\n"]


def numbered(text: str) -> list[int]:
    """A step begins where a line begins with `Step 1:` (any number; also `step 1.`, `## Step 1:`)."""
    return [match.start() for match in _NUMBERED.finditer(text) if match.start()]


def separator(text: str, *, between: str = "\n\n") -> list[int]:
    """A step ends after each `between`. Raises ConfigError where that is empty."""
    if not between:
        raise ConfigError("an empty text separates nothing", where="rewards.steps.between", remedy='type between: "\\n\\n"')
    return [match.end() for match in re.finditer(re.escape(between), text)]


SEGMENTERS = Table(
    "segmenter",
    {"lines": lines, "numbered": numbered, "separator": separator},
    also={"newline": "lines", "newlines": "lines", "step_marks": "numbered", "split": "separator"},
    about={"lines": About(taxonomy=("P9",)), "numbered": About(taxonomy=("P9",)), "separator": About(taxonomy=("P9",))},
)


def tidy(text: str, ends: Sequence[int]) -> list[int]:
    """The ends of steps that are not blank, the last one that of the text. An empty text is one empty step."""
    kept: list[int] = []
    for start, end in pairwise([0, *ends, len(text)]):
        if text[start:end].strip():
            kept.append(end)
        elif kept:
            kept[-1] = end
    return kept if kept else [len(text)]


class Segmenter:
    """Cuts texts. Raises, in `__call__`, RewardError for ends that cannot be meant and for a function that fails."""

    def __init__(self, choice: Choice, *, workers: int, deadline_s: float) -> None:
        self.name, self.deadline_s = choice.name, deadline_s
        row = describe_row("segmenter", choice.name)
        self.settings = bind(row, choice.params, "rewards.steps")
        self.pool: Pool | None = None
        if user := USER_ROW.fullmatch(choice.name):
            loaded = {"file": str(row.path.resolve()), "function": user["function"]}
            self.pool = Pool("burnish.rewards.worker", loaded, workers=workers, start_s=START_S)

    def close(self) -> None:
        """End the workers."""
        if self.pool is not None:
            self.pool.close()

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Where the steps of each text end, in characters; at least one step each, and the last ends with the text."""
        if self.pool is None:
            cut: Callable[[str], list[int]] = partial(load_row("segmenter", self.name), **self.settings)
            found: list[Any] = [cut(text) for text in texts]
        else:
            found = self._asked(self.pool, texts)
        return [tidy(text, self._checked(text, ends)) for text, ends in zip(texts, found, strict=True)]

    def _asked(self, pool: Pool, texts: Sequence[str]) -> list[Any]:
        jobs = [Job({"texts": [text], "settings": dict(self.settings)}, self.deadline_s) for text in texts]
        try:
            replies = pool.run(jobs)
        except Unusable as error:
            raise ConfigError(f"{error.message}\n{error.traceback.rstrip()}".rstrip(), where=f"segmenter {self.name}") from error
        if failed := next((reply for reply in replies if reply.fault is not None), None):
            trace = failed.traceback or failed.printed
            raise RewardError(f"{failed.fault}: {failed.detail}\n{trace}".rstrip(), where=f"segmenter {self.name}")
        return [reply.value["cuts"][0] for reply in replies]

    def _checked(self, text: str, ends: Any) -> list[int]:
        places: list[Any] = cast(list[Any], ends) if isinstance(ends, list) else [None]
        good = all(isinstance(end, int) and 0 < end <= len(text) for end in places)
        if not good or any(a >= b for a, b in pairwise(places)):
            wrong = f"gave {str(ends)[:80]} for a text of {len(text)} characters"
            remedy = "return ascending whole numbers: after how many characters each step ends"
            raise RewardError(wrong, where=f"segmenter {self.name}", remedy=remedy)
        return places
