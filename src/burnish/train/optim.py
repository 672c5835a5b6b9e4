"""AdamW over fp32 masters. The only place that steps an optimiser and bumps the policy's version.

Working weights in fp32 are their own masters. Working weights in bf16 have fp32 masters, and every micro-batch's gradient is
added to the master's in fp32 as soon as it is complete (a hook), because 20 steps of 1e-3 from 1.0 round away entirely in
bf16. `masters.py` says how a master is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from burnish.core.errors import ConfigError, StorageError
from burnish.models.policy import Policy
from burnish.train.masters import PARTS, STATE, Master, Stepper, steppers

BESIDE = "beside/"  # before the names of what is trained beside the policy


@dataclass(frozen=True)
class Beside:
    """What is trained beside the policy at a learning rate of its own (on the same schedule), as a critic is."""

    parameters: Mapping[str, nn.Parameter]
    learning_rate: float


class Optimiser:
    """See module. Weight decay applies to matrices only, not to biases, norms or other vectors.

    What is trained `beside` the policy has the same Adam, and is clipped by its own norm: a large error of a critic does
    not shorten the policy's step.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        learning_rate: float,
        adam_beta1: float = 0.9,
        adam_beta2: float = 0.999,
        adam_epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        clip_norm: float | None = 1.0,
        beside: Beside | None = None,
    ) -> None:
        self.policy, self.clip_norm, self.learning_rate = policy, clip_norm, learning_rate
        own = policy.trainable()
        if not own:
            raise ConfigError("nothing to train: no parameter requires a gradient", where="train")
        other = {f"{BESIDE}{n}": p for n, p in beside.parameters.items()} if beside else {}
        self.working = own | other
        self.masters: dict[str, Master] = {}
        self._hooks: list[Any] = []
        self._sparse: list[torch.nn.Embedding] = []
        for name, parameter in self.working.items():
            if parameter.device.type == "cpu":
                # loaded weights lie in their file's pages, which the first write would copy one by one (six times as long)
                parameter.data = parameter.data.clone()
            master = self.masters[name] = Master.of(parameter)
            if master.tensor is not parameter:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(_into(master)))
        self._share()

        def made(names: Mapping[str, Any], rate: float) -> list[Stepper]:
            wanted = [self.masters[n] for n in names]
            return steppers(wanted, rate=rate, betas=(adam_beta1, adam_beta2), epsilon=adam_epsilon, decay=weight_decay)

        self.own, self.other = made(own, learning_rate), made(other, beside.learning_rate if beside else 0.0)
        self.beside_share = beside.learning_rate / learning_rate if beside and learning_rate else 0.0

    def _share(self) -> None:
        """Lend the gradient buffers of embedding and head to the policy, whose gradients are as large as the vocabulary.

        The head adds its own to the buffer, and the embedding's comes as the rows that were read: without this a step
        holds two or three more tensors of vocabulary times hidden.
        """
        self.policy.sinks = {p: self.masters[name].gradient for name, p in self.working.items() if p.ndim == 2}
        embedding = self.policy.base.get_input_embeddings()
        plain = isinstance(embedding, torch.nn.Embedding) and embedding.max_norm is None and not embedding.scale_grad_by_freq
        if plain and embedding.weight in self.policy.sinks and not embedding.sparse:
            embedding.sparse = True
            self._sparse.append(embedding)

    def zero(self) -> None:
        """Clear gradients in place: a fresh buffer costs more in page faults than the zeroing itself."""
        with torch.no_grad():
            for master in self.masters.values():
                master.gradient.zero_()

    def _norm(self, *, beside: bool) -> Tensor:
        gradients = [master.gradient for name, master in self.masters.items() if name.startswith(BESIDE) == beside]
        norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
        return torch.linalg.vector_norm(torch.stack([n.float() for n in norms]))

    def gradient_norm(self) -> Tensor:
        """The global 2-norm over the policy's masters' gradients; not finite where one of what is beside it is not."""
        norm = self._norm(beside=False)
        return norm + 0.0 * self._norm(beside=True) if self.other else norm

    def step(self, rate: float, norm: Tensor, *, policy_moves: bool = True) -> None:
        """Clip by the given norm, step at learning rate `rate`, refresh the working copies, bump the version.

        With `policy_moves` False only what is beside the policy steps: weights, moments and version of the policy stay.
        """
        steps = [(self.own, norm, rate)] if policy_moves else []
        if self.other:
            steps.append((self.other, self._norm(beside=True), rate * self.beside_share))
        for each, length, at in steps:
            # the step divides by it as it reads the gradients: no pass over them of its own
            divide = None if self.clip_norm is None else ((length + 1e-6) / self.clip_norm).clamp(min=1.0).float()
            for stepper in each:
                stepper.step(at, divide)
        self.refresh(policy_moves)

    def refresh(self, policy_moves: bool = True) -> None:
        """Working copies from masters; the policy, if it moved, is a new version."""
        for master in self.masters.values():
            master.follow()
        self.policy.version += policy_moves

    # ---- for a method that makes its own step

    def gradient(self) -> Tensor:
        """The masters' gradients, flat."""
        return torch.cat([master.gradient.reshape(-1) for master in self.masters.values()])

    def weights(self) -> Tensor:
        """A copy of the masters, flat, in the order of `working`."""
        return torch.cat([master.read().reshape(-1) for master in self.masters.values()])

    def place(self, flat: Tensor) -> None:
        """Set the weights, on trial: the version stays until `refresh`."""
        at = 0
        for master in self.masters.values():
            count = master.working.numel()
            master.write(flat[at : at + count].view_as(master.working))
            at += count

    @contextmanager
    def dense_embedding(self) -> Iterator[None]:
        """While open, an embedding's gradient comes whole: rows alone cannot be differentiated again."""
        for embedding in self._sparse:
            embedding.sparse = False
        try:
            yield
        finally:
            for embedding in self._sparse:
                embedding.sparse = True

    @property
    def moments_bytes(self) -> int:
        """What the two moments take once the first step has made them."""
        return sum(2 * m.gradient.numel() * m.gradient.element_size() for m in self.masters.values())

    def moments(self) -> list[Tensor]:
        """The moments that exist."""
        return [x for stepper in (*self.own, *self.other) for x in stepper.moments()]

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resume needs, by name: master/ (or its parts: high/, low/), exp_avg/, exp_avg_sq/, step/."""
        return {f"{key}/{name}": x for name, master in self.masters.items() for key, x in (master.parts() | master.state()).items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`. Raises StorageError when names or shapes do not fit."""
        there = {name: {k: tensors[f"{k}/{name}"] for k in (*PARTS, *STATE) if f"{k}/{name}" in tensors} for name in self.masters}
        shapes = {name: Master.shape_in(found) for name, found in there.items()}
        if missing := sorted(name for name, shape in shapes.items() if shape is None):
            raise StorageError(f"lacks master/{missing[0]} and {len(missing) - 1} more of {len(there)} tensors", where="checkpoint")
        for name, master in self.masters.items():
            found, want = there[name], list(master.working.shape)
            moments = [k for k in STATE if k in found]
            if moments and len(moments) < len(STATE):
                raise StorageError(f"lacks {STATE[0]}, {STATE[1]} or step of {name}", where="checkpoint")
            for key, shape in (("master", shapes[name]), *((k, found[k].shape) for k in moments if k != "step")):
                if list(shape or ()) != want:
                    raise StorageError(f"{key}/{name} is {list(shape or ())}, wanted {want}", where="checkpoint")
        for name, master in self.masters.items():
            master.write(Master.joined(there[name]))
            state = {k: x for k, x in there[name].items() if k in STATE}
            if state:
                master.state().update({k: x.to(master.working.device, copy=True) for k, x in state.items()})
        self.refresh()

    def restart(self, weights: Mapping[str, Tensor]) -> None:
        """The policy begins again from these weights, by the names of `working`, without moments."""
        for name, weight in weights.items():
            self.masters[name].write(weight)
        for stepper in self.own:
            stepper.forget()
        self.refresh()

    def close(self) -> None:
        """Take the hooks off the policy and release gradients."""
        for hook in self._hooks:
            hook.remove()
        self.policy.sinks = {}
        for embedding in self._sparse:
            embedding.sparse = False
        for parameter in self.working.values():
            parameter.grad = None


def _into(master: Master) -> Any:
    def hook(parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is None:  # all of it went to the buffer already
            return
        if grad.is_sparse:
            master.gradient.index_add_(0, grad._indices()[0], grad._values().float())
        else:
            master.gradient.add_(grad)
        parameter.grad = None

    return hook
