"""What an engine is: it grows forests of token segments. Prefill a node once, fork it, sample, score, free it.

A node is one segment of tokens under a parent; a conversation or a search tree is a chain of nodes. Everything here is
ids and numbers: text reaches an engine as ids and leaves it in trajectories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from burnish.core.errors import BurnishError, ConfigError, DataError
from burnish.core.records import Sampling, Spend, Trajectory

Capability = Literal["fork", "ids", "logprobs", "score"]
MEANING: dict[str, str] = {
    "fork": "continue one prefix several times without reading it again",
    "ids": "report the token ids it sampled",
    "logprobs": "report the log-probability of the tokens it sampled",
    "score": "give log-probabilities of tokens it did not sample",
}


NOTHING = Spend()


@dataclass(frozen=True)
class Prompt:
    """What a strategy is asked: token ids, and the number of the item's random streams, whatever stands beside it."""

    item: int
    ids: tuple[int, ...]


class StaleNodeError(BurnishError):
    """A node that was freed, or whose keys and values belong to weights that have changed since."""


@dataclass(eq=False)
class Node:
    """One segment of tokens below its parent.

    start    position of its first token in the sequence from the root
    version  the weights its keys and values were computed with; empty until they are
    cost     what computing them took (a shared prefix is charged once, to its node)
    uses     handles given out and children that lean on it; at 0 it is gone
    """

    id: str
    ids: tuple[int, ...]
    parent: Node | None = None
    version: str = ""
    cost: Spend = NOTHING
    uses: int = 1
    start: int = field(init=False)

    def __post_init__(self) -> None:
        self.start = 0 if self.parent is None else self.parent.end

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.start + len(self.ids)

    @property
    def chain(self) -> list[Node]:
        """The nodes from the root to this one."""
        above: list[Node] = []
        node: Node | None = self
        while node is not None:
            above.append(node)
            node = node.parent
        return above[::-1]

    @property
    def path(self) -> tuple[int, ...]:
        """Every token from the root to its end."""
        return tuple(t for node in self.chain for t in node.ids)


class Engine(Protocol):
    """Local, remote or scripted. `spend` is the running total of everything done; `can` says what else it offers."""

    @property
    def can(self) -> frozenset[str]: ...

    @property
    def spend(self) -> Spend: ...

    @property
    def weights_version(self) -> str:
        """Changes whenever sampled tokens could."""
        ...

    def prefill(self, ids: Sequence[int], parent: Node | None = None) -> Node:
        """A node of these tokens, alone or below `parent`. The same tokens in the same place are one node."""
        ...

    def fork(self, node: Node, k: int) -> list[Node]:
        """k more handles on a node, each to be freed. Nodes never change, so nothing is copied."""
        ...

    def sample(self, nodes: Sequence[Node], sampling: Sampling, keys: Sequence[tuple[int, int]]) -> list[Trajectory]:
        """One trajectory below each node. keys: (item, sample) of each row: with the seed, its own random stream."""
        ...

    def score(self, nodes: Sequence[Node]) -> list[tuple[float, ...]]:
        """Log-probability of each node's own tokens given all before them (a root's first token has none: left out)."""
        ...

    def free(self, node: Node) -> None:
        """Give one handle back."""
        ...


class Nodes:
    """The nodes of an engine that holds nothing but their ids: the same tokens in the same place are one node."""

    weights_version: str

    def __init__(self) -> None:
        self._nodes: dict[tuple[Node | None, tuple[int, ...]], Node] = {}
        self._made = 0

    def reading(self, ids: tuple[int, ...]) -> Spend:
        """What making a node of these tokens costs now."""
        return NOTHING

    def prefill(self, ids: Sequence[int], parent: Node | None = None) -> Node:
        """See Engine. Raises DataError without tokens."""
        name = parent, tuple(ids)
        if not name[1]:
            raise DataError("a node needs at least one token", where="prefill")
        if name in self._nodes:
            self._nodes[name].uses += 1
        else:
            if parent is not None:
                self._held(parent).uses += 1
            self._made += 1
            self._nodes[name] = Node(
                f"n{self._made}", name[1], parent, self.weights_version, self.reading(name[1])
            )
        return self._nodes[name]

    def fork(self, node: Node, k: int) -> list[Node]:
        """See Engine."""
        self._held(node).uses += k
        return [node] * k

    def free(self, node: Node) -> None:
        """See Engine."""
        current: Node | None = self._held(node)
        while current is not None:
            current.uses -= 1
            if current.uses:
                return
            del self._nodes[current.parent, current.ids]
            current = current.parent

    @property
    def held(self) -> int:
        """Nodes not freed yet: 0 when a strategy has cleaned up after itself."""
        return len(self._nodes)

    def _held(self, node: Node) -> Node:
        if node.uses < 1:
            raise StaleNodeError("was freed", where=f"node {node.id}", remedy="prefill its tokens again")
        return node


def need(engine: Engine, who: str, *capabilities: Capability) -> None:
    """Raise ConfigError, in words, where `who` needs what the engine cannot do."""
    missing = [c for c in capabilities if c not in engine.can]
    if missing:
        offers = ", ".join(sorted(engine.can)) or "sampling only"
        inner = getattr(engine, "engine", engine)  # a pool offers what its engine does
        raise ConfigError(
            f"needs an engine that can {' and '.join(MEANING[c] for c in missing)}",
            where=who,
            remedy=f"{type(inner).__name__} offers: {offers}; use the local engine",
        )


def check_sampling(sampling: Sampling) -> None:
    """Raise ConfigError for settings no distribution has."""
    s = sampling
    wrong = {
        "temperature": (s.temperature, 0 <= s.temperature < float("inf"), "0 (greedy) or a positive number"),
        "top_k": (s.top_k, s.top_k >= 0, "0 (off) or a positive whole number"),
        "top_p": (s.top_p, 0 < s.top_p <= 1, "more than 0, at most 1 (off)"),
        "min_p": (s.min_p, 0 <= s.min_p < 1, "0 (off) or a number below 1"),
        "max_new_tokens": (s.max_new_tokens, s.max_new_tokens >= 1, "at least 1"),
        "stop": (s.stop, all(s.stop), "strings that are not empty"),
    }
    for name, (value, good, wanted) in wrong.items():
        if not good:
            raise ConfigError(f"{value!r} given, wanted {wanted}", where=f"sampling.{name}")


def check_rows(nodes: Sequence[Node], keys: Sequence[tuple[int, int]]) -> None:
    """Raise ConfigError where rows and random streams do not match one to one."""
    if len(nodes) != len(keys):
        raise ConfigError(
            f"{len(keys)} keys for {len(nodes)} nodes", where="sample", remedy="give one (item, sample) a row"
        )
    seen = set[tuple[Node, tuple[int, int]]]()
    for row in zip(nodes, keys):
        if row in seen:
            raise ConfigError(
                f"key {row[1]} is given twice for one node: both rows would draw the same noise",
                where="sample",
                remedy="number the samples of an item 0, 1, 2, ...",
            )
        seen.add(row)


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the earliest stop string."""
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    return text[: min(found)] if found else text
