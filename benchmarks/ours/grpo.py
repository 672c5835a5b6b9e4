"""burnish's GRPO step: `PolicyGradient` and `train.loop.one_step`, as a stage of a recipe does it.

    {"do": "prepare", "model": FOLDER, "mode": "full" | "lora", "prompts": 8, "group": 8, "most": 128, "threads": 2}
    {"do": "step", "prompts": [[...]], "lengths": [...], "limits": [...]}       one round and one optimiser step
        with "given": [[...]] these completions are learned from, and none are drawn
        -> {"seconds": S, "rollout_s": S, "scoring_s": S, "training_s": S, "loss": L, "grad_norm": G, "reward": R, FLOPs, ...}

Prompts are given once a row, as the peers take them; here each is read once a group. Every sample ends at its own length
(benchmarks/ours/rollout.py). The setting is TRL's default loss: advantages in standard deviations of the group, the clip,
a mean over all tokens, no KL. Dtype and micro-batch are what `auto` gives. `rollout_s` is the round but for its
rewards, `scoring_s` the rewards, `training_s` the rest.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from benchmarks.protocol import BEGAN, Answer, forget_peak, memory, serve, versions

LEARNING_RATE = 1e-6  # TRL's default
held: dict[str, Any] = {}


class InOrder:
    """Every question in every round, in the order given."""

    def __init__(self, rows: int) -> None:
        self.batch_rows = rows

    def batch(self, number: int) -> range:
        return range(self.batch_rows)


def prepare(*, model: str, mode: str, prompts: int, group: int, most: int, threads: int) -> Answer:
    import torch

    from benchmarks.machine import ROOT
    from benchmarks.ours.rollout import end_as_told
    from burnish.core.records import Sampling
    from burnish.core.table import load_row
    from burnish.maths.policy_gradient import override
    from burnish.methods.curriculum import Prompts
    from burnish.methods.policy_gradient import PolicyGradient
    from burnish.methods.rounds import Question, Rounds
    from burnish.models.adapters import lora
    from burnish.models.load import load_policy
    from burnish.rewards.build import build as build_rewards
    from burnish.train.loop import State
    from burnish.train.memory import Memory
    from burnish.train.optim import Optimiser

    imported = time.perf_counter()
    torch.set_num_threads(threads)
    torch.manual_seed(0)

    def sample(engine: Any, nodes: Any, sampling: Any, keys: Any) -> Any:
        """As the engine does, unless completions are given."""
        if held["given"] is None:
            return engine.sample(nodes, sampling, keys)
        return [as_sampled(engine, node, key, ids) for node, key, ids in zip(nodes, keys, held["given"], strict=True)]

    end_as_told(held)
    policy = load_policy(model)
    policy.requires_grad_(mode == "full")
    if mode == "lora":
        policy = lora(policy, rank=16, alpha=32.0)
    setting = override(load_row("method", "grpo"), weights="token_mean", kl_coef=0.0)
    blank = [Question((1,), "", {"limits": 0}, str(i)) for i in range(prompts)]
    rewards = build_rewards(f"{ROOT / 'benchmarks/reward.py'}:concise")
    order: Any = Prompts(InOrder(prompts))  # type: ignore[arg-type]
    rounds = Rounds(blank, rewards, Sampling(1.0, max_new_tokens=most), order, group_size=group, seed=0, end_ids=(), greedy=False, sample=sample)
    method: Any = PolicyGradient(setting, rounds, prompts=order, prepared=None, updates=1, passes=1, total_steps=10**6)
    held.update(
        policy=policy, method=method, questions=blank, group=group, optimiser=Optimiser(policy, learning_rate=LEARNING_RATE), state=State(),
        settings=SimpleNamespace(learning_rate=LEARNING_RATE, max_skipped_steps=0), memory=Memory(), spent={},
    )  # fmt: skip
    method.prepare = clocked("round", method.prepare)
    rewards.score = clocked("scoring", rewards.score)  # type: ignore[method-assign]
    shape = policy.shape
    return {
        "import_seconds": imported - BEGAN, "parameters": shape.parameters, "trained": sum(p.numel() for p in policy.trainable().values()),
        "dtype": str(policy.dtype).removeprefix("torch."), "token_flops": 2 * shape.body_parameters + 2 * shape.vocabulary * shape.hidden,
        "body_flops": 2 * shape.body_parameters, "versions": versions("torch", "transformers", "peft"),
    }  # fmt: skip


def as_sampled(engine: Any, node: Any, key: tuple[int, int], ids: list[int]) -> Any:
    """A trajectory of these ids. Their log-probs are not asked for: with one step a round the old policy is the trainer's."""
    from burnish.core.records import Span, Trajectory

    tokens = (*node.ids, *ids)
    spans = (Span("prompt", 0, len(node.ids)), Span("completion", len(node.ids), len(tokens)))
    text = engine.policy.tokenizer.decode(ids)
    return Trajectory(str(key), None, tokens, (0.0,) * len(ids), engine.weights_version, {}, spans, "length", text)


def clocked(name: str, work: Any) -> Any:
    def timed(*args: Any, **given: Any) -> Any:
        begin = time.perf_counter()
        try:
            return work(*args, **given)
        finally:
            held["spent"][name] = held["spent"].get(name, 0.0) + time.perf_counter() - begin

    return timed


def step(*, prompts: list[list[int]], lengths: list[int], limits: list[int], given: list[list[int]] | None = None) -> Answer:
    from burnish.methods.rounds import Question
    from burnish.train.loop import one_step
    from burnish.train.schedules import constant

    policy, method, state, group = held["policy"], held["method"], held["state"], held["group"]
    held.update(lengths=lengths, given=given, spent={})
    held["questions"][:] = [Question(tuple(p), "", {"limits": n}, str(i)) for i, (p, n) in enumerate(zip(prompts[::group], limits[::group]))]
    before = dict(state.ledger.counted.get("train", {}))
    forget_peak()
    begin = time.perf_counter()
    work = next(iter(method.batches(state.step)))
    row = one_step(policy, method, held["optimiser"], held["settings"], constant, held["memory"], state, work, policy.shape)
    seconds = time.perf_counter() - begin
    trained = {k: v - before.get(k, 0) for k, v in state.ledger.counted["train"].items()}
    drawn = asdict(work.spend)
    spent = held["spent"]
    return {
        "seconds": seconds, "scoring_s": spent["scoring"], "rollout_s": spent["round"] - spent["scoring"], "training_s": seconds - spent["round"],
        "samples": len(lengths), "completion_tokens": round(row["completion_tokens"] * len(lengths)), "loss": row["loss"], "grad_norm": row["grad_norm"],
        "reward": row["reward_mean"], "dead_groups": row["dead_groups"], "live_samples": row["live_samples"], "sampler_gap": row["sampler_gap_max"],
        "tokens": row["stream_tokens"], "loss_tokens": row["label_tokens"], "prefill_tokens": drawn["prefill_tokens"],
        "useful_flops": drawn["useful_flops"] + trained["useful_flops"], "executed_flops": drawn["executed_flops"] + trained["executed_flops"],
        "train_useful_flops": trained["useful_flops"], "peak_step_bytes": memory("VmHWM"), "plan": str(held["memory"].plan(state.step)),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(serve(prepare, step))
