import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.core.errors import ConfigError, DataError
from burnish.data.tasks.base import FOLDS, Item, Task, fold_of, items, rationale
from burnish.data.tasks.table import TASKS

EVERY_TASK = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))


def tiny(questions: int) -> Task:
    def make(level: int, rng: random.Random) -> Item:
        n = rng.randrange(questions)
        return Item(f"q{n}", str(n), f"####{n}", f"####{n}", level)

    return Task("tiny", make, lambda text, item: text == item.rationale, lambda text: text, (1,))


@EVERY_TASK
def test_folds_never_share_a_question_whatever_the_seed(task: Task) -> None:
    seen = {fold: set[str]() for fold in FOLDS}
    for fold in FOLDS:
        for seed in (0, 1, 99):
            seen[fold] |= {item.question for item in items(task, fold, task.levels, 40 * len(task.levels), seed)}
    train, validation, test = seen.values()
    assert not train & validation and not train & test and not validation & test


@EVERY_TASK
def test_rows_are_a_function_of_seed_fold_index_and_level(task: Task) -> None:
    once = items(task, "train", task.levels, 60, 3)
    assert once == items(task, "train", task.levels, 60, 3)
    assert once[:20] == items(task, "train", task.levels, 20, 3)
    assert once != items(task, "train", task.levels, 60, 4)
    alone = items(task, "train", task.levels[-1:], 60 // len(task.levels), 3)
    assert alone == [item for item in once if item.level == task.levels[-1]]


@EVERY_TASK
def test_rows_are_different_levels_take_turns_and_ids_say_where_from(task: Task) -> None:
    made = items(task, "test", task.levels, 81, 0)
    assert len({item.question for item in made}) == len({item.id for item in made}) == 81
    shares = Counter(item.level for item in made)
    assert max(shares.values()) - min(shares.values()) <= 1
    assert made[0].id == f"{task.name}/test/{task.levels[0]}/0001"
    assert items(task, "test", None, 81, 0) == made


@EVERY_TASK
@given(seed=st.integers(0, 2**32), data=st.data())
def test_gold_verifies_and_a_changed_answer_does_not(task: Task, seed: int, data: st.DataObject) -> None:
    item = task.make(data.draw(st.sampled_from(task.levels)), random.Random(seed))
    for text in (item.rationale, item.answer):
        assert task.verify(text, item)
        assert task.answer_key(text) == item.gold
    at = data.draw(st.integers(0, len(item.gold) - 1))
    symbols = "0123456789" if item.gold.isdigit() else "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    symbol = data.draw(st.sampled_from(symbols).filter(lambda s: s != item.gold[at]))
    changed = item.gold[:at] + symbol + item.gold[at + 1 :]
    assert not task.verify(f"####{changed}", item)
    assert not task.verify(f"####{item.gold}{symbols[1]}", item)
    assert not task.verify(item.gold, item)
    assert not task.verify("", item)
    assert not task.verify(f"{item.answer}\n####{changed}", item)
    assert task.answer_key("no answer here") is None


@EVERY_TASK
@given(text=st.text(max_size=40))
def test_no_text_makes_a_verifier_raise(task: Task, text: str) -> None:
    item = task.make(task.levels[0], random.Random(0))
    for said in (text, "####" + text):
        task.verify(said, item)
        task.answer_key(said)


def test_a_verifier_that_says_it_reads_no_gold_reads_none() -> None:
    for task in TASKS.values():
        if not task.verifier_needs_gold:
            item = task.make(task.levels[0], random.Random(0))
            blind = Item(item.question, "", "", "", item.level, item.facts)
            assert task.verify(item.answer, blind)


def test_all_questions_of_a_small_level_can_be_had_and_not_one_more() -> None:
    wanted = [f"q{n}" for n in range(400) if fold_of(f"q{n}") == "test"]
    made = items(tiny(400), "test", (1,), len(wanted), 0)
    assert sorted(item.question for item in made) == sorted(wanted)
    with pytest.raises(DataError, match=rf"level 1 of task 'tiny' has {len(wanted)} .* {len(wanted) + 1} are asked"):
        items(tiny(400), "test", (1,), len(wanted) + 1, 0)


def test_folds_have_their_shares() -> None:
    shares = Counter(fold_of(f"question {n}") for n in range(20_000))
    assert abs(shares["train"] / 20_000 - 0.8) < 0.01
    assert abs(shares["test"] / 20_000 - 0.1) < 0.01


def test_what_cannot_be_meant_is_refused() -> None:
    task = TASKS["sums"]
    with pytest.raises(ConfigError, match="no level 9; it has 2, 3, 4, 5"):
        items(task, "test", (9,), 4, 0)
    with pytest.raises(ConfigError, match="not a fold"):
        items(task, "dev", (2,), 4, 0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="0 rows"):
        items(task, "test", (2,), 0, 0)


def test_a_rationale_is_steps_and_a_mark() -> None:
    assert rationale(["1+2=3", "3+4=7"], "7") == "1+2=3\n3+4=7\n####7"
