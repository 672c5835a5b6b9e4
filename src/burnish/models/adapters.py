"""Adapters through peft: added, checked and merged. A merge that changes nothing or changes the logits is an error."""

from __future__ import annotations

from typing import Any, Literal

import torch

from burnish.core.errors import ConfigError, MachineError
from burnish.core.table import About, Table
from burnish.models.fused import fuse_adapters
from burnish.models.policy import Policy


def lora(
    policy: Policy,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: Literal["all_linear"] | list[str] = "all_linear",
    save: Literal["adapter", "merged"] = "adapter",
) -> Policy:
    """Low-rank adapters on linear layers: W + (alpha / rank) B A, B = 0 at the start (eq. 3, arXiv:2106.09685).

    `save` says what the stage's model folder holds: the PEFT adapter, or the merged model in HF layout.
    Raises ConfigError when `targets` names no module of this model.
    """
    from peft import LoraConfig, get_peft_model

    if policy.adapted:
        raise ConfigError("the model already has an adapter", where="adapter", remedy="start from the merged model")
    modules: Any = "all-linear" if targets == "all_linear" else list(targets)
    whole: Any = int(alpha) if float(alpha).is_integer() else alpha  # as peft itself would write it
    config = LoraConfig(r=rank, lora_alpha=whole, lora_dropout=dropout, target_modules=modules, bias="none", task_type="CAUSAL_LM")
    try:
        model = get_peft_model(policy.model, config)  # type: ignore[arg-type]
    except ValueError as error:
        names = sorted({n.rsplit(".", 1)[-1] for n, m in policy.model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise ConfigError(
            f"targets {targets!r} match no linear layer: {str(error).splitlines()[0]}",
            where="adapter.targets",
            remedy=f"this model has {', '.join(names)}",
        ) from error
    fuse_adapters(model)
    adapted = Policy(model, policy.tokenizer, source=policy.source, probe=False)
    adapted.logit_map, adapted.why_not_shared, adapted.router = policy.logit_map, policy.why_not_shared, policy.router
    adapted.decisions, adapted.version = policy.decisions, policy.version
    return adapted


ADAPTERS = Table("adapter", {"lora": lora}, about={"lora": About(taxonomy=("E13",), paper="arXiv:2106.09685", year=2021)})


def probe_logits(model: Any, vocabulary: int) -> torch.Tensor:
    """Logits [8, V] of a fixed short prompt, in fp32."""
    ids = (torch.arange(8, device=next(model.parameters()).device)[None] * 7 + 3) % vocabulary
    with torch.no_grad():
        if hasattr(model, "config") and getattr(model.config, "_attn_implementation", "") == "burnish_forest":
            from burnish.forest.attention import Forest
            from burnish.forest.stream import Layout

            plan = Forest(Layout((8,), (-1,)))
            return model(input_ids=ids, position_ids=torch.arange(8, device=ids.device)[None], plan=plan, use_cache=False).logits[0].float()
        return model(input_ids=ids, use_cache=False).logits[0].float()


def merge(policy: Policy) -> Policy:
    """The same policy with its adapter folded into the weights.

    Raises MachineError when the adapter's delta is zero everywhere (the merge would be a no-op) or when the merged logits
    differ from the adapted ones beyond the rounding of the weights' dtype.
    """
    if not policy.adapted:
        raise ConfigError("there is no adapter to merge", where=policy.source or "model")
    policy.train(False)
    vocabulary = policy.shape.vocabulary
    ups = [p for n, p in policy.model.named_parameters() if "lora_B" in n]
    if not any(bool(p.any()) for p in ups):
        raise MachineError(
            "every B of the adapter is zero: merging it would change nothing",
            where=policy.source or "adapter",
            remedy="was it trained? an untrained adapter equals its base model",
        )
    before = probe_logits(policy.model, vocabulary)
    model = policy.model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    merged = Policy(model, policy.tokenizer, source=policy.source, probe=False)
    merged.logit_map, merged.why_not_shared, merged.router = policy.logit_map, policy.why_not_shared, policy.router
    merged.decisions, merged.version = policy.decisions, policy.version + 1
    after = probe_logits(model, vocabulary)
    error = float((after - before).norm() / before.norm())
    limit = 1e-4 if policy.dtype in (torch.float32, torch.float64) else 5e-2
    if not error <= limit:
        raise MachineError(
            f"merged logits differ from adapted ones by {error:.1e} (limit {limit:.0e})",
            where=policy.source or "adapter",
            remedy="merge into an unquantised base in float32",
        )
    merged.requires_grad_(True)
    merged.decisions["merge"] = {"value": "merged", "why": f"logits agree to {error:.1e}", "measured": {"relative_error": error}}
    return merged
