"""What the bundled model's files promise the tasks and recipes. What the model can do is in its card."""

import json
import random
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from burnish.core.records import Example, Message
from burnish.data.chat import ChatFormat
from burnish.data.tasks.base import Task
from burnish.data.tasks.table import TASKS

SPARK = Path(str(resources.files("burnish") / "assets" / "spark"))


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SPARK)


def ids(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_files_are_small_readable_by_all_and_hold_nothing_executable() -> None:
    assert (SPARK / "model.safetensors").stat().st_size < 4_000_000
    assert {p.suffix for p in SPARK.iterdir()} <= {".safetensors", ".json", ".jinja", ".md"}
    assert all(p.stat().st_mode & 0o444 == 0o444 for p in SPARK.iterdir())


def test_the_model_is_the_one_the_design_names() -> None:
    config = json.loads((SPARK / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"], config["max_position_embeddings"]) == ("qwen3", 128, 256)
    assert 4 <= config["num_hidden_layers"] <= 6 and config["tie_word_embeddings"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["vocab_size"] == len(tokenizer()) <= 512
    with safe_open(SPARK / "model.safetensors", "pt") as weights:
        tensors = [weights.get_slice(name) for name in weights.keys()]  # noqa: SIM118
        assert {tensor.get_dtype() for tensor in tensors} == {"BF16"}
        sizes = [tensor.get_shape() for tensor in tensors]
    parameters = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in sizes)
    assert 800_000 <= parameters <= 1_500_000


@pytest.mark.parametrize(
    "word", [*"0123456789", *"AZ+=:", "\n", "####", "<think>", "</think>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
)  # fmt: skip
def test_what_structure_is_made_of_is_one_token(word: str) -> None:
    assert len(ids(word)) == 1
    assert len(ids(word + word)) == 2


def test_only_the_roles_and_the_ends_are_control_so_that_rows_may_hold_steps_and_marks() -> None:
    assert set(tokenizer().all_special_tokens) == {
        "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"
    }  # fmt: skip
    assert tokenizer().decode(ids("1+2=3\n####3"), skip_special_tokens=True) == "1+2=3\n####3"


@pytest.mark.parametrize("text", ["Path from A to B: AB  CD\n\n x", "caf\u00e9 \u6f22 \U0001f600", " 12  34 ", "<|user|>typed"])
def test_any_text_survives(text: str) -> None:
    assert tokenizer().decode(ids(text)) == text


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_rows_fit_the_context_and_the_template_adds_three_tokens(task: Task) -> None:
    chat = ChatFormat(tokenizer())
    rng = random.Random(0)
    for level in task.levels:
        for _ in range(50):
            item = task.make(level, rng)
            example = Example((Message("user", item.question),), (Message("assistant", item.rationale),))
            row = chat.render(example, lambda _: [False, True])
            assert len(row.ids) == len(ids(item.question)) + len(ids(item.rationale)) + 3 <= 256
            assert sum(row.trained) <= 48
            assert row.ids[-1] == tokenizer().eos_token_id and row.trained[-1]
            assert row.ids[: len(row.ids) - sum(row.trained)] == chat.prompt([Message("user", item.question)])
