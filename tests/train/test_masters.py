"""A master in two parts is the fp32 master it stands for: the same numbers, the same steps, the same checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import burnish.train.masters as masters_module
from burnish.maths.kernels import halves, kernels_for, whole
from burnish.train.masters import Master, steppers

needs_kernels = pytest.mark.skipif(kernels_for(torch.bfloat16) is None, reason="no compiler here")


def numbers() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    few = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.00390625, 1.01171875, -1.00390625, 3.3e38, -3.3e38, 1e-38, 1e-42, -1e-42])  # two ties among them
    return torch.cat([few, torch.randn(4084, generator=generator) * 10 ** torch.randint(-6, 4, (4084,), generator=generator)])


def test_halves_are_the_nearest_bf16_number_and_what_is_left_to_the_bit() -> None:
    x = numbers()
    high, low = halves(x)
    assert high.dtype == torch.bfloat16 and low.dtype == torch.int16
    assert torch.equal(whole(high, low).view(torch.int32), x.view(torch.int32))
    near, tie = x.to(torch.bfloat16), (x.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(high[~tie], near[~tie])
    assert bool((high[tie].abs() >= x[tie].abs()).all()) and 2 <= int(tie.sum()) < 10


def made(split: bool, monkeypatch: pytest.MonkeyPatch) -> list[Master]:
    with monkeypatch.context() as patch:
        if not split:
            patch.setattr(masters_module, "kernels_for", lambda *_: None)
        found = [Master.of(torch.nn.Parameter(x.bfloat16())) for x in (numbers()[12:].clamp(-3, 3).view(-1, 4), numbers()[12:112].clamp(-3, 3))]
    assert all((m.rest is not None) == split for m in found)
    return found


def stepped(masters: list[Master], start: int = 0, steps: int = 6, *, seen: Callable[[list[Master]], None] | None = None) -> None:
    each = steppers(masters, rate=1e-2, betas=(0.8, 0.9), epsilon=1e-6, decay=0.1)
    if seen is not None:
        seen(masters)
    for t in range(start, start + steps):
        generator = torch.Generator().manual_seed(t)
        for m in masters:
            m.gradient.copy_(torch.randn(m.gradient.shape, generator=generator))
        for stepper in each:
            stepper.step(1e-2 / (1 + t), torch.tensor(1.5))
        for m in masters:
            m.follow()


@needs_kernels
def test_a_master_in_two_parts_steps_as_torchs_fused_adamw_does(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = made(True, monkeypatch), made(False, monkeypatch)
    begin = [m.read().clone() for m in ours]
    stepped(ours)
    stepped(theirs)
    for a, b, x in zip(ours, theirs, begin):
        moved = (b.read() - x).abs().max()
        assert float(moved) > 1e-2  # six steps of up to a hundredth
        torch.testing.assert_close(a.read(), b.read(), rtol=1e-6, atol=1e-7)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(a.state()[key], b.state()[key], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(a.working, b.working, rtol=2**-8, atol=0)  # one rounding apart at most
        assert torch.equal(a.working.float(), halves(a.read())[0].float())


@needs_kernels
@pytest.mark.parametrize("split", [True, False])
def test_what_one_kind_of_master_saved_the_other_continues(split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = made(True, monkeypatch)
    stepped(straight, 0, 6)
    first = made(split, monkeypatch)
    stepped(first, 0, 3)

    def load(masters: list[Master]) -> None:
        for m, other in zip(masters, first):
            m.write(Master.joined(other.parts()))
            m.state().update({k: x.clone() for k, x in other.state().items()})

    second = made(not split, monkeypatch)
    stepped(second, 3, 3, seen=load)
    for a, b in zip(straight, second):
        torch.testing.assert_close(a.read(), b.read(), rtol=1e-6, atol=1e-7)


@needs_kernels
@pytest.mark.parametrize("split", [True, False])
def test_forgotten_moments_make_the_next_step_the_first(split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    m = made(split, monkeypatch)[:1]
    (stepper,) = steppers(m, rate=1e-2, betas=(0.9, 0.999), epsilon=1e-12, decay=0.0)
    m[0].gradient.fill_(2.0)
    for _ in range(3):
        stepper.step(1e-2, None)
    stepper.forget()
    assert not stepper.moments()
    before = m[0].read().clone()
    m[0].gradient.fill_(-1e-3)
    stepper.step(1e-2, None)
    torch.testing.assert_close(m[0].read() - before, torch.full_like(before, 1e-2), rtol=1e-3, atol=1e-6)
