"""Rewards whose running time the completion decides: they run in killable workers, as the user's own functions do.

A pattern can backtrack for ever and a computer algebra system can hang; the row's place in this file is what puts it
into the pool.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Sequence
from typing import Any, Literal

from burnish.core.table import About, Table
from burnish.rewards.answers import given, wanted
from burnish.rewards.base import Completion, text_of

Values = list[float | None]
LONGEST = 500  # characters of an answer that is an expression; a longer one is no answer


def regex(
    completions: Sequence[Completion],
    *,
    pattern: str,
    on: Literal["answer", "text"] = "answer",
    part: Literal["all", "after_think"] = "all",
) -> Values:
    """1 where the marked answer (`on: text`: the whole completion) matches the pattern from end to end, else 0.

    Python's `re`, a dot also for line ends. Nothing is searched for: a match somewhere in a long text is easy to spray.
    """
    compiled = re.compile(pattern, re.DOTALL)
    texts = [text_of(c) if on == "text" else given(c, part) for c in completions]
    return [float(text is not None and compiled.fullmatch(text) is not None) for text in texts]


def expression(
    completions: Sequence[Completion], answer: Sequence[Any], *, part: Literal["all", "after_think"] = "all"
) -> Values:
    """1 where the marked answer is the gold expression, by algebra (math-verify); else 0.

    An answer that leaves the sum to the reader is 0: `12+5` for 17, `42=42` for 42, unless gold is written so itself.
    A gold answer that cannot be read makes it abstain.
    """
    library: Any = importlib.import_module("math_verify")
    for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)  # it warns that its own time limits are off: ours hold
    reading = [library.LatexExtractionConfig(), library.ExprExtractionConfig()]

    def read(text: str) -> list[Any]:
        return library.parse(f"${text}$", extraction_config=reading, parsing_timeout=None) if text else []

    found: Values = []
    for completion, gold in zip(completions, answer):
        right = read(wanted(gold))
        said = given(completion, part)
        if not right:
            found.append(None)
        elif said is None or len(said) > LONGEST or "$" in said:
            found.append(0.0)
        else:
            answered = read(said)
            worked = bool(answered) and (_worked_out(answered[0]) or not _worked_out(right[0]))
            found.append(float(worked and bool(library.verify(right, answered, timeout_seconds=None))))
    return found


def _worked_out(value: Any) -> bool:
    """Whether no sum or product of plain numbers is left to do: 12+5, 6*7 and 41=42 are questions, not answers."""
    import sympy

    if isinstance(value, str):
        return True
    if isinstance(value, sympy.Equality) and not isinstance(value.lhs, sympy.Symbol):
        return False
    for node in sympy.preorder_traversal(value):
        numbers = [a for a in getattr(node, "args", ()) if isinstance(a, sympy.Integer | sympy.Float) and abs(a) != 1]
        if isinstance(node, sympy.Add) and sum(bool(a.is_Number) for a in node.args) > 1:
            return False
        if isinstance(node, sympy.Mul) and len(numbers) > 1:
            return False
    return True


ISOLATED = Table(
    "reward",
    {"regex": regex, "expression": expression},
    also={"pattern": "regex", "math_verify": "expression", "symbolic": "expression", "math": "expression"},
    about={"regex": About(taxonomy=("R3",)), "expression": About(taxonomy=("R3", "R13"), package="math_verify", extra="math")},
)
