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
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

# Below this many keys the stock half-precision backward is slower than converting its inputs to float32 (4x at 40 keys,
# 1x near 300, Zen 5), and gradients that were accumulated in float32 are better ones.
_UPCAST_KEYS = 300
# From this many keys, and this many multiplications of one product, the half-precision products are the faster backward
# (1.1 to 1.9x; below 128 wide only without a causal mask; Sapphire Rapids).
_HALF_KEYS, _HALF_WORK = 64, 12_000_000
# Scores the three-product path forms at once: 2 MB stay in cache between the elementwise passes.
_SCORES = 1 << 19
# Fewer rows of a key-value head than this are not worth converting its keys for.
_FEW_ROWS = 32
# Rows of a causal block formed at once: fewer hide more of the square, more make better products.
_CAUSAL_ROWS = 128


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
    out.lerp_(o.to(out.dtype), (l - finite).exp_()[..., None])  # the two weights add up to one
    return out, lse.copy_(total)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Kernel:
    """How blocks are computed.

    forward(q, k, v, mask, scale, softcap) -> out, lse
    backward(dout, q, k, v, out, lse, mask, scale, softcap) -> dq, dk, dv        out and lse of the whole row
    causal_pairs(rows, heads) -> (query, key) pairs of one head that a forward launches, heads counted over the batch;
    a backward as many, unless causal_pairs_backward says other
    """

    forward: Callable[[Tensor, Tensor, Tensor, Mask, float, float | None], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    causal_pairs: Callable[[int, int], int]
    causal_pairs_backward: Callable[[int, int], int] | None = None


def kernel_for(q: Tensor, v: Tensor, softcap: float | None) -> Kernel:
    """The stock kernel where it can: without softcap, with one width for keys and values; on CUDA in half precision."""
    if q.device.type == "cuda":
        from burnish.forest import cuda  # it is built from this module

        return cuda.BLOCKS if cuda.applies(q, v, softcap) else PRODUCTS
    if softcap is None and q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and _stock_works(q.dtype):
        return _half_kernel(q.shape[-1]) if q.dtype == torch.bfloat16 and _half_products_are_fast() else _STOCK
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


@dataclass(frozen=True)
class _Part:
    """What is formed at once on the product paths: some problems, key-value heads and rows, against the first keys."""

    batch: slice
    heads: slice
    rows: slice
    keys: int

    def of_rows(self, x: Tensor) -> Tensor:
        """The part of x [B,Hk,m,G,D] as [b, hk, r G, D]: query heads are more rows against one copy of their keys."""
        return x[self.batch, self.heads, self.rows].flatten(2, 3)

    def of_keys(self, x: Tensor) -> Tensor:
        """The part of x [B,Hk,n,D], a view."""
        return x[self.batch, self.heads, : self.keys]

    def put(self, into: Tensor, x: Tensor) -> None:
        """x [b, hk, r G, D] into its place in [B,Hk,m,G,D]."""
        into[self.batch, self.heads, self.rows] = x.unflatten(2, (-1, into.shape[3]))


def _parts(q: Tensor, k: Tensor, causal: bool) -> Iterator[_Part]:
    """As much at a time as stays in cache between the elementwise passes: several short blocks, or rows of a long one."""
    batch, heads, rows, width = q.shape
    kv, keys = k.shape[1:3]
    a_row = max(keys, width) * heads // kv
    most = _SCORES if q.device.type == "cpu" else 32 * _SCORES  # elsewhere launches cost more than cache misses
    step = min(rows, _CAUSAL_ROWS if causal else max(64, most // a_row))
    heads_at_once = min(kv, max(1, most // (step * a_row)))
    batch_at_once = max(1, most // (step * a_row * kv)) if heads_at_once == kv else 1
    for b in range(0, batch, batch_at_once):
        for h in range(0, kv, heads_at_once):
            for r in range(0, rows, step):
                end = min(r + step, rows)
                part = slice(b, b + batch_at_once), slice(h, h + heads_at_once), slice(r, end)
                yield _Part(*part, end if causal else keys)


def _causal_pairs(rows: int, heads: int) -> int:
    ends = [min(r + _CAUSAL_ROWS, rows) for r in range(0, rows, _CAUSAL_ROWS)]
    return sum((b - a) * b for a, b in pairwise([0, *ends]))


def _grouped(x: Tensor, kv: int) -> Tensor:
    """[B,H,m,D] -> its view [B, Hk, m, G, D]."""
    return x.unflatten(1, (kv, -1)).transpose(2, 3)


def _empty(like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[B,H,m,width] stored token by token."""
    batch, heads, rows = like.shape[:3]
    return torch.empty(batch, rows, heads, width, dtype=dtype, device=like.device).transpose(1, 2)


def _hidden(part: _Part, device: torch.device) -> Tensor:
    """[r, 1, n]: the keys behind each row's own place."""
    at = torch.arange(part.rows.start, part.rows.stop, device=device)[:, None, None]
    return torch.arange(part.keys, device=device) > at


def _scores(
    q: Tensor, k: Tensor, mask: Mask, part: _Part, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """q [b, hk, r G, D], k [b, hk, n, D] -> wide scores [b, hk, r, G, n], -inf where hidden, and the softcap's slope.

    Half-precision products round their result, so q and k are made wide first; for the few rows of a decoding step that
    would cost several times the product (6x at 64 rows on 512 keys), and there the scores stay rounded.
    """
    wide = wide_dtype(q.dtype)
    s = q @ k.mT if q.shape[2] < _FEW_ROWS else q.to(wide) @ k.to(wide).mT
    s = s.unflatten(2, (part.rows.stop - part.rows.start, -1)).to(wide).mul_(scale)
    slope = None
    if softcap is not None:
        t = torch.tanh(s / softcap)
        s, slope = t * softcap, 1 - t * t
    if mask is None:
        return s, slope
    if isinstance(mask, str):
        return s.masked_fill_(_hidden(part, q.device), -torch.inf), slope
    seen = mask.seen if isinstance(mask, Band) else mask
    if seen.shape[-2] > 1:
        seen = seen[..., part.rows, :]
    if seen.dim() == 4 and seen.shape[0] > 1:
        seen = seen[part.batch]
    return s.masked_fill_(~seen[..., None, :], -torch.inf), slope


def _product_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    wide, kv = wide_dtype(q.dtype), k.shape[1]
    smallest, tiny = torch.finfo(wide).min, torch.finfo(wide).tiny
    out, lse = _empty(q, v.shape[-1], v.dtype), _empty(q, 1, wide)
    qs, outs, lses = _grouped(q, kv), _grouped(out, kv), _grouped(lse, kv)
    for part in _parts(q, k, mask == "causal"):
        s, _ = _scores(part.of_rows(qs), part.of_keys(k), mask, part, scale, softcap)
        s = s.flatten(2, 3)
        top = s.amax(-1, keepdim=True).clamp_min_(smallest)
        p = s.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        part.put(lses, total.log().add_(top))
        p.mul_(total.clamp_min_(tiny).reciprocal_())
        part.put(outs, p.to(v.dtype) @ part.of_keys(v))
    return out, lse[..., 0]


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
    wide, kv = lse.dtype, k.shape[1]
    dq = _empty(q, q.shape[-1], q.dtype)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    ls, dqs = _grouped(lse[..., None], kv), _grouped(dq, kv)
    qs, gs, outs = (_grouped(x, kv) for x in (q, dout, out))
    for part in _parts(q, k, mask == "causal"):
        qx, gx = part.of_rows(qs), part.of_rows(gs)
        s, slope = _scores(qx, part.of_keys(k), mask, part, scale, softcap)
        p = s.flatten(2, 3).sub_(part.of_rows(ls)).exp_()
        delta = (gx.to(wide) * part.of_rows(outs)).sum(-1, keepdim=True)
        ds = (gx @ part.of_keys(v).mT).to(wide).sub_(delta).mul_(p).mul_(scale)
        if slope is not None:
            ds = ds * slope.flatten(2, 3)
        ds, p = ds.to(q.dtype), p.to(dout.dtype)
        part.put(dqs, ds @ part.of_keys(k))
        part.of_keys(dk).add_(_sum_over_rows(ds, qx))
        part.of_keys(dv).add_(_sum_over_rows(p, gx))
    return dq, dk, dv


def _sum_over_rows(p: Tensor, x: Tensor) -> Tensor:
    """[b,h,r,n] and [b,h,r,D] -> [b,h,n,D]. One alone goes as a matrix: as a batch of one it is 2 to 5 times slower."""
    return (p[0, 0].mT @ x[0, 0])[None, None] if p.shape[:2] == (1, 1) else p.mT @ x


def _shifted(x: Tensor, shift: Tensor) -> Tensor:
    """Half-precision x [b,h,r,D], wide shift [b,h,r,1] -> [b,h,r,D + 2]: minus the shift as two more columns."""
    made = x.new_empty(*x.shape[:-1], x.shape[-1] + 2)
    made[..., :-2] = x
    minus = shift.neg()
    made[..., -2:-1] = minus
    made[..., -1:] = minus - made[..., -2:-1]
    return made


def _half_backward(
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
    """Five products in half precision, where the stock backward converts to float32 or is several times slower.

    A product in half precision rounds its result. What is rounded here is already the difference that matters,

        scale ([q, -lse / scale] [k, 1]^T) = log P,     [dout, -delta] [v, 1]^T = dP - delta

    with the shifts as two columns (16 bits), summed in float32 inside the product: P is off by 2^-9 |log P| of itself,
    largest where P = 1/e and then 7e-4, however large the scores are.
    """
    wide, kv = lse.dtype, k.shape[1]
    dq = _empty(q, q.shape[-1], q.dtype)
    one = k.new_ones(*k.shape[:-1], 2)
    kx, vx = torch.cat([k, one], -1), torch.cat([v, one], -1)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (kx, vx))
    ls, dqs = _grouped(lse[..., None], kv), _grouped(dq, kv)
    qs, gs, outs = (_grouped(x, kv) for x in (q, dout, out))
    for part in _parts(q, k, mask == "causal"):
        gx = part.of_rows(gs)
        delta = (gx.to(wide) * part.of_rows(outs)).sum(-1, keepdim=True)
        qx, gx = _shifted(part.of_rows(qs), part.of_rows(ls) / scale), _shifted(gx, delta)
        p = (qx @ part.of_keys(kx).mT).mul_(scale).exp_()
        if mask is not None:
            hidden = ~mask.seen[part.rows, None] if isinstance(mask, Band) else _hidden(part, q.device)
            p.unflatten(2, (part.rows.stop - part.rows.start, -1)).masked_fill_(hidden, 0)
        ds = (gx @ part.of_keys(vx).mT).mul_(p)
        part.put(dqs, (ds @ part.of_keys(k)).mul_(scale))
        part.of_keys(dk).add_(_sum_over_rows(ds, qx))
        part.of_keys(dv).add_(_sum_over_rows(p, gx))
    return dq, dk[..., :-2].mul_(scale), dv[..., :-2]


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


@cache
def _half_products_are_fast() -> bool:
    """Whether this processor multiplies bfloat16 itself; elsewhere it is emulated."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict[str, Any])()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@cache
def _half_kernel(width: int) -> Kernel:
    """The stock forward, and the half-precision backward for blocks large enough that it is the faster one."""

    def products(rows: int, keys: int, heads: int, causal: bool) -> bool:
        large = keys >= _HALF_KEYS and rows * keys * heads * width >= _HALF_WORK
        return large and (width >= 128 or not causal)

    def backward(
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
        chosen = _stock_backward
        size = q.shape[2], k.shape[2], q.shape[0] * q.shape[1]
        if not isinstance(mask, Tensor) and products(*size, mask is not None):
            chosen = _half_backward
        return chosen(dout, q, k, v, out, lse, mask, scale, softcap)

    def pairs(rows: int, heads: int) -> int:
        return (PRODUCTS if products(rows, rows, heads, True) else _STOCK).causal_pairs(rows, heads)

    return Kernel(_stock_forward, backward, _STOCK.causal_pairs, pairs)


_STOCK = Kernel(_stock_forward, _stock_backward, lambda rows, heads: rows * (rows + 1) // 2)
PRODUCTS = Kernel(_product_forward, _product_backward, _causal_pairs)
