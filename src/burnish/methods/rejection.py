"""Learning from one's own right answers: draw completions, keep those that are right, fine-tune on them, again.

    D_r = keep{ y_1 .. y_k ~ p_r( . | x) : x in the round's prompts };      p_(r+1) = SFT on D_r

The stage's steps are shared evenly among its rounds. A round is drawn with the weights it begins with, written to
`trajectories/` and read back by a resume inside it; what is kept follows from what was drawn. Completions cut at
`max_new_tokens` are never kept: they have no end to learn. The rows differ in what they keep and where a round starts:

    rft      every right answer that differs, once                                    one round
    star     as rft, and what is right once the answer was hinted at                  each round from the stage's first weights
    rest_em  as rft, at most ten a prompt                                             each round from the stage's first weights
    raft     the best of a prompt's k, however good                                   each round from the one before
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from burnish.core.errors import ConfigError, DataError, StorageError
from burnish.core.metrics import emit
from burnish.core.records import Rendered, Sampling
from burnish.core.runs import StageFolder
from burnish.core.seeds import derive
from burnish.core.table import About, Table, load_row
from burnish.data.chat import Prepared
from burnish.data.sampler import Sampler
from burnish.forest.pack import Batch, Micro
from burnish.forest.stream import Tree
from burnish.maths.head import Objective
from burnish.maths.logprobs import weighted_nll
from burnish.methods.rounds import Question, Round, Rounds, Sample, retire
from burnish.train.method import Hooks, Material, Work

Keep = Callable[[Sequence[Sample]], list[int]]
"""The samples of one prompt -> the indices of those to learn from, in order."""


# ---- what is kept ---------------------------------------------------------------------------------------------------


def verified(group: Sequence[Sample], threshold: float, per_prompt: int | None) -> list[int]:
    """The first `per_prompt` finished samples with a reward above `threshold`; texts that differ only in blanks are one."""
    found: dict[str, int] = {}
    for i, sample in enumerate(group):
        if sample.finish != "length" and sample.total is not None and sample.total > threshold:
            found.setdefault(" ".join(sample.text.split()), i)
    return list(found.values())[:per_prompt]


def best(group: Sequence[Sample]) -> list[int]:
    """The finished sample with the highest reward, the first of equals; none where no reward is known."""
    known = {i: s.total for i, s in enumerate(group) if s.finish != "length" and s.total is not None}
    return [max(known, key=lambda i: known[i])] if known else []


# ---- the method -----------------------------------------------------------------------------------------------------


class Rejection(Hooks):
    """See module. `prompts` are a round's; with `hints` a prompt without a kept sample is asked again, its answer told."""

    validation = ()

    def __init__(
        self, rounds: Rounds, prepared: Prepared, keep: Keep, *, number: int, restarts: bool, hints: bool, batch_rows: int, total_steps: int, weights: str
    ) -> None:  # fmt: skip
        self.rounds, self.prepared, self.keep, self.restarts, self.hints = rounds, prepared, keep, restarts, hints
        self.batch_rows, self.total_steps, self.weights = batch_rows, total_steps, weights
        self.steps = total_steps // number
        self._rows: tuple[Rendered, ...] = ()
        self._number: int | None = None
        self._first: dict[str, Tensor] = {}
        self._folder: StageFolder | None = None

    # ---- the loop's hooks

    def start(self, policy: Any, folder: StageFolder, poll: Callable[[], None]) -> None:
        """Before a checkpoint is loaded: the weights that rounds start from."""
        self._folder, self.rounds.poll = folder, poll
        if self.restarts:
            self._first = {name: p.detach().clone() for name, p in policy.trainable().items()}

    def close(self) -> None:
        self.rounds.rewards.close()
        self.rounds.engine = None
        self._first = {}

    def batches(self, step: int) -> Iterator[Work]:
        while step < self.total_steps:
            yield Work(None, rows=self.batch_rows, step=step, part=(step % self.steps, self.steps))
            step += 1

    def prepare(self, policy: Any, work: Work) -> None:
        """The rows of this step: the round it belongs to is drawn or read back, and sorted out."""
        number, inside = divmod(work.step, self.steps)
        before = self.rounds.rewards.seconds
        if self._number != number:
            self._collect(policy, work, number, inside)
        work.seconds["reward"] = self.rounds.rewards.seconds - before
        if not inside and number and self.restarts:
            work.restart = self._first
        order = Sampler(len(self._rows), self.batch_rows, derive(self.rounds.seed, "order", number))
        chosen = [self._rows[i] for i in order.batch(inside)]
        work.made = Batch([Tree.row(r.ids, r.trained) for r in chosen])
        work.where = tuple(r.where for r in chosen)
        work.epoch = (inside + 1) * self.batch_rows / len(self._rows)
        work.columns["weight"] = load_row("weights", self.weights)(work.batch.unit).to(torch.float32)

    def objective(self, work: Work, micro: Micro) -> tuple[Objective, Tensor | None]:
        return weighted_nll(work.columns["weight"][micro.items]), None

    # ---- a round

    def _collect(self, policy: Any, work: Work, number: int, inside: int) -> None:
        """Draw the round (twice where it hints) and keep what is to be learned. Raises DataError where nothing is kept."""
        draws = 2 if self.hints else 1
        drawn = self._drawn(policy, work, number * draws, inside, self.rounds.sampler.batch(number))
        kept = [self.keep(group) for group in drawn.groups]
        rows = list(self._rendered(drawn, kept))
        solved, hinted = sum(map(bool, kept)), 0
        unsolved = [q for q, mine in zip(drawn.questions, kept) if not mine and self.rounds.questions[q].hinted]
        if self.hints and unsolved:
            told = self._drawn(policy, work, number * draws + 1, inside, unsolved, hinted=True)
            rows += self._rendered(told, [self.keep(group) for group in told.groups])
            hinted = len(rows) - sum(map(len, kept))
        if not rows:
            raise DataError(
                f"none of {sum(map(len, drawn.groups))} completions of {len(drawn.groups)} prompts is worth keeping "
                f"(mean reward {drawn.facts['reward_mean']}, {drawn.facts['truncated_share']:.0%} cut at max_new_tokens): nothing to learn from",
                where=f"round {number + 1}",
                remedy="raise rollouts.group_size, lower the method's threshold, give easier prompts, or fine-tune first",
            )
        self._rows, self._number = tuple(rows), number
        if not inside:
            work.facts |= drawn.facts
            work.facts |= emit(kept_rows=len(rows), kept_hinted=hinted, solved_prompts=solved / len(kept))

    def _drawn(self, policy: Any, work: Work, number: int, inside: int, chosen: Sequence[int], hinted: bool = False) -> Round:
        path = None if self._folder is None else self._folder.trajectories(number)
        if inside and path is not None:
            if not path.exists():
                message = "is gone, and this step learns from what it held"
                raise StorageError(message, where=str(path), remedy="put it back, or begin the run anew under another name")
            return Round.read(path)
        drawn = self.rounds.draw(policy, number, chosen=chosen, hinted=hinted)
        work.spend += drawn.spend
        work.notices += self.rounds.news(drawn)
        if self._folder is not None:
            drawn.write(self._folder.trajectories(number))
            retire(self._folder, number)
        return drawn

    def _rendered(self, drawn: Round, kept: Sequence[Sequence[int]]) -> Iterator[Rendered]:
        """Prompts as they were asked without a hint, each with a completion to learn, its end included."""
        for q, group, mine in zip(drawn.questions, drawn.groups, kept):
            question: Question = self.rounds.questions[q]
            for i in mine:
                trained = (False,) * len(question.ids) + (True,) * len(group[i].tokens)
                yield Rendered((*question.ids, *group[i].tokens), trained, f"{question.where}, sample {i}")


# ---- rows -----------------------------------------------------------------------------------------------------------


def _method(
    material: Material, rewards: Any, rollouts: Any, keep: Keep, *, rounds: int, prompts: int | None, restarts: bool, weights: str,
    per_prompt: int | None = None, hint: str | None = None,
) -> Rejection:  # fmt: skip
    prepared, questions = material.questions(hint)
    for name, given in (("prompts", prompts), ("per_prompt", per_prompt)):
        if given is not None and given < 1:
            raise ConfigError(f"{given} given, wanted 1 or more, or null for no limit", where=f"method.{name}")
    if prompts is not None and prompts > len(questions):
        raise ConfigError(f"a round asks {prompts} prompts and the data has {len(questions)}", where="method.prompts", remedy=f"type {len(questions)} or less")
    sampling = Sampling(rollouts.temperature, rollouts.top_k, rollouts.top_p, rollouts.max_new_tokens, rollouts.stop, 0, rollouts.min_p)
    batch = material.sampler(len(questions))
    asked = Sampler(len(questions), prompts or len(questions), batch.seed)
    drawing = Rounds(
        questions, rewards, sampling, asked, group_size=rollouts.group_size, seed=material.seed("rollouts"), end_ids=material.end_ids, greedy=False
    )
    return Rejection(
        drawing, prepared, keep, number=rounds, restarts=restarts, hints=hint is not None, batch_rows=batch.batch_rows,
        total_steps=material.steps(batch), weights=weights,
    )  # fmt: skip


def rft(
    material: Material, rewards: Any, rollouts: Any, *, threshold: float = 0.5, per_prompt: int | None = None, rounds: int = 1,
    prompts: int | None = None, weights: str = "token_mean",
) -> Rejection:  # fmt: skip
    """Rejection-sampling fine-tuning: SFT on every right answer that differs from the others (section 3.2, arXiv:2308.01825).

    Right is a reward above `threshold`; `prompts` are asked a round (null: all). The paper trains the pretrained model on
    these and the gold answers; here the stage's model goes on, and gold answers are a stage of their own before it.
    """
    return _method(
        material, rewards, rollouts, partial(verified, threshold=threshold, per_prompt=per_prompt), rounds=rounds, prompts=prompts, restarts=False,
        weights=weights, per_prompt=per_prompt,
    )  # fmt: skip


def star(
    material: Material, rewards: Any, rollouts: Any, *, threshold: float = 0.5, per_prompt: int | None = 1, rounds: int = 3,
    prompts: int | None = None, hint: str | None = "{question}\nHint: the answer is {answer}.", weights: str = "token_mean",
) -> Rejection:  # fmt: skip
    """Self-taught reasoner: one right answer a prompt; where there is none, one found with a hint (algorithm 1, arXiv:2203.14465).

    The hint takes the place of the question while it is answered, and what is learned is the plain question with that
    answer. null: no hint. Each round trains the model the stage began with. The paper draws one answer, greedily.
    """
    return _method(
        material, rewards, rollouts, partial(verified, threshold=threshold, per_prompt=per_prompt), rounds=rounds, prompts=prompts, restarts=True,
        weights=weights, per_prompt=per_prompt, hint=hint,
    )  # fmt: skip


def rest_em(
    material: Material, rewards: Any, rollouts: Any, *, threshold: float = 0.5, per_prompt: int | None = 10, rounds: int = 2,
    prompts: int | None = None, weights: str = "token_mean",
) -> Rejection:  # fmt: skip
    """ReST-EM, expectation-maximisation for a reward of 0 or 1: draw, filter, train the first model anew (algorithm 1, arXiv:2312.06585).

    E: draw with the present weights, keep at most `per_prompt` right answers. M: SFT of the model the stage began with.
    Beside `star`: no hints, and more than one answer a prompt.
    """
    return _method(
        material, rewards, rollouts, partial(verified, threshold=threshold, per_prompt=per_prompt), rounds=rounds, prompts=prompts, restarts=True,
        weights=weights, per_prompt=per_prompt,
    )  # fmt: skip


def raft(
    material: Material, rewards: Any, rollouts: Any, *, rounds: int = 4, prompts: int | None = None, weights: str = "token_mean"
) -> Rejection:  # fmt: skip
    """Reward-ranked fine-tuning: SFT on the best of each prompt's completions, over and over (algorithm 1, arXiv:2304.06767).

    Beside `rft`: a rank and no threshold, so that a graded reward is climbed and a prompt nobody solves is learned from too.
    """
    return _method(material, rewards, rollouts, best, rounds=rounds, prompts=prompts, restarts=False, weights=weights)


REJECTION = Table(
    "method",
    {"rft": rft, "star": star, "rest_em": rest_em, "raft": raft},
    also={"rejection_sampling": "rft", "expert_iteration": "rft", "self_taught": "star", "rest": "rest_em", "restem": "rest_em", "best_of_n_sft": "raft"},
    about={
        "rft": About(taxonomy=("P19",), paper="arXiv:2308.01825", year=2023),
        "star": About(taxonomy=("P19",), paper="arXiv:2203.14465", year=2022),
        "rest_em": About(taxonomy=("P19",), paper="arXiv:2312.06585", year=2023),
        "raft": About(taxonomy=("P19",), paper="arXiv:2304.06767", year=2023),
    },
)
