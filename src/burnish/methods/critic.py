"""A critic inside a method: values of a round as it begins, return targets, and the loss that moves them.

The value after the last token is 0 where a completion ended by itself. Where it was cut (at `max_new_tokens`, or because
its value had fallen) it is 0 too by default: the reward judges the text as it stands, so it is what the whole completion
was worth, and the length is a rule of the task. A value on top would pay for running on. `truncated: bootstrapped` takes
the other view, that a cut says nothing of the outcome (arXiv:1712.00378): the reward of a cut completion is put aside and
the value of its last state, discounted, stands in its place. An environment's own token rewards would stay; there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from burnish.config.schema import Critic as Block
from burnish.core.errors import ConfigError
from burnish.core.metrics import emit
from burnish.core.records import Spend
from burnish.forest.pack import Batch, Micro
from burnish.maths import values as losses
from burnish.maths.divergences import token_rewards
from burnish.maths.head import Objective
from burnish.maths.policy_gradient import Setting, advantages_of, override
from burnish.maths.units import last_of_unit
from burnish.methods.pruning import Pruning
from burnish.methods.rounds import Question, Round, Sample, tree_of
from burnish.models.critic import FILE, Critic
from burnish.models.policy import Policy, RowLoss
from burnish.train.method import Pass, Work
from burnish.train.optim import Beside

RATE_SHARE = 10.0  # of the policy's learning rate, where the recipe gives none: a new output has further to go


class Valued:
    """What a critic adds to a policy-gradient method. Raises ConfigError where all of its steps would be pretraining."""

    def __init__(self, block: Block, setting: Setting, *, total_steps: int) -> None:
        if block.pretrain_steps >= total_steps:
            raise ConfigError(
                f"{block.pretrain_steps} of {total_steps} steps for the critic alone: the policy would never move",
                where="critic.pretrain_steps",
                remedy=f"type less than {total_steps}",
            )
        self.block, self.setting = block, setting
        self.critic: Critic | None = None
        self.pruning = None if block.prune is None else Pruning(block.prune.below, block.prune.step_end, block.prune.chunk_tokens)

    def start(self, policy: Policy) -> None:
        """Before a checkpoint is loaded: a separate body is a copy of the policy the stage began with."""
        trains = self.block.trunk == "separate" if self.block.trains_body is None else self.block.trains_body
        self.critic = Critic(policy, self.block.trunk, trains_body=trains)
        if self.pruning is not None:
            self.pruning.critic = self.critic

    @property
    def live(self) -> Critic:
        assert self.critic is not None, "a method is started before it is used"
        return self.critic

    def beside(self, learning_rate: float) -> Beside:
        rate = RATE_SHARE * learning_rate if self.block.learning_rate is None else self.block.learning_rate
        return Beside(self.live.parameters(), rate)

    def exports(self) -> Mapping[str, Callable[[Path], None]]:
        """The critic's file, for `models.export`."""
        critic = self.live

        def write(path: Path) -> None:
            save_file(critic.tensors(), path, metadata=critic.metadata())

        return {FILE: write}

    # ---- a round

    def of_round(self, policy: Policy, drawn: Round, questions: Sequence[Question]) -> None:
        """Write each sample's values into the round, and what they cost: one pass over all of it."""
        trees = [tree_of(questions[q].ids, group, range(len(group))) for q, group in zip(drawn.questions, drawn.groups)]
        batch = Batch(trees)
        found = self.live.values(policy, batch)
        after = iter(found.after.tolist())
        before = iter(found.before.split(batch.unit.bincount(minlength=len(batch.group)).tolist()))
        drawn.groups = [[replace(s, values=(*next(before).tolist(), next(after))) for s in group] for group in drawn.groups]
        drawn.spend += Spend(scored_tokens=batch.entries, useful_flops=found.flops, executed_flops=found.flops)
        if self.pruning is not None:
            spend, facts = self.pruning.take()
            drawn.spend += spend
            drawn.facts |= facts

    def columns(self, samples: Sequence[Sample], columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`value` [m] and, where cut completions are bootstrapped, the `token_reward` [m] that says so."""
        value = torch.tensor([v for s in samples for v in s.values[:-1]])
        if self.block.truncated == "scored":
            return {"value": value}
        unit, cut = columns["unit"], ~columns["finished"]
        gamma = 1.0 if self.setting.gamma is None else self.setting.gamma
        after = gamma * torch.tensor([s.values[-1] for s in samples])
        paid = token_rewards(columns["reward"], unit)
        return {"value": value, "token_reward": torch.where(cut[unit] & last_of_unit(unit), after[unit], paid)}

    def targets(self, setting: Setting, work: Work, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`return` [m], the raw advantage plus the value, and `value_weight` [m]: the mean over labels of known reward.

        `setting` is that of the step, its coefficients as they are now. Also logs how much of the returns, without any value in them (lam = 1), the round's values explained.
        """
        known, value = columns["known"][columns["unit"]], columns["value"]
        raw = override(setting, whiten="none")
        target = value + advantages_of(raw, columns)
        gain = advantages_of(override(raw, lam=1.0), columns)[known]
        counted = value[known]
        spread = float((counted + gain).var(unbiased=False)) if len(counted) else 0.0
        work.facts |= emit(
            value_mean=float(counted.mean()) if len(counted) else None,
            explained_variance=1 - float(gain.var(unbiased=False)) / spread if spread > 0 else None,
        )
        return {"return": target, "value_weight": known / known.sum().clamp(min=1)}

    def forwards(self, policy: Policy, work: Work, micro: Micro, objective: tuple[Objective, Tensor | None] | None) -> list[Pass]:
        """The policy under its objective (None: it does not move yet), and the values, on its rows or on the critic's own."""
        critic, moves = self.live, objective is not None
        on_rows = RowLoss(self._loss(work, micro), critic.trains_body and (critic.own is not None or moves))
        learns = objective or (None, None)
        if critic.own is None:
            return [Pass(policy, *learns, on_rows)]
        own = Pass(critic.own, None, on_rows=on_rows)
        return [Pass(policy, *learns), own] if moves else [own]

    def _loss(self, work: Work, micro: Micro) -> Callable[[Tensor], Tensor]:
        clip, critic = self.block.value_clip, self.live

        def loss(rows: Tensor) -> Tensor:
            value = critic.value(rows)[micro.view.index.to(rows.device)]
            old, target, weight = (work.columns[n][micro.items].to(value) for n in ("value", "return", "value_weight"))
            each = losses.squared(value, target) if clip is None else losses.clipped(value, old, target, value_clip=clip)
            # by label, so that a micro-batch that is run again after memory ran out is not counted twice
            seen: Any = work.facts.setdefault("_value_losses", torch.zeros(len(work.columns["value"]), dtype=torch.float64))
            seen[micro.items] = (weight * each).detach().double().cpu()
            work.facts |= emit(value_loss=float(seen.sum()))
            return self.block.value_coef * (weight * each).sum()

        return loss
