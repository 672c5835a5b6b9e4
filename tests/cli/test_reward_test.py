"""`burnish reward-test`: the table, and exit code 6 where gold is not paid in full."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from burnish.cli import invoke
from burnish.core import table

OWN = '''
def always(completions, answer):
    return [1.0 for _ in completions]


def marks(completions, answer):
    return [2.0 * c.endswith(f"#### {a}") for c, a in zip(completions, answer)]


def breaks(completions, answer):
    return [1.0 / len(c) for c in completions]


def hangs(completions):
    while any("slow" in c for c in completions):
        pass
    return [0.5 for _ in completions]
'''
ONLINE = '''
def grpo(material, rewards, *, group_size: int = 8):
    """Group-relative policy gradient (arXiv:2402.03300)."""


METHODS = Table("method", {"grpo": grpo})
'''
RECIPE = """burnish: 1
name: online
model: spark
stages:
  - name: rl
    method: grpo
    data: {task: sums, levels: [2], rows: 64}
    rewards:
      use: [number, {name: length_cap, cap: 8, unit: characters, weight: 0.5}]
      combine: {name: gated, gate: number}
    train: {steps: 2, batch_rows: 4, learning_rate: 1.0e-3}
"""


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    rows = [("1+1", "#### 2", 2), ("1+1", "#### 3", 2), ("1+1", "", 2), ("2+2", "#### 4 #### 5", 4), ("2+2", "slow", 4)]
    Path("out.jsonl").write_text("".join(json.dumps({"prompt": p, "completion": c, "answer": a}) + "\n" for p, c, a in rows))


def test_gold_and_stored_completions(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["reward-test", "--reward", "number", "--completions", "out.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "2 gold answers, 2 prompts; functions get texts" in said and "5 stored completions, 2 prompts" in said
    assert re.search(r"number +1 +1\.000 +0\.000 +0% +0 +0 +\d+  1 x 2\n", said) and re.search(r"number +1 +0\.200.*0 x 4, 1 x 1\n", said)
    assert said.rstrip().endswith("Gold scores full marks from number.")


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["reward-test", "--reward", "own.py:marks", "--reward", "think", "--completions", "out.jsonl", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["held_against_gold"] == ["marks"] and told["failing"] == []
    assert [one["value"] for one in told["stored"]["components"]["marks"]] == [2.0, 0.0, 0.0, 0.0, 0.0]
    assert told["gold"]["total"] == [{"value": 2.0}, {"value": 2.0}] and told["stored"]["stats"]["total"]["reward_mean"] == 0.4


def test_gold_that_is_not_paid_is_exit_code_6_with_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["reward-test", "--reward", "number", "--task", "letters", "--rows", "3"]) == 6
    said = capsys.readouterr().err
    assert "3 gold answers score less than 1: what is right would go unrewarded" in said
    assert "letters/train/3/0001  number abstained; gold completion:" in said
    assert invoke(["reward-test", "--reward", "own.py:marks", "--completions", "out.jsonl", "--full", "3"]) == 6
    assert "out.jsonl:1  marks scored 2" in capsys.readouterr().err


def test_a_reward_that_tells_nothing_apart_is_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["reward-test", "--reward", "own.py:always", "--task", "sums", "--rows", "4"]) == 0
    assert "always gives the answers of other rows full marks too: it tells nothing apart." in capsys.readouterr().out


def test_errors_and_timeouts_are_counted_and_too_many_are_exit_code_6(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert invoke(["reward-test", "--reward", "own.py:breaks", "--completions", "out.jsonl", "--full", "0.01"]) == 6
    said = capsys.readouterr().err
    assert "reward own.py:breaks  failed on 1 of 5 samples or more (1 crash)" in said and "ZeroDivisionError" in said and "own.py" in said


def test_a_recipe_s_rewards_on_its_own_data(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(table, "TABLES", {**table.TABLES, "method": ("online:METHODS",)})
    monkeypatch.setattr("burnish.core.table.read_module", _reading(tmp_path))
    Path("r.yaml").write_text(RECIPE)
    assert invoke(["reward-test", "r.yaml", "--rows", "8"]) == 0
    said = capsys.readouterr().out
    assert "8 gold answers" in said and re.search(r"length_cap +0\.5", said) and "Gold scores full marks from number" in said
    assert invoke(["reward-test", "r.yaml", "--stage", "rll"]) == 2
    assert "no stage 'rll' with rewards. Did you mean 'rl'?" in capsys.readouterr().err
    assert invoke(["reward-test", "r.yaml", "--set", "stages.rl.rewards.use.number.columns={answer: level}", "--rows", "4"]) == 6


def _reading(folder: Path):  # type: ignore[no-untyped-def]
    """`read_module` that also finds a toy method."""
    from burnish.core import signature

    (folder / "online.py").write_text(ONLINE)
    return lambda name: signature.read_source(folder / "online.py") if name == "online" else signature.read_module(name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give a recipe, or --reward, and not both"),
        (["r.yaml", "--reward", "number"], "give a recipe, or --reward, and not both"),
        (["--reward", "number"], "nothing to score"),
        (["--reward", "numbr", "--task", "sums"], "Did you mean 'number'"),
        (["--reward", "number", "--task", "summs"], "Did you mean 'sums'"),
        (["--reward", "number", "--task", "sums", "--file", "x.jsonl"], "both --task and --file"),
        (["--reward", "number", "--file", "x.jsonl", "--level", "2"], "--level is of a --task"),
        (["--reward", "number", "--task", "sums", "--set", "a=b"], "--set and --stage are of a recipe"),
        (["--reward", "{name: regex}", "--task", "sums"], "'regex' needs 'pattern'"),
        (["--reward", "{name: regex", "--task", "sums"], "is not YAML"),
        (["first_steps/own_data"], "no stage of it has rewards"),
    ],
)
def test_what_cannot_be_meant(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert invoke(["reward-test", *words]) == 2
    assert said in capsys.readouterr().err


def test_it_is_torch_free() -> None:
    code = "import sys; from burnish.cli import invoke; code = invoke(['reward-test', '--reward', 'task', '--task', 'route']); sys.exit(code or any(m in sys.modules for m in ('torch', 'transformers')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
