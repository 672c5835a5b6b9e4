"""Attention alone, in float64, against a softmax over each row's own list of keys; and what plans and blocks promise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import burnish.forest.attention as attention
import burnish.forest.blocks as blocks
from burnish.core.errors import ConfigError
from burnish.forest.attention import Dense, Forest, attend_block, forest_attention, merge, visible
from burnish.forest.blocks import Band
from burnish.forest.stream import Layout, Stream
from tests.forest.trees import bounded, random_trees

FORESTS = {
    "one row": Layout((23,), (-1,)),
    "depth 0": Layout((5, 9, 1, 12), (-1, -1, -1, -1)),
    "depth 1": Layout((6, 4, 7, 3, 8, 2), (-1, 0, 0, -1, 3, 3)),
    "depth 2": Layout((9, 5, 4, 6, 3, 5), (-1, 0, 1, 1, 0, -1)),
    "depth 3": Layout((4, 3, 2, 6, 1, 5, 3, 8), (-1, 0, 1, 2, 2, 1, 0, -1)),
}
SCALE = 0.3


def seen_by_each_row(layout: Layout, window: int | None) -> Tensor:
    """[T, T] from a chain of tokens: a row sees itself, the token before it on its path, the one before that, ..."""
    before: list[int] = []
    for i, (s, n) in enumerate(zip(layout.start, layout.length)):
        p = layout.parent[i]
        before.append(-1 if p < 0 else layout.start[p] + layout.length[p] - 1)
        before.extend(range(s, s + n - 1))
    seen = torch.zeros(layout.size, layout.size, dtype=torch.bool)
    for row in range(layout.size):
        at, left = row, layout.size if window is None else window
        while at >= 0 and left > 0:
            seen[row, at] = True
            at, left = before[at], left - 1
    return seen


def dense_softmax(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, seen: Tensor, softcap: float | None) -> Tensor:
    heads = []
    for h in range(q.shape[1]):
        kv = h // (q.shape[1] // k.shape[1])
        s = q[0, h] @ k[0, kv].T * SCALE
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        weight = torch.where(seen, s, -torch.inf).exp()
        total = weight.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + sinks[h].exp()
        heads.append(weight / total @ v[0, kv])
    return torch.stack(heads)[None]


def inputs(
    layout: Layout, heads: int = 4, kv: int = 2, width: int = 8, value: int = 8, sinks: bool = False, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(seed)

    def made(n: int, d: int) -> Tensor:
        return torch.randn(1, layout.size, n, d, generator=g, dtype=torch.float64).transpose(1, 2)

    given = [made(heads, width), made(kv, width), made(kv, value)]
    if sinks:
        given.append(torch.randn(heads, generator=g, dtype=torch.float64))
    return given, made(heads, value)


def with_gradients(work: Any, given: list[Tensor], dout: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out = work(*leaves)
    out.backward(dout)
    return [out.detach(), *(x.grad for x in leaves)]


def compare(layout: Layout, window: int | None, softcap: float | None, plan: Any = None, **sizes: Any) -> None:
    given, dout = inputs(layout, **sizes)
    seen = seen_by_each_row(layout, window)
    plan = plan or Forest(layout)

    def ours(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None = None) -> Tensor:
        return plan(0, q, k, v, SCALE, window, softcap, s)

    def theirs(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None = None) -> Tensor:
        return dense_softmax(q, k, v, s, seen, softcap)

    for name, x, y in zip(
        ("out", "dq", "dk", "dv", "dsinks"), with_gradients(ours, given, dout), with_gradients(theirs, given, dout)
    ):
        error = (x - y).norm() / y.norm().clamp_min(1.0)  # a row that sees only itself has dq = dk = 0
        assert error < 1e-12, f"{name}: {float(error):.1e}"


@pytest.mark.parametrize("products", [False, True], ids=["stock", "products"])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 20])
@pytest.mark.parametrize("name", FORESTS)
def test_output_and_gradients_equal_a_dense_softmax(
    name: str, window: int | None, products: bool, monkeypatch: pytest.MonkeyPatch
):
    if products:
        monkeypatch.setattr(blocks, "_stock_works", lambda dtype: False)
    compare(FORESTS[name], window, None)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (6, 2)], ids=str)
@pytest.mark.parametrize(
    ("softcap", "value", "sinks"), [(1.5, 8, False), (None, 5, False), (None, 8, True), (1.5, 5, True)]
)
@pytest.mark.parametrize("window", [None, 7])
def test_softcap_sinks_value_width_and_grouped_heads(
    heads: tuple[int, int], softcap: float | None, value: int, sinks: bool, window: int | None
):
    compare(FORESTS["depth 2"], window, softcap, heads=heads[0], kv=heads[1], value=value, sinks=sinks)
    compare(FORESTS["one row"], window, softcap, heads=heads[0], kv=heads[1], value=value, sinks=sinks)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [64, 100, 150])
def test_rows_many_windows_long_are_cut_into_chunks_that_reach_over_segments(window: int, softcap: float | None):
    layout = Layout((170, 90, 40, 200, 30), (-1, 0, 1, 0, -1))
    compare(layout, window, softcap, heads=2, kv=1)


def test_long_blocks_are_formed_piece_by_piece_on_the_product_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "_SCORES", 1)  # the smallest pieces: 64 rows
    compare(Layout((150, 90, 200), (-1, 0, 0)), None, 1.5, heads=2, kv=1)
    compare(Layout((300, 90), (-1, 0)), 100, 1.5, heads=2, kv=1)


@bounded
@given(
    st.data(),
    st.one_of(st.none(), st.integers(1, 20)),
    st.sampled_from([None, 1.0]),
    st.sampled_from([(4, 2), (2, 1), (2, 2)]),
    st.booleans(),
)
def test_any_forest(
    data: st.DataObject, window: int | None, softcap: float | None, heads: tuple[int, int], sinks: bool
):
    layout = Stream.of(data.draw(random_trees())).layout
    compare(layout, window, softcap, heads=heads[0], kv=heads[1], sinks=sinks)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("name", FORESTS)
def test_the_oracle_plan_is_the_dense_softmax_too(name: str, window: int | None):
    layout = FORESTS[name]
    assert torch.equal(visible(layout, window), seen_by_each_row(layout, window))
    compare(layout, window, 1.5, plan=Dense(layout), sinks=True)
    compare(layout, window, None, plan=Dense(layout), value=5)


@pytest.mark.parametrize("name", FORESTS)
def test_half_precision_is_as_near_to_float64_as_one_dense_block_in_half_precision(name: str):
    layout = FORESTS[name]
    given, dout = inputs(layout)
    exact = with_gradients(lambda q, k, v: Dense(layout)(0, q, k, v, SCALE, 9, None, None), given, dout)
    half, dhalf = [x.bfloat16() for x in given], dout.bfloat16()
    ours = with_gradients(lambda q, k, v: Forest(layout)(0, q, k, v, SCALE, 9, None, None), half, dhalf)
    dense = with_gradients(lambda q, k, v: Dense(layout)(0, q, k, v, SCALE, 9, None, None), half, dhalf)
    for x, y, z in zip(ours, dense, exact):
        assert x.dtype == torch.bfloat16
        assert (x - z).norm() < 1.5 * (y - z).norm() + 2e-3 * z.norm()


def test_inputs_may_be_laid_out_in_any_way():
    layout = FORESTS["depth 2"]
    given, dout = inputs(layout)
    want = with_gradients(lambda q, k, v: Forest(layout)(0, q, k, v, SCALE, None, None, None), given, dout)

    def strided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.mT.contiguous().mT for x in (q, k, v))
        return Forest(layout)(0, q, k, v, SCALE, None, None, None)

    spread = dout[..., None].expand(*dout.shape, 2)[..., 0].mT.contiguous().mT
    for x, y in zip(with_gradients(strided, given, spread), want):
        assert torch.allclose(x, y, rtol=0, atol=1e-14)
    summed = with_gradients(
        lambda *x: Forest(layout)(0, *x, SCALE, None, None, None).sum(), given, torch.ones(()).double()
    )
    ones = with_gradients(lambda *x: Forest(layout)(0, *x, SCALE, None, None, None), given, torch.ones_like(dout))
    for x, y in zip(summed[1:], ones[1:]):
        assert torch.allclose(x, y, rtol=0, atol=1e-14)


# ------------------------------------------------------------------------------------------------------------- blocks


def test_blocks_merge_into_the_whole_and_a_row_that_sees_nothing_adds_nothing():
    (q, k, v), _ = inputs(Layout((40,), (-1,)))
    q = q[:, :, :10]
    seen = torch.rand(10, 40, generator=torch.Generator().manual_seed(1)) < 0.4
    seen[:, 3] = True
    seen[2, :20] = False
    want, want_lse = attend_block(q, k, v, seen, SCALE)
    out, lse = torch.zeros_like(want), torch.full_like(want_lse, -torch.inf)
    for columns in (slice(0, 20), slice(20, 33), slice(33, 40)):
        o, l = attend_block(q, k[:, :, columns], v[:, :, columns], seen[:, columns], SCALE)
        if columns.start == 0:
            assert bool((l[:, :, 2] == -torch.inf).all()) and bool((o[:, :, 2] == 0).all())
        merge(out, lse, o, l)
    assert torch.allclose(out, want, rtol=0, atol=1e-14)
    assert torch.allclose(lse, want_lse, rtol=0, atol=1e-14)


def test_a_masked_block_formed_piece_by_piece_keeps_each_row_s_own_mask(monkeypatch: pytest.MonkeyPatch):
    (q, k, v), _ = inputs(Layout((150,), (-1,)))
    seen = torch.rand(150, 150, generator=torch.Generator().manual_seed(1)) < 0.4
    want = attend_block(q, k, v, seen, SCALE)
    monkeypatch.setattr(blocks, "_SCORES", 1)  # the smallest pieces: 64 rows
    for x, y in zip(attend_block(q, k, v, seen, SCALE), want):
        assert torch.allclose(x, y, rtol=0, atol=1e-14)


def test_merging_nothing_with_nothing_stays_nothing():
    out, lse = torch.zeros(2, 3, 4), torch.full((2, 3), -torch.inf)
    merge(out, lse, torch.zeros(2, 3, 4), torch.full((2, 3), -torch.inf))
    assert bool((out == 0).all()) and bool((lse == -torch.inf).all())


def test_rows_taken_by_index_are_merged_by_assignment():
    out, lse = torch.randn(5, 2, 3), torch.randn(5, 2)
    o, l = torch.randn(2, 2, 3), torch.randn(2, 2)
    rows = torch.tensor([3, 1])
    weight = torch.sigmoid(l - lse[rows])[..., None]
    want = out[rows] * (1 - weight) + o * weight
    out[rows], lse[rows] = merge(out[rows], lse[rows], o, l)
    assert torch.allclose(out[rows], want, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mask", [None, "causal", "free", "per row"])
def test_a_block_is_wide_batched_and_grouped(dtype: torch.dtype, mask: Any):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, h, 6, 8, generator=g).to(dtype) for h in (4, 2, 2))
    seen: Any = {None: None, "causal": "causal", "free": torch.rand(6, 6, generator=g) < 0.5}.get(mask)
    if mask == "per row":
        seen = (torch.arange(6) < torch.tensor([[2], [6], [4]]))[:, None, None]
    out, lse = attend_block(q, k, v, seen, SCALE)
    assert out.dtype == lse.dtype == torch.promote_types(dtype, torch.float32)
    s = (q.double() @ k.double().repeat_interleave(2, 1).mT) * SCALE
    if seen is not None:
        allowed = torch.ones(6, 6, dtype=torch.bool).tril() if mask == "causal" else seen
        s = s.masked_fill(~allowed, -torch.inf)
    want = s.softmax(-1).nan_to_num() @ v.double().repeat_interleave(2, 1)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float64: 1e-14}[dtype]
    assert torch.allclose(out.double(), want, rtol=0, atol=tolerance)
    assert torch.allclose(lse.double(), s.logsumexp(-1), rtol=0, atol=tolerance)
    assert not attend_block(q.requires_grad_(), k, v, seen, SCALE)[0].requires_grad


def test_without_a_working_stock_kernel_three_products_take_over(monkeypatch: pytest.MonkeyPatch):
    assert blocks._stock_works(torch.float32)  # else the fast path is gone and nobody has noticed

    def gone(*_: Any) -> Any:
        raise AttributeError("'_OpNamespace' 'aten' object has no attribute")

    def wrong(q: Tensor, *rest: Any) -> Any:
        out, lse = blocks._product_forward(q, *rest)
        return out * 1.01, lse

    try:
        for broken in (gone, wrong):
            monkeypatch.setattr(blocks, "_stock_forward", broken)
            blocks._stock_works.cache_clear()
            assert not blocks._stock_works(torch.float64)
            compare(FORESTS["depth 2"], 7, None)
    finally:
        blocks._stock_works.cache_clear()


# -------------------------------------------------------------------------------------------------------------- plans


def test_blocks_are_laid_out_once_a_window_for_all_layers(monkeypatch: pytest.MonkeyPatch):
    asked: list[int | None] = []
    lay_out = attention._lay_out
    monkeypatch.setattr(attention, "_lay_out", lambda *a: asked.append(a[1]) or lay_out(*a))
    layout = FORESTS["depth 3"]
    plan, ((q, k, v), _) = Forest(layout), inputs(layout)
    for layer in range(4):
        plan(layer, q, k, v, SCALE, None if layer % 2 else 7, None, None)
    assert asked == [7, None]


def test_roots_are_never_merged(monkeypatch: pytest.MonkeyPatch):
    def never(*_: Any) -> Any:
        raise AssertionError("a root was merged")

    monkeypatch.setattr(attention, "merge", never)
    compare(FORESTS["depth 0"], None, None)
    compare(FORESTS["depth 0"], 7, None)
    with pytest.raises(AssertionError, match="merged"):
        compare(FORESTS["depth 1"], None, None)


def test_a_tree_that_fits_the_window_is_computed_without_one():
    layout = FORESTS["depth 2"]  # the longest of its paths has 20 tokens
    fits, not_quite = (attention._lay_out(layout, window, torch.device("cpu")) for window in (20, 19))
    assert len(fits.rectangles) == 2 and all(p.keys is None for p in fits.pieces)
    assert len(not_quite.rectangles) == 0 and any(p.keys is not None for p in not_quite.pieces)


def test_flops_by_hand():
    # 4 query heads, width 8: 2 * 4 * 16 = 128 a pair forward, 2 * 4 * 40 = 320 backward
    layout = Layout((3, 2, 4), (-1, 0, 0))
    pairs = 6 + 3 + 10 + 6 * 3  # three triangles, and both children's rows against the root
    (q, k, v), dout = inputs(layout)
    plan = Forest(layout)
    plan(0, q.requires_grad_(), k, v, SCALE, None, None, None).backward(dout)
    assert (plan.flops, plan.flops_backward) == (128 * pairs, 320 * pairs)
    plan(1, q, k, v, SCALE, None, None, None)
    assert (plan.flops, plan.flops_backward) == (2 * 128 * pairs, 320 * pairs)
    # ten rows under a window of four: a triangle of four, then six rows against the nine keys they can see between them
    plan, ((q, k, v), _) = Forest(Layout((10,), (-1,))), inputs(Layout((10,), (-1,)))
    plan(0, q, k, v, SCALE, 4, None, None)
    assert plan.flops == 128 * (10 + 6 * 9)


@pytest.mark.parametrize("value", [8, 5])
@pytest.mark.parametrize("window", [None, 7, 70])
@pytest.mark.parametrize("layout", [*FORESTS.values(), Layout((300, 90, 20), (-1, 0, 0))], ids=str)
def test_flops_of_the_product_path_are_those_torch_counts(
    layout: Layout, window: int | None, value: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(blocks, "_stock_works", lambda dtype: False)
    given, dout = inputs(layout, value=value)
    for plan in (Forest(layout), Dense(layout)):
        leaves = [x.detach().clone().requires_grad_() for x in given]
        with FlopCounterMode(display=False) as forward:
            out = plan(0, *leaves, SCALE, window, None, None)
        with FlopCounterMode(display=False) as backward:
            out.backward(dout)
        assert plan.flops == forward.get_total_flops()
        assert plan.flops_backward == backward.get_total_flops()


# --------------------------------------------------------------------------------------------- the registered function


class Layer(torch.nn.Module):
    layer_idx = 3
    is_causal = True


def call(**more: Any) -> Tensor:
    layout = FORESTS["depth 1"]
    (q, k, v), _ = inputs(layout)
    given = {"attention_mask": None, "plan": Forest(layout), "scaling": SCALE, "dropout": 0.0, **more}
    return forest_attention(given.pop("module", Layer()), q, k, v, given.pop("attention_mask"), **given)[0]


def test_the_function_hands_on_everything_it_is_given():
    heard: list[Any] = []
    layout = FORESTS["depth 1"]

    class Listening(Forest):
        def __call__(self, layer, q, k, v, scale, window, softcap, sinks):
            heard.extend([layer, scale, window, softcap, sinks])
            return super().__call__(layer, q, k, v, scale, window, softcap, sinks)

    sinks = torch.zeros(4)
    out = call(plan=Listening(layout), sliding_window=9, softcap=2.0, s_aux=sinks, position_ids=layout.position)
    assert heard[:4] == [3, SCALE, 9, 2.0] and heard[4] is sinks
    assert out.shape == (1, layout.size, 4, 8) and out.is_contiguous()
    heard.clear()
    call(plan=Listening(layout), scaling=None)
    assert heard[1] == 8**-0.5


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"plan": None}, "no plan"),
        ({"dropout": 0.1}, "dropout 0.1"),
        ({"attention_mask": torch.zeros(1, 1, 30, 30)}, "mask"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"head_mask": torch.zeros(1), "alibi": 1}, "alibi, head_mask"),
        ({"output_attentions": True}, "output_attentions"),
        ({"is_causal": False}, "not causal"),
        ({"sliding_window": 0}, "window of 0"),
    ],
    ids=lambda x: str(x)[:20] if isinstance(x, str) else next(iter(x)),
)
def test_what_it_does_not_understand_it_refuses(more: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        call(**more)


def test_arguments_without_effect_are_let_through():
    call(position_bias=None, use_cache=False, output_attentions=False, past_key_values=None, is_causal=True)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        (None, None),
        ({"rope_type": "default"}, None),
        ({"rope_type": "yarn", "original_max_position_embeddings": 9}, None),
        ({"rope_type": "longrope", "original_max_position_embeddings": 9}, 9),
        ({"rope_type": "dynamic", "factor": 2.0}, 64),
        ({"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}, 64),
    ],
)
def test_rotations_that_follow_the_longest_row_are_known(rope: dict[str, Any] | None, limit: int | None):
    assert attention.rotation_limit(SimpleNamespace(rope_parameters=rope, max_position_embeddings=64)) == limit
    assert attention.rotation_limit(None) is None


def test_a_layer_that_is_not_causal_is_refused():
    layer = Layer()
    layer.is_causal = False
    with pytest.raises(ConfigError, match="not causal"):
        call(module=layer)


# ----------------------------------------------------------------------------------------------- half-precision blocks


def half_problem(batch: int, rows: int, keys: int, kv: int, spread: float) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = ((rows, 4), (keys, kv), (keys, kv), (rows, 4))
    q, k, v, dout = ((torch.randn(batch, n, h, 32, generator=g)).bfloat16().transpose(1, 2) for n, h in sizes)
    return [dout, q * spread, k, v]


@pytest.mark.parametrize("spread", [1.0, 8.0])  # 8: scores of 40 and more, whose own rounding would be 0.1
@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize(("batch", "rows", "keys", "mask"), [(3, 40, 40, "causal"), (1, 300, 300, "causal"), (2, 50, 90, None), (1, 50, 90, 30), (1, 2000, 2100, 150)])
def test_half_precision_products_are_as_near_to_float64_as_the_stock_backward(
    batch: int, rows: int, keys: int, mask: Any, kv: int, spread: float
):
    dout, q, k, v = half_problem(batch, rows, keys, kv, spread)
    if isinstance(mask, int):  # a window
        mask = Band.of(rows, keys, mask, q.device)
    out, lse = blocks._product_forward(q.double(), k.double(), v.double(), mask, SCALE, None)
    exact = blocks._product_backward(dout.double(), q.double(), k.double(), v.double(), out, lse, mask, SCALE, None)
    given = dout, q, k, v, out.bfloat16(), lse.float(), mask, SCALE, None
    for x, y in zip(blocks._half_backward(*given), exact):
        assert x.shape == y.shape and (x.double() - y).norm() < 1.2e-2 * y.norm()  # three roundings of 2^-8 in a row


def test_scores_rounded_before_their_shift_would_not_do():
    dout, q, k, v = half_problem(1, 60, 60, 2, 8.0)
    out, lse = blocks._product_forward(q.double(), k.double(), v.double(), None, SCALE, None)
    p = blocks._grouped(q, 2).flatten(2, 3) @ k.mT  # in half precision, as one would first write it
    rounded = (p.float() * SCALE - blocks._grouped(lse.float()[..., None], 2).flatten(2, 3)).exp()
    dv = rounded.bfloat16().mT @ blocks._grouped(dout, 2).flatten(2, 3)
    given = dout, q, k, v, out.bfloat16(), lse.float(), None, SCALE, None
    exact = blocks._product_backward(*(x.double() for x in given[:4]), out, lse, None, SCALE, None)[2]
    ours = blocks._half_backward(*given)[2]
    assert (dv - exact).norm() > 3 * (ours - exact).norm()


def test_large_half_precision_blocks_go_to_the_products_and_are_counted_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "_half_products_are_fast", lambda: True)
    kernel = blocks.kernel_for(torch.empty(1, 32, 1, 128).bfloat16(), torch.empty(1, 8, 1, 128), None)
    assert kernel.causal_pairs_backward is not None
    assert kernel.causal_pairs_backward(40, 32) == kernel.causal_pairs(40, 32) == 40 * 41 // 2
    assert kernel.causal_pairs(200, 32) == 200 * 201 // 2
    assert kernel.causal_pairs_backward(200, 32) == 128 * 128 + 72 * 200
    called: list[str] = []
    for name in ("_half_backward", "_stock_backward"):
        ours = getattr(blocks, name)
        monkeypatch.setattr(blocks, name, lambda *a, name=name, ours=ours: called.append(name) or ours(*a))
    blocks._half_kernel.cache_clear()
    try:
        layout = Layout((200, 8), (-1, 0))
        given = [torch.randn(1, n, 208, 128).bfloat16().requires_grad_() for n in (32, 8, 8)]
        plan = Forest(layout)
        plan(0, *given, SCALE, None, None, None).sum().backward()
        windowed = [torch.randn(1, n, 200, 128).bfloat16().requires_grad_() for n in (32, 8, 8)]
        Forest(Layout((200,), (-1,)))(0, *windowed, SCALE, 100, None, None).sum().backward()
    finally:
        blocks._half_kernel.cache_clear()
    assert called == ["_half_backward", "_stock_backward", "_stock_backward", *["_half_backward"] * 3]  # of a window: its head and two chunks
    assert plan.flops_backward == 2 * 32 * 5 * 128 * (128 * 128 + 72 * 200 + 8 * 9 // 2 + 8 * 200)
    monkeypatch.setattr(blocks, "_half_products_are_fast", lambda: False)
    assert blocks.kernel_for(torch.empty(1, 32, 1, 128).bfloat16(), torch.empty(1, 8, 1, 128), None) is blocks._STOCK


def test_neighbours_of_one_length_without_descendants_are_one_batch():
    layout = Layout((9, 5, 5, 5, 4, 4, 5, 3, 3), (-1, 0, 0, 0, 0, -1, -1, -1, -1))
    program = attention._lay_out(layout, None, torch.device("cpu"))
    assert [(p.rows, p.segments) for p in program.pieces] == [(9, 1), (15, 3), (8, 2), (5, 1), (6, 2)]
    compare(layout, None, None)
    compare(layout, None, 1.5, sinks=True, kv=1)
    compare(Layout((6, 6, 6), (-1, -1, -1)), None, None)  # roots alone
    compare(Layout((6, 6, 6), (-1, 0, 1)), None, None)  # a chain is no batch: each sees the one before it


def test_few_rows_of_half_precision_are_not_worth_wide_keys_and_many_are_summed_wide():
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 2, 90, 32, generator=g).bfloat16() for _ in range(2))
    errors = []
    for rows in (blocks._FEW_ROWS // 2 - 1, blocks._FEW_ROWS // 2):  # two query heads on each key-value head
        q = (torch.randn(1, 4, rows, 32, generator=g) * 8).bfloat16()
        seen = torch.ones(rows, 90, dtype=torch.bool)
        lse = attend_block(q, k, v, seen, SCALE)[1]
        want = attend_block(q.double(), k.double(), v.double(), seen, SCALE)[1]
        errors.append(float((lse - want).abs().max()))
    assert errors[0] > 1e-3 and errors[0] < 0.2  # scores near 40, rounded to a step of 0.25 / 2
    assert errors[1] < 1e-4
