"""A Llama-like model of random weights as a folder, seeded: what the suite measures where vocabulary or model are small.

    python -m benchmarks.random_model FOLDER [--shape 32k | small | tiny]

- `32k`: 87.5 M parameters, 10 layers, 768 wide, 12 query heads on 4 key-value heads, 32,000 tokens, tied embeddings, bf16.
- `small`: 4.7 M parameters, 5 layers, 256 wide, 4 query heads on 2 key-value heads, 4,096 tokens, likewise.
- `tiny`: 0.02 M parameters, for a smoke run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 32_768,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
}  # fmt: skip
TINY: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 4096,
}  # fmt: skip
SHAPES = {"32k": SHAPE, "small": SMALL, "tiny": TINY}


def build(folder: Path, shape: dict[str, Any]) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(**shape, **special, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, shape["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="32k")
    asked = parser.parse_args()
    build(asked.folder, SHAPES[asked.shape])
