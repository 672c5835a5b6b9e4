"""B8's parent side: what it asks of two systems, what it makes of their answers, and what it wants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, Session
from benchmarks.machine import Calibration

from benchmarks import ppo


class Told:
    """A child that takes `seconds` a step and notes its orders."""

    def __init__(self, seconds: float, loss: float = 0.5) -> None:
        self.name, self.seconds, self.loss, self.orders = "told", seconds, loss, list[dict[str, Any]]()

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        self.orders.append({"do": do, **order})
        if do == "prepare":
            return {"dtype": "float32", "trained": 1000}
        n = len(order["lengths"])
        return {"seconds": self.seconds, "samples": n, "tokens": sum(order["lengths"]), "loss": 0.0, "value_loss": self.loss, "grad_norm": 2.0,
                "lengths": order["lengths"], "useful_flops": 10, "executed_flops": 20, "plan": "p"}  # fmt: skip


def measured(tmp_path: Path, theirs: Told, ours: Told) -> Case:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 300}))
    session = Session(model=tmp_path, scratch=tmp_path, calibration=Calibration({"float32": 100.0}, 10.0), gauge=lambda: 100.0, threads=1)
    return ppo.one(session, "best", (8, 4), theirs, ours) | {"case": "8 x 4", "peer": ppo.BEST}  # type: ignore[arg-type]


def test_both_get_the_same_prompts_lengths_and_first_completions(tmp_path: Path) -> None:
    theirs, ours = Told(6.0), Told(1.5)
    case = measured(tmp_path, theirs, ours)
    assert case["ratio"] == 4.0 and case["rate"] == {"ours": 32 / 1.5, "theirs": 32 / 6} and case["work_eff"] == 0.5
    assert [c["ok"] for c in case["checks"]] == [True] * 4
    assert theirs.orders[1:] == ours.orders[1:] and len(theirs.orders) == 2 + 3
    first, later = theirs.orders[1], theirs.orders[2]
    assert [len(c) for c in first["given"]] == first["lengths"] and max(first["lengths"]) <= 4 and "given" not in later
    assert len(later["prompts"]) == 32 and later["prompts"][0] == later["prompts"][3] != later["prompts"][4]
    assert min(map(len, later["prompts"])) >= 64 and max(map(len, later["prompts"])) <= 128


def test_results_that_differ_meet_no_floor(tmp_path: Path) -> None:
    found = {c.name: c for c in ppo.criteria([measured(tmp_path, Told(6.0), Told(1.5))])}
    assert found["floor, PPO against its best"].met is True and found["target, PPO against a plain loop"].met is None
    wrong = ppo.criteria([measured(tmp_path, Told(6.0), Told(1.5, loss=0.6))])
    assert wrong[1].met is False and "the results differ" in wrong[1].measured


def test_the_reward_is_the_share_of_even_ids() -> None:
    assert ppo.reward_of([2, 4, 5, 7]) == 0.5
