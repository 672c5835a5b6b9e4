"""Data order: a pure function of integers, every row once an epoch wherever a run was killed."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.core.errors import ConfigError, DataError
from burnish.data.sampler import Sampler, order

ROWS = st.integers(1, 40)
BATCH = st.integers(1, 50)
SEED = st.integers(-(2**70), 2**70)


@settings(deadline=None)
@given(rows=ROWS, seed=SEED, epoch=st.integers(0, 10**6))
def test_an_order_is_a_permutation(rows, seed, epoch):
    assert sorted(order(seed, epoch, rows)) == list(range(rows))


@settings(max_examples=150, deadline=None)
@given(rows=ROWS, batch_rows=BATCH, seed=SEED, kills=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_every_row_once_an_epoch_for_any_kill_points(rows, batch_rows, seed, kills):
    """After each kill only the three integers survive; the run goes on from them with a new sampler."""
    state, step, drawn = (seed, 0, 0), 0, []
    for steps in kills:
        order.cache_clear()
        sampler = Sampler(rows, batch_rows, seed)
        step = sampler.step_at(state)
        for _ in range(steps):
            drawn += sampler.batch(step)
            step += 1
        state = sampler.state(step)
    assert drawn == [row for s in range(sum(kills)) for row in Sampler(rows, batch_rows, seed).batch(s)]
    for epoch in range(len(drawn) // rows):
        assert sorted(drawn[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    most = Counter(drawn)
    assert max(most.values()) - min(most.get(row, 0) for row in range(rows)) <= 1


@settings(deadline=None)
@given(rows=ROWS, batch_rows=BATCH, step=st.integers(0, 200))
def test_every_batch_is_full_and_the_state_is_where_it_begins(rows, batch_rows, step):
    sampler = Sampler(rows, batch_rows, seed=3)
    assert len(sampler.batch(step)) == batch_rows
    seed, epoch, index = sampler.state(step)
    assert sampler.batch(step)[0] == order(seed, epoch, rows)[index]
    assert sampler.step_at((seed, epoch, index)) == step


def test_a_batch_at_the_border_takes_the_rest_and_then_the_next_epoch():
    sampler = Sampler(rows=5, batch_rows=3, seed=1)
    first, second = list(order(1, 0, 5)), list(order(1, 1, 5))
    assert sampler.batch(0) == first[:3]
    assert sampler.batch(1) == first[3:] + second[:1]
    assert sampler.batch(2) == second[1:4]


def test_sequential_keeps_the_files_order():
    assert [Sampler(5, 3, sequential=True).batch(step) for step in range(3)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]


def test_orders_differ_between_epochs_and_seeds_and_have_no_favourites():
    assert len({tuple(order(seed, epoch, 30)) for seed in range(5) for epoch in range(5)}) == 25
    firsts = Counter(int(order(0, epoch, 6)[0]) for epoch in range(3000))
    expected = 500
    chi2 = sum((firsts[row] - expected) ** 2 / expected for row in range(6))
    assert chi2 < 20.5  # 5 degrees of freedom, p = 0.001; the draw is fixed, so this cannot flake


def test_the_order_is_the_same_in_every_version():
    """Fixed here: a numpy that changed this would silently change every resumed run."""
    assert order(0, 0, 8).tolist() == [2, 1, 3, 0, 4, 6, 5, 7]
    assert order(7, 2, 5).tolist() == [4, 3, 2, 1, 0]


def test_an_order_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        order(0, 0, 4)[0] = 9
    assert order(0, 0, 4).dtype == np.int64


def test_steps_show_every_row_as_often_as_asked():
    assert Sampler(10, 4).steps(1) == 3
    assert Sampler(10, 5).steps(2) == 4
    assert Sampler(10, 4).steps(0.4) == 1
    assert Sampler(1000, 7).steps(0.1 + 0.2) == 43


def test_a_state_saved_under_other_data_is_refused():
    sampler = Sampler(10, 4, seed=1)
    for state in ((2, 0, 4), (1, 0, 3), (1, 0, 12), (1, 0, -4)):
        with pytest.raises(DataError, match="not where a batch begins"):
            sampler.step_at(state)


def test_nothing_to_draw_is_an_error():
    with pytest.raises(DataError, match="no rows"):
        Sampler(0, 4)
    with pytest.raises(ConfigError, match="1 row or more"):
        Sampler(4, 0)
    with pytest.raises(ValueError, match="count from 0"):
        Sampler(4, 2).batch(-1)
