"""The C kernels against torch's operations, and that they are left alone where they cannot be trusted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from burnish.maths import kernels
from burnish.maths.head import LogitMap
from burnish.maths.kernels import Kernels, kernels_for

pytestmark = pytest.mark.skipif(kernels_for(torch.float32) is None, reason=str(kernels.library()[1]))
DTYPES = [torch.float32, torch.bfloat16]


def made(dtype: torch.dtype) -> Kernels:
    found = kernels_for(dtype)
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("logit_map", [LogitMap(), LogitMap(0.3, None, 0.6), LogitMap(1.2, 5.0, 0.8)])
def test_overwrite_exp_is_the_maps_exponential_and_its_slope(dtype: torch.dtype, rows: int, logit_map: LogitMap) -> None:
    z = (6 * torch.randn(rows, 1003, generator=torch.Generator().manual_seed(rows))).to(dtype)
    z[0, :5] = torch.tensor([-torch.inf, -1e30, 80.0, -80.0, 0.0]).to(dtype)
    y = logit_map(z.double())
    for keep in (False, True):
        out = z.clone()
        top, mass = made(dtype).overwrite_exp(out, logit_map.scale, logit_map.softcap, logit_map.temperature, keep)
        want = (y - y.amax(1, True)).exp()
        assert torch.allclose(top.double(), y.amax(1, True), rtol=1e-5)
        assert torch.allclose(mass.double(), want.sum(1, True), rtol=2e-5)
        slope = logit_map.slope(y)
        if keep and isinstance(slope, torch.Tensor):
            want = want * slope
        assert torch.allclose(out.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=2e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_stays_one(dtype: torch.dtype) -> None:
    z = torch.randn(2, 100).to(dtype)
    z[1, 37] = torch.nan
    _, mass = made(dtype).overwrite_exp(z, 1.0, None, 1.0, True)
    assert bool(mass[0].isfinite()) and bool(mass[1].isnan())
    own, _ = made(dtype).block_lse(z, 16, 1.0, None, 1.0)
    assert int(own.isnan().sum()) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_and_norms_and_gates(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    z = (5 * torch.randn(4, 530, generator=generator)).to(dtype)
    own, warm = made(dtype).block_lse(z, 64, 1.0, None, 0.5)
    blocks = F.pad(z.double(), (0, 46), value=-torch.inf).unflatten(1, (9, 64))
    assert torch.allclose(own.double(), blocks.logsumexp(-1), atol=1e-5)
    assert torch.allclose(warm.double(), (blocks / 0.5).logsumexp(-1), atol=1e-5)
    x, y, w = (torch.randn(7, 96, generator=generator).to(dtype) for _ in range(3))
    for late in (False, True):
        total, out = x.clone(), torch.empty_like(x)
        made(dtype).add_norm(total, y, None, w[0].float(), 1e-5, late, out)
        assert torch.equal(total, x + y)
        plain = F.rms_norm(total.float(), (96,), None, 1e-5)
        want = plain.to(dtype) * w[0] if late else (plain * w[0].float()).to(dtype)
        assert torch.allclose(out.float(), want.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    both = (4 * torch.randn(7, 96, generator=generator)).to(dtype)
    gate, up = both.chunk(2, -1)
    for gelu, act in ((False, F.silu), (True, lambda g: F.gelu(g, approximate="tanh"))):
        got, want = made(dtype).gated(both, gelu), act(gate) * up
        assert torch.allclose(got.float(), want.float(), rtol=8 * torch.finfo(dtype).eps, atol=1e-5)


def test_denormal_numbers_stay_on() -> None:  # -ffast-math as a whole would flush them to zero for the process
    made(torch.float32)
    assert float(torch.tensor(1e-40) * 1.0) > 0 and 1e-310 * 1.0 > 0


def test_without_a_compiler_or_by_choice_torch_does_the_work(tmp_path: object) -> None:
    code = "import torch; from burnish.maths.kernels import kernels_for, library; print(kernels_for(torch.float32), library()[1])"
    for more, said in (({kernels.OFF: "1"}, "is set"), ({"CC": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}, "cannot build")):
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | more, capture_output=True, text=True, check=True)
        assert done.stdout.startswith("None") and said in done.stdout


def test_a_kernel_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernels, "gated", lambda self, both, gelu: both[:, : both.shape[1] // 2] * 1.1)
    assert kernels._checked.__wrapped__(torch.float32) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", range(1, kernels.FEW + 1))
@pytest.mark.parametrize("width", [31, 32, 200])
def test_few_rows_are_the_products_side_by_side(dtype: torch.dtype, rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weights = [torch.randn(n, width, generator=generator).to(dtype) for n in (1, 37, 64)]
    biases = [None, torch.randn(37, generator=generator).to(dtype), None]
    x = torch.randn(rows, width, generator=generator).to(dtype)
    run = made(dtype).few_rows(weights, biases)
    want = torch.cat([F.linear(x.double(), w.double(), None if b is None else b.double()) for w, b in zip(weights, biases)], -1)
    assert torch.allclose(run(x).double(), want, rtol=4 * torch.finfo(dtype).eps, atol=2e-5 if dtype == torch.float32 else 2e-3)
    weights[1][5] += 1  # the weights are read where they lie
    assert not torch.equal(run(x)[:, 6].double(), want[:, 6])


@pytest.mark.parametrize("rows", range(1, kernels.FEW + 1))
def test_rows_in_full_precision_may_read_halved_weights(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weights = [torch.randn(n, 200, generator=generator).bfloat16() for n in (64, 37)]
    bias, x = torch.randn(37, generator=generator), torch.randn(rows, 200, generator=generator)
    want = torch.cat([x.double() @ weights[0].double().T, F.linear(x.double(), weights[1].double(), bias.double())], -1)
    got = made(torch.float32).few_rows(weights, [None, bias])(x)
    assert got.dtype == torch.float32 and torch.allclose(got.double(), want, atol=2e-5)


def test_they_are_checked_where_there_is_no_graph() -> None:
    kernels._checked.cache_clear()
    with torch.no_grad():
        assert kernels_for(torch.float32) is not None
    kernels._checked.cache_clear()
    with torch.inference_mode():
        assert kernels_for(torch.float32) is not None
