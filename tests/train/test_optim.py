"""AdamW against the paper's update written out by hand; masters keep what bf16 would round away."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from burnish.core.errors import StorageError
from burnish.forest.pack import Batch
from burnish.forest.stream import Tree
from burnish.maths.logprobs import weighted_nll
from burnish.models.policy import Policy
from burnish.train.optim import Beside, Optimiser
from tests.folders import model_folder
from tests.forest.tiny import tiny as tiny_model


def tiny(tmp_path: Path, dtype: torch.dtype) -> Policy:
    model = AutoModelForCausalLM.from_pretrained(model_folder(tmp_path / "m"), dtype=dtype).eval()
    return Policy(model, None, probe=False)


def test_fused_adamw_is_the_published_update(tmp_path: Path) -> None:
    """Decoupled weight decay, eq. of algorithm 2, arXiv:1711.05101; decay on matrices only."""
    policy = tiny(tmp_path, torch.float32)
    optimiser = Optimiser(policy, learning_rate=1e-2, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6, weight_decay=0.1, clip_norm=None)
    want = {n: p.detach().double().clone() for n, p in policy.trainable().items()}
    m = {n: torch.zeros_like(w) for n, w in want.items()}
    v = {n: torch.zeros_like(w) for n, w in want.items()}
    generator = torch.Generator().manual_seed(0)
    for t in range(1, 4):
        optimiser.zero()
        for n, p in policy.trainable().items():
            g = torch.randn(p.shape, generator=generator)
            p.grad.add_(g)  # type: ignore[union-attr]
            m[n] = 0.8 * m[n] + 0.2 * g.double()
            v[n] = 0.9 * v[n] + 0.1 * g.double() ** 2
            if p.ndim >= 2:
                want[n] -= 1e-2 * 0.1 * want[n]
            want[n] -= 1e-2 * (m[n] / (1 - 0.8**t)) / ((v[n] / (1 - 0.9**t)).sqrt() + 1e-6)
        optimiser.step(1e-2, optimiser.gradient_norm())
    for n, p in policy.trainable().items():
        torch.testing.assert_close(p.detach().double(), want[n], rtol=1e-5, atol=1e-6)


def test_clipping_scales_the_whole_gradient_to_the_norm(tmp_path: Path) -> None:
    policy = tiny(tmp_path, torch.float32)
    optimiser = Optimiser(policy, learning_rate=0.0, clip_norm=0.5)
    optimiser.zero()
    for p in policy.trainable().values():
        p.grad.add_(0.3)  # type: ignore[union-attr]
    norm = optimiser.gradient_norm()
    count = sum(p.numel() for p in policy.trainable().values())
    torch.testing.assert_close(norm, torch.tensor(0.3 * count**0.5), rtol=1e-5, atol=0)
    optimiser.step(0.0, norm)
    torch.testing.assert_close(optimiser.gradient_norm(), torch.tensor(0.5), rtol=1e-4, atol=0)


def test_bf16_working_weights_move_because_their_masters_do(tmp_path: Path) -> None:
    """Twenty steps of 1e-3 from 1.0: each rounds away in bf16, together they do not."""
    policy = tiny(tmp_path, torch.bfloat16)
    for p in policy.trainable().values():
        p.data.fill_(1.0)
    optimiser = Optimiser(policy, learning_rate=1e-3, clip_norm=None)
    for _ in range(20):
        optimiser.zero()
        sum(p.float().sum() for p in policy.trainable().values()).backward()  # type: ignore[union-attr]
        assert all(p.grad is None for p in policy.trainable().values())  # the hook took it, in fp32
        optimiser.step(1e-3, optimiser.gradient_norm())
    for n, p in policy.trainable().items():
        assert p.dtype == torch.bfloat16
        torch.testing.assert_close(optimiser.masters[n].read(), torch.full(p.shape, 0.98), rtol=0, atol=1e-4)
        assert float(p.flatten()[0]) < 0.985


def test_state_round_trips_bit_for_bit(tmp_path: Path) -> None:
    def run(steps: int, reload_at: int | None) -> dict[str, torch.Tensor]:
        policy = tiny(tmp_path, torch.bfloat16)
        optimiser = Optimiser(policy, learning_rate=1e-2)
        for t in range(steps):
            if t == reload_at:
                kept = {k: x.clone() for k, x in optimiser.tensors().items()}
                policy = tiny(tmp_path, torch.bfloat16)
                optimiser = Optimiser(policy, learning_rate=1e-2)
                optimiser.load(kept)
            optimiser.zero()
            for i, p in enumerate(policy.trainable().values()):
                (p.float() * (t + i + 1)).sum().backward()
            optimiser.step(1e-2, optimiser.gradient_norm())
        return optimiser.tensors()

    whole, resumed = run(6, None), run(6, 3)
    assert whole.keys() == resumed.keys() and len(whole) > 10
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])  # gemma3 scales what it embeds
def test_lent_buffers_hold_the_gradients_that_autograd_would_return(name: str, tied: bool, dtype: torch.dtype) -> None:
    rows = [Tree.row(ids, [i > 2 for i in range(len(ids))]) for ids in ((5, 9, 5, 6, 7, 5), (0, 4, 4, 8), (9, 9, 8, 7, 6, 5, 4))]
    found: list[dict[str, torch.Tensor]] = []
    for lend in (True, False):
        policy = Policy(tiny_model(name, dtype=dtype, tie_word_embeddings=tied), None)
        optimiser = Optimiser(policy, learning_rate=1e-3)
        if not lend:
            policy.sinks = {}
            policy.base.get_input_embeddings().sparse = False
        optimiser.zero()
        batch = Batch(rows)
        for micro in batch.split(8):
            policy(micro, weighted_nll(torch.full((len(micro.items),), 0.1))).loss.backward()
        found.append({n: m.gradient.clone() for n, m in optimiser.masters.items()})
        optimiser.close()
        assert not policy.sinks and not policy.base.get_input_embeddings().sparse
    lent, plain = found
    assert lent.keys() == plain.keys()
    for n, grad in plain.items():
        assert float(grad.norm()) > 0
        assert float((lent[n] - grad).norm() / grad.norm()) < (1e-6 if dtype == torch.float32 else 2e-2), n


def test_what_is_beside_the_policy_has_its_own_rate_its_own_clip_and_can_step_alone(tmp_path: Path) -> None:
    policy = tiny(tmp_path, torch.float32)
    beside = {"w": torch.nn.Parameter(torch.zeros(1, 4)), "b": torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))}

    def made(p: Policy, q: dict[str, torch.nn.Parameter]) -> Optimiser:
        return Optimiser(p, learning_rate=1e-3, adam_epsilon=1e-30, clip_norm=1.0, beside=Beside(q, 4e-3))

    optimiser = made(policy, beside)
    before = {n: p.detach().clone() for n, p in policy.trainable().items()}
    optimiser.zero()
    for p in policy.trainable().values():
        p.grad.fill_(1e-3)  # type: ignore[union-attr]
    for p in beside.values():
        (p * 1e6).sum().backward()
    norm = optimiser.gradient_norm()
    assert float(norm) == pytest.approx(1e-3 * sum(p.numel() for p in before.values()) ** 0.5)  # without the 1e6 beside it
    version = policy.version
    optimiser.step(5e-4, norm, policy_moves=False)  # half of the rate it was made with
    assert policy.version == version and all(torch.equal(p, before[n]) for n, p in policy.trainable().items())
    assert not any("exp_avg" in n and not n.split("/", 1)[1].startswith("beside/") for n in optimiser.tensors())
    for name, p in beside.items():
        assert torch.allclose(p.float(), torch.full_like(p.float(), -2e-3), rtol=1e-2), name  # Adam's first step is the rate
    optimiser.step(5e-4, norm)
    assert policy.version == version + 1
    for n, p in policy.trainable().items():
        assert torch.allclose(p, before[n] - 5e-4, rtol=1e-3, atol=1e-6)
    kept = {n: t.clone() for n, t in optimiser.tensors().items()}
    wanted = {f"{k}/beside/{n}" for k in ("exp_avg", "exp_avg_sq", "step") for n in beside} | {"master/beside/w"}
    wanted |= {f"{k}/beside/b" for k in optimiser.masters["beside/b"].parts()}  # bf16: two parts, where there are kernels
    assert {n for n in kept if "beside/" in n} == wanted
    other = {n: torch.nn.Parameter(torch.ones_like(p)) for n, p in beside.items()}
    again = made(tiny(tmp_path, torch.float32), other)
    again.load(kept)
    assert all(torch.equal(t, kept[n]) for n, t in again.tensors().items()) and torch.equal(other["b"], beside["b"])
    (beside["w"] * float("inf")).sum().backward()
    assert not bool(torch.isfinite(optimiser.gradient_norm()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_another_model_is_refused_before_anything_is_changed(tmp_path: Path, dtype: torch.dtype) -> None:
    optimiser = Optimiser(tiny(tmp_path, dtype), learning_rate=1e-3)
    kept = {n: t.clone() for n, t in optimiser.tensors().items()}
    first = next(iter(optimiser.masters))
    other = {n: t.add(1) for n, t in kept.items()}
    short = {n: t[:1] if n.endswith(f"/{first}") else t for n, t in other.items()}
    with pytest.raises(StorageError, match="wanted"):
        optimiser.load(short)
    moments = {f"{k}/{n}": torch.ones(m.working.shape) for n, m in optimiser.masters.items() for k in ("exp_avg", "exp_avg_sq")}
    steps = {f"step/{n}": torch.tensor(3.0) for n in optimiser.masters}
    with pytest.raises(StorageError, match=f"lacks exp_avg, exp_avg_sq or step of {first}"):
        optimiser.load(other | moments)
    with pytest.raises(StorageError, match=f"exp_avg/{first} is .*, wanted"):
        optimiser.load(other | moments | steps | {f"exp_avg/{first}": torch.ones(1)})
    with pytest.raises(StorageError, match="lacks master/"):
        optimiser.load({n: t for n, t in other.items() if not n.endswith(f"/{first}")})
    assert all(torch.equal(t, kept[n]) for n, t in optimiser.tensors().items())
