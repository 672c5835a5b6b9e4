"""Schedules against transformers' own."""

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from burnish.train.schedules import constant, cosine, linear


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize(("ours", "theirs"), [(linear, get_linear_schedule_with_warmup), (cosine, get_cosine_schedule_with_warmup)])
def test_equals_transformers(ours, theirs, warmup: int) -> None:
    optim = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = theirs(optim, warmup, 20)
    for step in range(20):
        assert ours(step, 20, warmup=float(warmup)) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optim.step()
        schedule.step()


def test_warmup_below_one_is_a_share_and_the_floor_is_reached() -> None:
    assert [round(constant(s, 10, warmup=0.4), 2) for s in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert cosine(10, 10, floor=0.1) == pytest.approx(0.1)
    assert linear(10, 10) == 0.0
