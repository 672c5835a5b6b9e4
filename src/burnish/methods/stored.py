"""Completions that a stage of some run drew and left in its trajectories/ folder, read back as rows to learn from."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from burnish.core.errors import DataError
from burnish.methods.rounds import Round


@dataclass(frozen=True)
class Stored:
    """One completion as it was sampled. `where`: its file and place; `reward`: the total, None where it is unknown."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    reward: float | None
    where: str


def stored(folder: Path, decode: Callable[[Sequence[int]], str]) -> Iterator[Stored]:
    """Every completion of every round, in order.

    `decode` is of the model that is to learn: ids that do not read the same there were drawn by another. Raises DataError
    for that, and for a folder that holds no rounds or damaged ones.
    """
    files = sorted(p for p in folder.glob("round-*.jsonl.gz") if "-credit-" not in p.name)
    if not files:
        raise DataError("is a folder without rounds", where=str(folder), remedy="name the trajectories/ folder of a stage that drew completions")
    for path in files:
        try:
            drawn = Round.read(path)
        except (OSError, EOFError, ValueError, KeyError, TypeError, StopIteration, zlib.error) as error:
            raise DataError(f"is not a round that can be read: {error!r}", where=str(path)) from error
        if len(drawn.prompts) != len(drawn.groups):
            message = "does not hold the prompts it was drawn for"
            raise DataError(message, where=str(path), remedy="draw it again: it was written by an older burnish")
        for q, (prompt, group) in enumerate(zip(drawn.prompts, drawn.groups)):
            for i, sample in enumerate(group):
                where = f"{path}, prompt {q + 1}, sample {i + 1}"
                if not q and not i and sample.text and not decode(sample.tokens).startswith(sample.text):
                    message = f"reads {decode(sample.tokens)[:60]!r} with this model's tokenizer, and was {sample.text[:60]!r} when it was drawn"
                    raise DataError(message, where=where, remedy="learn from completions of a model with the same tokenizer")
                yield Stored(prompt, sample.tokens, sample.worth, where)
