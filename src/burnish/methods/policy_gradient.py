"""Reinforcement learning of a policy: rollouts, rewards, advantages, and the objective of a point of the algebra.

A round draws a group of completions for each of its prompts, scores them, and is learned from in `updates` optimiser
steps, `passes` times. Which columns a round needs (a reference, a greedy answer, a running baseline) follows from the
setting (`maths.policy_gradient.needs`) and from nothing else. Prompts are read once a group, in rollouts and in training:
a group is one tree. Completions that can have no gradient (no advantage and no KL, or weight 0) are not computed, and stay
in the normaliser. What was drawn is written to `trajectories/` and read back by a resume inside a round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.core.errors import ConfigError
from burnish.core.metrics import emit
from burnish.core.records import Sampling, Spend
from burnish.core.runs import StageFolder
from burnish.core.seeds import derive
from burnish.data.chat import Prepared
from burnish.data.sampler import Sampler
from burnish.forest.pack import Batch, Micro
from burnish.forest.stream import Tree
from burnish.maths.advantages import next_trace
from burnish.maths.head import Objective
from burnish.maths.policy_gradient import Setting, couples_sequences, needs, objective_of, override, prepare
from burnish.methods.curriculum import Prompts
from burnish.methods.rounds import KEPT_ROUNDS, Question, Round, Rounds, tree_of
from burnish.models.reference import Reference
from burnish.rewards.scoring import Rewards
from burnish.train.method import Hooks, Work

# what a round can make; the rest of what the algebra may want has to come from a reward or a critic
MADE = frozenset(
    {"unit", "group", "reward", "known", "finished", "old_logprobs", "sampler_logprobs", "ref_logprobs", "greedy_reward", "reward_trace"}
    | {"rewards", "rewards_known", "component_weight", "noise"}
)


class PolicyGradient(Hooks):
    """See module. One optimiser step is one part of a round; `batches(step)` is a pure function of the step."""

    validation = ()

    def __init__(
        self, setting: Setting, questions: Sequence[Question], rewards: Rewards, sampling: Sampling, *, group_size: int, updates: int,
        passes: int, sampler: Sampler, total_steps: int, seed: int, prepared: Prepared, end_ids: Sequence[int], prompts: Prompts,
    ) -> None:  # fmt: skip
        self.setting, self.questions, self.rewards, self.sampling = setting, questions, rewards, sampling
        self.group_size, self.updates, self.passes = group_size, updates, passes
        self.sampler, self.total_steps, self.seed, self.prepared = sampler, total_steps, seed, prepared
        self.needs = needs(setting)
        if missing := sorted(self.needs - MADE):
            raise ConfigError(
                f"this setting needs {', '.join(missing)}, which rollouts do not make", where="method", remedy="choose another advantage or filter"
            )
        if group_size == 1 and "group" in self.needs:
            raise ConfigError(
                "its baseline is the group's other samples, and a group of 1 has none", where="rollouts.group_size", remedy="type 2 or more, or choose method: reinforce"
            )
        self.trace: list[float] | None = None
        self.prompts = prompts
        self.rounds = Rounds(
            questions, rewards, sampling, prompts, group_size=group_size, seed=seed, end_ids=end_ids, greedy="greedy_reward" in self.needs
        )
        self._round: Round | None = None
        self._reference: Reference | None = None
        self._folder: StageFolder | None = None

    # ---- the loop's hooks

    def start(self, policy: Any, folder: StageFolder, poll: Callable[[], None]) -> None:
        """Before a checkpoint is loaded: the reference is the policy the stage began with."""
        self._folder, self.rounds.poll = folder, poll
        if "ref_logprobs" in self.needs:
            self._reference = Reference(policy)

    def close(self) -> None:
        self.rewards.close()
        self.rounds.engine = self._reference = None

    def state(self) -> dict[str, Any]:
        """What a resume needs besides the step."""
        return {"trace": self.trace, "prompts": self.prompts.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.trace = state["trace"]
        self.prompts.load(state["prompts"])

    def batches(self, step: int) -> Iterator[Work]:
        rows = self.sampler.batch_rows // self.updates
        per_round = self.updates * self.passes
        while step < self.total_steps:
            yield Work(None, rows=rows, epoch=(step // per_round + 1) * self.sampler.batch_rows / len(self.questions), step=step)
            step += 1

    def prepare(self, policy: Any, work: Work) -> None:
        """The round this step belongs to, drawn or read back, and the columns of its part."""
        number, inside = divmod(work.step, self.updates * self.passes)
        if self._round is None or self._round.number != number:
            path = None if self._folder is None else self._folder.trajectories(number)
            if inside and path is not None and path.exists():
                self._round = Round.read(path)
            else:
                if self.prompts.unscreened:
                    self._screen(policy, work)
                self._round = self.rounds.draw(policy, number)
                work.facts |= emit(**self.prompts.saw(self._round))
                work.spend += self._round.spend
                if path is not None:
                    self._round.write(path)
                    self._retire(number)
            if not inside:
                work.facts |= self._round.facts
        part = range(inside % self.updates, len(self._round.questions), self.updates)
        self._columns(policy, work, self._round, part)

    def _screen(self, policy: Any, work: Work) -> None:
        """Measure the pass rate of every prompt, once, and leave out those that are not within."""
        assert self.prompts.screen is not None
        measured = self.rounds.draw(policy, -1, chosen=range(len(self.questions)), group_size=self.prompts.screen.samples)
        work.spend += measured.spend
        work.facts |= emit(screened_prompts=self.prompts.screened(measured))

    def objective(self, work: Work, micro: Micro) -> tuple[Objective, Tensor | None]:
        columns = {name: column[micro.items] for name, column in work.columns.items()}
        unit = columns["unit"]
        couple = unit if couples_sequences(self.setting) else None
        if "old_logprobs" in columns:
            return objective_of(self.setting, columns), couple

        def at_the_old_policy(logprobs: Tensor, entries: slice) -> Tensor:
            # one step a round: the old policy is this one, to the bit, whatever rounding the sampler had
            old = logprobs.new_zeros(len(unit))
            old[entries] = logprobs.detach()
            return objective_of(self.setting, columns | {"old_logprobs": old})(logprobs, entries)

        return at_the_old_policy, couple

    def observe(self, work: Work, micro: Micro, logprobs: Tensor) -> None:
        """How far the trainer's log-probs are from the sampler's, for the log: rounding at the first step of a round."""
        gap = (logprobs.float().cpu() - work.columns["sampler_logprobs"][micro.items]).abs()
        work.facts["sampler_gap_max"] = max(work.facts.get("sampler_gap_max", 0.0), float(gap.max()))
        total, count = work.facts.pop("_gap", (0.0, 0))
        work.facts["_gap"] = total + float(gap.sum()), count + len(gap)
        work.facts["sampler_gap"] = work.facts["_gap"][0] / work.facts["_gap"][1]

    # ---- a round

    def _retire(self, number: int) -> None:
        if self._folder is not None and (old := number - KEPT_ROUNDS) > 1:
            self._folder.trajectories(old).unlink(missing_ok=True)

    def _columns(self, policy: Any, work: Work, drawn: Round, part: range) -> None:
        """The batch of these questions, its captured columns, and what can be left out of it."""
        groups = [drawn.groups[q] for q in part]
        samples = [s for group in groups for s in group]
        length = torch.tensor([len(s.tokens) for s in samples])
        unit = torch.arange(len(samples)).repeat_interleave(length)
        columns: dict[str, Tensor] = {
            "unit": unit,
            "group": torch.arange(len(groups)).repeat_interleave(torch.tensor([len(g) for g in groups])),
            "reward": torch.tensor([0.0 if s.total is None else s.total for s in samples]),
            "known": torch.tensor([s.total is not None for s in samples]),
            "finished": torch.tensor([s.finish != "length" for s in samples]),
            "sampler_logprobs": torch.tensor([p for s in samples for p in s.logprobs]),
        }
        single = self.updates * self.passes == 1
        captured = columns["sampler_logprobs"]
        trees = [tree_of(self.questions[drawn.questions[q]].ids, group, range(len(group))) for q, group in zip(part, groups)]
        whole = Batch(trees)
        if "ref_logprobs" in self.needs and self._reference is not None:
            columns["ref_logprobs"], flops = self._reference.logprobs(policy, whole)
            work.spend += Spend(scored_tokens=whole.entries, useful_flops=flops, executed_flops=flops)
        if {"rewards", "component_weight"} & self.needs:
            names = list(samples[0].rewards)
            columns["rewards"] = torch.tensor([[s.rewards[n] or 0.0 for n in names] for s in samples])
            columns["rewards_known"] = torch.tensor([[s.rewards[n] is not None for n in names] for s in samples])
            columns["component_weight"] = torch.tensor([float(self.rewards.weights[n]) for n in names])
        if "greedy_reward" in self.needs:
            answered = torch.tensor([math.nan if drawn.greedy[q] is None else drawn.greedy[q] for q in part])[columns["group"]]
            columns["known"] &= ~answered.isnan()  # without a greedy reward there is no baseline
            columns["greedy_reward"] = answered.nan_to_num()
        if "noise" in self.needs:
            generator = torch.Generator().manual_seed(derive(self.seed, "noise", work.step))
            columns["noise"] = torch.rand(len(unit), generator=generator)
        if "reward_trace" in self.needs:
            columns["reward_trace"] = torch.tensor(self.trace if self.trace is not None else [0.0, 0.0])
        made = prepare(self.setting, columns | {"old_logprobs": captured})
        if "reward_trace" in self.needs:
            self.trace = next_trace(columns["reward_trace"], columns["reward"], columns["known"]).tolist()
        in_loss = self.setting.kl_coef != 0 and self.setting.kl_placement == "loss"
        pull = made["weight"] * (1.0 if in_loss else made["policy_weight"] * made["advantage"])
        live = torch.zeros(len(samples), dtype=torch.bool).index_put_((unit[pull != 0],), torch.tensor(True))
        work.facts |= emit(live_samples=float(live.float().mean()), advantage_std=float(made["advantage"].std()) if len(unit) > 1 else 0.0)
        work.where = tuple(self.questions[drawn.questions[q]].where for q in part)
        if not bool(live.any()):
            return
        at = 0
        kept_trees: list[Tree] = []
        for q, group in zip(part, groups):
            members = [i for i in range(len(group)) if live[at + i]]
            if members:
                kept_trees.append(tree_of(self.questions[drawn.questions[q]].ids, group, members))
            at += len(group)
        keep = live[unit]
        work.made = Batch(kept_trees)
        by_entry = {k: v for k, v in (columns | made).items() if v.ndim and len(v) == len(unit) and k != "unit"}
        if not single:
            by_entry["old_logprobs"] = captured
        work.columns = {k: v[keep] for k, v in by_entry.items()} | {"unit": work.batch.unit}


def build(
    setting: Setting, questions: Sequence[Question], rewards: Rewards, rollouts: Any, *, sampler: Sampler, total_steps: int, seed: int,
    prepared: Prepared, end_ids: Sequence[int],
) -> PolicyGradient:  # fmt: skip
    """A method from a point of the algebra and a stage's `rollouts` block (config.schema.Rollouts).

    `fixed_length` weights without a length take `max_new_tokens`. Raises ConfigError for a setting that needs what
    rollouts do not make.
    """
    if setting.weights == "fixed_length" and setting.length is None:
        setting = override(setting, length=rollouts.max_new_tokens)
    sampling = Sampling(
        rollouts.temperature, rollouts.top_k, rollouts.top_p, rollouts.max_new_tokens, rollouts.stop, 0, rollouts.min_p
    )
    return PolicyGradient(
        setting, questions, rewards, sampling, group_size=rollouts.group_size, updates=rollouts.updates, passes=rollouts.passes,
        sampler=sampler, total_steps=total_steps, seed=seed, prepared=prepared, end_ids=end_ids,
        prompts=Prompts(sampler, rollouts.curriculum, rollouts.screen),
    )  # fmt: skip
