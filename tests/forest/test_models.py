"""Whole tiny models: the packed stream against the same sequences as separate rows under the model's own attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import burnish.forest.attention as attention
from burnish.forest.attention import Dense, Forest, register
from burnish.forest.padded import padded_hidden
from burnish.forest.stream import Layout, Stream
from tests.forest.tiny import SHARE, VOCABULARY, WINDOW, body_of, tiny

# every path of depth 1 and more is longer than the window, and in each forest some segment is too
FORESTS = {
    0: Layout((5, 13, 9, 1), (-1, -1, -1, -1)),
    1: Layout((9, 6, 4, 12, 3, 5), (-1, 0, 0, -1, 3, 3)),
    2: Layout((9, 5, 4, 10, 3, 6), (-1, 0, 1, 1, 0, -1)),
    3: Layout((4, 3, 2, 11, 1, 5, 3, 8), (-1, 0, 1, 2, 2, 1, 0, -1)),
}
# sdpa knows neither a cap on the scores nor sinks
OWN = {"gemma2": "eager", "gpt_oss": "eager"}
ALL = SHARE
STAY_WIDE = {"gemma2", "gemma3", "gpt_neox", "starcoder2"}


def stream_of(layout: Layout) -> Stream:
    return Stream(torch.randint(3, VOCABULARY, (layout.size,), generator=torch.Generator().manual_seed(3)), layout)


def projection(layout: Layout, hidden: int, dtype: torch.dtype) -> Tensor:
    """A loss that weighs every hidden number differently, so that no two errors cancel."""
    return torch.randn(layout.size, hidden, generator=torch.Generator().manual_seed(4)).to(dtype)


def in_forest(model: PreTrainedModel, stream: Stream, plan: Any = None) -> Tensor:
    model.set_attn_implementation(register())
    plan = plan or Forest(stream.layout)
    given = {"input_ids": stream.tokens[None], "position_ids": stream.layout.position[None]}
    return body_of(model)(**given, plan=plan, use_cache=False).last_hidden_state[0]


def in_rows(model: PreTrainedModel, stream: Stream, own: str, token_budget: int = 200) -> Tensor:
    model.set_attn_implementation(own)
    return padded_hidden(body_of(model), stream, token_budget=token_budget)


def with_gradients(model: PreTrainedModel, hidden: Tensor, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    (hidden * projection(layout, hidden.shape[-1], hidden.dtype)).sum().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in body_of(model).named_parameters() if p.grad is not None}


def apart(x: Tensor, y: Tensor) -> float:
    return float(((x - y).norm() / y.norm()).detach())


def assert_equal(
    got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]], tolerance: float
) -> str:
    """What was measured: the hidden states' error and that of the worst single parameter."""
    assert apart(got[0], want[0]) <= tolerance
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        error = apart(got[1][name], gradient)
        assert error <= tolerance, f"{name}: {error:.1e}"
    worst = max(apart(got[1][name], gradient) for name, gradient in want[1].items())
    return f"hidden {apart(got[0], want[0]):.1e}, worst parameter gradient {worst:.1e}"


@pytest.mark.parametrize("depth", FORESTS)
@pytest.mark.parametrize("name", ALL)
def test_hidden_states_and_gradients_equal_separate_rows(name: str, depth: int, record_property: Any):
    model, stream = tiny(name), stream_of(FORESTS[depth])
    want = with_gradients(model, in_rows(model, stream, OWN.get(name, "sdpa")), stream.layout)
    got = with_gradients(model, in_forest(model, stream), stream.layout)
    record_property("measured", f"forest {name} depth {depth} fp32: {assert_equal(got, want, 1e-5)}")


@pytest.mark.parametrize("depth", FORESTS)
@pytest.mark.parametrize("name", ALL)
def test_in_float64_against_rows_without_padding(
    name: str, depth: int, monkeypatch: pytest.MonkeyPatch, record_property: Any
):
    # Models convert to float32 inside norms and softmax. Where they do it by these two names they stay in float64, and
    # they agree to 5e-15; Llama's norm says `to(torch.float32)` and leaves 1e-7.
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, **_: softmax(x, dim=dim))
    model, stream = tiny(name, dtype=torch.float64), stream_of(FORESTS[depth])
    # `eager` with padding and a window is NaN in float64, so the rows of this oracle run one by one
    want = with_gradients(model, in_rows(model, stream, "eager", token_budget=1), stream.layout)
    assert all(bool(torch.isfinite(g).all()) for g in want[1].values())
    got = with_gradients(model, in_forest(model, stream), stream.layout)
    measured = assert_equal(got, want, 1e-13 if name in STAY_WIDE else 1e-6)
    record_property("measured", f"forest {name} depth {depth} fp64: {measured}")


@pytest.mark.parametrize("name", ALL)
def test_blocks_equal_one_masked_block_in_float64(name: str):
    model, stream = tiny(name, dtype=torch.float64), stream_of(FORESTS[3])
    want = with_gradients(model, in_forest(model, stream, Dense(stream.layout)), stream.layout)
    assert_equal(with_gradients(model, in_forest(model, stream), stream.layout), want, 1e-13)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_with_gradient_checkpointing(name: str, reentrant: bool):
    model, stream = tiny(name), stream_of(FORESTS[2])
    model.train()  # layers only checkpoint in training mode
    plain = Forest(stream.layout)
    want = with_gradients(model, in_forest(model, stream, plain), stream.layout)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    plan = Forest(stream.layout)
    got = with_gradients(model, in_forest(model, stream, plan), stream.layout)
    assert plan.flops == 2 * plain.flops  # so it really recomputed, and the count says so
    assert_equal(got, want, 1e-6)


def test_in_bfloat16_a_stream_is_as_near_to_float32_as_rows_are():
    stream = stream_of(FORESTS[2])
    exact = in_rows(tiny("gemma3"), stream, "sdpa").detach()
    half = tiny("gemma3", dtype=torch.bfloat16)
    rows, forest = in_rows(half, stream, "sdpa").float(), in_forest(half, stream).float()
    assert apart(forest.detach(), exact) < 1.3 * apart(rows.detach(), exact)


# What the oracle must notice. Each of these is withheld from the plan on its way from the layer.
WITHHELD = {
    "window": ["mistral", "gemma3", "gemma2", "gpt_oss", "phi3", "cohere2", "starcoder2", "qwen2_sliding"],
    "softcap": ["gemma2"],
    "sinks": ["gpt_oss"],
    "scale": ["gemma3_scaled", "granite"],
    "position": ["llama", "gemma3"],
    "ancestors": ["llama"],
}


@pytest.mark.parametrize(("what", "name"), [(what, name) for what, names in WITHHELD.items() for name in names])
def test_the_oracle_notices_what_is_withheld(what: str, name: str):
    model = tiny("gemma3", query_pre_attn_scalar=32) if name == "gemma3_scaled" else tiny(name)
    stream = stream_of(FORESTS[2])
    layout = stream.layout

    class Withholding(Forest):
        def __call__(self, layer, q, k, v, scale, window, softcap, sinks):
            given = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
            given[what] = q.shape[-1] ** -0.5 if what == "scale" else None
            return super().__call__(layer, q, k, v, **{k: x for k, x in given.items() if k != "ancestors"})

    plan: Any = Withholding(layout)
    own = OWN.get(name, "sdpa")
    want = in_rows(model, stream, own).detach()
    if what == "position":
        model.set_attn_implementation(register())
        body = body_of(model)
        got = body(input_ids=stream.tokens[None], plan=Forest(layout), use_cache=False).last_hidden_state[0]
    elif what == "ancestors":
        plan = Forest(Layout(layout.length, (-1,) * len(layout.length)))
        got = in_forest(model, stream, plan)
    else:
        got = in_forest(model, stream, plan)
    assert apart(got.detach(), want) > 0.02
    assert apart(in_forest(model, stream).detach(), want) < 1e-5


def test_every_argument_of_every_layer_was_used(monkeypatch: pytest.MonkeyPatch):
    # the registered function refuses what it does not know; this says which names the models above really pass
    heard: dict[str, set[str]] = {}
    ours = attention.forest_attention

    def listening(module: torch.nn.Module, *tensors: Any, **named: Any) -> Any:
        heard.setdefault(name, set()).update(k for k, x in named.items() if x is not None)
        return ours(module, *tensors, **named)

    monkeypatch.setattr(attention, "forest_attention", listening)
    try:
        for name in ALL:
            in_forest(tiny(name), stream_of(FORESTS[1]))
    finally:
        monkeypatch.undo()
        register()
    assert all("sliding_window" in heard[name] for name in WITHHELD["window"])
    assert "softcap" in heard["gemma2"] and "s_aux" in heard["gpt_oss"]
    assert all("scaling" in names and "plan" in names for names in heard.values())


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_plan_flops_and_body_products_equal_torch_s_counter(name: str):
    model, stream = tiny(name), stream_of(FORESTS[2])
    plan = Dense(stream.layout)
    matrices = sum(p.numel() for n, p in body_of(model).named_parameters() if p.dim() == 2 and "embed" not in n)
    body_flops = 2 * matrices * stream.layout.size
    with FlopCounterMode(display=False) as forward:
        hidden = in_forest(model, stream, plan)
    assert plan.flops + body_flops == pytest.approx(forward.get_total_flops(), rel=0.01)
    with FlopCounterMode(display=False) as backward:
        hidden.sum().backward()
    assert plan.flops_backward + 2 * body_flops == pytest.approx(backward.get_total_flops(), rel=0.01)
    assert plan.flops > 0.1 * body_flops  # else one per cent would not see attention at all
    blocks = Forest(stream.layout)
    in_forest(model, stream, blocks)
    assert 0.2 * plan.flops < blocks.flops < 0.8 * plan.flops


def test_a_window_longer_than_every_path_changes_nothing():
    stream = stream_of(FORESTS[2])
    wide, none = tiny("mistral", sliding_window=100), tiny("mistral", sliding_window=None)
    assert torch.equal(in_forest(wide, stream), in_forest(none, stream))
    assert apart(in_forest(tiny("mistral", sliding_window=WINDOW), stream), in_forest(none, stream)) > 0.02
