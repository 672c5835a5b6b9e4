"""Small real things on disk: model folders with tokenizers, rows, recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + ('<|end|>' if m['role'] == 'assistant' else '') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level, no merges: 256 bytes and five special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    made.chat_template = template
    return made


def model_folder(folder: Path, family: str = "llama", seed: int = 0, template: str | None = TEMPLATE, **changes: Any) -> Path:
    """A tiny random model with its tokenizer, as a Hugging Face folder."""
    words = tokenizer(template)
    torch.manual_seed(seed)
    options = SMALL | {"vocab_size": len(words), "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id, "bos_token_id": None} | changes
    if family == "gemma3":
        options |= {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
    config = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma3": Gemma3TextConfig}[family](**options)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, safe_serialization=True)
    words.save_pretrained(folder)
    return folder


def rows_file(path: Path, rows: int = 48) -> Path:
    """Prompt-completion rows that can be learned: repeat the word."""
    with open(path, "w", encoding="utf-8") as out:
        for i in range(rows):
            word = "".join("abcdefgh"[(i * 7 + j * 3 + i // 8) % 8] for j in range(3 + i % 4))
            out.write(json.dumps({"prompt": f"say {word}", "completion": word}) + "\n")
    return path
