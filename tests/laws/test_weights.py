"""Laws every row of the weights table obeys, then what makes each row itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from burnish.core.errors import ConfigError, DataError
from burnish.core.table import describe
from burnish.maths.logprobs import nll
from burnish.maths.weights import WEIGHTS, fixed_length, sequence_mean, sequence_sum, token_mean

TIGHT = {"rtol": 1e-14, "atol": 1e-14}
LENGTHS = (4, 1, 7, 2)
ROWS = pytest.mark.parametrize("row", list(WEIGHTS))


def units(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


@ROWS
def test_positive_finite_and_fp64(row: str) -> None:
    weight = WEIGHTS[row](units())
    assert weight.shape == units().shape and weight.dtype == torch.float64
    assert bool((weight > 0).all()) and bool(weight.isfinite().all())


@ROWS
def test_labels_of_one_unit_weigh_alike(row: str) -> None:
    weight = WEIGHTS[row](units())
    for u in range(len(LENGTHS)):
        assert len(weight[units() == u].unique()) == 1


@ROWS
def test_permuting_labels_permutes_weights(row: str) -> None:
    order = torch.randperm(len(units()), generator=torch.Generator().manual_seed(0))
    assert_close(WEIGHTS[row](units()[order]), WEIGHTS[row](units())[order], **TIGHT)


@ROWS
def test_names_of_units_do_not_matter(row: str) -> None:
    renamed = torch.tensor([70, 3, 12, 900])[units()]  # units without labels leave gaps
    assert_close(WEIGHTS[row](renamed), WEIGHTS[row](units()), **TIGHT)


@ROWS
@pytest.mark.parametrize("pieces", [1, 2, 5, 14])
def test_loss_and_gradient_do_not_depend_on_the_split(row: str, pieces: int) -> None:
    g = torch.Generator().manual_seed(1)
    logprobs = torch.randn(len(units()), generator=g, dtype=torch.float64, requires_grad=True)
    weight = WEIGHTS[row](units())
    (whole,) = torch.autograd.grad(nll(logprobs, weight), logprobs)
    order = torch.randperm(len(units()), generator=g)
    losses = []
    for part in order.chunk(pieces):
        loss = nll(logprobs[part], weight[part])
        loss.backward()
        losses.append(loss.detach())
    assert_close(sum(losses), nll(logprobs, weight).detach(), rtol=1e-12, atol=1e-12)
    assert_close(logprobs.grad, whole, **TIGHT)


@ROWS
def test_a_batch_said_twice_is_the_same_mean(row: str) -> None:
    twice = torch.cat([units(), units() + len(LENGTHS)])
    assert_close(WEIGHTS[row](twice)[: len(units())], WEIGHTS[row](units()) / 2, **TIGHT)


@ROWS
def test_equal_lengths_make_all_rows_proportional(row: str) -> None:
    weight = WEIGHTS[row](units((3, 3, 3)))
    assert_close(weight / weight[0], torch.ones_like(weight), **TIGHT)


@ROWS
def test_no_labels_is_an_error(row: str) -> None:
    with pytest.raises(DataError, match="no labels"):
        WEIGHTS[row](torch.zeros(0, dtype=torch.long))


@ROWS
def test_described_with_a_citation(row: str) -> None:
    assert describe("weights")[row].citation
    assert "weight = " in describe("weights")[row].doc


def test_sums() -> None:
    unit, total, sequences = units(), sum(LENGTHS), len(LENGTHS)
    assert_close(token_mean(unit).sum().item(), 1.0)
    assert_close(sequence_mean(unit).sum().item(), 1.0)
    assert_close(sequence_sum(unit).sum().item(), total / sequences)
    assert_close(fixed_length(unit, length=8).sum().item(), total / (8 * sequences))
    per_unit = torch.zeros(sequences, dtype=torch.float64).index_add(0, unit, sequence_mean(unit))
    assert_close(per_unit, torch.full((sequences,), 1 / sequences, dtype=torch.float64))


def test_by_hand() -> None:
    unit = torch.tensor([0, 0, 0, 1])
    assert token_mean(unit).tolist() == [1 / 4] * 4
    assert sequence_mean(unit).tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    assert sequence_sum(unit).tolist() == [1 / 2] * 4
    assert fixed_length(unit, length=10).tolist() == pytest.approx([1 / 20] * 4)


def test_fixed_length_equals_sequence_mean_at_its_own_length() -> None:
    unit = units((5, 5))
    assert_close(fixed_length(unit, length=5), sequence_mean(unit), **TIGHT)
    with pytest.raises(ConfigError, match="at least 1"):
        fixed_length(unit, length=0)
