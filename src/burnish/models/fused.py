"""Norms and gates of transformers' modules as one pass over memory each, and low-rank adapters without a pass in fp32.

Written in torch's operations a root-mean-square norm is eight passes over its rows and some fifteen in the backward, and
such passes were half of a training step of Gemma-270M on two cores (docs/notebook.md). `fuse` gives a module that is
understood a class which computes the same by the kernels of `maths.kernels`; what a module computes is asked of it, with
random rows, and never read off its name. A backward that is itself differentiated uses torch's operations.

peft keeps A and B in fp32 beside a bf16 layer and computes with them in fp32: each of its layers casts its rows, keeps the cast for
the backward (q, k and v one each), and adds, scales and rounds in passes of their own. Here A and B are rounded to the layer's dtype, as
its own weight was, and both products go into the layer's result and into the gradient of its rows; A, B and what the optimiser does
with them stay in fp32.

Axes: n rows, h width, r rank.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.maths.kernels import Kernels, kernels_for


@dataclass(frozen=True)
class NormWay:
    """norm(x) = x / sqrt(mean(x^2) + epsilon) * (weight + offset). late: rounded before the weight is multiplied in."""

    epsilon: float
    offset: float
    late: bool

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """In torch's operations, differentiable."""
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.rms_norm(x.to(wide), x.shape[-1:], None, self.epsilon)
        if self.late:
            return y.to(x.dtype) * (weight + self.offset)
        return (y * (weight.to(wide) + self.offset)).to(x.dtype)


def _takes_one(module: Any) -> bool:
    """Whether its forward is of one tensor and nothing else."""
    return len(inspect.signature(module.forward).parameters) == 1


@torch.no_grad()
def way_of(module: Any) -> NormWay | None:
    """How a root-mean-square norm computes, asked of it with random rows; None for any other module."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not weight.is_floating_point() or not isinstance(epsilon, float):
        return None
    if len(list(module.parameters())) > 1 or any(True for _ in module.children()) or not _takes_one(module):
        return None
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    want = module(x)
    ways = [NormWay(epsilon, offset, late) for offset in (0.0, 1.0) for late in (False, True)]
    errors = [float((way(x, weight).double() - want.double()).norm() / want.double().norm()) for way in ways]
    error, place = min((error, i) for i, error in enumerate(errors))
    return ways[place] if error < (1e-5 if weight.dtype in (torch.float32, torch.float64) else 1e-2) else None


@torch.no_grad()
def gelu_of(act: Any) -> bool | None:
    """Whether an activation is gelu in its tanh form (True), silu (False), or neither."""
    x = torch.linspace(-6, 6, 64)
    y = act(x)
    for gelu, want in ((False, F.silu(x)), (True, F.gelu(x, approximate="tanh"))):
        if torch.allclose(y, want, atol=1e-6):
            return gelu
    return None


@torch.no_grad()
def _gates(module: Any) -> bool | None:
    """`gelu_of` of a feed-forward block that is down(act(gate(x)) * up(x)); None for any other module."""
    if set(dict(module.named_children())) - {"gate_proj", "up_proj", "down_proj", "act_fn"} or list(module.parameters(recurse=False)):
        return None
    gate, up, down = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    if not isinstance(gate, nn.Linear) or not isinstance(up, nn.Linear) or not isinstance(down, nn.Linear):
        return None
    if not callable(getattr(module, "act_fn", None)) or not _takes_one(module):
        return None
    gelu = gelu_of(module.act_fn)
    if gelu is None:
        return None
    x = torch.randn(2, gate.in_features, generator=torch.Generator().manual_seed(0)).to(gate.weight.device, gate.weight.dtype)
    return gelu if torch.equal(module(x), down(module.act_fn(gate(x)) * up(x))) else None


def _again(out: Tensor, given: tuple[Tensor, Tensor], dy: Tensor) -> list[Tensor | None]:
    """The gradients of torch's own graph, with a graph of theirs."""
    found = iter(torch.autograd.grad(out, [x for x in given if x.requires_grad], dy, create_graph=True))
    return [next(found) if x.requires_grad else None for x in given]


class _Norm(torch.autograd.Function):
    """x [..., h] and weight [h] -> norm(x)."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, weight, way, kernels = given
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        wide = weight.float() + way.offset
        out, rstd = kernels.norm(rows, wide, way.epsilon, way.late)
        ctx.save_for_backward(x, weight, rstd)
        ctx.rest = way, kernels
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, rstd = ctx.saved_tensors
        way, kernels = ctx.rest
        if torch.is_grad_enabled():  # the backward has a graph of its own
            return *_again(way(x, weight), (x, weight), dy), None, None
        width = x.shape[-1]
        dx, dweight = kernels.norm_backward(
            dy.reshape(-1, width).contiguous(), x.reshape(-1, width).contiguous(), weight.float() + way.offset, rstd, way.late, ctx.needs_input_grad[1]
        )
        return dx.view(x.shape), None if dweight is None else dweight.to(weight.dtype), None, None


class _Gate(torch.autograd.Function):
    """gate and up, of one shape -> act(gate) * up."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        gate, up, gelu, kernels = given
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.rest = gelu, kernels
        return kernels.gate(gate, up, gelu)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        gelu, kernels = ctx.rest
        if torch.is_grad_enabled():
            return *_again((F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up, (gate, up), dy), None, None
        return *kernels.gate_backward(dy.contiguous(), gate, up, gelu), None, None


def _adapted(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x W^T + bias + scale (x A^T) B^T in torch's operations, differentiable."""
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))


class _LowRank(torch.autograd.Function):
    """`_adapted` for a frozen weight: x [..., in], W [out, in], A [r, in], B [out, r] -> [..., out]."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, weight, bias, a, b, scale = given
        out = F.linear(x, weight, bias)
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.to(x.dtype).T
        out.view(-1, out.shape[-1]).addmm_(low, (scale * b).to(x.dtype).T)
        ctx.save_for_backward(x, weight, bias, a, b, low)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, a, b, low = ctx.saved_tensors
        if torch.is_grad_enabled():
            given = [t for t in (x, a, b) if t.requires_grad]
            found = iter(torch.autograd.grad(_adapted(x, weight, bias, a, b, ctx.scale), given, dy, create_graph=True))
            dx, da, db = (next(found) if t.requires_grad else None for t in (x, a, b))
            return dx, None, None, da, db, None
        rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        d_low = dy @ (ctx.scale * b).to(dy.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(d_low, a.to(dy.dtype)).view(x.shape)
        da = (d_low.T @ rows).to(a.dtype) if ctx.needs_input_grad[3] else None
        db = (ctx.scale * (dy.T @ low)).to(b.dtype) if ctx.needs_input_grad[4] else None
        return dx, None, None, da, db, None


def _usable(x: Tensor, *weights: Tensor) -> Kernels | None:
    kernels = kernels_for(x.dtype, x.device.type)
    return kernels if kernels is not None and all(w.dtype == x.dtype for w in weights) else None


@cache
def _norm_class(kind: Any, way: NormWay) -> type[nn.Module]:
    class Fused(kind):
        def forward(self, x: Tensor) -> Tensor:
            kernels = _usable(x, self.weight)
            return super().forward(x) if kernels is None else _Norm.apply(x, self.weight, way, kernels)  # type: ignore[return-value]

    return _as(kind, Fused)


@cache
def _gate_class(kind: Any, gelu: bool) -> type[nn.Module]:
    class Fused(kind):
        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.gate_proj(x), self.up_proj(x)
            kernels = _usable(gate, up)
            y = self.act_fn(gate) * up if kernels is None else _Gate.apply(gate, up, gelu, kernels)
            return self.down_proj(y)

    return _as(kind, Fused)


@cache
def _adapter_class(kind: Any) -> type[nn.Module]:
    class Fused(kind):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            names = [name for name in self.active_adapters if name in self.lora_A]
            base = self.base_layer
            if args or kwargs or len(names) != 1 or self.disable_adapters or self.merged or type(base) is not nn.Linear:
                return super().forward(x, *args, **kwargs)
            a, b, dropout = self.lora_A[names[0]], self.lora_B[names[0]], self.lora_dropout[names[0]]
            own = names[0] in self.lora_variant or self.fan_in_fan_out or b.bias is not None or not isinstance(dropout, nn.Identity)
            if own or base.weight.requires_grad or base.weight.dtype != x.dtype:
                return super().forward(x)
            return _LowRank.apply(x, base.weight, base.bias, a.weight, b.weight, self.scaling[names[0]])  # type: ignore[return-value]

    return _as(kind, Fused)


def fuse_adapters(model: nn.Module) -> int:
    """Give the low-rank adapters of linear layers their way above; -> how many. What has dropout, or a variant of its own, is peft's as before."""
    from peft.tuners.lora import Linear

    found: list[Any] = [module for module in model.modules() if type(module) is Linear]
    for module in found:
        module.__class__ = _adapter_class(Linear)
    return len(found)


def _as(kind: Any, made: Any) -> Any:
    """What is printed of a module stays what it was."""
    made.__name__, made.__qualname__, made.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return made


def fuse(body: nn.Module) -> tuple[int, int]:
    """Give the norms and gates of a body on the CPU, where there are kernels of its dtype, one pass each; -> how many of each.

    A module's class is replaced by one derived from it: parameters, names, copies and hooks stay as they were.
    """
    parameter = next(body.parameters())
    if kernels_for(parameter.dtype, parameter.device.type) is None:
        return 0, 0
    norms = gates = 0
    known: dict[Any, NormWay | None] = {}
    for module in body.modules():
        kind = type(module)
        if getattr(kind.forward, "__qualname__", "").startswith(("_norm_class", "_gate_class")):
            continue  # fused before
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 1:
            key = kind, len(weight), getattr(module, "variance_epsilon", getattr(module, "eps", None)), weight.dtype
            if key not in known:
                known[key] = way_of(module)
            way = known[key]
            if way is not None:
                module.__class__ = _norm_class(kind, way)
                norms += 1
        elif hasattr(module, "gate_proj") and (gelu := _gates(module)) is not None:
            module.__class__ = _gate_class(kind, gelu)
            gates += 1
    return norms, gates
