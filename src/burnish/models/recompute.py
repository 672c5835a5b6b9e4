"""Activation checkpointing: a decoder layer keeps its input alone, and runs again when the backward reaches it.

(Chen et al. 2016, arXiv:1604.06174, with one segment a layer.) torch's own non-reentrant checkpoint is put around each
layer's forward for the length of one call, so that no flag of the model's is touched: transformers' switch wants train
mode, which would turn the model's dropout on. What a layer is given by keyword, the plan among it, is given again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from burnish.core.errors import MachineError

Checkpointing = Literal["off", "layers"]


def layers_of(body: nn.Module) -> list[nn.Module]:
    """The decoder layers: what transformers itself would checkpoint, outermost ones only. Raises MachineError: none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in body.modules():  # parents come before their children
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    if not found:
        raise MachineError(
            f"{type(body).__name__} has no layers that can be run again in the backward",
            where="train.checkpointing",
            remedy="type checkpointing: off",
        )
    return found


Forward = Callable[..., Any]


@contextmanager
def _wrapped(layers: Sequence[nn.Module], wrap: Callable[[int, Forward], Forward]) -> Iterator[None]:
    """Each layer's forward replaced by `wrap(its number, forward)`, and given back at the end."""
    before = [layer.__dict__.get("forward") for layer in layers]
    for i, layer in enumerate(layers):
        layer.forward = wrap(i, layer.forward)
    try:
        yield
    finally:
        for layer, own in zip(layers, before):
            if own is None:
                del layer.forward
            else:
                layer.forward = own


@contextmanager
def recomputed(layers: Sequence[nn.Module], *, keeps_rng: bool) -> Iterator[None]:
    """Within it, a call of one of `layers` keeps its inputs only. `keeps_rng`: its dropout draws the same mask again."""

    def wrap(_: int, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=keeps_rng)

        return run

    with _wrapped(layers, wrap):
        yield


class _Products(TorchDispatchMode):
    """FLOPs of the matrix products launched within it, by torch's own formulas; plans count attention themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None and "attention" not in str(func):
            self.flops += int(count(*args, **(kwargs or {}), out_val=out))
        return out


def recomputed_parameters(
    hidden: Callable[[], Tensor], layers: Sequence[nn.Module], trained: Sequence[nn.Parameter]
) -> int:
    """Parameters in the products that the backward runs again, per token.

    Counted, not derived: the last product of a layer is left out where nothing after it needs its result, and which one
    that is depends on the architecture. `hidden()` is the body's output of one token. Raises MachineError where a layer
    is not run exactly twice.
    """
    calls = [0] * len(layers)

    def counting(i: int, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls[i] += 1
            return forward(*args, **kwargs)

        return run

    def backward_flops() -> int:
        with torch.enable_grad(), _Products() as products:
            out = hidden()
            before = products.flops
            torch.autograd.grad(out.float().sum(), list(trained), allow_unused=True)
        return products.flops - before

    kept = backward_flops()
    with _wrapped(layers, counting), recomputed(layers, keeps_rng=True):
        again = backward_flops() - kept
    if set(calls) != {2} or again <= 0:
        raise MachineError(
            f"layers ran {sorted(set(calls))} times in a forward and a backward, wanted 2: checkpointing does not engage",
            where="train.checkpointing",
            remedy="type checkpointing: off, and please report the architecture",
        )
    return again // 2
