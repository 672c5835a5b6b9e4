"""Attention of some rows against some keys, with the log-sum-exp that lets blocks be merged, and its backward.

    s = cap(scale q k^T),   lse_i = log sum_j exp(s_ij),   out_i = sum_j exp(s_ij - lse_i) v_j
    merge:  L = log(exp(lse) + exp(l)),   out = exp(lse - L) out + exp(l - L) o

The backward of a block takes the *merged* out and L of its rows. That is exact, because P_ij = exp(s_ij - L_i) and
delta_i = <dout_i, out_i> belong to the whole row and not to a block. Two kernels compute a block: the stock CPU flash
kernel where it can, else three matrix products, on any device.

Legend: H query heads, Hk key-value heads; D width of a key, Dv of a value; m rows and n keys of a block, B blocks of
one shape; "wide" is float32, or the inputs' dtype where that is wider.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (torch ships partial stubs)

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch
from torch import Tensor

# Below this many keys the stock half-precision backward is slower than converting its inputs to float32 (4x at 40 keys,
# 1x near 300, Zen 5), and gradients that were accumulated in float32 are better ones.
_UPCAST_KEYS = 300
# Scores the three-product path forms at once, over all heads.
_SCORES = 1 << 24


@dataclass(frozen=True, eq=False)
class Band:
    """Row t of m sees key j of n where t + n - m - window < j <= t + n - m. No row is without a key.

    `additive` keeps the zeros and -inf that the stock kernel wants, in the dtype of its queries: it takes no booleans.
    """

    seen: Tensor
    _additive: dict[torch.dtype, Tensor] = field(default_factory=dict[torch.dtype, Tensor])

    @staticmethod
    def of(rows: int, keys: int, window: int, device: torch.device) -> Band:
        behind = torch.arange(keys - rows, keys, device=device)[:, None] - torch.arange(keys, device=device)
        return Band((behind >= 0) & (behind < window))

    def additive(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._additive:
            zeros = torch.zeros(self.seen.shape, dtype=dtype, device=self.seen.device)
            self._additive[dtype] = zeros.masked_fill_(~self.seen, -torch.inf)[None, None]
        return self._additive[dtype]


Mask = Literal["causal"] | Band | Tensor | None


def attend_block(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Literal["causal"] | None, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """One block of attention and the log-sum-exp that lets it be merged with others. No gradient.

    q [B,H,m,D], k [B,Hk,n,D], v [B,Hk,n,Dv] -> out [B,H,m,Dv] wide, lse [B,H,m] wide. mask: True where seen, [m,n] or
    broadcastable to [B,1,m,n]; a row that sees nothing gets out = 0 and lse = -inf, which `merge` ignores.
    "causal" needs m = n.
    """
    # under a free mask the stock kernel gives a row without keys lse = 0, as if it had seen something
    kernel = PRODUCTS if isinstance(mask, Tensor) else kernel_for(q, v, softcap)
    with torch.no_grad():
        out, lse = kernel.forward(q, k, v, mask, scale, softcap)
        return out.to(lse.dtype), lse


def merge(out: Tensor, lse: Tensor, o: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:
    """Take the block (o, l) into (out, lse), in place, and return them: rows by index need the assignment.

    out, o [..., m, Dv]; lse, l [..., m], all wide or convertible to out's dtype.
    """
    total = torch.logaddexp(lse, l)
    # a row that no block has reached yet stays out = 0, lse = -inf instead of turning into exp(-inf - -inf)
    finite = total.clamp_min(torch.finfo(total.dtype).min)
    out.mul_((lse - finite).exp_()[..., None]).addcmul_(o.to(out.dtype), (l - finite).exp_()[..., None])
    return out, lse.copy_(total)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Kernel:
    """How blocks are computed.

    forward(q, k, v, mask, scale, softcap) -> out, lse
    backward(dout, q, k, v, out, lse, mask, scale, softcap) -> dq, dk, dv        out and lse of the whole row
    causal_pairs(rows, heads) -> (query, key) pairs launched
    """

    forward: Callable[[Tensor, Tensor, Tensor, Mask, float, float | None], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    causal_pairs: Callable[[int, int], int]


def kernel_for(q: Tensor, v: Tensor, softcap: float | None) -> Kernel:
    """The stock kernel where it can: without softcap, with one width for keys and values; on CUDA in half precision."""
    if q.device.type == "cuda":
        from burnish.forest import cuda  # it is built from this module

        return cuda.BLOCKS if cuda.applies(q, v, softcap) else PRODUCTS
    if softcap is None and q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and _stock_works(q.dtype):
        return _STOCK
    return PRODUCTS


def _stock_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    bias = mask.additive(q.dtype) if isinstance(mask, Band) else None
    return kernel(q, k, v, 0.0, mask == "causal", attn_mask=bias, scale=scale)


def _stock_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    if k.shape[2] < _UPCAST_KEYS and q.dtype != lse.dtype:
        dout, q, k, v, out = (x.to(lse.dtype) for x in (dout, q, k, v, out))
    bias = mask.additive(q.dtype) if isinstance(mask, Band) else None
    return kernel(dout, q, k, v, out, lse, 0.0, mask == "causal", attn_mask=bias, scale=scale)


def _row_chunks(rows: int, keys: int, heads: int, causal: bool) -> Iterator[tuple[int, int, int]]:
    """(first row, end row, end key) of each piece of a block that is formed at once on the three-product path."""
    step = max(64, _SCORES // (keys * heads))
    if causal:
        step = min(step, 256)
    for a in range(0, rows, step):
        b = min(a + step, rows)
        yield a, b, b if causal else keys


def _scores(
    q: Tensor, k: Tensor, mask: Mask, rows: slice, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Scores of one piece, wide [B,Hk,G,m,n], -inf where hidden, and the softcap's slope.

    The query heads of one key-value head are more rows against one copy of its keys, which are never expanded.
    """
    groups = q.shape[1] // k.shape[1]
    packed = q.unflatten(1, (-1, groups)).flatten(2, 3)
    s = (packed @ k.transpose(-1, -2)).unflatten(2, (groups, -1)).to(wide_dtype(q.dtype)) * scale
    slope = None
    if softcap is not None:
        t = torch.tanh(s / softcap)
        s, slope = t * softcap, 1 - t * t
    if mask is None:
        return s, slope
    if isinstance(mask, str):
        at = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        return s.masked_fill_(torch.arange(k.shape[2], device=q.device) > at, -torch.inf), slope
    seen = mask.seen if isinstance(mask, Band) else mask
    if seen.shape[-2] > 1:
        seen = seen[..., rows, :]
    return s.masked_fill_(~(seen if seen.dim() == 2 else seen[:, :, None]), -torch.inf), slope


def _product_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for a, b, end in _row_chunks(q.shape[2], k.shape[2], q.shape[0] * q.shape[1], mask == "causal"):
        s, _ = _scores(q[:, :, a:b], k[:, :, :end], mask, slice(a, b), scale, softcap)
        lse = s.logsumexp(-1)
        p = (s - lse.clamp_min(torch.finfo(lse.dtype).min)[..., None]).exp_()
        out = p.to(v.dtype).flatten(2, 3) @ v[:, :, :end]
        outs.append(out.unflatten(2, (p.shape[2], -1)).flatten(1, 2))
        lses.append(lse.flatten(1, 2))
    return torch.cat(outs, 2).to(lses[0].dtype), torch.cat(lses, 2)


def _product_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide, groups = lse.dtype, q.shape[1] // k.shape[1]
    dqs: list[Tensor] = []
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))

    def packed(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, groups)).flatten(2, 3)

    for a, b, end in _row_chunks(q.shape[2], k.shape[2], q.shape[0] * q.shape[1], mask == "causal"):
        qx, ox, gx = q[:, :, a:b], out[:, :, a:b], dout[:, :, a:b]
        s, slope = _scores(qx, k[:, :, :end], mask, slice(a, b), scale, softcap)
        p = (s - lse[:, :, a:b].unflatten(1, (-1, groups))[..., None]).exp_().flatten(2, 3)
        delta = packed((gx.to(wide) * ox.to(wide)).sum(-1, keepdim=True))
        ds = (packed(gx) @ v[:, :, :end].transpose(-1, -2)).to(wide).sub_(delta).mul_(p).mul_(scale)
        if slope is not None:
            ds = ds * slope.flatten(2, 3)
        ds, p = ds.to(q.dtype), p.to(dout.dtype)
        dqs.append((ds @ k[:, :, :end]).unflatten(2, (groups, -1)).flatten(1, 2))
        dk[:, :, :end] += ds.transpose(-1, -2) @ packed(qx)
        dv[:, :, :end] += p.transpose(-1, -2) @ packed(gx)
    return torch.cat(dqs, 2), dk, dv


@cache
def _stock_works(dtype: torch.dtype) -> bool:
    """Whether this build has the CPU kernel and it agrees with three products on a small grouped-query problem.

    The op is private: a torch that drops it or changes its arguments costs speed and not correctness.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, h, 5, 8, generator=generator).to(dtype) for h in (4, 2, 2, 4))
    close = 64 * torch.finfo(dtype).eps
    with torch.no_grad():
        for mask in ("causal", None, Band.of(5, 5, 2, q.device)):
            out, lse = _product_forward(q, k, v, mask, 0.4, None)
            saved = dout, q, k, v, out.to(dtype), lse, mask, 0.4, None
            want = out, lse, *_product_backward(*saved)
            try:
                got = *_stock_forward(q, k, v, mask, 0.4, None), *_stock_backward(*saved)
            except (AttributeError, RuntimeError, TypeError):
                return False
            if any((x.to(y.dtype) - y).abs().max() > close * (1 + y.abs().max()) for x, y in zip(got, want)):
                return False
    return True


_STOCK = Kernel(_stock_forward, _stock_backward, lambda rows, heads: rows * (rows + 1) // 2)
PRODUCTS = Kernel(
    _product_forward,
    _product_backward,
    lambda rows, heads: sum((b - a) * end for a, b, end in _row_chunks(rows, rows, heads, True)),
)
