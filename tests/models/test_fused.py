"""Fused norms and gates against the modules they replace: values, gradients, second derivatives, copies."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.maths.kernels import kernels_for
from burnish.models.fused import fuse, fuse_adapters, gelu_of, way_of
from burnish.models.policy import Policy
from tests.forest.tiny import tiny

needs_kernels = pytest.mark.skipif(kernels_for(torch.float32) is None, reason="no C compiler")
FAMILIES = ["llama", "qwen3", "gemma3", "gemma2", "mistral", "granite", "smollm3", "olmo2", "mixtral"]


def pair(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(a body as transformers made it, its fused copy), norms with weights of their own."""
    plain = tiny(family, dtype=dtype).get_decoder().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in plain.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator).to(dtype))
    fused = copy.deepcopy(plain)
    norms, _ = fuse(fused)
    assert norms
    return plain, fused


def gradients(body: Any) -> tuple[Tensor, dict[str, Tensor]]:
    out = body(input_ids=torch.arange(3, 33)[None], use_cache=False).last_hidden_state
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return out.detach(), {n: p.grad for n, p in body.named_parameters() if p.grad is not None}


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_every_gradient_are_the_modules_own(family: str) -> None:
    plain, fused = pair(family)
    (a, left), (b, right) = gradients(plain), gradients(fused)
    assert torch.allclose(a, b, atol=1e-5)
    assert left.keys() == right.keys()
    for name in left:
        assert float((left[name] - right[name]).norm() / left[name].norm().clamp_min(1e-6)) < 2e-5, name


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_in_half_precision_they_are_no_further_from_the_truth(family: str) -> None:
    plain, fused = pair(family, torch.bfloat16)
    true = copy.deepcopy(plain).float()
    (_, left), (_, right), (_, want) = gradients(plain), gradients(fused), gradients(true)

    def error(found: dict[str, Tensor]) -> float:
        return sum(float((found[n].float() - want[n]).norm()) ** 2 for n in want) ** 0.5

    assert error(right) < 1.1 * error(left)


@needs_kernels
def test_one_pass_is_made_of_what_was_counted_and_only_once() -> None:
    _, fused = pair("gemma3")
    assert fuse(fused) == (0, 0)
    first = tiny("gemma3").get_decoder()
    layers = first.config.num_hidden_layers
    assert fuse(first) == (6 * layers + 1, layers)
    assert type(first.norm).__name__ == "Gemma3RMSNorm"


@needs_kernels
def test_a_backward_is_differentiable_itself() -> None:
    """A Hessian-vector product through fused modules is that of the plain ones."""
    products: list[Tensor] = []
    for body in pair("qwen3"):
        weights = [p for n, p in body.named_parameters() if "norm" in n or "gate_proj" in n]
        out = body(inputs_embeds=torch.linspace(-1, 1, 5 * 32).view(1, 5, 32).sin(), use_cache=False).last_hidden_state
        first = torch.autograd.grad((out**3).sum(), weights, create_graph=True)
        again = torch.autograd.grad(sum((g * torch.cos(g.detach())).sum() for g in first), weights)  # type: ignore[arg-type]
        products.append(torch.cat([g.flatten() for g in again]))
    assert float((products[0] - products[1]).norm() / products[0].norm()) < 1e-4


@needs_kernels
def test_frozen_weights_and_copies() -> None:
    _, fused = pair("llama")
    twin = copy.deepcopy(fused)
    with torch.no_grad():
        twin.norm.weight.mul_(2)
    x = torch.randn(1, 3, 32)
    assert torch.allclose(twin.norm(x), 2 * fused.norm(x), atol=1e-6)  # a copy reads its own weights
    fused.requires_grad_(False)
    x.requires_grad_()
    fused.layers[0].mlp(fused.layers[0].input_layernorm(x)).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in fused.parameters())


@needs_kernels
def test_what_is_no_norm_or_gate_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert way_of(torch.nn.LayerNorm(8)) is None and way_of(torch.nn.Linear(8, 8)) is None
    assert gelu_of(torch.nn.ReLU()) is None and gelu_of(torch.nn.SiLU()) is False
    assert way_of(tiny("qwen3_next").get_decoder().layers[0].linear_attn.norm) is None  # it takes a gate, too
    body = tiny("cohere2").get_decoder()
    norms, _ = fuse(body)
    assert norms == 0
    policy = Policy(tiny("llama"), SimpleNamespace(eos_token_id=2))
    assert policy.decisions["fused"]["value"] == "5 norms, 2 gates"
    monkeypatch.setattr("burnish.models.fused.kernels_for", lambda dtype, device="cpu": None)
    x = torch.randn(2, 32)
    plain = tiny("llama").get_decoder()
    plain.load_state_dict(policy.body.state_dict())
    assert torch.equal(policy.body.norm(x), plain.norm(x))  # without kernels, what it was


# ---- low-rank adapters


def adapted_pair(dtype: torch.dtype, family: str = "qwen3", size: float = 0.2, **config: Any) -> tuple[Any, Any]:
    """(a body with peft's adapters, B of this size, and its fused copy), the base frozen."""
    from peft import LoraConfig, get_peft_model

    body = tiny(family, dtype=dtype).get_decoder().eval()
    plain = get_peft_model(body, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **config))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for n, p in plain.named_parameters():
            if "lora_B" in n:
                p.copy_(size * torch.randn(p.shape, generator=generator))
    fused = copy.deepcopy(plain)
    assert fuse_adapters(fused) == 7 * body.config.num_hidden_layers and fuse_adapters(fused) == 0
    return plain, fused


def low_rank_gradients(body: Any) -> tuple[Tensor, dict[str, Tensor]]:
    out = body(input_ids=torch.arange(3, 33)[None], use_cache=False).last_hidden_state
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return out.detach(), {n: p.grad.float() for n, p in body.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_an_adapter_is_pefts_in_value_and_every_gradient(family: str) -> None:
    plain, fused = adapted_pair(torch.float64, family)
    for p in [*plain.parameters(), *fused.parameters()]:
        p.data = p.data.double()
    (a, left), (b, right) = low_rank_gradients(plain), low_rank_gradients(fused)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert left.keys() == right.keys() and len(left) == 14 * plain.config.num_hidden_layers and all("lora" in n for n in left)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize(("size", "most"), [(0.01, 1.1), (0.2, 1.6)])  # as trained ones are, and one that outweighs its layer
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_in_half_precision_an_adapter_is_about_as_near_the_truth(family: str, size: float, most: float) -> None:
    """Where an adapter is small beside its layer its rounding is as well; at most three roundings are added to two."""
    plain, fused = adapted_pair(torch.bfloat16, family, size)
    true = copy.deepcopy(plain).double()
    (y, left), (z, right), (want, truth) = low_rank_gradients(plain), low_rank_gradients(fused), low_rank_gradients(true)
    assert all(p.dtype == torch.float32 for n, p in fused.named_parameters() if "lora" in n)
    assert float((z - want).norm()) < most * float((y - want).norm())

    def error(found: dict[str, Tensor]) -> float:
        return sum(float((found[n] - truth[n]).norm()) ** 2 for n in truth) ** 0.5

    assert error(right) < most * error(left)


def test_a_backward_through_adapters_is_differentiable_itself() -> None:
    products: list[Tensor] = []
    for body in adapted_pair(torch.float32):
        weights = [p for n, p in body.named_parameters() if "lora" in n]
        x = torch.linspace(-1, 1, 5 * 32).view(1, 5, 32).sin()
        out = body(inputs_embeds=x, use_cache=False).last_hidden_state
        first = torch.autograd.grad((out**3).sum(), weights, create_graph=True)
        again = torch.autograd.grad(sum((g * torch.cos(g.detach())).sum() for g in first), weights)  # type: ignore[arg-type]
        products.append(torch.cat([g.flatten() for g in again]))
    assert float((products[0] - products[1]).norm() / products[0].norm()) < 1e-4


def test_what_is_not_a_plain_adapter_is_pefts_own() -> None:
    x = torch.arange(3, 9)[None]

    def out(body: Any) -> Tensor:
        with torch.no_grad():
            return body(input_ids=x, use_cache=False).last_hidden_state

    plain, fused = adapted_pair(torch.float32, lora_dropout=0.5)
    for body in (plain, fused):
        body.train()
    torch.manual_seed(0)
    want = out(plain)
    torch.manual_seed(0)
    assert torch.equal(out(fused), want)
    plain, dora = adapted_pair(torch.float32, use_dora=True)
    assert torch.equal(out(dora), out(plain))
    grads = low_rank_gradients(dora)[1]
    assert any("magnitude" in n for n in grads)
    plain, fused = adapted_pair(torch.float32)
    with fused.disable_adapter(), plain.disable_adapter():
        assert torch.equal(out(fused), out(plain))
    before = out(fused)
    twin = copy.deepcopy(fused)
    assert torch.equal(out(twin), before)
    torch.testing.assert_close(out(fused.merge_and_unload()), before, rtol=1e-4, atol=1e-5)
    for p in twin.parameters():
        p.requires_grad_(True)  # a base that is trained too has its own gradient
    assert any("base_layer" in n for n in low_rank_gradients(twin)[1])
