"""A round of rollouts: groups of completions drawn with the present weights, scored, and kept on disk.

`Rounds.draw(policy, number)` is a pure function of the weights and the number; what it returns is written to
`trajectories/` and read back by a resume inside the round.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from burnish.core.errors import DataError
from burnish.core.metrics import emit
from burnish.core.records import Sampling, Scored, Spend
from burnish.core.runs import write_atomic
from burnish.core.seeds import derive
from burnish.engines.local.engine import LocalEngine
from burnish.forest.stream import Tree, Unit
from burnish.rewards.scoring import Rewards

KEPT_ROUNDS = 50  # of trajectories on disk, besides the first two


@dataclass(frozen=True)
class Question:
    """One prompt: its ids, what rewards are shown of it, and the columns its row carries. `hinted`: ids that tell its answer."""

    ids: tuple[int, ...]
    shown: Any
    columns: Mapping[str, Any]
    where: str
    hinted: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One completion with what it was worth. `rewards`: component -> value, None where unknown; `total` likewise."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str
    text: str
    rewards: Mapping[str, float | None]
    total: float | None


@dataclass
class Round:
    """What one round drew: for each question its samples and, where asked for, the reward of its greedy answer."""

    number: int
    version: str
    questions: list[int]
    groups: list[list[Sample]]
    greedy: list[float | None]
    spend: Spend
    facts: dict[str, Any] = field(default_factory=dict[str, Any])

    def write(self, path: Path) -> None:
        head = {"schema": 1, "round": self.number, "weights_version": self.version, "questions": self.questions, "greedy": self.greedy,
                "spend": asdict(self.spend), "facts": self.facts}  # fmt: skip
        lines = [head, *({"group": i, **asdict(s)} for i, group in enumerate(self.groups) for s in group)]
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, gzip.compress("".join(json.dumps(x) + "\n" for x in lines).encode(), mtime=0))

    @classmethod
    def read(cls, path: Path) -> Round:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            head = json.loads(next(lines))
            groups: list[list[Sample]] = [[] for _ in head["questions"]]
            for line in lines:
                row = json.loads(line)
                group = row.pop("group")
                groups[group].append(Sample(**row | {"tokens": tuple(row["tokens"]), "logprobs": tuple(row["logprobs"])}))
        return cls(head["round"], head["weights_version"], head["questions"], groups, head["greedy"], Spend(**head["spend"]), head["facts"])


class Batches(Protocol):
    """Which prompts each round draws for."""

    def batch(self, number: int, /) -> Sequence[int]: ...


@dataclass
class Rounds:
    """Where rounds come from. Raises, in `draw`, DataError for completions of other weights, and what rewards raise.

    greedy  whether each question is also answered greedily, for a baseline
    """

    questions: Sequence[Question]
    rewards: Rewards
    sampling: Sampling
    sampler: Batches
    group_size: int
    seed: int
    end_ids: Sequence[int]
    greedy: bool
    poll: Callable[[], None] | None = None
    engine: LocalEngine | None = None

    def draw(self, policy: Any, number: int, *, chosen: Sequence[int] | None = None, group_size: int | None = None, hinted: bool = False) -> Round:
        """Sample groups with the present weights and score them: of the round's prompts, or of those chosen."""
        size = group_size or self.group_size
        policy.train(False)
        if self.engine is None or self.engine.policy is not policy:
            self.engine = LocalEngine(policy, end_ids=self.end_ids)
        engine = self.engine
        engine.poll = self.poll
        before, version = engine.spend, engine.weights_version
        chosen = [int(i) for i in (self.sampler.batch(number) if chosen is None else chosen)]
        nodes = engine.prefill_many([self.questions[i].hinted if hinted else self.questions[i].ids for i in chosen])
        rows = [(node, (q, s)) for q, node in enumerate(nodes) for s in range(size)]
        seed = derive(self.seed, "rollouts", number)
        sampling = Sampling(**asdict(self.sampling) | {"seed": seed, "stop": self.sampling.stop})
        drawn = engine.sample([node for node, _ in rows], sampling, [key for _, key in rows])
        plain = []
        if self.greedy:
            greedy = Sampling(0.0, max_new_tokens=self.sampling.max_new_tokens, stop=self.sampling.stop)
            plain = engine.sample(nodes, greedy, [(q, 0) for q in range(len(nodes))])
        for node in nodes:
            engine.free(node)
        every = [*drawn, *plain]
        owner = [q for q, _ in (key for _, key in rows)] + list(range(len(plain)))
        asked = [self.questions[chosen[q]] for q in owner]
        names = dict.fromkeys(name for question in asked for name in question.columns)
        columns = {name: [question.columns.get(name) for question in asked] for name in names}
        columns["completion_ids"] = [list(t.completion) for t in every]
        shown = [question.shown for question in asked]
        said: list[Any] = [t.text for t in every]
        if not isinstance(shown[0], str):
            said = [[{"role": "assistant", "content": text}] for text in said]
        groups = [q if i < len(rows) else len(nodes) + q for i, q in enumerate(owner)]
        found = self.rewards.score(shown, said, columns, groups)
        stale = next((t for t in drawn if t.weights_version != version), None)
        if stale is not None:
            raise DataError(f"was sampled with weights {stale.weights_version}, the policy is at {version}", where=f"trajectory {stale.id}")
        samples = [
            Sample(t.completion, t.logprobs or (), t.finish, t.text, {name: ones[i].value for name, ones in found.components.items()}, _value(found.total[i]))
            for i, t in enumerate(every)
        ]
        split = [samples[q * size : (q + 1) * size] for q in range(len(nodes))]
        spent = engine.spend
        spend = Spend(*(b - a for a, b in zip(asdict(before).values(), asdict(spent).values())))
        facts = {k: v for k, v in found.stats["total"].items() if k != "reward_seconds"}
        facts |= _facts(samples[: len(rows)], split)
        return Round(number, version, chosen, split, [s.total for s in samples[len(rows) :]], spend, facts)

def tree_of(prompt: tuple[int, ...], group: Sequence[Sample], members: Sequence[int]) -> Tree:
    """The prompt with these completions below it; every sampled token is a label."""
    first = len(prompt)
    units = tuple(Unit(leaf, tuple(range(first, first + len(group[i].tokens)))) for leaf, i in enumerate(members, start=1))
    return Tree((prompt, *(group[i].tokens for i in members)), (-1, *(0 for _ in members)), units)


def _value(scored: Scored) -> float | None:
    return scored.value


def _facts(samples: Sequence[Sample], groups: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    """What a round looked like, for the log."""
    tokens = sum(len(s.tokens) for s in samples)
    dead = sum(len({s.total for s in group if s.total is not None}) < 2 for group in groups)
    return emit(
        completion_tokens=tokens / len(samples),
        truncated_share=sum(s.finish == "length" for s in samples) / len(samples),
        surprisal=-sum(p for s in samples for p in s.logprobs) / tokens,
        dead_groups=dead / len(groups),
    )
