"""The KL of whole distributions between two heads over the same states; the logits of both exist a chunk at a time.

Axes: n head rows, v vocabulary, h hidden. With p and q the distributions of the first and the second head and y the
logits of the first:

    KL(p || q) = sum_v p_v (log p_v - log q_v),        d KL / d y_v = p_v (log p_v - log q_v - KL)

`maths.head` takes objectives of the labels' log-probs; this one speaks of every token of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.core.errors import ConfigError
from burnish.maths.head import IDENTITY, LOGITS_BYTES, TILE, TILE_ELSEWHERE, Formed, LogitMap, add_product, even_parts

if TYPE_CHECKING:
    from jaxtyping import Float

_WIDE_COPIES = 6  # tensors of a chunk's logits that stand at once, four bytes a number


@dataclass(frozen=True)
class Head:
    """hidden [n, h] and the linear map of a head: weight [v, h], bias [v]. Two heads of one vocabulary may differ in h."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_map: LogitMap = IDENTITY

    def logprobs(self, rows: slice, wide: torch.dtype) -> tuple[Float[Tensor, "n v"], Tensor | float]:
        """Of all tokens in these rows, and the map's slope there."""
        y = self.logit_map(F.linear(self.hidden[rows], self.weight, self.bias).to(wide))
        return y.log_softmax(-1), self.logit_map.slope(y)


def head_kl(
    own: Head, other: Head, scale: Float[Tensor, "n"], *, rows: int | None = None, sink: Float[Tensor, "v h"] | None = None
) -> tuple[Float[Tensor, ""], Float[Tensor, "n"]]:
    """sum_n scale_n KL(own_n || other_n), with a graph to own's hidden, weight and bias, and the KL of each row, detached.

    Gradients are formed here and returned from the backward, as `maths.head.head_loss` does it; see there for `sink`.
    `scale` is fixed. A chunk is at most `rows` rows (None: 256 MiB of everything that is as wide as the vocabulary).
    A token that own gives no mass adds nothing. Raises ConfigError where vocabularies or rows do not fit.
    """
    n, vocabulary = len(own.hidden), len(own.weight)
    if len(other.hidden) != n or len(other.weight) != vocabulary or len(scale) != n:
        given = f"{n} rows of {vocabulary} tokens, {len(other.hidden)} of {len(other.weight)} and {len(scale)} scales"
        raise ConfigError(f"{given}, wanted the same rows and vocabulary", where="head_kl")
    inputs = own.hidden, own.weight, own.bias
    grad = torch.is_grad_enabled()
    wanted = [grad and x is not None and x.requires_grad for x in inputs]
    wide = torch.promote_types(own.weight.dtype, torch.float32)
    limit = rows or max(1, LOGITS_BYTES // (_WIDE_COPIES * 4 * vocabulary))
    parts = even_parts(slice(0, n), limit) if n else []
    tile = TILE.get(own.weight.device.type, TILE_ELSEWHERE)
    with torch.no_grad():
        scale = scale.to(own.hidden.device, wide)
        kl = scale.new_empty(n)
        d_hidden = torch.zeros_like(own.hidden) if wanted[0] else None
        late = sink is not None and len(parts) == 1
        d_weight = own.weight.new_zeros(own.weight.shape, dtype=wide) if wanted[1] and not late else None
        d_bias = scale.new_zeros(vocabulary) if wanted[2] else None
        deferred: tuple[Tensor, Tensor] | None = None
        for part in parts:
            logp, slope = own.logprobs(part, wide)
            gap = logp - other.logprobs(part, wide)[0]
            p = logp.exp_()
            gap = torch.where(p > 0, gap, 0.0)
            kl[part] = (p * gap).sum(-1)
            if not any(wanted):
                continue
            d = p.mul_(gap.sub_(kl[part, None])).mul_(scale[part, None]).mul_(slope)
            z = d.to(own.weight.dtype)
            if d_bias is not None:
                d_bias += d.sum(0)
            if d_hidden is not None:
                d_hidden[part] = z @ own.weight
            if d_weight is not None:
                add_product(d_weight, z, own.hidden[part], False, tile)
            elif wanted[1]:
                deferred = z, own.hidden[part]
        loss = (scale * kl).sum()
        if not any(wanted):
            return loss, kl
        if d_weight is not None and sink is None:
            d_weight = d_weight.to(own.weight.dtype)
        gradients = d_hidden, d_weight, None if d_bias is None else d_bias.to(own.weight.dtype)
    return cast(Any, Formed).apply(loss, gradients, deferred, sink if wanted[1] else None, *inputs), kl


def kl_flops(rows: int, vocabulary: int, hidden: int, other_hidden: int, *, weight_trained: bool) -> int:
    """Of the matrix products: both heads' logits, the gradient of the rows, that of a trained weight."""
    return 2 * rows * vocabulary * ((2 + weight_trained) * hidden + other_hidden)
