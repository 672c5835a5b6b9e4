"""A round of rollouts: groups of completions drawn with the present weights, scored, and kept on disk.

`Rounds.draw(policy, number)` is a pure function of the weights and the number; what it returns is written to
`trajectories/` and read back by a resume inside the round.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import torch

from burnish.core.errors import DataError
from burnish.core.metrics import emit
from burnish.core.records import Sampling, Spend, Trajectory
from burnish.core.runs import StageFolder, write_atomic
from burnish.core.seeds import derive
from burnish.engines.base import Node, cut
from burnish.engines.local.engine import LocalEngine
from burnish.forest.pack import Batch
from burnish.forest.stream import Tree, Unit
from burnish.maths.filters import soft_overlong
from burnish.methods.steps import Step, step_rewards, token_ends
from burnish.models.scoring import score
from burnish.rewards.scoring import Breakdown, Rewards

KEPT_ROUNDS = 50  # of trajectories on disk, besides those whose number is 0 or a power of two
FAR = 1 << 32  # batches ahead in the order of prompts: where those that replace dead groups are taken from


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
    """One completion with what it was worth. `rewards`: component -> value, None where unknown; `total` likewise.

    penalty             what its length costs besides (`rollouts.overlong_cushion`), 0 or less
    steps               (tokens up to its end, reward or None) of each step, where rewards score steps
    old_logprobs        of its tokens by the trainer, before any step of the round; empty where not asked for
    entropies           of the policy at its tokens, likewise
    values              of a critic as the round began: of the state before each token, then of the state after the last
    drawn_by            (version of the weights, tokens) of its parts, where not all are by those of its round
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str
    text: str
    rewards: Mapping[str, float | None]
    total: float | None
    penalty: float = 0.0
    steps: tuple[Step, ...] = ()
    old_logprobs: tuple[float, ...] = ()
    entropies: tuple[float, ...] = ()
    values: tuple[float, ...] = ()
    drawn_by: tuple[tuple[str, int], ...] = ()

    def stale(self, version: str) -> int:
        """How many of its first tokens were drawn by other weights than these."""
        return sum(count for by, count in self.drawn_by if by != version)

    @property
    def worth(self) -> float | None:
        """The reward with what the length costs."""
        return None if self.total is None else self.total + self.penalty

    @property
    def paid(self) -> tuple[Step, ...]:
        """The steps with what the length costs, at the last one."""
        if not self.penalty or not self.steps or self.steps[-1][1] is None:
            return self.steps
        return (*self.steps[:-1], (self.steps[-1][0], self.steps[-1][1] + self.penalty))

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in OPTIONAL or value != OPTIONAL[name]}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Sample:
        tuples = {name: tuple(row[name]) for name in ("tokens", "logprobs", "old_logprobs", "entropies", "values") if name in row}
        pairs = {name: tuple((a, b) for a, b in row.get(name, ())) for name in ("steps", "drawn_by")}
        return cls(**{**row, **tuples, **pairs})


OPTIONAL: dict[str, Any] = {"penalty": 0.0, "steps": (), "old_logprobs": (), "entropies": (), "values": (), "drawn_by": ()}  # left out of the file
NOT_BEGUN = Sample((), (), "partial", "", {}, None)


@dataclass
class Carried:
    """A group that a round began and did not end. `samples`: whole ones, and those with finish `partial` that go on."""

    question: int
    samples: list[Sample]

    def to_json(self) -> dict[str, Any]:
        return {"question": self.question, "samples": [s.to_json() for s in self.samples]}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Carried:
        return cls(row["question"], [Sample.from_json(s) for s in row["samples"]])


def dead(group: Sequence[Sample]) -> bool:
    """Whether its known rewards, or those of its steps, are all equal: no advantage."""
    values = {value for s in group for _, value in s.paid} if any(s.steps for s in group) else {s.worth for s in group}
    return len(values - {None}) < 2


def undecided(group: Sequence[Sample]) -> bool:
    """Whether it is dead but for what lengths cost: DAPO's condition is on answers (eq. 11, arXiv:2503.14476)."""
    return dead([replace(s, penalty=0.0) for s in group])


@dataclass
class Round:
    """What one round drew: for each question its samples and, where asked for, the reward of its greedy answer.

    prompts   ids of each question, so that what was drawn can be learned from elsewhere
    replaced  (question, its samples) that a refill put others in the place of; not kept on disk
    """

    number: int
    version: str
    questions: list[int]
    groups: list[list[Sample]]
    greedy: list[float | None]
    spend: Spend
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    notices: list[str] = field(default_factory=list[str])
    prompts: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    replaced: list[tuple[int, list[Sample]]] = field(default_factory=list[tuple[int, list[Sample]]])

    @property
    def dead(self) -> bool:
        """Whether no group of it is live."""
        return all(map(dead, self.groups))

    def write(self, path: Path) -> None:
        head = {"schema": 1, "round": self.number, "weights_version": self.version, "questions": self.questions, "greedy": self.greedy,
                "prompts": self.prompts, "spend": asdict(self.spend), "facts": self.facts, "notices": self.notices}  # fmt: skip
        lines = [head, *({"group": i, **s.to_json()} for i, group in enumerate(self.groups) for s in group)]
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
                groups[group].append(Sample.from_json(row))
        spend, prompts = Spend(**head["spend"]), [tuple(ids) for ids in head.get("prompts", ())]
        return cls(head["round"], head["weights_version"], head["questions"], groups, head["greedy"], spend, head["facts"], head["notices"], prompts)


class Batches(Protocol):
    """Which prompts each round draws for, and how many."""

    @property
    def batch_rows(self) -> int: ...

    def batch(self, number: int, /) -> Sequence[int]: ...


Draw = Callable[[LocalEngine, Sequence[Node], Sampling, Sequence[tuple[int, int]]], list[Trajectory]]


@dataclass
class Rounds:
    """Where rounds come from. Raises, in `draw`, DataError for completions of other weights or without log-probs, and what
    rewards raise.

    greedy           whether each question is also answered greedily, for a baseline
    refill           how often other prompts are drawn in place of groups that are dead but for what lengths cost
    partial          prompts that are drawn for beyond `batch_rows`: a round ends once so many groups are whole, and `carried`
                     holds the others, which go on in the next round with its weights (partial rollouts: arXiv:2501.12599);
                     short completions come first, long ones later, and none is lost
    cushion          of `maths.filters.soft_overlong`, in tokens before `max_new_tokens`; None: length costs nothing
    rescored         whether the trainer scores what was sampled, for `old_logprobs`
    entropic         whether it measures entropies
    sample           what draws the round's own prompts in the engine's place: (engine, nodes, sampling, keys) -> trajectories
    """

    questions: Sequence[Question]
    rewards: Rewards
    sampling: Sampling
    sampler: Batches
    group_size: int
    seed: int
    end_ids: Sequence[int]
    greedy: bool
    refill: int = 0
    cushion: int | None = None
    partial: int = 0
    rescored: bool = False
    entropic: bool = False
    poll: Callable[[], None] | None = None
    engine: LocalEngine | None = None
    sample: Draw | None = None
    carried: list[Carried] = field(default_factory=list[Carried])
    _told: set[str] = field(default_factory=set[str])

    def news(self, drawn: Round) -> list[str]:
        """What rewards noticed in a round and, numbers apart, in none before it."""
        fresh: list[str] = []
        for notice in drawn.notices:
            kind = re.sub(r"[\d.,]+", "", notice)
            if kind not in self._told:
                self._told.add(kind)
                fresh.append(notice)
        return fresh

    def draw(
        self, policy: Any, number: int, *, chosen: Sequence[int] | None = None, group_size: int | None = None, hinted: bool = False,
        begun: Sequence[tuple[int, ...]] | None = None,
    ) -> Round:  # fmt: skip
        """Sample groups with the present weights and score them; then, where asked for, others in place of dead ones.

        Prompts that replace others come from far ahead in the same order of prompts, so that the round is a pure
        function of the weights, its number and what was carried on, and takes none from the rounds to come. What is logged of rewards is what
        was drawn first: selection would flatter it.

        chosen      these questions in place of the round's own: none is replaced, and neither a critic nor the trainer looks at them
        group_size  of this round, where it is not the stage's
        hinted      whether they are asked with their answers told
        begun       tokens that every completion of a prompt begins with: given, not drawn, without log-probs
        """
        own, size = chosen is None, group_size or self.group_size
        policy.train(False)
        if self.engine is None or self.engine.policy is not policy:
            self.engine = LocalEngine(policy, end_ids=self.end_ids)
        engine = self.engine
        engine.poll = self.poll
        before, version = engine.spend, engine.weights_version
        seed = derive(self.seed, "rollouts", number)
        if own and self.partial:
            asked, groups, greedy, found = self._first_whole(policy, number, seed)
        else:
            asked = [int(i) for i in (self.sampler.batch(number) if chosen is None else chosen)]
            draw = self.sample if own else None
            groups, greedy, found = self._groups(policy, asked, seed, size, draw, hinted=hinted, begun=begun)
        facts = {k: v for k, v in found.stats["total"].items() if k != "reward_seconds"}
        facts |= _facts([s for group in groups for s in group], groups)
        if len(found.components) > 1:
            facts |= emit(components=_without_seconds(found.stats["components"]))
        if own and self.partial:
            stale = sum(s.stale(version) for group in groups for s in group)
            facts |= emit(carried_groups=len(self.carried), stale_tokens=stale / sum(len(s.tokens) for group in groups for s in group))
        if self.cushion is not None:
            facts |= emit(overlong_penalty=sum(s.penalty for group in groups for s in group) / sum(map(len, groups)))
        replaced: list[tuple[int, list[Sample]]] = []
        for attempt in range(self.refill if own else 0):
            spent = [q for q, group in enumerate(groups) if undecided(group)]
            others = [i for i in self.sampler.batch(FAR + number * self.refill + attempt) if i not in asked]
            places = dict(zip(spent, others))
            if not places:
                break
            seed = derive(self.seed, "refill", number, attempt)
            fresh, plain, _ = self._groups(policy, list(places.values()), seed, size, self.sample)
            for place, (q, question) in enumerate(places.items()):
                replaced.append((asked[q], groups[q]))
                asked[q], groups[q] = question, fresh[place]
                if self.greedy:
                    greedy[q] = plain[place]
        if self.refill and own:
            facts |= emit(refilled_groups=len(replaced))
        spend = Spend(*(b - a for a, b in zip(asdict(before).values(), asdict(engine.spend).values())))
        if own and (self.rescored or self.entropic):
            groups, more = self._scored(policy, asked, groups)
            spend += more
        prompts, warnings = [self.questions[i].ids for i in asked], list(found.stats["warnings"])
        return Round(number, version, asked, groups, greedy, spend, facts, warnings, prompts, replaced)

    def _groups(
        self, policy: Any, chosen: Sequence[int], seed: int, size: int, sample: Draw | None, *, hinted: bool = False,
        begun: Sequence[tuple[int, ...]] | None = None,
    ) -> tuple[list[list[Sample]], list[float | None], Breakdown]:  # fmt: skip
        """The groups of these questions, the rewards of their greedy answers where asked for, and what rewards said."""
        engine = self.engine
        assert engine is not None
        version = engine.weights_version
        given = begun or [()] * len(chosen)
        asked = [self.questions[i].hinted if hinted else self.questions[i].ids for i in chosen]
        nodes = engine.prefill_many([(*ids, *tokens) for ids, tokens in zip(asked, given)])
        rows = [(node, (q, s)) for q, node in enumerate(nodes) for s in range(size)]
        first, keys = [node for node, _ in rows], [key for _, key in rows]
        sampling = self._seeded(seed)
        drawn = engine.sample(first, sampling, keys) if sample is None else sample(engine, first, sampling, keys)
        plain = self._greedily(engine, nodes)
        for node in nodes:
            engine.free(node)
        for t in (*drawn, *plain):
            _refuse_unfit(t, version)
        said = [_said(policy, given[q], t) for (_, (q, _)), t in zip(rows, drawn)]
        return self._judged_groups(policy, said, [_said(policy, tokens, t) for tokens, t in zip(given, plain)], chosen)

    def _seeded(self, seed: int) -> Sampling:
        return Sampling(**asdict(self.sampling) | {"seed": seed, "stop": self.sampling.stop})

    def _greedily(self, engine: LocalEngine, nodes: Sequence[Node]) -> list[Trajectory]:
        """The greedy answer to each prompt, where a baseline asks for it."""
        if not self.greedy:
            return []
        greedy = Sampling(0.0, max_new_tokens=self.sampling.max_new_tokens, stop=self.sampling.stop)
        return engine.sample(nodes, greedy, [(q, 0) for q in range(len(nodes))])

    def _judged_groups(
        self, policy: Any, said: Sequence[Sample], plain: Sequence[Sample], asked: Sequence[int]
    ) -> tuple[list[list[Sample]], list[float | None], Breakdown]:
        """As `_groups`. `said`: of each question its samples; `plain`: its greedy answer, a group of its own, where there is one."""
        size = len(said) // len(asked)
        owner = [i // size for i in range(len(said))] + list(range(len(plain)))
        groups = [q if i < len(said) else len(asked) + q for i, q in enumerate(owner)]
        samples, found = self.judged(policy, [*said, *plain], [asked[q] for q in owner], groups)
        split = [samples[q * size : (q + 1) * size] for q in range(len(asked))]
        return split, [s.worth for s in samples[len(said) :]], found

    def _first_whole(self, policy: Any, number: int, seed: int) -> tuple[list[int], list[list[Sample]], list[float | None], Breakdown]:
        """The first `batch_rows` groups to be whole, of those carried on and those of this round's prompts, as `_groups` has
        them, after their questions. The others are carried on, with what was drawn of them.
        """
        engine, wanted = self.engine, self.sampler.batch_rows
        assert engine is not None
        version = engine.weights_version
        fresh = [*self.sampler.batch(number), *self.sampler.batch(2 * FAR + number)][: wanted + self.partial - len(self.carried)]
        going = [*self.carried, *(Carried(int(i), [NOT_BEGUN] * self.group_size) for i in fresh)]
        prompts = engine.prefill_many([self.questions[c.question].ids for c in going])
        rows = [(q, s) for q, c in enumerate(going) for s, one in enumerate(c.samples) if one.finish == "partial"]
        first = [prompts[q] if not (tokens := going[q].samples[s].tokens) else engine.prefill(tokens, prompts[q]) for q, s in rows]
        below = [node for node, (q, _) in zip(first, rows) if node is not prompts[q]]
        begun = {node: len(node.ids) for node in below}
        left = [sum(one.finish == "partial" for one in c.samples) for c in going]
        whole = [q for q, n in enumerate(left) if not n]  # in the order in which they came to be

        def enough(ended: Sequence[int]) -> bool:
            for q, _ in (rows[i] for i in ended):
                left[q] -= 1
                if not left[q]:
                    whole.append(q)
            return len(whole) >= wanted

        for (q, s), drawn in zip(rows, engine.sample(first, self._seeded(seed), rows, begun=begun, until=enough)):
            _refuse_unfit(drawn, version)
            going[q].samples[s] = self._longer(policy, going[q].samples[s], drawn)
        chosen = whole[:wanted]
        plain = self._greedily(engine, [prompts[q] for q in chosen])
        for node in (*below, *prompts):
            engine.free(node)
        self.carried = [c for q, c in enumerate(going) if q not in chosen]
        asked = [going[q].question for q in chosen]
        said = [s if s.stale(version) else replace(s, drawn_by=()) for q in chosen for s in going[q].samples]
        return asked, *self._judged_groups(policy, said, [_said(policy, (), t) for t in plain], asked)

    def _longer(self, policy: Any, before: Sample, drawn: Trajectory) -> Sample:
        """What there was of a completion with what was drawn now."""
        if not drawn.completion:
            return before
        tokens = before.tokens + drawn.completion
        by = (*before.drawn_by, (drawn.weights_version, len(drawn.completion)))
        text = cut(policy.decode(tokens[:-1] if drawn.finish == "stop" else tokens), self.sampling.stop)
        return replace(before, tokens=tokens, logprobs=before.logprobs + (drawn.logprobs or ()), finish=drawn.finish, text=text, drawn_by=by)

    def judged(self, policy: Any, said: Sequence[Sample], asked: Sequence[int], groups: Sequence[int]) -> tuple[list[Sample], Breakdown]:
        """The samples with what they are worth, and what rewards said of all of them; `asked` are their questions."""
        questions = [self.questions[q] for q in asked]
        names = dict.fromkeys(name for question in questions for name in question.columns)
        columns = {name: [question.columns.get(name) for question in questions] for name in names}
        columns["completion_ids"] = [list(s.tokens) for s in said]
        shown = [question.shown for question in questions]
        texts: list[Any] = [s.text for s in said]
        if not isinstance(shown[0], str):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        ends: list[list[int]] = []
        steps: dict[str, Any] = {}
        if self.rewards.cut is not None:
            places = self.rewards.cut([s.text for s in said])
            ends = [token_ends(policy.decode, s.tokens, s.text, at) for s, at in zip(said, places)]
            steps = {"steps": [[s.text[a:b] for a, b in pairwise([0, *at])] for s, at in zip(said, places)], "step_ends": ends}
        found = self.rewards.score(shown, texts, columns, groups, **steps)
        process = frozenset(c.title for c in self.rewards.components if c.process)
        penalties = [0.0] * len(said)
        if self.cushion is not None:
            length = torch.tensor([len(s.logprobs) for s in said])  # of what was drawn: max_new_tokens is of that
            penalties = soft_overlong(length, longest=self.sampling.max_new_tokens, cushion=self.cushion).tolist()
        samples: list[Sample] = []
        for i, s in enumerate(said):
            parts = {name: ones[i] for name, ones in found.components.items()}
            by_step = step_rewards(parts, self.rewards.weights, process, ends[i]) if ends else ()
            values = {name: one.value for name, one in parts.items()}
            samples.append(replace(s, rewards=values, total=found.total[i].value, penalty=penalties[i], steps=by_step))
        return samples, found

    def _scored(self, policy: Any, chosen: Sequence[int], groups: list[list[Sample]]) -> tuple[list[list[Sample]], Spend]:
        """The samples with what the trainer says of them, before any step of the round."""
        batch = Batch([tree_of(self.questions[i].ids, group, range(len(group))) for i, group in zip(chosen, groups)])
        found = score(policy, batch, entropy=self.entropic)
        sizes = [len(s.tokens) for group in groups for s in group]
        logprobs = found.logprobs.split(sizes)
        entropies = found.entropy.split(sizes) if found.entropy is not None else None
        made: list[Sample] = []
        for i, s in enumerate(s for group in groups for s in group):
            old = tuple(logprobs[i].tolist()) if self.rescored else ()
            made.append(replace(s, old_logprobs=old, entropies=() if entropies is None else tuple(entropies[i].tolist())))
        at = list(accumulate(map(len, groups), initial=0))
        return [made[a:b] for a, b in pairwise(at)], found.spend


def _refuse_unfit(t: Trajectory, version: str) -> None:
    """A completion of other weights, or without the log-probs of its tokens, is never learned from."""
    if t.weights_version != version:
        remedy = "bring the sampler to the policy's version before it draws"
        raise DataError(f"was sampled with weights {t.weights_version}, the policy is at {version}", where=f"trajectory {t.id}", remedy=remedy)
    given = 0 if t.logprobs is None else len(t.logprobs)
    if given != len(t.completion):
        remedy = "sample with an engine that reports log-probs: local, or vLLM"
        raise DataError(f"{given} log-probs for {len(t.completion)} sampled tokens", where=f"trajectory {t.id}", remedy=remedy)


def _without_seconds(components: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Facts of each reward but its seconds, which differ from run to run."""
    return {title: {k: v for k, v in row.items() if k != "reward_seconds"} for title, row in components.items()}


def all_dead(limit: int, state: Any, row: Mapping[str, Any]) -> str | None:
    """A guard of the loop: stop where `limit` rounds in a row had no live group. Nothing is learned from such rounds."""
    if row.get("dead_rounds", 0) < limit:
        return None
    return f"dead rounds: in {row['dead_rounds']} rounds in a row every group's rewards were all equal, so nothing was learned"


def retire(folder: StageFolder, number: int) -> None:
    """Remove the files of the round that is too old to be kept once round `number` is written."""
    old = number - KEPT_ROUNDS
    if old > 0 and old & (old - 1):
        for path in folder.of_round(old):
            path.unlink()


def _said(policy: Any, begun: tuple[int, ...], drawn: Trajectory) -> Sample:
    """A completion of given and drawn tokens, not yet scored; what a stop string cut from its text stays cut."""
    text = drawn.text
    if begun:
        hidden = len(policy.decode(drawn.completion)) - len(text)
        text = policy.decode((*begun, *drawn.completion))
        text = text[: len(text) - hidden]
    return Sample((*begun, *drawn.completion), drawn.logprobs or (), drawn.finish, text, {}, None)


def tree_of(prompt: tuple[int, ...], group: Sequence[Sample], members: Sequence[int], shared: int = 0) -> Tree:
    """The prompt, and the first `shared` tokens that these completions have in common, with their rest below it.

    Every token of a completion is a label, once for each completion.
    """
    first = len(prompt)
    tails: list[tuple[int, ...]] = []
    units: list[Unit] = []
    for i in members:
        if tail := group[i].tokens[shared:]:
            tails.append(tail)
        units.append(Unit(len(tails) if tail else 0, tuple(range(first, first + len(group[i].tokens)))))
    root = (*prompt, *group[members[0]].tokens[:shared])
    return Tree((root, *tails), (-1, *(0 for _ in tails)), tuple(units))


def _facts(samples: Sequence[Sample], groups: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    """What a round looked like, for the log."""
    tokens = sum(len(s.tokens) for s in samples)
    return emit(
        completion_tokens=tokens / len(samples),
        truncated_share=sum(s.finish == "length" for s in samples) / len(samples),
        surprisal=-sum(p for s in samples for p in s.logprobs) / sum(len(s.logprobs) for s in samples),
        dead_groups=sum(map(dead, groups)) / len(groups),
    )


def group_of(values: Any, groups: Sequence[Sequence[Sample]]) -> list[list[Any]]:
    """A tensor [samples], in the order of the groups, as a list for each group."""
    return [part.tolist() for part in values.split([len(group) for group in groups])]


def write_credit(path: Path, asked: Mapping[int, Question], advantages: Sequence[list[float]], live: Sequence[list[bool]]) -> None:
    """What training made of a part of a round, beside its trajectories, for people to read.

    asked       group -> its question
    advantages  of each sample, as the objective got them; the mean over its tokens where they differ
    live        whether any of its tokens had a gradient
    """
    head = {"schema": 1}
    rows = [
        {"group": q, "where": question.where, "prompt": question.shown, "answer": question.columns.get("answer"), "advantages": values, "live": used}
        for (q, question), values, used in zip(asked.items(), advantages, live, strict=True)
    ]
    path.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps(x, allow_nan=False, default=str) + "\n" for x in (head, *rows))
    write_atomic(path, gzip.compress(lines.encode(), mtime=0))
