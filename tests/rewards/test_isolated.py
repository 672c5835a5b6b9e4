"""Rewards whose running time the completion decides: patterns and algebra, killed where they do not end."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import pytest

from burnish.core.errors import ConfigError, MachineError, RewardError
from burnish.rewards.build import build
from burnish.rewards.isolated import expression, regex

needs_math = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")


def test_a_pattern_matches_from_end_to_end() -> None:
    assert regex(["#### 12:30", "#### 12:30 or 1:00", "12:30", ""], pattern=r"\d\d?:\d\d") == [1.0, 0.0, 0.0, 0.0]
    assert regex(["yes\nno", "xyes\nno"], pattern="yes.*", on="text") == [1.0, 0.0]
    assert regex(["<think>#### a</think>#### b"], pattern="b", part="after_think") == [1.0]


def test_a_pattern_that_backtracks_for_ever_is_killed() -> None:
    block = {"use": {"name": "regex", "pattern": "(a|aa)+", "on": "text"}, "deadline_s": 0.4, "max_error_rate": 0.5, "workers": 1}
    with build(block) as rewards:
        began = time.monotonic()
        found = rewards.score(["p"] * 2, ["a" * 60 + "b", "aaa"], {}).components["regex"]
    assert [one.error for one in found] == ["timeout", None] and found[1].value == 1.0
    assert time.monotonic() - began < 4


def test_a_pattern_that_is_none_says_so() -> None:
    with build({"name": "regex", "pattern": "("}) as rewards, pytest.raises(RewardError, match="missing \\), unterminated subpattern"):
        rewards.score(["p"], ["a"], {})
    with pytest.raises(ConfigError, match="'regex' needs 'pattern': text"):
        build("regex")


def test_without_its_package_expression_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "math_verify" else found(name, *more))
    with pytest.raises(MachineError, match=r"needs the package math_verify, which is not installed\n.*burnish\[math\]") as caught:
        build("expression")
    assert caught.value.exit_code == 4


RIGHT = [
    ("1/2", "#### 0.5"), ("\\frac{1}{2}", "\\boxed{1/2}"), ("x^2+2x+1", "\\boxed{(x+1)^2}"), ("\\{1,2\\}", "\\boxed{\\{2,1\\}}"), ("42", "\\boxed{x=42}"),
    ("3", "\\boxed{\\sqrt{9}}"), ("10\\%", "#### 10\\%"), ("2\\sqrt{3}", "\\boxed{2\\sqrt{3}}"), ("12", "#### 12\\text{ cm}"), (42, "so\n#### 42"),
    ("2^3 \\cdot 5", "\\boxed{40}"), ("1+\\sqrt{2}", "\\boxed{\\sqrt{2}+1}"), ("-7", "#### -7"),
]  # fmt: skip
WRONG = [
    ("17", "#### 12+5"), ("42", "\\boxed{6 \\cdot 7}"), ("42", "\\boxed{41=42}"), ("42", "\\boxed{42=42}"), ("42", "#### 41, 42"), ("42", "#### 41 or 42"),
    ("42", "\\boxed{41}\\boxed{42}"), ("42", "#### 42$ and $41"), ("42", "#### \u0664\u0662"), ("42", ""), ("42", "42"), ("42", "\\boxed{}"),
    ("1/3", "#### 0.333"), ("42", "\\boxed{41<42}"), ("5", "\\boxed{5 \\neq 4}"), ("42", "\\boxed{x}"), ("42", "#### 42" + "0" * 1000), ("42", "\\boxed{{{{"),
    ("2", "\\boxed{\\frac{4}{2}+0+0\\cdot 3+1-1}"),
]  # fmt: skip


@needs_math
@pytest.mark.parametrize(("gold", "text"), RIGHT)
def test_equal_expressions(gold: Any, text: str) -> None:
    assert expression([text], [gold]) == [1.0]


@needs_math
@pytest.mark.parametrize(("gold", "text"), WRONG)
def test_expressions_that_are_not_the_answer(gold: Any, text: str) -> None:
    assert expression([text], [gold]) == [0.0]


@needs_math
def test_a_gold_expression_that_cannot_be_read_abstains() -> None:
    assert expression(["#### 42"], [""]) == [None]


@needs_math
def test_algebra_that_does_not_end_is_killed() -> None:
    """The kind of input of Math-Verify#65: a tower of powers, which its own time limit does not stop."""
    block = {"use": "expression", "deadline_s": 2.0, "max_error_rate": 0.5, "workers": 1}
    with build(block) as rewards:
        texts = ["\\boxed{9^{9^{9^{9}}}}", "\\boxed{42}"]
        found = rewards.score(["p"] * 2, texts, {"answer": ["7^{7^{7^{7}}} + 1", "42"]}, [0, 1]).components["expression"]
    assert found[0].error == "timeout" and found[1].value == 1.0
