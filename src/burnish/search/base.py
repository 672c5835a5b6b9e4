"""What a strategy is: (engine, prompts, judge, budget) -> outcomes. Test-time compute with its price on it.

A strategy sees token ids and what the task lends it, never a model. It returns, for each prompt, an answer, the trace
it came from, and what that cost.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from burnish.core.errors import ConfigError
from burnish.core.grammar import Spec, arguments, parse
from burnish.core.records import Sampling, Spend, Trajectory
from burnish.core.table import describe_row, load_row
from burnish.engines.base import Engine, Prompt


@dataclass(frozen=True)
class Judge:
    """What a task lends to a strategy.

    answer_key  completion -> what votes are counted by, None where it holds no answer; None: the task has no such key
    correct     (prompt's index, completion) -> whether it is right. It may read the gold answer: for oracles only
    rule        (prompt's index, completion) -> whether a rule that reads no gold answer accepts it; None: there is none
    """

    answer_key: Callable[[str], Hashable | None] | None = None
    correct: Callable[[int, str], bool] | None = None
    rule: Callable[[int, str], bool] | None = None


@dataclass(frozen=True)
class Budget:
    """How samples are drawn, and the most sampled tokens a prompt may cost (None: what the strategy's samples take)."""

    sampling: Sampling
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"{self.tokens} tokens buy nothing", where="budget.tokens", remedy="give at least 1")


@dataclass(frozen=True)
class Outcome:
    """What a strategy leaves of one prompt.

    answer  the trajectory it answers with, None where it has none
    trace   everything it drew, in order; one with finish "budget" was cut by the budget and cannot be the answer
    spend   prompt and trace as if drawn for this alone, and what scoring them took
    grade   oracles only: the estimate itself, because they have no answer to verify
    scores  what the scorer gave each of `whole`, None where it abstained; empty without a scorer
    keys    what each of `whole` was counted under; empty where nothing was voted on
    """

    answer: Trajectory | None
    trace: tuple[Trajectory, ...]
    spend: Spend
    grade: float | None = None
    scores: tuple[float | None, ...] = ()
    keys: tuple[Hashable | None, ...] = ()

    @property
    def text(self) -> str | None:
        return None if self.answer is None else self.answer.text

    @property
    def whole(self) -> tuple[Trajectory, ...]:
        """The part of the trace that the budget left whole."""
        return tuple(t for t in self.trace if t.finish != "budget")


Strategy = Callable[[Engine, Sequence[Prompt], Judge, Budget], list[Outcome]]


def within(samples: Sequence[Trajectory], tokens: int | None) -> tuple[Trajectory, ...]:
    """The samples that `tokens` sampled tokens pay for; the one that crosses the limit is cut there ("budget")."""
    if tokens is None:
        return tuple(samples)
    kept: list[Trajectory] = []
    left = tokens
    for t in samples:
        size = t.cost.sampled_tokens
        if left == 0:
            break
        if size > left:
            known = sum(s.end - s.start for s in t.spans if s.kind == "completion")  # 0: a server that gave text only
            end = len(t.tokens) - min(known, size - left)
            spans = tuple(replace(s, end=min(s.end, end)) for s in t.spans)
            share = [value * left // size for value in (t.cost.useful_flops, t.cost.executed_flops)]
            cost = replace(t.cost, sampled_tokens=left, useful_flops=share[0], executed_flops=share[1])
            logprobs = None if t.logprobs is None else t.logprobs[:left]
            cut = replace(t, tokens=t.tokens[:end], logprobs=logprobs, spans=spans, cost=cost, finish="budget", text="")
            return (*kept, cut)
        kept.append(t)
        left -= size
    return tuple(kept)


@dataclass(frozen=True, eq=False)
class Bound:
    """A strategy as written, ready to run."""

    spec: Spec
    run: Strategy
    parameters: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.spec)

    @property
    def oracle(self) -> bool:
        return self.spec.oracle


def strategy(text: str, where: str = "strategy") -> Bound:
    """`vote:16` as a function with its parameters. Raises ConfigError for a form, name or part that does not exist."""
    spec = parse(text, where)
    row = describe_row("strategy", spec.name)
    if spec.scorer is not None and "scorer" not in {p.name for p in row.parameters}:
        raise ConfigError(
            f"{spec.name!r} takes no scorer", where=where, remedy=f"type {replace(spec, scorer=None, aggregation=None)}"
        )
    parameters, faults = arguments(spec)
    if faults:
        needy = spec.scorer is None and parameters.get("scorer", ...) is None
        like = f"type {replace(spec, scorer='logprob')}" if needy else None
        raise ConfigError("\n".join(f"{spec}: {message}" for message in faults), where=where, remedy=like)
    return Bound(spec, partial(load_row("strategy", spec.name), **parameters), parameters)
