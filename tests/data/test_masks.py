"""Masks as pure functions: which turns, before any token exists."""

import inspect

import pytest

from burnish.core.records import Example, Message
from burnish.core.table import describe, load_table
from burnish.data.masks import MASKS

TURNS = ("system", "user", "assistant", "user", "assistant", "tool", "assistant")


def example(*trains):
    flags = dict(enumerate(trains))
    messages = tuple(Message(role, "x", flags.get(i)) for i, role in enumerate(TURNS))
    return Example(prompt=messages[:4], completion=messages[4:])


@pytest.mark.parametrize(
    ("name", "chosen"), [("completion", {4, 6}), ("assistant", {2, 4, 6}), ("all", {0, 1, 2, 3, 4, 5, 6})]
)
def test_each_mask_chooses_its_turns(name, chosen):
    assert [i for i, pick in enumerate(MASKS[name](example())) if pick] == sorted(chosen)


@pytest.mark.parametrize("name", list(MASKS))
@pytest.mark.parametrize("turn", range(len(TURNS)))
@pytest.mark.parametrize("train", [True, False])
def test_a_turns_own_flag_wins_under_every_mask_and_moves_no_other(name, turn, train):
    plain = MASKS[name](example())
    flagged = MASKS[name](example(*[None] * turn, train))
    assert flagged == [train if i == turn else pick for i, pick in enumerate(plain)]


@pytest.mark.parametrize("name", list(MASKS))
def test_one_flag_a_message(name):
    assert len(MASKS[name](example())) == len(TURNS)
    assert MASKS[name](Example(text="plain")) == []


def test_the_table_is_described_without_being_imported():
    described = describe("mask")
    assert set(described) == set(MASKS) == set(load_table("mask"))
    for name, row in described.items():
        live = [p for p in inspect.signature(MASKS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert [p.name for p in row.parameters] == [p.name for p in live]
        assert row.summary
