"""The elementwise pass over a tile of logits on CUDA: one Triton kernel, a program a row.

    y = softcap(scale z) / temperature,  top = max y,  mass = sum exp(y - top),  z <- exp(y - top) (dy/dz where it varies)

A row is read once for `top` and `mass` together (each lane keeps a running maximum and the sum relative to it, and the
lanes are reduced at the end) and once more to be overwritten: 2 reads and 1 write of z, where torch's own operations
take about 10. Everything between load and store is float32.

`maths.head` uses it for CUDA tensors where Triton is there and the kernel agrees with torch at first use. Not yet run on a
GPU: the kernel is tested under Triton's interpreter, and compiles for sm_90. Imported by whoever holds a CUDA tensor, and
by nobody else.
"""

# pyright: reportUnknownMemberType=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUntypedFunctionDecorator=false
# pyright: reportInvalidTypeForm=false
# (Triton is there only with a CUDA build of torch, and its language is not Python's)

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

try:
    triton: Any = import_module("triton")
    tl: Any = import_module("triton.language")
except ImportError:  # a CPU build
    triton: Any = None
    tl: Any = None

BLOCK = 8192  # numbers of a row in registers at once, over 16 warps: 16 a thread


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """None where the kernel serves logits of this dtype on this device and agrees with torch there, else the reason."""
    if triton is None:
        return "Triton is not installed"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the kernel takes float32 or bfloat16, not {dtype}"
    return _disagreement(dtype, str(device))


def overwrite_exp(
    z: Float[Tensor, "n v"], scale: float, softcap: float | None, temperature: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """(top [n, 1], mass [n, 1]) in float32; with `keep` z holds exp(y - top), times dy/dz where that varies.

    z in bfloat16 or float32, the numbers of a row side by side. Without `keep` z is left as it was.
    """
    top = torch.empty(len(z), 1, dtype=torch.float32, device=z.device)
    mass = torch.empty_like(top)
    if len(z):
        block = min(BLOCK, triton.next_power_of_2(z.shape[1]))
        with torch.cuda.device_of(z):  # Triton launches on the current device
            _row[(len(z),)](
                z,
                top,
                mass,
                z.stride(0),
                scale if softcap is None else scale / softcap,
                (1.0 if softcap is None else softcap) / temperature,
                scale / temperature,
                VOCABULARY=z.shape[1],
                KEEP=keep,
                CAPPED=softcap is not None,
                BLOCK=block,
                num_warps=min(16, max(1, block // 512)),
            )
    return top, mass


@cache
def _disagreement(dtype: torch.dtype, device: str) -> str | None:
    """Asked once: a Triton that cannot compile here, or compiles something else, costs speed and not correctness."""
    generator = torch.Generator().manual_seed(0)
    given = (4 * torch.randn(5, 3 * BLOCK // 2, generator=generator)).to(dtype)
    for cap in (None, 3.0):
        z = given.to(device, copy=True)
        x = 0.5 * z.float()
        y = (x if cap is None else cap * torch.tanh(x / cap)) / 0.7
        try:
            top, mass = overwrite_exp(z, 0.5, cap, 0.7, True)
        except Exception as error:  # of the compiler, the driver or the launch: each has its own
            return f"the kernel does not run: {(str(error).splitlines() or [type(error).__name__])[0]}"
        want = y.amax(1, True)
        e = (y - want).exp()
        kept = e if cap is None else e * (1 - (y * 0.7 / cap) ** 2) * (0.5 / 0.7)
        limit = torch.finfo(dtype).eps + 1e-5
        if not (
            torch.allclose(top, want, atol=1e-5)
            and torch.allclose(mass, e.sum(1, True), rtol=1e-4)
            and torch.allclose(z.float(), kept, rtol=limit, atol=1e-5)
        ):
            return "the kernel disagrees with torch"
    return None


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
