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
# From this many keys times their width the half-precision products are the faster backward (1.1 to 1.9x; below 128 wide
# only without a causal mask). Sapphire Rapids, benchmarks/ours/forest_blocks.py.
_HALF_KEYS_TIMES_WIDTH = 10240
# Scores the three-product path forms at once: 2 MB stay in cache between the elementwise passes.
_SCORES = 1 << 19
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
    kernel = _PRODUCTS if isinstance(mask, Tensor) else kernel_for(q, v, softcap)
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
    causal_pairs(rows, heads) -> (query, key) pairs launched by a forward, and by a backward too unless that says other
    """

    forward: Callable[[Tensor, Tensor, Tensor, Mask, float, float | None], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    causal_pairs: Callable[[int, int], int]
    causal_pairs_backward: Callable[[int, int], int] | None = None


def kernel_for(q: Tensor, v: Tensor, softcap: float | None) -> Kernel:
    """The stock kernel where it can: on a CPU, without softcap, with one width for keys and values."""
    if softcap is None and q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and _stock_works(q.dtype):
        return _half_kernel(q.shape[-1]) if q.dtype == torch.bfloat16 and _half_products_are_fast() else _STOCK
    return _PRODUCTS


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


def _pieces(units: int, rows: int, keys: int, groups: int, causal: bool) -> Iterator[tuple[slice, int, int, int]]:
    """(units, first row, end row, end key) of what is formed at once on the three-product path.

    As much as stays in cache between the elementwise passes: several short blocks, or some rows of a long one.
    """
    step = min(rows, _CAUSAL_ROWS if causal else max(64, _SCORES // (keys * groups)))
    at_once = max(1, _SCORES // (step * keys * groups))
    for u in range(0, units, at_once):
        for a in range(0, rows, step):
            b = min(a + step, rows)
            yield slice(u, min(u + at_once, units)), a, b, b if causal else keys


def _packed(x: Tensor, kv: int) -> Tensor:
    """[B,H,m,D] -> [B Hk, m G, D]: the query heads of one key-value head are more rows against one copy of its keys.

    A view where tokens are stored one after the other and there is one key-value head, else a copy.
    """
    return x.unflatten(1, (kv, -1)).transpose(2, 3).reshape(x.shape[0] * kv, -1, x.shape[-1])


def _unpacked(like: Tensor, kv: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An empty [B,H,m,width] stored token by token, and its view [B, Hk, m, G, width] to be filled."""
    batch, heads, rows = like.shape[:3]
    made = torch.empty(batch, rows, kv, heads // kv, width, dtype=dtype, device=like.device)
    return made.flatten(2, 3).transpose(1, 2), made.transpose(1, 2)


def _fill(into: Tensor, units: slice, rows: slice, x: Tensor) -> None:
    """x [units, rows G, D] into its place in [B, Hk, m, G, D]."""
    batch, kv, _, groups, _ = into.shape
    x = x.unflatten(1, (-1, groups))
    if len(x) == batch * kv:
        into[:, :, rows].copy_(x.unflatten(0, (batch, kv)))
    elif batch == 1:
        into[0, units, rows].copy_(x)
    else:
        for i, u in enumerate(range(units.start, units.stop)):
            into[u // kv, u % kv, rows].copy_(x[i])


def _scores(
    q: Tensor, k: Tensor, mask: Mask, units: slice, rows: slice, kv: int, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Wide q [u, r G, D], k [u, n, D] -> scores [u, r, G, n], -inf where hidden, and the softcap's slope."""
    s = (q @ k.mT).unflatten(1, (rows.stop - rows.start, -1)).mul_(scale)
    slope = None
    if softcap is not None:
        t = torch.tanh(s / softcap)
        s, slope = t * softcap, 1 - t * t
    if mask is None:
        return s, slope
    if isinstance(mask, str):
        at = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        return s.masked_fill_((torch.arange(k.shape[1], device=q.device) > at)[:, None], -torch.inf), slope
    seen = mask.seen if isinstance(mask, Band) else mask
    if seen.shape[-2] > 1:
        seen = seen[..., rows, :]
    if seen.dim() == 4:
        seen = seen[:, 0] if seen.shape[0] == 1 else seen[torch.arange(units.start, units.stop) // kv, 0]
    return s.masked_fill_(~seen[..., None, :], -torch.inf), slope


def _product_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    wide, kv, groups = wide_dtype(q.dtype), k.shape[1], q.shape[1] // k.shape[1]
    smallest = torch.finfo(wide).min
    qs, ks, vs = _packed(q, kv), k.flatten(0, 1), v.flatten(0, 1)
    kw = ks.to(wide)
    out, out_units = _unpacked(q, kv, v.shape[-1], v.dtype)
    lse, lse_units = _unpacked(q, kv, 1, wide)
    for u, a, b, end in _pieces(len(qs), q.shape[2], k.shape[2], groups, mask == "causal"):
        s, _ = _scores(qs[u, a * groups : b * groups].to(wide), kw[u, :end], mask, u, slice(a, b), kv, scale, softcap)
        s = s.flatten(1, 2)
        top = s.amax(-1, keepdim=True).clamp_min_(smallest)
        p = s.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        _fill(lse_units, u, slice(a, b), total.log().add_(top))
        p.mul_(total.clamp_min_(torch.finfo(wide).tiny).reciprocal_())
        _fill(out_units, u, slice(a, b), p.to(v.dtype) @ vs[u, :end])
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
    wide, kv, groups = lse.dtype, k.shape[1], q.shape[1] // k.shape[1]
    qs, gs, ks, vs = _packed(q, kv), _packed(dout, kv), k.flatten(0, 1), v.flatten(0, 1)
    ls = _packed(lse[..., None], kv).unflatten(1, (-1, groups))
    deltas = _packed((dout.to(wide) * out.to(wide)).sum(-1, keepdim=True), kv)
    kw = ks.to(wide)
    dq, dq_units = _unpacked(q, kv, q.shape[-1], q.dtype)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (ks, vs))
    for u, a, b, end in _pieces(len(qs), q.shape[2], k.shape[2], groups, mask == "causal"):
        part = slice(a * groups, b * groups)
        qx, gx = qs[u, part], gs[u, part]
        s, slope = _scores(qx.to(wide), kw[u, :end], mask, u, slice(a, b), kv, scale, softcap)
        p = s.sub_(ls[u, a:b]).exp_().flatten(1, 2)
        ds = (gx @ vs[u, :end].mT).to(wide).sub_(deltas[u, part]).mul_(p).mul_(scale)
        if slope is not None:
            ds = ds * slope.flatten(1, 2)
        ds, p = ds.to(q.dtype), p.to(dout.dtype)
        _fill(dq_units, u, slice(a, b), ds @ ks[u, :end])
        dk[u, :end] += _sum_over_rows(ds, qx)
        dv[u, :end] += _sum_over_rows(p, gx)
    return dq, dk.view(k.shape), dv.view(v.shape)


def _shifted(x: Tensor, shift: Tensor, kv: int) -> Tensor:
    """Half-precision x [B,H,m,D] and wide shift [B,H,m] -> [B Hk, m G, D + 2]: minus the shift as two more columns."""
    batch, heads, rows, width = x.shape
    made = x.new_empty(batch, kv, rows, heads // kv, width + 2)
    made[..., :width] = x.unflatten(1, (kv, -1)).transpose(2, 3)
    minus = shift.unflatten(1, (kv, -1)).transpose(2, 3).neg()
    made[..., width] = minus
    made[..., width + 1] = minus - made[..., width]
    return made.view(batch * kv, -1, width + 2)


def _sum_over_rows(p: Tensor, x: Tensor) -> Tensor:
    """[u, r, n] and [u, r, D] -> [u, n, D]. One alone goes as a matrix: as a batch it is 2 to 5 times slower."""
    return (p[0].mT @ x[0])[None] if len(p) == 1 else p.mT @ x


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
    kv, groups, width = k.shape[1], q.shape[1] // k.shape[1], q.shape[-1]
    qs, gs = _shifted(q, lse / scale, kv), _shifted(dout, (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1), kv)
    one = k.new_ones(k.shape[0] * kv, k.shape[2], 2)
    plain = k.flatten(0, 1)
    ks, vs = torch.cat([plain, one], -1), torch.cat([v.flatten(0, 1), one], -1)
    dq, dq_units = _unpacked(q, kv, width, q.dtype)
    dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (ks, vs))
    for u, a, b, end in _pieces(len(qs), q.shape[2], k.shape[2], groups, mask == "causal"):
        part = slice(a * groups, b * groups)
        p = (qs[u, part] @ ks[u, :end].mT).mul_(scale).exp_()
        if mask is not None:
            at = torch.arange(a, b, device=q.device)[:, None]
            p.unflatten(1, (-1, groups)).masked_fill_((torch.arange(end, device=q.device) > at)[:, None], 0)
        ds = (gs[u, part] @ vs[u, :end].mT).mul_(p)
        _fill(dq_units, u, slice(a, b), ds @ plain[u, :end])
        dk[u, :end] += _sum_over_rows(ds, qs[u, part])
        dv[u, :end] += _sum_over_rows(p, gs[u, part])
    return dq.mul_(scale), dk[..., :-2].mul_(scale).unflatten(0, k.shape[:2]), dv[..., :-2].unflatten(0, k.shape[:2])


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
    known: dict[str, bool] = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@cache
def _half_kernel(width: int) -> Kernel:
    """The stock forward, and the half-precision backward for blocks large enough that it is the faster one."""

    def products(keys: int, causal: bool) -> bool:
        return keys * width >= _HALF_KEYS_TIMES_WIDTH and (width >= 128 or not causal)

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
        if not isinstance(mask, Band | Tensor) and products(k.shape[2], mask is not None):
            chosen = _half_backward
        return chosen(dout, q, k, v, out, lse, mask, scale, softcap)

    def pairs(rows: int, heads: int) -> int:
        return (_PRODUCTS if products(rows, True) else _STOCK).causal_pairs(rows, heads)

    return Kernel(_stock_forward, backward, _STOCK.causal_pairs, pairs)


_STOCK = Kernel(_stock_forward, _stock_backward, lambda rows, heads: rows * (rows + 1) // 2)
_PRODUCTS = Kernel(
    _product_forward,
    _product_backward,
    lambda rows, heads: sum((b - a) * end for _, a, b, end in _pieces(1, rows, rows, 1, True)),
)
