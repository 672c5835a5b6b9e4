"""Whether a model's own training loss has a router term, and that term for a packed micro-batch.

It is a property of the model and not of the method: a mixture of experts whose configuration says
`output_router_logits: true` and gives a `router_aux_loss_coef` that is not zero adds

    router_aux_loss_coef * load_balancing(router logits)

to whatever it is trained on, as transformers does for the same configuration. With `output_router_logits: false`
(the default of every such configuration) there is no term, whatever the coefficient.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (torch and transformers ship partial stubs)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from burnish.core.errors import ConfigError, MachineError
from burnish.forest.pack import Micro
from burnish.maths.routing import load_balancing


@dataclass(frozen=True)
class Router:
    """The term's coefficient, and how many experts a token is sent to."""

    coefficient: float
    top_k: int

    def loss(self, router_logits: Sequence[Tensor], hidden: Tensor, micro: Micro) -> Tensor:
        """coefficient * share * load_balancing of this micro-batch: a scalar with a graph.

        Each token weighs as many tokens as sequences run through it, so a packed tree pays what its separate rows pay.
        The term is e * <f, P>, a product of two means over tokens, and does not add up over micro-batches: each
        micro-batch balances itself and weighs its share of the optimiser batch's tokens. The shares add up to one, so
        one micro-batch gives transformers' value, micro-batches that route alike give it under every split, and others
        a mean of their own values; how many micro-batches there are does not change the size of the term.

        Raises ConfigError where the hidden rows carry a gradient and none of the router logits [T, e] does: reentrant
        checkpointing records them without one, and the term would change the loss and train nothing.
        """
        if hidden.requires_grad and not any(x.requires_grad for x in router_logits):
            raise ConfigError(
                "the router's loss reaches nothing that is trained",
                where="router_aux_loss_coef",
                remedy="use checkpointing that is not reentrant, or set output_router_logits to false in config.json",
            )
        value = load_balancing(router_logits, micro.stream.layout.paths, top_k=self.top_k)
        return self.coefficient * micro.share * value


def find_router(base: Any, body: torch.nn.Module) -> Router | None:
    """None where the model's own loss has no router term. The formula is checked against the model's own value.

    Raises MachineError where the configuration asks for the term and the model computes none, or another one.
    """
    config = base.config.get_text_config()
    coefficient = getattr(base, "router_aux_loss_coef", None) or getattr(config, "router_aux_loss_coef", None)
    if not getattr(config, "output_router_logits", False) or not coefficient:
        return None
    device = next(base.parameters()).device
    ids = torch.arange(3, 19, device=device)[None] % config.vocab_size
    with torch.no_grad():
        own = getattr(base(input_ids=ids, output_router_logits=True, use_cache=False), "aux_loss", None)
        logits = getattr(body(input_ids=ids, output_router_logits=True, use_cache=False), "router_logits", None)
    top_k = int(getattr(config, "num_experts_per_tok", None) or 0)
    remedy = "set output_router_logits to false in its config.json to train without the term"
    if own is None or not logits or not top_k:
        raise MachineError(
            "its configuration asks for a router loss, which the model does not compute", where=type(base).__name__, remedy=remedy
        )
    ours = float(load_balancing(logits, torch.ones(ids.shape[1]), top_k=top_k))
    if abs(ours - float(own)) > 1e-3 * abs(float(own)):
        raise MachineError(
            f"its router loss is {float(own):.6g} where load balancing gives {ours:.6g}", where=type(base).__name__, remedy=remedy
        )
    return Router(float(coefficient), top_k)
