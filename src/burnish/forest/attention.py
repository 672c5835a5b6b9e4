"""Exact attention over a packed forest, as one function registered with transformers.

A row sees its own segment up to itself and every ancestor segment whole. One causal block a segment and one rectangle a
segment with descendants (which are one contiguous slice, because segments stand in depth-first pre-order) give that:

    L = log sum_b exp(lse_b),   out = sum_b exp(lse_b - L) out_b            over the blocks b that a row takes part in

and the backward runs the same blocks, each given the *merged* out and L. That is exact, because
P_ij = exp(s_ij - L_i) and delta_i = <dout_i, out_i> belong to the whole row and not to a block. A row of a root takes
part in one block and is never merged. An attention sink is one more block: a key with its own logit and a zero value.

Sliding windows go by position in the sequence. A tree that fits into the window is computed as if there were none; the
rows of a longer tree are cut into chunks, and each chunk is one masked block against the keys its path holds inside the
window, gathered where they lie in several segments.

The registered function holds no policy: it refuses what it does not understand and hands the rest to the plan it was
given as a keyword argument of the body,

    body(input_ids=tokens[None], position_ids=position[None], plan=Forest(layout), use_cache=False)

(not through a global: activation checkpointing recomputes in the backward, when a global has been reset). `Forest` is
the plan for training and scoring, `Dense` the same function written as one masked block, its oracle. The engine's plans
are built from `attend_block` and `merge`.

On CUDA in half precision a few variable-length calls take the place of the blocks (`cuda`).

FLOPs. A plan counts the matrix products it launches: 2 H (D + Dv) a (query, key) pair forward, and 2 H (3 D + 2 Dv)
backward (scores again, dV, dP, dQ, dK: 2.5 times the forward where D = Dv). A block of m rows and n keys has m n pairs;
a causal block has n(n+1)/2 on the stock kernel, which skips hidden tiles, and on the three-product path the sum over
its chunks of rows of (rows * keys up to the last row). Softmax and merging are not counted, as in torch's own counter.

Legend: T tokens of the stream; H query heads, Hk key-value heads; D width of a key, Dv of a value; m rows and n keys of
a block; "wide" is float32, or the inputs' dtype where that is wider.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (torch and transformers ship partial stubs)

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from burnish.core.errors import ConfigError
from burnish.forest import cuda
from burnish.forest.blocks import Band, Kernel, attend_block, kernel_for, merge, wide_dtype
from burnish.forest.stream import Layout

__all__ = [
    "NAME",
    "Dense",
    "Forest",
    "Plan",
    "attend_block",
    "forest_attention",
    "merge",
    "register",
    "rotation_limit",
    "visible",
]

NAME = "burnish_forest"


class Plan(Protocol):
    """What a layer's attention is computed by: training, prefill and decode are plans of one registered function.

    flops, flops_backward: matrix-product FLOPs launched so far by the rule above, recomputation included.
    """

    flops: int
    flops_backward: int

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """q [1,H,T,D], k [1,Hk,T,D], v [1,Hk,T,Dv] after rotation, sinks [H] -> out [1,H,T,Dv]."""
        ...


@dataclass(frozen=True, eq=False)
class _Piece:
    """The next `rows` rows of the stream and where the keys of their first block lie; None: there, causally.

    segments: how many segments of one length these rows are, run as one batch
    shared: whether segments below these see their keys too
    """

    rows: int
    keys: slice | Tensor | None = None
    band: Band | None = None
    segments: int = 1
    shared: bool = False


@dataclass(frozen=True, eq=False)
class _Program:
    """The blocks of one layout under one window: pieces tile the rows; rectangles (rows, keys) are merged into them."""

    pieces: tuple[_Piece, ...]
    rectangles: tuple[tuple[slice, slice], ...]

    @property
    def is_one_block(self) -> bool:
        """Whether there is one causal block and nothing else."""
        return len(self.pieces) == 1 and self.pieces[0].segments == 1 and self.pieces[0].keys is None

    @property
    def keys_are_gathered(self) -> bool:
        """Whether pieces reach for keys outside their rows, so that gradients of keys are sums from the start."""
        return any(p.keys is not None for p in self.pieces)

    def pairs(self, heads: int, causal_pairs: Callable[[int, int], int]) -> int:
        """(query, key) pairs of one head that a forward or a backward launches."""
        total = sum((r.stop - r.start) * (c.stop - c.start) for r, c in self.rectangles)
        for p in self.pieces:
            own = causal_pairs(p.rows // p.segments, heads * p.segments) if p.band is None else p.band.seen.numel()
            total += p.segments * own
        return total


class Forest:
    """The plan for training and scoring: blocks per segment, merged by log-sum-exp, backward by the same blocks.

    Blocks are laid out once a window and reused by every layer and by the backward. Raises ConfigError where the layer
    brings another number of rows or keys than the layout has, as a cache would.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.flops = 0
        self.flops_backward = 0
        self._programs: dict[tuple[int | None, torch.device, bool], _Program | cuda.Program] = {}

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """q [1,H,T,D], k [1,Hk,T,D], v [1,Hk,T,Dv], sinks [H] -> out [1,H,T,Dv], laid out token by token."""
        _check(self.layout, layer, q, k, window)
        program = self._program(window, q.device, cuda.applies(q, v, softcap))
        return _ForestAttention.apply(q, k, v, sinks, self, program, scale, softcap)

    def _program(self, window: int | None, device: torch.device, varlen: bool) -> _Program | cuda.Program:
        key = window, device, varlen
        if key not in self._programs:
            self._programs[key] = (cuda.lay_out if varlen else _lay_out)(self.layout, window, device)
        return self._programs[key]


class Dense:
    """The oracle: the same function as one masked block of T by T, in plain differentiable operations."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.flops = 0
        self.flops_backward = 0

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """q [1,H,T,D], k [1,Hk,T,D], v [1,Hk,T,Dv], sinks [H] -> out [1,H,T,Dv]."""
        _check(self.layout, layer, q, k, window)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        s = (q @ k.transpose(-1, -2)).to(wide_dtype(q.dtype)) * scale
        if softcap is not None:
            s = torch.tanh(s / softcap) * softcap
        s = s.masked_fill(~visible(self.layout, window).to(q.device), -torch.inf)
        if sinks is not None:
            s = torch.cat([s, sinks.to(s.dtype)[None, :, None, None].expand(*s.shape[:3], 1)], -1)
        out = s.softmax(-1)[..., : k.shape[2]].to(v.dtype) @ v
        flops = 2 * q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[-1] + v.shape[-1])
        self.flops += flops

        def count(_: Tensor) -> None:
            self.flops_backward += 2 * flops

        if out.requires_grad:
            out.register_hook(count)
        return out


def visible(layout: Layout, window: int | None = None) -> Tensor:
    """[T, T] booleans: row i sees row j. For oracles and for looking at; `Forest` never forms it."""
    segments = len(layout.length)
    sees = torch.eye(segments, dtype=torch.bool)
    for i in range(segments):
        sees[i, layout.ancestors(i)] = True
    owner = torch.arange(segments).repeat_interleave(torch.tensor(layout.length))
    behind = layout.position[:, None] - layout.position
    seen = sees[owner][:, owner] & (behind >= 0)
    return seen if window is None else seen & (behind < window)


def _check(layout: Layout, layer: int, q: Tensor, k: Tensor, window: int | None) -> None:
    if q.shape[0] != 1 or q.shape[2] != layout.size or k.shape[2] != layout.size:
        raise ConfigError(
            f"the plan is for one stream of {layout.size} tokens, the layer brings queries {tuple(q.shape)} and keys "
            f"{tuple(k.shape)}",
            where=f"attention of layer {layer}",
            remedy="call the body with tokens[None], position[None] and use_cache=False",
        )
    if window is not None and window < 1:
        raise ConfigError(f"a window of {window} tokens hides everything", where=f"attention of layer {layer}")


def _lay_out(layout: Layout, window: int | None, device: torch.device) -> _Program:
    pieces: list[_Piece] = []
    rectangles: list[tuple[slice, slice]] = []
    bands: dict[tuple[int, int], Band] = {}
    longest = [0] * len(layout.length)
    for i, (f, n) in enumerate(zip(layout.first_position, layout.length)):
        longest[layout.root[i]] = max(longest[layout.root[i]], f + n)
    for i, (s, n) in enumerate(zip(layout.start, layout.length)):
        if window is not None and longest[layout.root[i]] > window:
            pieces.extend(_windowed(layout, i, window, bands, device))
            continue
        end = layout.subtree_end(i)
        shared = end > s + n
        last = pieces[-1] if pieces else None
        if last and not shared and not last.shared and last.keys is None and last.rows == n * last.segments:
            pieces[-1] = _Piece(last.rows + n, segments=last.segments + 1)
        else:
            pieces.append(_Piece(n, shared=shared))
        if shared:
            rectangles.append((slice(s + n, end), slice(s, s + n)))
    return _Program(tuple(pieces), tuple(rectangles))


def _windowed(
    layout: Layout, i: int, window: int, bands: dict[tuple[int, int], Band], device: torch.device
) -> Iterator[_Piece]:
    """Chunks of segment i's rows, each against the keys its path holds at the positions the chunk can see."""
    first, start = layout.first_position[i], layout.start[i]
    a, end = first, first + layout.length[i]
    if first == 0:  # nothing at the head of a sequence is out of sight yet
        a = min(end, window)
        yield _Piece(a)
    path = layout.rows(i)
    step = min(512, max(64, window // 2))
    while a < end:
        b = min(a + step, end)
        low = max(0, a - window + 1)
        shape = b - a, b - low
        if shape not in bands:
            bands[shape] = Band.of(*shape, window, device)
        inside = low >= first
        keys = slice(start + low - first, start + b - first) if inside else path[low:b].to(device)
        yield _Piece(b - a, keys, bands[shape])
        a = b


def _take(x: Tensor, keys: slice | Tensor) -> Tensor:
    return x[:, :, keys] if isinstance(keys, slice) else x.index_select(2, keys)


def _put(x: Tensor, keys: slice | Tensor, more: Tensor) -> None:
    if isinstance(keys, slice):
        x[:, :, keys] += more
    else:
        x.index_add_(2, keys, more.to(x.dtype))


def _batched(x: Tensor, segments: int) -> Tensor:
    """[1, H, segments * n, ...] -> its view [segments, H, n, ...]."""
    return x.unflatten(2, (segments, -1))[0].transpose(0, 1)


def _token_major(like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[1, H, T, width] stored as [T, H, width]: a segment is contiguous, and so is the model's view of the output."""
    heads, rows = like.shape[1:3]
    return torch.empty(1, rows, heads, width, dtype=dtype, device=like.device).transpose(1, 2)


class _ForestAttention(torch.autograd.Function):
    """q [1,H,T,D], k [1,Hk,T,D], v [1,Hk,T,Dv], sinks [H] or None -> [1,H,T,Dv]."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        q, k, v, sinks, plan, program, scale, softcap = given
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # the stock kernel reads rows whole
        kernel, heads = kernel_for(q, v, softcap), q.shape[1]
        varlen = isinstance(program, cuda.Program)
        pairs = program.pairs if varlen else program.pairs(heads, kernel.causal_pairs)
        plan.flops += 2 * heads * pairs * (q.shape[-1] + v.shape[-1])
        if varlen:
            out, lse = cuda.forward(program, q, k, v, scale)
        elif program.is_one_block:
            out, lse = kernel.forward(q, k, v, "causal", scale, softcap)
        else:
            out, lse = _blocks_forward(kernel, q, k, v, program, scale, softcap)
        if sinks is not None:
            total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
            out, lse = out * (lse - total).exp_()[..., None], total
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.rest = kernel, plan, program, scale, softcap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, sinks, out, lse = ctx.saved_tensors
        kernel, plan, program, scale, softcap = ctx.rest
        varlen = isinstance(program, cuda.Program)
        pairs = program.pairs if varlen else program.pairs(q.shape[1], kernel.causal_pairs_backward or kernel.causal_pairs)
        plan.flops_backward += 2 * q.shape[1] * pairs * (3 * q.shape[-1] + 2 * v.shape[-1])
        if dout.stride(-1) != 1:
            dout = dout.contiguous()
        if varlen:
            dq, dk, dv = cuda.backward(program, dout, q, k, v, out, lse, scale)
        elif program.is_one_block:
            dq, dk, dv = kernel.backward(dout, q, k, v, out, lse, "causal", scale, softcap)
        else:
            dq, dk, dv = _blocks_backward(kernel, dout, q, k, v, out, lse, program, scale, softcap)
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            wide = lse.dtype
            delta = (dout.to(wide) * out.to(wide)).sum(-1)
            dsinks = -((sinks.to(wide)[:, None] - lse).exp_() * delta).sum((0, 2)).to(sinks.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None, None, None, None


def _blocks_forward(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, program: _Program, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(q.dtype)
    out = _token_major(q, v.shape[-1], wide if program.rectangles else q.dtype)
    lse = _token_major(q, 1, wide)[..., 0]
    rows = [p.rows for p in program.pieces]
    # one split a tensor, not one slice a block: with thirty short roots the slicing costs as much as the kernel
    columns = (x.split_with_sizes(rows, 2) for x in (q, k, v, out, lse))
    for piece, qx, kx, vx, ox, lx in zip(program.pieces, *columns):
        if piece.keys is not None:
            kx, vx = _take(k, piece.keys), _take(v, piece.keys)
        if piece.segments > 1:
            qx, kx, vx, ox, lx = (_batched(x, piece.segments) for x in (qx, kx, vx, ox, lx))
        o, l = kernel.forward(qx, kx, vx, piece.band or "causal", scale, softcap)
        ox.copy_(o)
        lx.copy_(l)
    for r, c in program.rectangles:
        o, l = kernel.forward(q[:, :, r], k[:, :, c], v[:, :, c], None, scale, softcap)
        merge(out[:, :, r], lse[:, :, r], o, l)
    return out, lse


def _blocks_backward(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    program: _Program,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide, gathered = lse.dtype, program.keys_are_gathered
    dq = _token_major(q, q.shape[-1], wide if program.rectangles else q.dtype)
    dk, dv = (_token_major(x, x.shape[-1], wide if program.rectangles or gathered else x.dtype) for x in (k, v))
    if gathered:
        dk.zero_()
        dv.zero_()
    rows = [p.rows for p in program.pieces]
    columns = (x.split_with_sizes(rows, 2) for x in (dout, q, k, v, out, lse, dq, dk, dv))
    for piece, *column in zip(program.pieces, *columns):
        if piece.segments > 1:
            column = [_batched(x, piece.segments) for x in column]
        gx, qx, kx, vx, ox, lx, dqx, dkx, dvx = column
        if piece.keys is not None:
            kx, vx = _take(k, piece.keys), _take(v, piece.keys)
        x, y, z = kernel.backward(gx, qx, kx, vx, ox, lx, piece.band or "causal", scale, softcap)
        dqx.copy_(x)
        if piece.keys is not None:
            _put(dk, piece.keys, y)
            _put(dv, piece.keys, z)
        elif gathered:
            dkx.add_(y)
            dvx.add_(z)
        else:  # the first block of these keys: what rectangles add comes after
            dkx.copy_(y)
            dvx.copy_(z)
    for r, c in program.rectangles:
        block = dout[:, :, r], q[:, :, r], k[:, :, c], v[:, :, c], out[:, :, r], lse[:, :, r]
        x, y, z = kernel.backward(*block, None, scale, softcap)
        dq[:, :, r] += x
        dk[:, :, c] += y
        dv[:, :, c] += z
    return dq, dk, dv


# --------------------------------------------------------------------------------------------- the registered function

# Arguments a layer may pass on that do not change what attention computes.
_WITHOUT_EFFECT = {
    *("position_ids", "position_embeddings", "cache_position", "past_key_values", "use_cache"),
    *("return_dict", "output_hidden_states", "output_router_logits", "logits_to_keep"),
}


def forest_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: Plan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: query [1,H,T,D], key [1,Hk,T,D], value [1,Hk,T,Dv] -> [1,T,H,Dv].

    Everything given is used or refused. Raises ConfigError without a plan, with a mask, with attention dropout, on a
    layer that is not causal, and on an argument it does not know that is not None.
    """
    where = f"attention of {type(module).__name__}"
    if plan is None:
        raise ConfigError("no plan reached it", where=where, remedy="call the body with plan=Forest(layout)")
    if attention_mask is not None:
        raise ConfigError("it was given a mask, which the plan would override", where=where, remedy="pass no mask")
    if dropout:
        raise ConfigError(
            f"dropout {dropout}: separate copies of a shared prefix would each draw their own",
            where=where,
            remedy="set attention_dropout to 0 in the model's configuration",
        )
    if rest.pop("is_causal", None) is False or getattr(module, "is_causal", None) is False:
        raise ConfigError("it is not causal", where=where, remedy="run this model as padded rows")
    strange = sorted(k for k, x in rest.items() if k not in _WITHOUT_EFFECT and x is not None and x is not False)
    if strange:
        raise ConfigError(f"it is passed {', '.join(strange)}", where=where, remedy="run this model as padded rows")
    limit, layout = rotation_limit(getattr(module, "config", None)), getattr(plan, "layout", None)
    if limit is not None and layout is not None and layout.longest > limit and len(layout.leaves) > 1:
        raise ConfigError(
            f"a sequence of {layout.longest} tokens would change the rotation of the shorter ones beside it, from {limit} on",
            where=where,
            remedy=f"keep sequences within {limit} tokens, or run this model as padded rows",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    layer: int = getattr(module, "layer_idx", -1)
    out = plan(layer, query, key, value, scale, sliding_window, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


def rotation_limit(config: Any) -> int | None:
    """The length from which one sequence changes the rotary frequencies of *every* row in its call, or None.

    Dynamic NTK and LongRoPE choose them by the largest position they are given (a relative error of 0.3 in a short row
    that shares its call with a long one, padded or packed, and not a word).
    """
    given: Any = getattr(config, "rope_parameters", None) or {}
    limits: list[int] = []
    for parameters in (given, *(x for x in given.values() if isinstance(x, dict))):  # plain, or one set a layer type
        kind = str(parameters.get("rope_type"))
        if kind == "longrope":
            original = parameters.get("original_max_position_embeddings")
            limits.append(
                int(original or getattr(config, "original_max_position_embeddings", config.max_position_embeddings))
            )
        elif "dynamic" in kind:
            limits.append(int(config.max_position_embeddings))
    return min(limits, default=None)


def register() -> str:
    """Make `NAME` an attention implementation of transformers; idempotent. Returns the name.

    It is registered as an attention and *not* as a mask: for a name the mask interface does not know, no mask is built.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, forest_attention)
    return NAME
