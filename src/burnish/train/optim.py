"""Fused AdamW over fp32 masters. The only place that steps an optimiser and bumps the policy's version.

Working weights in fp32 are their own masters. Working weights in bf16 have fp32 masters beside them, and every
micro-batch's gradient is added to the master's in fp32 as soon as it is complete (a hook), because 20 steps of 1e-3 from
1.0 round away entirely in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from burnish.core.errors import ConfigError, StorageError
from burnish.models.policy import Policy

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
        self.masters: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._sparse: list[torch.nn.Embedding] = []
        for name, parameter in self.working.items():
            if parameter.device.type == "cpu":
                # loaded weights lie in their file's pages, which the first write would copy one by one (six times as long)
                parameter.data = parameter.data.clone()
            if parameter.dtype in (torch.float32, torch.float64):
                master: Tensor = parameter
                parameter.grad = torch.zeros_like(parameter)
            else:
                master = parameter.detach().float()  # a copy: it is in half precision
                master.grad = torch.zeros_like(master)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(_into(master)))
            self.masters[name] = master
        self._share()

        def adamw(masters: Sequence[Tensor], rate: float) -> torch.optim.AdamW:
            matrices, vectors = [m for m in masters if m.ndim >= 2], [m for m in masters if m.ndim < 2]
            groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
            return torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=(adam_beta1, adam_beta2), eps=adam_epsilon, fused=True)

        self.optim = adamw([self.masters[n] for n in own], learning_rate)
        self.beside = adamw([self.masters[n] for n in other], beside.learning_rate) if beside else None
        self.beside_share = beside.learning_rate / learning_rate if beside and learning_rate else 0.0

    def _share(self) -> None:
        """Lend the gradient buffers of embedding and head to the policy, whose gradients are as large as the vocabulary.

        The head adds its own to the buffer, and the embedding's comes as the rows that were read: without this a step
        holds two or three more tensors of vocabulary times hidden.
        """
        self.policy.sinks = {p: _gradient(self.masters[name]) for name, p in self.working.items() if p.ndim == 2}
        embedding = self.policy.base.get_input_embeddings()
        plain = isinstance(embedding, torch.nn.Embedding) and embedding.max_norm is None and not embedding.scale_grad_by_freq
        if plain and embedding.weight in self.policy.sinks and not embedding.sparse:
            embedding.sparse = True
            self._sparse.append(embedding)

    def zero(self) -> None:
        """Clear gradients in place: a fresh buffer costs more in page faults than the zeroing itself."""
        with torch.no_grad():
            for master in self.masters.values():
                _gradient(master).zero_()

    def gradient_norm(self) -> Tensor:
        """The global 2-norm over the policy's masters' gradients; not finite where one of what is beside it is not."""
        norm = _norm(self.optim)
        return norm if self.beside is None else norm + 0.0 * _norm(self.beside)

    def step(self, rate: float, norm: Tensor, *, policy_moves: bool = True) -> None:
        """Clip by the given norm, step at learning rate `rate`, refresh the working copies, bump the version.

        With `policy_moves` False only what is beside the policy steps: weights, moments and version of the policy stay.
        """
        steps = [(self.optim, norm, rate)] if policy_moves else []
        if self.beside is not None:
            steps.append((self.beside, _norm(self.beside), rate * self.beside_share))
        for optim, length, at in steps:
            if self.clip_norm is not None:
                # the fused step divides by it as it reads the gradients: no pass over them of its own
                optim.grad_scale = ((length + 1e-6) / self.clip_norm).clamp(min=1.0).float()  # type: ignore[attr-defined]
            for group in optim.param_groups:
                group["lr"] = at
            optim.step()
        self.refresh(policy_moves)

    def refresh(self, policy_moves: bool = True) -> None:
        """Working copies from masters; the policy, if it moved, is a new version."""
        self._follow()
        self.policy.version += policy_moves

    def _follow(self) -> None:
        with torch.no_grad():
            for name, parameter in self.working.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])

    # ---- for a method that makes its own step

    def gradient(self) -> Tensor:
        """The masters' gradients, flat."""
        return torch.cat([_gradient(master).reshape(-1) for master in self.masters.values()])

    def weights(self) -> Tensor:
        """A copy of the masters, flat, in the order of `working`."""
        return torch.cat([master.detach().reshape(-1) for master in self.masters.values()])

    def place(self, flat: Tensor) -> None:
        """Set the weights, on trial: the version stays until `refresh`."""
        at = 0
        with torch.no_grad():
            for master in self.masters.values():
                master.copy_(flat[at : at + master.numel()].view_as(master))
                at += master.numel()
        self._follow()

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
        return sum(2 * m.numel() * m.element_size() for m in self.masters.values())

    def moments(self) -> list[Tensor]:
        """The moments that exist."""
        both = [self.optim] if self.beside is None else [self.optim, self.beside]
        return [x for optim in both for state in optim.state.values() for key, x in state.items() if key != "step"]

    def _state(self, name: str) -> Any:
        """The torch optimiser that steps a master by this name: its states by master."""
        return self.beside.state if self.beside is not None and name.startswith(BESIDE) else self.optim.state

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resume needs, by name: master/, exp_avg/, exp_avg_sq/, step/."""
        out: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            out[f"master/{name}"] = master.detach()
            for key, value in self._state(name).get(master, {}).items():
                out[f"{key}/{name}"] = value
        return out

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`. Raises StorageError when names or shapes do not fit."""
        wanted = {f"master/{n}" for n in self.masters}
        if missing := sorted(wanted - set(tensors)):
            raise StorageError(f"lacks {missing[0]} and {len(missing) - 1} more of {len(wanted)} tensors", where="checkpoint")
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[f"master/{name}"])
                state = {k: tensors[f"{k}/{name}"].to(master.device, copy=True) for k in ("exp_avg", "exp_avg_sq", "step") if f"{k}/{name}" in tensors}
                if state:
                    self._state(name)[master] = state
        self.refresh()

    def restart(self, weights: Mapping[str, Tensor]) -> None:
        """The policy begins again from these weights, by the names of `working`, without moments."""
        with torch.no_grad():
            for name, weight in weights.items():
                self.masters[name].copy_(weight)
        self.optim.state.clear()
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


def _into(master: Tensor) -> Any:
    def hook(parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is None:  # all of it went to the buffer already
            return
        if grad.is_sparse:
            _gradient(master).index_add_(0, grad._indices()[0], grad._values().float())
        else:
            _gradient(master).add_(grad)
        parameter.grad = None

    return hook


def _norm(optim: torch.optim.AdamW) -> Tensor:
    norms = torch._foreach_norm([m.grad for group in optim.param_groups for m in group["params"]])  # pyright: ignore[reportPrivateImportUsage]
    return torch.linalg.vector_norm(torch.stack([n.float() for n in norms]))


def _gradient(master: Tensor) -> Tensor:
    assert master.grad is not None
    return master.grad
