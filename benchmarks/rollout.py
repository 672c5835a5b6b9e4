"""Rollouts: useful tokens a second of the local engine and of transformers' generate, same prompts, same end tokens.

    python benchmarks/rollout.py                      a random model of the bundled model's shape
    MODEL=path/to/gemma-3-270m python benchmarks/rollout.py --dtype bfloat16 --prompts 4 --group 8 --new-tokens 64

A useful token is one up to and including the end of its row; generate goes on padding a row until its batch is done.
Ends are skewed: so many tokens of the vocabulary end a row that it lasts `--mean` tokens where all are as likely.
Blocks of the two systems alternate. A fixed matrix product is timed before and after each block, and a block where
either is more than 15 % off the best is discarded: on a shared machine such a block measures its neighbours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from burnish.core.records import Sampling
from burnish.engines.local.engine import LocalEngine
from burnish.models.policy import Policy


class Numbers:
    """A stand-in tokenizer for a random model: ids as text."""

    eos_token_id = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def random_model() -> Any:
    """Qwen3, 1 M parameters: five layers, 128 wide, 4 query heads on 2 key-value heads."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=320, hidden_size=128, intermediate_size=352, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, tie_word_embeddings=True,
        eos_token_id=None, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def product_seconds(size: int = 1024) -> float:
    """The fixed product that says how busy the machine is."""
    a = torch.ones(size, size)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - begin)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=os.environ.get("MODEL"), help="Hugging Face folder (default: a random model)"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--group", type=int, default=16, help="samples of each prompt")
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=(10, 25), metavar=("LEAST", "MOST"))
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--mean", type=float, default=24.0, help="mean length of a row where every token is as likely")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rows", type=int, default=512, help="rows decoded at once, by both")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one block each")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    if options.model:
        dtype = getattr(torch, options.dtype)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation="sdpa").eval()
        tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    else:
        model, tokenizer = random_model().to(getattr(torch, options.dtype)), Numbers()
    vocabulary = model.get_output_embeddings().weight.shape[0]
    ends = tuple(range(1, 1 + max(1, round(vocabulary / options.mean)))) if not options.model else (1,)
    generator = torch.Generator().manual_seed(0)
    least, most = options.prompt_tokens
    lengths = torch.randint(least, most + 1, (options.prompts,), generator=generator).tolist()
    prompts = [torch.randint(len(ends) + 1, vocabulary, (n,), generator=generator) for n in lengths]
    rows = [p for p in prompts for _ in range(options.group)]

    def peer() -> int:
        useful, end_ids = 0, torch.tensor(ends)
        for a in range(0, len(rows), options.rows):
            part = rows[a : a + options.rows]
            width = max(map(len, part))
            ids, mask = (torch.zeros(len(part), width, dtype=torch.long) for _ in range(2))
            for i, p in enumerate(part):
                ids[i, width - len(p) :], mask[i, width - len(p) :] = p, 1
            with torch.inference_mode():
                out = model.generate(
                    ids, attention_mask=mask, do_sample=True, temperature=options.temperature, top_k=0, top_p=1.0,
                    max_new_tokens=options.new_tokens, eos_token_id=list(ends), pad_token_id=0,
                )[:, width:]  # fmt: skip
            ended = torch.isin(out, end_ids)
            first = torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1])
            useful += int(first.sum())
        return useful

    policy: Policy | None = None
    ratio: list[float] = []

    def ours() -> int:
        engine = LocalEngine(policy, rows=options.rows, end_ids=ends)  # type: ignore[arg-type]
        nodes = [engine.prefill(p.tolist()) for p in prompts]
        sampling = Sampling(temperature=options.temperature, max_new_tokens=options.new_tokens)
        keys = [(i, s) for i in range(len(nodes)) for s in range(options.group)]
        found = engine.sample([nodes[i] for i, _ in keys], sampling, keys)
        ratio.append(engine.spend.useful_flops / engine.spend.executed_flops)
        return sum(len(t.completion) for t in found)

    systems: dict[str, Callable[[], int]] = {"generate": peer, "burnish": ours}
    own_attention = model.config._attn_implementation
    policy = Policy(model, tokenizer)
    burnish_attention = model.config._attn_implementation
    attention = {"generate": own_attention, "burnish": burnish_attention}
    for name, system in systems.items():  # warm up
        model.set_attn_implementation(attention[name])
        system()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    for _ in range(1 if options.quick else options.blocks):
        for name, system in systems.items():
            model.set_attn_implementation(attention[name])
            before = product_seconds()
            begin = time.perf_counter()
            tokens = system()
            seconds = time.perf_counter() - begin
            found[name].append((tokens / seconds, max(before, product_seconds())))
    best = min(busy for blocks in found.values() for _, busy in blocks)
    kept = {name: [rate for rate, busy in blocks if busy <= 1.15 * best] for name, blocks in found.items()}
    report = {
        "model": options.model or "random, 1 M parameters",
        "dtype": options.dtype,
        "rows": len(rows),
        "threads": options.threads,
        "blocks_discarded": sum(map(len, found.values())) - sum(map(len, kept.values())),
        "product_gflops": round(2 * 1024**3 / best / 1e9, 1),
        "tokens_per_s": {name: round(statistics.median(r)) if r else None for name, r in kept.items()},
        "slowest_tokens_per_s": {name: round(min(r)) if r else None for name, r in kept.items()},
        "useful_over_executed_flops": round(ratio[-1], 3),
    }
    rates = report["tokens_per_s"]
    report["ratio"] = round(rates["burnish"] / rates["generate"], 2) if all(rates.values()) else None
    if options.json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        print(f"{name:28} {value}")


if __name__ == "__main__":
    main()
