"""A*-PO: the optimal value of each prompt estimated once from the reference, then a regression on one sample a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from burnish.core.errors import ConfigError
from burnish.core.metrics import emit
from burnish.core.records import Spend
from burnish.core.seeds import derive
from burnish.core.table import About, Table
from burnish.forest.pack import Batch, Micro
from burnish.maths.head import Objective
from burnish.maths.logprobs import seq_logprob, sequence_objective
from burnish.maths.offline import a_star, soft_value
from burnish.methods.online import Online, drawing, refuse
from burnish.methods.rounds import Round, Rounds, tree_of
from burnish.train.method import Material, Work


class AStar(Online):
    """See module. `values`: V* by question, of every question the stage will ask; estimated before its first step."""

    needs_reference = True

    def __init__(self, rounds: Rounds, value_coef: float, kl_coef: float, **online: Any) -> None:
        super().__init__(rounds, **online)
        self.value_coef, self.kl_coef = value_coef, kl_coef
        self.values: dict[int, float] = {}
        for name, value in (("value_coef", value_coef), ("kl_coef", kl_coef)):
            if not value > 0:
                raise ConfigError(f"{value} given, wanted a positive number", where=f"method.{name}")

    def state(self) -> dict[str, Any]:
        return super().state() | {"values": {str(q): v for q, v in self.values.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self.values = {int(q): v for q, v in state["values"].items()}

    def draw(self, policy: Any, number: int) -> Round:
        drawn = self.rounds.draw(policy, number, group_size=1)
        drawn.facts.pop("dead_groups", None)  # of groups of one it would be 1, and they are learned from
        return drawn

    def dead(self, drawn: Round) -> bool:
        return all(sample.total is None for (sample,) in drawn.groups)

    def prepare(self, policy: Any, work: Work) -> None:
        """Stage 1 before the first step, while the policy is the reference; then this part's samples and their targets."""
        if work.step == 0:
            self.estimate(policy, work)
        drawn, part = self.round(policy, work)
        known = [q for q in part if drawn.groups[q][0].total is not None]
        work.facts |= emit(live_samples=len(known) / len(part))
        if not known:
            return
        asked = [drawn.questions[q] for q in known]
        work.made = Batch([tree_of(self.questions[i].ids, drawn.groups[q], [0]) for i, q in zip(asked, known)])
        assert self.reference is not None
        ref, flops = self.reference.logprobs(policy, work.batch)
        work.spend += Spend(scored_tokens=work.batch.entries, useful_flops=flops, executed_flops=flops)
        work.columns = {
            "unit": work.batch.unit,
            "ref": seq_logprob(ref, work.batch.unit, len(known)),
            "reward": torch.tensor([drawn.groups[q][0].worth or 0.0 for q in known]),
            "value": torch.tensor([self.values[i] for i in asked]),
        }
        gap = work.columns["reward"] - work.columns["value"]
        work.facts |= emit(optimal_advantage=float(gap.mean()), optimal_advantage_abs=float(gap.abs().mean()))

    def asked(self) -> list[int]:
        """Every question of the stage."""
        rounds = -(-self.total_steps // (self.updates * self.passes))
        return sorted({q for number in range(rounds) for q in self.rounds.sampler.batch(number)})

    @property
    def beforehand(self) -> int:
        return len(self.asked()) * self.rounds.group_size

    def estimate(self, policy: Any, work: Work) -> None:
        """V* of every question this stage asks, from `group_size` samples each of the policy it starts with."""
        asked = self.asked()
        drawing = replace(self.rounds, seed=derive(self.rounds.seed, "reference"))
        size = self.rounds.sampler.batch_rows
        for number, begin in enumerate(range(0, len(asked), size)):
            drawn = drawing.draw(policy, number, chosen=asked[begin : begin + size])
            work.spend += drawn.spend
            for q, group in zip(drawn.questions, drawn.groups):
                known = torch.tensor([s.total is not None for s in group])
                reward = torch.tensor([s.worth or 0.0 for s in group], dtype=torch.float64)
                self.values[q] = float(soft_value(reward, known, torch.zeros(len(group), dtype=torch.long), value_coef=self.value_coef)[0])

    def objective(self, work: Work, micro: Micro) -> tuple[Objective, Tensor | None]:
        c = work.columns
        unit = c["unit"][micro.items]
        count = len(c["ref"])

        def regression(seq: Tensor, units: Tensor) -> Tensor:
            ref, reward, value = (c[name][units].to(seq) for name in ("ref", "reward", "value"))
            return a_star(seq, ref, reward, value, kl_coef=self.kl_coef).sum() / count

        return sequence_objective(regression, unit), unit


def astar_po(material: Material, rewards: Any, rollouts: Any, *, value_coef: float = 0.5, kl_coef: float = 1e-3) -> AStar:
    """A*-PO: regress the implied reward of one sample a prompt onto its optimal advantage, estimated from the reference.

    1: V*(x) = b1 log mean_(i <= N) exp(r(x, y_i) / b1),   y_i ~ p_ref, N = rollouts.group_size, before the first step
    2: loss = mean over prompts of (b2 log(p(y | x) / p_ref(y | x)) - (r(x, y) - V*(x)))^2,   y ~ p   (arXiv:2505.20686)
    b1 = value_coef, b2 = kl_coef. Stage 2 draws one completion a prompt: no group, no critic, no ratio. It asks N samples
    of each prompt once, in the first step: give fewer rows where that step is too long.
    Beside `grpo`: the baseline is the optimal value at the reference, not the mean of the policy's own samples.
    """
    refuse(rollouts, "old_logprobs", "refill", "partial", "curriculum", "screen")  # V* is of the questions that the stage will ask, known beforehand
    rounds, online = drawing(material, rewards, rollouts)
    return AStar(rounds, value_coef, kl_coef, **online)


ASTAR_PO = Table(
    "method", {"astar_po": astar_po}, also={"a_star_po": "astar_po", "a*-po": "astar_po"},
    about={"astar_po": About(taxonomy=("Z10",), paper="arXiv:2505.20686", year=2025)},
)  # fmt: skip
