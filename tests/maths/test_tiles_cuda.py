"""The tile pass against its definition in float64; the Triton kernel under its interpreter, where Triton is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.maths import head, tiles_cuda
from burnish.maths.head import LogitMap
from burnish.maths.kernels import Kernels
from burnish.maths.logprobs import weighted_nll

MAPS = [
    LogitMap(),
    LogitMap(scale=0.5, temperature=0.7),
    LogitMap(softcap=3.0),
    LogitMap(scale=2.0, softcap=5.0, temperature=1.5),
]


def check(dtype: torch.dtype, logit_map: LogitMap, keep: bool, vocabulary: int, device: torch.device) -> None:
    g = torch.Generator().manual_seed(vocabulary)
    wide = torch.zeros(5, vocabulary + 3, dtype=dtype, device=device)  # rows further apart than they are long
    z = wide[:, :vocabulary].copy_(4 * torch.randn(5, vocabulary, generator=g))
    z[1, vocabulary // 2] = 40.0
    exact = z.double()
    y = logit_map(exact)
    top = y.amax(1, keepdim=True)
    got_top, got_mass = tiles_cuda.overwrite_exp(z, logit_map.scale, logit_map.softcap, logit_map.temperature, keep)
    assert got_top.dtype == got_mass.dtype == torch.float32 and got_top.shape == got_mass.shape == (5, 1)
    torch.testing.assert_close(got_top.double(), top, rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(got_mass.double(), (y - top).exp().sum(1, keepdim=True), rtol=1e-5, atol=0)
    if keep:
        slope = logit_map.slope(y)
        want = (y - top).exp() * (slope if isinstance(slope, torch.Tensor) else 1.0)
        # the interpreter cuts a bfloat16 off where hardware rounds it
        half = 2**-7 if os.environ.get("TRITON_INTERPRET") == "1" else 2**-8
        tolerance: dict[str, float] = {"rtol": half, "atol": 1e-5} if dtype == torch.bfloat16 else {"rtol": 2e-5, "atol": 3e-7}
        torch.testing.assert_close(z.double(), want, **tolerance)
    assert not wide[:, vocabulary:].any()  # what stands between rows is not touched


def check_head(logit_map: LogitMap) -> None:
    """Loss and gradients, in chunks of 20 rows, against logits that exist whole, in float64."""
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(rows, 16, generator=g).requires_grad_() for rows in (50, 300)]
    label = torch.randint(0, 300, (50,), generator=g)
    loss, _ = head.head_loss(*leaves, label, weighted_nll(torch.ones(50)), logit_map=logit_map, rows=20)
    loss.backward()
    exact = [x.detach().double().requires_grad_() for x in leaves]
    whole = torch.nn.functional.cross_entropy(logit_map(exact[0] @ exact[1].T), label, reduction="sum")
    whole.backward()
    torch.testing.assert_close(loss.double(), whole, rtol=1e-5, atol=0)
    for x, y in zip(leaves, exact):
        assert x.grad is not None and y.grad is not None
        assert (x.grad - y.grad).norm() < 1e-5 * y.grad.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype):
    device = torch.device("cuda", 0)
    assert tiles_cuda.why_not(dtype, device) is None
    for logit_map in MAPS:
        for vocabulary in (1, 97, 8192, 20000):
            for keep in (True, False):
                check(dtype, logit_map, keep, vocabulary, device)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton comes with a CUDA build of torch")
def test_the_kernel_under_tritons_interpreter():
    code = (
        "from tests.maths import test_tiles_cuda as t; import torch; t.tiles_cuda.BLOCK = 128;"
        "d = torch.device('cpu'); assert t.tiles_cuda.why_not(torch.float32, d) is None;"
        "[t.check(x, m, k, v, d) for x in (torch.float32, torch.bfloat16) for m in t.MAPS for k in (True, False)"
        " for v in (1, 97, 128, 300)]; t.head.fused_pass = lambda dtype, device: t.tiles_cuda.overwrite_exp;"
        "[t.check_head(m) for m in t.MAPS]; print('ok')"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "ok", done.stderr[-2000:]


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiles_cuda, "triton", None)
    assert tiles_cuda.why_not(torch.float32, torch.device("cpu")) == "Triton is not installed"


@pytest.mark.parametrize("wrong", [lambda t, m: (t, 2 * m), lambda t, m: (t + 1, m), None])
def test_a_kernel_that_is_wrong_or_does_not_run_is_not_used(wrong, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiles_cuda, "triton", object())

    def stand_in(z: torch.Tensor, scale: float, softcap: float | None, temperature: float, keep: bool):
        if wrong is None:
            raise RuntimeError("no binary for gpu\nsecond line")
        y = LogitMap(scale, softcap, temperature)(z.float())
        top = y.amax(1, True)
        slope = LogitMap(scale, softcap, temperature).slope(y)
        mass = (y - top).exp().sum(1, True)
        z.copy_((y - top).exp() * (slope if isinstance(slope, torch.Tensor) else 1.0))
        return wrong(top, mass)

    monkeypatch.setattr(tiles_cuda, "overwrite_exp", stand_in)
    tiles_cuda._disagreement.cache_clear()
    why = tiles_cuda.why_not(torch.float32, torch.device("cpu"))
    assert why == ("the kernel does not run: no binary for gpu" if wrong is None else "the kernel disagrees with torch")
    tiles_cuda._disagreement.cache_clear()
    if wrong is not None:
        wrong = lambda t, m: (t, m)  # noqa: E731
        assert tiles_cuda.why_not(torch.float32, torch.device("cpu")) is None
        tiles_cuda._disagreement.cache_clear()


def test_the_head_takes_the_kernel_for_cuda_tensors_where_it_is_right(monkeypatch: pytest.MonkeyPatch):
    there, asked = torch.device("cuda", 0), list[tuple[torch.dtype, torch.device]]()

    def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
        asked.append((dtype, device))
        return None if dtype == torch.bfloat16 else "the kernel disagrees with torch"

    monkeypatch.setattr(tiles_cuda, "why_not", why_not)
    assert head.fused_pass(torch.bfloat16, there) is tiles_cuda.overwrite_exp
    assert head.fused_pass(torch.float32, there) is None
    assert asked == [(torch.bfloat16, there), (torch.float32, there)]
    own: Any = head.fused_pass(torch.float32, torch.device("cpu"))
    assert own is None or own.__func__ is Kernels.overwrite_exp
    assert len(asked) == 2  # a CPU tensor asks nobody about Triton


def test_a_head_whose_kernel_does_its_part_gives_the_gradients_of_whole_logits(monkeypatch: pytest.MonkeyPatch):
    """The kernel's definition in torch, by the contract the head relies on: without `keep`, z is nothing of use."""

    def defined(z: torch.Tensor, scale: float, softcap: float | None, temperature: float, keep: bool):
        logit_map = LogitMap(scale, softcap, temperature)
        y = logit_map(z.float())
        top, slope = y.amax(1, True), logit_map.slope(y)
        e = (y - top).exp()
        z.copy_(e * slope if isinstance(slope, torch.Tensor) else e) if keep else z.fill_(torch.nan)
        return top, e.sum(1, True)

    monkeypatch.setattr(head, "fused_pass", lambda dtype, device: defined)
    for logit_map in MAPS:
        check_head(logit_map)
