import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from burnish.data.tasks.sums import LARGEST, SUMS, make, work


@given(st.sampled_from(SUMS.levels), st.integers(0, 2**32))
def test_every_step_adds_two_numbers_still_to_be_added_and_the_last_is_the_answer(level: int, seed: int) -> None:
    item = make(level, random.Random(seed))
    numbers = [int(n) for n in item.question.split("+")]
    assert len(numbers) == level and max(numbers) <= LARGEST and min(numbers) >= 1
    left = Counter(numbers)
    *steps, last = item.rationale.split("\n")
    assert len(steps) == level - 1
    for step in steps:
        sides, total = step.split("=")
        first, second = map(int, sides.split("+"))
        assert first + second == int(total)
        for used in (first, second):
            assert left[used] > 0
            left[used] -= 1
        left[int(total)] += 1
    assert +left == Counter([sum(numbers)])
    assert last == f"####{sum(numbers)}" and item.gold == str(sum(numbers))


def test_rationales_fit_48_tokens_with_the_end_token() -> None:
    characters = max(len(make(5, random.Random(seed)).rationale) for seed in range(2000))
    mark_is_one_token, end = -3, 1
    assert LARGEST * 5 < 1000 and characters + mark_is_one_token + end <= 48


def test_there_are_many_ways_through_one_question() -> None:
    item = make(5, random.Random(0))
    ways = {tuple(work(item.facts["numbers"], random.Random(seed))[0]) for seed in range(200)}
    assert len(ways) > 150
    assert {work(item.facts["numbers"], random.Random(seed))[1] for seed in range(200)} == {int(item.gold)}


def test_spelling_of_the_number_does_not_matter() -> None:
    item = make(3, random.Random(1))
    assert SUMS.verify(f"#### +0{item.gold}.0 ", item)
    assert SUMS.answer_key(f"####0{item.gold}") == item.gold
    assert SUMS.answer_key("####seven") is None
