"""Memory: measured lines hold, the plan follows them, and running out of it changes nothing but the micro-batches."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from burnish.core import machine
from burnish.core.errors import MachineError
from burnish.core.runs import StageFolder, read_jsonl
from burnish.core.stop import Stop
from burnish.forest.pack import Batch
from burnish.forest.stream import Tree, Unit
from burnish.maths.kernels import kernels_for
from burnish.maths.logprobs import weighted_nll
from burnish.models.adapters import lora
from burnish.models.policy import Policy
from burnish.train import activations, memory
from burnish.train.activations import Watch, like, measure
from burnish.train.loop import fit, forward_backward, trial
from burnish.train.memory import Holdings, Memory, Plan, out_of_memory
from burnish.train.optim import Optimiser
from burnish.train.schedules import linear
from tests.forest.tiny import tiny
from tests.train.test_loop import SETTINGS, method, policy, same, train, weights

WORDS = SimpleNamespace(eos_token_id=2)


@pytest.fixture(autouse=True)
def the_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """It is the whole process's; -> how often it was asked to give memory back."""
    asked: list[int] = []
    monkeypatch.setattr(memory, "return_freed_memory", lambda: asked.append(1))
    return asked


def wide(family: str = "qwen3", adapter: bool = False, dtype: torch.dtype = torch.float32, **more: Any) -> Policy:
    """Large enough that activations outweigh what is fixed."""
    made = Policy(tiny(family, dtype=dtype, hidden_size=64, intermediate_size=160, **more), WORDS)
    if adapter:
        made.requires_grad_(False)
        made = lora(made, rank=4)
    return made


def row(n: int, labels: int) -> Tree:
    return Tree.row([3 + (7 * i) % 90 for i in range(n)], [i >= n - labels for i in range(n)])


def measured(p: Policy, trees: list[Tree]) -> activations.Activations:
    return measure(p, trees, lambda *order: trial(p, *order))


def peak_of(p: Policy, trees: list[Tree]) -> int:
    batch = Batch(trees)
    (micro,) = batch.split(10**6)
    with Watch() as watch:
        forward_backward(p, micro, weighted_nll(torch.full((batch.entries,), 1.0)))
    return watch.peak


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_watch_counts_what_is_alive_and_the_most_there_was() -> None:
    before = torch.zeros(1000)
    with Watch() as watch:
        a = torch.zeros(100, 100)
        view = a.t()[:50]
        b = a + before[:100]  # 40,000 bytes more; `before` was there
        assert watch.live == 80_000
        del b
        assert watch.live == 40_000
        del a
        assert watch.live == 40_000  # the view keeps it
        del view
        assert (watch.live, watch.mark()) == (0, 80_000)
        c = torch.zeros(10)
        assert (watch.live, watch.peak) == (40, 40)
        del c


@pytest.mark.parametrize("what", ["off", "layers"])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lines_through_small_micro_batches_foretell_large_ones(what: Any, adapter: bool, dtype: torch.dtype) -> None:
    """Vocabulary and chunk as large as they may be: peaks of micro-batches 4 to 10 times those measured, within 3 %."""
    p = wide(adapter=adapter, dtype=dtype, vocab_size=997)
    optimiser = Optimiser(p, learning_rate=1e-3)
    p.train()
    p.checkpoint(what)
    found = measured(p, [row(48, 20), row(30, 30)])
    optimiser.zero()
    for trees in ([row(64, 32)] * 24, [row(48, 47)] * 16, [row(128, 2)] * 8, [row(96, 95)] * 20):
        tokens, labels = sum(t.size for t in trees), sum(len(t.units[0].labels) for t in trees)
        assert found.peak(tokens, labels) == pytest.approx(peak_of(p, trees), rel=0.03), (tokens, labels)
    optimiser.close()


def test_checkpointing_is_measured_as_the_saving_it_is() -> None:
    p = wide(num_hidden_layers=8)
    kept = measured(p, [row(64, 8)])
    p.checkpoint("layers")
    again = measured(p, [row(64, 8)])
    assert again.kept.per_token < kept.kept.per_token / 4
    assert again.kept.per_token >= 8 * 64 * 4  # a hidden row a layer


def test_a_head_of_several_chunks_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 rows: a narrow weight's gradient is then summed in fp32, which no single chunk needs."""
    monkeypatch.setattr("burnish.maths.head.LOGITS_BYTES", 64 * 997 * 2)
    p = wide(dtype=torch.bfloat16, vocab_size=997)
    optimiser = Optimiser(p, learning_rate=1e-3)
    p.train()
    found = measured(p, [row(48, 20)])
    buffer = 997 * 64 * 4  # what several chunks sum into: as long as one chunk is smaller, it is one
    assert (found.chunk_rows, found.one_rows) == (64, 64 + buffer // (997 * 2))
    for trees in ([row(64, 60)] * 10, [row(64, 63)] * 3, [row(64, 30)] * 2):
        tokens, labels = sum(t.size for t in trees), sum(len(t.units[0].labels) for t in trees)
        assert found.peak(tokens, labels) == pytest.approx(peak_of(p, trees), rel=0.03)
    optimiser.close()


def test_measuring_leaves_dice_and_policy_alone() -> None:
    p = wide(adapter=True)
    state = torch.get_rng_state()
    measured(p, [row(20, 5)])
    assert torch.equal(state, torch.get_rng_state())
    assert "hidden" not in p.__dict__


@pytest.mark.parametrize(("tokens", "rows"), [(1, 0), (7, 3), (64, 1), (192, 48)])
def test_a_measured_micro_batch_is_made_of_the_trees_it_stands_for(tokens: int, rows: int) -> None:
    pair = Tree(((5, 6, 7), (8, 9), (10, 11, 12)), (-1, 0, 0), (Unit(1, (3, 4)), Unit(2, (3, 4, 5))))
    micro = like([pair, row(30, 3)], tokens, rows)
    assert len(micro.stream.tokens) == tokens and len(micro.view.label) == rows
    if tokens >= 64:
        assert len(micro.stream.layout.length) > len(set(micro.stream.layout.root))


def test_holdings_are_the_sizes_of_the_tensors() -> None:
    beside = 2 if kernels_for(torch.bfloat16) is not None else 4  # a bf16 weight keeps 16 bits, or a master of its own
    for dtype, masters in ((torch.float32, 0), (torch.bfloat16, beside)):
        p = wide(dtype=dtype)
        n = sum(x.numel() for x in p.model.parameters())
        buffers = sum(b.numel() * b.element_size() for b in p.model.buffers())
        optimiser = Optimiser(p, learning_rate=1e-3)
        optimiser.zero()
        held = Holdings.of(p, optimiser)
        assert held.weights == n * dtype.itemsize + buffers
        assert (held.masters, held.gradients, held.moments, held.moments_to_come) == (masters * n, 4 * n, 8 * n, 8 * n)
        optimiser.step(1e-3, optimiser.gradient_norm())
        assert Holdings.of(p, optimiser).moments_to_come == 0
        optimiser.close()


# ---- what is decided -------------------------------------------------------------------------------------------------


def decided(monkeypatch: pytest.MonkeyPatch, free: int, longest: int = 100, **wanted: Any) -> Memory:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    p = wide(num_hidden_layers=8)
    optimiser = Optimiser(p, learning_rate=1e-3)
    p.train()
    made = Memory(longest=longest, **wanted)
    made.decide(p, optimiser, [row(60, 30)], lambda *order: trial(p, *order))
    optimiser.close()
    return made


def test_with_room_nothing_is_run_again_and_products_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = decided(monkeypatch, 10**11)
    assert counted.plan(1) == Plan(memory.MOST_TOKENS, None, "off")
    assert not counted.activations and counted.measured["ceiling_bytes"] <= counted.measured["budget_bytes"]
    free = int(0.9 * counted.measured["ceiling_bytes"] / memory.SHARE)
    made = decided(monkeypatch, free)  # room by measure, not by a count that is too high
    assert made.plan(1) == counted.plan(1)
    assert list(made.activations) == ["off"]  # nothing else was measured


def test_a_row_longer_than_products_need_is_not_refused_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody named the longest row: it is the batch's, whatever micro-batches are capped at."""
    monkeypatch.setattr(memory, "MOST_TOKENS", 40)  # the row has 60
    monkeypatch.setattr(Memory, "_ample", lambda *given: False)
    made = decided(monkeypatch, 10**11, longest=0)
    assert made.plan(1).micro_tokens == 40 and made.plan(1).checkpointing == "off"


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3", "gemma2", "phi3", "olmo2", "granite", "mistral", "cohere2"])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_count_is_more_than_what_is_held(family: str, adapter: bool, dtype: torch.dtype) -> None:
    p = wide(family, adapter=adapter, dtype=dtype)
    optimiser = Optimiser(p, learning_rate=1e-3)
    p.train()
    for trees in ([row(32, 31)], [row(64, 63)] * 16):
        tokens = sum(t.size for t in trees)
        held = peak_of(p, trees)
        count = activations.ceiling(p, tokens)
        assert count is not None and held < count < 20 * held, (held, count)
    optimiser.close()


@pytest.mark.parametrize("family", ["mixtral", "bloom"])
def test_parts_that_are_not_known_are_measured(family: str) -> None:
    assert activations.ceiling(Policy(tiny(family), WORDS), 100) is None


def test_the_plan_fits_into_what_is_free_and_the_next_size_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    made = decided(monkeypatch, 60_000_000)
    plan = made.plan(1)
    assert plan.checkpointing == "off" and memory.FEW_TOKENS <= plan.micro_tokens < memory.MOST_TOKENS
    few = memory.FEWEST_HEAD_ROWS
    budget, found = made.measured["budget_bytes"], made.activations["off"]
    assert budget <= 0.8 * 60_000_000
    assert found.peak(plan.micro_tokens, few) <= budget < found.peak(plan.micro_tokens + 1, few)
    if plan.head_rows is not None:
        assert found.peak(plan.micro_tokens, plan.head_rows) <= budget


def test_tight_memory_turns_checkpointing_on_and_less_refuses_with_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    made = decided(monkeypatch, 12_000_000)
    assert made.plan(1).checkpointing == "layers"
    assert "without checkpointing" in made.why
    with pytest.raises(MachineError, match="does not fit") as caught:
        decided(monkeypatch, 12_000_000, longest=20_000)
    assert caught.value.exit_code == 4
    for item in ("weights", "masters", "gradients", "moments", "head, a chunk", "activations of 20000 tokens", "free"):
        assert item in str(caught.value)


def test_what_the_recipe_says_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decided(monkeypatch, 10**10, micro_tokens=100).plan(1) == Plan(100, None, "off")
    assert decided(monkeypatch, 10**10, checkpointing="layers").plan(1).checkpointing == "layers"
    with pytest.raises(MachineError, match="checkpointing off"):
        decided(monkeypatch, 8_000_000, longest=600, checkpointing="off")


def test_a_limit_is_held_against_what_the_process_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "used_bytes", lambda device: 10**9)
    made = decided(monkeypatch, 10**10, limit=10**9 + 60_000_000)
    assert made.plan(1) == decided(monkeypatch, 60_000_000).plan(1)
    with pytest.raises(MachineError, match=r"train\.memory_bytes"):
        decided(monkeypatch, 10**10, limit=10**9)


def test_a_label_budget_where_logits_are_what_does_not_fit() -> None:
    ten = activations.Line(0, 10)
    found = activations.Activations(
        body=ten, kept=ten, layers=ten, embedding=ten, one_rows=10**6, chunk_rows=10**6,
        one=(activations.Head(0, 0, 1000), activations.Head(0, 0, 0)), several=(activations.Head(0, 0, 0), activations.Head(0, 0, 0)),
    )  # fmt: skip
    made = Memory()
    tokens = made._tokens(found, 100_000, memory.MOST_TOKENS)
    assert tokens == (100_000 - 64 * 1000) // 10
    assert made._rows(found, 1000, 200_000) == (200_000 - 10_000) // 1000
    assert made._rows(found, 100, 200_000) is None


# ---- when it runs out ------------------------------------------------------------------------------------------------

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
]


def test_what_counts_as_out_of_memory() -> None:
    assert all(out_of_memory(e) for e in ERRORS)
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) and not out_of_memory(ValueError("memory"))
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**50)
    assert out_of_memory(real.value)


def failing(p: Policy, when: Callable[[int, int], bool], error: BaseException) -> Policy:
    """Forward k (from 1) over T tokens raises `error` where `when(k, T)`, after half of it has been computed."""
    forward, calls = p.forward, [0]

    def broken(micro: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if when(calls[0], len(micro.stream.tokens)):
            p.hidden(micro.stream)
            raise error
        return forward(micro, *args, **kwargs)

    p.forward = broken  # type: ignore[method-assign]
    return p


def dropping(p: Policy) -> Policy:
    p.requires_grad_(False)
    torch.manual_seed(5)
    return lora(p, rank=4, dropout=0.2)


@pytest.mark.parametrize("error", ERRORS[:3], ids=["cuda", "python", "torch cpu"])
def test_the_step_is_redone_whole_with_half_the_tokens(tmp_path: Path, error: BaseException) -> None:
    """At the second micro-batch of step 3, after the first has already left its gradient: equal to the smaller budget from there on."""
    said: list[str] = []
    decisions: list[Any] = []
    caught = Memory.fixed(20)
    caught.record = decisions.append
    per_step = 2
    hit, _ = train(tmp_path / "00-hit", 6, on=failing(policy(), lambda k, t: k == 2 * per_step + 2, error), memory=caught, say=said.append)
    small = Memory(plans=[(0, Plan(20)), (3, decisions[-1] and Plan(caught.plan(3).micro_tokens))])
    want, _ = train(tmp_path / "00-want", 6, memory=small)
    assert caught.plan(2) == Plan(20) and caught.plan(3).micro_tokens <= 10
    assert same(hit, want)
    assert (tmp_path / "00-hit/metrics.jsonl").read_bytes() == (tmp_path / "00-want/metrics.jsonl").read_bytes()
    whole, _ = train(tmp_path / "00-whole", 6)
    for x, y in zip(weights(hit).values(), weights(whole).values()):
        assert (x - y).norm() <= 1e-4 * x.norm()
    assert any("out of memory in step 3" in s and "the same batch again" in s for s in said)
    assert [p["step"] for p in decisions[-1]["plans"]] == [0, 3] and "out of memory in step 3" in decisions[-1]["why"]


def test_the_dice_are_put_back(tmp_path: Path) -> None:
    """With dropout a step begun twice must draw what it would have drawn once."""
    error = MemoryError()
    caught = Memory.fixed(1000)
    train(tmp_path / "00-hit", 3, on=failing(dropping(policy()), lambda k, t: k == 2, error), memory=caught)
    smaller = caught.plan(2)
    assert smaller.micro_tokens < 1000
    train(tmp_path / "00-want", 3, on=dropping(policy()), memory=Memory(plans=[(0, Plan(1000)), (2, smaller)]))
    a, b = ([r["loss"] for r in read_jsonl(tmp_path / n / "metrics.jsonl")] for n in ("00-hit", "00-want"))
    assert a == b


def test_resume_replays_when_the_plan_changed(tmp_path: Path) -> None:
    """Stopped at step 3 of 6 with a failure in step 5 still ahead of its checkpoint: steps 4 and 5 follow what was decided."""
    decisions: dict[str, Any] = {}
    caught = Memory.fixed(1000)
    caught.record = lambda d: decisions.update(d)
    whole, _ = train(tmp_path / "00-whole", 6, on=failing(policy(), lambda k, t: k == 5, MemoryError()), memory=caught)
    folder = tmp_path / "00-whole"
    newest = folder / "checkpoint-6"
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    resumed, state = train(folder, 6, memory=Memory().replay(decisions), resume=True)
    assert state.step == 6 and same(whole, resumed)


def test_a_single_tree_turns_checkpointing_on_and_then_gives_up_with_a_table(tmp_path: Path) -> None:
    auto = Memory.fixed(1000)
    auto.checkpointing = "auto"
    trained, _ = train(tmp_path / "00-a", 2, on=failing_unless_checkpointed(policy()), memory=auto)
    assert auto.plan(1).checkpointing == "layers"
    want, _ = train(tmp_path / "00-b", 2, memory=Memory.fixed(auto.plan(1).micro_tokens))
    assert same(trained, want)
    with pytest.raises(MachineError, match=r"single row of \d+ tokens does not fit, checkpointing layers") as caught:
        train(tmp_path / "00-c", 2, on=failing(policy(), lambda k, t: True, MemoryError()), memory=Memory.fixed(1000, checkpointing="layers"))
    assert caught.value.exit_code == 4
    for item in ("weights", "masters", "gradients", "moments", "free"):
        assert item in str(caught.value)


def failing_unless_checkpointed(p: Policy) -> Policy:
    return failing(p, lambda k, t: p.checkpointing == "off", MemoryError())


def test_nothing_of_the_failed_forward_is_kept(tmp_path: Path) -> None:
    """The second try has the memory of the first: no traceback or closure holds its tensors."""
    p = policy()
    before: list[int] = []
    sizes: list[int] = []

    def alive() -> int:
        gc.collect()
        return sum(x.numel() for x in gc.get_objects() if isinstance(x, torch.Tensor))

    forward, calls = p.forward, [0]

    def broken(micro: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        (before if calls[0] == 1 else sizes).append(alive())
        out = p.hidden(micro.stream)
        if calls[0] == 1:
            raise MemoryError(out)
        return forward(micro, *args, **kwargs)

    p.forward = broken  # type: ignore[method-assign]
    train(tmp_path / "00-x", 1, on=p)
    assert sizes[0] <= before[0] + 200


def test_an_error_of_another_kind_passes(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "00-x", 2, on=failing(policy(), lambda k, t: True, ZeroDivisionError()))


def test_freed_memory_is_given_back_only_where_memory_is_short(tmp_path: Path, the_allocator_is_left_alone: list[int]) -> None:
    train(tmp_path / "00-a", 2)
    assert not the_allocator_is_left_alone
    train(tmp_path / "00-b", 2, memory=Memory.fixed(1000, checkpointing="layers"))
    assert the_allocator_is_left_alone


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_what_is_freed_is_gone() -> None:
    """In a process of its own, because it lasts: blocks freed between others that stay."""
    code = """
import torch
from burnish.core.machine import resident_bytes, return_freed_memory
import sys
if sys.argv[1] == "yes": return_freed_memory()
torch.zeros(30 << 20, dtype=torch.uint8)  # freed: glibc's own threshold rises above what follows
blocks = [torch.ones(2 << 20, dtype=torch.uint8) for _ in range(100)]
full = resident_bytes()
del blocks[:-1:2]
print(full - resident_bytes())
"""
    given = {a: int(subprocess.run([sys.executable, "-c", code, a], capture_output=True, text=True, check=True).stdout) for a in ("yes", "no")}
    assert given["yes"] > 90 << 20 > 10 << 20 > given["no"]


def test_a_stage_decides_at_its_first_step(tmp_path: Path) -> None:
    decisions: list[Any] = []
    auto = Memory(record=decisions.append)
    fit(policy(), method(2), SETTINGS, StageFolder(tmp_path / "00-a").make(), schedule=linear, memory=auto, stop=Stop())
    (decision,) = decisions
    assert decision["plans"][0]["micro_tokens"] == auto.plan(1).micro_tokens > 0
    assert decision["measured"]["ceiling_bytes"] > 0 and decision["why"]
    assert Memory().replay(decision).plan(1) == auto.plan(1)


# ---- what the machine has --------------------------------------------------------------------------------------------


def test_a_control_groups_limit_is_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 8000000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/a/b\n1:cpu:/\n0::/x/y\n")
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "groups")
    assert machine.free_host_bytes() == 8_000_000 * 1024

    def group(path: str, **files: str) -> None:
        (tmp_path / "groups" / path).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / "groups" / path / name.replace("__", ".")).write_text(text + "\n")

    group("x", memory__max="5000000000", memory__current="1500000000", memory__stat="anon 1\ninactive_file 500000000")
    group("x/y", memory__max="max", memory__current="1", memory__stat="anon 1")
    assert machine.free_host_bytes() == 4_000_000_000
    group("memory/a/b", memory__limit_in_bytes="3000000000", memory__usage_in_bytes="1000000000", memory__stat="total_inactive_file 0")
    assert machine.free_host_bytes() == 2_000_000_000
    group("memory", memory__limit_in_bytes=str(2**63 - 4096), memory__usage_in_bytes="1", memory__stat="total_inactive_file 0")
    assert machine.free_host_bytes() == 2_000_000_000
