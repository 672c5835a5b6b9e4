"""Trust region policy optimisation: the natural gradient's step, as long as a KL allows, backtracked until it is good.

The update costs, besides the gradient itself, `iterations` + 1 products with the Fisher matrix and the passes of the line
search. A product differentiates the KL over the whole vocabulary twice: it takes `DENSE_TOKENS` tokens at a time (a longer
tree alone), keeps every activation of them, their attention as full squares and several [labels, vocabulary] tensors, and
is about nine forward passes' work. Models up to some 100 million parameters with vocabularies up to some 50,000 are
practical on one CPU, larger ones as adapters; the weights are needed about six times over in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from burnish.core.errors import ConfigError
from burnish.core.metrics import emit
from burnish.core.records import ModelShape
from burnish.core.runs import StageFolder
from burnish.core.table import About, Table
from burnish.forest.attention import Dense, Forest
from burnish.forest.pack import Batch, Micro
from burnish.maths.divergences import exact_kl
from burnish.maths.policy_gradient import Setting, objective_of
from burnish.maths.trust_region import fisher_vector_product, line_search, natural_step
from burnish.methods.online import drawing
from burnish.methods.policy_gradient import PolicyGradient
from burnish.methods.rounds import Rounds
from burnish.train.memory import Plan
from burnish.train.method import Material, Work
from burnish.train.optim import Optimiser

DENSE_TOKENS = 256  # of one product with the Fisher matrix: its attention is a square of them
ROWS = 1024  # label rows whose logits exist at once in the line search


@dataclass(frozen=True)
class Region:
    """The trust region: mean KL(old || new) of a label at most `max_kl`; how its step is found and shortened."""

    max_kl: float
    damping: float
    iterations: int
    backtracks: int
    shrink: float
    fisher_share: float

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("max_kl", self.max_kl > 0, "a number above 0"),
            ("damping", self.damping >= 0, "a number, 0 or more"),
            ("iterations", self.iterations >= 1, "a whole number, 1 or more"),
            ("backtracks", self.backtracks >= 1, "a whole number, 1 or more"),
            ("shrink", 0 < self.shrink < 1, "a number between 0 and 1"),
            ("fisher_share", 0 < self.fisher_share <= 1, "a number above 0, up to 1"),
        ):
            if not good:
                raise ConfigError(f"{getattr(self, name)} given, wanted {wanted}", where=f"method.{name}")


class TrustRegion(PolicyGradient):
    """Rollouts and advantages of the algebra, the surrogate - rho A, and a step of its own."""

    keeps_all = True  # the KL is over every state that was visited

    def __init__(self, setting: Setting, rounds: Rounds, region: Region, **online: Any) -> None:
        super().__init__(setting, rounds, **online)
        self.region = region

    def start(self, policy: Any, folder: StageFolder, poll: Callable[[], None]) -> None:
        if policy.dtype != torch.float32:
            message = f"its steps are measured to second order, and {policy.dtype} rounds them away"
            raise ConfigError(message, where="dtype", remedy="type dtype: float32")
        if policy.router is not None:
            message = "this model's loss has a router term, which is no part of the surrogate"
            raise ConfigError(message, where="method", remedy="switch output_router_logits off, or choose grpo")
        super().start(policy, folder, poll)

    def update(self, policy: Any, optimiser: Optimiser, work: Work, plan: Plan, rate: float) -> int | None:
        """The largest good part of `rate` times the natural step; the weights stay where none is good."""
        region = self.region
        policy.train(False)  # no adapter's dropout: old and new are compared
        ascent = -optimiser.gradient()
        products = Products(policy, list(optimiser.working.values()), thinned(work.batch, region.fisher_share), plan)
        with optimiser.dense_embedding(), differentiable_twice(policy):
            step = rate * natural_step(
                lambda v: products(v) + region.damping * v, ascent, max_kl=region.max_kl, iterations=region.iterations
            )
        measured = Measured(policy, self.setting, work, plan)
        base = optimiser.weights()

        def measure(fraction: float) -> tuple[float, float]:
            optimiser.place(base + fraction * step)
            return measured()

        found = line_search(
            measure, float(ascent @ step), max_kl=region.max_kl, backtracks=region.backtracks, shrink=region.shrink
        )
        if not found.fraction:
            optimiser.place(base)
        optimiser.refresh()
        work.facts |= emit(step_kl=found.kl, step_fraction=found.fraction, surrogate_gain=found.gain)
        return products.flops + measured.flops


def thinned(batch: Batch, share: float) -> Batch:
    """About this share of a batch's trees, evenly."""
    return Batch(batch.trees[:: max(1, min(len(batch.trees), round(1 / share)))])


@contextmanager
def differentiable_twice(policy: Any) -> Iterator[None]:
    """While open, the body is computed by operations that have second derivatives, and nothing of it is computed again."""
    checkpointing = policy.checkpointing
    policy.checkpoint("off")
    try:
        with sdpa_kernel(SDPBackend.MATH):  # padded rows; a forest takes the plan `Dense`
            yield
    finally:
        policy.checkpoint(checkpointing)


def token_kl(policy: Any, micro: Micro, weight: float) -> tuple[Tensor, int]:
    """(weight times the sum over the labels of KL(now || policy), twice differentiable; FLOPs of making it)."""
    plan = Dense(micro.stream.layout)
    hidden = policy.hidden(micro.stream, plan)
    view = micro.view.to(hidden.device)
    logprobs = distribution(policy, hidden[view.source], policy.head_weight(), policy.head_bias())
    kl = exact_kl(logprobs.detach(), logprobs)
    return weight * kl[view.index].sum(), plan.flops


def distribution(policy: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[n, v] log-probs of every token, from hidden rows and a head under the policy's map."""
    return policy.logit_map(torch.nn.functional.linear(hidden, weight, bias)).log_softmax(-1)


class Products:
    """v -> F v over a batch, by micro-batches; `flops` counts what was launched."""

    def __init__(self, policy: Any, parameters: list[Tensor], batch: Batch, plan: Plan) -> None:
        self.policy, self.parameters, self.flops = policy, parameters, 0
        self.micros = batch.split(min(plan.micro_tokens, DENSE_TOKENS), plan.head_rows)
        self.weight = 1 / batch.entries
        self._kept: Callable[[Tensor], Tensor] | None = None  # where there is one micro-batch, and its attention's FLOPs
        self._attention = 0

    def __call__(self, vector: Tensor) -> Tensor:
        total = torch.zeros_like(vector)
        for micro in self.micros:
            total += self._product(micro)(vector)
        return total

    def _product(self, micro: Micro) -> Callable[[Tensor], Tensor]:
        """One micro-batch's; the graph of the only one is kept, of several each is made again."""
        attention = 0

        def kl() -> Tensor:
            nonlocal attention
            found, attention = token_kl(self.policy, micro, self.weight)
            return found

        if self._kept is not None:
            self.flops += second_order_flops(self.policy.shape, micro, self._attention)[1]
            return self._kept
        product = fisher_vector_product(kl, self.parameters, damping=0.0)
        self.flops += sum(second_order_flops(self.policy.shape, micro, attention))
        if len(self.micros) == 1:
            self._kept, self._attention = product, attention
        return product


def second_order_flops(shape: ModelShape, micro: Micro, attention: int) -> tuple[int, int]:
    """(forward and first backward, second backward) of a micro-batch whose forward attention took so many FLOPs.

    A product of two differentiated factors is 1 forward, 2 backward and 6 twice backward; with one frozen 1, 1 and 2.
    """
    tokens, rows = len(micro.stream.tokens), len(micro.view.label)
    head = 2 * shape.vocabulary * shape.hidden * rows
    body = 2 * shape.body_parameters * tokens
    free = 2 * shape.adapter_parameters * tokens + attention + (head if shape.head_trained else 0)
    frozen = 0 if shape.head_trained else head
    if shape.trained == "adapter":
        frozen += body
    else:
        free += body
    return 3 * free + 2 * frozen, 6 * free + 2 * frozen


class Measured:
    """Gain of the surrogate and mean KL at the policy's present weights, both against those it was made at."""

    def __init__(self, policy: Any, setting: Setting, work: Work, plan: Plan) -> None:
        self.policy, self.setting, self.work, self.flops = policy, setting, work, 0
        self.micros = work.batch.split(plan.micro_tokens, plan.head_rows)
        bias = policy.head_bias()
        self.head = policy.head_weight().detach().clone(), None if bias is None else bias.detach().clone()
        self.hidden: list[Tensor] = []  # of each micro-batch's label rows, and the log-probs of its entries, as it was made
        self.old: list[Tensor] = []
        self.before = self._surrogate_and_kl(first=True)[0]

    def __call__(self) -> tuple[float, float]:
        surrogate, kl = self._surrogate_and_kl(first=False)
        return surrogate - self.before, kl

    @torch.no_grad()
    def _surrogate_and_kl(self, first: bool) -> tuple[float, float]:
        surrogate = divergence = 0.0
        shape, head = self.policy.shape, (self.policy.head_weight(), self.policy.head_bias())
        for i, micro in enumerate(self.micros):
            forest = Forest(micro.stream.layout)
            view = micro.view.to(self.policy.device)
            hidden = self.policy.hidden(micro.stream, forest)[view.source]
            uses = view.index.bincount(minlength=len(view.label)).to(hidden.dtype)
            of_rows: list[Tensor] = []
            for at in range(0, len(hidden), ROWS):
                rows = slice(at, at + ROWS)
                now = distribution(self.policy, hidden[rows], *head)
                of_rows.append(now.gather(1, view.label[rows, None])[:, 0])
                if not first:
                    divergence += float(exact_kl(distribution(self.policy, self.hidden[i][rows], *self.head), now) @ uses[rows])
            logprobs = torch.cat(of_rows)[view.index].cpu()
            if first:
                self.hidden.append(hidden)
                self.old.append(logprobs)
            columns = {name: column[micro.items] for name, column in self.work.columns.items()}
            # one step a round: the old policy is the one the step begins at
            columns.setdefault("old_logprobs", self.old[i])
            surrogate -= float(objective_of(self.setting, columns)(logprobs, slice(0, len(logprobs))))
            self.flops += 2 * (shape.body_parameters + shape.adapter_parameters) * len(micro.stream.tokens) + forest.flops
            self.flops += (1 if first else 2) * 2 * shape.vocabulary * shape.hidden * len(hidden)
        return surrogate, divergence / self.work.batch.entries


def trpo(
    material: Material, rewards: Any, rollouts: Any, *, max_kl: float = 0.01, damping: float = 0.1, iterations: int = 10,
    backtracks: int = 10, shrink: float = 0.5, fisher_share: float = 0.1, advantage: str = "group_standardised", weights: str = "token_mean",
) -> TrustRegion:  # fmt: skip
    """Trust region policy optimisation: the best surrogate within a ball of mean KL around the old policy.

    max E[rho A]  s.t.  E[KL(old || p)] <= delta;   F s = g by conjugate gradients,   x = sqrt(2 delta / s^T F s) s,
    then x, x/2, x/4 ... until the measured KL is at most delta and the gain a tenth of what was promised   (arXiv:1502.05477)
    delta = max_kl, `damping` times I is added to F, which is estimated on `fisher_share` of the prompts. train.learning_rate
    is the part of x that is tried first: 1 is the published method. Beside `grpo`: no clip, no Adam; the limit is measured.
    """
    region = Region(max_kl, damping, iterations, backtracks, shrink, fisher_share)
    length = rollouts.max_new_tokens if weights == "fixed_length" else None
    setting = Setting(advantage=advantage, ratio="token", surrogate="reinforce", weights=weights, length=length)
    rounds, online = drawing(material, rewards, rollouts)
    return TrustRegion(setting, rounds, region, old_logprobs=rollouts.old_logprobs, **online)


TRPO = Table("method", {"trpo": trpo}, about={"trpo": About(taxonomy=("P4",), paper="arXiv:1502.05477", year=2015)})
