"""A stream as separate padded rows under the model's own attention: the second oracle, and the fallback.

Every root-to-leaf path is a row, right-padded, with an attention mask and its own positions; hidden rows are gathered
back into stream order. A shared segment is computed once a path and taken from the first, so its tokens, and their
share of the gradient through other paths, agree with the forest only up to rounding. Works for every causal model:
also those that cannot share a prefix (state-space, linear attention, convolution, chunks, ALiBi).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from burnish.core.errors import ConfigError
from burnish.forest.attention import NAME, rotation_limit
from burnish.forest.stream import Layout, Stream


def padded_hidden(body: torch.nn.Module, stream: Stream, *, token_budget: int = 16384) -> Tensor:
    """Hidden rows [T, H] in stream order, differentiable. At most `token_budget` positions, padding included, a call.

    Raises ConfigError where the body is set to forest attention: that would discard the padding mask in silence.
    """
    return padded_outputs(body, stream, token_budget=token_budget)[0]


def padded_outputs(
    body: torch.nn.Module, stream: Stream, *, router_logits: bool = False, token_budget: int = 16384
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`padded_hidden`, and where they are asked for the router logits of each routed layer, [T, experts] in stream order.

    Raises ConfigError where the body is set to forest attention: that would discard the padding mask in silence.
    """
    config = getattr(body, "config", None)
    if getattr(config, "_attn_implementation", None) == NAME:
        raise ConfigError(
            f"its attention is set to {NAME}, which takes no padding",
            where=f"padded rows of {type(body).__name__}",
            remedy='call model.set_attn_implementation("sdpa") first',
        )
    accepted = inspect.signature(body.forward).parameters
    layout, tokens = stream.layout, stream.tokens.to(next(body.parameters()).device)
    rows = {leaf: layout.rows(leaf) for leaf in layout.leaves}
    limit = rotation_limit(config)
    if limit is not None and layout.longest > limit:
        token_budget = 1  # one row a call: a long one would change the others
    found: list[tuple[Tensor, ...]] = []
    place: dict[int, int] = {}  # of each path's first token among all computed positions
    computed = 0
    for leaves in _batches(layout, token_budget):
        width = max(len(rows[leaf]) for leaf in leaves)
        ids = tokens.new_zeros(len(leaves), width)
        mask = torch.zeros_like(ids)
        for r, leaf in enumerate(leaves):
            n = len(rows[leaf])
            ids[r, :n] = tokens[rows[leaf].to(tokens.device)]
            mask[r, :n] = 1
            place[leaf] = computed + r * width
        given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if router_logits:
            given["output_router_logits"] = True
        if "position_ids" in accepted:
            given["position_ids"] = torch.arange(width, device=ids.device).expand_as(ids)
        # no causal row sees what stands to its right: the mask is for models that build their biases from it
        if "attention_mask" in accepted and not bool(mask.all()):
            given["attention_mask"] = mask
        out = body(**given)
        routed = out.router_logits if router_logits else ()
        found.append((out.last_hidden_state.flatten(0, 1), *(x.reshape(-1, x.shape[-1]) for x in routed)))
        computed += ids.numel()
    taken = torch.full((layout.size,), -1)
    for leaf in layout.leaves:
        path = rows[leaf]
        new = taken[path] < 0
        taken[path[new]] = place[leaf] + torch.arange(len(path))[new]
    hidden, *routed = (torch.cat(parts).index_select(0, taken.to(tokens.device)) for parts in zip(*found))
    return hidden, tuple(routed)


def padded_positions(layout: Layout, *, token_budget: int = 16384) -> int:
    """Positions that `padded_hidden` runs through the body, padding and repeated prefixes included."""
    ends = [layout.first_position[i] + layout.length[i] for i in range(len(layout.length))]
    return sum(len(leaves) * max(ends[i] for i in leaves) for leaves in _batches(layout, token_budget))


def _batches(layout: Layout, token_budget: int) -> list[list[int]]:
    """Leaves by falling path length, cut so that rows times the longest stay in the budget (a longer row is alone)."""
    if token_budget < 1:
        raise ConfigError(f"{token_budget} tokens hold nothing", where="token_budget", remedy="give at least 1")
    end = {leaf: layout.first_position[leaf] + layout.length[leaf] for leaf in layout.leaves}
    batches: list[list[int]] = []
    for leaf in sorted(layout.leaves, key=lambda i: (-end[i], i)):
        if batches and (len(batches[-1]) + 1) * end[batches[-1][0]] <= token_budget:
            batches[-1].append(leaf)
        else:
            batches.append([leaf])
    return batches
