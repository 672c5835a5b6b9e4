"""Minimum risk training: the expected cost under the policy, renormalised on what was sampled for a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from burnish.core.errors import ConfigError
from burnish.core.metrics import emit
from burnish.core.table import About, Table
from burnish.forest.pack import Batch, Micro
from burnish.forest.stream import Tree
from burnish.maths.head import Objective
from burnish.maths.logprobs import sequence_objective
from burnish.maths.offline import minimum_risk
from burnish.methods.online import Online, drawing, refuse
from burnish.methods.rounds import Round, Rounds, Sample, tree_of
from burnish.train.method import Material, Work


class MinimumRisk(Online):
    """See module. `gold`: each question's own completion, one more member of its set; None: samples alone."""

    def __init__(self, rounds: Rounds, sharpness: float, gold: Sequence[tuple[int, ...]] | None, **online: Any) -> None:
        super().__init__(rounds, **online)
        self.sharpness, self.gold = sharpness, gold
        if rounds.group_size == 1 and gold is None:
            message = "of a set of 1 the renormalised probability is 1 whatever the policy does: no gradient"
            raise ConfigError(message, where="rollouts.group_size", remedy="type 2 or more, or subspace: samples_and_gold")
        minimum_risk(torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.long), sharpness=sharpness)  # refuses a bad one now

    def draw(self, policy: Any, number: int) -> Round:
        drawn = super().draw(policy, number)
        if self.gold is not None:  # judged in a call of its own: what is logged of rewards is of what the policy said
            given = [Sample(self.gold[q], (), "given", policy.decode(self.gold[q]), {}, None) for q in drawn.questions]
            for group, sample in zip(drawn.groups, self.rounds.judged(policy, given, drawn.questions, range(len(given)))[0]):
                group.append(sample)
        return drawn

    def prepare(self, policy: Any, work: Work) -> None:
        """The sets that have a gradient: distinct completions of known, unequal costs. The others stay in the mean."""
        drawn, part = self.round(policy, work)
        trees: list[Tree] = []
        reward: list[float] = []
        group: list[int] = []
        for g, q in enumerate(part):
            kept = distinct(drawn.groups[q])
            if len({s.worth for s in kept}) > 1:
                trees.append(tree_of(self.questions[drawn.questions[q]].ids, kept, range(len(kept))))
                reward += [s.worth or 0.0 for s in kept]
                group += [g] * len(kept)
        work.facts |= emit(live_samples=len(reward) / sum(len(drawn.groups[q]) for q in part))
        if not trees:
            return
        work.made = Batch(trees)
        # -reward for a cost: within a set Q sums to one, so any constant added to it has no gradient
        work.columns = {"unit": work.batch.unit, "cost": -torch.tensor(reward), "group": torch.tensor(group)}
        work.facts["_prompts"] = len(part)

    def objective(self, work: Work, micro: Micro) -> tuple[Objective, Tensor | None]:
        unit, cost, group = work.columns["unit"][micro.items], work.columns["cost"], work.columns["group"]

        def risk(seq_logprob: Tensor, units: Tensor) -> Tensor:
            each = minimum_risk(seq_logprob, cost[units].to(seq_logprob), group[units], sharpness=self.sharpness)
            return each.sum() / work.facts["_prompts"]

        return sequence_objective(risk, unit), group[unit]


def distinct(group: Sequence[Sample]) -> list[Sample]:
    """The samples of a prompt with a known reward, each completion once."""
    return list({s.tokens: s for s in group if s.total is not None}.values())


def mrt(
    material: Material, rewards: Any, rollouts: Any, *, sharpness: float = 5e-3, subspace: Literal["samples_and_gold", "samples"] = "samples_and_gold"
) -> MinimumRisk:  # fmt: skip
    """Minimum risk training: minimise the expected cost under the policy renormalised on a sampled set S of completions.

    loss = mean over prompts of sum_(y in S) Q(y) cost(y),   Q(y) = p(y)^alpha / sum_(y' in S) p(y')^alpha   (arXiv:1512.02433)
    cost = -reward, alpha = sharpness. S is what `rollouts` drew, each completion once, and the row's own completion
    (`subspace`; the paper's S holds it). With alpha 1 and every completion in S this is the expected risk itself.
    Beside `rloo`: no estimate of a gradient but the gradient of an estimate, biased for a finite S.
    """
    refuse(rollouts, "old_logprobs", "partial")
    rounds, online = drawing(material, rewards, rollouts)
    gold = material.gold(rounds.questions) if subspace == "samples_and_gold" else None
    return MinimumRisk(rounds, sharpness, gold, **online)


MRT = Table("method", {"mrt": mrt}, also={"minimum_risk": "mrt"}, about={"mrt": About(taxonomy=("F7",), paper="arXiv:1512.02433", year=2016)})
