"""An engine that says what it was told to say: for tests of everything above engines, with exact token counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from burnish.core.errors import DataError
from burnish.core.records import Finish, Sampling, Span, Spend, Trajectory
from burnish.engines.base import NOTHING, Node, Nodes, check_rows, check_sampling, cut


def _bytes(text: str) -> list[int]:
    return list(text.encode())


def _text(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


class Scripted(Nodes):
    """See engines.base.Engine. Sample s of item i is `scripts[i][s]`, round again at their end; greedy is the first.

    A script is ids, or text that `encode` turns into ids (a token a byte unless given). Every token has log-probability
    `logprob`; None: an engine that cannot say. Costs count tokens and no FLOPs.
    """

    def __init__(
        self,
        scripts: Mapping[int, Sequence[str | Sequence[int]]],
        *,
        encode: Callable[[str], Sequence[int]] = _bytes,
        decode: Callable[[Sequence[int]], str] = _text,
        logprob: float | None = -1.0,
        weights_version: str = "scripted",
    ) -> None:
        self.scripts = {
            item: [tuple(encode(s) if isinstance(s, str) else s) for s in texts] for item, texts in scripts.items()
        }
        self.decode, self.logprob, self.weights_version = decode, logprob, weights_version
        super().__init__()
        self.can = frozenset({"fork", "ids"} if logprob is None else {"fork", "ids", "logprobs", "score"})
        self.spend = NOTHING

    def reading(self, ids: tuple[int, ...]) -> Spend:
        """Every token of a new node is read once."""
        cost = Spend(prefill_tokens=len(ids))
        self.spend += cost
        return cost

    def sample(self, nodes: Sequence[Node], sampling: Sampling, keys: Sequence[tuple[int, int]]) -> list[Trajectory]:
        """See engines.base. Raises DataError for an item without a script."""
        check_sampling(sampling)
        check_rows(nodes, keys)
        return [self._say(self._held(node), sampling, *key) for node, key in zip(nodes, keys)]

    def _say(self, node: Node, sampling: Sampling, item: int, sample: int) -> Trajectory:
        scripts = self.scripts.get(item)
        if not scripts:
            raise DataError("has no script", where=f"item {item}")
        ids = scripts[0 if sampling.temperature == 0 else sample % len(scripts)]
        finish: Finish = "stop"
        if len(ids) > sampling.max_new_tokens:
            ids, finish = ids[: sampling.max_new_tokens], "length"
        for end in range(1, len(ids) + 1) if sampling.stop else ():
            if any(s in self.decode(ids[:end]) for s in sampling.stop):
                ids, finish = ids[:end], "stop_string"
                break
        cost = Spend(sampled_tokens=len(ids))
        self.spend += cost
        first, end = node.end, node.end + len(ids)
        return Trajectory(
            id=f"{item}/{sample}",
            parent=node.id,
            tokens=node.path + ids,
            logprobs=None if self.logprob is None else (self.logprob,) * len(ids),
            weights_version=self.weights_version,
            sampler={"temperature": sampling.temperature, "seed": sampling.seed, "item": item, "sample": sample},
            spans=(Span("prompt", 0, first), Span("completion", first, end)),
            finish=finish,
            text=cut(self.decode(ids), sampling.stop),
            cost=cost,
        )

    def score(self, nodes: Sequence[Node]) -> list[tuple[float, ...]]:
        """See engines.base."""
        if self.logprob is None:
            raise DataError("this engine gives no log-probabilities", where="score")
        scores = [(self.logprob,) * (len(self._held(n).ids) - (n.parent is None)) for n in nodes]
        self.spend += Spend(scored_tokens=sum(map(len, scores)))
        return scores
