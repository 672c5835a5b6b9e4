"""The variable-length calls of a forest on CUDA: their layout and merging against the dense oracle, without a GPU.

The kernel is stood in for by its contract in plain torch, a loop over sequences; the real one meets the same
`disagreement` before it is first used.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.forest import cuda
from burnish.forest.attention import Forest
from burnish.forest.blocks import attend_block
from burnish.forest.cuda import Call, Varlen, disagreement, lay_out
from burnish.forest.stream import Layout, Stream
from tests import pretended
from tests.forest.test_attention import FORESTS, SCALE, dense_softmax, inputs, seen_by_each_row, with_gradients
from tests.forest.trees import bounded, random_trees

CPU = torch.device("cpu")


def sequences(call: Call):
    for i in range(len(call.cu_q) - 1):
        yield slice(int(call.cu_q[i]), int(call.cu_q[i + 1])), slice(int(call.cu_k[i]), int(call.cu_k[i + 1]))


def scores(q: Tensor, k: Tensor, call: Call, scale: float) -> Tensor:
    """[H, m, n]: flash's own rule for its sides, aligned at the bottom right."""
    m, n = len(q), len(k)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = torch.einsum("mhd,nhd->hmn", q, k) * scale
    left, right = call.sides
    at, key = torch.arange(m)[:, None] + n - m, torch.arange(n)
    if left >= 0:
        s = s.masked_fill(key < at - left, -torch.inf)
    return s.masked_fill(key > at + right, -torch.inf) if right >= 0 else s


def plain_forward(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
    assert (len(q), len(k), len(v)) == (int(call.cu_q[-1]), int(call.cu_k[-1]), int(call.cu_k[-1]))
    assert call.cu_q.dtype == call.cu_k.dtype == torch.int32
    assert call.max_q == int(call.cu_q.diff().max()) and call.max_k == int(call.cu_k.diff().max())
    assert int(call.cu_q.diff().min()) > 0 and int(call.cu_k.diff().min()) > 0  # no empty sequence reaches the kernel
    out, lse = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype), q.new_empty(q.shape[1], len(q))
    for r, c in sequences(call):
        s = scores(q[r], k[c], call, scale)
        lse[:, r] = s.logsumexp(-1)
        values = v[c].repeat_interleave(q.shape[1] // v.shape[1], 1)
        out[r] = torch.einsum("hmn,nhd->mhd", s.softmax(-1), values)
    return out, lse


def plain_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call, scale: float
) -> tuple[Tensor, ...]:
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    for r, c in sequences(call):
        p = (scores(q[r], k[c], call, scale) - lse[:, r, None]).exp()
        kk, vv = (x[c].repeat_interleave(groups, 1) for x in (k, v))
        delta = (dout[r] * out[r]).sum(-1).T
        ds = p * (torch.einsum("mhd,nhd->hmn", dout[r], vv) - delta[..., None]) * scale
        dq[r] = torch.einsum("hmn,nhd->mhd", ds, kk)
        dk[c] = torch.einsum("hmn,mhd->nhd", ds, q[r]).unflatten(1, (-1, groups)).sum(2)
        dv[c] = torch.einsum("hmn,mhd->nhd", p, dout[r]).unflatten(1, (-1, groups)).sum(2)
    return dq, dk, dv


PLAIN = Varlen(plain_forward, plain_backward)


@pytest.fixture
def on_the_kernel(monkeypatch: pytest.MonkeyPatch):
    """Forests here run the CUDA program over the stand-in."""
    monkeypatch.setattr(cuda, "FLASH", PLAIN)
    monkeypatch.setattr(cuda, "applies", lambda q, v, softcap: softcap is None)


def check(layout: Layout, window: int | None, **sizes: object) -> None:
    given, dout = inputs(layout, **sizes)  # type: ignore[arg-type]
    seen, plan = seen_by_each_row(layout, window), Forest(layout)

    def ours(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None = None) -> Tensor:
        return plan(0, q, k, v, SCALE, window, None, s)

    def theirs(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None = None) -> Tensor:
        return dense_softmax(q, k, v, s, seen, None)

    for name, x, y in zip(
        ("out", "dq", "dk", "dv", "dsinks"), with_gradients(ours, given, dout), with_gradients(theirs, given, dout)
    ):
        error = (x - y).norm() / y.norm().clamp_min(1.0)
        assert error < 1e-12, f"{name}: {float(error):.1e}"


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 14, 20])
@pytest.mark.parametrize("name", FORESTS)
def test_a_program_of_calls_equals_a_dense_softmax(name: str, window: int | None, sinks: bool, on_the_kernel: None):
    check(FORESTS[name], window, sinks=sinks)


@bounded
@given(trees=random_trees(), window=st.sampled_from([None, 1, 2, 5, 9]))
def test_any_forest_and_window(trees: list, window: int | None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "FLASH", PLAIN)
        patch.setattr(cuda, "applies", lambda q, v, softcap: True)
        check(Stream.of(trees).layout, window)


def test_one_causal_call_and_one_a_depth():
    program = lay_out(FORESTS["depth 3"], None, CPU)
    assert len(program.own) == 1 and program.own[0].causal and program.own[0].rows == slice(0, 32)
    assert [call.causal for call in program.levels] == [False] * 3
    first = program.levels[0]  # everything below the root, as one sequence, and no key twice
    assert first.rows == slice(4, 24) and first.keys == slice(0, 4) and first.cu_q.tolist() == [0, 20]


def test_only_trees_longer_than_the_window_are_gathered():
    layout = Layout((6, 4, 20, 3), (-1, 0, -1, 2))
    program = lay_out(layout, 10, CPU)
    assert [call.window for call in program.own] == [None, 10] and len(program.levels) == 1
    gathered = program.own[1]
    assert gathered.cu_q.tolist() == [0, 20, 23] and gathered.cu_k.tolist() == [0, 20, 32]  # 9 keys before the child
    assert gathered.sides == (9, 0)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("name", FORESTS)
def test_pairs_are_those_that_are_seen(name: str, window: int | None):
    program = lay_out(FORESTS[name], window, CPU)
    assert program.pairs == int(seen_by_each_row(FORESTS[name], window).sum())


def test_the_contract_in_plain_torch_passes_its_own_test_and_broken_kernels_do_not():
    assert disagreement(PLAIN, torch.float32, 8, CPU) is None
    off_by_one = Varlen(lambda q, k, v, c, s: plain_forward(q, k, v, _widened(c), s), plain_backward)
    assert "windowed" in str(disagreement(off_by_one, torch.float32, 8, CPU))
    turned = Varlen(lambda *a: (plain_forward(*a)[0], plain_forward(*a)[1].T), plain_backward)
    assert "log-sum-exp is [14, 4]" in str(disagreement(turned, torch.float32, 8, CPU))

    def own_lse(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call, scale: float):
        return plain_backward(dout, q, k, v, out, plain_forward(q, k, v, call, scale)[1], call, scale)

    assert "dq is off" in str(disagreement(Varlen(plain_forward, own_lse), torch.float32, 8, CPU))
    assert "does not run" in str(disagreement(Varlen(_absent, plain_backward), torch.float32, 8, CPU))


def _widened(call: Call) -> Call:
    return Call(
        call.rows, call.keys, call.cu_q, call.cu_k, call.max_q, call.max_k, call.causal,
        None if call.window is None else call.window + 1, call.pairs,
    )  # fmt: skip


def _absent(*_: object) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("no such kernel in this build\nsecond line")


def test_what_the_kernel_does_not_take_goes_to_three_products():
    assert "half precision" in str(cuda.why_not(torch.float32, 64, 0))
    assert "12" in str(cuda.why_not(torch.bfloat16, 12, 0)) and "264" in str(cuda.why_not(torch.bfloat16, 264, 0))
    q = torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16)
    assert not cuda.applies(q, q, None)  # a CPU tensor


def test_the_block_kernel_lays_batches_side_by_side(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "FLASH", PLAIN)
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(3, h, n, 8, generator=g, dtype=torch.float64) for h, n in ((4, 5), (2, 7), (2, 7)))
    for mask, keys in ((None, 7), ("causal", 5)):
        got = cuda.BLOCKS.forward(q, k[:, :, :keys], v[:, :, :keys], mask, SCALE, None)  # type: ignore[arg-type]
        want = attend_block(q, k[:, :, :keys], v[:, :, :keys], mask, SCALE)  # type: ignore[arg-type]
        assert all(torch.allclose(x, y, atol=1e-12) for x, y in zip(got, want))


def test_torchs_own_operators_are_called_as_they_are_declared(monkeypatch: pytest.MonkeyPatch):
    """Names, order, shapes and devices of the arguments, on tensors without values that claim to be on a device."""
    monkeypatch.setattr(cuda, "applies", lambda q, v, softcap: True)
    layout = Layout((6, 4, 7, 3, 20, 2), (-1, 0, 0, -1, 3, 3))
    with FakeTensorMode():
        leaves = [
            torch.empty(1, layout.size, h, 64, device=pretended.NAME, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            for h in (4, 2, 2)
        ]
        for window in (None, 8):
            plan = Forest(layout)
            out = plan(0, *leaves, SCALE, window, None, None)
            out.backward(torch.empty_like(out))
            assert out.dtype == torch.bfloat16 and out.device == leaves[0].device and out.shape == leaves[0].shape
            assert all(x.grad is not None and x.grad.shape == x.shape and x.grad.device == x.device for x in leaves)
            pairs = lay_out(layout, window, CPU).pairs
            assert (plan.flops, plan.flops_backward) == (4 * 4 * 64 * pairs, 10 * 4 * 64 * pairs)


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("asks", [True, False], ids=["torch 2.13", "torch 2.11"])
def test_the_kernel_is_called_as_this_torch_wants_it(asks: bool, heads: int, monkeypatch: pytest.MonkeyPatch):
    """2.11 takes fewer key heads without being told; later versions refuse them unless they are."""
    from torch.nn.attention import varlen

    told: list[dict[str, object]] = []

    def older(q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        told.append({"max_q": max_q, "window_size": window_size})
        return q, torch.zeros(q.shape[1], len(q))

    def newer(*given, enable_gqa=False, **more):
        found = older(*given, **more)
        told[-1]["enable_gqa"] = enable_gqa
        return found

    monkeypatch.setattr(varlen, "varlen_attn", newer if asks else older)
    q, k = torch.zeros(3, 4, 8), torch.zeros(3, heads, 8)
    (call,) = lay_out(Layout((1, 2), (-1, -1)), None, CPU).own
    cuda.FLASH.forward(q, k, k, call, 1.0)
    assert told == [{"max_q": 2, "window_size": (-1, 0)} | ({"enable_gqa": heads == 2} if asks else {})]
