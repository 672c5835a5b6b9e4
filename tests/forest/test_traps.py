"""Ways to get plausible, wrong numbers without an error, each one walked into on purpose.

A test here shows that the trap is real where it can, and that this package does not fall into it. The numbers are those
of the design's list of traps; the others belong to other layers.
"""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import burnish.forest.blocks as blocks
import burnish.forest.probe as probe
from burnish.core.errors import ConfigError
from burnish.forest.attention import NAME, Forest, attend_block, register
from burnish.forest.padded import padded_hidden
from burnish.forest.probe import why_not
from burnish.forest.stream import Layout, Stream
from tests.forest.tiny import VOCABULARY, body_of, tiny

LAYOUT = Layout((9, 5, 4, 10, 3, 6), (-1, 0, 1, 1, 0, -1))
STREAM = Stream(torch.randint(3, VOCABULARY, (LAYOUT.size,), generator=torch.Generator().manual_seed(3)), LAYOUT)
GIVEN = {"input_ids": STREAM.tokens[None], "position_ids": LAYOUT.position[None], "use_cache": False}


def apart(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm())


def test_trap_01_an_architecture_outside_the_registry_runs_without_any_mask():
    model = tiny("bloom")
    body, ids = body_of(model), STREAM.tokens[None, :9]
    with torch.no_grad():
        right = body(input_ids=ids, use_cache=False).last_hidden_state
        model.config._attn_implementation = register()  # what a loader that only sets the name would do
        wrong = body(input_ids=ids, use_cache=False).last_hidden_state
    assert apart(wrong, right) > 0.05
    model.config._attn_implementation = "eager"
    assert why_not(model, body) is not None


def test_trap_02_a_two_dimensional_mask_is_discarded_for_an_unknown_attention_name():
    model = tiny("llama")
    model.set_attn_implementation(register())
    body = body_of(model)
    hidden = torch.zeros(1, LAYOUT.size, dtype=torch.long)
    with torch.no_grad():
        plain = body(**GIVEN, plan=Forest(LAYOUT)).last_hidden_state
        masked = body(**GIVEN, attention_mask=hidden, plan=Forest(LAYOUT)).last_hidden_state
    assert torch.equal(plain, masked)  # everything was masked, and nobody heard
    with pytest.raises(ConfigError, match="takes no padding"):  # so rows that need their mask refuse this name
        padded_hidden(body, STREAM)


def test_trap_03_positions_without_a_mask_cut_a_tree_into_sequences_under_sdpa():
    model = tiny("llama", attention="sdpa")
    body = body_of(model)
    with torch.no_grad():
        want = padded_hidden(body, STREAM)
        cut = body(**GIVEN).last_hidden_state[0]
        model.set_attn_implementation(register())
        ours = body(**GIVEN, plan=Forest(LAYOUT)).last_hidden_state[0]
    assert apart(cut, want) > 0.1
    assert apart(ours, want) < 1e-5


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "gpt_oss"])
def test_trap_04_one_four_dimensional_mask_is_used_for_sliding_and_full_layers_alike(name: str):
    model = tiny(name)
    model.set_attn_implementation(register())
    mask = torch.zeros(1, 1, LAYOUT.size, LAYOUT.size)
    with pytest.raises(ConfigError, match="given a mask"):
        body_of(model)(**GIVEN, attention_mask=mask, plan=Forest(LAYOUT))


def test_trap_05_chunked_attention_reaches_the_function_as_ordinary_attention(monkeypatch: pytest.MonkeyPatch):
    model = tiny("llama4", attention_chunk_size=8192)
    body = body_of(model)
    assert "chunked_attention" in str(why_not(model, body))  # only the configuration says so
    monkeypatch.setattr(probe, "_LAYERS", {"full_attention", "chunked_attention"})
    assert why_not(model, body) is None  # no short forest can see a long chunk


def test_trap_08_a_cache_adds_keys_that_the_plan_does_not_know():
    model = tiny("llama")
    model.set_attn_implementation(register())
    body = body_of(model)
    cache = DynamicCache(config=model.config)
    prefix = Layout((4,), (-1,))
    given = {"input_ids": STREAM.tokens[None, :4], "position_ids": prefix.position[None]}
    body(**given, past_key_values=cache, use_cache=True, plan=Forest(prefix))
    with pytest.raises(ConfigError, match="one stream of 37 tokens"):
        body(**{**GIVEN, "use_cache": True}, past_key_values=cache, plan=Forest(LAYOUT))


def test_trap_12_a_plan_outlives_the_forward_that_checkpointing_repeats():
    model = tiny("llama").train()
    model.set_attn_implementation(register())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    plan = Forest(LAYOUT)
    out = body_of(model)(**GIVEN, plan=plan).last_hidden_state
    launched = plan.flops
    del plan.flops_backward  # a plan kept anywhere but in the call would not be this one when backward runs
    plan.flops_backward = 0
    out.sum().backward()
    assert plan.flops == 2 * launched and plan.flops_backward > 0


def test_trap_13_the_stock_kernel_refuses_boolean_masks():
    q = torch.randn(1, 2, 5, 8)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    with pytest.raises(RuntimeError, match="same data type"):
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, 0.0, False, attn_mask=seen[None, None])
    band = blocks.Band.of(5, 5, 5, q.device)
    assert torch.equal(band.seen, seen)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = q.to(dtype)
        out, _ = blocks._stock_forward(x, x, x, band, 0.3, None)
        assert torch.allclose(out, blocks._stock_forward(x, x, x, "causal", 0.3, None)[0], atol=1e-2)


def test_trap_13b_the_stock_kernel_gives_a_row_without_keys_a_log_sum_of_zero():
    q = torch.randn(1, 2, 5, 8)
    nothing = torch.full((1, 1, 5, 5), -torch.inf)
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, 0.0, False, attn_mask=nothing)
    assert bool((lse == 0).all())  # merged, this would weigh as much as a key of score zero
    assert bool((attend_block(q, q, q, torch.zeros(5, 5, dtype=torch.bool), 0.3)[1] == -torch.inf).all())


def test_trap_14_rows_of_a_float64_oracle_run_one_by_one():
    model = tiny("gemma2", dtype=torch.float64)
    with torch.no_grad():
        assert bool(torch.isfinite(padded_hidden(body_of(model), STREAM, token_budget=1)).all())


def test_trap_16_grad_mode_is_off_inside_a_function_and_the_sink_still_learns():
    modes: list[bool] = []
    forward = blocks._STOCK.forward

    def listening(*given):
        modes.append(torch.is_grad_enabled())
        return forward(*given)

    layout = Layout((4, 3), (-1, 0))
    q, k, v = (torch.randn(1, 2, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sinks = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    patched = pytest.MonkeyPatch()
    try:
        patched.setattr(blocks, "_STOCK", blocks.Kernel(listening, blocks._STOCK.backward, blocks._STOCK.causal_pairs))
        out = Forest(layout)(0, q, k, v, 0.3, None, None, sinks)
    finally:
        patched.undo()
    assert modes == [False] * 3  # blocks build no graph: what has a gradient must be asked for through the function
    out.sum().backward()
    assert all(x.grad is not None and bool(x.grad.abs().sum() > 0) for x in (q, k, v, sinks))
    with torch.no_grad():
        assert not Forest(layout)(0, q, k, v, 0.3, None, None, sinks).requires_grad
    frozen = sinks.detach()
    Forest(layout)(0, q, k, v, 0.3, None, None, frozen).sum().backward()
    assert frozen.grad is None


def test_trap_17_attention_dropout_would_differ_between_copies_of_a_prefix():
    model = tiny("llama", attention_dropout=0.1)
    body = body_of(model)
    assert why_not(model, body) is None  # in eval mode there is none
    model.set_attn_implementation(register())
    assert model.config._attn_implementation == NAME
    body(**GIVEN, plan=Forest(LAYOUT))
    model.train()
    with pytest.raises(ConfigError, match=r"dropout 0\.1"):
        body(**GIVEN, plan=Forest(LAYOUT))


def test_trap_21_one_long_row_changes_the_rotation_of_the_short_ones_beside_it():
    model = tiny("longrope")
    body = body_of(model)
    assert why_not(model, body) is None  # 9 tokens are not long enough to show it
    short, mixed, one = Layout((10, 12), (-1, -1)), Layout((10, 30), (-1, -1)), Layout((30,), (-1,))
    alone = body(input_ids=STREAM.tokens[None, :10], use_cache=False).last_hidden_state[0].detach()
    ids = STREAM.tokens[[*range(10), *range(10), *range(10), *range(10)]].view(2, 20)
    together = body(input_ids=ids, use_cache=False).last_hidden_state[0, :10].detach()
    assert apart(together, alone) > 0.1

    def stream(layout: Layout) -> Stream:
        return Stream(STREAM.tokens.repeat(2)[: layout.size], layout)

    assert apart(padded_hidden(body, stream(mixed)).detach()[:10], alone) < 1e-5
    model.set_attn_implementation(register())
    for layout in (short, one):
        s = stream(layout)
        body(input_ids=s.tokens[None], position_ids=layout.position[None], plan=Forest(layout), use_cache=False)
    s = stream(mixed)
    with pytest.raises(ConfigError, match="a sequence of 30 tokens would change the rotation"):
        body(input_ids=s.tokens[None], position_ids=mixed.position[None], plan=Forest(mixed), use_cache=False)
