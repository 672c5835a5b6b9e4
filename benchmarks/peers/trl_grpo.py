"""TRL's GRPOTrainer, one optimiser step at a time, in the orders of benchmarks/ours/grpo.py.

    {"do": "prepare", ..., "setting": "default" | "best" | "continuous"}

The loop is benchmarks/peers/trl_sft.py's: `trainer.train()` itself, held between its steps. A step generates for all its
prompts at once and trains on micro-batches of `group` rows, TRL's own batch size of 8 at `gradient_accumulation_steps` =
prompts. What is changed is what makes the work equal: prompts come as ids (tokenising them costs next to nothing), every
row ends at its own length by a stopping criterion (or, with continuous batching, by its request's `max_new_tokens`), no
token ends one, and the pads behind a row's end are cut off before TRL pads again. `rollout_s` is `_generate`, decoding to
text included; `scoring_s` the rewards and every pass without gradient; `training_s` the rest of the step.

Settings:
- `default`: GRPOConfig's. fp32 weights under bf16 autocast, gradient checkpointing, `generate`.
- `best`: the fastest that TRL's options give on a CPU: bf16 weights without autocast, no checkpointing. In full
  fine-tuning the weights and Adam's moments are bf16 too, and most updates of 1e-6 round away: a floor for speed, not advice.
- `continuous`: `best` with `use_transformers_continuous_batching`.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from benchmarks.peers.rollout import NEVER, Lengths
from benchmarks.peers.trl_sft import LORA, Built, Order, main
from benchmarks.reward import concise

FASTER: dict[str, Any] = {"gradient_checkpointing": False, "bf16": False, "model_init_kwargs": {"dtype": "bfloat16"}}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "best": FASTER,
    "continuous": FASTER | {"use_transformers_continuous_batching": True},
}


def build(command: Order, scratch: str) -> Built:
    """A GRPOTrainer, watched and told what to sample."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(command["threads"])
    config = GRPOConfig(
        output_dir=scratch,
        max_steps=command.get("max_steps", 10_000),
        per_device_train_batch_size=command["group"],
        num_generations=command["group"],
        gradient_accumulation_steps=command["prompts"],
        max_completion_length=command["most"],
        generation_kwargs={"eos_token_id": NEVER},
        seed=42,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **SETTINGS[command["setting"]],
    )
    told: Order = {}

    class Watched(GRPOTrainer):
        """Samples rows of the lengths it is told, and notes what each step cost and gave."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.seen: dict[str, Any] = {}
            self.norm: Any = None
            super().__init__(*args, **kwargs)
            self.eos_token_ids = [NEVER]  # where `generate`'s answer is cut: at no token

        def clock(self, name: str, begin: float) -> None:
            self.seen[name] = self.seen.get(name, 0.0) + time.perf_counter() - begin

        def _tokenize_prompts(self, prompts: list[Any]) -> Any:
            return told["prompts"], None, {}

        def _generate(self, prompts: list[Any]) -> Any:
            begin = time.perf_counter()
            made = super()._generate(prompts)
            self.clock("rollout_s", begin)
            self.seen["completion_tokens"] = sum(map(len, made[1]))
            return made

        def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
            if told.get("given") is not None:
                return told["given"], None
            lengths = told["lengths"]
            settings = (self.generation_config.__dict__, self.generation_kwargs)
            for each in settings:
                each["max_new_tokens"] = max(lengths)
            drawn, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            return [row[:n] for row, n in zip(drawn, lengths, strict=True)], logprobs

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            begin = time.perf_counter()
            before = self.seen.get("rollout_s", 0.0)
            made = super()._generate_and_score_completions(inputs)
            self.clock("scoring_s", begin + self.seen["rollout_s"] - before)
            return made

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            found = super()._calculate_rewards(*args, **kwargs)
            self.seen["reward"] = float(found.mean())
            groups = found.view(-1, command["group"])
            self.seen["dead_groups"] = float((groups.amax(1) == groups.amin(1)).float().mean())
            return found

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.seen["loss"] = self.seen.get("loss", 0.0) + loss
            return loss

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            rows, width = inputs["completion_ids"].shape
            self.seen["positions"] = self.seen.get("positions", 0) + rows * (width + inputs["prompt_ids"].shape[1])
            return super()._compute_loss(model, inputs)

        def _clip_grad_norm(self, model: Any) -> Any:
            self.norm = super()._clip_grad_norm(model)
            return self.norm

    def reward(completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        return concise(completions, completion_ids, told["limits"])

    trainer = Watched(
        model=command["model"],
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * command["prompts"]),
        processing_class=AutoTokenizer.from_pretrained(command["model"], padding_side="left"),
        peft_config=LoraConfig(**LORA) if command["mode"] == "lora" else None,
    )
    end_as_told(trainer, told)

    def tell(order: Order) -> None:
        told.clear()
        told.update({k: order.get(k) for k in ("prompts", "lengths", "limits", "given")})
        trainer.seen = {"begin": time.perf_counter()}

    def report() -> dict[str, Any]:
        seen = dict(trainer.seen)
        took = time.perf_counter() - seen.pop("begin")
        seen["training_s"] = took - seen["rollout_s"] - seen["scoring_s"]
        return seen | {"loss": float(seen["loss"]), "grad_norm": float(trainer.norm), "samples": len(told["lengths"])}

    return trainer, tell, report


def end_as_told(trainer: Any, told: Order) -> None:
    """Rows of `generate` end by a stopping criterion, requests of `generate_batch` at their own `max_new_tokens`."""
    import torch

    inner = trainer.accelerator.unwrap_model(trainer.model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    kind = type(inner)
    generate = kind.generate

    def bounded(self: Any, *args: Any, **given: Any) -> Any:
        criterion = Lengths(given["input_ids"].shape[1], torch.tensor(told["lengths"]))
        return generate(self, *args, stopping_criteria=[criterion], **given)

    inner.generate = bounded.__get__(inner)
    if trainer.use_transformers_continuous_batching:
        from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager as Manager

        add = Manager.add_request

        def add_request(self: Any, input_ids: Any, request_id: str, **given: Any) -> Any:
            number = int(request_id.removeprefix("req_"))  # a manager a call: they count from 0 in the order of the prompts
            return add(self, input_ids, request_id, **given | {"max_new_tokens": told["lengths"][number]})

        Manager.add_request = add_request


if __name__ == "__main__":
    sys.exit(main(build))
