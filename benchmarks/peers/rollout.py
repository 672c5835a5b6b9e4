"""transformers' `generate` with bf16 weights, and TRL's own path to it, in the orders of benchmarks/ours/rollout.py.

Every row ends at its own length by a stopping criterion of transformers' own kind, one answer a row; a row that has ended
is padded until its batch is done. No token ends a row.

- `generate`: the model in bf16, prompts left-padded, one batch.
- `trl`: `GRPOTrainer._generate_single_turn` at TRL's defaults: fp32 weights under bf16 autocast, as accelerate wraps them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

from benchmarks.protocol import Answer, serve, versions

NEVER = -1  # an end token that no vocabulary holds
held: dict[str, Any] = {}


class Lengths:
    """Whether each row has its tokens, and how many were drawn. Called once a step by `generate`.

    TRL cuts what it returns at an end token that was drawn by chance; the rows ran on to their lengths all the same.
    """

    def __init__(self, start: int, lengths: Any) -> None:
        self.start, self.lengths, self.drawn = start, lengths, 0

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.drawn = input_ids.shape[1] - self.start
        return self.lengths <= input_ids.shape[1] - self.start


def prepare(*, model: str, threads: int, probe: list[int], setting: str) -> Answer:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    if setting == "trl":
        held["trainer"] = trainer = grpo(model)
        live = trainer.model
    else:
        live = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    held["model"] = live
    with torch.no_grad():
        ids = torch.tensor([probe])
        logits = live(input_ids=ids).logits[0, :-1].float()
        score = logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).sum()
    return {
        "probe_logprob": float(score), "dtype": str(live.dtype).removeprefix("torch."),
        "versions": versions("torch", "transformers", "trl", "accelerate"),
    }  # fmt: skip


def grpo(model: str) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    folder = held["folder"] = tempfile.TemporaryDirectory()
    config = GRPOConfig(
        output_dir=folder.name, use_cpu=True, report_to="none", save_strategy="no", generation_kwargs={"eos_token_id": NEVER}
    )
    rows = Dataset.from_list([{"prompt": "a"}] * 8)
    trainer = GRPOTrainer(model=model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config, train_dataset=rows)
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)  # as `train` does before its first step
    trainer.model.train()
    return trainer


def step(*, prompts: list[list[int]], lengths: list[int]) -> Answer:
    import torch

    wanted, live = torch.tensor(lengths), held["model"]
    width = max(map(len, prompts))
    criteria = [Lengths(width, wanted)]
    begin = time.perf_counter()
    if "trainer" in held:
        trainer, generate = held["trainer"], type(live).generate
        for settings in (trainer.generation_config.__dict__, trainer.generation_kwargs):
            settings["max_new_tokens"] = max(lengths)
        live.generate = lambda **given: generate(live, stopping_criteria=criteria, **given)
        trainer._generate_single_turn(prompts, None, {}, 1)
    else:
        ids, mask = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = torch.tensor(prompt), 1
        with torch.inference_mode():
            live.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max(lengths),
                eos_token_id=NEVER, pad_token_id=0, stopping_criteria=criteria,
            )  # fmt: skip
    drawn = [min(criteria[0].drawn, n) for n in lengths]
    return {"seconds": time.perf_counter() - begin, "lengths": drawn, "useful_tokens": sum(drawn)}


if __name__ == "__main__":
    sys.exit(serve(prepare, step))
