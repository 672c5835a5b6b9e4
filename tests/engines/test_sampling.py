"""Noise that depends on who draws only, and draws that follow the exact distribution."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from burnish.core.records import Sampling
from burnish.engines.local.sampling import TWO_LEVELS_FROM, draw, floor_of, gumbel, row_keys
from burnish.maths.head import LogitMap
from burnish.maths.kernels import kernels_for
from tests.engines.chi_square import chi_square

MASK = 2**64 - 1


def splitmix(x: int) -> int:
    """The finaliser in Python's unbounded integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def test_the_hash_is_splitmix64_of_seed_item_sample_position_and_lane() -> None:
    golden = 0x9E3779B97F4A7C15
    seed, item, sample, position, lane = 5, 2**63 - 12345, 3, 17, 2**32 + 9
    key = splitmix((seed + golden) & MASK)
    for part in (item, sample):
        key = splitmix(((key ^ part) + golden) & MASK)
    assert int(row_keys(seed, [(item, sample)])[0]) & MASK == key
    bits = splitmix((splitmix((key + position * golden) & MASK) + lane * golden) & MASK) & (2**63 - 1)
    want = -math.log(-math.log1p(-(bits + 0.5) / 2**63))
    keys = torch.from_numpy(row_keys(seed, [(item, sample)]))
    found = gumbel(keys, torch.tensor([position]), 4, 2**32 + 7)[0, 2]
    assert float(found) == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_noise_is_gumbel_and_rows_lanes_and_positions_are_independent() -> None:
    keys = torch.from_numpy(row_keys(0, [(i, s) for i in range(40) for s in range(10)]))
    noise = torch.stack([gumbel(keys, torch.full((400,), p), 50) for p in range(5)])
    assert noise.isfinite().all()
    assert len(torch.unique(noise)) > 0.99 * noise.numel()  # float32 has few values near its ends
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.015)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)
    for axis in range(3):
        a, b = noise.narrow(axis, 0, noise.shape[axis] - 1), noise.narrow(axis, 1, noise.shape[axis] - 1)
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.02


def drawn(logits: Tensor, sampling: Sampling, n: int) -> tuple[Tensor, Tensor]:
    keys = torch.from_numpy(row_keys(sampling.seed, [(0, s) for s in range(n)]))
    return draw(logits.expand(n, -1).clone(), sampling, keys, torch.full((n,), 9))


def exact(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, then top-k, then top-p, token by token in double precision."""
    p = (logits.double() / sampling.temperature).softmax(-1)
    order = p.argsort(descending=True)
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
        p /= p.sum()
    before, kept = 0.0, torch.zeros_like(p)
    for i in order.tolist():
        if before >= sampling.top_p:
            break
        kept[i] = p[i]
        before += float(p[i])
    return kept / kept.sum()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 5},
        {"top_p": 0.7},
        {"temperature": 1.5, "top_k": 8, "top_p": 0.6},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocabulary", [12, 97, TWO_LEVELS_FROM + 700])
def test_frequencies_are_exact(vocabulary: int, settings: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 2 * torch.randn(vocabulary, generator=generator)
    if vocabulary > 1000:  # a few likely tokens, some of them in the ragged last block, over a flat rest
        logits[::600] += 5
        logits[-3:] += 6
    sampling = Sampling(seed=1, **settings)  # type: ignore[arg-type]
    tokens, logprobs = drawn(logits, sampling, 6000 if vocabulary < 1000 else 1500)
    assert chi_square(torch.bincount(tokens, minlength=vocabulary), exact(logits, sampling)) < 1
    assert torch.allclose(logprobs, logits.log_softmax(-1)[tokens], atol=1e-5)


def test_the_test_of_frequencies_sees_a_wrong_temperature() -> None:
    logits = 2 * torch.randn(97, generator=torch.Generator().manual_seed(97))
    tokens, _ = drawn(logits, Sampling(temperature=0.9), 6000)
    assert chi_square(torch.bincount(tokens, minlength=97), exact(logits, Sampling())) > 1


@pytest.mark.parametrize("vocabulary", [97, 5000])
def test_a_row_draws_the_same_beside_any_others(vocabulary: int) -> None:
    logits = torch.randn(20, vocabulary, generator=torch.Generator().manual_seed(0))
    keys = torch.from_numpy(row_keys(4, [(i, i) for i in range(20)]))
    positions = torch.arange(20)
    order = torch.randperm(20)
    for sampling in (Sampling(), Sampling(temperature=0.8, top_k=30, top_p=0.9)):
        whole, _ = draw(logits.clone(), sampling, keys, positions)
        shuffled, _ = draw(logits[order], sampling, keys[order], positions[order])
        assert torch.equal(shuffled, whole[order])


@pytest.mark.skipif(kernels_for(torch.float32) is None, reason="no kernels here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logit_map", [LogitMap(), LogitMap(1.5, 20.0)])
def test_the_kernels_draw_what_torch_draws(dtype: torch.dtype, logit_map: LogitMap, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same hash, lanes, blocks and map: of 2,000 tokens all but those within a rounding of a tie are the same."""
    head = (3 * torch.randn(40, TWO_LEVELS_FROM + 700, generator=torch.Generator().manual_seed(5))).to(dtype)
    keys = torch.from_numpy(row_keys(4, [(i, i) for i in range(2000)]))
    rows = torch.arange(40).repeat_interleave(50)
    for heat in (0.7, 1.0):
        given = head.clone(), Sampling(temperature=heat), keys, torch.arange(2000), logit_map, rows
        (ours, logprob), _ = draw(*given), monkeypatch.setattr("burnish.engines.local.sampling.kernels_for", lambda *a: None)
        plain, want = draw(head.clone(), *given[1:])
        monkeypatch.undo()
        same = ours == plain
        assert int((~same).sum()) <= 2 and len(ours.unique()) > 100
        assert torch.allclose(logprob[same], want[same], atol=1e-4)


def test_greedy_is_argmax_and_its_logprob_the_models() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    keys = torch.from_numpy(row_keys(0, [(i, 0) for i in range(5)]))
    tokens, logprobs = draw(logits.clone(), Sampling(temperature=0.0, top_k=3, top_p=0.1), keys, torch.arange(5))
    assert torch.equal(tokens, logits.argmax(-1))
    assert torch.allclose(logprobs, logits.log_softmax(-1).max(-1).values)


@pytest.mark.parametrize("vocabulary", [3000, 40_000])
def test_floors_of_flat_and_peaked_rows(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.1, 0.1, 1.0, 3.0, 12.0])  # from thousands of candidates to one or two
    z = torch.randn(5, vocabulary, generator=generator) * scale[:, None]
    z[:, -1] = z.max() + 1  # the largest stands in the ragged last block
    for top_p in (0.01, 0.5, 0.9, 0.999):
        mass = z.double().softmax(-1).sort(descending=True).values.cumsum(-1)
        kept = (z >= floor_of(z, 0, top_p)).sum(-1)
        assert ((kept - (mass < top_p).sum(-1) - 1).abs() <= 1 + kept * 1e-3).all()
    for top_k in (1, 7, 40, 500):
        assert torch.equal(floor_of(z, top_k, 1.0)[:, 0], z.sort(descending=True).values[:, top_k - 1])


def test_ties_with_the_last_one_kept_stay() -> None:
    z = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]])
    assert int((z >= floor_of(z, 2, 1.0)).sum()) == 4
    assert int((z >= floor_of(z, 1, 1.0)).sum()) == 1
    assert int((z >= floor_of(z, 99, 1.0)).sum()) == 5
    assert int((z >= floor_of(z, 0, 1e-9)).sum()) == 1
