"""A stage's `rewards` block: its short forms, its rows checked from source, and what cannot be meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.config.check import check
from burnish.config.faults import RecipeError
from burnish.config.load import load
from burnish.config.provenance import write
from burnish.config.schema import Rewards
from burnish.core import table
from tests.config.tables import tables  # noqa: F401
from tests.config.test_load import GOOD

ONLINE = '''
def grpo(material, rewards, *, group_size: int = 8):
    """Group-relative policy gradient (arXiv:2402.03300)."""


METHODS = Table("method", {"grpo": grpo})


def number(completions, answer, *, tolerance: float = 0.0):
    """The right number."""


def think(completions, *, tag: str = "think"):
    """The right shape."""


REWARDS = Table("reward", {"number": number, "think": think}, also={"accuracy": "number"})


def weighted(values, weights):
    """The sum."""


def gated(values, weights, *, gate: str, at_least: float = 1.0):
    """The gate."""


COMBINE = Table("combine", {"sum": weighted, "gated": gated})
'''
HEAD = GOOD.replace("method: {name: sft}", "method: grpo").replace("method: sft", "method: grpo")


@pytest.fixture(autouse=True)
def _online(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    (tables.parent / "source" / "toy" / "online.py").write_text(ONLINE)
    places = {**table.TABLES, "reward": ("toy.online:REWARDS",), "combine": ("toy.online:COMBINE",)}
    places["method"] = (*places["method"], "toy.online:METHODS")
    monkeypatch.setattr(table, "TABLES", places)


def recipe(rewards: str, head: str = HEAD) -> str:
    """GOOD with a method that takes rewards, and the block after it."""
    lines = head.splitlines()
    at = next(i for i, line in enumerate(lines) if "method:" in line)
    return "\n".join([*lines[: at + 1], *(("    " + line) for line in rewards.splitlines()), *lines[at + 1 :], ""])


def read(rewards: str, *overrides: str, head: str = HEAD) -> Rewards:
    Path("r.yaml").write_text(recipe(rewards, head))
    block = load("r.yaml", overrides).recipe.stages[0].rewards
    assert block is not None
    return block


def said(rewards: str, *overrides: str, head: str = HEAD) -> str:
    with pytest.raises(RecipeError) as caught:
        read(rewards, *overrides, head=head)
    return caught.value.render()


@pytest.mark.parametrize("form", ["rewards: number", "rewards: [number]", "rewards: {name: number}", "rewards: {use: number}", "rewards:\n  use:\n    - name: number"])
def test_short_forms_say_the_same(form: str) -> None:
    block = read(form)
    assert [(r.name, r.weight, r.title, r.params) for r in block.use] == [("number", 1.0, "number", {"tolerance": 0.0})]
    assert block.combine.name == "sum" and (block.deadline_s, block.max_error_rate, block.workers) == (10.0, 0.1, 2)


def test_everything_at_once_survives_being_written_and_read() -> None:
    text = (
        "rewards:\n  use:\n    - {name: number, weight: 2, tolerance: 1e-3, columns: {answer: solution}}\n    - {name: think, label: shape}\n"
        "  combine: {name: gated, gate: number}\n  route: {column: source, rewards: {math: [number, shape]}}\n  workers: 3"
    )
    block = read(text)
    assert block.use[0].params == {"tolerance": 1e-3} and block.use[0].columns == {"answer": "solution"} and block.use[1].title == "shape"
    assert block.combine.params == {"gate": "number", "at_least": 1.0}
    resolved = load("r.yaml")
    assert check(resolved).ok
    Path("again.yaml").write_text(write(resolved))
    assert load("again.yaml").recipe == resolved.recipe
    assert resolved.provenance["stages.0.rewards.use.0.tolerance"].startswith("r.yaml:")
    assert read(text, "stages.sft.rewards.use.number.weight=0.5").use[0].weight == 0.5


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ("rewards: numbr", "'numbr' is not a reward. Did you mean 'number'?"),
        ("rewards: [{name: number, tolerence: 1}]", "rewards.use.0.tolerence: 'number' has no parameter 'tolerence'. Did you mean 'tolerance'?"),
        ("rewards: [{name: number, weight: heavy}]", "rewards.use.0.weight: \"heavy\" given, wanted a number"),
        ("rewards: {use: [number], combin: sum}", "rewards.combin: no such key. Did you mean 'combine'?"),
        ("rewards: {use: [number], combine: gate}", "'gate' is not a combine. Did you mean 'gated'?"),
        ("rewards: {use: [number, think], combine: {name: gated, gate: thin}}", "rewards.combine.gate: 'thin' is not one of the rewards. Did you mean 'think'?"),
        ("rewards: [number, number]", "rewards.use.1.label: two rewards are called 'number'"),
        ("rewards: {use: [number], max_error_rate: 2}", "wanted the share of a batch that may fail, from 0 to 1"),
        ("rewards: own.py:f", "'own.py' does not exist"),
    ],
)
def test_faults_name_their_line(rewards: str, message: str) -> None:
    told = said(rewards).replace("'heavy'", '"heavy"')
    assert message in told and "r.yaml:" in told, told


def test_your_own_function_is_described_and_never_run() -> None:
    Path("own.py").write_text("open('canary', 'w')\ndef f(completions, *, scale: float): ...\n")
    assert "'own.py:f' needs 'scale'" in said("rewards: own.py:f")
    assert read("rewards: {name: own.py:f, scale: 2}").use[0].title == "f" and not Path("canary").exists()


def test_a_method_takes_rewards_or_it_does_not() -> None:
    assert "'sft' takes no rewards: they would do nothing" in said("rewards: number", head=GOOD)
    assert "'grpo' learns from rewards, and there are none" in said("")
