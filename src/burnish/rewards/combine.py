"""From the components of a sample to its one reward: which of them apply, and how they add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from burnish.core.errors import DataError
from burnish.core.records import Scored
from burnish.core.table import About, Table


def weighted_sum(values: Mapping[str, float], weights: Mapping[str, float]) -> float | None:
    """The weighted sum of the components: r = sum over k of w_k r_k (no paper)."""
    return sum(weights[name] * value for name, value in values.items())


def gated(
    values: Mapping[str, float], weights: Mapping[str, float], *, gate: str, at_least: float = 1.0
) -> float | None:
    """The gate's own share, and the other components only where the gate is at least `at_least` (no paper).

    r = w_g r_g + [r_g >= at_least] sum over k != g of w_k r_k
    Beside `sum`: shape and brevity pay nothing where the answer is wrong. Without the gate's value it abstains.
    """
    if gate not in values:
        return None
    open_ = values[gate] >= at_least
    return sum(weights[name] * value for name, value in values.items() if name == gate or open_)


COMBINE = Table(
    "combine",
    {"sum": weighted_sum, "gated": gated},
    also={"weighted_sum": "sum", "add": "sum", "gate": "gated"},
    about={"sum": About(taxonomy=("R20",)), "gated": About(taxonomy=("R20",))},
)


def routed(
    names: Sequence[str], column: str, rewards: Mapping[str, Sequence[str]] | None, columns: Mapping[str, Sequence[Any]], count: int
) -> list[frozenset[str]]:
    """The rewards that apply to each sample: what the mapping says of its value in `column`, or what the column lists.

    Raises DataError for a sample without a route, or one that names a reward that there is not.
    """
    if column not in columns:
        known = ", ".join(columns) or "none"
        raise DataError(f"rewards are routed by the column {column!r}; the data has: {known}", where="rewards.route")
    found: list[frozenset[str]] = []
    for i in range(count):
        value = columns[column][i]
        where = f"rewards.route  sample {i}"
        if rewards is None:
            chosen = [value] if isinstance(value, str) else value
            if not isinstance(chosen, (list, tuple)) or not chosen or set(chosen) - set(names):
                wrong = f"column {column!r} holds {value!r}, wanted one or more of: {', '.join(names)}"
                raise DataError(wrong, where=where)
        elif (chosen := rewards.get(str(value))) is None:
            raise DataError(f"no route for {column} {value!r}; there are: {', '.join(rewards)}", where=where)
        found.append(frozenset(chosen))
    return found


def applicable(
    components: Mapping[str, Sequence[Scored | None]], groups: Sequence[int]
) -> list[dict[str, Scored]]:
    """The components that count for each sample, None standing for "not routed here".

    A reward that abstains on *every* sample of a group does not apply to that prompt: leaving it out is the same for
    all of them. One that abstains on some would make their sums incomparable, so there it stays, and the total abstains.
    """
    speaks: dict[str, set[int]] = {
        name: {of for one, of in zip(found, groups) if one is not None and not one.abstains}
        for name, found in components.items()
    }
    kept: list[dict[str, Scored]] = []
    for i, of in enumerate(groups):
        row = {name: found[i] for name, found in components.items() if of in speaks[name]}
        kept.append({name: one for name, one in row.items() if one is not None})
    return kept


def total(parts: Mapping[str, Scored], weights: Mapping[str, float], combine: Any) -> Scored:
    """One sample's reward. An error of a part is the total's error, else an abstention of one its abstention."""
    for name, one in parts.items():
        if one.error is not None:
            return Scored(error=one.error, detail=f"{name}: {one.detail}")
    values = {name: one.value for name, one in parts.items() if one.value is not None}
    if not parts or len(values) < len(parts):
        return Scored()
    return Scored(combine(values, weights))
