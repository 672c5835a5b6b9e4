"""What partial rollouts are worth: rounds drawn with `rollouts.partial` and without, in turn, in one process, of lengths with a long tail.

    .venv/bin/python -m benchmarks.partial [--model FOLDER] [--partial 8] [--mean 48] [--rounds 12]

A model of random weights ends a completion with the same small chance at every token (every `mean`th token of its vocabulary ends one), so that
lengths are geometric: of a group of eight the longest has 2.7 times the mean, of 256 six times. Prints, over the rounds but the first three,
medians of a round's seconds (reading, decoding and a reward that costs nothing), of completion tokens a second and of steps of decoding.
The default model has 4.7 M parameters. Weights stay as they are: both draw from the same policy.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import ROOT
from benchmarks.random_model import SHAPES, build
from burnish.core.records import Sampling
from burnish.data.sampler import Sampler
from burnish.methods.rounds import Question, Rounds
from burnish.models.load import load_policy
from burnish.rewards.build import build as build_rewards

PROMPTS, GROUP, PROMPT_TOKENS, WARM = 32, 8, 64, 3


def drawing(policy: Any, partial: int, mean: int) -> Rounds:
    vocabulary = policy.shape.vocabulary
    rewards = build_rewards(f"{ROOT / 'benchmarks/reward.py'}:concise")
    ids = torch.randint(3, vocabulary, (8 * PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    questions = [Question(tuple(row), "", {"limits": 0}, str(i)) for i, row in enumerate(ids)]
    sampling = Sampling(1.0, max_new_tokens=8 * mean)
    return Rounds(
        questions, rewards, sampling, Sampler(len(questions), PROMPTS), group_size=GROUP, seed=0, end_ids=range(3, vocabulary, mean), greedy=False, partial=partial
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--partial", type=int, default=8)
    parser.add_argument("--mean", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=12)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = asked.model or Path(name) / "small"
        if asked.model is None:
            build(folder, SHAPES["small"])
        policy = load_policy(folder)
        both = {"without": drawing(policy, 0, asked.mean), "with": drawing(policy, asked.partial, asked.mean)}
        seen: dict[str, list[tuple[float, int, int]]] = {name: [] for name in both}
        for number in range(asked.rounds):
            for name, rounds in both.items():
                steps: list[None] = []
                rounds.poll = lambda steps=steps: steps.append(None)
                begin = time.perf_counter()
                drawn = rounds.draw(policy, number)
                seen[name].append((time.perf_counter() - begin, sum(len(s.tokens) for group in drawn.groups for s in group), len(steps)))
        for rounds in both.values():
            rounds.rewards.close()
    for name, rows in seen.items():
        seconds, tokens, steps = (statistics.median(x) for x in zip(*rows[WARM:]))
        rate = statistics.median(t / s for s, t, _ in rows[WARM:])
        print(f"{name:<8} {seconds:.3f} s a round, {tokens:.0f} completion tokens, {rate:.0f} tokens/s, {steps:.0f} steps of decoding")
    worth = [a[1] / a[0] / (b[1] / b[0]) for a, b in zip(seen["with"][WARM:], seen["without"][WARM:])]
    print(f"tokens/s with over without: {statistics.median(worth):.2f} (worst round {min(worth):.2f})")


if __name__ == "__main__":
    main()
