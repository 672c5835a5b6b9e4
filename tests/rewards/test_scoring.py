"""A block of rewards, built and scored: what functions are handed, in which calls, and that nothing depends on workers."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from burnish.core.errors import ConfigError, DataError
from burnish.core.records import Message, Scored
from burnish.rewards.build import build

OWN = '''
import json, os, sys
from beside import SCALE

open("canary", "a").write(f"{os.getpid()}\\n")


def trl(completions, solution, log_extra=None, **kwargs):
    """As TRL's functions are written: more columns than it names."""
    return [float(c == s) for c, s in zip(completions, solution)]


def everything(**columns):
    return [float(len(columns)) for _ in columns["completions"]]


def sees(prompts, completions, *, scale: float = 1.0):
    """How many samples a call holds."""
    return [scale * SCALE * len(completions) for _ in completions]


def shape(prompts, completions):
    return [1.0 if isinstance(c, str) else 2.0 + len(c) for c in completions]


def modules(completions):
    return [float(any(m in sys.modules for m in ("torch", "transformers"))) for _ in completions]


def steps(completions, steps):
    return [[1.0 if step.endswith("!") else None for step in each] for each in steps]


def printing(completions):
    print("x" * 100000)
    return [1.0 for _ in completions]


def maybe(completions, level=None):
    return [None if level is None else float(n) for n in (level or completions)]


async def later(completions):
    return [1.0]


class Held:
    def __call__(self, completions, answer, **rest):
        return [float(c == a) for c, a in zip(completions, answer)]


held = Held()
'''


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    Path("beside.py").write_text("SCALE = 1\n")


def values(found: list[Scored]) -> list[float | None]:
    return [one.value for one in found]


def test_functions_get_what_their_signature_names_and_columns_may_be_renamed() -> None:
    columns = {"solution": ["a", "x"], "answer": ["b", "b"], "level": [3, 4]}
    with build(["own.py:trl", "own.py:everything", "own.py:maybe", "own.py:held"]) as rewards:
        found = rewards.score(["p", "q"], ["a", "b"], columns).components
    assert {name: values(ones) for name, ones in found.items()} == {"trl": [1, 0], "everything": [5, 5], "maybe": [3, 4], "held": [0, 1]}
    with build({"name": "own.py:trl", "columns": {"solution": "answer"}}) as rewards:
        assert values(rewards.score(["p", "q"], ["a", "b"], columns).total) == [0, 1]
    with build({"name": "number", "columns": {"answer": "gold"}}) as rewards:
        assert values(rewards.score(["p"], ["#### 4"], {"gold": [4]}).total) == [1]


def test_a_column_that_is_not_there_is_named() -> None:
    with build("own.py:trl") as rewards:
        with pytest.raises(DataError, match=r"reward trl  needs a column 'solution'; the data has: answer\n  columns: \{solution: <your column>\}"):
            rewards.score(["p"], ["a"], {"answer": ["a"]})
        with pytest.raises(DataError, match="'solution' holds 2 rows for 1 completions"):
            rewards.score(["p"], ["a"], {"solution": ["a", "b"]})
        with pytest.raises(DataError, match=r"column 'solution' cannot be sent to a worker: .*not JSON serializable"):
            rewards.score(["p"], ["a"], {"solution": [object()]})
        with pytest.raises(DataError, match="no completions"):
            rewards.score([], [])
        with pytest.raises(DataError, match="called 'prompts', as an argument is"):
            rewards.score(["p"], ["a"], {"prompts": ["x"], "solution": ["a"]})
    with build("agreement") as rewards, pytest.raises(DataError, match="are in no groups"):
        rewards.score(["p"], ["#### 1"], {})


def test_a_call_sees_one_group_whole_whatever_the_workers() -> None:
    groups = [0, 1, 0, 2, 1, 0]
    for workers in (1, 2, 3):
        with build({"use": {"name": "own.py:sees", "scale": 2.0}, "workers": workers}) as rewards:
            assert values(rewards.score(["p"] * 6, list("abcdef"), {}, groups).total) == [6, 4, 6, 2, 4, 6]
            assert values(rewards.score(["p"] * 20, ["a"] * 20).total) == [32] * 16 + [8] * 4


def test_functions_get_texts_or_message_lists_as_the_data_is() -> None:
    with build("own.py:shape") as rewards:
        assert values(rewards.score(["p"], ["a"]).total) == [1.0]
        turns = [Message("user", "p")], [Message("assistant", "a"), Message("assistant", "b")]
        assert values(rewards.score([turns[0]], [turns[1]]).total) == [4.0]
    with build("number") as rewards:
        assert values(rewards.score([turns[0]], [[Message("assistant", "#### 4")]], {"answer": ["4"]}).total) == [1.0]


def test_a_process_reward_scores_steps() -> None:
    with build("own.py:steps") as rewards:
        found = rewards.score(["p"] * 2, ["ab!", "c"], steps=[["a", "b!"], ["c"]], step_ends=[[5, 9], [2]])
        assert found.components["steps"] == [Scored(1.0, spans=((5, None), (9, 1.0))), Scored(spans=((2, None),))]
        assert rewards.score(["p"], ["ab!"], steps=[["a", "b!"]]).components["steps"][0].spans == ((1, None), (3, 1.0))
        assert [end for end, _ in rewards.score(["p"], ["a\nb!"]).components["steps"][0].spans] == [2, 4]  # cut into lines


def test_the_file_is_described_here_and_executed_in_children_without_torch() -> None:
    rewards = build(["own.py:modules", "own.py:printing"])
    assert not Path("canary").exists() and len(rewards.sources["modules"]) == 64
    with rewards:
        found = rewards.score(["p"], ["a"])
    assert values(found.components["modules"]) == [0.0] and values(found.components["printing"]) == [1.0]
    assert Path("canary").exists()
    with pytest.raises(ConfigError, match=r"own.py: 'later' is async\n  write a plain function"):
        build("own.py:later")
    with pytest.raises(ConfigError, match=r"own.py has no 'tlr'. Did you mean 'trl'"):
        build("own.py:tlr")


def test_a_file_that_does_not_load_says_where() -> None:
    Path("bad.py").write_text("import nothing_like_it\n\n\ndef f(completions):\n    return [1.0]\n")
    with build("bad.py:f") as rewards, pytest.raises(ConfigError, match=r"reward bad.py:f  raised ModuleNotFoundError[\s\S]*bad.py\", line 1"):
        rewards.score(["p"], ["a"])


def test_scoring_works_off_the_main_thread() -> None:
    found: list[float | None] = []
    with build("own.py:sees") as rewards:
        thread = threading.Thread(target=lambda: found.extend(values(rewards.score(["p"], ["a"]).total)))
        thread.start()
        thread.join(30)
    assert found == [1.0]


def test_building_and_scoring_is_torch_free() -> None:
    code = (
        "import sys; from burnish.rewards.build import build\n"
        "with build(['number', 'own.py:shape']) as r: print(r.score(['p'], ['#### 4'], {'answer': [4]}).total[0].value)\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2.0\n"), done.stderr
