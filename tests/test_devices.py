"""Nothing in a training step, a score or a rollout mixes devices, and a step reads the device as rarely as it can."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from burnish import load, pipeline
from burnish.cli import invoke
from burnish.core.errors import ConfigError, MachineError
from burnish.core.records import Sampling
from burnish.engines.local import plans
from burnish.engines.local.engine import LocalEngine, kv_bytes_of
from burnish.forest.pack import Batch
from burnish.forest.stream import Tree, Unit
from burnish.maths.logprobs import weighted_nll
from burnish.models.load import choose_device
from burnish.models.policy import Policy
from burnish.train.loop import State, one_step
from burnish.train.memory import Memory
from burnish.train.optim import Optimiser
from tests.engines.policies import Letters, policy, prompts
from tests.forest.tiny import tiny
from tests.pretended import MixedDevicesError, Pretending, there
from tests.train.test_loop import SETTINGS, method


def moved(name: str, **more) -> Policy:
    """A tiny policy on the pretended device, not probed there."""
    here = policy(name, **more)
    away = Policy(there(tiny(name, **more)), Letters(), probe=False)
    away.logit_map, away.why_not_shared = here.logit_map, here.why_not_shared
    away.base.set_attn_implementation("burnish_forest" if here.why_not_shared is None else "eager")
    return away


def test_the_pretended_device_has_a_gpus_rules():
    with Pretending() as mode:
        x = torch.arange(6.0, device="pretended").view(2, 3)
        assert x.device.type == "pretended" and (x * 2 + 1).sum().item() == 36 and mode.reads.total() == 1
        assert x[torch.tensor([1])].tolist() == [[3.0, 4.0, 5.0]]  # a host index is fine
        with pytest.raises(MixedDevicesError):
            x + torch.ones(2, 3)
        with pytest.raises(MixedDevicesError):
            torch.ones(4)[x.long()[0]]
        with pytest.raises(MixedDevicesError):
            x.index_select(0, torch.tensor([1]))
        x[0].copy_(torch.zeros(3))
        assert x.cpu().sum() == 12.0


KEYS = [(i, s) for i in range(3) for s in (0, 1)]


def batch() -> Batch:
    trees = [
        Tree((tuple(range(5, 14)), (20, 21, 22), (23, 24)), (-1, 0, 0), (Unit(1, (9, 10, 11)), Unit(2, (9, 10)))),
        Tree.row(tuple(range(30, 42)), [False] * 4 + [True] * 8),
    ]
    return Batch(trees, group=[0, 0, 1])


def loss_and_step(p: Policy, coupled: bool, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Two micro-batches and an optimiser step: (losses, log-probs and gradients, what the step added to the weights)."""
    optimiser = Optimiser(p, learning_rate=1e-3)
    p.train()
    optimiser.zero()
    whole, out = batch(), []
    for micro in whole.split(14):
        weight = torch.ones(whole.entries, device=device)[micro.items.to(device)]
        couple = whole.group[whole.unit][micro.items] if coupled else None
        made = p(micro, weighted_nll(weight), couple=None if couple is None else couple.to(device), rows=4)
        made.loss.backward()
        out += [made.loss.detach(), made.logprobs]
        made.executed_flops(True)
    out += [m.gradient.cpu().clone() for m in optimiser.masters.values()]
    before = [x.detach().cpu().clone() for x in p.trainable().values()]
    norm = optimiser.gradient_norm()
    optimiser.step(1e-3, norm)
    optimiser.close()
    return [x.cpu() for x in (*out, norm)], [x.detach().cpu() - y for x, y in zip(p.trainable().values(), before)]


@pytest.mark.parametrize("coupled", [False, True], ids=["tokens", "groups"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gemma2", "gpt_oss"])
def test_a_training_step_stays_on_its_device(name: str, coupled: bool):
    want, step = loss_and_step(policy(name), coupled, "cpu")
    with Pretending():
        got, there_step = loss_and_step(moved(name), coupled, "pretended")
    for x, y in zip(got, want, strict=True):
        assert (x - y).norm() <= 1e-4 * y.norm() + 1e-6
    moved_by, apart = (torch.cat([x.flatten() for x in part]) for part in (step, [x - y for x, y in zip(step, there_step)]))
    assert moved_by.abs().max() > 5e-4 and apart.norm() < 0.02 * moved_by.norm()  # Adam magnifies gradients near zero


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("qwen3", Sampling(temperature=0.0)),
        ("qwen3", Sampling()),
        ("gemma3", Sampling(top_k=5, top_p=0.9, stop=("z",))),
        ("gemma2", Sampling(top_p=0.9)),
    ],
)
def test_a_rollout_and_a_score_stay_on_their_device(name: str, sampling: Sampling):
    def run(p: Policy):
        engine = LocalEngine(p, rows=3)
        nodes = engine.prefill_many(prompts(4, longest=12))
        made = engine.sample([n for n in nodes for _ in range(2)], sampling, [(i, s) for i in range(4) for s in (0, 1)])
        below = [engine.prefill(t.tokens[len(n.path) :], n) for n, t in zip(nodes, made[::2])]
        return [t.tokens for t in made], [*engine.score(below), *(t.logprobs for t in made)]

    sampling = Sampling(**{**vars(sampling), "max_new_tokens": 9})
    tokens, scores = run(policy(name))
    with Pretending():
        there_tokens, there_scores = run(moved(name))
    assert there_tokens == tokens
    for x, y in zip(there_scores, scores):
        assert torch.allclose(torch.tensor(x), torch.tensor(y), atol=1e-4)


def test_a_step_reads_the_device_once_for_all_its_losses_and_once_for_the_norm():
    """A read makes a GPU wait: none per micro-batch."""
    counts: list[int] = []
    with Pretending() as mode:
        for micro_tokens in (1000, 12):
            p, stage = moved("llama"), method(1)
            optimiser, state = Optimiser(p, learning_rate=1e-3), State()
            (work,) = stage.batches(0)
            shape = p.shape
            mode.reads.clear()
            row = one_step(p, stage, optimiser, SETTINGS, lambda step, total: 1.0, Memory.fixed(micro_tokens), state, work, shape)
            optimiser.close()
            assert row["loss"] is not None and len(work.batch.split(micro_tokens)) == (1 if micro_tokens == 1000 else 3)
            counts.append(mode.reads.total())
    assert counts[0] == counts[1] <= 4, counts


@pytest.mark.parametrize("least_shared", [0, 2**60], ids=["shared", "copies"])
@pytest.mark.parametrize(
    ("name", "sampling"), [("qwen3", Sampling(temperature=0.0)), ("gemma3", Sampling()), ("gemma2", Sampling(top_k=5, min_p=0.01))]
)
def test_a_decode_step_reads_the_device_once(name: str, sampling: Sampling, least_shared: int, monkeypatch: pytest.MonkeyPatch):
    """The tokens it drew, with their log-probabilities: positions and lengths are the host's own."""
    monkeypatch.setattr(plans, "SHARED_BYTES", least_shared)
    reads: list[int] = []
    with Pretending() as mode:
        p = moved(name)
        p.base.generation_config.eos_token_id = p.base.config.eos_token_id = p.tokenizer.eos_token_id = None
        engine = LocalEngine(p)
        nodes = engine.prefill_many(prompts(3, longest=12))
        for new_tokens in (1, 3, 11):
            mode.reads.clear()
            engine.sample([n for n in nodes for _ in range(2)], Sampling(**{**vars(sampling), "max_new_tokens": new_tokens}), KEYS)
            reads.append(mode.reads.total())
    assert reads[2] - reads[1] == 8 and reads[1] - reads[0] == 2, reads


# ---- which device -------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")


def test_auto_is_cuda_where_there_is_one(two_gpus: None):
    assert choose_device("auto")["value"] == "cuda"
    assert choose_device("cpu")["value"] == "cpu" and choose_device("cuda:1")["value"] == "cuda:1"
    with pytest.raises(MachineError, match=r"cuda:2 is not there.*\n.*cpu, cuda:0 \(a GPU\), cuda:1"):
        choose_device("cuda:2")


def test_a_device_that_is_not_there_is_refused_with_what_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto")["value"] == "cpu"
    with pytest.raises(MachineError, match=r"cuda is not there.*\n.*there is: cpu$") as refused:
        choose_device("cuda")
    assert refused.value.exit_code == 4
    with pytest.raises(ConfigError, match="'tpu' is not a device"):
        choose_device("tpu")
    with pytest.raises(MachineError):
        load("spark", device="cuda")


def test_verbs_and_recipes_take_a_device(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert invoke(["eval", "spark", "--task", "sums", "--rows", "2", "--device", "cuda"]) == 4
    assert invoke(["chat", "spark", "-p", "1+1", "--device", "cuda"]) == 4
    assert invoke(["solve", "spark", "1+1", "--device", "cuda"]) == 4
    words = ["run", "first_steps/quickstart", "--set", "device=cuda", "--runs", str(tmp_path)]
    assert invoke(words) == 4
    assert "cuda is not there" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # refused before anything is written
    assert invoke(["eval", "spark", "--task", "sums", "--rows", "2", "--device", "tpu"]) == 2


def test_a_gpus_decisions_are_taken_down_as_they_change():
    work = pipeline._Work.__new__(pipeline._Work)
    work.decisions = {"device": {"value": "cuda"}}
    held = SimpleNamespace(decisions={"decode": {"value": "lean"}, "graphs": {"value": "captured"}, "head": {"value": "triton"}})
    assert work._note(held) and not work._note(held)  # type: ignore[arg-type]
    held.decisions["graphs"] = {"value": "eager"}
    assert work._note(held)  # type: ignore[arg-type]
    assert {k: v["value"] for k, v in work.decisions.items()} == {"device": "cuda", "graphs": "eager", "head": "triton"}


def test_an_engine_on_a_gpu_takes_half_of_what_is_free_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50_000, 80_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7_000)
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0), decisions={})
    assert kv_bytes_of(on_gpu) == 26_000  # type: ignore[arg-type]
    assert on_gpu.decisions["kv_bytes"]["value"] == 26_000 and on_gpu.decisions["kv_bytes"]["measured"] == {"free_bytes": 52_000}
    here = policy("llama")
    assert kv_bytes_of(here) == 2**31 and "kv_bytes" not in here.decisions
    assert LocalEngine(here).graphs is None and "graphs" not in here.decisions


@pytest.mark.parametrize(("recipe", "decided", "wanted"), [("auto", "cuda", "cuda"), ("cpu", "cuda", "cpu"), ("auto", None, "auto")])
def test_a_resume_stays_where_the_run_began_unless_the_recipe_says_where(
    recipe: str, decided: str | None, wanted: str, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []

    def loaded(source: str, *, dtype: str, device: str):
        asked.append(device)
        decisions = {"device": {"value": device}, "dtype": {"value": dtype}, "attention": {"value": "forest"}}
        return SimpleNamespace(decisions=decisions)

    monkeypatch.setattr(pipeline, "load_policy", loaded)
    decisions = {} if decided is None else {"device": {"value": decided}}
    work = pipeline._Work.__new__(pipeline._Work)
    work.decisions, work.recipe = decisions, SimpleNamespace(device=recipe, dtype="auto")  # type: ignore[assignment]
    work._load("m")
    assert asked == [wanted] and decisions["device"]["value"] == wanted
