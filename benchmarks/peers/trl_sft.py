"""TRL's SFTTrainer, one step at a time. The protocol is benchmarks/protocol.py's, with these orders:

    {"do": "prepare", "model": FOLDER, "rows": JSONL, "mode": "full" | "lora", "setting": "default" | "best" | "masters",
     "batch_rows": 8, "threads": 2}
        also, if wanted: "order": "sequential" (else the setting's own), "packing": 512 (tokens of a packed row), "seed": 42,
        "max_steps": 10000
    {"do": "step"}                  the next batch of TRL's own loader
    {"do": "step", "given": [rows]} these rows in its place, through TRL's own collator
        -> {"seconds": S, "loss": L, "grad_norm": G, "learning_rate": R, "loss_tokens": N, "tokens": N, "positions": N,
            "rows": [i, ...], "steps": total so far, "peak_step_bytes": B}

Rows are `{"input_ids": [...], "completion_mask": [...]}`. `loss` is the mean over the step's loss tokens, before its update.
`tokens` are real ones, `positions` also padding; `rows` are the line numbers (from 0) of the step's rows, so that another
system can train on the same (absent where they were given). `peak_step_bytes` is the most resident during the step.

What is timed is `trainer.train()` itself, untouched: a callback blocks between its steps. A step's seconds run from the
command to the end of the optimiser step, so the logging of step k (every tenth) is in step k + 1.

Settings:
- `default`: SFTConfig's defaults. fp32 weights under bf16 autocast, gradient checkpointing, rows in random order.
- `best`: the fastest that TRL's options give on a CPU. bf16 weights without autocast (adapters stay fp32; under autocast they
  take the same time), no checkpointing, rows of like length together (where the order is not given). In full
  fine-tuning the weights and Adam's moments are bf16 too, and most updates of 2e-5 round away: a floor for speed, not advice.
- `masters`: `best`, with fp32 weights under autocast: the fastest that does not lose updates.
Not used, because they are slower here: packing and padding-free (they need a varlen kernel; B4 measures it), torch.compile
(a new shape is a new compilation).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks.protocol import BEGAN, Commands, forget_peak, memory, versions

os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES=""
)

LORA: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}
FASTER: dict[str, Any] = {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "best": FASTER | {"bf16": False, "model_init_kwargs": {"dtype": "bfloat16"}},
    "masters": FASTER | {"bf16": True},
}


class Stop(Exception):
    """Unwinds `trainer.train()` on request; TRL has no other way out before its last step."""


def read_rows(path: str) -> list[dict[str, list[int]]]:
    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [{key: row[key] for key in ("input_ids", "completion_mask")} for row in rows]


Order = dict[str, Any]
# a trainer for a `prepare`, what tells it of a `step` before it begins, and what says afterwards what it did
Built = tuple[Any, Callable[[Order], None], Callable[[], dict[str, Any]]]


def build(command: Order, scratch: str) -> Built:
    """An SFTTrainer, watched."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    if "threads" in command:
        torch.set_num_threads(command["threads"])
    rows = read_rows(command["rows"])
    line_of: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        line_of.setdefault(tuple(row["input_ids"]), []).append(i)
    settings = dict(SETTINGS[command["setting"]])
    if command.get("order", "own") != "own":
        settings["train_sampling_strategy"] = command["order"]
    if command.get("packing"):
        settings.update(packing=True, max_length=command["packing"], train_sampling_strategy="random")
    config = SFTConfig(
        output_dir=scratch,
        max_steps=command.get("max_steps", 10_000),
        per_device_train_batch_size=command["batch_rows"],
        seed=command.get("seed", 42),
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        # Tokenised rows have no prompt column, and by default TRL then ignores their completion_mask without a word.
        completion_only_loss=True,
        **settings,
    )

    class Watched(SFTTrainer):
        """Notes what each step was given and returned."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.seen: dict[str, Any] = {}
            self.given: list[dict[str, Any]] | None = None
            self.norm: Any = None
            self.rate = 0.0
            super().__init__(*args, **kwargs)

        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
            found = super().get_batch_samples(epoch_iterator, num_batches, device)
            if self.given is None:
                return found
            made = [self.data_collator([_example(r) for r in self.given])]
            return made, self._get_num_items_in_batch(made, device)

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            ids = _sequences(inputs)
            seen = {
                "loss_tokens": int((inputs["labels"][:, 1:] != -100).sum()),
                "tokens": sum(map(len, ids)),
                "positions": inputs["input_ids"].numel(),
            }
            if self.given is None:
                seen["rows"] = [line_of[x][0] for x in ids]
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.seen = {"loss": loss, **seen}
            return loss

        def _clip_grad_norm(self, model: Any) -> Any:
            self.norm = super()._clip_grad_norm(model)
            self.rate = self.optimizer.param_groups[0]["lr"]  # read here: by the step's end it is the next step's
            return self.norm

    trainer = Watched(
        model=command["model"],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(command["model"]),
        peft_config=LoraConfig(**LORA) if command["mode"] == "lora" else None,
    )

    def tell(order: Order) -> None:
        trainer.given = order.get("given")

    def report() -> dict[str, Any]:
        seen = trainer.seen
        return {**seen, "loss": float(seen["loss"]), "grad_norm": float(trainer.norm), "learning_rate": trainer.rate}

    return trainer, tell, report


def _example(row: dict[str, list[int]]) -> dict[str, Any]:
    """A row as TRL's dataset preparation leaves it."""
    labels = [i if wanted else -100 for i, wanted in zip(row["input_ids"], row["completion_mask"])]
    return {"input_ids": row["input_ids"], "labels": labels, "seq_lengths": [len(labels)]}


def _sequences(inputs: Any) -> list[tuple[int, ...]]:
    """The ids of every row of a batch: padded rows, or one stream whose positions begin again at each row."""
    if "attention_mask" in inputs:
        lengths = inputs["attention_mask"].sum(1).tolist()
        return [tuple(row[:length]) for row, length in zip(inputs["input_ids"].tolist(), lengths)]
    ids, position = inputs["input_ids"][0].tolist(), inputs["position_ids"][0].tolist()
    starts = [i for i, p in enumerate(position) if p == 0]
    return [tuple(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)])]


def serve(commands: Commands, command: Order, began: float, build: Callable[[Order, str], Built]) -> None:
    """Prepare, then let TRL train as many steps as the parent asks for, one command at a time."""
    import trl  # noqa: F401  (its import is timed apart)
    from transformers import TrainerCallback

    imported = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        trainer, tell, report = build(command, scratch)

        class Gate(TrainerCallback):
            """Holds TRL's loop between two steps until the parent asks for one more."""

            asked = 0.0

            def wait(self) -> None:
                command = commands.next()
                if command["do"] == "stop":
                    commands.answer(stopped=True)
                    raise Stop
                if command["do"] != "step":
                    raise ValueError(f"not understood while training: {command}")
                tell(command)
                forget_peak()
                self.asked = time.perf_counter()

            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                said = {
                    key: value for key, value in args.to_dict().items() if isinstance(value, (int, float, bool, str))
                }
                del said["output_dir"]
                commands.answer(
                    seconds=time.perf_counter() - began,
                    import_seconds=imported - BEGAN,
                    parameters=sum(p.numel() for p in trainer.model.parameters()),
                    trained=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
                    dtype=str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
                    versions=versions("torch", "transformers", "trl", "peft", "accelerate"),
                    arguments=said,
                )
                self.wait()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                seconds = time.perf_counter() - self.asked
                peak = memory("VmHWM")
                commands.answer(seconds=seconds, peak_step_bytes=peak, **report(), steps=state.global_step)
                self.wait()

        trainer.add_callback(Gate())
        trainer.train()


def main(build: Callable[[Order, str], Built] = build) -> int:
    commands = Commands()
    command = commands.next()
    if command["do"] == "stop":
        return 0
    try:
        if command["do"] != "prepare":
            raise ValueError(f"the first command is prepare, not {command['do']}")
        serve(commands, command, time.perf_counter(), build)
    except Stop:
        return 0
    except Exception as error:
        commands.answer(error=f"{type(error).__name__}: {error}")
        raise
    commands.answer(error="trained max_steps; nothing is left to do")
    return 1


if __name__ == "__main__":
    sys.exit(main())
