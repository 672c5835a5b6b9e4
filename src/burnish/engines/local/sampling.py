"""Drawing tokens from logits with noise that is a pure function of who draws, not of when or beside whom.

A token is argmax(z + Gumbel noise), which has the law softmax(z). The noise is a counter hash (splitmix64) of (seed,
item, sample, position, lane): equal logits give equal tokens in any batch and any order, and logits that differ by
rounding change a token about as often as their total variation (an inverse distribution function: ten times as often).

Axes: n rows, v vocabulary, b blocks of w tokens (large vocabularies are drawn in two levels: the block, then the token
in it, Gumbel at both, which needs b + w numbers a row instead of v).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from burnish.core.records import Sampling
from burnish.maths.head import IDENTITY, LogitMap
from burnish.maths.kernels import Kernels, kernels_for

TWO_LEVELS_FROM = 4096
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SECOND_LEVEL = 1 << 32  # lanes of the second level start here
_TILE = 2**20  # logits worked on at once on a CPU: 4 MB stay in cache between the passes


def _signed(x: int) -> int:
    x &= 2**64 - 1
    return x - 2**64 if x >= 2**63 else x


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser, in place, on int64 read as unsigned: shifts are made logical by a mask, products wrap."""
    for shift, factor in ((30, _MIX1), (27, _MIX2), (31, None)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1))
        if factor is not None:
            x.mul_(_signed(factor))
    return x


def row_keys(seed: int, keys: Sequence[tuple[int, int]]) -> np.ndarray:
    """One int64 a row for (seed, item, sample): the hash of the three, chained."""
    if not keys:
        return np.zeros(0, np.int64)
    columns = torch.tensor([[_signed(item), _signed(sample)] for item, sample in keys], dtype=torch.int64)
    state = _mix(torch.full((len(keys),), _signed(seed + _GOLDEN), dtype=torch.int64))
    for column in columns.T:
        state = _mix((state ^ column).add_(_signed(_GOLDEN)))
    return state.numpy()


def gumbel(key: Tensor, position: Tensor, lanes: int, first_lane: int = 0) -> Tensor:
    """Standard Gumbel noise [n, lanes] in float32 for rows with `key` [n] about to draw the token at `position` [n].

    E = -log1p(-u) is exponential and -log E Gumbel; small u, which decide who wins, keep their relative precision.
    """
    state = _mix(key + position * _signed(_GOLDEN))
    lane = torch.arange(first_lane, first_lane + lanes, device=key.device) * _signed(_GOLDEN)
    bits = _mix(state[:, None] + lane)
    uniform = bits.bitwise_and_(2**63 - 1).to(torch.float32).add_(0.5).mul_(2.0**-63)
    return uniform.clamp_max_(1 - 2**-24).neg_().log1p_().neg_().log_().neg_()


def _blocks(vocabulary: int) -> tuple[int, int]:
    """Tokens of a block, a power of two near the square root, and whole blocks; what is left is a last, short one."""
    width = 1 << (round(vocabulary**0.5) - 1).bit_length()
    return width, vocabulary // width


def _largest(z: Tensor, k: int) -> Tensor:
    """[n, k] the k largest of each row, descending. The k blocks with the largest maxima hold the k largest tokens."""
    vocabulary = z.shape[-1]
    if 4 * k > vocabulary:
        return z.sort(-1, descending=True).values[:, :k]
    width, whole = _blocks(vocabulary)
    if vocabulary < TWO_LEVELS_FROM or 4 * k > whole:
        return z.topk(k).values
    blocks = z[:, : whole * width].unflatten(-1, (whole, width))
    chosen = blocks.amax(-1).topk(k).indices
    inside = blocks.gather(1, chosen[..., None].expand(-1, -1, width)).flatten(1)
    return torch.cat([inside, z[:, whole * width :]], -1).topk(k).values


def floor_of(z: Tensor, top_k: int, top_p: float) -> Tensor:
    """[n, 1] the least tempered logit that may be drawn: top-k first, then the smallest set of mass top-p of those left.

    Tokens that tie with the last one kept are kept, so that no order among equals is invented.
    """
    n, vocabulary = z.shape
    k = min(top_k, vocabulary) or vocabulary
    if top_p >= 1.0:
        return _largest(z, k)[:, -1:]
    everything = None if top_k else z.logsumexp(-1, keepdim=True)
    floor = z.new_empty(n, 1)
    open_rows = torch.arange(n, device=z.device)
    candidates = k if top_k else min(64, vocabulary)
    while len(open_rows):
        best = _largest(z if len(open_rows) == n else z[open_rows], candidates)
        total = best.logsumexp(-1, keepdim=True) if everything is None else everything[open_rows]
        mass = (best - total).exp_()
        before = mass.cumsum(-1).sub_(mass)
        last = (before < top_p).sum(-1, keepdim=True).clamp_min_(1) - 1
        reached = (before[:, -1] >= top_p) | (candidates == k)
        floor[open_rows[reached]] = best.gather(-1, last)[reached]
        open_rows = open_rows[~reached]
        candidates = 4 * candidates if 16 * candidates < k else k
    return floor


def _one_level(z: Tensor, key: Tensor, position: Tensor, rows: Tensor) -> Tensor:
    return gumbel(key, position, z.shape[-1]).add_(z[rows]).argmax(-1)


def _two_levels(z: Tensor, key: Tensor, position: Tensor, rows: Tensor) -> Tensor:
    vocabulary = z.shape[-1]
    width, whole = _blocks(vocabulary)
    masses = [z[:, : whole * width].unflatten(-1, (whole, width)).logsumexp(-1)]
    if whole * width < vocabulary:
        masses.append(z[:, whole * width :].logsumexp(-1, keepdim=True))
    mass = torch.cat(masses, -1)[rows]
    block = gumbel(key, position, mass.shape[-1]).add_(mass).argmax(-1)
    token = block[:, None] * width + torch.arange(width, device=z.device)
    inside = z[rows[:, None], token.clamp_max(vocabulary - 1)].masked_fill_(token >= vocabulary, -torch.inf)
    return block * width + gumbel(key, position, width, _SECOND_LEVEL).add_(inside).argmax(-1)


def draw(
    head: Tensor, sampling: Sampling, key: Tensor, position: Tensor, logit_map: LogitMap = IDENTITY, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """tokens [m] and their log-probabilities [m] under the model itself: temperature 1, nothing cut away.

    head [n, v]: what the head's linear gives, in any precision; may be overwritten. key, position [m] int64; rows [m]:
    the row each draws from, ascending (None: one draw a row). On a CPU rows are converted, mapped and drawn from a few
    at a time, as many as stay in cache.
    """
    rows = torch.arange(len(head), device=head.device) if rows is None else rows
    kernels = kernels_for(head.dtype, head.device.type)
    cut_away = sampling.temperature > 0 and (sampling.top_k or sampling.top_p < 1.0 or sampling.min_p)
    if kernels is not None and head.shape[-1] >= TWO_LEVELS_FROM and not cut_away:
        return _draw_by_blocks(kernels, head.contiguous(), sampling, key, position, logit_map, rows)
    if kernels is not None and sampling.temperature > 0 and not cut_away:
        return kernels.draw(logit_map.overwrite(head.float()).contiguous(), rows, key, position, sampling.temperature)
    step = max(1, _TILE // head.shape[-1]) if head.device.type == "cpu" else len(head)
    if step >= len(head):
        return _draw(logit_map.overwrite(head.float()), sampling, key, position, rows)
    cuts = torch.searchsorted(rows, torch.arange(0, len(head) + step, step, device=rows.device)).tolist()
    parts = [
        _draw(logit_map.overwrite(head[i * step : (i + 1) * step].float()), sampling, key[a:b], position[a:b], rows[a:b] - i * step)
        for i, (a, b) in enumerate(pairwise(cuts))
        if b > a
    ]
    return torch.cat([t for t, _ in parts]), torch.cat([x for _, x in parts])


def _draw_by_blocks(
    kernels: Kernels, head: Tensor, sampling: Sampling, key: Tensor, position: Tensor, logit_map: LogitMap, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Two levels, reading the vocabulary once: the blocks' sums, then the tokens of one block."""
    vocabulary, heat = head.shape[-1], sampling.temperature
    width, _ = _blocks(vocabulary)
    cool = LogitMap(logit_map.scale, logit_map.softcap)
    own, warm = kernels.block_lse(head, width, cool.scale, cool.softcap, heat or 1.0)
    if heat == 0:
        token = head.argmax(-1)[rows]
        return token, cool(head[rows, token].float()) - own.logsumexp(-1)[rows]
    return kernels.draw_blocks(head, width, cool.scale, cool.softcap, heat, own, warm, rows, key, position, _SECOND_LEVEL)


def _draw(logits: Tensor, sampling: Sampling, key: Tensor, position: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    total = logits.logsumexp(-1)
    if sampling.temperature == 0:
        token = logits.argmax(-1)[rows]
    else:
        z = logits if sampling.temperature == 1.0 else logits / sampling.temperature
        if sampling.top_k or sampling.top_p < 1.0:
            z = z.masked_fill(z < floor_of(z, sampling.top_k, sampling.top_p), -torch.inf)
        if sampling.min_p:
            z = z.masked_fill(z < z.amax(-1, keepdim=True) + math.log(sampling.min_p), -torch.inf)
        token = (_two_levels if z.shape[-1] >= TWO_LEVELS_FROM else _one_level)(z, key, position, rows)
    return token, logits[rows, token] - total[rows]
