"""Faults 23 to 27: rewards that return nonsense, raise, hang, never differ, or cancel."""

from __future__ import annotations

import gzip
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.core.errors import ConfigError, RewardError
from burnish.core.runs import StageFolder
from burnish.methods.rounds import Round
from burnish.rewards.build import build
from burnish.rewards.scoring import Breakdown
from tests.methods.test_policy_gradient import train

OWN = '''
import os, signal, subprocess, sys, time


def some(completions):
    """What each completion asks for."""
    import numpy
    kinds = {"nan": float("nan"), "inf": float("inf"), "none": None, "text": "1.0", "bool": True, "dict": {"r": 1}, "one": 1,
             "numpy": numpy.float32(0.5), "numpy nan": numpy.float64("nan"), "two": numpy.ones(2), "list": [1.0]}
    return [kinds[c] for c in completions]


def arrays(completions):
    import numpy
    return numpy.ones(len(completions), dtype=numpy.float32)


def tensors(completions):
    """A tensor of them; for another group a list of tensors."""
    import torch
    kinds = {"scalar": torch.tensor(0.25, requires_grad=True), "one": torch.tensor([[0.5]]), "two": torch.ones(2), "nan": torch.tensor(float("nan"))}
    return torch.ones(len(completions), requires_grad=True) if completions[0] == "a" else [kinds[c] for c in completions]


def table(completions):
    import numpy
    return numpy.ones((len(completions), 1))


def mapping(completions):
    return {"rewards": [1.0 for _ in completions]}


def nothing(completions):
    pass


def one_number(completions):
    return 1.0


def generator(completions):
    return (1.0 for _ in completions)


def empty(completions):
    return []


def short(completions):
    return [1.0]


def coroutine(completions):
    async def later():
        return [1.0]
    return later()


async def later(completions):
    return [1.0 for _ in completions]


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
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            with open("pids", "a") as out:
                print(os.getpid(), child.pid, file=out)
            child.wait()
        elif c == "die":
            os.kill(os.getpid(), signal.SIGKILL)
    return [1.0 for _ in completions]


def mixed(completions):
    """Abstains on some, fails on some, hangs on others, in a C loop that hears no signal."""
    found = []
    for c in completions:
        text = c[-1]["content"]
        kind = sum(map(ord, text)) % 5
        if kind == 0:
            sum(range(10**12))
        if kind == 1:
            raise ValueError("odd")
        found.append(None if kind == 2 else float(len(text)))
    return found


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
    more = score("own.py:some", ["numpy", "numpy nan", "two", "list"]).components["some"]
    assert [one.value for one in more] == [0.5, None, None, None]
    assert [one.error for one in more] == [None, "invalid", "invalid", "invalid"]
    assert more[2].detail == "own.py:some, sample 2: gave a ndarray array([1., 1.]), wanted a finite number or None"
    assert found.stats["total"]["reward_mean"] == 1.0 and found.stats["total"]["reward_invalid"] == 4


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("short", "own.py:short, sample 1: returned 1 values for 2 completions"), ("empty", "returned 0 values for 2 completions"),
        ("coroutine", "own.py:coroutine, sample 1: returned a coroutine: it is async; wanted a plain function"),
        ("mapping", "own.py:mapping, sample 1: returned a dict; wanted a list with a number or None for each completion"),
        ("table", "returned a ndarray of shape (2, 1); wanted a list"), ("nothing", "returned a NoneType"), ("one_number", "returned a float"),
        ("generator", "returned a generator"),
    ],
)
def test_23_what_is_no_list(score: Score, name: str, said: str) -> None:
    found = score(f"own.py:{name}", ["a", "b"]).components[name]
    assert [one.error for one in found] == ["invalid"] * 2 and said in found[1].detail
    with pytest.raises(RewardError, match=r"failed on 2 of 2 samples or more \(2 invalid\); 0.1 of them may fail") as caught:
        score(f"own.py:{name}", ["a", "b"], max_error_rate=0.1)
    assert caught.value.exit_code == 6


def test_23_arrays_and_tensors_are_lists(score: Score) -> None:
    assert [one.value for one in score("own.py:arrays", ["a", "b"]).total] == [1.0, 1.0]
    found = score("own.py:tensors", ["a", "b", "scalar", "one", "two", "nan"], [0, 0, 1, 1, 1, 1], workers=1).components["tensors"]
    assert [one.value for one in found] == [1.0, 1.0, 0.25, 0.5, None, None]
    assert [one.error for one in found] == [None, None, None, None, "invalid", "invalid"]
    assert found[4].detail == "own.py:tensors, sample 4: gave a Tensor tensor([1., 1.]), wanted a finite number or None"


def test_23_an_async_function_is_refused_before_anything_runs(score: Score) -> None:
    with pytest.raises(ConfigError, match=r"own\.py: 'later' is async") as caught:
        score("own.py:later", ["a"])
    assert "asyncio.run" in str(caught.value.remedy)


def test_24_it_raises_on_some_samples(score: Score) -> None:
    found = score("own.py:raises", ["good", "x", "good", "y"], max_error_rate=0.5)
    assert [one.value for one in found.components["raises"]] == [1.0, None, 1.0, None]
    assert [one.error for one in found.components["raises"]] == [None, "crash", None, "crash"]
    assert found.components["raises"][3].detail == "own.py:raises, sample 3: raised KeyError('y')"
    assert found.tracebacks["raises"].count("Traceback") == 1 and "KeyError: 'x'" in found.tracebacks["raises"]
    with pytest.raises(RewardError, match=r"2 of 4 samples or more \(2 crash\); 0.4 of them may fail[\s\S]*KeyError: 'x'"):
        score("own.py:raises", ["good", "x", "good", "y"], max_error_rate=0.4)


def test_24_it_raises_on_all_samples(score: Score) -> None:
    found = score("own.py:raises", ["x", "y", "z"])
    assert [one.error for one in found.total] == ["crash"] * 3 and found.stats["total"]["reward_mean"] is None
    assert found.tracebacks["raises"].count("Traceback") == 1
    with pytest.raises(RewardError, match=r"reward own.py:raises  failed on 3 of 3") as caught:
        score("own.py:raises", ["x", "y", "z"], max_error_rate=0.9)
    assert caught.value.exit_code == 6 and str(caught.value).count("Traceback") == 1


@pytest.mark.parametrize("kind", ["sleep", "loop", "deaf", "children"])
@pytest.mark.parametrize("where", ["main thread", "another thread"])
def test_25_it_hangs(score: Score, tmp_path: Path, kind: str, where: str) -> None:
    with build({"use": "own.py:hangs", "max_error_rate": 1.0, "deadline_s": 0.3, "workers": 2}) as rewards:
        pool = rewards.components[0].pool
        assert pool
        rewards.score(["p"] * 2, ["a", "b"], {}, [0, 1])  # the workers have started
        found: list[Breakdown] = []
        began = time.monotonic()

        def work() -> None:
            found.append(rewards.score(["p"] * 3, ["a", kind, "b"], {}, [0, 0, 0]))

        thread = threading.Thread(target=work)
        if where == "main thread":
            work()
        else:
            thread.start()
            thread.join(10)
        took = time.monotonic() - began
        ones = found[0].components["hangs"]
        assert [one.value for one in ones] == [1.0, None, 1.0] and ones[1].error == "timeout"
        assert ones[1].detail.startswith("own.py:hangs, sample 1: killed after 0.")
        assert took < 4  # its group is killed once, then it alone
        # a killed worker is replaced when it is needed: two at most, and as good as the first ones
        assert [one.value for one in rewards.score(["p"] * 4, list("abcd"), {}, [0, 1, 2, 3]).total] == [1.0] * 4
        assert 1 <= len(pool.pids) <= 2 and all(_state(pid) not in (None, "Z") for pid in pool.pids)
    if kind == "children":
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert len(pids) == 4 and all(map(_gone, pids))
    assert not _zombies()


def _state(pid: int) -> str | None:
    """The state letter of a process, None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def _gone(pid: int) -> bool:
    end = time.monotonic() + 2
    while time.monotonic() < end:
        if _state(pid) in (None, "Z", "X"):  # an orphan's body is for init to collect
            return True
        time.sleep(0.01)
    return False


def _zombies() -> list[int]:
    """Dead children of this process that nobody collected."""
    found = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [int(pid) for path in found for pid in path.read_text().split() if _state(int(pid)) == "Z"]


def test_25_a_training_step_is_bounded_and_what_failed_is_no_part_of_the_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 23 to 25 in a run: abstentions, errors and hangs on one group are learned from as if they had not been drawn."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    rewards = {"use": "own.py:mixed", "max_error_rate": 1.0, "deadline_s": 0.2, "workers": 2}
    _, rows = train(tmp_path / "00-rl", method={"name": "grpo", "kl_coef": 0.0}, rewards=rewards, rollouts={"group_size": 6}, steps=1, batch_rows=3)
    folder = StageFolder(tmp_path / "00-rl")
    drawn = Round.read(folder.trajectories(0))
    samples = [s for group in drawn.groups for s in group]
    hung, raised, abstained = (sum(_kind(s.text) == rest for s in samples) for rest in (0, 1, 2))
    assert hung and raised and abstained and len(samples) == 18
    assert (rows[0]["reward_timeouts"], rows[0]["reward_crashes"]) == (hung, raised) and rows[0]["reward_abstained"] == abstained / 18
    timing = json.loads(folder.timing.read_text().splitlines()[0])
    # each group once and each sample once at most, two at a time, and a worker started anew after each
    assert timing["reward_seconds"] < (3 + hung) * (0.2 + 1.0)
    lines = gzip.decompress(folder.credit(0, 0).read_bytes()).splitlines()[1:]
    for group, line in zip(drawn.groups, map(json.loads, lines), strict=True):
        known = [float(len(s.text)) if _kind(s.text) > 2 else None for s in group]
        assert [s.total for s in group] == known
        values = torch.tensor([v for v in known if v is not None], dtype=torch.float64)
        for value, advantage in zip(known, line["advantages"], strict=True):
            if value is None or len(values) < 2:
                assert advantage == 0
            else:
                assert advantage == pytest.approx(float((value - values.mean()) / (values.std() + 1e-4)), abs=1e-4)
    assert not _zombies()


def _kind(text: str) -> int:
    """What `mixed` does of it: 0 hangs, 1 raises, 2 abstains."""
    return sum(map(ord, text)) % 5


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
