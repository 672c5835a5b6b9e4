from burnish.data.tasks.base import Item
from burnish.data.tasks.letters import LETTERS
from burnish.data.tasks.sorting import SORTING


def test_sorting_keeps_leading_zeros() -> None:
    item = Item("Sort 701", "017", "####017", "####017", 3)
    assert SORTING.verify("####017", item) and SORTING.verify("#### 0, 1, 7", item)
    assert not SORTING.verify("####17", item)
    assert not SORTING.verify("####710", item)


def test_letters_may_be_spaced_or_small() -> None:
    item = Item("Reverse TAB", "BAT", "####BAT", "####BAT", 3)
    assert LETTERS.verify("####BAT", item) and LETTERS.verify("#### b-a-t", item)
    assert not LETTERS.verify("####TAB", item)
