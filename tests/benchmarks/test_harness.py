"""The benchmark harness: children and their protocol, which blocks count, what a comparison says of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.harness import (
    Block,
    Child,
    ChildError,
    Criterion,
    Measured,
    NotMeasured,
    Session,
    agree,
    at_least,
    at_most,
    compare,
    efficiency,
    forgiven,
    run_blocks,
    steady,
    tolerance,
)
from benchmarks.machine import Calibration, calibrate, gauge

from benchmarks import harness

FAKE = [sys.executable, "-m", "tests.benchmarks.fake"]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Child, Child]]:
    children = [Child(name, FAKE, log=tmp_path / f"{name}.log") for name in ("a", "b")]
    yield children[0], children[1]
    for child in children:
        child.stop()
        assert child.process.returncode is not None


def state(pid: int) -> str:
    """R, S, T (stopped) ... by the kernel; waits a moment for a signal to arrive."""
    for _ in range(100):
        found = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if found == "T":
            return found
        time.sleep(0.01)
    return found


def test_two_children_keep_their_state_and_stand_still_between_commands(two: tuple[Child, Child]) -> None:
    for start, child in zip((0, 100), two):
        ready = child.ask("prepare", start=start)
        assert ready["pid"] == child.process.pid and ready["peak_bytes"] > 1e6 and ready["seconds"] >= 0
        assert "noise" in child.log.read_text()  # what a library prints is no answer
    for turn in (1, 2):
        assert [child.ask("step")["steps"] for child in two] == [turn, 100 + turn]
        assert [state(child.process.pid) for child in two] == ["T", "T"]


def test_a_child_that_fails_says_why(two: tuple[Child, Child]) -> None:
    a, b = two
    a.ask("prepare", start=0)
    with pytest.raises(ChildError, match=r"a, step: ValueError: asked to fail\n(.|\n)*Traceback"):
        a.ask("step", fail=True)
    b.ask("prepare", start=0)
    with pytest.raises(ChildError, match="b, step: it ended"):
        b.ask("step", silent=True)
    with pytest.raises(ChildError):
        b.ask("step")


def test_a_child_that_hangs_is_ended(tmp_path: Path) -> None:
    hung = Child("hung", [sys.executable, "-c", "import time; time.sleep(60)"], log=tmp_path / "log")
    begin = time.monotonic()
    with pytest.raises(ChildError, match="took more than 0 s"):
        hung.ask("prepare", limit_s=0.3)
    hung.stop()
    assert time.monotonic() - begin < 10


def session(tmp_path: Path, **more: Any) -> Session:
    return Session(model=tmp_path, scratch=tmp_path, calibration=Calibration({"float32": 100.0}, 10.0), gauge=lambda: 100.0, threads=1, **more)


def test_a_session_holds_two_and_starts_a_dead_one_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    who = ("x", "burnish", "tests.benchmarks.fake")
    run = session(tmp_path)
    with run.pair(who, who) as both:
        a, b = both()
        assert both() == (a, b)
        with pytest.raises(AssertionError, match="a third"), run.child(*who):
            pass
        assert run.prepare(a, start=0)["pid"] != run.prepare(b, start=0)["pid"] and run.versions == {"x": {"fake": "1"}}
        with pytest.raises(ChildError):
            a.ask("step", silent=True)
        again = both()
        assert not {a, b} & set(again) and run.alive == list(again)
        assert [run.prepare(child, start=5)["pid"] for child in again] == [child.process.pid for child in again]
    assert run.alive == []
    monkeypatch.setitem(harness.ENVIRONMENTS, "absent", (tmp_path / ".venv-absent/bin/python", "make absent"))
    with pytest.raises(NotMeasured, match=r"needs .venv-absent \(make absent\)"), run.child("y", "absent", "m"):
        pass


# ---- blocks


def turns(log: list[str]) -> dict[str, Any]:
    def theirs(seen: Any) -> dict[str, Any]:
        log.append("theirs")
        return {"seconds": 4.0, "tokens": 8, "rows": [1, 2]}

    def ours(seen: Any) -> dict[str, Any]:
        log.append("ours")
        assert seen["theirs"]["rows"] == [1, 2]  # the other system's answer of this very block
        return {"seconds": 1.0, "tokens": 8}

    return {"theirs": theirs, "ours": ours}


def test_a_block_is_bracketed_and_one_that_is_off_is_repeated() -> None:
    # before | block 1: 100, 100 | block 2: 86 (off by 16 %), 100 | block 3: 90, 100 | block 4: 99, 98
    readings = iter([100.0, 100, 100, 86, 100, 90, 100, 99, 98])
    log: list[str] = []
    found = run_blocks(turns(log), 3, lambda: next(readings))
    assert [b.gflops for b in found.kept] == [(100, 100, 100), (100, 90, 100), (100, 99, 98)]
    assert (found.discarded, found.best_gflops) == (1, 100)
    assert log == ["theirs", "ours"] * 4 and next(readings, None) is None


def test_fifteen_percent_is_the_edge() -> None:
    assert steady(Block((100.0, 100 / 1.1499), {}), 100) and not steady(Block((100.0, 100 / 1.1501), {}), 100)


def test_a_machine_that_swings_by_itself_is_granted_its_swing() -> None:
    assert tolerance([100.0, 98.0, 91.5]) == 1.15  # the rule
    assert tolerance([320.0, 270.0, 318.0]) == pytest.approx(1.05 * 320 / 270)
    assert tolerance([320.0] * 11 + [270.0] * 4) == pytest.approx(1.05 * 320 / 270)
    assert tolerance([320.0] * 14 + [100.0]) == 1.15  # once: somebody else
    assert tolerance([300.0, 100.0]) == 1.35  # no machine is idle like this
    readings = iter([320.0, 262.0, 318.0, 255.0, 320.0, 320.0, 320.0])
    found = run_blocks(turns([]), 2, lambda: next(readings), slower=1.25)
    assert found.discarded == 1 and found.kept[0].gflops == (320.0, 262.0, 318.0)  # 255 is more than 25 % off


def test_a_better_product_later_condemns_earlier_blocks_and_repeats_are_bounded() -> None:
    slow = iter([50.0] * 3 + [100.0] * 40)  # the machine was busy when it all began
    found = run_blocks(turns([]), 2, lambda: next(slow))
    assert [b.gflops for b in found.kept] == [(100, 100, 100)] * 2 and found.discarded == 2
    calls: list[str] = []
    never = run_blocks(turns(calls), 3, lambda: 10.0, best=100.0)  # a run that was fast before
    assert never.kept == [] and never.discarded == 6 and len(calls) == 12
    with pytest.raises(NotMeasured, match="all 6 were discarded"):
        compare(never, "ours", "theirs", "tokens")
    found_out: dict[str, Any] = {"case": "c"}
    with forgiven(found_out, lambda text: None):
        compare(never, "ours", "theirs", "tokens")
    assert found_out["discarded"] == 6


def test_a_product_slowed_by_what_a_block_left_behind_is_timed_again():
    readings = iter([100.0, 50.0, 99.0, 98.0, 60.0, 61.0, 100.0, 100.0, 100.0])
    waits: list[str] = []
    found = run_blocks(turns([]), 1, lambda: next(readings), settle=lambda: waits.append("wait"))
    # first block: 100, then 50 and 99 after a wait, then 98: steady
    assert [b.gflops for b in found.kept] == [(100.0, 99.0, 98.0)] and found.discarded == 0 and len(waits) == 1
    slow = iter([100.0, 60.0, 61.0, 100.0, 100.0, 100.0])
    found = run_blocks(turns([]), 1, lambda: next(slow), settle=lambda: waits.append("wait"))
    assert found.discarded == 1 and len(found.kept) == 1  # still slow after the wait: discarded


def measured(pairs: list[tuple[float, float]]) -> Measured:
    return Measured([Block((1.0,), {"ours": {"seconds": a, "tokens": 10}, "theirs": {"seconds": b, "tokens": 10}}) for a, b in pairs], 1, 1.0)


def test_the_ratio_is_the_median_of_the_blocks_ratios_beside_the_worst() -> None:
    found = compare(measured([(1.0, 4.0), (2.0, 4.0), (1.0, 9.0)]), "ours", "theirs", "tokens")
    assert (found["ratio"], found["worst_ratio"]) == (4.0, 2.0)  # not the ratio of medians, 4
    assert found["rate"] == {"ours": 10.0, "theirs": 2.5} and found["best_rate"] == {"ours": 10.0, "theirs": 2.5}
    assert (found["blocks"], found["discarded"]) == (3, 1)


def test_efficiency_is_executed_speed_and_shares_of_the_useful() -> None:
    found = efficiency([90e9], [100e9], [2.0], [0.5])
    assert found == {"achieved_gflops": 50.0, "of_limit": 0.25, "work_eff": 0.9}
    # 200 GFLOP at 100 GFLOP/s, and 30 GB at 10 GB/s after that
    assert Calibration({"float32": 100.0}, 10.0).seconds(200e9, 30e9, "float32") == pytest.approx(2 + 3)


# ---- criteria


def case(ratio: float | None, off: float = 0.0, **more: Any) -> dict[str, Any]:
    found = {"case": "c", "checks": [agree("loss", 1 + off, 1.0, 0.01)]} | more
    return found | ({"ratio": ratio, "worst_ratio": ratio} if ratio is not None else {"not_measured": "no peer"})


@pytest.mark.parametrize(
    ("cases", "met"),
    [
        ([case(3.0)], True), ([case(2.99)], False), ([case(5.0), case(2.0)], False), ([case(5.0, off=0.02)], False),
        ([], None), ([case(5.0), case(None)], None), ([{"case": "c", "ratio": 5.0, "worst_ratio": 5.0}], False),
    ],
)  # fmt: skip
def test_a_floor_is_met_by_the_worst_case_and_only_by_equal_results(cases: list[dict[str, Any]], met: bool | None) -> None:
    assert at_least("B", "floor", 3, cases).met is met


def test_at_most_takes_the_largest() -> None:
    assert at_most("B", "m", 0.6, [{"case": "a", "m": 0.5}, {"case": "b", "m": 0.7}], "m") == Criterion("B", "m", "<= 0.6", "0.70 at b, the worst of 2", False)
    assert at_most("B", "m", 0.6, [{"case": "a"}], "m").met is None


def test_what_stops_a_case_is_written_into_it() -> None:
    said: list[str] = []
    found: dict[str, Any] = {"case": "c"}
    with forgiven(found, said.append):
        raise NotMeasured("no peer here")
    assert found["not_measured"] == "no peer here" and "no peer here" in said[0]
    with pytest.raises(ZeroDivisionError), forgiven(found, said.append):  # a bug is no gap
        _ = 1 / 0


def test_the_gauge_and_the_calibration_are_speeds() -> None:
    assert 0.1 < gauge(0.02, 64) < 1e5
    found = calibrate([(32, 48)], 32)
    assert set(found.peak_gflops) == {"float32", "bfloat16"} and min(found.peak_gflops.values()) > 0 < found.read_gb_per_s
