"""Where completions are cut into steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.config.rewards import read_block
from burnish.config.schema import Choice
from burnish.core.errors import ConfigError, RewardError
from burnish.rewards.build import build
from burnish.rewards.segments import Segmenter, lines, numbered, separator, tidy


def parts(text: str, ends: list[int]) -> list[str]:
    return [text[a:b] for a, b in zip([0, *ends], ends)]


@pytest.mark.parametrize(
    ("cut", "text", "wanted"),
    [
        (lines, "1+2=3\n3+4=7\n#### 7", ["1+2=3\n", "3+4=7\n", "#### 7"]),
        (lines, "a\n\n\nb\n", ["a\n\n\n", "b\n"]),  # blank lines belong to the step before
        (lines, "\n\na\nb", ["\n\na\n", "b"]),  # or, where there is none, to the first
        (lines, "one", ["one"]),
        (lines, "", [""]),
        (lines, " \n ", [" \n "]),
        (numbered, "Let us see.\nStep 1: a\nand b\nstep 2. c", ["Let us see.\n", "Step 1: a\nand b\n", "step 2. c"]),
        (numbered, "Step 1: a, see step 2: no\n## Step 2: b", ["Step 1: a, see step 2: no\n", "## Step 2: b"]),
        (separator, "a\n\nb\nc\n\nd", ["a\n\n", "b\nc\n\n", "d"]),
    ],
)
def test_cuts(cut, text: str, wanted: list[str]) -> None:
    ends = tidy(text, cut(text))
    assert parts(text, ends) == wanted and ends[-1] == len(text)


def test_a_function_of_yours_runs_in_a_worker_and_is_checked(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import os\n"
        "def sentences(text, *, mark: str = '.'):\n    return [i + 1 for i, c in enumerate(text) if c == mark]\n"
        "def wrong(text):\n    return [5, 3]\n"
        "def beyond(text):\n    return [len(text) + 1]\n"
        "def dies(text):\n    os._exit(3)\n"
    )
    cut = Segmenter(Choice(name=f"{mine}:sentences", mark=";"), workers=1, deadline_s=5)  # type: ignore[call-arg]
    try:
        assert cut(["a; b; c", "none"]) == [[2, 5, 7], [4]]
    finally:
        cut.close()
    for name, message in (("wrong", r"gave \[5, 3\]"), ("beyond", "for a text of 4"), ("dies", "crash")):
        cut = Segmenter(Choice(name=f"{mine}:{name}"), workers=1, deadline_s=5)
        with pytest.raises(RewardError, match=message) as caught:
            cut(["text"])
        assert caught.value.exit_code == 6
        cut.close()


def test_the_block_says_how_and_steps_without_a_process_reward_are_refused() -> None:
    block = read_block({"use": ["task_steps"], "steps": {"name": "separator", "between": ";"}})
    assert block.steps is not None and block.steps.params == {"between": ";"}
    with build(block) as rewards:
        assert rewards.cut is not None and rewards.cut(["a;b"]) == [[2, 3]]
    with build(["number"]) as rewards:
        assert rewards.cut is None
    with build(["task_steps"]) as rewards:
        assert rewards.cut is not None and rewards.cut.name == "lines"
    with pytest.raises(ConfigError, match=r"rewards.steps  no reward here takes steps"):
        read_block({"use": ["number"], "steps": "lines"})
    with pytest.raises(ConfigError, match="Did you mean 'lines'"):
        read_block({"use": ["task_steps"], "steps": "newline"})
