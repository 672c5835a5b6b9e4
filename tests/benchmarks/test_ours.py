"""burnish's own children on the bundled model: they lean on seams of the engine and the loop that may move."""

from __future__ import annotations

import os
import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.cold import BUNDLED
from benchmarks.harness import Child
from benchmarks.machine import ROOT
from benchmarks.ppo import reward_of
from benchmarks.sft import vocabulary_of

from benchmarks import rows as data


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    made: list[Child] = []

    def child(module: str) -> Child:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        made.append(Child(module, [sys.executable, "-m", module], log=tmp_path / f"{len(made)}.log", environment=environment))
        return made[-1]

    yield child
    for each in made:
        each.stop()


def test_every_sample_gets_the_length_it_was_told(start: Any) -> None:
    vocabulary = vocabulary_of(BUNDLED)
    engine = start("benchmarks.ours.rollout")
    ready = engine.ask("prepare", model=str(BUNDLED), threads=1, probe=[20, 30, 40, 50], setting="")
    assert ready["probe_logprob"] < 0 and ready["token_flops"] > ready["body_flops"] > 1e6
    work = data.rollouts(2, 4, vocabulary, median=6, most=15)
    for _ in range(2):  # nodes are freed: the second turn reads its prompts again
        found = engine.ask("step", **work)
        assert found["lengths"] == work["lengths"] and found["useful_tokens"] == sum(work["lengths"])
        assert found["prefill_tokens"] == sum(map(len, {tuple(p) for p in work["prompts"]}))
        assert 0 < found["useful_flops"] <= found["executed_flops"]


def test_a_step_trains_on_the_rows_it_was_given(start: Any) -> None:
    rows = data.varied(8, vocabulary_of(BUNDLED), median=12, least=6, most=24)
    trainer = start("benchmarks.ours.sft")
    ready = trainer.ask("prepare", model=str(BUNDLED), mode="full", threads=1)
    assert ready["trained"] == ready["parameters"] > 8e5
    first, second = (trainer.ask("step", rows=rows) for _ in range(2))
    assert first["tokens"] == sum(len(r["input_ids"]) for r in rows) and first["loss_tokens"] == sum(sum(r["completion_mask"]) for r in rows)
    assert second["loss"] < first["loss"] and first["useful_flops"] == second["useful_flops"] > 0
    assert first["peak_step_bytes"] > 1e8 and first["plan"] == second["plan"] == "at most 8192 tokens a forward, checkpointing off"


def test_a_grpo_step_draws_the_lengths_it_is_told_and_learns_from_what_it_is_given(start: Any) -> None:
    vocabulary = vocabulary_of(BUNDLED)
    trainer = start("benchmarks.ours.grpo")
    ready = trainer.ask("prepare", model=str(BUNDLED), mode="full", prompts=2, group=4, most=12, threads=1)
    assert ready["trained"] == ready["parameters"] > 8e5
    work = data.questions(2, 4, vocabulary, prompt=9, median=6, most=12)
    given = data.brief(work, 4, 5, vocabulary)
    first, second = trainer.ask("step", **given), trainer.ask("step", **work)
    # with one step a round the loss is - sum of advantage x length / tokens: it follows from lengths and limits
    for asked, found in ((given, first), (work, second)):
        worth = [float(n <= m) for n, m in zip(asked["lengths"], asked["limits"])]
        total = 0.0
        for i in (0, 4):
            group = worth[i : i + 4]
            total += sum((r - statistics.mean(group)) / (statistics.stdev(group) + 1e-4) * n for r, n in zip(group, asked["lengths"][i : i + 4]))
        assert found["loss"] == pytest.approx(-total / sum(asked["lengths"]), rel=1e-5)
        assert found["completion_tokens"] == found["loss_tokens"] == sum(asked["lengths"]) and found["reward"] == pytest.approx(sum(worth) / 8)
        assert found["dead_groups"] == 0 and found["live_samples"] == 1 and found["samples"] == 8
        assert found["rollout_s"] + found["scoring_s"] + found["training_s"] == pytest.approx(found["seconds"])
        assert 0 < found["train_useful_flops"] <= found["useful_flops"] <= found["executed_flops"]
    assert second["prefill_tokens"] == 2 * 9 and second["sampler_gap"] < 0.1 < first["sampler_gap"]  # what is given was not sampled


def test_a_step_of_ppo_learns_from_the_completions_it_was_given(start: Any) -> None:
    """A new critic says 0 and the reference is the policy: the return of each token is 0.95^k of the reward, by GAE."""
    vocabulary = vocabulary_of(BUNDLED)
    trainer = start("benchmarks.ours.ppo")
    trainer.ask("prepare", model=str(BUNDLED), group=2, most=8, kl_coef=0.05, threads=1)
    work = data.rollouts(2, 2, vocabulary, median=4, most=8, prompt=(4, 8))
    given = [data.ids(random.Random(i), n, vocabulary) for i, n in enumerate(work["lengths"])]
    first = trainer.ask("step", given=given, **work)
    returns = [0.95**k * reward_of(ids) for ids in given for k in range(len(ids))]
    assert first["value_loss"] == pytest.approx(sum(r * r for r in returns) / len(returns) / 2, rel=1e-3)
    second = trainer.ask("step", **work)
    for found in (first, second):
        assert found["samples"] == 4 and found["lengths"] == work["lengths"] and found["tokens"] == sum(work["lengths"])
        assert found["grad_norm"] > 0 and 0 < found["useful_flops"] <= found["executed_flops"]
