"""The pool: deadlines that hold against anything, workers replaced, nothing left behind, replies in order."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from burnish.sandbox import pool as pools
from burnish.sandbox.pool import Job, Pool, Unusable

TARGET = "tests.sandbox.echo"
ROOT = str(Path(__file__).resolve().parents[2])


@pytest.fixture(autouse=True)
def _findable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(TARGET, "s", workers=2) as made:
        made.run([Job({"do": "sleep", "s": 0.2}, 30.0)] * 2)  # long enough for both to start
        yield made


def jobs(*does: str, deadline_s: float = 0.3, **more: object) -> list[Job]:
    return [Job({"do": do, **more}, deadline_s) for do in does]


def state(pid: int) -> str | None:
    """The state letter of a process, None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def gone(pid: int) -> bool:
    """No such process, or one that is dead and waits for somebody else to collect it."""
    end = time.monotonic() + 2
    while time.monotonic() < end:
        if state(pid) in (None, "Z", "X"):
            return True
        time.sleep(0.01)
    return False


def zombies() -> list[int]:
    """Dead children of this process that nobody collected."""
    found = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [int(pid) for path in found for pid in path.read_text().split() if state(int(pid)) == "Z"]


def test_replies_are_in_the_order_of_the_jobs(pool: Pool) -> None:
    slow_first = [Job({"do": "sleep", "s": 0.1 if n == 0 else 0.0, "n": n}, 5.0) for n in range(12)]
    came = list(pool.each(slow_first))
    assert [index for index, _ in came] != list(range(12)) and {index for index, _ in came} == set(range(12))
    assert [reply.value["n"] for reply in pool.run(slow_first)] == list(range(12))
    with Pool(TARGET, "s", workers=1) as single:
        assert [r.value["n"] for r in single.run(slow_first)] == list(range(12))


@pytest.mark.parametrize("do", ["loop in C", "deaf", "flood", "stop"])
def test_a_call_that_does_not_end_is_killed_at_its_deadline(pool: Pool, do: str) -> None:
    before = set(pool.pids)
    began = time.monotonic()
    replies = pool.run([*jobs(do), *jobs("fine", "fine", deadline_s=30.0, n=7)])
    seconds = time.monotonic() - began
    assert replies[0].fault == "timeout" and 0.3 <= replies[0].seconds < 1.5 and seconds < 3
    assert [r.value["n"] for r in replies[1:]] == [7, 7]
    killed = before - set(pool.pids)
    assert len(killed) == 1 and all(map(gone, killed)) and not zombies()
    assert all(r.fault is None for r in pool.run(jobs("", "", "", deadline_s=30.0))) and len(pool.pids) == 2


def test_the_children_of_a_call_die_with_it(pool: Pool, tmp_path: Path) -> None:
    file = tmp_path / "pids"
    (reply,) = pool.run(jobs("children", deadline_s=0.8, file=str(file)))
    pids = [int(line) for line in file.read_text().split()]
    assert reply.fault == "timeout" and len(pids) == 2 and all(map(gone, pids)) and not zombies()


def test_calls_that_crash_say_how(pool: Pool) -> None:
    died, left, raised, nan = pool.run(jobs("die", "exit", "raise", "nan", deadline_s=30.0))
    assert (died.fault, died.detail) == ("crash", "its process ended by SIGSEGV")
    assert (left.fault, left.detail) == ("crash", "SystemExit(0)")
    assert (raised.fault, raised.detail) == ("crash", "ValueError('boom')")
    assert raised.traceback.startswith("Traceback") and "echo.py" in raised.traceback
    assert nan.fault == "crash" and "JSON" in nan.detail


def test_what_a_call_prints_is_shown_and_never_taken_for_its_answer(pool: Pool) -> None:
    (reply,) = pool.run(jobs("print", deadline_s=30.0, n=3))
    assert reply.value["n"] == 3
    (flooded,) = pool.run(jobs("flood"))
    assert flooded.printed == "x" * pools.SHOWN_OUTPUT
    assert all(r.fault is None for r in pool.run(jobs("close", "", "", deadline_s=30.0)))


def test_the_time_of_many_hanging_calls_is_bounded(pool: Pool) -> None:
    began = time.monotonic()
    replies = pool.run(jobs(*["loop in C"] * 4, deadline_s=0.2))
    assert [r.fault for r in replies] == ["timeout"] * 4
    assert time.monotonic() - began < 4 * 0.2 + 4  # two at a time, and two workers started anew
    assert pool.started <= 2 + 4 and not zombies()


def test_it_works_off_any_thread_and_calls_run_on_the_main_thread_of_the_child(pool: Pool) -> None:
    found: list[object] = []

    def work() -> None:
        found.extend(r.value if r.fault is None else r.fault for r in pool.run(jobs("main thread", "deaf")))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert found == [True, "timeout"]
    assert pool.run(jobs("", deadline_s=30.0))[0].fault is None  # workers outlive the thread that started them


def test_a_worker_imports_only_what_its_target_does(pool: Pool) -> None:
    assert pool.run(jobs("modules", deadline_s=30.0))[0].value == []


def test_leaving_early_kills_the_calls_in_hand(pool: Pool) -> None:
    pids = set(pool.pids)
    with closing(pool.each(jobs("", "deaf", deadline_s=30.0))) as replies:
        next(replies)
    assert len(pids - set(pool.pids)) == 1 and all(map(gone, pids - set(pool.pids))) and not zombies()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("raise", r"raised ValueError\('not today'\) when it was loaded"),
        ("exit", "ended with exit code 3 before it was ready"),
        ("hang", "was not ready within 0.5 s"),
    ],
)
def test_a_target_that_does_not_load_is_said_at_once(settings: str, said: str) -> None:
    with Pool(TARGET, settings, workers=1, start_s=0.5 if settings == "hang" else 30.0) as broken:
        with pytest.raises(Unusable, match=said):
            broken.run(jobs("", deadline_s=30.0))
        assert broken.pids == [] and not zombies()


def test_closing_ends_every_worker(pool: Pool) -> None:
    pids = pool.pids
    pool.close()
    assert len(pids) == 2 and all(map(gone, pids)) and not zombies()
    with pytest.raises(ValueError, match="closed"):
        pool.run(jobs(""))


def test_workers_do_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from burnish.sandbox.pool import Job, Pool; p = Pool('tests.sandbox.echo', workers=2)\n"
        "p.run([Job({}, 30), Job({}, 30)]); print(*p.pids, flush=True); p.run([Job({'do': 'deaf'}, 60)])"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert len(pids) == 2 and all(map(gone, pids))
