"""MIXER: the first tokens of a completion are given and learned by likelihood, the rest are drawn and learned by reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.core.errors import ConfigError
from burnish.core.metrics import emit
from burnish.core.records import Spend
from burnish.core.runs import StageFolder
from burnish.core.table import About, Table
from burnish.forest.pack import Micro
from burnish.maths.head import Objective
from burnish.maths.logprobs import weighted_nll
from burnish.maths.offline import mixer as supervised_entries
from burnish.maths.offline import mixer_tokens
from burnish.maths.policy_gradient import Setting
from burnish.methods.online import drawing, refuse
from burnish.methods.policy_gradient import PolicyGradient
from burnish.methods.rounds import Round, Rounds, Sample
from burnish.train.method import Material, Work


class Mixer(PolicyGradient):
    """REINFORCE on drawn tokens, and the negative log-likelihood of given ones, under the same weights.

    gold  the completion of each question; a round gives the first `supervised(number)` tokens of it
    """

    def __init__(self, setting: Setting, rounds: Rounds, *, gold: Sequence[tuple[int, ...]], warmup: int, period: int, fewer: int, **online: Any) -> None:
        super().__init__(setting, rounds, **online)
        if rounds.greedy:
            raise ConfigError("a greedy answer does not begin with the given tokens", where="method.advantage", remedy="type leave_one_out or ema")
        self.gold, self.warmup, self.period, self.fewer = gold, warmup, period, fewer
        self.longest = max(map(len, gold))
        self.supervised(0)  # refuses a bad schedule now

    def supervised(self, number: int) -> int:
        """How many tokens round `number` gives."""
        return mixer_tokens(number, longest=self.longest, warmup=self.warmup, period=self.period, fewer=self.fewer)

    def draw(self, policy: Any, number: int) -> Round:
        """Completions begun with the given tokens. What is given whole is neither drawn nor scored."""
        given, chosen = self.supervised(number), list(self.rounds.sampler.batch(number))
        open_ = [i for i, q in enumerate(chosen) if len(self.gold[q]) > given]
        whole = [Sample(self.gold[q], (), "given", "", dict.fromkeys(self.rounds.rewards.weights), None) for q in chosen]
        groups = [[sample] * self.rounds.group_size for sample in whole]
        prompts = [self.questions[q].ids for q in chosen]
        if not open_:
            return Round(number, str(policy.version), chosen, groups, [], Spend(), prompts=prompts)
        asked = [chosen[i] for i in open_]
        drawn = self.rounds.draw(policy, number, chosen=asked, begun=[self.gold[q][:given] for q in asked])
        for i, group in zip(open_, drawn.groups):
            groups[i] = group
        return Round(number, drawn.version, chosen, groups, [], drawn.spend, drawn.facts, drawn.notices, prompts)

    def dead(self, drawn: Round) -> bool:
        return not self.supervised(drawn.number) and drawn.dead

    def start(self, policy: Any, folder: StageFolder, poll: Callable[[], None]) -> None:
        super().start(policy, folder, poll)
        self.rounds.rescored = False  # there is no ratio, and what is given whole was not drawn

    def shared(self, drawn: Round, q: int) -> int:
        return min(self.supervised(drawn.number), len(self.gold[drawn.questions[q]]))

    def credit(self, work: Work, drawn: Round, columns: Mapping[str, Tensor], made: dict[str, Tensor]) -> dict[str, Tensor]:
        given = supervised_entries(columns["unit"], supervised_tokens=self.supervised(drawn.number))
        work.facts |= emit(supervised_share=float(given.float().mean()))
        zero = torch.zeros_like(made["weight"])
        return made | {
            "policy_weight": torch.where(given, 0.0, made["policy_weight"]),
            "likelihood_weight": torch.where(given, made["weight"], zero),
        }

    def objective(self, work: Work, micro: Micro) -> tuple[Objective, Tensor | None]:
        drawn, couple = super().objective(work, micro)
        given = weighted_nll(work.columns["likelihood_weight"][micro.items])
        return lambda logprobs, entries: drawn(logprobs, entries) + given(logprobs, entries), couple


def mixer(
    material: Material, rewards: Any, rollouts: Any, *, warmup: int = 20, period: int = 10, fewer: int = 4,
    advantage: str = "leave_one_out", weights: str = "token_mean",
) -> Mixer:  # fmt: skip
    """MIXER: likelihood on the first T - Delta tokens of the row's completion, REINFORCE on a tail that the policy draws.

    loss = - sum_(t <= T - Delta) w_t log p(y*_t) - sum_(t > T - Delta) w_t (r - b) log p(y_t)     (algorithm 1, arXiv:1511.06732)
    `warmup` rounds learn by likelihood alone, then `fewer` tokens less every `period` rounds, until none is left.
    `advantage` is r - b: any row of its table that needs no critic. The paper regresses b on hidden states; here the
    other samples of a prompt are the baseline, or a moving average (`ema`) for a group of one.
    At Delta = 0 this is `sft`, at Delta = T `reinforce` with that baseline and these weights.
    """
    length = rollouts.max_new_tokens if weights == "fixed_length" else None
    setting = Setting(advantage=advantage, ratio="none", surrogate="reinforce", weights=weights, length=length)
    refuse(rollouts, "old_logprobs", "refill", "partial", "curriculum", "screen")  # a pass rate is of whole answers, and here their begin is given
    rounds, online = drawing(material, rewards, rollouts)
    gold = material.gold(rounds.questions)
    return Mixer(setting, rounds, gold=gold, warmup=warmup, period=period, fewer=fewer, **online)


MIXER = Table("method", {"mixer": mixer}, about={"mixer": About(taxonomy=("F5", "S13"), paper="arXiv:1511.06732", year=2016)})
