"""Reinforcement learning of a policy: rollouts, rewards, advantages, and the objective of a point of the algebra.

A round draws a group of completions for each of its prompts, scores them, and is learned from in `updates` optimiser
steps, `passes` times. Which columns a round needs (a reference, a greedy answer, entropies, steps) follows from the
setting (`maths.policy_gradient.needs`) and from nothing else. Prompts are read once a group, in rollouts and in training:
a group is one tree. Completions that can have no gradient (no advantage and no KL, or weight 0) are not computed, and stay
in the normaliser. What was drawn is written to `trajectories/` and read back by a resume inside a round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from burnish.config.schema import Critic
from burnish.core.errors import ConfigError
from burnish.core.metrics import emit
from burnish.core.records import Spend
from burnish.core.runs import StageFolder
from burnish.core.seeds import derive
from burnish.forest.pack import Batch, Micro
from burnish.forest.stream import Tree
from burnish.maths.advantages import next_trace
from burnish.maths.controls import Coefficients
from burnish.maths.divergences import k3
from burnish.maths.head import Objective, WithEntropy
from burnish.maths.policy_gradient import Setting, couples_sequences, needs, objective_of, override, prepare
from burnish.methods.critic import Valued
from burnish.methods.online import Online, drawing
from burnish.methods.rounds import Round, Rounds, Sample, group_of, tree_of, write_credit
from burnish.models.policy import Policy
from burnish.models.scoring import score
from burnish.rewards.scoring import Rewards
from burnish.train.method import Material, Pass, Work
from burnish.train.optim import Beside

# what a round can make; the rest of what the algebra may want has to come from a reward or a critic
MADE = frozenset(
    {"unit", "group", "reward", "known", "finished", "old_logprobs", "sampler_logprobs", "ref_logprobs", "greedy_reward", "reward_trace"}
    | {"rewards", "rewards_known", "component_weight", "noise", "entropy", "step_reward", "step_known", "step_end"}
)


class PolicyGradient(Online):
    """See module. One optimiser step is one part of a round; `batches(step)` is a pure function of the step.

    keeps_all  whether completions without an advantage are computed too
    """

    keeps_all = False

    def __init__(
        self, setting: Setting, rounds: Rounds, *, old_logprobs: Literal["auto", "sampler", "trainer"] = "auto", critic: Critic | None = None,
        **online: Any,
    ) -> None:  # fmt: skip
        super().__init__(rounds, **online)
        self.setting = setting
        self.needs = needs(setting)
        self.valued = Valued(critic, setting, total_steps=self.total_steps) if "value" in self.needs and critic is not None else None
        if missing := sorted(self.needs - MADE - ({"value"} if self.valued else set[str]())):
            raise ConfigError(
                f"this setting needs {', '.join(missing)}, which rollouts do not make", where="method", remedy="choose another advantage or filter"
            )
        if rounds.group_size == 1 and "group" in self.needs:
            raise ConfigError(
                "its baseline is the group's other samples, and a group of 1 has none", where="rollouts.group_size", remedy="type 2 or more, or choose method: reinforce"
            )
        self._refuse(old_logprobs)
        self.old_logprobs = old_logprobs
        self.needs_reference = "ref_logprobs" in self.needs
        rounds.greedy, rounds.entropic = "greedy_reward" in self.needs, "entropy" in self.needs
        self.trace: list[float] | None = None
        self.coefficients = Coefficients.of(setting)
        if self.valued and self.valued.pruning:
            rounds.sample = self.valued.pruning
        self._measured: Tensor | None = None
        self._now = setting  # with the coefficients of this step

    def _refuse(self, old_logprobs: str) -> None:
        """Combinations of the setting with rewards and rollouts that cannot be meant."""
        if old_logprobs == "sampler" and self.setting.correction != "none":
            why = f"correction: {self.setting.correction} compares the trainer's log-probs with the sampler's, and these would be the same"
            raise ConfigError(why, where="rollouts.old_logprobs", remedy="type trainer, or leave it out")
        if self.rounds.partial and self.setting.correction == "none":
            why = "what goes on from round to round was begun by earlier weights, and this method would learn from it as if by the present ones"
            raise ConfigError(why, where="rollouts.partial", remedy="type method: {name: ..., correction: truncated}, or partial: 0")
        if self.rounds.partial and self.valued and self.valued.pruning:
            why = "rollouts that a critic prunes are drawn in pieces of their own"
            raise ConfigError(why, where="rollouts.partial", remedy="type partial: 0, or critic: {prune: null}")
        if "step_reward" in self.needs and not self.rounds.rewards.process:
            why = "this advantage needs a reward of each step, and no reward here scores steps"
            raise ConfigError(why, where="rewards", remedy="use task_steps, or a function of yours that takes `steps`")
        if "step_reward" in self.needs and self.rounds.rewards.block.combine.name != "sum":
            why = f"rewards of steps are summed; combine: {self.rounds.rewards.block.combine.name} is of whole completions"
            raise ConfigError(why, where="rewards.combine", remedy="type combine: sum")

    # ---- the loop's hooks

    def start(self, policy: Any, folder: StageFolder, poll: Callable[[], None]) -> None:
        super().start(policy, folder, poll)
        several = self.updates * self.passes > 1
        auto = self.setting.correction != "none" or (several and policy.dtype != torch.float32)
        self.rounds.rescored = auto if self.old_logprobs == "auto" else self.old_logprobs == "trainer"
        if self.valued:
            self.valued.start(policy)

    def beside(self, learning_rate: float) -> Beside | None:
        return self.valued.beside(learning_rate) if self.valued else None

    def exports(self) -> Mapping[str, Callable[[Path], None]]:
        return self.valued.exports() if self.valued else {}

    def state(self) -> dict[str, Any]:
        """What a resume needs besides the step."""
        return super().state() | {"trace": self.trace, "coefficients": self.coefficients.to_json()}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self.trace, self.coefficients = state["trace"], Coefficients.from_json(state["coefficients"])

    def prepare(self, policy: Any, work: Work) -> None:
        """The columns of this step's part of its round."""
        number, inside = divmod(work.step, self.updates * self.passes)
        pretrain = self.valued.block.pretrain_steps if self.valued else 0
        work.policy_moves = work.step >= pretrain
        if not inside and work.step > pretrain:  # the round before moved the policy, in its last step at least
            self._end_round(policy, work, number - 1)
        self._columns(policy, work, *self.round(policy, work), fresh=inside < self.updates)

    def forwards(self, policy: Policy, work: Work, micro: Micro) -> Sequence[Pass]:
        if self.valued is None:
            return super().forwards(policy, work, micro)
        return self.valued.forwards(policy, work, micro, self.objective(work, micro) if work.policy_moves else None)

    def objective(self, work: Work, micro: Micro) -> tuple[Objective, Tensor | None]:
        columns = {name: column[micro.items] for name, column in work.columns.items()}
        unit = columns["unit"]
        setting = self._now
        couple = unit if couples_sequences(setting) else None
        bonus = columns.get("entropy_weight")
        self._measured = None if bonus is None else torch.zeros(len(unit))

        def with_bonus(objective: Objective) -> Objective:
            return objective if self._measured is None else WithEntropy(objective, self._measured, bonus)

        if "old_logprobs" in columns:
            return with_bonus(objective_of(setting, columns)), couple

        def at_the_old_policy(logprobs: Tensor, entries: slice) -> Tensor:
            # one step a round: the old policy is this one, to the bit, whatever rounding the sampler had
            old = logprobs.new_zeros(len(unit))
            old[entries] = logprobs.detach()
            return objective_of(setting, columns | {"old_logprobs": old})(logprobs, entries)

        return with_bonus(at_the_old_policy), couple

    def observe(self, work: Work, micro: Micro, logprobs: Tensor) -> None:
        """How far the trainer's log-probs are from the sampler's, for the log: rounding at the first step of a round.

        Not of tokens that were given, nor of those that other weights drew.
        """
        drawn = work.columns["drawn"][micro.items]
        if not bool(drawn.any()):
            return
        gap = (logprobs.float().cpu() - work.columns["sampler_logprobs"][micro.items])[drawn].abs()
        work.facts["sampler_gap_max"] = max(work.facts.get("sampler_gap_max", 0.0), float(gap.max()))
        total, count = work.facts.pop("_gap", (0.0, 0))
        work.facts["_gap"] = total + float(gap.sum()), count + len(gap)
        work.facts["sampler_gap"] = work.facts["_gap"][0] / work.facts["_gap"][1]
        if self._measured is not None and "entropy" not in work.columns:
            total, count = work.facts.pop("_entropy", (0.0, 0))
            work.facts["_entropy"] = total + float(self._measured.sum()), count + len(gap)
            work.facts |= emit(entropy=work.facts["_entropy"][0] / work.facts["_entropy"][1])

    # ---- a round

    def _end_round(self, policy: Any, work: Work, number: int) -> None:
        """Move the penalty by how far the policy went in round `number`: measured once it is learned from, on its own tokens.

        Log-probs seen on the way stand before the update they led to, and with one step a round would always say 0.
        """
        if self.setting.penalty_target is None:
            return
        learned = self._round if self._round is not None and self._round.number == number else self._read(number)
        trees = [tree_of(self.questions[q].ids, group, range(len(group))) for q, group in zip(learned.questions, learned.groups)]
        found = score(policy, Batch(trees))
        old = torch.tensor([p for group in learned.groups for s in group for p in s.old_logprobs or s.logprobs])
        moved = float(k3(old, found.logprobs).mean())  # tokens are the old policy's: of KL(old || policy) without bias
        self.coefficients = self.coefficients.after_round(self.setting, moved)
        work.spend += found.spend
        work.facts |= emit(policy_moved=moved)

    def draw(self, policy: Any, number: int) -> Round:
        drawn = super().draw(policy, number)
        if self.valued:
            self.valued.of_round(policy, drawn, self.questions)
        return drawn

    def shared(self, drawn: Round, q: int) -> int:
        """How many tokens the completions of a question begin with that are the same for all."""
        return 0

    def credit(self, work: Work, drawn: Round, columns: Mapping[str, Tensor], made: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the loss captures of this part's columns, where a method has more to say than its setting."""
        return made

    def _columns(self, policy: Any, work: Work, drawn: Round, part: range, *, fresh: bool) -> None:
        """The batch of these questions, its captured columns, and what can be left out of it. `fresh`: seen for the first
        time, so that coefficients that adapt move."""
        groups = [drawn.groups[q] for q in part]
        samples = [s for group in groups for s in group]
        length = torch.tensor([len(s.tokens) for s in samples])
        unit = torch.arange(len(samples)).repeat_interleave(length)
        columns: dict[str, Tensor] = {
            "unit": unit,
            "group": torch.arange(len(groups)).repeat_interleave(torch.tensor([len(g) for g in groups])),
            "reward": torch.tensor([0.0 if s.worth is None else s.worth for s in samples]),
            "known": torch.tensor([s.total is not None for s in samples]),
            "finished": torch.tensor([s.finish != "length" for s in samples]),
            "sampler_logprobs": torch.tensor([p for s in samples for p in (*_nothing(s), *s.logprobs)]),
            "drawn": torch.tensor([i >= max(len(_nothing(s)), s.stale(drawn.version)) for s in samples for i in range(len(s.tokens))]),
        }
        single = self.updates * self.passes == 1
        captured = columns["sampler_logprobs"]
        if samples[0].old_logprobs:
            captured = torch.tensor([p for s in samples for p in s.old_logprobs])
        if "entropy" in self.needs:
            columns["entropy"] = torch.tensor([h for s in samples for h in s.entropies])
        if "step_reward" in self.needs:
            columns |= _step_columns(samples)
        trees = [tree_of(self.questions[drawn.questions[q]].ids, group, range(len(group)), self.shared(drawn, q)) for q, group in zip(part, groups)]
        whole = Batch(trees)
        if "ref_logprobs" in self.needs and self.reference is not None:
            columns["ref_logprobs"], flops = self.reference.logprobs(policy, whole)
            work.spend += Spend(scored_tokens=whole.entries, useful_flops=flops, executed_flops=flops)
        if {"rewards", "component_weight"} & self.needs:
            names = list(samples[0].rewards)
            columns["rewards"] = torch.tensor([[s.rewards[n] or 0.0 for n in names] for s in samples])
            columns["rewards_known"] = torch.tensor([[s.rewards[n] is not None for n in names] for s in samples])
            columns["component_weight"] = torch.tensor([float(self.rounds.rewards.weights[n]) for n in names])
        if "greedy_reward" in self.needs:
            answered = torch.tensor([math.nan if drawn.greedy[q] is None else drawn.greedy[q] for q in part])[columns["group"]]
            columns["known"] &= ~answered.isnan()  # without a greedy reward there is no baseline
            columns["greedy_reward"] = answered.nan_to_num()
        if "noise" in self.needs:
            generator = torch.Generator().manual_seed(derive(self.rounds.seed, "noise", work.step))
            columns["noise"] = torch.rand(len(unit), generator=generator)
        if "reward_trace" in self.needs:
            columns["reward_trace"] = torch.tensor(self.trace if self.trace is not None else [0.0, 0.0])
        if self.valued:
            columns |= self.valued.columns(samples, columns)
        self._now = self.coefficients.applied(self.setting)
        bonus = self._measure(work, columns, captured, fresh=fresh)
        made = self.credit(work, drawn, columns, prepare(self._now, columns | {"old_logprobs": captured}))
        if self.valued:
            made |= self.valued.targets(self._now, work, columns | {"old_logprobs": captured})
        if bonus:
            made["entropy_weight"] = -bonus * made["weight"]
        if "reward_trace" in self.needs:
            self.trace = next_trace(columns["reward_trace"], columns["reward"], columns["known"]).tolist()
        by_all = bool(bonus) or self.keeps_all or (self.setting.kl_coef != 0 and self.setting.kl_placement == "loss")
        pull = made["weight"] * (1.0 if by_all else made["policy_weight"] * made["advantage"]) + made.get("likelihood_weight", 0)
        if self.valued:
            pull = made["value_weight"] if not work.policy_moves else pull.abs() + made["value_weight"]
        live = torch.zeros(len(samples), dtype=torch.bool).index_put_((unit[pull != 0],), torch.tensor(True))
        work.facts |= emit(live_samples=float(live.float().mean()), advantage_std=float(made["advantage"].std()) if len(unit) > 1 else 0.0)
        if self._folder is not None and work.step % (self.updates * self.passes) < self.updates:
            worth = torch.zeros(len(samples), dtype=torch.float64).index_add_(0, unit, made["advantage"].double()) / length.clamp(min=1)
            asked = {q: self.questions[drawn.questions[q]] for q in part}
            write_credit(self._folder.credit(drawn.number, part.start), asked, group_of(worth, groups), group_of(live, groups))
        if not bool(live.any()):
            return
        at = 0
        kept_trees: list[Tree] = []
        for q, group in zip(part, groups):
            members = [i for i in range(len(group)) if live[at + i]]
            if members:
                kept_trees.append(tree_of(self.questions[drawn.questions[q]].ids, group, members, self.shared(drawn, q)))
            at += len(group)
        keep = live[unit]
        work.made = Batch(kept_trees)
        by_entry = {k: v for k, v in (columns | made).items() if v.ndim and len(v) == len(unit) and k != "unit"}
        if not single:
            by_entry["old_logprobs"] = captured
        work.columns = {k: v[keep] for k, v in by_entry.items()} | {"unit": work.batch.unit}

    def _measure(self, work: Work, columns: Mapping[str, Tensor], old: Tensor, *, fresh: bool) -> float:
        """Log KL to the reference and entropy, both of the old policy; move what adapts; the coefficient of the bonus."""
        kl = entropy = None
        if "ref_logprobs" in columns:
            kl = float(k3(old, columns["ref_logprobs"]).mean())
            work.facts |= emit(kl=kl)
        if "entropy" in columns:
            entropy = float(columns["entropy"].mean())
            work.facts |= emit(entropy=entropy)
        if self.setting.kl_target is not None:
            work.facts |= emit(kl_coef=self._now.kl_coef)
        if self.setting.penalty_target is not None:
            work.facts |= emit(penalty_coef=self._now.penalty_coef)
        if fresh:
            self.coefficients = self.coefficients.after_batch(self.setting, kl=kl, entropy=entropy)
        bonus = self.coefficients.bonus(self.setting, columns["reward"], columns["known"])
        if self.setting.entropy_coef or self.setting.entropy_target is not None:
            work.facts |= emit(entropy_coef=bonus)
        return bonus


def _step_columns(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Steps over the whole batch, `step_end` being the entry of a step's last token; a unit is known where a step is."""
    first = accumulate((len(s.tokens) for s in samples), initial=0)
    steps = [(at + end - 1, value) for at, s in zip(first, samples) for end, value in s.paid]
    return {
        "step_reward": torch.tensor([0.0 if value is None else value for _, value in steps]),
        "step_known": torch.tensor([value is not None for _, value in steps]),
        "step_end": torch.tensor([end for end, _ in steps]),
        "known": torch.tensor([any(value is not None for _, value in s.steps) for s in samples]),
    }


def _nothing(sample: Sample) -> tuple[float, ...]:
    """In place of the log-probs of tokens that were given and not drawn."""
    return (0.0,) * (len(sample.tokens) - len(sample.logprobs))


def build(setting: Setting, material: Material, rewards: Rewards, rollouts: Any, critic: Critic | None = None) -> PolicyGradient:
    """A method from a point of the algebra and a stage's `rollouts` and `critic` blocks (config.schema.Rollouts, Critic).

    `fixed_length` weights without a length take `max_new_tokens`; a setting that takes values has a critic, as the schema
    says where no block does. Raises ConfigError for a setting that needs what rollouts do not make.
    """
    if setting.weights == "fixed_length" and setting.length is None:
        setting = override(setting, length=rollouts.max_new_tokens)
    rounds, online = drawing(material, rewards, rollouts)
    return PolicyGradient(setting, rounds, old_logprobs=rollouts.old_logprobs, critic=critic or Critic(), **online)
