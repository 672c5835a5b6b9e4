"""A recipe on a base: what it says of itself, and everything else from another recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.config.load import load, resolve
from burnish.config.provenance import read, write
from burnish.core.errors import ConfigError

BASE = """burnish: 1
name: whole
about: the whole of it
model: spark
stages:
  - name: rl
    method: grpo
    data: {task: sums, rows: 64}
    rewards: task
    rollouts: {group_size: 4}
    train: {steps: 3, learning_rate: 1e-4}
"""


def test_a_recipe_on_a_base_is_the_base_with_what_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("whole.yaml").write_text(BASE)
    Path("part.yaml").write_text(
        "burnish: 1\nname: part\nbase: whole.yaml\nset:\n  stages.rl.method: {name: dapo, clip_high: 0.3}\n"
        "  stages.rl.rollouts.updates: 2\n  stages.rl.data.rows: 128\n  stages.rl.train.learning_rate: 3e-5\n"
    )
    found = load("part.yaml", ["stages.rl.train.steps=4"])
    by_hand = BASE.replace("whole\n", "part\n").replace("grpo", "{name: dapo, clip_high: 0.3}").replace("size: 4", "size: 4, updates: 2")
    Path("hand.yaml").write_text(by_hand.replace("rows: 64", "rows: 128").replace("steps: 3", "steps: 4").replace("1e-4", "3e-5"))
    assert found.recipe == load("hand.yaml").recipe
    says = found.provenance
    assert says["name"] == "part.yaml:2" and says["model"] == "whole.yaml:4" and says["stages.0.rollouts.updates"] == "part.yaml:6"
    assert says["stages.0.method.clip_high"].startswith("part.yaml:5") and says["stages.0.rollouts.group_size"].startswith("whole.yaml:10")
    assert says["stages.0.train.steps"].startswith("--set") and "the text 3e-5 read as" in says["stages.0.train.learning_rate"]
    assert resolve(read(write(found), "resolved.yaml")).recipe == found.recipe


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\nbase: whole.yaml\nmodel: other\n", "part.yaml:4  model: beside a base there is no key of its own"),
        ("base: whole.yaml\n", "needs a name of its own"),
        ("name: a\nbase: [whole.yaml]\n", "part.yaml:3  base: wanted the name or the path"),
        ("name: a\nbase: whole.yaml\nset: 3\n", "part.yaml:4  set: wanted a mapping"),
        ("name: a\nbase: gone.yaml\n", "no recipe and no file"),
        ("name: a\nbase: part.yaml\n", "part.yaml has a base itself"),
        ("name: a\nbase: whole.yaml\nset: {stages.sl.method: sft}\n", "'sl' is none of them"),
        ("name: a\nbase: whole.yaml\nset: {stages.rl.method: dappo}\n", "Did you mean 'dapo'"),
        ("name: a\nbase: whole.yaml\nset:\n  stages.rl.train.setps: 5\n", "part.yaml:5  stages.rl.train.setps"),
    ],
)
def test_what_is_wrong_beside_a_base_is_told_at_its_line(text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("whole.yaml").write_text(BASE)
    Path("part.yaml").write_text("burnish: 1\n" + text)
    with pytest.raises(ConfigError) as caught:
        load("part.yaml")
    assert said in str(caught.value)
