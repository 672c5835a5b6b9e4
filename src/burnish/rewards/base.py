"""What a reward is, and how whatever it returns becomes one `Scored` a sample. No torch.

A reward is `f(prompts, completions, **columns) -> list[float | None]`, a process reward
`f(prompts, completions, steps, **columns) -> list[list[float | None]]`. Prompts and completions are texts, or lists of
{"role", "content"} messages where the data is conversational; they reach the function as the data has them. A column is
a list as long as they are. Everything is passed by keyword, and only what the function's signature names (all columns
where it ends in **). Keyword-only parameters are settings. None abstains.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from numbers import Real
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.records import Message, Scored

Completion = str | Sequence[Mapping[str, Any]]
OUT_OF_REACH = (ConnectionError, TimeoutError)  # what a function raises where the service it asks is down
NOT_A_LIST = "wanted a list with a number or None for each completion"


def text_of(completion: Completion) -> str:
    """The completion as text: itself, or what its assistant turns say (all turns where none is the assistant's)."""
    if isinstance(completion, str):
        return completion
    said = [turn for turn in completion if turn.get("role") == "assistant"] or list(completion)
    return "\n".join(str(turn.get("content") or "") for turn in said)


def plain(value: Any) -> Any:
    """Prompts and completions as JSON: messages of ours become {"role", "content"}."""
    if isinstance(value, str):
        return value
    return [{"role": m.role, "content": m.content} if isinstance(m, Message) else dict(m) for m in value]


# ---- what came back ------------------------------------------------------------------------------------------------


def scored(returned: Any, count: int, ends: Sequence[Sequence[int]] | None = None) -> list[Scored]:
    """One `Scored` for each of `count` samples from what a function returned; nothing is guessed or repaired.

    Numbers may be Python's, numpy's or torch's, and bools; a list may be an array or tensor of one dimension. What is
    no such list makes every sample invalid, what is no finite number makes its own sample invalid.
    `ends`: where each step of each sample ends, for a process reward.
    """
    values, wrong = _listed(returned)
    if not wrong and len(values) != count:
        wrong = f"returned {len(values)} values for {count} completions"
    if wrong:
        return [Scored(error="invalid", detail=wrong) for _ in range(count)]
    if ends is None:
        return [_one(value) for value in values]
    return [_steps(value, end) for value, end in zip(values, ends, strict=True)]


def _listed(returned: Any) -> tuple[list[Any], str]:
    """(the values, "") or ([], what is wrong with it)."""
    if inspect.iscoroutine(returned):
        returned.close()
        return [], "returned a coroutine: it is async; wanted a plain function (call asyncio.run inside it)"
    if isinstance(returned, (list, tuple)):
        return list(returned), ""
    shape = getattr(returned, "shape", None)
    if shape is not None and hasattr(returned, "tolist"):
        if len(shape) == 1:
            return list(returned.tolist()), ""
        return [], f"returned {_kind(returned)} of shape {tuple(shape)}; {NOT_A_LIST}"
    return [], f"returned {_kind(returned)}; {NOT_A_LIST}"


def _one(value: Any) -> Scored:
    number, wrong = _number(value)
    return Scored(error="invalid", detail=wrong) if wrong else Scored(number)


def _number(value: Any) -> tuple[float | None, str]:
    """(a finite number or None, "") or (None, what is wrong)."""
    if value is None:
        return None, ""
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(value, "item") and all(side == 1 for side in shape):
        value = value.item()
    if not isinstance(value, Real):
        return None, f"gave {_kind(value)} {_shown(value)}, wanted a finite number or None"
    try:
        number = float(value)
    except (OverflowError, ValueError):
        number = float("inf")
    return (number, "") if isfinite(number) else (None, f"gave {_shown(value)}, wanted a finite number or None")


def _steps(returned: Any, ends: Sequence[int]) -> Scored:
    values, wrong = _listed(returned)
    if not wrong and len(values) != len(ends):
        wrong = f"returned {len(values)} values for {len(ends)} steps"
    numbers: list[float | None] = []
    for index, value in enumerate(values if not wrong else ()):
        number, wrong = _number(value)
        if wrong:
            wrong = f"step {index}: {wrong}"
            break
        numbers.append(number)
    if wrong:
        return Scored(error="invalid", detail=wrong)
    known = [number for number in numbers if number is not None]
    return Scored(min(known, default=None), spans=tuple(zip(ends, numbers)))


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- calling -------------------------------------------------------------------------------------------------------


def attempt(
    function: Callable[..., Any],
    arguments: Mapping[str, Sequence[Any]],
    settings: Mapping[str, Any],
    count: int,
    ends: Sequence[Sequence[int]] | None = None,
) -> tuple[list[Scored], str]:
    """(one `Scored` a sample, the first traceback). Where the call raises, its samples are tried one by one.

    ConnectionError and TimeoutError are `infra`, every other exception is `crash`. An error that burnish itself
    understands (a wrong recipe, a missing package) is not the sample's and passes through.
    """
    try:
        return scored(function(**arguments, **settings), count, ends), ""
    except BurnishError:
        raise
    except (Exception, SystemExit) as error:
        if count == 1:
            kind = "infra" if isinstance(error, OUT_OF_REACH) else "crash"
            return [Scored(error=kind, detail=f"raised {_shown(error)}")], traceback.format_exc()[-8000:]
    found: list[Scored] = []
    first = ""
    for i in range(count):
        alone = {name: values[i : i + 1] for name, values in arguments.items()}
        one, trace = attempt(function, alone, settings, 1, None if ends is None else ends[i : i + 1])
        found += one
        first = first or trace
    return found, first
