"""Tiny random models of many architectures: hidden 32, 4 query heads on 2 key-value heads, a vocabulary of 97.

`tiny("gemma3")` is a causal language model in eval mode with `eager` attention. Windows are 7 tokens, so that short test
rows are longer than them. Weights are a function of the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
    Starcoder2Config,
)

VOCABULARY = 97
WINDOW = 7
ALTERNATE = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _config(kind: Callable[..., PreTrainedConfig], **own: Any) -> Callable[..., PreTrainedConfig]:
    return lambda **more: kind(**{**_SIZES, **own, **more})


ARCHITECTURES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": _config(LlamaConfig, num_hidden_layers=2),
    "qwen3": _config(Qwen3Config, num_hidden_layers=2, head_dim=8),
    "gemma3": _config(
        Gemma3TextConfig,
        num_hidden_layers=4,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        layer_types=ALTERNATE,
    ),
    "gemma2": _config(
        Gemma2Config,
        num_hidden_layers=4,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        layer_types=ALTERNATE,
        attn_logit_softcapping=1.5,
    ),
    "gpt_oss": _config(
        GptOssConfig,
        num_hidden_layers=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=ALTERNATE,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "mistral": _config(MistralConfig, num_hidden_layers=2, head_dim=8, sliding_window=WINDOW),
    "mixtral": _config(MixtralConfig, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _config(
        Qwen3MoeConfig,
        num_hidden_layers=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
    ),
    "qwen2": _config(Qwen2Config, num_hidden_layers=2),
    # full layers first, sliding ones from the third on
    "qwen2_sliding": _config(
        Qwen2Config, num_hidden_layers=4, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
    "phi3": _config(Phi3Config, num_hidden_layers=2, sliding_window=WINDOW),
    "olmo2": _config(Olmo2Config, num_hidden_layers=2),
    "granite": _config(
        GraniteConfig,
        num_hidden_layers=2,
        attention_multiplier=0.2,
        residual_multiplier=0.5,
        embedding_multiplier=3.0,
        logits_scaling=4.0,
    ),
    "smollm3": _config(SmolLM3Config, num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0]),
    "cohere2": _config(
        Cohere2Config, num_hidden_layers=4, head_dim=8, sliding_window=WINDOW, layer_types=ALTERNATE, logit_scale=0.25
    ),
    "gpt_neox": _config(GPTNeoXConfig, num_hidden_layers=2),
    "starcoder2": _config(
        Starcoder2Config,
        num_hidden_layers=2,
        sliding_window=WINDOW,
        residual_dropout=0.0,
        embedding_dropout=0.0,
        attention_dropout=0.0,
    ),
    # rotary frequencies that change for a whole call once one row is longer than 16 tokens
    "longrope": _config(
        Phi3Config,
        num_hidden_layers=2,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
        },
    ),
    # these cannot share a prefix
    "bloom": lambda **more: BloomConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, **more}
    ),
    "falcon": _config(FalconConfig, num_hidden_layers=2, alibi=True, new_decoder_architecture=False),
    "mamba": lambda **more: MambaConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, **more}
    ),
    "lfm2": _config(Lfm2Config, num_hidden_layers=4, layer_types=["conv", "full_attention", "conv", "full_attention"]),
    "qwen3_next": _config(
        Qwen3NextConfig,
        num_hidden_layers=4,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        decoder_sparse_step=1,
    ),
    "llama4": _config(
        Llama4TextConfig,
        num_hidden_layers=4,
        head_dim=8,
        intermediate_size_mlp=48,
        attention_chunk_size=8,
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
}

PADDED = ("bloom", "falcon", "mamba", "lfm2", "qwen3_next", "llama4")
"""Cannot share a prefix: biases by distance, states, convolutions, linear attention, chunks."""
SHARE = tuple(name for name in ARCHITECTURES if name not in (*PADDED, "longrope"))
"""Share prefixes; longrope does too, until one row changes the rotation of the others."""


def tiny(
    name: str, *, seed: int = 0, attention: str = "eager", dtype: torch.dtype = torch.float32, **more: Any
) -> PreTrainedModel:
    """The architecture `name` with random weights; `more` overrides configuration fields.

    Norm weights and biases are moved off their 1 and 0 so that every parameter matters. Experts run one by one, because
    the grouped product takes no doubles.
    """
    torch.manual_seed(seed)
    config = ARCHITECTURES[name](**more)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(6)  # 0.02 makes attention nearly uniform, and a wrong mask nearly harmless
    return model.to(dtype).eval()


def body_of(model: PreTrainedModel) -> torch.nn.Module:
    """The text decoder, whose output is `last_hidden_state` (Llama-4 calls the whole model its own decoder)."""
    decoder = model.get_decoder()
    return decoder.model if decoder is model else decoder
