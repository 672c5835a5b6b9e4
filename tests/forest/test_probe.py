"""The question at load: may this model share prefixes?"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import burnish.forest.probe as probe
from burnish.forest.attention import NAME, register
from burnish.forest.probe import _windows_untold, why_not
from tests.forest.tiny import SHARE, body_of, tiny


@pytest.mark.parametrize("name", SHARE)
def test_models_that_share(name: str):
    model = tiny(name)
    assert why_not(model, body_of(model)) is None


@pytest.mark.parametrize("name", SHARE)
def test_models_that_share_in_half_precision(name: str):
    model = tiny(name, dtype=torch.bfloat16)
    assert why_not(model, body_of(model)) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bloom", "only 0 of 2 layers call"),
        ("falcon", "only 0 of 2 layers call"),
        ("mamba", "linear_attention"),
        ("lfm2", "conv"),
        ("llama4", "chunked_attention"),
        ("qwen3_next", "linear_attention"),
    ],
)
def test_models_that_do_not(name: str, said: str):
    model = tiny(name)
    assert said in str(why_not(model, body_of(model)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_give_away_what_no_layer_type_says(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe, "_LAYERS", {"full_attention", "chunked_attention"})
    model = tiny("llama4", dtype=dtype, attention_chunk_size=4)
    assert "hidden states differ" in str(why_not(model, body_of(model)))


def test_a_layer_that_hides_more_than_it_says_is_found_by_its_window():
    # no probe of 18 tokens can see a window of 64 that is only in the model's mask
    model = tiny("gemma3", sliding_window=64)
    for layer in body_of(model).layers:
        layer.self_attn.sliding_window = None
    assert why_not(model, body_of(model)) == (
        "layer 0 is sliding_attention and tells its attention function a window of None"
    )


def test_windows_without_layer_types():
    said = _windows_untold(SimpleNamespace(sliding_window=4096), [], [None, None])
    assert said is not None and "4096" in said
    assert _windows_untold(SimpleNamespace(sliding_window=4096), [], [4096, 4096]) is None
    assert _windows_untold(SimpleNamespace(sliding_window=None), [], [None, None]) is None
    assert _windows_untold(SimpleNamespace(), [], [None, None]) is None


@pytest.mark.parametrize("name", ["llama", "bloom", "llama4", "mamba"])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(name: str, training: bool):
    model = tiny(name)
    model.train(training)
    body = body_of(model)
    if training:
        body.layers[0].eval() if hasattr(body, "layers") else body.eval()
    modes = [m.training for m in model.modules()]
    before = model.config._attn_implementation
    why_not(model, body)
    assert [m.training for m in model.modules()] == modes
    assert model.config._attn_implementation == before == body.config._attn_implementation
    assert all(p.grad is None for p in model.parameters())


def test_a_probe_that_fails_half_way_restores_too(monkeypatch: pytest.MonkeyPatch):
    model = tiny("llama", attention="sdpa").train()
    body = body_of(model)

    def broken(*_: object, **__: object) -> None:
        raise TypeError("forward() got an unexpected keyword argument 'plan'")

    monkeypatch.setattr(body.layers[1].self_attn, "forward", broken)
    with pytest.raises(TypeError):  # its own rows do not run either: that is an error and not an answer
        why_not(model, body)
    assert model.training and model.config._attn_implementation == "sdpa"


def test_a_model_already_set_to_the_forest_is_compared_with_its_own_attention():
    model = tiny("llama")
    model.set_attn_implementation(register())
    assert why_not(model, body_of(model)) is None
    assert model.config._attn_implementation == NAME


def test_a_model_with_adapters():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny("gemma3"), LoraConfig(target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    )
    body = body_of(model.get_base_model())
    model.train()
    assert why_not(model, body) is None
    assert model.training and body.config._attn_implementation == "eager"
    bloom = tiny("bloom")
    adapted = get_peft_model(bloom, LoraConfig(target_modules=["query_key_value"]))
    assert "layers call" in str(why_not(adapted, body_of(bloom)))


@pytest.mark.parametrize(
    ("apart", "shares"),
    [
        ((0.07, 0.04), True),  # as far as the model's own attentions lie apart: rounding
        ((0.07, 0.02), False),
        ((0.07, float("inf")), False),  # the model's other attention does not work
        ((0.2, 0.2), False),  # what wrong masks do, whatever rounding does
        ((0.04,), True),
    ],
)
def test_half_precision_may_differ_by_what_rounding_does_to_the_model_itself(apart: tuple[float, ...], shares: bool, monkeypatch: pytest.MonkeyPatch):
    said = iter(apart)
    monkeypatch.setattr(probe, "_worst", lambda got, want: next(said))
    model = tiny("llama", dtype=torch.bfloat16)
    before, reason = model.config._attn_implementation, why_not(model, body_of(model))
    assert reason is None if shares else reason is not None and "differ from separate rows" in reason
    assert model.config._attn_implementation == before
