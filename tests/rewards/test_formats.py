"""Rewards for shape, each against hand-worked numbers and strings made to fool it."""

from __future__ import annotations

import time

import pytest

from burnish.core.errors import DataError
from burnish.rewards.formats import language, length_cap, length_target, repetition, think


def test_think_tags() -> None:
    right = ["<think>a</think>b", "  <think>\na\n</think>\n\nb\n"]
    assert think(right) == [1.0, 1.0]
    wrong = [
        "", "b", "<think>a", "<think></think>b", "<think> \n</think>b", "<think>a</think>", "<think>a</think> \n", "a<think>b</think>c", "</think>b",
        "<think>a</think>b<think>c</think>d", "<think><think>a</think></think>b", "<think>a</think>b</think>", "<think>the tag <think> opens</think>b",
        "<Think>a</Think>b", "<think >a</think>b", "<think>a</ think>b", "<think>" * 50_000, "<think>a</think>" * 50_000,
    ]  # fmt: skip
    began = time.process_time()
    assert think(wrong) == [0.0] * len(wrong) and time.process_time() - began < 2
    assert think(["a</think>b", "<think>a</think>b", "a"], begins="inside") == [1.0, 0.0, 0.0]
    assert think(["[t]a[/t]b"], opening="[t]", closing="[/t]") == [1.0]
    assert think([[{"role": "assistant", "content": "<think>a</think>b"}]]) == [1.0]


def test_language_is_the_share_of_letters_in_its_script() -> None:
    assert language(["abcd", "abc\u0434", "12 + 3 = 15!", ""]) == [1.0, 0.75, None, None]
    assert language(["\u4f60\u597dab"], language="zh") == [0.5] and language(["\u3053\u4e16"], language="ja") == [1.0]
    assert language(["p\u0430ssw\u043erd"]) == [pytest.approx(6 / 8)]  # Cyrillic letters that look Latin
    assert language(["\U0001d400\uff21a"]) == [pytest.approx(1 / 3)]  # mathematical bold, full width
    assert language(["\u0665\u200b\U0001f600x"]) == [1.0]  # digits, blanks and pictures are no letters
    assert language(["caf\u00e9 na\u00efve \u0153uvre"]) == [1.0]


def test_repetition_is_the_share_of_n_grams_said_before() -> None:
    assert repetition(["a b c d", "a b", ""]) == [0.0, 0.0, 0.0]
    assert repetition(["a b c a b c"]) == [-0.25]  # abc bca cab abc: 3 of 4 differ
    assert repetition(["x " * 100], size=1) == [pytest.approx(-0.99)]
    assert repetition(["A a A a"], size=2, most=0.5) == [pytest.approx(-0.5 * (1 - 1 / 3))]
    assert repetition(["ababab"], size=2) == [0.0] and repetition(["ababab"], size=2, unit="characters") == [pytest.approx(-0.6)]
    began = time.process_time()
    assert repetition(["word " * 100_000])[0] < -0.999 and time.process_time() - began < 2
    with pytest.raises(DataError, match="size 0"):
        repetition(["a"], size=0)


def test_lengths() -> None:
    ids = [[0] * n for n in (0, 5, 10, 15, 20, 99)]
    texts = [""] * 6
    assert length_cap(texts, ids, cap=10) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert length_target(texts, ids, target=10) == [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    assert length_cap(["a b c", "\u4f60\u597d"], cap=2, unit="words") == [0.0, 1.0]
    assert length_cap(["abc", "\u4f60\u597d"], cap=2, unit="characters") == [0.0, 1.0]
    with pytest.raises(DataError, match="completion_ids"):
        length_cap(["a"], cap=2)
    with pytest.raises(DataError, match="target 0"):
        length_target(["a"], ids[:1], target=0)
