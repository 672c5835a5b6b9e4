"""The elementwise pass over a tile of logits on CUDA: one Triton kernel, a program a row.

    y = map(z),  top = max y,  mass = sum exp(y - top),  z <- exp(y - top) (times d y / d z where that varies)

A row is read once for `top` and `mass` together (each lane keeps a running maximum and the sum relative to it, and the
lanes are reduced at the end) and once more to be overwritten: 2 reads and 1 write of z, where separate operations take
about 10. Everything between load and store is float32.

Not yet run on a GPU: the kernel is tested under Triton's interpreter where Triton is installed. Where it is not, the
same by torch's own operations. Imported by whoever holds a CUDA tensor, and by nobody else.
"""

# pyright: reportUnknownMemberType=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUntypedFunctionDecorator=false
# pyright: reportInvalidTypeForm=false
# (Triton is there only with a CUDA build of torch, and its language is not Python's)

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.maths.head import LogitMap

if TYPE_CHECKING:
    from jaxtyping import Float

try:
    triton: Any = import_module("triton")
    tl: Any = import_module("triton.language")
except ImportError:  # a CPU build
    triton: Any = None
    tl: Any = None

BLOCK = 8192  # numbers of a row in registers at once, over 16 warps: 16 a thread
EAGER = 2**26  # numbers of a tile at once where Triton is missing


def overwrite_exp(z: Float[Tensor, "n v"], logit_map: LogitMap, keep: bool) -> tuple[Tensor, Tensor]:
    """(top [n, 1], mass [n, 1]) in float32; with `keep` z holds exp(map(z) - top), times the map's slope where it varies.

    z in bfloat16 or float32, its rows contiguous. Without `keep` what z holds afterwards is of no use.
    """
    if triton is None:
        return _eager(z, logit_map, keep)
    top = torch.empty(len(z), 1, dtype=torch.float32, device=z.device)
    mass = torch.empty_like(top)
    if len(z):
        cap = logit_map.softcap
        with torch.cuda.device_of(z):
            _row[(len(z),)](
                z,
                top,
                mass,
                z.stride(0),
                logit_map.scale if cap is None else logit_map.scale / cap,
                (1.0 if cap is None else cap) / logit_map.temperature,
                logit_map.scale / logit_map.temperature,
                VOCABULARY=z.shape[1],
                KEEP=keep,
                CAPPED=cap is not None,
                BLOCK=min(BLOCK, triton.next_power_of_2(z.shape[1])),
                num_warps=16,
            )
    return top, mass


def _eager(z: Tensor, logit_map: LogitMap, keep: bool) -> tuple[Tensor, Tensor]:
    top = torch.empty(len(z), 1, dtype=torch.float32, device=z.device)
    mass = torch.empty_like(top)
    lines = max(1, EAGER // max(1, z.shape[1]))
    for start in range(0, len(z), lines):
        here = slice(start, start + lines)
        block = z[here]
        top[here] = logit_map(block.amax(1, keepdim=True).float())
        y = logit_map.overwrite(block.float())  # float32 is mapped in place
        slope = logit_map.slope(y) if keep else 1.0
        mass[here] = y.sub_(top[here]).exp_().sum(1, keepdim=True)
        if isinstance(slope, Tensor):
            y.mul_(slope)
        if keep and y is not block:
            block.copy_(y)
    return top, mass


if triton is not None:

    @triton.jit
    def _mapped(z, inner, outer, CAPPED: tl.constexpr):
        """map(z), and tanh of what is capped: outer * tanh(inner * z), or outer * inner * z."""
        x = z * inner
        if CAPPED:
            t = tl.exp(-2 * tl.abs(x))
            x = tl.where(x < 0, -1.0, 1.0) * (1 - t) / (1 + t)
        return x * outer, x

    @triton.jit
    def _row(
        z_at, top_at, mass_at, stride, inner, outer, steep,
        VOCABULARY: tl.constexpr, KEEP: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        z_at += row * stride
        lane = tl.arange(0, BLOCK)
        most = tl.full([BLOCK], -3.0e38, tl.float32)  # finite: a lane without a number must not become inf - inf
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, VOCABULARY, BLOCK):
            there = start + lane < VOCABULARY
            z = tl.load(z_at + start + lane, mask=there, other=0.0).to(tl.float32)
            y, _ = _mapped(z, inner, outer, CAPPED)
            y = tl.where(there, y, float("-inf"))
            more = tl.maximum(most, y)
            total = total * tl.exp(most - more) + tl.exp(y - more)
            most = more
        top = tl.max(most, 0)
        mass = tl.sum(total * tl.exp(most - top), 0)
        tl.store(top_at + row, top)
        tl.store(mass_at + row, mass)
        if KEEP:
            for start in range(0, VOCABULARY, BLOCK):
                there = start + lane < VOCABULARY
                z = tl.load(z_at + start + lane, mask=there, other=0.0).to(tl.float32)
                y, t = _mapped(z, inner, outer, CAPPED)
                e = tl.exp(y - top)
                if CAPPED:
                    e *= (1 - t * t) * steep
                tl.store(z_at + start + lane, e.to(z_at.dtype.element_ty), mask=there)
