"""What a mixture of experts pays for uneven routing. Axes: t tokens, e experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def load_balancing(
    router_logits: Sequence[Float[Tensor, "t e"]], weight: Float[Tensor, "t"], *, top_k: int
) -> Float[Tensor, ""]:
    """Load-balancing loss of the routers of all layers, pooled over the layers as transformers does.

    loss = e * sum_j f_j P_j,   f_j = sum_lt w_t [j in top_k(p_lt)] / (L sum_t w_t),   P_j = sum_lt w_t p_ltj / (L sum_t w_t)
    with p_lt = softmax(router_logits[l][t]), L layers      (eqs. 4-6, arXiv:2101.03961; top_k = 1, L = 1, w = 1 there)

    top_k where routing is even (each f_j = top_k / e), more where the experts chosen often are also those of high
    probability. Only P carries a gradient: a count has none. A token of weight w counts as w equal tokens. The paper
    adds up one such product a layer; here both factors are means over the layers first.
    """
    experts = router_logits[0].shape[-1]
    wide = torch.promote_types(router_logits[0].dtype, torch.float32)
    weight = weight.to(device=router_logits[0].device, dtype=wide)
    share = weight / (len(router_logits) * weight.sum())
    chosen, mean = (torch.zeros(experts, dtype=wide, device=weight.device) for _ in range(2))
    for logits in router_logits:
        probability = logits.to(weight.device).softmax(-1, dtype=wide)
        best = probability.topk(top_k, dim=-1).indices
        chosen = chosen.index_add(0, best.flatten(), share.repeat_interleave(top_k))
        mean = mean + share @ probability
    return experts * (chosen * mean).sum()
