"""TRL's SFTTrainer as a child process that trains one step when told to. Run it with the peers' Python.

One JSON object a line on standard input, one answer a line on standard output (everything else goes to standard error):

    {"do": "prepare", "model": FOLDER, "rows": JSONL, "mode": "full" | "lora", "setting": "default" | "best" | "masters",
     "batch_rows": 8}
        also, if wanted: "order": "sequential" (else the setting's own), "threads": 2, "seed": 42, "max_steps": 10000
        -> {"ready": true, "seconds": S, "import_seconds": S, "peak_bytes": B, "parameters": N, "trained": N, "arguments": {...}}
    {"do": "step", "n": 1}
        -> {"seconds": S, "loss": L, "losses": [L], "grad_norm": G, "learning_rate": R, "loss_tokens": N, "tokens": N,
            "positions": N, "rows": [[i, ...]], "steps": total so far, "peak_bytes": B}
    {"do": "stop"}
        -> {"stopped": true, "steps": N, "peak_bytes": B}

Rows are `{"input_ids": [...], "completion_mask": [...]}`. `loss` is that of the last of the n steps: the mean over its loss
tokens, before its update. `tokens` are real ones, `positions` also padding; `rows` are the line numbers (from 0) of each
step's rows, so that another system can train on the same. `peak_bytes` is VmHWM: the process, loading included.
A failure is answered with {"error": "..."} and exit status 1.

What is timed is `trainer.train()` itself, untouched: a callback blocks between its steps. A step's seconds run from the
command to the end of the optimiser step, so the logging of step k (every tenth) is in step k + 1.

Settings:
- `default`: SFTConfig's defaults. fp32 weights under bf16 autocast, gradient checkpointing, rows in random order.
- `best`: the fastest that TRL's options give on a CPU. bf16 weights without autocast (adapters stay fp32; under autocast they
  take the same time), no checkpointing, rows of like length together: the first batch then holds the longest rows. In full
  fine-tuning the weights and Adam's moments are bf16 too, and most updates of 2e-5 round away: a floor for speed, not advice.
- `masters`: `best`, with fp32 weights under autocast: the fastest that does not lose updates.
Not used, because they are slower here: packing and padding-free (they need a varlen kernel), torch.compile (a new shape
is a new compilation).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, TextIO

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


def peak_bytes() -> int:
    """The most resident memory this process has had (VmHWM)."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


class Commands:
    """The parent at the other end. Keeps standard output to itself: TRL and its libraries print there."""

    def __init__(self) -> None:
        self.out: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def next(self) -> dict[str, Any]:
        """The next command; end of input is a stop."""
        line = sys.stdin.readline()
        return json.loads(line) if line else {"do": "stop"}

    def answer(self, **said: Any) -> None:
        self.out.write(json.dumps(said) + "\n")
        self.out.flush()


def read_rows(path: str) -> list[dict[str, list[int]]]:
    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [{key: row[key] for key in ("input_ids", "completion_mask")} for row in rows]


def build(command: dict[str, Any], scratch: str) -> tuple[Any, Callable[[], dict[str, Any]]]:
    """A trainer for this command, and a function that says what it did since last asked."""
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
            super().__init__(*args, **kwargs)
            self.seen: list[dict[str, Any]] = []
            self.norm: Any = None
            self.rate = 0.0

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            lengths = inputs["attention_mask"].sum(1).tolist()
            ids = [tuple(row[:length]) for row, length in zip(inputs["input_ids"].tolist(), lengths)]
            loss_tokens = int((inputs["labels"][:, 1:] != -100).sum())
            positions = inputs["input_ids"].numel()
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.seen.append(
                {"ids": ids, "loss": loss, "loss_tokens": loss_tokens, "tokens": sum(lengths), "positions": positions}
            )
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

    def report() -> dict[str, Any]:
        seen, trainer.seen = trainer.seen, []
        losses = [float(step["loss"]) for step in seen]
        return {
            "loss": losses[-1],
            "losses": losses,
            "grad_norm": float(trainer.norm),
            "learning_rate": trainer.rate,
            **{key: sum(step[key] for step in seen) for key in ("loss_tokens", "tokens", "positions")},
            "rows": [[line_of[ids][0] for ids in step["ids"]] for step in seen],
        }

    return trainer, report


def serve(commands: Commands, command: dict[str, Any], began: float) -> None:
    """Prepare, then let TRL train as many steps as the parent asks for, one command at a time."""
    import torch
    import trl
    from transformers import TrainerCallback

    imported = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        trainer, report = build(command, scratch)

        class Gate(TrainerCallback):
            """Holds TRL's loop between two steps until the parent asks for more."""

            left, asked = 0, 0.0

            def wait(self, steps: int) -> None:
                while True:
                    command = commands.next()
                    self.asked = time.perf_counter()
                    if command["do"] == "stop":
                        commands.answer(stopped=True, steps=steps, peak_bytes=peak_bytes())
                        raise Stop
                    if command["do"] == "step" and command.get("n", 1) > 0:
                        self.left = command.get("n", 1)
                        return
                    commands.answer(error=f"not understood while training: {command}")

            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                said = {
                    key: value for key, value in args.to_dict().items() if isinstance(value, (int, float, bool, str))
                }
                del said["output_dir"]
                commands.answer(
                    ready=True,
                    seconds=time.perf_counter() - began,
                    import_seconds=imported - began,
                    peak_bytes=peak_bytes(),
                    parameters=sum(p.numel() for p in trainer.model.parameters()),
                    trained=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
                    weights=str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
                    threads=torch.get_num_threads(),
                    trl=trl.__version__,
                    arguments=said,
                )
                self.wait(0)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                self.left -= 1
                if self.left == 0:
                    seconds = time.perf_counter() - self.asked
                    commands.answer(seconds=seconds, **report(), steps=state.global_step, peak_bytes=peak_bytes())
                    self.wait(state.global_step)

        trainer.add_callback(Gate())
        trainer.train()


def main() -> int:
    commands = Commands()
    command = commands.next()
    if command["do"] == "stop":
        return 0
    try:
        if command["do"] != "prepare":
            raise ValueError(f"the first command is prepare, not {command['do']}")
        serve(commands, command, time.perf_counter())
    except Stop:
        return 0
    except Exception as error:
        commands.answer(error=f"{type(error).__name__}: {error}")
        raise
    commands.answer(error="trained max_steps; nothing is left to do")
    return 1


if __name__ == "__main__":
    sys.exit(main())
