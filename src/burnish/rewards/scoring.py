"""Scoring a batch: every component of every sample, calls of user functions in killable children, errors kept apart."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

from burnish.config.schema import Reward
from burnish.config.schema import Rewards as Block
from burnish.core.errors import ConfigError, DataError, RewardError
from burnish.core.metrics import emit
from burnish.core.records import Scored
from burnish.core.signature import Inputs
from burnish.core.table import RowDescription, load_row
from burnish.rewards import statistics
from burnish.rewards.base import attempt, plain, text_of
from burnish.rewards.combine import applicable, routed, total
from burnish.rewards.segments import Segmenter
from burnish.sandbox.pool import Job, Pool, Reply, Unusable

CHUNK = 16  # samples of a call where there are no groups: fixed, so that results do not depend on the workers
UNROUTED = Scored(detail="not routed here")
TOLD = 5  # failures an error message lists


@dataclass(frozen=True)
class Breakdown:
    """What a batch of samples is worth. Components stay apart for methods that normalise each on its own.

    stats       {"total": metrics, "components": {title: metrics}, "warnings": [text]}, see `statistics`
    tracebacks  title -> the first traceback of that reward, where one raised
    """

    components: dict[str, list[Scored]]
    total: list[Scored]
    stats: dict[str, Any]
    tracebacks: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Component:
    """One reward of the block: its row, its settings, and the pool it runs in (None: in this process)."""

    reward: Reward
    row: RowDescription
    settings: Mapping[str, Any]
    pool: Pool | None

    @property
    def title(self) -> str:
        return self.reward.title

    @property
    def process(self) -> bool:
        """Whether it is a process reward: it takes `steps`."""
        return "steps" in self.row.inputs

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns of the data it cannot do without."""
        own = ("prompts", "completions", "steps", "group")
        return tuple(self.reward.columns.get(name, name) for name in self.row.inputs.required if name not in own)

    def arguments(self, given: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        """What its signature names of `given`, under its own names. Raises DataError for what is missing."""
        mapping, inputs = self.reward.columns, self.row.inputs
        found: dict[str, Sequence[Any]] = {}
        if inputs.rest or inputs == Inputs():  # an object of the user's does not say what it takes: it gets all
            settings = {p.name for p in self.row.parameters}
            found = {name: values for name, values in given.items() if name not in settings}
        for name in (*inputs.required, *inputs.optional, *mapping):
            column = mapping.get(name, name)
            if column in given:
                found[name] = given[column]
            elif name in inputs.required or name in mapping:
                raise self._missing(name, column, given)
        return found

    def _missing(self, name: str, column: str, given: Mapping[str, Any]) -> DataError:
        where, remedy = f"reward {self.title}", None
        if name == "group":
            message = "compares the completions of one prompt, and these are in no groups"
        elif name == "steps":
            message = "is a process reward, and there are no steps here to score"
        else:
            known = ", ".join(n for n in given if n not in ("prompts", "completions")) or "none"
            message, remedy = f"needs a column {column!r}; the data has: {known}", f"columns: {{{name}: <your column>}}"
        return DataError(message, where=where, remedy=remedy)


class Rewards:
    """Scores completions. Use as a context manager, or `close` it: workers are child processes."""

    def __init__(
        self, block: Block, components: Sequence[Component], task: str | None = None, cut: Segmenter | None = None
    ) -> None:
        self.block, self.components, self.task, self.cut = block, tuple(components), task, cut
        self.weights = {c.title: c.reward.weight for c in components}
        self.seconds = 0.0  # of all scoring so far
        self._combine = partial(load_row("combine", block.combine.name), **block.combine.params)
        named = [v for v in block.combine.params.values() if isinstance(v, str)]
        self._counted = {title for title, weight in self.weights.items() if weight != 0 or title in named}

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        for component in self.components:
            if component.pool:
                component.pool.close()
        if self.cut is not None:
            self.cut.close()

    @property
    def process(self) -> bool:
        """Whether one of them scores steps."""
        return any(c.process for c in self.components)

    @property
    def sources(self) -> dict[str, str]:
        """Title -> sha256 of the file that defines it, for what a run records."""
        return {c.title: c.row.sha256 for c in self.components}

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]] | None = None,
        groups: Sequence[int] | None = None,
        *,
        steps: Sequence[Sequence[str]] | None = None,
        step_ends: Sequence[Sequence[int]] | None = None,
    ) -> Breakdown:
        """Every component and the total of every sample, in the order given.

        prompts, completions  texts, or lists of messages; functions get them as they are given here
        groups                which samples answer the same prompt; one call of a function sees one group, whole
        steps, step_ends      for process rewards: the steps of each completion (None: cut as `rewards.steps` says), and the
                              token each ends before (None: the character)
        Raises RewardError when more than `max_error_rate` of a component's samples fail, DataError for columns that are
        missing or too short, ConfigError for a file that does not load.
        """
        began = time.monotonic()
        if steps is None and self.cut is not None:
            texts = [text_of(plain(one)) for one in completions]
            steps = [[text[a:b] for a, b in pairwise([0, *at])] for text, at in zip(texts, self.cut(texts))]
        given = self._given(prompts, completions, columns or {}, groups, steps)
        count, titles = len(completions), list(self.weights)
        routes: list[frozenset[str]] = [frozenset(titles)] * count
        if route := self.block.route:
            routes = routed(titles, route.column, route.rewards, given, count)
        ends = step_ends or ([_ends(parts) for parts in steps] if steps is not None else None)
        found: dict[str, list[Scored | None]] = {}
        tracebacks: dict[str, str] = {}
        seconds: dict[str, float] = {}
        for c in self.components:
            mine, started = [i for i in range(count) if c.title in routes[i]], time.monotonic()
            scores, trace = self._component(c, given, mine, groups, ends if c.process else None)
            found[c.title] = [None] * count
            for i, one in zip(mine, scores):
                found[c.title][i] = one
            seconds[c.title] = time.monotonic() - started
            if trace:
                tracebacks[c.title] = trace
        of = list(groups) if groups is not None else list(range(count))
        counted = {title: ones for title, ones in found.items() if title in self._counted}
        summed = [total(parts, self.weights, self._combine) for parts in applicable(counted, of)]
        stats = self._stats(found, summed, of if groups is not None else None)
        stats["total"] |= emit(reward_seconds=time.monotonic() - began)
        self.seconds += stats["total"]["reward_seconds"]
        for title, spent in seconds.items():
            stats["components"][title] |= emit(reward_seconds=spent)
        components = {title: [one or UNROUTED for one in ones] for title, ones in found.items()}
        return Breakdown(components, summed, stats, tracebacks)

    def _stats(
        self, found: Mapping[str, list[Scored | None]], summed: list[Scored], groups: list[int] | None
    ) -> dict[str, Any]:
        rows = {title: statistics.describe([one for one in ones if one]) for title, ones in found.items()}
        overall = statistics.describe(summed)
        overall |= statistics.spread(found, summed, groups if groups is not None else list(range(len(summed))))
        return {"total": overall, "components": rows, "warnings": statistics.warnings(rows, overall, self.weights)}

    def _given(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        groups: Sequence[int] | None,
        steps: Sequence[Sequence[str]] | None,
    ) -> dict[str, Sequence[Any]]:
        if not completions:
            raise DataError("no completions to score", where="rewards")
        taken = {"prompts", "completions"} | ({"group"} if groups is not None else set()) | ({"steps"} if steps else set())
        if stray := taken & set(columns):
            raise DataError(f"a column of the data is called {sorted(stray)[0]!r}, as an argument is", where="rewards")
        given: dict[str, Sequence[Any]] = {"prompts": list(map(plain, prompts)), "completions": list(map(plain, completions))}
        given |= {name: list(values) for name, values in columns.items()}
        if groups is not None:
            given["group"] = list(groups)
        if steps is not None:
            given["steps"] = [list(parts) for parts in steps]
        if self.task is not None:
            given.setdefault("task", [self.task] * len(completions))
        if wrong := next((name for name, values in given.items() if len(values) != len(completions)), None):
            message = f"{wrong!r} holds {len(given[wrong])} rows for {len(completions)} completions"
            raise DataError(message, where="rewards")
        return given

    def _component(
        self,
        c: Component,
        given: Mapping[str, Sequence[Any]],
        mine: Sequence[int],
        groups: Sequence[int] | None,
        ends: Sequence[Sequence[int]] | None,
    ) -> tuple[list[Scored], str]:
        """One component's scores of the samples `mine`, and its first traceback."""
        if not mine:
            return [], ""
        arguments = c.arguments(given)
        allowed = int(self.block.max_error_rate * len(mine) + 1e-9)
        found: dict[int, Scored] = {}
        traces: list[str] = []
        failed: dict[int, Scored] = {}
        for indices, scores, trace in self._calls(c, arguments, _calls(mine, groups), ends):
            if trace:
                traces.append(trace)
            for i, one in zip(indices, scores, strict=True):
                found[i] = _located(one, c.reward.name, i)
                if one.error is not None:
                    failed[i] = found[i]
            if len(failed) > allowed:
                raise _too_many(c.reward.name, failed, len(mine), self.block.max_error_rate, traces)
        return [found[i] for i in mine], traces[0] if traces else ""

    def _calls(
        self, c: Component, arguments: Mapping[str, Sequence[Any]], calls: list[list[int]], ends: Sequence[Sequence[int]] | None
    ) -> Iterator[tuple[list[int], list[Scored], str]]:
        """(samples, their scores, traceback) of calls as they end. A call that was killed, or whose process died, is
        followed by calls of its samples one by one; a sample that found its service out of reach is tried once more."""
        if c.pool is None:
            function = load_row("reward", c.reward.name)
            for indices in calls:
                picked = _picked(arguments, indices)
                scores, trace = attempt(function, picked, c.settings, len(indices), _of(ends, indices))
                yield indices, scores, trace
            return
        again: list[int] = []
        for indices, reply in self._replies(c, arguments, calls, ends):
            scores, trace = _scores(reply, len(indices))
            if reply.fault is not None and len(indices) > 1:
                again += indices
                continue
            retry = [i for i, one in zip(indices, scores) if one.error == "infra"]
            again += retry
            kept = [(i, one) for i, one in zip(indices, scores) if i not in retry]
            yield [i for i, _ in kept], [one for _, one in kept], trace
        for indices, reply in self._replies(c, arguments, [[i] for i in sorted(again)], ends):
            yield indices, *_scores(reply, 1)

    def _replies(
        self, c: Component, arguments: Mapping[str, Sequence[Any]], calls: list[list[int]], ends: Sequence[Sequence[int]] | None
    ) -> Iterator[tuple[list[int], Reply]]:
        assert c.pool
        jobs = [Job(_payload(c, arguments, indices, ends), self.block.deadline_s) for indices in calls]
        try:
            with closing(c.pool.each(jobs)) as replies:
                for index, reply in replies:
                    yield calls[index], reply
        except Unusable as error:
            where = f"reward {c.reward.name}"
            raise ConfigError(f"{error.message}\n{error.traceback.rstrip()}".rstrip(), where=where) from error


def _calls(mine: Sequence[int], groups: Sequence[int] | None) -> list[list[int]]:
    """The samples of each call: whole groups, or a fixed number of neighbours."""
    if groups is None:
        return [list(mine[i : i + CHUNK]) for i in range(0, len(mine), CHUNK)]
    whole: dict[int, list[int]] = {}
    for i in mine:
        whole.setdefault(groups[i], []).append(i)
    return list(whole.values())


def _picked(arguments: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
    return {name: [values[i] for i in indices] for name, values in arguments.items()}


def _of(ends: Sequence[Sequence[int]] | None, indices: Sequence[int]) -> list[list[int]] | None:
    return None if ends is None else [list(ends[i]) for i in indices]


def _payload(
    c: Component, arguments: Mapping[str, Sequence[Any]], indices: Sequence[int], ends: Sequence[Sequence[int]] | None
) -> dict[str, Any]:
    picked = _picked(arguments, indices)
    for name, values in picked.items():
        try:
            json.dumps(values)
        except (TypeError, ValueError) as error:
            raise DataError(f"column {name!r} cannot be sent to a worker: {error}", where=f"reward {c.title}") from error
    return {"arguments": picked, "settings": dict(c.settings), "count": len(indices), "ends": _of(ends, indices)}


def _scores(reply: Reply, count: int) -> tuple[list[Scored], str]:
    if reply.fault is not None:
        trace = reply.traceback or reply.printed
        return [Scored(error=reply.fault, detail=reply.detail) for _ in range(count)], trace
    return [Scored.from_json(one) for one in reply.value["scored"]], reply.value["traceback"]


def _located(one: Scored, name: str, index: int) -> Scored:
    """An error that says whose and of which sample it is."""
    if one.error is None:
        return one
    return Scored(error=one.error, detail=f"{name}, sample {index}: {one.detail}")


def _ends(steps: Sequence[str]) -> list[int]:
    at, found = 0, list[int]()
    for step in steps:
        at += len(step)
        found.append(at)
    return found


def _too_many(name: str, failed: Mapping[int, Scored], count: int, rate: float, traces: Sequence[str]) -> RewardError:
    kinds = [one.error for one in failed.values()]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    lines = [one.detail for one in list(failed.values())[:TOLD]]
    message = f"failed on {len(failed)} of {count} samples or more ({counts}); {rate:g} of them may fail"
    trace = f"\n{traces[0].rstrip()}" if traces else ""
    remedy = "mend the function; try it alone with burnish reward-test --reward; or raise max_error_rate"
    return RewardError(f"{message}\n" + "\n".join(lines) + trace, where=f"reward {name}", remedy=remedy)
