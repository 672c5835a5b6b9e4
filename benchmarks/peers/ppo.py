"""PPO with a value head, written straight over transformers: TRL has no PPO trainer to be measured against.

    {"do": "prepare", "model": FOLDER, "setting": "default" | "best", "threads": 2, "kl_coef": ..., "micro_rows": 8}
    {"do": "step", "prompts": [[...]], "lengths": [...], "given": [[...]] or null}
        -> {"seconds": S, "samples": N, "loss": L, "value_loss": V, "grad_norm": G, "lengths": [...]}

One step: sample one completion a row, each of its own length; a pass without a gradient over old log-probs and values, one
over the frozen reference; rewards with the KL in them, GAE, whitened advantages; one pass of the clipped loss and the
clipped value loss in micro-batches; clipping; AdamW. Rows are padded on the right for all but sampling. `given` are
completions to learn from in place of sampled ones. `grad_norm` is the policy's before clipping, without the value head's.

- `default`: fp32 weights under bf16 autocast, logits of all positions, rows as they come.
- `best`: bf16 weights and moments, the head on completion rows alone, rows of like length together. Most updates of 1e-5
  round away in bf16: a floor for speed, not advice.
"""

from __future__ import annotations

import copy
import sys
import time
from contextlib import nullcontext
from typing import Any

from benchmarks.peers.rollout import NEVER, Lengths
from benchmarks.ppo import EPSILON, GAMMA, LAM, LEARNING_RATE, VALUE_COEF, reward_of
from benchmarks.protocol import Answer, serve, versions

held: dict[str, Any] = {}


def prepare(*, model: str, setting: str, threads: int, kl_coef: float, micro_rows: int) -> Answer:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    best = setting == "best"
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if best else torch.float32).eval()
    head = torch.nn.Linear(policy.get_output_embeddings().weight.shape[1], 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    groups = [{"params": policy.parameters(), "lr": LEARNING_RATE}, {"params": head.parameters(), "lr": 10 * LEARNING_RATE}]
    held.update(
        policy=policy, reference=copy.deepcopy(policy).requires_grad_(False), head=head, best=best, kl_coef=kl_coef, micro_rows=micro_rows,
        optimiser=torch.optim.AdamW(groups, weight_decay=0.0, fused=True),
    )  # fmt: skip
    return {
        "dtype": str(policy.dtype).removeprefix("torch."), "trained": sum(p.numel() for p in policy.parameters()),
        "versions": versions("torch", "transformers"),
    }  # fmt: skip


def autocast() -> Any:
    import torch

    return nullcontext() if held["best"] else torch.autocast("cpu", dtype=torch.bfloat16)


def sample(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """Left-padded, one batch, each row cut at its length."""
    import torch

    width = max(map(len, prompts))
    ids, mask = (torch.zeros(len(prompts), width, dtype=torch.long) for _ in range(2))
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = torch.tensor(prompt), 1
    with torch.inference_mode(), autocast():
        found = held["policy"].generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max(lengths),
            eos_token_id=NEVER, pad_token_id=0, stopping_criteria=[Lengths(width, torch.tensor(lengths))],
        )  # fmt: skip
    return [row[width : width + n].tolist() for row, n in zip(found, lengths)]


def rows_of(model: Any, prompts: list[list[int]], completions: list[list[int]], head: Any = None) -> tuple[Any, Any]:
    """(log-probs [tokens], values [tokens] or None) of the completions' tokens, flat in the order of the rows."""
    import torch

    width = max(len(p) + len(c) for p, c in zip(prompts, completions))
    ids, mask = (torch.zeros(len(prompts), width, dtype=torch.long) for _ in range(2))
    predicts = torch.zeros(len(prompts), width, dtype=torch.bool)
    for i, (p, c) in enumerate(zip(prompts, completions)):
        ids[i, : len(p) + len(c)], mask[i, : len(p) + len(c)] = torch.tensor([*p, *c]), 1
        predicts[i, len(p) - 1 : len(p) + len(c) - 1] = True
    labels = ids.roll(-1, 1)[predicts]
    with autocast():
        if held["best"]:
            hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[predicts]
            logits = model.lm_head(hidden)
        else:
            out = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
            hidden, logits = out.hidden_states[-1][predicts], out.logits[predicts]
    logits = logits.float()
    logprobs = logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(-1)
    return logprobs, None if head is None else head(hidden.float())[:, 0]


def step(*, prompts: list[list[int]], lengths: list[int], given: list[list[int]] | None = None) -> Answer:
    import torch

    begin = time.perf_counter()
    policy, reference, head, optimiser, size = (held[k] for k in ("policy", "reference", "head", "optimiser", "micro_rows"))
    completions = sample(prompts, lengths) if given is None else given
    order = list(range(len(prompts)))
    if held["best"]:
        order.sort(key=lambda i: len(prompts[i]) + len(completions[i]))
    micros = [order[i : i + size] for i in range(0, len(order), size)]

    def flat(model: Any, micro: list[int], with_head: bool = True) -> tuple[Any, Any]:
        return rows_of(model, [prompts[i] for i in micro], [completions[i] for i in micro], head if with_head else None)

    with torch.no_grad():
        old = [flat(policy, micro) for micro in micros]
        ref = [flat(reference, micro, with_head=False)[0] for micro in micros]
        advantage, target = [], []
        for micro, (logprobs, values), ref_logprobs in zip(micros, old, ref):
            reward = -held["kl_coef"] * (logprobs - ref_logprobs)
            at = 0
            for i in micro:
                n = len(completions[i])
                paid, value = reward[at : at + n].tolist(), values[at : at + n].tolist()
                paid[-1] += reward_of(completions[i])
                later, made = 0.0, [0.0] * n
                for t in reversed(range(n)):
                    later = paid[t] + GAMMA * (value[t + 1] if t + 1 < n else 0.0) - value[t] + GAMMA * LAM * later
                    made[t] = later
                advantage += made
                at += n
            target.append(torch.tensor(advantage[-at:]) + values)
        whitened = torch.tensor(advantage)
        whitened = (whitened - whitened.mean()) / (whitened.std() + EPSILON)
    total, tokens, at, value_total = 0.0, len(whitened), 0, 0.0
    for micro, (old_logprobs, old_values), goal in zip(micros, old, target):
        logprobs, values = flat(policy, micro)
        a = whitened[at : at + len(logprobs)]
        at += len(logprobs)
        ratio = (logprobs - old_logprobs).exp()
        surrogate = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum()
        near = old_values + (values - old_values).clamp(-0.2, 0.2)
        value_loss = torch.maximum((values - goal) ** 2, (near - goal) ** 2).sum() / 2
        loss = (surrogate + VALUE_COEF * value_loss) / tokens
        loss.backward()
        total, value_total = total + float(loss), value_total + float(value_loss) / tokens
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    return {
        "seconds": time.perf_counter() - begin, "samples": len(prompts), "tokens": tokens, "loss": total, "value_loss": value_total,
        "grad_norm": float(norm), "lengths": [len(c) for c in completions],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(serve(prepare, step))
