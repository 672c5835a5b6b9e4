"""Whatever a function returns becomes one `Scored` a sample, or a precise refusal (fault 23), and exceptions stay with
the samples that caused them (fault 24)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from burnish.core.errors import DataError
from burnish.core.records import Message, Scored
from burnish.rewards.base import attempt, plain, scored, text_of


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.5, None],
        (True, 0.5, None),
        [np.float32(1), np.float64(0.5), None],
        [np.int64(1), np.array([0.5]), None],
        [np.bool_(True), torch.tensor(0.5), None],
        [torch.tensor([1]), torch.tensor(0.5, dtype=torch.bfloat16), None],
        [Fraction(1), Fraction(1, 2), None],
    ],
)
def test_numbers_of_any_kind(returned: Any) -> None:
    found = scored(returned, 3)
    assert found == [Scored(1.0), Scored(0.5), Scored()] and type(found[0].value) is float


def test_arrays_and_tensors_of_one_dimension_are_lists() -> None:
    for whole in (np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), torch.tensor([1, 2]), np.array([1.0, 2.0], dtype=object)):
        assert scored(whole, 2) == [Scored(1.0), Scored(2.0)]


async def _later() -> list[float]:
    return [1.0, 1.0]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "returned a NoneType; wanted a list"),
        (1.0, "returned a float; wanted a list"),
        ("11", "returned a str; wanted a list"),
        ({"reward": [1, 1]}, "returned a dict; wanted a list"),
        ({1.0, 2.0}, "returned a set; wanted a list"),
        ([1.0], "returned 1 values for 2 completions"),
        ([1.0, 2.0, 3.0], "returned 3 values for 2 completions"),
        (np.ones((2, 1)), "returned a ndarray of shape (2, 1); wanted a list"),
        (torch.tensor(1.0), "returned a Tensor of shape (); wanted a list"),
        (iter([1.0, 2.0]), "returned a list_iterator; wanted a list"),
        (_later(), "returned a coroutine: it is async; wanted a plain function"),
    ],
)
def test_what_is_no_list_makes_every_sample_invalid(returned: Any, said: str) -> None:
    found = scored(returned, 2)
    assert [one.error for one in found] == ["invalid"] * 2 and all(said in one.detail for one in found)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "gave nan, wanted a finite number or None"),
        (float("-inf"), "gave -inf"),
        (np.float32("nan"), "gave nan"),
        (torch.tensor(float("nan")), "gave nan"),
        (10**400, "wanted a finite number"),
        ("1.0", "gave a str '1.0'"),
        ("", "gave a str ''"),
        ({"score": 1}, "gave a dict {'score': 1}"),
        ([1.0], "gave a list [1.0]"),
        (np.ones(2), "gave a ndarray"),
        (1j, "gave a complex 1j"),
        ("x" * 1000, "xxx..."),
    ],
)
def test_what_is_no_number_makes_its_own_sample_invalid(value: Any, said: str) -> None:
    good, bad = scored([1.0, value], 2)
    assert good == Scored(1.0)
    assert bad.error == "invalid" and said in bad.detail and len(bad.detail) < 200


def test_a_process_reward_has_a_span_a_step_and_the_value_of_its_weakest() -> None:
    found = scored([[0.9, None, 0.2], [1, 1], []], 3, ends=[[4, 9, 12], [2, 3], []])
    assert found[0] == Scored(0.2, spans=((4, 0.9), (9, None), (12, 0.2)))
    assert found[1] == Scored(1.0, spans=((2, 1.0), (3, 1.0))) and found[2] == Scored()
    wrong = scored([[0.9], 1.0, [0.5, "x"]], 3, ends=[[4, 9], [2], [1, 2]])
    assert [one.error for one in wrong] == ["invalid"] * 3
    assert "1 values for 2 steps" in wrong[0].detail and "a float" in wrong[1].detail and "step 1: gave a str" in wrong[2].detail


def test_where_a_call_raises_its_samples_are_tried_one_by_one() -> None:
    calls: list[int] = []

    def function(completions: list[str], answer: list[int], *, scale: float) -> list[float]:
        calls.append(len(completions))
        return [scale * a / len(c) for c, a in zip(completions, answer)]

    found, trace = attempt(function, {"completions": ["ab", "", "a"], "answer": [2, 3, 4]}, {"scale": 2.0}, 3)
    assert [one.value for one in found] == [2.0, None, 8.0] and calls == [3, 1, 1, 1]
    assert found[1].error == "crash" and "ZeroDivisionError" in found[1].detail and trace.count("Traceback") == 1


def test_kinds_of_failure() -> None:
    def function(completions: list[str]) -> list[float]:
        raise {"net": ConnectionRefusedError("no"), "late": TimeoutError(), "exit": SystemExit(0), "x": KeyError("x")}[completions[0]]

    found, _ = attempt(function, {"completions": ["net", "late", "exit", "x"]}, {}, 4)
    assert [one.error for one in found] == ["infra", "infra", "crash", "crash"]

    def ours(completions: list[str]) -> list[float]:
        raise DataError("not the sample's fault")

    with pytest.raises(DataError):
        attempt(ours, {"completions": ["a"]}, {}, 1)


def test_the_text_of_a_completion() -> None:
    turns = [Message("assistant", "one"), Message("tool", "noise #### 9"), Message("assistant", "two")]
    assert text_of(plain(turns)) == "one\ntwo" and text_of("as it is") == "as it is"
    assert text_of([{"role": "user", "content": None}]) == "" and text_of([]) == ""
