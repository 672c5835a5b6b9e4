"""Shared seeded samples: strategies that only need independent samples draw prefixes of one pool.

Sample s of an item is a pure function of (weights, prompt, sampling settings, item, s), so `vote:4` is the first four
of `vote:16` and nothing is drawn twice. What a strategy spends is charged as if it had drawn its samples itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from burnish.core.errors import ConfigError
from burnish.core.records import Sampling, Spend, Trajectory
from burnish.engines.base import Engine, Node, Prompt


@dataclass(frozen=True)
class Drawn:
    """The first samples of one prompt, in order, and what they cost a strategy that draws them alone."""

    samples: tuple[Trajectory, ...]
    prefill: Spend

    @property
    def spend(self) -> Spend:
        """The prompt read once, every sample drawn once."""
        return sum((t.cost for t in self.samples), self.prefill)


class Pool:
    """An engine that remembers its independent samples. Everything else is the engine's own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._drawn: dict[tuple[Prompt, Sampling], Drawn] = {}
        self._version = engine.weights_version

    @staticmethod
    def over(engine: Engine | Pool) -> Pool:
        """The engine itself where it is a pool, else a new pool over it."""
        return engine if isinstance(engine, Pool) else Pool(engine)

    @property
    def can(self) -> frozenset[str]:
        return self.engine.can

    @property
    def spend(self) -> Spend:
        """What was really done, which is less than the sum of what strategies are charged."""
        return self.engine.spend

    @property
    def weights_version(self) -> str:
        return self.engine.weights_version

    def prefill(self, ids: Sequence[int], parent: Node | None = None) -> Node:
        return self.engine.prefill(ids, parent)

    def fork(self, node: Node, k: int) -> list[Node]:
        return self.engine.fork(node, k)

    def sample(self, nodes: Sequence[Node], sampling: Sampling, keys: Sequence[tuple[int, int]]) -> list[Trajectory]:
        return self.engine.sample(nodes, sampling, keys)

    def score(self, nodes: Sequence[Node]) -> list[tuple[float, ...]]:
        return self.engine.score(nodes)

    def free(self, node: Node) -> None:
        self.engine.free(node)

    def draw(self, prompts: Sequence[Prompt], sampling: Sampling, n: int) -> list[Drawn]:
        """The first n samples of every prompt; those missing are drawn now, in one call. Raises ConfigError for n < 1."""
        if n < 1:
            raise ConfigError(f"{n} samples asked for, wanted at least 1", where="n")
        if self._version != self.engine.weights_version:
            self.forget()
        missing = [p for p in dict.fromkeys(prompts) if len(self._samples(p, sampling)) < n]
        nodes = [self.engine.prefill(p.ids) for p in missing]
        rows = [(p, node, s) for p, node in zip(missing, nodes) for s in range(len(self._samples(p, sampling)), n)]
        drawn = (
            self.engine.sample([node for _, node, _ in rows], sampling, [(p.item, s) for p, _, s in rows])
            if rows
            else []
        )
        fresh: dict[Prompt, list[Trajectory]] = {p: [] for p in missing}
        for (p, _, _), trajectory in zip(rows, drawn):
            fresh[p].append(trajectory)
        for p, node in zip(missing, nodes):
            self._drawn[p, sampling] = Drawn((*self._samples(p, sampling), *fresh[p]), node.cost)
            self.engine.free(node)
        found = [self._drawn[p, sampling] for p in prompts]
        return [replace(d, samples=d.samples[:n]) for d in found]

    def forget(self) -> None:
        """Drop every sample: the weights they came from are gone."""
        self._drawn.clear()
        self._version = self.engine.weights_version

    def _samples(self, prompt: Prompt, sampling: Sampling) -> tuple[Trajectory, ...]:
        found = self._drawn.get((prompt, sampling))
        return () if found is None else found.samples
