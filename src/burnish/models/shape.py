"""ModelShape from a live model: what the FLOP formulas need, read off its modules rather than its name."""

from __future__ import annotations

import torch
from torch import nn

from burnish.core.records import ModelShape


def windows_of(config: object, layers: int) -> tuple[int | None, ...]:
    """The sliding window of every layer, None for full attention."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        sliding = window is not None and getattr(config, "use_sliding_window", True)
        return (window if sliding else None,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def shape_of(model: nn.Module, body: nn.Module, head: nn.Module) -> ModelShape:
    """model: the (possibly adapted) causal LM; body: its text decoder; head: its output embedding.

    Mixtures of experts store experts as [experts, in, out] tensors: a token passes through `num_experts_per_tok` of them.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    adapters = sum(p.numel() for n, p in body.named_parameters() if "lora_" in n)
    matrices = 0
    for name, module in body.named_modules():
        if "lora_" in name or isinstance(module, nn.Embedding):
            continue
        for p_name, p in module.named_parameters(recurse=False):
            if p.ndim == 2 and p_name == "weight" and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
                matrices += p.numel()
            elif p.ndim == 3:
                experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", p.shape[0])
                matrices += p.numel() * int(getattr(config, "num_experts_per_tok", experts)) // int(experts)
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    layers = int(config.num_hidden_layers)
    head_weight = getattr(head, "weight", None)
    trained = "adapter" if any("lora_" in n for n, _ in model.named_parameters()) else "full"
    return ModelShape(
        layers=layers,
        hidden=int(config.hidden_size),
        vocabulary=int(head_weight.shape[0]) if isinstance(head_weight, torch.Tensor) else int(config.vocab_size),
        query_heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        key_width=width,
        value_width=int(getattr(config, "v_head_dim", None) or width),
        body_parameters=matrices,
        parameters=sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n),
        windows=windows_of(config, layers),
        adapter_parameters=adapters,
        trained=trained,
        head_trained=bool(isinstance(head_weight, nn.Parameter) and head_weight.requires_grad),
    )
