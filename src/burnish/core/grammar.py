"""One grammar for strategies everywhere: `name[:n][@scorer[(aggregation)]]`, and `pass@n` for the oracle."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from burnish.core.errors import ConfigError
from burnish.core.table import describe_row, faults_in

_WORD = r"[a-z][a-z0-9_]*|[^\s@:()]+\.py:[A-Za-z_]\w*"  # a row's name, or the user's own file.py:function
_SPEC = re.compile(
    rf"(?P<name>{_WORD})(?::(?P<n>[1-9]\d{{0,8}}))?(?:@(?P<scorer>{_WORD})(?:\((?P<aggregation>[a-z][a-z0-9_]*)\))?)?"
)
_PASS = re.compile(r"pass@([1-9]\d{0,8})(?: \(oracle\))?")
_FORM = "write name[:n][@scorer[(aggregation)]], such as greedy, vote:16, best_of:16@prm(min), or pass@16"


@dataclass(frozen=True)
class Spec:
    """A strategy as written: `n` samples (None: the row's own), judged by `scorer`, steps joined by `aggregation`."""

    name: str
    n: int | None = None
    scorer: str | None = None
    aggregation: str | None = None

    @property
    def oracle(self) -> bool:
        """True where the number needs the gold answer: it is a ceiling, not a way to answer."""
        return self.name == "pass"

    @property
    def title(self) -> str:
        """As reports show it: `pass@16 (oracle)`, else as written."""
        return f"{self} (oracle)" if self.oracle else str(self)

    def __str__(self) -> str:
        if self.oracle:
            return f"pass@{self.n}"
        text = self.name if self.n is None else f"{self.name}:{self.n}"
        if self.scorer is None:
            return text
        return f"{text}@{self.scorer}" if self.aggregation is None else f"{text}@{self.scorer}({self.aggregation})"


def _hint(text: str) -> str:
    """What was probably meant, or the form to write."""
    if near := re.fullmatch(r"\W*([a-z_]+)\W*([1-9][0-9]{0,8})\W*", text.lower()):
        return f"type {near[1]}{'@' if near[1] == 'pass' else ':'}{near[2]}"
    if re.search(r"[:@]0+(?!\d)", text):
        return "the number of samples is 1 or more"
    if text.count("(") != text.count(")"):
        return "close the parenthesis: @scorer(aggregation)"
    return "type pass@16, with the number of samples" if text.strip().lower() == "pass" else _FORM


def parse(text: str, where: str = "strategy") -> Spec:
    """Read one strategy; `str(parse(text))` is its one spelling. Raises ConfigError.

    Whether the name is a row of the strategy table is not decided here.
    """
    if match := _PASS.fullmatch(text):
        return Spec("pass", int(match[1]))
    match = _SPEC.fullmatch(text)
    if match is None or match["name"] == "pass":
        raise ConfigError(f"{text[:80]!r} is not a strategy", where=where, remedy=_hint(text))
    return Spec(match["name"], int(match["n"]) if match["n"] else None, match["scorer"], match["aggregation"])


def arguments(spec: Spec) -> tuple[dict[str, Any], list[str]]:
    """(keyword arguments of the strategy's row, what is wrong with what was written), the scorer's own included.

    Reads descriptions only. Raises ConfigError where the name is no row of the strategy table.
    """
    given = {"n": spec.n, "scorer": spec.scorer, "aggregation": spec.aggregation}
    values, faults = faults_in(describe_row("strategy", spec.name), {k: v for k, v in given.items() if v is not None})
    if spec.scorer is not None and not faults:
        joined = {} if spec.aggregation is None else {"aggregation": spec.aggregation}
        faults = faults_in(describe_row("scorer", spec.scorer), joined)[1]
    return values, [message for _, message in faults]
