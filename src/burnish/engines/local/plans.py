"""The engine's two plans of the registered attention function: prefill, which keeps what it computes, and decode.

Both see a row's past in two parts. Its *trunk*, ancestors worth sharing, is attended to as one block a node: all rows
below it against one copy. The rest, its *own* path, is gathered per row (prefill) or lies in the row's slot (decode),
so that thousands of short prefixes cost one batched product instead of a loop. The parts merge by log-sum-exp, exactly.

A block costs launches, a gathered or slotted prefix memory traffic once per row: a node is shared where the copies would
move at least SHARED_BYTES a layer (measured on two Zen 5 cores, 16 to 64 rows a prefix: they break even at 1 to 3 MB), on
a GPU SHARED_BYTES_CUDA (reckoned, not measured: a block is some twenty launches, 100 us, in which 2 to 3 x 10^8 bytes are
read, and a step with shared nodes is not captured; half of that, because copies also take memory).

Legend: T tokens of a stream, n running rows, m rows of a block; H query heads, Hk key-value heads, D key width, Dv value
width; positions are absolute in the sequence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from burnish.engines.base import Node
from burnish.engines.local.arena import KEYS_STEP, Arena
from burnish.engines.local.crossing import upload
from burnish.forest.blocks import attend_block, merge
from burnish.maths.kernels import Kernels

SHARED_BYTES = 2**20
SHARED_BYTES_CUDA = 2**27


def trunk_of(
    chain: Sequence[Node], rows: Mapping[Node, int], bytes_per_token: int, device: torch.device, spared: int = 0
) -> int:
    """How many nodes at the head of `chain` are worth sharing: down to the deepest whose copies would be large.

    rows: how many rows stand below a node; spared: copies that are made anyway.
    """
    worth, least = 0, SHARED_BYTES_CUDA if device.type == "cuda" else SHARED_BYTES
    for depth, node in enumerate(chain, 1):
        if (rows[node] - spared) * len(node.ids) * bytes_per_token >= least:
            worth = depth
    return worth


def pack_heads(q: Tensor, kv_heads: int) -> Tensor:
    """[m, H, D] -> [1, Hk, groups * m, D]: the query heads of a kv head are more rows against one copy of its keys."""
    m, heads, width = q.shape
    return q.reshape(m, kv_heads, heads // kv_heads, width).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, width)


def unpack_heads(x: Tensor, m: int) -> Tensor:
    """[1, Hk, groups * m, ...] -> [m, H, ...]"""
    return x[0].unflatten(1, (-1, m)).flatten(0, 1).transpose(0, 1)


@dataclass(eq=False)
class Shared:
    """One node with all rows below it, as one block.

    members [m]  the rows, on the host, and `rows` where the queries are; rows None: every row, in order
    position [m] where each row's token stands
    """

    at: int
    node: Node
    members: np.ndarray
    rows: Tensor | None
    position: np.ndarray
    _seen: dict[tuple[int, int], tuple[int, Tensor | None]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.node.ids)

    def seen(self, window: int | None, groups: int, device: torch.device) -> tuple[int, Tensor | None]:
        """(keys to skip that no row sees, which of the others each packed row sees or None where all see all)."""
        if window is None:
            return 0, None
        name = window, groups
        if name not in self._seen:
            skip = min(self.length, max(0, int(self.position.min()) - window + 1 - self.node.start))
            mask = None
            if int(self.position.max()) - window >= self.node.start + skip:
                place = np.arange(self.node.start + skip, self.node.end)
                mask = upload(self.position[:, None] - place < window, device).repeat(groups, 1)
            self._seen[name] = skip, mask
        return self._seen[name]


def attend_shared(
    shared: Sequence[Shared], keys: Tensor, values: Tensor, q: Tensor, out: Tensor, lse: Tensor, scale: float,
    window: int | None, softcap: float | None, flops: np.ndarray,
) -> None:  # fmt: skip
    """Merge every shared node into (out [n, H, Dv], lse [n, H]) in place. q [n, H, D]; flops [n] grows by each row's."""
    kv_heads, groups = keys.shape[1], q.shape[1] // keys.shape[1]
    for node in shared:
        skip, mask = node.seen(window, groups, q.device)
        if skip == node.length:
            continue
        span = slice(node.at + skip, node.at + node.length)
        rows = q if node.rows is None else q[node.rows]
        k, v = (x[span].transpose(0, 1)[None] for x in (keys, values))
        o, l = attend_block(pack_heads(rows, kv_heads), k, v, mask, scale, softcap)
        o, l = unpack_heads(o, len(rows)), unpack_heads(l, len(rows))
        pairs = 2 * q.shape[1] * (q.shape[2] + v.shape[3]) * (node.length - skip)
        if node.rows is None:
            merge(out, lse, o, l)
            flops += pairs
        else:
            out[node.rows], lse[node.rows] = merge(out[node.rows], lse[node.rows], o, l)
            flops[node.members] += pairs


def sink_into(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """An attention sink is a last block of one key with its own logit and a zero value. out [n, H, Dv], lse [n, H]."""
    out.mul_((lse - torch.logaddexp(lse, sinks.to(lse.dtype))).exp_()[..., None])


@dataclass(frozen=True, eq=False)
class _Bucket:
    """Segments of about one length, padded at their ends to [m, L] queries and [m, K] keys of their own paths.

    rows [m, L] stream rows; keys [m, K] token rows of the arena; flat, valid: stream rows and their place in [m * L]
    ahead [m]   own keys before the segment's first token
    """

    members: np.ndarray
    rows: Tensor
    keys: Tensor
    flat: Tensor
    valid: Tensor
    ahead: Tensor
    causal: bool

    def mask(self, window: int | None, softcap: float | None) -> Tensor | str:
        """Padded queries see some key, so that nothing is NaN; padded keys lie after every query and are not seen."""
        length, keys = self.rows.shape[1], self.keys.shape[1]
        if self.causal and softcap is None and (window is None or window >= length):
            return "causal"
        device = self.rows.device
        behind = (
            self.ahead[:, None, None] + torch.arange(length, device=device)[:, None] - torch.arange(keys, device=device)
        )
        seen = behind >= 0
        return (seen if window is None else seen & (behind < window))[:, None]


class Prefill:
    """Nodes as one packed stream: every distinct token once, keys and values kept in the arena.

    Nodes come parents first; a parent is computed already or stands earlier. `at[i]` is node i's place in the arena.
    """

    flops_backward = 0

    def __init__(
        self, arena: Arena, nodes: Sequence[Node], at: Mapping[Node, int], bytes_per_token: int, device: torch.device
    ):
        self.arena, self.device = arena, device
        self.flops_of = np.zeros(len(nodes), np.int64)
        self._masks: dict[tuple[int, int | None, bool], Tensor | str] = {}
        lengths = np.array([len(node.ids) for node in nodes])
        self._first = np.concatenate([[0], np.cumsum(lengths)])
        self.position = upload(np.concatenate([np.arange(n.start, n.end) for n in nodes]), device)
        self.furthest = max(n.end for n in nodes) - 1  # the last position, which the body would have to read off the device
        self.tokens = upload(np.fromiter((t for n in nodes for t in n.ids), np.int64), device)
        self.at = upload(np.concatenate([np.arange(at[n], at[n] + len(n.ids)) for n in nodes]), device)
        self.last = upload(self._first[1:] - 1, device)

        below: dict[Node, int] = defaultdict(int)
        for node in nodes:
            for above in node.chain[:-1]:
                below[above] += 1
        own: list[np.ndarray] = []
        under: dict[Node, list[int]] = defaultdict(list)
        for i, node in enumerate(nodes):
            chain = node.chain
            depth = trunk_of(chain[:-1], below, bytes_per_token, device)
            own.append(np.concatenate([np.arange(at[x], at[x] + len(x.ids)) for x in chain[depth:]]))
            for above in chain[:depth]:
                under[above].append(i)
        self._buckets = [self._bucket(members, lengths, own) for members in _similar(lengths, [len(x) for x in own])]
        self._shared: list[Shared] = []
        for above, members in under.items():
            rows = np.concatenate([np.arange(self._first[i], self._first[i + 1]) for i in members])
            position = np.concatenate([np.arange(nodes[i].start, nodes[i].end) for i in members])
            self._shared.append(Shared(at[above], above, rows, upload(rows, device), position))
        self._owner = np.repeat(np.arange(len(nodes)), lengths)

    def _bucket(self, members: list[int], lengths: np.ndarray, own: Sequence[np.ndarray]) -> _Bucket:
        longest, keys = max(lengths[members]), max(len(own[i]) for i in members)
        step = np.arange(longest)
        rows = np.stack([self._first[i] + np.minimum(step, lengths[i] - 1) for i in members])
        path = np.stack([np.pad(own[i], (0, keys - len(own[i])), mode="edge") for i in members])
        valid = np.flatnonzero(step[None] < lengths[members][:, None])
        ahead = np.array([len(own[i]) - lengths[i] for i in members])
        columns = (rows, path, rows.reshape(-1)[valid], valid, ahead)
        return _Bucket(
            np.array(members), *(upload(x, self.device) for x in columns), causal=not ahead.any()
        )

    @property
    def flops(self) -> int:
        """Attention FLOPs launched so far."""
        return int(self.flops_of.sum())

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
        """See forest.attention.Plan."""
        keys, values = self.arena.store(layer, self.at, k, v)
        queries = q[0].transpose(0, 1)
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.empty(*queries.shape[:2], v.shape[-1], dtype=wide, device=q.device)
        lse = torch.empty(queries.shape[:2], dtype=wide, device=q.device)
        per_pair = 2 * q.shape[1] * (q.shape[3] + v.shape[3])
        for i, bucket in enumerate(self._buckets):
            name = i, window, softcap is None
            if name not in self._masks:
                self._masks[name] = bucket.mask(window, softcap)
            mask = self._masks[name]
            block = (x.transpose(1, 2) for x in (queries[bucket.rows], keys[bucket.keys], values[bucket.keys]))
            o, l = attend_block(*block, mask, scale, softcap)  # type: ignore[arg-type]
            out[bucket.flat] = o.transpose(1, 2).flatten(0, 1)[bucket.valid]
            lse[bucket.flat] = l.transpose(1, 2).flatten(0, 1)[bucket.valid]
            length, width = bucket.rows.shape[1], bucket.keys.shape[1]
            self.flops_of[bucket.members] += per_pair * (
                length * (length + 1) // 2 if mask == "causal" else length * width
            )
        if self._shared:
            taken = np.zeros(len(queries), np.int64)
            attend_shared(self._shared, keys, values, queries, out, lse, scale, window, softcap, taken)
            np.add.at(self.flops_of, self._owner, taken)
        if sinks is not None:
            sink_into(out, lse, sinks)
        return out.to(q.dtype).transpose(0, 1)[None]


def _similar(lengths: np.ndarray, keys: Sequence[int]) -> list[list[int]]:
    """Segments in groups whose padding wastes little: keys and lengths of a group differ by a quarter and 8 at most."""
    groups: list[list[int]] = []
    shortest = longest = fewest = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-keys[i], -int(lengths[i]), i)):
        length = int(lengths[i])
        low, high = min(shortest, length), max(longest, length)
        if groups and keys[i] >= fewest and low >= 0.75 * high - 8:
            groups[-1].append(i)
            shortest, longest = low, high
        else:
            groups.append([i])
            shortest, longest, fewest = length, length, 0.75 * keys[i] - 8
    return groups


class Decode:
    """One step of n running rows, one token each, in slots 0..n-1: a token joins its slot and sees slot and trunk.

    Set by `begin` before each pass of the body; `flops_of` [n] is what each row's attention launched in this pass.
    """

    flops_backward = 0

    def __init__(self, arena: Arena, device: torch.device) -> None:
        self.arena, self.device, self.flops = arena, device, 0

    def begin(self, length: np.ndarray, position: np.ndarray, shared: Sequence[Shared]) -> None:
        """length [n]: keys each slot holds before this token; position [n]: where the token stands in its sequence."""
        self.n = len(length)
        self.span = -(-(int(length.max()) + 1) // KEYS_STEP) * KEYS_STEP
        self.shared = shared
        self.flops_of = np.zeros(self.n, np.int64)
        self.furthest = int(position.max())  # see Prefill
        self._shortest = int(length.min())
        self._length = upload(length, self.device)
        self._rows = torch.arange(self.n, device=self.device)
        self._seen: dict[int | None, tuple[int, Tensor]] = {}
        self._bias: dict[tuple[int | None, int, int], Tensor] = {}
        self._places: dict[tuple[int, int], Tensor] = {}
        self._launched: dict[tuple[int | None, int], tuple[np.ndarray, int]] = {}  # (FLOPs of each row, of all) of a window and width
        self._held = length.copy()

    def _place(self, kv_heads: int, size: int) -> Tensor:
        """[n * kv_heads] where each row's new key stands among all keys of all slots."""
        name = kv_heads, size
        if name not in self._places:
            head = torch.arange(kv_heads, device=self.device)
            self._places[name] = ((self._rows[:, None] * kv_heads + head) * size + self._length[:, None]).flatten()
        return self._places[name]

    def _own(self, window: int | None) -> tuple[int, Tensor]:
        """(keys to skip that no row sees, [n, span - skip] which of the others each row sees)."""
        if window not in self._seen:
            skip = 0 if window is None else max(0, self._shortest - window + 1)
            index = torch.arange(skip, self.span, device=self.device)
            seen = index <= self._length[:, None]
            if window is not None:
                seen &= index > self._length[:, None] - window
            self._seen[window] = skip, seen
        return self._seen[window]

    def _additive(self, window: int | None, kv_heads: int, groups: int, dtype: torch.dtype) -> Tensor:
        """[n, kv_heads, groups, keys] zeros and -inf: made once a step, not once a layer."""
        name = window, kv_heads, groups
        if name not in self._bias:
            seen = self._own(window)[1]
            bias = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, -torch.inf)
            self._bias[name] = bias[:, None, None].expand(self.n, kv_heads, groups, -1).contiguous()
        return self._bias[name]

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
        """See forest.attention.Plan."""
        n, (heads, width), kv_heads = self.n, q.shape[1::2], k.shape[1]
        keys, values = self.arena.row_slots(layer, k, v)
        place = self._place(kv_heads, keys.shape[2])
        for x, new in ((keys, k), (values, v)):
            x.view(-1, x.shape[3]).index_copy_(0, place, new[0].transpose(0, 1).reshape(-1, x.shape[3]))
        skip, seen = self._own(window)
        ks, vs = keys[:n, :, skip : self.span], values[:n, :, skip : self.span]
        queries = q[0].transpose(0, 1)
        flops = np.full(n, 2 * heads * (width + v.shape[3]) * ks.shape[2], np.int64)
        if softcap is None and sinks is None and not self.shared:
            out = self._alone(queries.reshape(n, kv_heads, -1, width), ks, vs, scale, window)
        else:
            out, lse = attend_block(queries[:, :, None], ks, vs, seen[:, None, None], scale, softcap)
            out, lse = out[:, :, 0], lse[:, :, 0]
            if self.shared:
                attend_shared(self.shared, *self.arena.nodes[layer], queries, out, lse, scale, window, softcap, flops)
            if sinks is not None:
                sink_into(out, lse, sinks)
        self.flops_of += flops
        self.flops += int(flops.sum())
        return out.to(q.dtype).transpose(0, 1)[None]

    def fused(
        self, kernels: Kernels, layer: int, qkv: Tensor, sizes: tuple[int, int, int], weights: Tensor | None, epsilon: float, late: bool,
        turn: tuple[Tensor, Tensor] | None, scale: float, window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """The same step from a layer's projections qkv [n, (H + 2 Hk) D], not yet normed or rotated -> [n, H D].

        One pass over each row's own keys and values, no longer than the row; see maths.kernels.Kernels.decode."""
        heads, kv_heads, width = sizes
        held = self.arena.slots.get(layer)
        if held is None:
            likeness = qkv[:1].view(1, -1, width)[:, :kv_heads].transpose(0, 1)
            held = self.arena.row_slots(layer, likeness, likeness)
        keys, values = held
        cos, sin = turn or (None, None)
        out, lse = kernels.decode(
            qkv, weights, epsilon, late, cos, sin, keys, values, self._length, heads, scale, window, softcap, merged=bool(self.shared)
        )
        name = window, heads * width
        if name not in self._launched:
            pairs = 4 * heads * width * (self._held + 1 if window is None else np.minimum(self._held + 1, window))
            self._launched[name] = pairs, int(pairs.sum())
        flops, total = self._launched[name]
        if lse is not None:
            flops = flops.copy()
            q = qkv.view(self.n, -1, width)[:, :heads]
            attend_shared(self.shared, *self.arena.nodes[layer], q, out, lse, scale, window, softcap, flops)
            out, total = out.to(qkv.dtype), int(flops.sum())
        self.flops_of += flops
        self.flops += total
        return out.view(self.n, -1)

    def _alone(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """Nothing to merge: q [n, Hk, groups, D], k [n, Hk, S, D], v [n, Hk, S, Dv] -> [n, H, Dv].

        In float32 two batched products beat the stock kernel (2x on short rows); in half precision they would round the
        scores, and the stock kernel is the faster.
        """
        n, kv_heads, groups, _ = q.shape
        bias = self._additive(window, kv_heads, groups, q.dtype)
        if q.dtype != torch.float32 or q.device.type != "cpu":
            return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).flatten(1, 2)
        scores = torch.baddbmm(bias.flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=scale)
        return torch.bmm(torch.softmax(scores, -1), v.flatten(0, 1)).view(n, kv_heads * groups, -1)
