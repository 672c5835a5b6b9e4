"""Forest attention on CUDA: a few variable-length flash calls a layer, where the CPU runs a block a segment.

A call takes many pairs of (query rows, key rows) that do not see each other. A layout becomes

    one causal call over all segments of trees that fit into the window, each segment against itself,
    one call a depth of the tree: everything below an inner segment of that depth against that segment, merged by
        log-sum-exp into what the rows have so far,
    one causal call with a window over the segments of longer trees, each against the keys its own path holds inside the
        window, gathered: keys end where the queries end, so the kernel's alignment gives both limits, and nothing is
        merged.

The backward runs the same calls with the merged out and L (see blocks). The kernel is torch's own `varlen_attn` and its
registered backward; it takes half precision, one width for keys and values, no softcap. Whether it is there and right is
asked once a dtype and head width, against three products, as for the CPU kernel.

Not yet run on a GPU: layouts and merging are tested on a CPU against the dense oracle with the kernel's contract written
out in plain torch.

Legend: T tokens of the stream, m query and n key rows of a call; H query heads, Hk key-value heads; D width;
"wide" is float32 for the kernel's half precision.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (torch ships partial stubs)

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.core.ledger import attended
from burnish.forest.blocks import PRODUCTS, Band, Kernel, Mask, merge, wide_dtype
from burnish.forest.stream import Layout

Rows = slice | Tensor
Indices = np.ndarray[tuple[int], np.dtype[np.int64]]
WIDTHS = 256  # the widest head the kernel is built for, in steps of 8


@dataclass(frozen=True, eq=False)
class Call:
    """One variable-length call over sequences; sequence i has `cu_q[i+1] - cu_q[i]` queries and as for keys.

    rows, keys   stream rows in the call's order: a slice where they stand together
    cu_q, cu_k   [sequences + 1] int32, where each sequence begins among the call's rows and keys
    max_q, max_k tokens of the longest sequence
    causal       query t of m sees key j of n where j <= t + n - m
    window       and t + n - m - window < j; None: no lower limit
    pairs        (query, key) pairs launched, hidden tiles skipped
    """

    rows: Rows
    keys: Rows
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool
    window: int | None
    pairs: int

    @property
    def sides(self) -> tuple[int, int]:
        """The kernel's (keys to the left, keys to the right) of the diagonal, -1 for all."""
        if not self.causal:
            return -1, -1
        return (-1 if self.window is None else self.window - 1), 0


@dataclass(frozen=True, eq=False)
class Program:
    """The calls of one layout under one window: those of `own` tile the rows, those of `levels` are merged into them."""

    own: tuple[Call, ...]
    levels: tuple[Call, ...]

    @property
    def pairs(self) -> int:
        """(query, key) pairs of one head that a forward launches."""
        return sum(call.pairs for call in (*self.own, *self.levels))


@dataclass(frozen=True)
class Varlen:
    """The kernel, by its contract.

    forward(q [m,H,D], k [n,Hk,D], v [n,Hk,D], call, scale) -> out [m,H,D], lse [H,m] wide
    backward(dout, q, k, v, out, lse, call, scale) -> dq, dk, dv          out and lse of the whole row
    """

    forward: Callable[[Tensor, Tensor, Tensor, Call, float], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


# ---- layouts ---------------------------------------------------------------------------------------------------------


def lay_out(layout: Layout, window: int | None, device: torch.device) -> Program:
    """The calls that compute `layout` under `window`."""
    longest: dict[int, int] = {}
    for i in range(len(layout.length)):
        end = layout.first_position[i] + layout.length[i]
        longest[layout.root[i]] = max(longest.get(layout.root[i], 0), end)
    plain: list[int] = []
    windowed: list[int] = []
    depth: list[int] = []
    inner: dict[int, list[int]] = {}
    for i, p in enumerate(layout.parent):
        depth.append(0 if p < 0 else depth[p] + 1)
        if window is not None and longest[layout.root[i]] > window:
            windowed.append(i)
            continue
        plain.append(i)
        if layout.subtree_end(i) > layout.start[i] + layout.length[i]:
            inner.setdefault(depth[i], []).append(i)
    start, length = layout.start, layout.length
    own: list[Call] = []
    if plain:
        rows = [np.arange(start[i], start[i] + length[i]) for i in plain]
        own.append(_call(rows, rows, device, causal=True, window=None))
    if windowed and window is not None:
        rows = [np.arange(start[i], start[i] + length[i]) for i in windowed]
        keys = [_path(layout, i)[max(0, layout.first_position[i] - window + 1) :] for i in windowed]
        own.append(_call(rows, keys, device, causal=True, window=window))
    levels: list[Call] = []
    for _, segments in sorted(inner.items()):
        below = [np.arange(start[i] + length[i], layout.subtree_end(i)) for i in segments]
        above = [np.arange(start[i], start[i] + length[i]) for i in segments]
        levels.append(_call(below, above, device, causal=False, window=None))
    return Program(tuple(own), tuple(levels))


def _path(layout: Layout, i: int) -> Indices:
    """Stream rows of the sequence that ends with segment i."""
    chain = [*reversed(layout.ancestors(i)), i]
    return np.concatenate([np.arange(layout.start[s], layout.start[s] + layout.length[s]) for s in chain])


def _call(
    rows: Sequence[Indices], keys: Sequence[Indices], device: torch.device, *, causal: bool, window: int | None
) -> Call:
    m, n = [len(x) for x in rows], [len(x) for x in keys]
    pairs = sum(attended(b - a, a, window) if causal else a * b for a, b in zip(m, n))
    return Call(
        _together(np.concatenate(rows), device),
        _together(np.concatenate(keys), device),
        _bounds(m, device),
        _bounds(n, device),
        max(m),
        max(n),
        causal,
        window,
        pairs,
    )


def _together(rows: Indices, device: torch.device) -> Rows:
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows) and bool((np.diff(rows) == 1).all()):
        return slice(first, last + 1)
    return torch.tensor(rows).to(device, non_blocking=True)


def _bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


# ---- forward and backward --------------------------------------------------------------------------------------------


def forward(
    program: Program, q: Tensor, k: Tensor, v: Tensor, scale: float, kernel: Varlen | None = None
) -> tuple[Tensor, Tensor]:
    """q [1,H,T,D], k, v [1,Hk,T,D] -> out [1,H,T,D], narrow where one call made it, else wide; lse [1,H,T] wide."""
    kernel = kernel or FLASH
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    if len(program.own) == 1 and not program.levels:
        call = program.own[0]
        out, lse = kernel.forward(q, _take(k, call.keys), _take(v, call.keys), call, scale)
        return out.transpose(0, 1)[None], lse[None]
    wide = wide_dtype(q.dtype)
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=wide, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=wide, device=q.device)
    for call in program.own:
        o, l = kernel.forward(_take(q, call.rows), _take(k, call.keys), _take(v, call.keys), call, scale)
        out[call.rows] = o.to(out.dtype)
        lse[:, call.rows] = l
    for call in program.levels:
        o, l = kernel.forward(_take(q, call.rows), _take(k, call.keys), _take(v, call.keys), call, scale)
        x, y = merge(out[call.rows].transpose(0, 1), lse[:, call.rows], o.transpose(0, 1), l)
        if not isinstance(call.rows, slice):  # a slice was merged in place
            out[call.rows], lse[:, call.rows] = x.transpose(0, 1), y
    return out.transpose(0, 1)[None], lse[None]


def backward(
    program: Program,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    kernel: Varlen | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `forward`, with dout [1,H,T,D], out in q's dtype and the final lse -> dq, dk, dv, wide where they are sums."""
    kernel = kernel or FLASH
    dout, q, k, v, out = (x[0].transpose(0, 1) for x in (dout, q, k, v, out))
    calls = (*program.own, *program.levels)
    if len(calls) == 1 and isinstance(calls[0].keys, slice):
        made = kernel.backward(dout, q, k, v, out, lse[0], calls[0], scale)
        dq, dk, dv = (x.transpose(0, 1)[None] for x in made)
        return dq, dk, dv
    sums = [torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v)]
    for call in calls:
        rows = (_take(x, call.rows) for x in (dout, q))
        keys = (_take(x, call.keys) for x in (k, v))
        made = kernel.backward(*rows, *keys, _take(out, call.rows), lse[0][:, call.rows], call, scale)
        for total, more, at in zip(sums, made, (call.rows, call.keys, call.keys)):
            if isinstance(at, slice):
                total[at] += more
            else:
                total.index_add_(0, at, more.to(total.dtype))
    dq, dk, dv = (x.transpose(0, 1)[None] for x in sums)
    return dq, dk, dv


def _take(x: Tensor, rows: Rows) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


# ---- torch's kernel --------------------------------------------------------------------------------------------------


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn  # torch's own name for it is young

    grouped = q.shape[1] != k.shape[1] and _asks_for_groups(varlen_attn)
    options: dict[str, Any] = {"enable_gqa": True} if grouped else {}
    found: Any = varlen_attn(
        _rows_whole(q),
        _rows_whole(k),
        _rows_whole(v),
        call.cu_q,
        call.cu_k,
        max(call.max_q, 2),  # single queries take a path of their own, which lays the log-sum-exp out anew
        call.max_k,
        return_aux=AuxRequest(lse=True),
        scale=scale,
        window_size=call.sides,
        **options,
    )
    return found


@cache
def _asks_for_groups(varlen_attn: Callable[..., Any]) -> bool:
    """Whether fewer key heads than query heads have to be allowed: torch 2.11 hands them to the kernel unasked."""
    return "enable_gqa" in signature(varlen_attn).parameters


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    sides = call.sides
    found: Any = torch.ops.torch_attn._varlen_attn_backward(
        dout.contiguous(),
        *(_rows_whole(x) for x in (q, k, v)),
        out.contiguous(),
        lse.contiguous(),
        call.cu_q,
        call.cu_k,
        max(call.max_q, 2),
        call.max_k,
        sides == (-1, 0),
        torch.zeros(2, dtype=torch.uint64, device=q.device),  # the state of a dropout that is off
        scale,
        list(sides),
    )
    return found


def _rows_whole(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


FLASH = Varlen(_flash_forward, _flash_backward)


def applies(q: Tensor, v: Tensor, softcap: float | None) -> bool:
    """Whether a layer with these queries and values [..., D] runs on the kernel; else it runs on three products."""
    if q.device.type != "cuda" or softcap is not None or q.shape[-1] != v.shape[-1]:
        return False
    return why_not(q.dtype, q.shape[-1], q.device.index) is None


@cache
def why_not(dtype: torch.dtype, width: int, device: int | None) -> str | None:
    """None where the kernel serves this dtype and head width on this device, else the reason, in words."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the flash kernel takes half precision, not {dtype}"
    if width % 8 or width > WIDTHS:
        return f"the flash kernel takes heads up to {WIDTHS} wide in steps of 8, not {width}"
    return disagreement(FLASH, dtype, width, torch.device("cuda" if device is None else f"cuda:{device}"))


def disagreement(kernel: Varlen, dtype: torch.dtype, width: int, device: torch.device) -> str | None:
    """How the kernel fails on small grouped-query problems of each kind a program makes; None where it does not.

    The backward is given a log-sum-exp and an output that are not those of its own keys, as merged rows are.
    """
    generator = torch.Generator().manual_seed(0)

    def made(rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, width, generator=generator).to(dtype).to(device)

    close, scale = 16 * torch.finfo(dtype).eps, width**-0.5
    kinds: tuple[tuple[str, list[int], list[int], int | None], ...] = (
        ("causal", [5, 9], [5, 9], None),
        ("whole", [6, 1], [4, 9], None),
        ("windowed", [5, 4], [5, 7], 3),
    )
    with torch.no_grad():
        for kind, m, n, window in kinds:
            call = _call(_numbered(m), _numbered(n), device, causal=kind != "whole", window=window)
            q, k, v, dout, out = (made(sum(r), h) for r, h in ((m, 4), (n, 2), (n, 2), (m, 4), (m, 4)))
            try:
                got = list(kernel.forward(q, k, v, call, scale))
                if list(got[1].shape) != [4, sum(m)]:
                    return f"the flash kernel's {kind} log-sum-exp is {list(got[1].shape)}, wanted {[4, sum(m)]}"
                shift = got[1] + 0.5
                got += kernel.backward(dout, q, k, v, out, shift, call, scale)
            except (AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                return f"the flash kernel does not run: {(str(error).splitlines() or [type(error).__name__])[0]}"
            want = _by_products(q, k, v, dout, out, shift, m, n, kind, window, scale)
            for name, x, y in zip(("output", "log-sum-exp", "dq", "dk", "dv"), got, want):
                error = float((x.to(y.dtype) - y).abs().max())
                if not error <= close * (1 + float(y.abs().max())):
                    return f"the flash kernel's {kind} {name} is off by {error:.1e}"
    return None


def _numbered(lengths: Sequence[int]) -> list[Indices]:
    return [np.arange(end - n, end) for n, end in zip(lengths, accumulate(lengths))]


def _by_products(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor, m: list[int], n: list[int],
    kind: str, window: int | None, scale: float,
) -> list[Tensor]:  # fmt: skip
    """What a call wants, sequence by sequence on the three-product path, in the call's own layout."""
    parts: list[list[Tensor]] = [[] for _ in range(5)]
    columns = zip(*(x.split(r) for x, r in ((q, m), (k, n), (v, n), (dout, m), (out, m))), lse.split(m, 1), m, n)
    for qx, kx, vx, gx, ox, lx, rows, keys in columns:
        qh, kh, vh, gh, oh = (x.transpose(0, 1)[None] for x in (qx, kx, vx, gx, ox))
        mask: Mask = None if kind == "whole" else Band.of(rows, keys, window or keys, q.device)
        o, l = PRODUCTS.forward(qh, kh, vh, mask, scale, None)
        grads = PRODUCTS.backward(gh, qh, kh, vh, oh, lx[None], mask, scale, None)
        for into, x in zip(parts, (o, l, *grads)):
            into.append(x[0].transpose(0, 1) if x.ndim == 4 else x[0])
    return [torch.cat(x, 1 if i == 1 else 0) for i, x in enumerate(parts)]


# ---- one block: what the engine's plans ask for ----------------------------------------------------------------------


def _same(batch: int, rows: int, keys: int, causal: bool, device: torch.device) -> Call:
    """`batch` sequences of one shape that lie one after another."""

    def bounds(size: int) -> Tensor:
        return torch.arange(0, (batch + 1) * size, size, dtype=torch.int32, device=device)

    everything = slice(0, batch * rows), slice(0, batch * keys)
    pairs = batch * (rows * (rows + 1) // 2 if causal else rows * keys)
    return Call(*everything, bounds(rows), bounds(keys), rows, keys, causal, None, pairs)


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def _block_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    if not (mask is None or mask == "causal"):
        return PRODUCTS.forward(q, k, v, mask, scale, softcap)
    batch, _, rows, _ = q.shape
    call = _same(batch, rows, k.shape[2], mask == "causal", q.device)
    out, lse = FLASH.forward(_flat(q), _flat(k), _flat(v), call, scale)
    return out.unflatten(0, (batch, rows)).transpose(1, 2), lse.unflatten(1, (batch, rows)).transpose(0, 1)


BLOCKS = Kernel(_block_forward, PRODUCTS.backward, lambda rows, heads: rows * (rows + 1) // 2)
"""Single blocks, forward only on the kernel: a forest's backward is a program's."""
