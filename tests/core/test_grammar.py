"""Strategies: one grammar, one spelling, and a remedy that can be typed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.core.errors import ConfigError
from burnish.core.grammar import Spec, parse

WORDS = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True).filter(lambda word: word != "pass")
NUMBERS = st.none() | st.integers(1, 10**9 - 1)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("greedy", Spec("greedy")),
        ("sample", Spec("sample")),
        ("vote:16", Spec("vote", 16)),
        ("best_of:16@prm(min)", Spec("best_of", 16, "prm", "min")),
        ("best_of:4@rule", Spec("best_of", 4, "rule")),
        ("beam@prm", Spec("beam", None, "prm")),
        ("mine.py:search:8@score.py:f(last)", Spec("mine.py:search", 8, "score.py:f", "last")),
        ("pass@16", Spec("pass", 16)),
    ],
)
def test_reads_and_writes_each_form(text: str, spec: Spec) -> None:
    assert parse(text) == spec
    assert str(spec) == text


def test_pass_is_titled_as_the_oracle_it_is() -> None:
    spec = parse("pass@16")
    assert spec.oracle and spec.title == "pass@16 (oracle)" and parse(spec.title) == spec
    assert not parse("vote:16").oracle and parse("vote:16").title == "vote:16"


@given(WORDS, NUMBERS, st.none() | WORDS, st.none() | WORDS)
def test_every_spec_survives_being_written(
    name: str, n: int | None, scorer: str | None, aggregation: str | None
) -> None:
    spec = Spec(name, n, scorer, aggregation if scorer else None)
    assert parse(str(spec)) == spec


@given(st.text(max_size=30))
def test_any_text_is_a_strategy_with_one_spelling_or_a_config_error(text: str) -> None:
    try:
        assert parse(str(parse(text))) == parse(text)
    except ConfigError as error:
        assert error.remedy and error.exit_code == 2


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("vote 16", "type vote:16"),
        ("Vote:16", "type vote:16"),
        ("vote@16", "type vote:16"),
        ("pass:16", "type pass@16"),
        ("pass", "type pass@16"),
        ("vote:0", "1 or more"),
        ("pass@0", "1 or more"),
        ("best_of:16@prm(min", "close the parenthesis"),
        ("", "write name[:n]"),
        ("vote:16\n", "type vote:16"),
        ("vote:" + "9" * 5000, "write name[:n]"),
    ],
)
def test_a_wrong_form_says_what_to_type(text: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, where="my.yaml:3")
    assert caught.value.where == "my.yaml:3"
    assert remedy in str(caught.value.remedy)
    assert len(str(caught.value)) < 300
