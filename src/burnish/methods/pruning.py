"""Rollouts that are cut where the critic has lost hope: V(s_t) < below * max over k <= t of V(s_k), at step ends.

(Section 5.2.3 of the survey arXiv:2503.06072, an idea of its own; its best value so far is over all states here, the
prompt's end among them.) A share of a best value that is not positive would lie above it, and cuts nothing.

The engine decodes without values, so completions are drawn in chunks: draw, read what was drawn as a node, look at the
values, cut or go on. Noise belongs to the position, so that what is not cut is what would have been drawn in one go. A
completion is cut behind the step that lost: tokens of the chunk beyond it are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from burnish.core.metrics import emit
from burnish.core.records import Sampling, Span, Spend, Trajectory
from burnish.engines.base import Node
from burnish.engines.local.engine import LocalEngine
from burnish.forest.pack import Batch
from burnish.forest.stream import Tree, Unit
from burnish.models.critic import Critic


@dataclass
class _Row:
    """One completion on its way: `node` is what its next chunk follows, `above` the prompt's node."""

    key: tuple[int, int]
    above: Node
    node: Node
    parts: list[Trajectory] = field(default_factory=list[Trajectory])
    cut: int | None = None

    @property
    def drawn(self) -> tuple[int, ...]:
        return tuple(t for part in self.parts for t in part.completion)


class Pruning:
    """See module. Draws in the place of an engine's `sample`; `take` says what looking cost, and what was cut."""

    def __init__(self, below: float, step_end: str, chunk_tokens: int) -> None:
        self.below, self.step_end, self.chunk_tokens = below, step_end, chunk_tokens
        self.critic: Critic | None = None
        self.spend, self.rows, self.pruned = Spend(), 0, 0

    def take(self) -> tuple[Spend, dict[str, float]]:
        """(cost of the values, facts) since last asked."""
        found = self.spend, emit(pruned_share=self.pruned / self.rows if self.rows else 0.0)
        self.spend, self.rows, self.pruned = Spend(), 0, 0
        return found

    def __call__(
        self, engine: LocalEngine, nodes: Sequence[Node], sampling: Sampling, keys: Sequence[tuple[int, int]]
    ) -> list[Trajectory]:
        """One trajectory a node, in order; one that is cut has finish `length`."""
        rows = [_Row(key, node, node) for node, key in zip(nodes, keys)]
        live, left = rows, sampling.max_new_tokens
        while live:
            chunk = min(self.chunk_tokens, left)
            left -= chunk
            part = Sampling(**asdict(sampling) | {"max_new_tokens": chunk, "stop": sampling.stop})
            for row, drawn in zip(live, engine.sample([r.node for r in live], part, [r.key for r in live])):
                row.parts.append(drawn)
            # one that met the model's context has fewer tokens than its chunk
            going = [r for r in live if r.parts[-1].finish == "length" and len(r.parts[-1].completion) == chunk and left]
            if going:
                self._look(engine, going)
            ended = {id(r) for r in live} - {id(r) for r in going if r.cut is None}
            live = [r for r in going if r.cut is None]
            for row, node in zip(live, engine.prefill_many([r.parts[-1].completion for r in live], [r.node for r in live])):
                if row.node is not row.above:
                    engine.free(row.node)  # its child holds it
                row.node = node
            for row in rows:
                if id(row) in ended and row.node is not row.above:
                    engine.free(row.node)
                    row.node = row.above
        self.rows += len(rows)
        self.pruned += sum(row.cut is not None for row in rows)
        return [self._joined(engine, row, sampling) for row in rows]

    def _look(self, engine: LocalEngine, rows: Sequence[_Row]) -> None:
        """Values of every state of these completions so far; the first step end that lost cuts."""
        assert self.critic is not None
        groups: dict[Node, list[_Row]] = {}
        for row in rows:
            groups.setdefault(row.above, []).append(row)
        trees: list[Tree] = []
        for node, members in groups.items():
            prompt = node.path
            units = tuple(Unit(i, tuple(range(len(prompt), len(prompt) + len(r.drawn)))) for i, r in enumerate(members, 1))
            trees.append(Tree((prompt, *(r.drawn for r in members)), (-1, *(0 for _ in members)), units))
        batch = Batch(trees)
        found = self.critic.values(engine.policy, batch)
        self.spend += Spend(scored_tokens=batch.entries, useful_flops=found.flops, executed_flops=found.flops)
        ordered = [r for members in groups.values() for r in members]
        before = found.before.split(batch.unit.bincount(minlength=len(ordered)).tolist())
        for row, states, after in zip(ordered, before, found.after.tolist()):
            row.cut = self.lost(engine, row.drawn, [*states.tolist(), after])

    def lost(self, engine: LocalEngine, tokens: Sequence[int], values: Sequence[float]) -> int | None:
        """How many tokens stand before the first step end that lost, if any; values[t] is of the state after t tokens."""
        best = values[0]
        room = len(self.step_end.encode()) + 8  # a token is at least a byte
        for t in range(1, len(tokens) + 1):
            best = max(best, values[t])
            if best > 0 and values[t] < self.below * best:
                tail = tokens[max(0, t - room) : t]
                said, shorter = (engine.policy.decode(x, keep_special=True) for x in (tail, tail[:-1]))
                if said.count(self.step_end) > shorter.count(self.step_end):
                    return t
        return None

    def _joined(self, engine: LocalEngine, row: _Row, sampling: Sampling) -> Trajectory:
        first, last, tokens = row.parts[0], row.parts[-1], row.drawn
        logprobs = tuple(p for part in row.parts for p in part.logprobs or ())
        finish = last.finish if row.cut is None else "length"
        if row.cut is not None:
            tokens, logprobs = tokens[: row.cut], logprobs[: row.cut]
        start = len(row.above.path)
        cost = Spend()
        for part in row.parts:
            cost += part.cost
        return replace(
            first, parent=row.above.id, tokens=row.above.path + tokens, logprobs=logprobs, finish=finish,
            sampler={**first.sampler, "max_new_tokens": sampling.max_new_tokens},
            spans=(Span("prompt", 0, start), Span("completion", start, start + len(tokens))),
            text=engine.policy.decode(tokens[:-1] if finish == "stop" else tokens), cost=cost,
        )  # fmt: skip
