"""Tiny policies to sample from: random models with a tokenizer of one printable character a token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from burnish.models.policy import Policy
from tests.forest.tiny import tiny

EOS = 2


class Letters:
    """Token i is the character chr(33 + i); the end token is special."""

    def __init__(self, eos_token_id: int | None = EOS) -> None:
        self.eos_token_id = eos_token_id

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True, **_: Any) -> str:
        return "".join(chr(33 + i) for i in ids if not (skip_special_tokens and i == self.eos_token_id))


def policy(name: str, *, endless: bool = False, **more: Any) -> Policy:
    """A tiny random policy; `endless`: without a token that ends a row."""
    if endless:
        more["eos_token_id"] = None
    model = tiny(name, **more)
    if endless and getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
    return Policy(model, Letters(None if endless else EOS))


@cache
def reference(name: str) -> PreTrainedModel:
    """The same weights under the model's own attention, masks and cache: what the engine is held against."""
    return tiny(name)


def prompts(count: int, shortest: int = 1, longest: int = 40, seed: int = 0) -> list[tuple[int, ...]]:
    """Ragged random prompts without the end token, windows of the tiny models being 7."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [tuple(torch.randint(3, 97, (n,), generator=generator).tolist()) for n in lengths]


@cache
def generated(name: str, count: int, new_tokens: int) -> list[tuple[int, ...]]:
    """What transformers' own greedy `generate` says to each of `prompts(count)`, one prompt at a time."""
    model, out = reference(name), []
    for ids in prompts(count):
        given = torch.tensor([ids])
        with torch.no_grad():
            whole = model.generate(
                given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=new_tokens
            )
        out.append(tuple(whole[0, len(ids) :].tolist()))
    return out


def own_logprobs(name: str, path: Sequence[int], first: int) -> list[float]:
    """Log-probabilities of path[first:] by one plain forward of the model itself."""
    with torch.no_grad():
        logits = reference(name)(torch.tensor([path]), use_cache=False).logits[0].float()
    rows = logits[first - 1 : len(path) - 1].log_softmax(-1)
    return rows.gather(1, torch.tensor(path[first:])[:, None])[:, 0].tolist()
