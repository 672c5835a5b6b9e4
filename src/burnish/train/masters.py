"""The fp32 master of a trained weight, its gradient, and the AdamW that steps it (arXiv:1711.05101, algorithm 2).

A master is one of three things: the working weight itself, where that is fp32; a tensor beside it; or, for a bf16 weight on a
CPU with our kernels, the working weight and the 16 bits that rounding took from it, which together are the same fp32 number
(`maths.kernels.halves`). The last takes 2 bytes a weight in place of 4, and a step that reads and writes the working weight needs no pass to
refresh it (docs/decisions/0006).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from burnish.maths.kernels import Kernels, halves, kernels_for, whole

PARTS = ("master", "high", "low")  # of a master in a checkpoint
STATE = ("exp_avg", "exp_avg_sq", "step")


@dataclass(eq=False)
class Master:
    """See module. `tensor` (the working weight or beside it) or `rest`, whichever there is; the gradient is fp32 (fp64 for an fp64 weight)."""

    working: nn.Parameter
    gradient: Tensor
    tensor: Tensor | None = None
    rest: Tensor | None = None
    states: Any = field(default_factory=lambda: defaultdict[Any, dict[str, Tensor]](dict))  # a stepper's, by what it steps

    @staticmethod
    def of(parameter: nn.Parameter) -> Master:
        if parameter.dtype in (torch.float32, torch.float64):
            parameter.grad = torch.zeros_like(parameter)
            return Master(parameter, parameter.grad, tensor=parameter)
        gradient = torch.zeros_like(parameter, dtype=torch.float32)
        if parameter.dtype == torch.bfloat16 and parameter.is_contiguous() and kernels_for(parameter.dtype, parameter.device.type) is not None:
            return Master(parameter, gradient, rest=torch.zeros_like(parameter, dtype=torch.int16))
        tensor = parameter.detach().float()  # a copy: it is in half precision
        tensor.grad = gradient
        return Master(parameter, gradient, tensor=tensor)

    def state(self) -> dict[str, Tensor]:
        """exp_avg, exp_avg_sq and step, once there was one."""
        return self.states[self if self.tensor is None else self.tensor]

    def read(self) -> Tensor:
        """The master's numbers; its own memory where it has some."""
        return whole(self.working.detach(), self.rest) if self.rest is not None else self.tensor.detach()  # type: ignore[union-attr]

    def parts(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it, without a copy: the master, or the two parts of one."""
        return {"high": self.working.detach(), "low": self.rest} if self.rest is not None else {"master": self.read()}

    @staticmethod
    def shape_in(parts: Mapping[str, Tensor]) -> torch.Size | None:
        """Of the numbers that `parts` of either kind stand for; None where they are not all there."""
        if "master" in parts:
            return parts["master"].shape
        return parts["low"].shape if "low" in parts and "high" in parts else None

    @staticmethod
    def joined(parts: Mapping[str, Tensor]) -> Tensor:
        """The numbers that `parts` of either kind stand for."""
        return parts["master"] if "master" in parts else whole(parts["high"], parts["low"])

    def write(self, numbers: Tensor) -> None:
        """Set master and working weight."""
        with torch.no_grad():
            if self.rest is not None:
                high, low = halves(numbers.to(self.working.device, torch.float32))
                self.working.copy_(high.view_as(self.working))
                self.rest.copy_(low.view_as(self.rest))
            else:
                self.tensor.copy_(numbers)  # type: ignore[union-attr]
                self.follow()

    def follow(self) -> None:
        """The working weight from the master, where it is a copy."""
        if self.tensor is not None and self.tensor is not self.working:
            with torch.no_grad():
                self.working.copy_(self.tensor)

    def beside(self) -> Tensor | None:
        """What is held beside the working weight."""
        return self.rest if self.rest is not None else None if self.tensor is self.working else self.tensor


class Stepper(Protocol):
    """AdamW over some masters. Weight decay applies to matrices only, not to biases, norms or other vectors."""

    def step(self, rate: float, divide: Tensor | None) -> None:
        """One step, the gradients divided by `divide` (a scalar)."""
        ...

    def moments(self) -> list[Tensor]: ...

    def forget(self) -> None:
        """No moments: the next step is the first."""
        ...


def steppers(masters: Sequence[Master], *, rate: float, betas: tuple[float, float], epsilon: float, decay: float) -> list[Stepper]:
    """Each master by the one that can."""
    found: list[Stepper] = []
    if tensors := [m for m in masters if m.tensor is not None]:
        found.append(_Torch(tensors, rate, betas, epsilon, decay))
    if split := [m for m in masters if m.tensor is None]:
        kernels = kernels_for(torch.bfloat16)
        assert kernels is not None
        found.append(_Split(split, betas, epsilon, decay, kernels))
    return found


class _Torch:
    """torch's fused AdamW."""

    def __init__(self, masters: Sequence[Master], rate: float, betas: tuple[float, float], epsilon: float, decay: float) -> None:
        every = [m.tensor for m in masters if m.tensor is not None]
        groups = [
            {"params": [x for x in every if x.ndim >= 2], "weight_decay": decay},
            {"params": [x for x in every if x.ndim < 2], "weight_decay": 0.0},
        ]
        self.optim = torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=betas, eps=epsilon, fused=True)
        for master in masters:
            master.states = self.optim.state

    def step(self, rate: float, divide: Tensor | None) -> None:
        if divide is not None:
            self.optim.grad_scale = divide  # type: ignore[attr-defined]
        for group in self.optim.param_groups:
            group["lr"] = rate
        self.optim.step()

    def moments(self) -> list[Tensor]:
        return [x for state in self.optim.state.values() for key, x in state.items() if key != "step"]

    def forget(self) -> None:
        self.optim.state.clear()


class _Split:
    """Our kernel, which steps both parts of a master in one pass."""

    def __init__(self, masters: Sequence[Master], betas: tuple[float, float], epsilon: float, decay: float, kernels: Kernels) -> None:
        self.masters, self.betas, self.epsilon, self.decay, self.kernels = masters, betas, epsilon, decay, kernels

    def step(self, rate: float, divide: Tensor | None) -> None:
        by = 1.0 if divide is None else float(divide)
        for master in self.masters:
            state = master.state()
            if not state:
                state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(master.gradient), "exp_avg_sq": torch.zeros_like(master.gradient)}
            state["step"] += 1
            assert master.rest is not None
            self.kernels.adamw(
                master.working, master.rest, master.gradient, state["exp_avg"], state["exp_avg_sq"], step=int(state["step"]), rate=rate,
                betas=self.betas, epsilon=self.epsilon, decay=self.decay if master.working.ndim >= 2 else 0.0, divide=by,
            )  # fmt: skip

    def moments(self) -> list[Tensor]:
        return [x for master in self.masters for key, x in master.state().items() if key != "step"]

    def forget(self) -> None:
        for master in self.masters:
            master.states.clear()
