"""What the benches give their systems: rows, lengths, trees, limits and the search for the longest sequence."""

from __future__ import annotations

import statistics

import pytest
from benchmarks.machine import Calibration
from benchmarks.memory import longest, multiples
from benchmarks.rollout import least_seconds
from benchmarks.tree import SIZES, grow

from benchmarks import rows as data
from burnish.forest.stream import Layout


def test_rows_are_seeded_within_bounds_and_half_prompt() -> None:
    found = data.varied(800, 262_144)
    assert found == data.varied(800, 262_144) != data.varied(800, 262_144, seed=1)
    sizes = [len(r["input_ids"]) for r in found]
    assert min(sizes) >= 40 and max(sizes) <= 512 and 155 < statistics.median(sizes) < 187
    for r in found[:50]:
        n = len(r["input_ids"])
        assert len(r["completion_mask"]) == n and sum(r["completion_mask"]) == n // 2
        assert r["completion_mask"] == sorted(r["completion_mask"]) and min(r["input_ids"]) >= data.FIRST_ID
    assert all(max(r["input_ids"]) < 320 for r in data.varied(20, 320))  # a small vocabulary
    assert all(all(r["completion_mask"]) for r in data.level(4, 12, 320))


def test_grouping_takes_batches_of_like_length_from_all_over() -> None:
    pool = data.varied(400, 32_000)
    found = data.grouped(pool, 8, 3)
    sizes = sorted(len(r["input_ids"]) for r in pool)
    batches = [[len(r["input_ids"]) for r in found[i : i + 8]] for i in range(0, 24, 8)]
    assert all(max(b) - min(b) <= 0.1 * max(b) for b in batches)
    assert batches == [sizes[8 * k : 8 * k + 8] for k in (8, 25, 41)]  # sixths 1, 3 and 5 of 50 batches
    short = data.short(found, 8, 48)
    assert len(short) == 8 and {len(r["input_ids"]) for r in short} == {48} and {sum(r["completion_mask"]) for r in short} == {24}


def test_rollouts_repeat_prompts_and_skew_lengths() -> None:
    work = data.rollouts(16, 8, 32_000)
    assert len(work["prompts"]) == len(work["lengths"]) == 128
    assert all(work["prompts"][i] == work["prompts"][i - i % 8] for i in range(128)) and len({tuple(p) for p in work["prompts"]}) == 16
    assert min(work["lengths"]) >= 2 and max(work["lengths"]) == 40 > 2 * statistics.median(work["lengths"])


def test_the_least_time_of_rollouts_is_bandwidth_alone_and_products_together() -> None:
    # 100 GFLOP/s, 10 GB/s; a token takes 2 GFLOP and the weights are 2e9 / 2 * 4 bytes: 0.4 s a step, 0.02 s a row
    ready = {"dtype": "float32", "token_flops": 2e9, "body_flops": 1e9}
    machine = Calibration({"float32": 100.0}, 10.0)
    # 3 and 1 tokens: the first of each comes from the prefill of 50 tokens (0.5 s); two steps of one row remain
    assert least_seconds(machine, [3, 1], 50, ready) == pytest.approx(0.5 + 2 * 0.4)
    # 40 rows of 2 tokens: one step, 0.8 s of products
    assert least_seconds(machine, [2] * 40, 0, ready) == pytest.approx(0.8)


@pytest.mark.parametrize("size", SIZES)
def test_trees_are_of_the_depth_asked_for(size: tuple[int, int, int]) -> None:
    depth, root, children = size
    length, parent = grow(*size, 32, 128)
    layout = Layout(tuple(length), tuple(parent))  # checks the pre-order itself
    inner = sum(children**d for d in range(depth))
    assert length[0] == root and len(layout.leaves) == children**depth and len(length) == inner + children**depth
    assert all(32 <= n <= 128 for n in length[1:])


# ---- the longest sequence


def test_the_longest_sequence_is_found_by_bisection() -> None:
    asked: list[int] = []

    def probe(tokens: int) -> tuple[float, float]:
        asked.append(tokens)
        return 100.0 + tokens + (tokens / 100) ** 2, 0.0  # 1,000 bytes hold 840

    found = longest(probe, 1000.0, 64, 10_000)
    assert found["how"] == "measured" and 0.94 * 840 <= found["tokens"] <= 841
    assert max(asked) <= 2 * 840 and probe(found["tokens"])[0] <= 1000


def test_nothing_fits() -> None:
    assert longest(lambda tokens: (5000.0, 0.0), 1000.0, 64, 10_000)["tokens"] == 0


def test_time_ends_the_search_and_the_line_is_said_to_be_one() -> None:
    found = longest(lambda tokens: (100.0 + tokens, tokens / 10), 5000.0, 64, 10_000, most_s=60)
    assert found["how"] == "extrapolated" and found["tokens"] == 4900 and max(found["probes"]) == 512  # 1,024 would take 102 s
    assert longest(lambda tokens: (1.0, 50.0), 5000.0, 64, 10_000, most_s=60)["how"] == "at least"


@pytest.mark.parametrize(
    ("fits", "seconds", "best", "asked"),
    [
        (10_000, 0.01, 96, [300, 600, 1200, 2400, 4800, 9600]),  # the next is beyond what is waited for
        (700, 0.0, 6, [300, 600, 1200]),
        (300, 0.0, 3, [300, 600]),
        (250, 0.0, 2, [300, 200]),
        (100, 0.0, 1, [300, 200, 100]),
        (99, 0.0, 0, [300, 200, 100]),
    ],
)
def test_multiples_of_the_peers_longest_are_asked_until_one_is_too_long(fits: int, seconds: float, best: int, asked: list[int]) -> None:
    seen: list[int] = []

    def probe(tokens: int) -> tuple[float, float]:
        seen.append(tokens)
        return (1.0 if tokens <= fits else float("inf")), seconds * tokens

    found = multiples(probe, 5.0, 100, most_s=100)
    assert (found["tokens"], seen) == (100 * best, asked)

