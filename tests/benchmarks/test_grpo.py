"""B7: what it asks of both systems, what it makes of their answers, and what its checks refuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from benchmarks.harness import Case, Session
from benchmarks.machine import Calibration
from benchmarks.reward import concise
from benchmarks.sft import BEST, DEFAULTS
from benchmarks.suite import BENCHES

from benchmarks import grpo, report
from benchmarks import rows as data


@pytest.mark.parametrize("small", [False, True])
def test_no_group_is_dead_whatever_is_drawn(small: bool) -> None:
    for seed in range(20):
        work = data.questions(8, 8, 4096, **grpo.SIZES[small], seed=seed)
        for each in (work, data.brief(work, 8, grpo.BRIEF, 4096), data.brief(work, 8, 2, 4096)):
            worth = concise([""] * 64, [[0] * n for n in each["lengths"]], each["limits"])
            assert all(0 < sum(worth[i : i + 8]) < 8 for i in range(0, 64, 8))
            assert all(each["limits"][i] == each["limits"][i - i % 8] for i in range(64))
    assert {len(p) for p in work["prompts"]} == {grpo.SIZES[small]["prompt"]} and max(work["lengths"]) <= grpo.SIZES[small]["most"]
    # half of a group are within its lower median; equal lengths have one made shorter
    assert data.limited({"lengths": [9, 4, 7, 2]}, 4) == {"lengths": [9, 4, 7, 2], "limits": [4] * 4}
    assert data.limited({"lengths": [5, 5, 5, 5, 3, 5, 5, 5]}, 4) == {"lengths": [4, 5, 5, 5, 3, 5, 5, 5], "limits": [4] * 4 + [3] * 4}


class Played:
    """A child that answers from a script: the seconds of a step, and what else to say wrongly."""

    def __init__(self, name: str, seconds: float, **wrong: Any) -> None:
        self.name, self.seconds, self.wrong = name, seconds, wrong
        self.asked: list[dict[str, Any]] = []

    def ask(self, do: str, limit_s: float = 0.0, **order: Any) -> dict[str, Any]:
        self.asked.append({"do": do, **order})
        if do == "prepare":
            return {"seconds": 1.0, "dtype": "float32", "trained": 1000, "token_flops": 2e6, "body_flops": 1e6, "versions": {self.name: "1"}}
        found = {
            "seconds": self.seconds, "rollout_s": 0.5 * self.seconds, "scoring_s": 0.1 * self.seconds, "training_s": 0.4 * self.seconds,
            "samples": len(order["lengths"]), "completion_tokens": sum(order["lengths"]), "loss": 0.4, "grad_norm": 1.0, "reward": 0.5,
            "dead_groups": 0.0, "live_samples": 1.0, "sampler_gap": 1e-3, "tokens": 700, "positions": 2048, "prefill_tokens": 128, "plan": "p",
            "useful_flops": 8e8, "executed_flops": 1e9, "train_useful_flops": 6e8, "peak_step_bytes": 10**9,
        }  # fmt: skip
        return found | self.wrong


def played(tmp_path: Path, **wrong: Any) -> tuple[Case, dict[str, Played]]:
    """One case of B7, TRL taking 8 s a step and burnish 1 s."""
    children = {"trl": Played("trl", 8.0), "burnish": Played("burnish", 1.0, **wrong)}
    (tmp_path / "config.json").write_text('{"vocab_size": 4096}')
    session = Session(tmp_path, tmp_path, Calibration({"float32": 100.0}, 10.0), lambda: 100.0, blocks=2, threads=1, say=lambda text: None)

    @contextmanager
    def child(name: str, where: str, module: str) -> Iterator[Played]:
        assert (where, module) == {"trl": ("peers", "benchmarks.peers.trl_grpo"), "burnish": ("burnish", "benchmarks.ours.grpo")}[name]
        yield children[name]

    cast(Any, session).child = child
    return next(grpo.run(session)), children


def test_both_are_asked_for_the_same_and_a_case_says_what_they_did(tmp_path: Path) -> None:
    case, children = played(tmp_path)
    asked = {name: child.asked for name, child in children.items()}
    assert asked["trl"][0].pop("setting") == "default" and asked["trl"] == asked["burnish"] and len(asked["trl"]) == 1 + 1 + 1  # one block of the model
    first, block = asked["burnish"][1], asked["burnish"][2]
    assert [len(x) for x in first["given"]] == first["lengths"] and "given" not in block and len(block["prompts"]) == 64
    assert (case["ratio"], case["blocks"], case["rate"]["ours"]) == (8.0, 1, 64.0)
    assert case["rollout_s"] == {"ours": 0.5, "theirs": 4.0} and case["part_ratio"]["training_s"] == pytest.approx(8)
    # 128 prefilled tokens at 1e6 and decoding at 100 GFLOP/s, training's 6e8, and AdamW's 28 bytes of 1,000 weights at 10 GB/s
    from benchmarks.rollout import least_seconds

    ready = {"dtype": "float32", "token_flops": 2e6, "body_flops": 1e6}
    least = least_seconds(Calibration({"float32": 100.0}, 10.0), block["lengths"], 128, ready) + 6e-3 + 2.8e-6
    assert case["of_limit"] == pytest.approx(least) and case["work_eff"] == 0.8
    target, *_ = [c for c in grpo.criteria([case]) if c.met is not None]
    assert (target.name, target.met) == ("target, full, defaults", True) and all(c["ok"] for c in case["checks"])
    assert {c["what"] for c in case["checks"]} == {
        "first loss", "first gradient norm", "loss", "reward", "completion tokens", "groups with equal rewards",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"loss": 0.41}, "first loss"), ({"grad_norm": 1.2}, "first gradient norm"), ({"reward": 0.5001}, "reward"),
        ({"completion_tokens": 3000}, "completion tokens"), ({"dead_groups": 0.125}, "groups with equal rewards"),
    ],
)  # fmt: skip
def test_a_system_that_does_something_else_meets_nothing(tmp_path: Path, wrong: dict[str, Any], what: str) -> None:
    case, _ = played(tmp_path, **wrong)
    assert what in [c["what"] for c in case["checks"] if not c["ok"]]
    assert not any(c.met for c in grpo.criteria([case]))


def test_its_section_shows_the_parts_of_a_step(tmp_path: Path) -> None:
    case, _ = played(tmp_path)
    cells = report.cells(BENCHES["B7"], case)
    assert "rollout 4.00 / 0.50; scoring 0.80 / 0.10; training 3.20 / 0.40" in cells and len(cells) == 1 + len(BENCHES["B7"].columns)
    assert {p.peer for p in grpo.PLANS} == {DEFAULTS, BEST, grpo.CONTINUOUS} and {p.mode for p in grpo.PLANS if not p.small} == {"full", "lora"}
