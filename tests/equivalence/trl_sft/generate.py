"""Make the fixture of this folder: what TRL's SFTTrainer does to a tiny model, number by number.

    .venv-peers/bin/python tests/equivalence/trl_sft/generate.py             write the fixture again
    .venv-peers/bin/python tests/equivalence/trl_sft/generate.py --check     compare a fresh run with what is committed

`make peers` makes the environment. The suite replays the fixture without TRL; README.md says what each file is.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES=""
)

import accelerate
import peft
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

HERE = Path(__file__).resolve().parent
VOCABULARY, ROWS, STEPS, MICRO_ROWS, MICROS = 128, 80, 20, 4, 2


@dataclass(frozen=True)
class Case:
    """`settings` differ from SFTConfig's defaults, beyond those of `arguments` that every case shares."""

    name: str
    model: str
    rows: str
    lora: bool
    settings: dict[str, Any] = field(default_factory=dict)
    random_lora_b: bool = False


CASES = (
    Case("full", "tied", "text", lora=False),
    Case("lora", "untied", "ids", lora=True),
    # At TRL's 2e-5 twenty steps hardly move a weight. These two go far, so that an error in a later step shows.
    Case("full_far", "untied", "ids", lora=False, settings={"learning_rate": 1e-3, "weight_decay": 0.1}),
    Case("lora_far", "tied", "text", lora=True, settings={"learning_rate": 5e-3}, random_lora_b=True),
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable ASCII character, for space and newline; <pad> and <eos>. 98 of the model's 128."""
    shown = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]  # how the byte-level alphabet writes space and newline
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<pad>", "<eos>", *shown])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def write_model(folder: Path, *, tied: bool) -> None:
    """A random Llama. Weights are five times wider than usual, so that attention is far from uniform."""
    words = tokenizer()
    torch.manual_seed(1 if tied else 2)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.1, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.7, 1.3)  # all ones would hide a norm that is not applied
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def text_rows() -> list[dict[str, str]]:
    """Prompt-completion text, which TRL tokenises itself: completions of 1 to 20 characters after prompts of 6 to 25."""
    draw, rows = random.Random(3), []
    for i in range(ROWS):
        word = "".join(draw.choices("abcdefgh", k=draw.randint(1, 20)))
        verb, answer = (("say", word), ("turn", word[::-1]))[i % 2]
        rows.append({"prompt": f"{verb} {word}:", "completion": answer if i % 5 else f" {answer}\n"})
    return rows


def id_rows() -> list[dict[str, list[int]]]:
    """Ids and masks with what text cannot ask for: two learned spans, a learned first token, one label, no end token."""
    draw, words, rows = random.Random(4), tokenizer(), []
    for i in range(ROWS):
        pieces: list[tuple[str, int]] = []
        for _ in range(1 + i % 3):
            word = "".join(draw.choices("stuvwxyz", k=draw.randint(1, 9)))
            pieces += [(f"{len(word)} {word}?", 0), (f"{word}<eos>", 1)]
        if i % 8 == 3:
            pieces = [(text, 1) for text, _ in pieces]
        if i % 8 == 5:
            pieces = [*pieces, ("\nbye", 0)]
        if i % 8 == 7:
            pieces[-1] = (pieces[-1][0].removesuffix("<eos>")[:1], 1)
        ids = [(token, learned) for text, learned in pieces for token in words(text)["input_ids"]]
        rows.append({"input_ids": [token for token, _ in ids], "completion_mask": [learned for _, learned in ids]})
    return rows


ROW_MAKERS = {"text": text_rows, "ids": id_rows}


def arguments(case: Case, output: str, attention: str) -> SFTConfig:
    """SFTConfig's defaults but for what makes the run small, fp32, in order and observable."""
    return SFTConfig(
        output_dir=output,
        max_steps=STEPS,
        per_device_train_batch_size=MICRO_ROWS,
        gradient_accumulation_steps=MICROS,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        seed=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"attn_implementation": attention},
        # None means "by the columns": text rows have prompt and completion, and get it. Tokenised rows do not, and their
        # completion_mask would be ignored without a word.
        completion_only_loss=None if case.rows == "text" else True,
        **case.settings,
    )


class Watched(SFTTrainer):
    """SFTTrainer that keeps what it sees. Nothing it computes is changed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.micros: list[dict[str, Any]] = []
        self.norms: list[float] = []
        self.first_gradient: dict[str, Tensor] = {}

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        seen = {key: inputs[key].tolist() for key in ("input_ids", "labels")}
        seen["lengths"] = inputs["attention_mask"].sum(1).tolist()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.micros.append(seen | {"loss": loss.item(), "items_in_batch": int(num_items_in_batch)})
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        if not self.first_gradient:
            self.first_gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        norm = super()._clip_grad_norm(model)
        self.norms.append(float(norm))
        return norm


def plain(name: str) -> str:
    """A tensor's name in a PEFT folder (LoRA) or in a model's folder."""
    return name.replace(".default.", ".")


def trained(model: Any) -> dict[str, Tensor]:
    return {plain(n): p.detach().clone().contiguous() for n, p in model.named_parameters() if p.requires_grad}


def train(case: Case, folder: Path, scratch: str, attention: str) -> dict[str, Any]:
    """Run TRL on one case: everything that is committed about it, tensors included."""
    source = folder / f"model_{case.model}"
    rows = ROW_MAKERS[case.rows]()
    adapter = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Watched(
        model=str(source),
        args=arguments(case, scratch, attention),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(source),
        peft_config=adapter if case.lora else None,
    )
    model = trainer.model
    if case.random_lora_b:
        torch.manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    initial = trained(model)
    adapter_config = model.peft_config["default"].to_dict() if case.lora else None
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == STEPS and len(trainer.micros) == STEPS * MICROS
    steps, batches = [], []
    for i, entry in enumerate(history):
        micros = trainer.micros[i * MICROS : (i + 1) * MICROS]
        assert entry["grad_norm"] == trainer.norms[i]
        label_tokens = sum(label != -100 for micro in micros for row in micro["labels"] for label in row[1:])
        assert {micro["items_in_batch"] for micro in micros} == {label_tokens}
        steps.append(
            {
                "step": i + 1,
                "loss": entry["loss"],
                "micro_losses": [micro["loss"] for micro in micros],
                "grad_norm": entry["grad_norm"],
                "learning_rate": entry["learning_rate"],
                "label_tokens": label_tokens,
                "entropy": entry["entropy"],
                "mean_token_accuracy": entry["mean_token_accuracy"],
            }
        )
        batches.append([{key: micro[key] for key in ("input_ids", "labels", "lengths")} for micro in micros])
    group = trainer.optimizer.param_groups[0]
    said = trainer.args
    return {
        "run": {
            "schema": 1,
            "case": case.name,
            "model": source.name,
            "rows": f"rows_{case.rows}.jsonl",
            "batches": f"batches_{case.rows}.json",
            "versions": {m.__name__: m.__version__ for m in (trl, transformers, peft, accelerate, torch)},
            "changed_from_trl_defaults": case.settings,
            "optimiser": {
                "name": said.optim.value,
                "class": type(trainer.optimizer.optimizer).__name__,
                "adam_beta1": group["betas"][0],
                "adam_beta2": group["betas"][1],
                "adam_epsilon": group["eps"],
                "weight_decay": group["weight_decay"],
                "tensors_decayed": len(group["params"]),
                "tensors_not_decayed": len(trainer.optimizer.param_groups[1]["params"]),
                "learning_rate": said.learning_rate,
                "schedule": said.lr_scheduler_type.value,
                "warmup_steps": said.get_warmup_steps(STEPS),
                "max_grad_norm": said.max_grad_norm,
                "loss_type": said.loss_type,
                "seed": said.seed,
                "max_length": said.max_length,
            },
            "steps": steps,
        },
        "rows": table_of_rows(rows, trainer),
        "batches": batches,
        "initial": initial,
        "first_gradient": {plain(name): g.contiguous() for name, g in trainer.first_gradient.items()},
        "final": trained(model),
        "adapter": adapter_config,
    }


def table_of_rows(rows: list[dict[str, Any]], trainer: SFTTrainer) -> list[dict[str, Any]]:
    """Each row as given, with the ids and the mask TRL made of it."""
    made = []
    for given, prepared in zip(rows, trainer.train_dataset):
        mask = [int(label != -100) for label in prepared["labels"]]
        made.append(given | {"input_ids": prepared["input_ids"], "completion_mask": mask})
    return made


def distance(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Largest differences between two runs of a case: losses and norms relative, tensors over their largest entry."""

    def tensors(key: str) -> float:
        mine, theirs = one[key], other[key]
        return max(float((mine[n] - theirs[n]).abs().max() / mine[n].abs().max().clamp(min=1e-30)) for n in mine)

    def numbers(key: str) -> float:
        pairs = zip(one["run"]["steps"], other["run"]["steps"])
        return max(abs(a[key] - b[key]) / abs(a[key]) for a, b in pairs)

    moved = {n: one["final"][n] - one["initial"][n] for n in one["final"]}
    missed = {n: float((one["final"][n] - other["final"][n]).norm() / moved[n].norm().clamp(min=1e-30)) for n in moved}
    return {
        "loss": numbers("loss"),
        "grad_norm": numbers("grad_norm"),
        "first_gradient": tensors("first_gradient"),
        "final": tensors("final"),
        "final_over_distance_moved": max(missed.values()),
    }


def write_json(path: Path, value: Any, **style: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, **style) + "\n", encoding="utf-8")


def save(case: Case, result: dict[str, Any], folder: Path) -> None:
    """Files of one case. Cases that share rows must have trained on the same batches."""
    own = folder / case.name
    own.mkdir()
    if case.lora:
        (own / "adapter_initial").mkdir()
        save_file(result["initial"], own / "adapter_initial" / "adapter_model.safetensors")
        config = {k: sorted(v) if isinstance(v, set) else v for k, v in result["adapter"].items()}
        config["base_model_name_or_path"] = f"model_{case.model}"
        write_json(own / "adapter_initial" / "adapter_config.json", config, indent=1, sort_keys=True)
    save_file(result["final"], own / "final.safetensors")
    save_file(result["first_gradient"], own / "first_gradient.safetensors")
    write_json(own / "run.json", result["run"], indent=1)
    for name, text in (
        (result["run"]["batches"], json.dumps(result["batches"], separators=(",", ":")) + "\n"),
        (result["run"]["rows"], "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in result["rows"])),
    ):
        path = folder / name
        if path.exists():
            assert path.read_text(encoding="utf-8") == text, f"{case.name} trained on other tokens than its neighbour"
        path.write_text(text, encoding="utf-8")


def make(folder: Path) -> None:
    """The whole fixture in an empty folder."""
    for model in ("tied", "untied"):
        write_model(folder / f"model_{model}", tied=model == "tied")
    for case in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            torch.set_num_threads(1)
            result = train(case, folder, scratch, "sdpa")
            torch.set_num_threads(2)
            again = train(case, folder, scratch, "eager")
        result["run"]["rounding"] = distance(result, again)
        save(case, result, folder)
        first, last = result["run"]["steps"][0], result["run"]["steps"][-1]
        print(f"{case.name:9} loss {first['loss']:.6f} -> {last['loss']:.6f}  rounding {result['run']['rounding']}")


def compare(fresh: Path, kept: Path) -> list[str]:
    """What differs beyond rounding between two fixtures: ids exactly, numbers within ten times the recorded rounding."""
    wrong = []
    for name in ("rows_text.jsonl", "rows_ids.jsonl", "batches_text.json", "batches_ids.json"):
        if (fresh / name).read_text(encoding="utf-8") != (kept / name).read_text(encoding="utf-8"):
            wrong.append(f"{name} differs")
    for case in CASES:
        pair = []
        for folder in (kept, fresh):
            tensors = {key: load_file(folder / case.name / f"{key}.safetensors") for key in ("final", "first_gradient")}
            model = folder / f"model_{case.model}" / "model.safetensors"
            start = folder / case.name / "adapter_initial" / "adapter_model.safetensors"
            run = json.loads((folder / case.name / "run.json").read_text(encoding="utf-8"))
            pair.append({"run": run, "initial": load_file(start if case.lora else model), **tensors})
        if any(not torch.equal(tensor, pair[1]["initial"][name]) for name, tensor in pair[0]["initial"].items()):
            wrong.append(f"{case.name}: another start")
            continue
        for key, value in distance(*pair).items():
            if value > 10 * max(pair[0]["run"]["rounding"][key], 1e-7):
                wrong.append(
                    f"{case.name}: {key} differs by {value:.2e}, rounding is {pair[0]['run']['rounding'][key]:.2e}"
                )
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a fresh run differs")
    check = parser.parse_args().check
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        make(fresh)
        if check:
            wrong = compare(fresh, HERE)
            print("\n".join(wrong) or "the fixture is what TRL does")
            sys.exit(bool(wrong))
        for path in fresh.rglob("*.safetensors"):
            path.chmod(0o644)  # the writer's own choice is 0600
        for path in fresh.iterdir():
            kept = HERE / path.name
            if kept.is_dir():
                shutil.rmtree(kept)
            shutil.move(path, kept)


if __name__ == "__main__":
    main()
