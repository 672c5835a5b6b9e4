"""A critic alone: where its values are taken, its gradient by finite differences, its file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from burnish.core.errors import StorageError
from burnish.forest.pack import Batch
from burnish.forest.stream import Tree, Unit
from burnish.models.critic import FILE, Critic
from burnish.models.export import export, weights_sha256
from burnish.models.load import check_folder, load_policy
from burnish.models.policy import Policy, RowLoss
from burnish.train.method import Hooks
from tests.forest.tiny import body_of, tiny

PROMPT, ANSWERS = (5, 9, 7), ((11, 3, 8, 4), (6, 2), (11, 3))
TREES = [
    Tree((PROMPT, *ANSWERS), (-1, 0, 0, 0), tuple(Unit(i, tuple(range(3, 3 + len(a)))) for i, a in enumerate(ANSWERS, 1))),
    Tree(((4, 4), (8, 1, 2)), (-1, 0), (Unit(1, (2, 3, 4)),)),
]


FAMILY = "gpt_neox"  # its norms stay in fp64, where others' are fp32 whatever the weights are


def policy() -> Policy:
    made = Policy(tiny(FAMILY, dtype=torch.float64), SimpleNamespace(eos_token_id=2))
    made.requires_grad_(True)
    return made


def told(critic: Critic, seed: int = 0) -> Critic:
    """Weights that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (critic.weight, critic.bias):
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return critic


@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_a_value_is_that_of_the_state_before_the_token_and_the_last_of_all_of_it(trunk: Any) -> None:
    p = policy()
    critic = told(Critic(p, trunk, trains_body=False))
    batch = Batch(TREES)
    found = critic.values(p, batch)
    plain = tiny(FAMILY, dtype=torch.float64)
    at, unit = 0, 0
    for tree in TREES:
        for u in tree.units:
            ids = (*tree.tokens[0], *tree.tokens[u.leaf])
            with torch.no_grad():
                hidden = body_of(plain)(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
            want = hidden @ critic.weight[0].detach() + critic.bias.detach()
            before = [want[t - 1] for t in u.labels]  # row t - 1 has read the tokens before t
            assert_close(found.before[at : at + len(before)], torch.stack(before), rtol=1e-5, atol=1e-6)
            assert_close(found.after[unit], want[len(ids) - 1], rtol=1e-5, atol=1e-6)
            at, unit = at + len(before), unit + 1
    assert found.flops > 2 * p.shape.body_parameters * sum(t.size for t in TREES)
    assert critic.values(p, batch).before.equal(found.before)


@pytest.mark.parametrize(("trunk", "trains_body"), [("shared", True), ("shared", False), ("separate", True), ("separate", False)])
def test_its_gradient_is_the_finite_difference_and_stops_where_it_says(trunk: Any, trains_body: bool) -> None:
    p = policy()
    critic = told(Critic(p, trunk, trains_body=trains_body))
    (micro,) = Batch(TREES).split(10**6)
    target = torch.linspace(-1, 1, len(micro.items), dtype=torch.float64)
    body = critic.own or p

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return ((critic.value(rows)[micro.view.index] - target) ** 2).sum()

    out = body(micro, None, on_rows=RowLoss(loss, trains_body))
    assert len(out.logprobs) == 0
    out.loss.backward()
    inner = {n: q for n, q in body.body.named_parameters() if n.endswith(("embed_in.weight", "layers.0.mlp.dense_4h_to_h.weight"))}
    assert len(inner) == 2
    if not trains_body:
        assert all(q.grad is None for q in body.parameters())
        assert trunk == "shared" or not any(q.requires_grad for q in body.parameters())
    if trunk == "separate":
        assert all(q.grad is None for q in p.parameters())
    checked = {"head.weight": critic.weight, "head.bias": critic.bias} | (inner if trains_body else {})
    for name, q in checked.items():
        assert q.grad is not None, name
        i = int(q.grad.abs().argmax())
        flat = q.detach().view(-1)
        step, was, ends = 1e-6, float(flat[i]), []
        for moved in (was + step, was - step):
            flat[i] = moved
            with torch.no_grad():
                ends.append(float(body(micro, None, on_rows=RowLoss(loss, trains_body)).loss))
        flat[i] = was
        assert_close(float(q.grad.view(-1)[i]), (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)


def test_beside_an_objective_both_gradients_add_up_and_flops_are_counted() -> None:
    (micro,) = Batch(TREES).split(10**6)

    def run(with_value: bool, alone: bool = False) -> tuple[Policy, Any]:
        p = policy()
        critic = told(Critic(p, "shared", trains_body=True))
        on_rows = RowLoss(lambda rows: critic.value(rows).square().sum(), through_body=True)
        out = p(micro, None if alone else lambda logprobs, entries: -logprobs.sum(), on_rows=on_rows if with_value else None)
        out.loss.backward()
        return p, out

    (both, a), (first, b), (second, c) = run(True), run(False), run(True, alone=True)
    assert_close(a.loss, b.loss + c.loss)
    for x, y, z in zip(both.parameters(), first.parameters(), second.parameters()):
        assert_close(x.grad, y.grad + (z.grad if z.grad is not None else 0))
    assert_close(a.logprobs, b.logprobs)
    rows, hidden = len(micro.view.label), both.shape.hidden
    assert a.executed_flops(True) == b.executed_flops(True) + 6 * rows * hidden
    assert c.executed_flops(True) < b.executed_flops(True) and c.executed_flops(False) < c.executed_flops(True) / 2


def exported(folder: Path, p: Policy, critic: Critic) -> str:
    from safetensors.torch import save_file

    writer = {FILE: lambda path: save_file(critic.tensors(), path, metadata=critic.metadata())}
    return export(p, folder, card="x", beside=writer)


@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_its_file_comes_back_and_plain_transformers_does_not_see_it(trunk: Any, tmp_path: Path) -> None:
    p = load_policy("spark", dtype="float32")
    p.requires_grad_(True)
    critic = told(Critic(p, trunk, trains_body=True))
    if critic.own is not None:
        with torch.no_grad():
            for q in critic.own.body.parameters():
                q.mul_(1.01)
    batch = Batch(TREES)
    want = critic.values(p, batch)
    alone = export(p, tmp_path / "alone", card="x")
    assert exported(tmp_path / "model", p, critic) == alone == weights_sha256(tmp_path / "model")
    check_folder(tmp_path / "model")
    _, about = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(about[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again = load_policy(tmp_path / "model", dtype="float32")
    found = Critic.load(tmp_path / "model", again).values(again, batch)
    assert found.before.equal(want.before) and found.after.equal(want.after)
    with pytest.raises(StorageError, match="has no critic"):
        Critic.load(tmp_path / "alone", again)
    other = Policy(tiny("llama"), None)
    with pytest.raises(StorageError, match="does not fit this model"):
        Critic.load(tmp_path / "model", other)
    (tmp_path / "model" / FILE).write_bytes(b"x" * 64)
    with pytest.raises(StorageError, match="sha256"):
        check_folder(tmp_path / "model")


def test_of_an_adapted_policy_the_own_body_trains_its_adapter_and_is_stored_merged(tmp_path: Path) -> None:
    model = get_peft_model(tiny(FAMILY, dtype=torch.float64), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    p = Policy(model, SimpleNamespace(eos_token_id=2))
    critic = told(Critic(p, "separate", trains_body=True))
    assert critic.own is not None
    names = set(critic.parameters()) - {"head.weight", "head.bias"}
    assert names and all("lora_" in n for n in names)
    with torch.no_grad():
        for n, q in critic.parameters().items():
            if "lora_B" in n:
                q.normal_(generator=torch.Generator().manual_seed(3))
    want = critic.values(p, Batch(TREES))
    plain = policy()
    stored = critic.tensors()
    assert not any("lora" in n for n in stored)
    bare = Critic(plain, "separate", trains_body=False)
    with torch.no_grad():
        for n, q in {"head.weight": bare.weight, "head.bias": bare.bias, **{f"body.{n}": q for n, q in bare.own.body.state_dict().items()}}.items():  # type: ignore[union-attr]
            q.copy_(stored[n])
    assert_close(bare.values(plain, Batch(TREES)).before, want.before)
    assert (want.before - told(Critic(plain, "shared", trains_body=False)).values(plain, Batch(TREES)).before).abs().max() > 1e-3


def test_most_methods_have_none() -> None:
    assert Hooks().beside(1e-3) is None and Hooks().exports() == {}
