"""OREO: offline reasoning optimisation. A policy and a value model learn from stored completions, failures included.

At the optimum of the KL-constrained reward the soft Bellman equation holds at every state of every completion, whoever
wrote it. Both models regress its residual: the policy with the later log-ratios held still, the value with all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from burnish.core.errors import ConfigError, DataError
from burnish.core.metrics import emit
from burnish.core.records import Rendered, Spend
from burnish.core.runs import StageFolder
from burnish.core.table import About, Table
from burnish.data.chat import Prepared
from burnish.data.sampler import Sampler
from burnish.forest.pack import Batch, Micro
from burnish.forest.stream import Tree
from burnish.maths.head_kl import head_kl, kl_flops
from burnish.maths.offline import oreo_policy, oreo_value
from burnish.maths.units import last_of_unit, numbered
from burnish.models.critic import FILE, Critic
from burnish.models.policy import Policy, RowLoss
from burnish.models.reference import Reference
from burnish.train.method import Hooks, Material, Pass, Work
from burnish.train.optim import Beside

SHARED_RATE = 10.0  # times the policy's learning rate, where the recipe gives none: a single new output has further to go


class Offline(Hooks):
    """Rows in the sampler's order. `ends`: of each row, which of its labels end an action (see `action_ends`)."""

    validation = ()

    def __init__(
        self, prepared: Prepared, reward: Sequence[float], ends: Sequence[Sequence[bool]], sampler: Sampler, *, total_steps: int,
        kl_coef: float, exact_kl_coef: float, trunk: Literal["shared", "separate"], value_learning_rate: float | None,
    ) -> None:  # fmt: skip
        self.prepared, self.reward, self.ends, self.sampler, self.total_steps = prepared, reward, ends, sampler, total_steps
        self.kl_coef, self.exact_kl_coef, self.trunk, self.value_learning_rate = kl_coef, exact_kl_coef, trunk, value_learning_rate
        self._critic: Critic | None = None
        self._reference: Reference | None = None

    # ---- the loop's hooks

    def start(self, policy: Policy, folder: StageFolder, poll: Callable[[], None]) -> None:
        """Before a checkpoint is loaded: reference and a separate value body are the policy the stage began with."""
        self._reference = Reference(policy)
        self._critic = Critic(policy, "separate" if self.trunk == "separate" else "shared", trains_body=self.trunk == "separate")

    def close(self) -> None:
        self._reference = None

    @property
    def critic(self) -> Critic:
        assert self._critic is not None, "a method is started before it is used"
        return self._critic

    def beside(self, learning_rate: float) -> Beside:
        rate = self.value_learning_rate
        if rate is None:
            rate = learning_rate * (1.0 if self.trunk == "separate" else SHARED_RATE)
        return Beside(self.critic.parameters(), rate)

    def exports(self) -> Mapping[str, Callable[[Path], None]]:
        critic = self.critic
        return {FILE: lambda path: save_file(critic.tensors(), path, metadata=critic.metadata())}

    def batches(self, step: int) -> Iterator[Work]:
        rows = self.prepared.rows
        while step < self.total_steps:
            chosen = self.sampler.batch(step)
            batch = Batch([Tree.row(rows[i].ids, rows[i].trained) for i in chosen])
            work = Work(batch, rows=len(chosen), where=tuple(rows[i].where for i in chosen), step=step)
            work.epoch = (step + 1) * len(chosen) / len(rows)
            work.columns["reward"] = torch.tensor([self.reward[i] for i in chosen])
            ends = torch.tensor([end for i in chosen for end in self.ends[i]])
            work.columns["action"] = ends.cumsum(0) - ends.long()  # an end belongs to the action it ends
            yield work
            step += 1

    def prepare(self, policy: Policy, work: Work) -> None:
        """The reference's log-probs, and the values as the step begins."""
        assert self._reference is not None
        c, batch = work.columns, work.batch
        c["ref"], flops = self._reference.logprobs(policy, batch)
        found = self.critic.values(policy, batch)
        c["value"] = found.before
        work.spend += Spend(scored_tokens=2 * batch.entries, useful_flops=flops + found.flops, executed_flops=flops + found.flops)
        c["action_unit"] = batch.unit[first_of(c["action"])]
        # each completion counts alike, and its actions alike within it
        actions = c["action_unit"].bincount(minlength=work.rows)
        c["weight"] = 1.0 / (work.rows * actions[c["action_unit"]])
        c["state_weight"] = 1.0 / (work.rows * batch.unit.bincount(minlength=work.rows)[batch.unit])  # and its states
        value, reward = c["value"][first_of(c["action"])], c["reward"][c["action_unit"]]
        spread = float(reward.var(unbiased=False))
        work.facts |= emit(
            value_mean=float(value.mean()), explained_variance=1 - float((reward - value).var(unbiased=False)) / spread if spread > 0 else None
        )

    def forwards(self, policy: Policy, work: Work, micro: Micro) -> list[Pass]:
        """The policy under its residual, and the value model under its own, of the log-probs the policy has just shown."""
        c = work.columns
        action, ref = c["action"][micro.items], c["ref"][micro.items]
        unit = work.batch.unit[micro.items]
        seen = torch.zeros(len(ref))

        def residual(loss: Callable[..., Tensor], logprobs: Tensor, value: Tensor, entries: slice) -> Tensor:
            here = action[entries]
            present = here.unique()
            local, _ = numbered(here)
            owner, _ = numbered(c["action_unit"][present])
            reward = c["reward"][c["action_unit"][present].unique()]
            at = first_of(here)
            put = [x.to(logprobs.device) for x in (ref[entries].to(logprobs.dtype), reward.to(logprobs.dtype), local, owner)]
            each = loss(logprobs, put[0], value[at.to(value.device)].to(logprobs), *put[1:], kl_coef=self.kl_coef)
            return (c["weight"][present].to(each) * each).sum()

        def policy_loss(logprobs: Tensor, entries: slice) -> Tensor:
            seen[entries] = logprobs.detach().float().cpu()
            return residual(oreo_policy, logprobs, c["value"][micro.items][entries], entries)

        def value_loss(rows: Tensor) -> Tensor:
            value = self.critic.value(rows)[micro.view.index.to(rows.device)]
            found = residual(oreo_value, seen.to(value), value, slice(0, len(seen)))
            noted(work, "value_loss", micro, found)
            return found

        of_value = RowLoss(value_loss, self.critic.trains_body)
        of_kl = self._exact_kl(policy, work, micro) if self.exact_kl_coef else None
        if self.critic.own is not None:
            return [Pass(policy, policy_loss, unit, of_kl), Pass(self.critic.own, None, on_rows=of_value)]
        return [Pass(policy, policy_loss, unit, of_value if of_kl is None else both(of_value, of_kl))]

    def _exact_kl(self, policy: Policy, work: Work, micro: Micro) -> RowLoss:
        """alpha times the KL of whole distributions at each state."""
        assert self._reference is not None
        view, weight = micro.view, work.columns["state_weight"][micro.items]
        scale = torch.zeros(len(view.label)).index_add_(0, view.index, weight)
        other, flops = self._reference.head(policy, micro)

        def loss(rows: Tensor) -> Tensor:
            own = policy.head(rows)
            found, kl = head_kl(own, other, self.exact_kl_coef * scale, sink=policy.sink(own.weight))
            noted(work, "exact_kl", micro, scale.to(kl) @ kl)
            return found

        weight = policy.head_weight()
        vocabulary, hidden = weight.shape
        more = kl_flops(len(view.label), vocabulary, hidden, other.hidden.shape[1], weight_trained=weight.requires_grad)
        return RowLoss(loss, True, flops + more)


def noted(work: Work, name: str, micro: Micro, value: Tensor) -> None:
    """A metric that is summed over micro-batches, by place: one that is run again counts once."""
    parts: dict[int, float] = work.facts.setdefault(f"_{name}", {})
    parts[int(micro.items[0])] = float(value.detach())
    work.facts |= emit(**{name: sum(parts.values())})


def both(held: RowLoss, through: RowLoss) -> RowLoss:
    """Two objectives on the same rows, of which only `through` may reach the body where `held` may not."""
    return RowLoss(
        lambda rows: held.loss(rows if held.through_body else rows.detach()) + through.loss(rows), through.through_body, held.flops + through.flops
    )


def first_of(action: Tensor) -> Tensor:
    """Where each action begins among its entries."""
    last = last_of_unit(action).nonzero()[:, 0]
    return torch.cat([last.new_zeros(1), last[:-1] + 1])[: len(last)]


def action_ends(level: str, labels: Sequence[str], step_end: str) -> list[bool]:
    """Which labels of a completion end an action, from the text of each; the last always does."""
    ends = [level == "token"] * len(labels)
    if level == "step":
        until = list(accumulate(labels))
        ends = [step_end in text[max(0, len(text) - len(piece) - len(step_end) + 1) :] for text, piece in zip(until, labels)]
    ends[-1] = True
    return ends


def label_ids(row: Rendered) -> list[int]:
    """The tokens that are learned; the first has no predictor."""
    return [t for i, (t, trained) in enumerate(zip(row.ids, row.trained)) if trained and i]


def oreo(
    material: Material, *, level: Literal["token", "step", "response"] = "token", kl_coef: float = 0.03, exact_kl_coef: float = 0.0,
    reward_column: str = "reward", step_end: str = "\n", trunk: Literal["separate", "shared"] = "separate", value_learning_rate: float | None = None,
) -> Offline:  # fmt: skip
    """OREO: policy and value model learn the soft Bellman equation from stored completions, right and wrong ones.

    policy: (V(s_t) - R + beta d_t + sg[beta sum_(i > t) d_i])^2 + alpha KL(p(. | s_t) || p_ref(. | s_t)),
            d_t = log p(a_t | s_t) - log p_ref(a_t | s_t)
    value:  (V(s_t) - R + sg[beta sum_(i >= t) d_i])^2                                     (arXiv:2412.16145)
    beta = kl_coef, alpha = exact_kl_coef. An action is a token, a step (it ends with `step_end`) or the response; the KL of
    whole distributions is taken at every token, and costs another pass of the reference. `data` are rows of prompt,
    completion and a number in `reward_column`, or the trajectories/ folder of a stage that drew its own. The value model is
    a copy of the policy with a linear output (`trunk: shared`: an output on the policy's own rows), exported in the model's
    critic/, where a search can load it; its learning rate is null for train.learning_rate, or ten times that of a shared
    trunk.
    With a small kl_coef, whose optimum is far away, keep the learning rate low or alpha above 0. Beside `dpo`: no pairs, and
    credit by step.
    """
    if not 0 <= exact_kl_coef < float("inf"):
        raise ConfigError(f"{exact_kl_coef} given, wanted a number of at least 0", where="method.exact_kl_coef")
    if not kl_coef > 0:
        raise ConfigError(f"{kl_coef} given, wanted a positive number", where="method.kl_coef")
    if value_learning_rate is not None and not value_learning_rate > 0:
        raise ConfigError(f"{value_learning_rate} given, wanted a positive number or null", where="method.value_learning_rate")
    if not step_end:
        raise ConfigError("an empty text ends every step", where="method.step_end", remedy=r'type step_end: "\n"')
    prepared, worth = material.scored(reward_column)
    texts = [[material.text(t) for t in label_ids(row)] for row in prepared.rows]
    ends = [action_ends(level, labels, step_end) for labels in texts]
    if level == "step" and all(sum(e) == 1 for e in ends):
        message = f"no completion holds {step_end!r} before its end: each would be a single step"
        raise DataError(message, where=prepared.rows[0].where, remedy="type level: response, or step_end: the text that ends a step of yours")
    if len(set(worth)) == 1:
        message = f"every completion has the reward {worth[0]:g}: there is nothing to tell apart"
        raise DataError(message, where=prepared.rows[0].where, remedy="give failures too, with their own reward")
    sampler = material.sampler(len(prepared.rows))
    return Offline(
        prepared, worth, ends, sampler, total_steps=material.steps(sampler), kl_coef=kl_coef, exact_kl_coef=exact_kl_coef, trunk=trunk,
        value_learning_rate=value_learning_rate,
    )  # fmt: skip


OREO = Table("method", {"oreo": oreo}, about={"oreo": About(taxonomy=("P13",), paper="arXiv:2412.16145", year=2024)})
