"""The fused head against autograd on whole logits, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from burnish.core.errors import ConfigError
from burnish.maths import head as head_module
from burnish.maths.head import (
    LogitMap,
    chunks_of,
    effective_weight,
    head_flops,
    head_logprobs,
    head_loss,
    recomputed_rows,
    row_limit,
)
from burnish.maths.kernels import kernels_for
from burnish.maths.logprobs import label_logprobs, nll, seq_logprob, weighted_nll
from burnish.train.activations import Watch

V, H = 101, 8
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
MAPS = {
    "identity": LogitMap(),
    "scale": LogitMap(scale=0.37),
    "temperature": LogitMap(temperature=0.6),
    "softcap": LogitMap(softcap=3.0),
    "all": LogitMap(scale=0.7, softcap=2.5, temperature=1.3),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are tiny: a second thread would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Case:
    """Two groups of three sequences each; members of a group share a trained prefix of 4 rows."""

    def __init__(
        self, seed: int = 0, dtype: torch.dtype = torch.float64, shared: int = 4, shuffled: bool = False
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        index: list[int] = []
        unit: list[int] = []
        rows = 0
        for group in range(2):
            prefix = list(range(rows, rows + shared))
            rows += shared
            for member in range(3):
                own = list(range(rows, rows + 5 + group + member))
                rows += len(own)
                index += prefix + own
                unit += [group * 3 + member] * (shared + len(own))
        self.index, self.unit = torch.tensor(index), torch.tensor(unit)
        self.pair, self.group = self.unit // 2, self.unit // 3
        if shuffled:
            self.index = torch.randperm(rows, generator=g)[self.index]
        self.hidden = torch.randn(rows, H, generator=g, dtype=dtype, requires_grad=True)
        self.weight = torch.randn(V, H, generator=g, dtype=dtype, requires_grad=True)
        self.bias = torch.randn(V, generator=g, dtype=dtype, requires_grad=True)
        self.label = torch.randint(0, V, (rows,), generator=g)
        entries = len(index)
        self.old = torch.randn(entries, generator=g, dtype=dtype) - 6
        self.gain = torch.randn(entries, generator=g, dtype=dtype)
        self.sign = torch.tensor([1.0, -1.0, 0.5, -2.0, 1.5, -0.3], dtype=dtype)

    # objectives, coupled ever more widely; each a sum with fixed weights
    def token(self, logprobs: Tensor, entries: slice) -> Tensor:
        ratio = (logprobs - self.old[entries]).exp()
        gain = self.gain[entries]
        return -(torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain) / 40).sum()

    def sums(self, logprobs: Tensor, entries: slice) -> tuple[Tensor, Tensor]:
        units, local = self.unit[entries].unique(return_inverse=True)
        return units, seq_logprob(logprobs, local, len(units))

    def sequence(self, logprobs: Tensor, entries: slice) -> Tensor:
        units, total = self.sums(logprobs, entries)
        length = torch.bincount(self.unit)[units]
        return -(self.sign[units] * (total / length).exp()).sum()

    def pairs(self, logprobs: Tensor, entries: slice) -> Tensor:
        _, total = self.sums(logprobs, entries)
        return -F.logsigmoid(0.1 * (total[0::2] - total[1::2] + 3)).sum()

    def groups(self, logprobs: Tensor, entries: slice) -> Tensor:
        units, total = self.sums(logprobs, entries)
        return (self.sign[units].view(-1, 3) * total.view(-1, 3).log_softmax(-1)).sum()

    def objective(self, kind: str):
        return {"token": self.token, "sequence": self.sequence, "pair": self.pairs, "group": self.groups}[kind]

    def couple(self, kind: str) -> Tensor | None:
        return {"token": None, "sequence": self.unit, "pair": self.pair, "group": self.group}[kind]

    def whole(self, kind: str, logit_map: LogitMap = MAPS["identity"], bias: bool = True) -> tuple[Tensor, Tensor]:
        logits = logit_map(F.linear(self.hidden, self.weight, self.bias if bias else None))
        logprobs = label_logprobs(logits, self.label)[self.index]
        return self.objective(kind)(logprobs, slice(0, len(self.index))), logprobs.detach()

    def fused(self, kind: str, logit_map: LogitMap = MAPS["identity"], bias: bool = True, rows: int | None = 9, **more):
        return head_loss(
            self.hidden, self.weight, self.label, self.objective(kind), index=self.index, couple=self.couple(kind),
            bias=self.bias if bias else None, logit_map=logit_map, rows=rows, **more,
        )  # fmt: skip

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias


def agree(case: Case, kind: str, factor: float = 1.0, **options) -> None:
    want_loss, want_logprobs = case.whole(kind, **{k: v for k, v in options.items() if k != "rows"})
    inputs = case.inputs if options.get("bias", True) else case.inputs[:2]
    want = torch.autograd.grad(factor * want_loss, inputs)
    loss, logprobs = case.fused(kind, **options)
    got = torch.autograd.grad(factor * loss, inputs)
    assert not logprobs.requires_grad
    assert_close(loss, want_loss, **TIGHT)
    assert_close(logprobs, want_logprobs, **TIGHT)
    for a, b in zip(got, want):
        assert_close(a, b, **TIGHT)


@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("kind", ["token", "sequence", "pair", "group"])
def test_loss_and_gradients_equal_autograd_on_whole_logits(kind: str, logit_map: str) -> None:
    agree(Case(), kind, logit_map=MAPS[logit_map], rows=25)


@pytest.mark.parametrize("rows", [None, 1, 9, 25, 40])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("shared", [0, 4])
@pytest.mark.parametrize("kind", ["token", "group"])
def test_any_chunk_size_and_row_order_gives_the_same(kind: str, shared: int, shuffled: bool, rows: int | None) -> None:
    agree(Case(shared=shared, shuffled=shuffled), kind, rows=rows)


@pytest.mark.parametrize("bias", [True, False])
def test_incoming_gradient_is_honoured(bias: bool) -> None:
    agree(Case(), "sequence", factor=3.0, bias=bias)


def test_rows_without_index_and_couple() -> None:
    case = Case(shared=0)
    want = -(label_logprobs(F.linear(case.hidden, case.weight), case.label) * case.gain).sum()
    loss, _ = head_loss(case.hidden, case.weight, case.label, weighted_nll(case.gain), rows=7)
    assert_close(loss, want, **TIGHT)
    for a, b in zip(torch.autograd.grad(loss, case.inputs[:2]), torch.autograd.grad(want, case.inputs[:2])):
        assert_close(a, b, **TIGHT)


def test_a_row_that_serves_no_entry_gets_no_gradient() -> None:
    case = Case(shared=0)
    index = torch.tensor([5, 2, 2, 30, 7, 11])
    loss, logprobs = head_loss(case.hidden, case.weight, case.label, lambda x, e: x.square().sum(), index=index, rows=2)
    whole = label_logprobs(F.linear(case.hidden, case.weight), case.label)[index]
    assert_close(logprobs, whole.detach(), **TIGHT)
    for a, b in zip(
        torch.autograd.grad(loss, case.inputs[:2]), torch.autograd.grad(whole.square().sum(), case.inputs[:2])
    ):
        assert_close(a, b, **TIGHT)


def test_frozen_weight_has_no_gradient_and_hidden_the_same() -> None:
    case = Case()
    want = torch.autograd.grad(case.whole("token")[0], case.hidden)[0]
    case.weight.requires_grad_(False)
    case.bias.requires_grad_(False)
    case.fused("token")[0].backward()
    assert case.weight.grad is None and case.bias.grad is None
    assert_close(case.hidden.grad, want, **TIGHT)


def test_no_grad_gives_the_value_alone() -> None:
    case = Case()
    with torch.no_grad():
        loss, logprobs = case.fused("group")
    assert not loss.requires_grad
    assert_close(loss, case.whole("group")[0].detach(), **TIGHT)
    assert_close(logprobs, case.fused("group")[1], **TIGHT)
    assert (
        head_loss(case.hidden.detach(), case.weight.detach(), case.label, case.token, rows=4, index=case.index)[
            0
        ].grad_fn
        is None
    )


def test_two_micro_batches_with_global_weights_equal_the_whole() -> None:
    case = Case(shared=0)
    case.fused("group")[0].backward()
    whole = [x.grad for x in case.inputs]
    for x in case.inputs:
        x.grad = None
    cut = int((case.group == 0).sum())
    parts = []
    for rows in (slice(0, cut), slice(cut, len(case.index))):

        def objective(logprobs: Tensor, entries: slice, rows: slice = rows) -> Tensor:
            return case.groups(logprobs, slice(rows.start + entries.start, rows.start + entries.stop))

        loss, _ = head_loss(
            case.hidden[rows], case.weight, case.label[rows], objective, couple=case.group[rows], bias=case.bias, rows=5
        )
        loss.backward()
        parts.append(loss.detach())
    assert_close(sum(parts), case.whole("group")[0].detach(), **TIGHT)
    for x, want in zip(case.inputs, whole):
        assert_close(x.grad, want, **TIGHT)


@pytest.mark.parametrize("logit_map", ["identity", "all"])
def test_gradcheck(logit_map: str) -> None:
    g = torch.Generator().manual_seed(1)
    hidden, weight, bias = (
        torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((5, 3), (7, 3), (7,))
    )
    label, index, couple = (
        torch.tensor([6, 0, 3, 3, 1]),
        torch.tensor([0, 1, 0, 2, 3, 4]),
        torch.tensor([0, 0, 0, 1, 1, 2]),
    )

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return head_loss(
            hidden, weight, label, lambda x, e: (x * x).sum() + x.prod(), index=index, couple=couple, bias=bias, rows=2,
            logit_map=MAPS[logit_map],
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_tied_embedding_adds_both_contributions() -> None:
    torch.manual_seed(2)
    embedding, mix = nn.Embedding(V, H, dtype=torch.float64), nn.Linear(H, H, dtype=torch.float64)
    ids, label = torch.randint(0, V, (30,)), torch.randint(0, V, (30,))
    fired: list[int] = []
    embedding.weight.register_post_accumulate_grad_hook(lambda p: fired.append(1))
    hidden = torch.tanh(mix(embedding(ids)))
    want = torch.autograd.grad(
        nll(label_logprobs(F.linear(hidden, embedding.weight), label), torch.ones(30)),
        [*mix.parameters(), embedding.weight],
    )
    loss, _ = head_loss(torch.tanh(mix(embedding(ids))), embedding.weight, label, weighted_nll(torch.ones(30)), rows=8)
    loss.backward()
    for p, w in zip([*mix.parameters(), embedding.weight], want):
        assert_close(p.grad, w, **TIGHT)
    assert fired == [1]


def test_a_retained_graph_gives_the_same_gradients_again() -> None:
    case = Case()
    loss, _ = case.fused("token")
    first = [x.clone() for x in torch.autograd.grad(loss, case.inputs, retain_graph=True)]
    second = torch.autograd.grad(loss, case.inputs, retain_graph=True)
    second[1].zero_()  # what a caller does to its copy is its own affair
    third = torch.autograd.grad(2 * loss, case.inputs)
    for a, c in zip(first, third):
        assert_close(2 * a, c, **TIGHT)


def test_a_gradient_handed_over_and_then_changed_is_not_returned_twice() -> None:
    case = Case()
    loss, _ = case.fused("token")
    torch.autograd.grad(loss, case.inputs, retain_graph=True)[1].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, case.inputs)


# ---- what it costs --------------------------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """Every tensor any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.made.append((str(func), tuple(x.shape), x.dtype))
        return out

    @property
    def largest(self) -> int:
        return max(torch.Size(shape).numel() for _, shape, _ in self.made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["token", "group"])
def test_logits_never_exceed_a_chunk(kind: str, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    assert len(case.label) > 40
    kernels_for(dtype)  # checks itself once
    with Sizes() as sizes:
        loss, _ = case.fused(kind, rows=9)
        loss.backward()
    assert 9 * V >= V * H and sizes.largest == 9 * V
    with Sizes() as sizes:
        head_logprobs(case.hidden, case.weight, case.label, rows=9)
    assert sizes.largest <= 9 * V


def test_backward_of_an_unscaled_loss_copies_no_weight_gradient() -> None:
    case = Case()
    loss, _ = case.fused("token")
    with Sizes() as sizes:
        loss.backward()
    assert [name for name, shape, _ in sizes.made if shape == (V, H)] == [
        "aten.detach.default"
    ]  # a view: .grad is our buffer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [None, 9])
def test_a_sink_takes_the_weights_gradient_times_the_incoming_one(dtype: torch.dtype, rows: int | None) -> None:
    plain, sunk = Case(dtype=dtype), Case(dtype=dtype)
    kernels_for(dtype)
    loss, _ = plain.fused("group", rows=rows)
    (3 * loss).backward()
    sink = torch.ones(V, H)
    with Sizes() as sizes:
        other, _ = sunk.fused("group", rows=rows, sink=sink)
        assert bool((sink == 1).all())  # nothing is written before the backward
        (3 * other).backward()
    assert torch.equal(loss, other) and sunk.weight.grad is None
    assert plain.weight.grad is not None and plain.hidden.grad is not None and sunk.hidden.grad is not None
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert float((sink - 1 - plain.weight.grad).norm() / plain.weight.grad.float().norm()) < tolerance
    assert torch.equal(plain.hidden.grad, sunk.hidden.grad)
    if rows is None and dtype == torch.float32:  # one chunk: no gradient of the weight is ever formed outside the sink
        assert not [shape for name, shape, _ in sizes.made if shape == (V, H) and name.startswith(("aten.mm", "aten.empty", "aten.new_empty"))]


@pytest.mark.parametrize("rows", [None, 9])
def test_what_the_sink_took_is_not_kept_for_the_rest_of_the_backward(rows: int | None) -> None:
    case, sink = Case(dtype=torch.float32), torch.zeros(V, H)
    with Watch() as watch:
        loss, _ = case.fused("group", rows=rows, sink=sink)
        before = watch.live
        loss.backward(retain_graph=True)
        made = sum(x.grad.numel() for x in (case.hidden, case.bias) if x.grad is not None)
        kept = 4 * (V * H if rows else len(case.label) * V)  # the weight's gradient, or the logits it is made from
        assert watch.live <= before - kept + 4 * made
    with pytest.raises(ConfigError, match="in the sink already"):
        loss.backward()


def test_one_chunk_of_narrow_logits_needs_no_wide_weight_gradient() -> None:
    case = Case(dtype=torch.bfloat16)
    with Sizes() as sizes:
        case.fused("token", rows=None)[0].backward()
    assert {dtype for _, shape, dtype in sizes.made if shape == (V, H)} == {torch.bfloat16}
    assert case.weight.grad is not None and case.weight.grad.dtype == torch.bfloat16


def test_rows_of_a_chunk_follow_a_byte_budget() -> None:
    wide, narrow = (
        torch.empty(262_144, 640, device="meta"),
        torch.empty(262_144, 640, dtype=torch.bfloat16, device="meta"),
    )
    assert row_limit(5000, wide, None, weight_trained=True) == 256
    assert row_limit(5000, narrow, None, weight_trained=True) == 512
    assert (
        row_limit(1500, narrow, None, weight_trained=True) == 1500
    )  # 786 MB of logits against 268 and an fp32 sum of 671
    assert row_limit(1500, narrow, None, weight_trained=False) == 512
    assert row_limit(1500, torch.empty(4_000_000, 8, device="meta"), None, weight_trained=True) == 64
    assert row_limit(5000, wide, 7, weight_trained=True) == 7
    common = torch.empty(32_000, 640, dtype=torch.bfloat16)  # on a CPU 32 MB and 512 rows are enough
    assert row_limit(4096, common, None, weight_trained=False) == row_limit(4096, common, None, weight_trained=True) == 524
    assert row_limit(1800, common, None, weight_trained=True) == 1800  # beside an fp32 sum of 82 MB
    assert row_limit(9000, torch.empty(512, 64), None, weight_trained=True) == 16_384
    assert row_limit(4096, torch.empty(32_000, 640, dtype=torch.bfloat16, device="meta"), None, weight_trained=False) == 4194


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, rows", [("token", None), ("token", 20), ("group", 25), ("group", 9)])
@pytest.mark.parametrize("trained", [True, False])
def test_flops_are_those_executed(dtype: torch.dtype, kind: str, rows: int | None, trained: bool) -> None:
    case = Case(dtype=dtype)
    case.weight.requires_grad_(trained)
    count = len(case.label)
    again = recomputed_rows(count, case.weight, index=case.index, couple=case.couple(kind), rows=rows)
    assert (again > 0) == (rows == 9)
    with FlopCounterMode(display=False) as counter:
        loss, _ = case.fused(kind, rows=rows, bias=False)
        loss.backward()
    said = head_flops(count, V, H, weight_trained=trained, backward=True, recomputed=again)
    assert counter.get_total_flops() == pytest.approx(said, rel=0.01)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        case.fused(kind, rows=rows, bias=False)
        head_logprobs(case.hidden, case.weight, case.label)
    assert counter.get_total_flops() == pytest.approx(
        2 * head_flops(count, V, H, weight_trained=trained, backward=False), rel=0.01
    )
    if again == 0:
        assert said == (6 if trained else 4) * V * H * count


# ---- chunks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_chunks_cover_everything_once_and_split_nothing_coupled(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    count, limit = int(torch.randint(1, 60, (), generator=g)), int(torch.randint(1, 30, (), generator=g))
    near = torch.arange(count).repeat_interleave(torch.randint(1, 3, (count,), generator=g))
    jitter = torch.randint(-2, 3, near.shape, generator=g) if seed % 2 else torch.zeros_like(near)
    index = torch.cat([(near + jitter).clamp(0, count - 1), torch.arange(0)])
    if seed % 4 == 3:
        index = torch.randperm(count, generator=g)[index]
    couple = (torch.rand(len(index), generator=g) < 0.3).cumsum(0) if seed % 3 else None
    order, chunks = chunks_of(count, index, couple, limit)
    rank = torch.arange(count) if order is None else order.argsort()
    assert [c[0].start for c in chunks] == [0, *[c[0].stop for c in chunks[:-1]]] and chunks[-1][0].stop == count
    assert [c[1].start for c in chunks] == [0, *[c[1].stop for c in chunks[:-1]]] and chunks[-1][1].stop == len(index)
    for rows, entries in chunks:
        inside = rank[index[entries]]
        assert len(inside) and rows.start <= int(inside.min()) and int(inside.max()) < rows.stop
        if couple is not None and entries.stop < len(couple):
            assert couple[entries.stop - 1] != couple[entries.stop]
        if rows.stop - rows.start > limit:  # then no cut inside it was legal
            for m in range(entries.start + 1, entries.stop):
                shares = set(index[entries.start : m].tolist()) & set(index[m : entries.stop].tolist())
                assert shares or (couple is not None and couple[m - 1] == couple[m])


def test_uncoupled_chunks_are_even() -> None:
    sizes = [rows.stop - rows.start for rows, _ in chunks_of(520, None, None, 512)[1]]
    assert sizes == [260, 260]


# ---- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [None, 16])
def test_bf16_is_as_close_to_the_truth_as_bf16_autograd(rows: int | None) -> None:
    g = torch.Generator().manual_seed(3)
    n, v, h = 96, 1003, 64
    hidden = torch.randn(n, h, generator=g).bfloat16()
    weight = (torch.randn(v, h, generator=g) * 0.3).bfloat16()
    label = torch.randint(0, v, (n,), generator=g)
    gain = torch.randn(n, generator=g)

    def leaves(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return hidden.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()

    def gradients(loss: Tensor, of: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [x.double() for x in torch.autograd.grad(loss, of)]

    exact, plain, ours = leaves(torch.float64), leaves(torch.bfloat16), leaves(torch.bfloat16)
    logprobs = label_logprobs(F.linear(*exact), label)
    truth = gradients(nll(logprobs, gain), exact)
    other = gradients(nll(label_logprobs(F.linear(*plain), label), gain), plain)
    loss, got_logprobs = head_loss(*ours, label, weighted_nll(gain), rows=rows)
    got = gradients(loss, ours)
    rounding = F.linear(*exact).abs().max() * 2**-8  # one bf16 rounding of the largest logit
    assert (got_logprobs.double() - logprobs).abs().max() < rounding
    assert got_logprobs.dtype == torch.float32 and loss.dtype == torch.float32
    for a, b, true in zip(got, other, truth):
        error, usual = ((x - true).norm() / true.norm() for x in (a, b))
        assert error < 0.02 and error < 1.3 * usual


def test_weight_gradient_accumulates_over_chunks_in_fp32() -> None:
    g = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(512, 16, generator=g).bfloat16(), torch.randn(50, 16, generator=g).bfloat16()
    label = torch.randint(0, 50, (512,), generator=g)
    errors = []
    truth = None
    for dtype, rows in ((torch.float64, None), (torch.bfloat16, 512), (torch.bfloat16, 4)):
        w = weight.clone().to(dtype).requires_grad_()
        loss, _ = head_loss(hidden.to(dtype), w, label, weighted_nll(torch.ones(512)), rows=rows)
        loss.backward()
        truth = w.grad if truth is None else truth
        errors.append(float((w.grad.double() - truth).norm() / truth.norm()))
    assert errors[2] < 1.2 * errors[1]  # summed in bf16, 128 chunks would be several times worse


def test_certain_labels_leave_an_exactly_small_gradient() -> None:
    weight = torch.eye(4, 4).mul(30).bfloat16().requires_grad_()
    hidden = torch.eye(4).bfloat16().requires_grad_()
    loss, logprobs = head_loss(hidden, weight, torch.arange(4), weighted_nll(torch.ones(4)))
    loss.backward()
    assert logprobs.abs().max() < 1e-6
    assert hidden.grad.abs().max() < 1e-5


def test_extreme_and_masked_logits() -> None:
    hidden = torch.tensor([[1e4, -1e4], [3.0, 1.0]], dtype=torch.float32, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], requires_grad=True)
    bias = torch.tensor([0.0, 0.0, float("-inf")])  # a padding entry of the vocabulary
    label = torch.tensor([1, 0])
    loss, logprobs = head_loss(hidden, weight, label, weighted_nll(torch.ones(2)), bias=bias)
    loss.backward()
    assert_close(logprobs, torch.tensor([-2e4, -torch.log1p(torch.tensor(-2.0).exp())]))
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    assert weight.grad[2].abs().max() == 0


def test_logprobs_alone() -> None:
    case = Case()
    for logit_map in MAPS.values():
        want = label_logprobs(logit_map(F.linear(*case.inputs)), case.label)
        for rows in (None, 7):
            got = head_logprobs(case.hidden, case.weight, case.label, bias=case.bias, logit_map=logit_map, rows=rows)
            assert not got.requires_grad
            assert_close(got, want.detach(), **TIGHT)


@pytest.mark.parametrize("logit_map", MAPS)
def test_slope_and_overwrite_follow_the_map(logit_map: str) -> None:
    z = torch.linspace(-4, 4, 33, dtype=torch.float64, requires_grad=True)
    y = MAPS[logit_map](z)
    (want,) = torch.autograd.grad(y.sum(), z)
    slope = MAPS[logit_map].slope(y.detach())
    assert_close(slope * torch.ones_like(want), want, **TIGHT)
    assert_close(MAPS[logit_map].overwrite(z.detach().clone()), y.detach(), **TIGHT)


def test_nothing_to_learn_is_a_zero_with_a_graph() -> None:
    case = Case()
    empty = torch.zeros(0, dtype=torch.long)
    loss, logprobs = head_loss(case.hidden[:0], case.weight, empty, case.token)
    loss.backward()
    assert loss.item() == 0 and len(logprobs) == 0
    assert case.weight.grad.abs().max() == 0
    loss, _ = head_loss(case.hidden, case.weight, case.label, case.token, index=empty, couple=empty, rows=4)
    assert loss.item() == 0


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_wrong_input_is_refused_by_name() -> None:
    case = Case()
    h, w, t, fine = case.hidden, case.weight, case.label, lambda x, e: x.sum()
    wrong = [
        ("wanted \\[n, h\\]", (h[:, 1:], w, t, fine), {}),
        ("cast one", (h.float(), w, t, fine), {}),
        ("float16", (h.half(), w.half(), t, fine), {}),
        ("wanted one for each", (h, w, t[1:], fine), {}),
        ("bias", (h, w, t, fine), {"bias": case.bias[1:]}),
        ("outside", (h, w, t, fine), {"index": case.index - 1}),
        ("couple has", (h, w, t, fine), {"couple": case.unit[1:], "index": case.index}),
        ("couple decreases", (h, w, t, fine), {"couple": case.unit.flip(0), "index": case.index}),
        ("at least 1", (h, w, t, fine), {"rows": 0}),
        ("shape \\[\\d+\\] returned", (h, w, t, lambda x, e: x), {}),
        ("a float returned", (h, w, t, lambda x, e: x.sum().item()), {}),
        ("does not depend", (h, w, t, lambda x, e: x.detach().sum()), {}),
        ("does not depend", (h, w, t, lambda x, e: h.sum()), {}),
    ]
    for message, arguments, options in wrong:
        with pytest.raises(ConfigError, match=message):
            head_loss(*arguments, **options)
    for bad in ({"scale": 0.0}, {"scale": -1.0}, {"softcap": 0.0}, {"temperature": float("inf")}):
        with pytest.raises(ConfigError, match="positive"):
            LogitMap(**bad)


# ---- the weight of an adapted head ----------------------------------------------------------------------------------


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(H, V, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(x)


def adapted(**options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    model = peft.get_peft_model(
        Toy(), peft.LoraConfig(r=3, lora_alpha=7, target_modules=["lm_head"], **options)
    ).double()
    layer = model.base_model.model.lm_head
    if hasattr(layer, "lora_B"):
        nn.init.normal_(layer.lora_B["default"].weight)
    return model, layer


def test_effective_weight_of_a_lora_head_is_what_it_applies() -> None:
    model, layer = adapted()
    hidden, label = torch.randn(20, H, dtype=torch.float64), torch.randint(0, V, (20,))
    assert_close(F.linear(hidden, effective_weight(layer)), model(hidden), **TIGHT)
    names = [p for p in model.parameters() if p.requires_grad]
    assert len(names) == 2
    want = torch.autograd.grad(nll(label_logprobs(model(hidden), label), torch.ones(20)), names)
    loss, _ = head_loss(hidden, effective_weight(layer), label, weighted_nll(torch.ones(20)), rows=6)
    for a, b in zip(torch.autograd.grad(loss, names), want):
        assert_close(a, b, **TIGHT)
    with model.disable_adapter():
        assert effective_weight(layer) is layer.base_layer.weight
    before = effective_weight(layer).detach().clone()
    model.merge_adapter()
    assert_close(effective_weight(layer).detach(), before, **TIGHT)


def test_effective_weight_of_plain_and_saved_heads() -> None:
    toy = Toy()
    assert effective_weight(toy.lm_head) is toy.lm_head.weight
    peft = pytest.importorskip("peft")
    toy = nn.ModuleDict({"body": nn.Linear(H, H), "lm_head": nn.Linear(H, V)})
    model = peft.get_peft_model(toy, peft.LoraConfig(target_modules=["body"], modules_to_save=["lm_head"]))
    saved = model.base_model.model["lm_head"]
    assert effective_weight(saved) is saved.modules_to_save["default"].weight
    assert effective_weight(saved).requires_grad


def test_effective_weight_keeps_the_dtype_of_its_base() -> None:
    _, layer = adapted()
    layer.base_layer.bfloat16()
    assert effective_weight(layer).dtype == torch.bfloat16


def test_effective_weight_refuses_what_no_matrix_describes() -> None:
    model, layer = adapted(lora_dropout=0.1)
    model.train()
    with pytest.raises(ConfigError, match="dropout"):
        effective_weight(layer)
    model.eval()
    assert effective_weight(layer).shape == (V, H)
    with pytest.raises(ConfigError, match="variant"):
        effective_weight(adapted(use_dora=True)[1])
    peft = pytest.importorskip("peft")
    scaled = peft.get_peft_model(Toy(), peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]))
    with pytest.raises(ConfigError, match="adapted by"):
        effective_weight(scaled.base_model.model.lm_head)
    with pytest.raises(ConfigError, match="without a"):
        effective_weight(nn.Tanh())
    head = nn.Linear(H, V)
    head.register_forward_hook(lambda m, i, o: 2 * o)
    with pytest.raises(ConfigError, match="hook"):
        effective_weight(head)


def test_tiles_smaller_than_the_logits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_module.TILE, "cpu", 3 * V)
    for logit_map in ("identity", "all"):
        agree(Case(), "token", logit_map=MAPS[logit_map])
    case = Case(dtype=torch.bfloat16)
    small = torch.autograd.grad(case.fused("token")[0], case.weight)[0]
    monkeypatch.undo()
    assert_close(small, torch.autograd.grad(case.fused("token")[0], case.weight)[0])
