"""Faults 23 to 27: rewards that return nonsense, raise, hang, never differ, or cancel."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish.core.errors import RewardError
from burnish.rewards.build import build
from burnish.rewards.scoring import Breakdown

OWN = '''
import os, signal, subprocess, sys, time


def some(completions):
    """What each completion asks for."""
    kinds = {"nan": float("nan"), "inf": float("inf"), "none": None, "text": "1.0", "bool": True, "dict": {"r": 1}, "one": 1}
    return [kinds[c] for c in completions]


def arrays(completions):
    import numpy
    return numpy.ones(len(completions), dtype=numpy.float32)


def short(completions):
    return [1.0]


def coroutine(completions):
    async def later():
        return [1.0]
    return later()


def raises(completions):
    return [{"good": 1.0}[c] for c in completions]


def hangs(completions):
    for c in completions:
        if c == "sleep":
            time.sleep(60)
        elif c == "loop":
            sum(range(10**12))
        elif c == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            while True:
                time.sleep(1)
        elif c == "children":
            subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])
        elif c == "die":
            os.kill(os.getpid(), signal.SIGKILL)
    return [1.0 for _ in completions]


def once(completions):
    """Out of reach the first time it is asked, as services are."""
    if not os.path.exists("asked"):
        open("asked", "w").close()
        raise ConnectionResetError("try again")
    return [1.0 for _ in completions]


def down(completions):
    raise ConnectionRefusedError("nobody there")


def constant(completions):
    return [3.0 for _ in completions]


def up(completions):
    return [float(len(c)) for c in completions]


def down_by(completions):
    return [-float(len(c)) for c in completions]


def huge(completions):
    return [1e6 * len(c) for c in completions]
'''

Score = Callable[..., Breakdown]


@pytest.fixture
def score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Score:
    """score(use, completions, groups, limits of the block) -> what became of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)

    def go(use: Any, completions: list[str], groups: list[int] | None = None, **limits: Any) -> Breakdown:
        with build({"use": use, "max_error_rate": 1.0, **limits}) as rewards:
            return rewards.score(["p"] * len(completions), completions, {}, groups)

    return go


def test_23_values_that_are_none(score: Score) -> None:
    found = score("own.py:some", ["one", "nan", "inf", "none", "text", "bool", "dict"])
    ones = found.components["some"]
    assert [one.value for one in ones] == [1.0, None, None, None, None, 1.0, None]
    assert [one.error for one in ones] == [None, "invalid", "invalid", None, "invalid", None, "invalid"]
    assert ones[1].detail == "own.py:some, sample 1: gave nan, wanted a finite number or None"
    assert ones[6].detail == "own.py:some, sample 6: gave a dict {'r': 1}, wanted a finite number or None"
    assert [one.error for one in found.total] == [one.error for one in ones]
    assert found.stats["total"]["reward_mean"] == 1.0 and found.stats["total"]["reward_invalid"] == 4


@pytest.mark.parametrize(
    ("name", "said"),
    [("short", "own.py:short, sample 1: returned 1 values for 2 completions"), ("coroutine", "returned a coroutine: it is async")],
)
def test_23_what_is_no_list(score: Score, name: str, said: str) -> None:
    found = score(f"own.py:{name}", ["a", "b"]).components[name]
    assert [one.error for one in found] == ["invalid"] * 2 and said in found[1].detail
    with pytest.raises(RewardError, match=r"failed on 2 of 2 samples or more \(2 invalid\); 0.1 of them may fail") as caught:
        score(f"own.py:{name}", ["a", "b"], max_error_rate=0.1)
    assert caught.value.exit_code == 6


def test_23_arrays_are_lists(score: Score) -> None:
    assert [one.value for one in score("own.py:arrays", ["a", "b"]).total] == [1.0, 1.0]


def test_24_it_raises_on_some_samples(score: Score) -> None:
    found = score("own.py:raises", ["good", "x", "good", "y"], max_error_rate=0.5)
    assert [one.value for one in found.components["raises"]] == [1.0, None, 1.0, None]
    assert [one.error for one in found.components["raises"]] == [None, "crash", None, "crash"]
    assert found.components["raises"][3].detail == "own.py:raises, sample 3: raised KeyError('y')"
    assert found.tracebacks["raises"].count("Traceback") == 1 and "KeyError: 'x'" in found.tracebacks["raises"]
    with pytest.raises(RewardError, match=r"2 of 4 samples or more \(2 crash\); 0.4 of them may fail[\s\S]*KeyError: 'x'"):
        score("own.py:raises", ["good", "x", "good", "y"], max_error_rate=0.4)


@pytest.mark.parametrize("kind", ["sleep", "loop", "deaf", "children"])
def test_25_it_hangs(score: Score, kind: str) -> None:
    began = time.monotonic()
    found = score("own.py:hangs", ["a", kind, "b"], deadline_s=0.3, workers=1).components["hangs"]
    assert [one.value for one in found] == [1.0, None, 1.0] and found[1].error == "timeout"
    assert found[1].detail.startswith("own.py:hangs, sample 1: killed after 0.")
    assert time.monotonic() - began < 4


def test_25_its_process_dies(score: Score) -> None:
    found = score("own.py:hangs", ["a", "die", "b"], workers=1).components["hangs"]
    assert [one.error for one in found] == [None, "crash", None]
    assert found[1].detail == "own.py:hangs, sample 1: its process ended by SIGKILL"


def test_25_too_many_hang_and_the_step_ends_early(score: Score) -> None:
    began = time.monotonic()
    with pytest.raises(RewardError, match="timeout"):
        score("own.py:hangs", ["deaf"] * 40, list(range(40)), deadline_s=0.2, workers=2, max_error_rate=0.05)
    assert time.monotonic() - began < 4  # three deadlines' worth, not forty


def test_what_is_out_of_reach_is_tried_again_and_is_no_nought(score: Score) -> None:
    assert [one.value for one in score("own.py:once", ["a", "b"]).total] == [1.0, 1.0]
    found = score("own.py:down", ["a", "b"])
    assert [one.error for one in found.total] == ["infra"] * 2 and found.stats["total"]["reward_mean"] is None


def test_26_rewards_that_never_differ(score: Score) -> None:
    found = score("own.py:constant", ["a", "b", "c", "d"], [0, 0, 1, 1])
    assert found.stats["total"]["reward_flat_groups"] == 1.0 and found.stats["total"]["reward_cancelled_groups"] == 0.0
    assert any("the same reward" in text for text in found.stats["warnings"])


def test_27_components_that_cancel_or_drown_each_other(score: Score) -> None:
    found = score(["own.py:up", "own.py:down_by"], ["a", "bb", "c", "ccc"], [0, 0, 1, 1])
    assert [one.value for one in found.total] == [0.0] * 4 and found.stats["total"]["reward_cancelled_groups"] == 1.0
    assert any("vary but their sum does not" in text for text in found.stats["warnings"])
    assert found.stats["components"]["up"]["reward_std"] > 0
    drowned = score(["own.py:huge", "own.py:up"], ["a", "bb", "c", "ccc"], [0, 0, 1, 1])
    assert any("'huge' varies 1,000,000 times as much as 'up'" in text for text in drowned.stats["warnings"])
