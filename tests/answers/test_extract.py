import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.answers.extract import DEEPEST, final_answer, final_number, given_key, marked_answers, normalised, number


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("12+30=42\n####42", "42"),
        ("#### 42", "42"),
        ("####42\nand so on", "42"),
        ("so \\boxed{42}.", "42"),
        ("so \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("####042 then ####42", "042 then"),
        ("####7\n####7", "7"),
        ("####007\n####7", "7"),
        ("\\boxed{7} is the answer ####7", "7"),
        ("42", None),
        ("", None),
        ("####", None),
        ("####   ", None),
        ("####7\n####8", None),
        ("####8\n####7\n####8", None),
        ("\\boxed{1} \\boxed{2}", None),
        ("####7 or \\boxed{8}", None),
        ("####7\n####", None),
        ("\\boxed{7", None),
        ("### 7", None),
    ],
)
def test_the_last_mark_counts_and_marks_that_disagree_do_not(text: str, wanted: str | None) -> None:
    if text == "####042 then ####42":
        assert marked_answers(text) == ["042 then", "42"]
        assert final_answer(text) is None
    else:
        assert final_answer(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("-0", "0"), ("+3", "3"), ("007", "7"), (" 42 ", "42"), ("-0.0", "0"), ("1,250", "1250"), ("3.", "3"),
        ("3.10", "3.1"), (".5", "0.5"), ("-007", "-7"), ("\u22125", "-5"), ("$18", "18"), ("0", "0"), ("- 4", "-4"),
        ("", None), ("-", None), ("+", None), (".", None), ("1 2", None), ("12a", None), ("--3", None), ("+-3", None),
        ("1,25", None), ("1e3", None), ("\u0663", None), ("3.1.4", None), ("nan", None), ("-+3", None),
    ],
)  # fmt: skip
def test_numbers_have_one_spelling(text: str, wanted: str | None) -> None:
    assert number(text) == wanted


@given(st.integers())
def test_every_spelling_of_an_integer_is_read_as_it(value: int) -> None:
    wanted = str(value)
    assert number(wanted) == wanted
    assert number(f"{value:,}") == wanted
    assert number(f"{value:+d}") == wanted
    assert number(f"  {value:012d} ") == wanted
    assert number(f"{value}.0") == wanted
    assert final_number(f"work\n####{value}") == wanted


@given(st.integers(), st.integers())
def test_different_integers_stay_different(a: int, b: int) -> None:
    assert (number(str(a)) == number(str(b))) == (a == b)


@given(st.text())
def test_any_text_is_read_without_an_error_and_normalising_twice_changes_nothing(text: str) -> None:
    final_answer(text)
    assert normalised(normalised(text)) == normalised(text)


@given(st.text(alphabet="\\boxed{}#17 \n", max_size=60))
def test_marks_in_a_tangle_never_raise(text: str) -> None:
    answer = final_answer(text)
    assert answer is None or answer in marked_answers(text)


def test_an_answer_list_wins_nothing() -> None:
    assert final_number("\n".join(f"####{n}" for n in range(500))) is None


def test_without_a_mark_the_whole_text_is_what_is_given() -> None:
    assert given_key("5+3=8\n####08") == given_key("#### 8") == given_key("8.0") == "8"
    assert given_key("it  is\nblue") == "it is blue" and given_key(" ") is None


def _boxes_one_by_one(text: str) -> list[str]:
    """Every closed box, each found by counting braces from its own beginning."""
    found: list[str] = []
    at = text.find("\\boxed{")
    while at >= 0:
        begin = end = at + len("\\boxed{")
        depth = 1
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth == 0:
            found.append(text[begin : end - 1].strip())
        at = text.find("\\boxed{", at + 1)
    return found


def test_boxes_are_those_that_counting_braces_finds() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choice(["\\boxed{", "{", "}", "}", "4", " "]) for _ in range(rng.randrange(14)))
        if text.count("\\boxed{") <= DEEPEST:
            assert marked_answers(text) == _boxes_one_by_one(text), text


def test_boxes_without_end_cost_little() -> None:
    nested = "\\boxed{" * 20_000 + "42" + "}" * 20_000
    began = time.process_time()
    assert len(marked_answers(nested)) == DEEPEST and final_answer(nested) is None
    assert marked_answers("\\boxed{" * 100_000) == [] and time.process_time() - began < 2
