"""Captured decode steps without a GPU: a capture that runs the step again on its static inputs stands in for a graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from burnish.core.errors import DivergedError
from burnish.core.records import Sampling
from burnish.engines.local import plans
from burnish.engines.local.engine import LocalEngine
from burnish.engines.local.graphs import PATIENCE, ROWS, DecodeGraphs, Graphs, bucket, no_keys, span_of
from tests.engines.policies import policy, prompts


class Recorded:
    """A capture that is faithful where a real one is: inputs and outputs are fixed, a capture computes nothing, and what a
    replay writes to must still lie where it lay (`engine`'s slots, and its rotations)."""

    def __init__(self, engine: LocalEngine | None = None) -> None:
        self.engine, self.calls, self.sizes = engine, 0, list[int]()

    def addresses(self) -> list[int]:
        if self.engine is None:
            return []
        lean = self.engine.weights.lean
        turns = [x for r in lean.rotations for x in (r.cos, r.sin)] if lean is not None else []
        slots = [x for pair in self.engine.arena.slots.values() for x in pair]
        return [self.engine.policy.version, *(x.data_ptr() for x in slots), *(len(x) for x in turns)]

    def __call__(self, work: Callable[[], tuple[Tensor, ...]]):
        before = self.addresses()
        outputs = tuple(torch.full_like(x, -1) for x in work())
        assert self.addresses() == before, "a capture allocated what outlives it"
        self.sizes.append(len(outputs[0]))

        def replay() -> None:
            assert self.addresses()[: len(before)] == before, "a replay would write to memory that has moved"
            self.calls += 1
            for x, y in zip(outputs, work()):
                x.copy_(y)

        return replay, outputs


def double(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return 2 * x, x + y.sum(-1)


def test_the_least_bucket_that_holds_the_rows():
    assert [bucket(n) for n in (1, 2, 3, 5, 17, 25, 49, 65, 129, 193, 257)] == [1, 2, 4, 8, 24, 32, 64, 96, 192, 256, 384]
    assert bucket(0) is None and bucket(513) is None and bucket(13, most=12) is None
    assert bucket(9, most=12) == 12 and bucket(9, most=16) == 16 and bucket(600, most=700) is None


def test_a_replay_gives_what_the_step_gives_and_captures_once_a_bucket():
    graphs = Graphs(Recorded())
    for n in (3, 4, 2, 3):
        x, y = torch.randn(n), torch.randn(n, 2)
        for got, want in zip(graphs("k", double, {"x": x, "y": y}), double(x, y)):
            torch.testing.assert_close(got, want)
    assert (graphs.captures, graphs.replays) == (2, 4)


def test_another_key_is_captured_apart():
    graphs = Graphs(Recorded())
    given = {"x": torch.ones(3), "y": torch.ones(3, 1)}
    for key in (1, 2, 1):
        graphs(key, double, given)
    assert graphs.captures == 2


def test_without_a_bucket_the_step_runs_as_it_is():
    graphs = Graphs(Recorded())
    graphs("k", double, {"x": torch.ones(ROWS[-1] + 1), "y": torch.ones(ROWS[-1] + 1, 1)})
    graphs("k", double, {"x": torch.ones(3), "y": torch.ones(3, 1)}, most=2)
    assert (graphs.captures, graphs.replays) == (0, 0)


def test_the_graph_used_longest_ago_goes_first():
    graphs, given = Graphs(Recorded(), limit=2), {"x": torch.ones(1), "y": torch.ones(1, 1)}
    for key in ("a", "b", "a", "c", "a"):
        graphs(key, double, given)
    assert graphs.captures == 3
    graphs("b", double, given)
    assert graphs.captures == 4


def refuse(work: object):
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_a_step_that_cannot_be_captured_runs_as_it_is_and_says_why():
    graphs, given = Graphs(refuse), {"x": torch.ones(3), "y": torch.ones(3, 1)}
    for _ in range(2):
        assert graphs("k", double, given)[0].tolist() == [2, 2, 2]
    assert graphs.replays == 0 and graphs.refused == {"k": "operation not permitted when stream is capturing"}


def test_dummy_rows_get_what_they_are_given():
    seen: list[list[float]] = []

    def step(x: Tensor, length: Tensor) -> tuple[Tensor, ...]:
        seen.append([*x.tolist(), *length.tolist()])
        return (x,)

    Graphs(Recorded())("k", step, {"x": torch.arange(3.0), "length": torch.full((3,), 7)}, blank={"length": no_keys})
    assert seen[-1] == [0, 1, 2, 2, 7, 7, 7, 0]


def test_spans_double_and_then_grow_by_quarters():
    assert [span_of(n) for n in (0, 15, 16, 31, 32, 100, 255)] == [16, 16, 32, 32, 64, 128, 256]
    assert [span_of(n) for n in (256, 383, 384, 511, 512, 1023, 1024)] == [384, 384, 512, 512, 768, 1024, 1536]
    assert all(n < span_of(n) <= max(2 * n, 16) and span_of(n) % 16 == 0 for n in range(5000))


# ---- the engine's decode loop, driven ---------------------------------------------------------------------------------


def engines(name: str, patience: int = 0, endless: bool = True, **more) -> tuple[LocalEngine, LocalEngine, list[Recorded]]:
    """An engine without graphs and one with recorded ones, and the recordings it will make."""
    made: list[Recorded] = []
    plain, captured = (LocalEngine(policy(name, endless=endless), **more) for _ in range(2))
    captured.graphs = DecodeGraphs(captured, lambda: made.append(Recorded(captured)) or made[-1], patience)
    return plain, captured, made


def run(engine: LocalEngine, given: list[tuple[int, ...]], sampling: Sampling, samples: int = 3):
    nodes = engine.prefill_many(given)
    pairs = [(node, (i, s)) for i, node in enumerate(nodes) for s in range(samples)]
    found = engine.sample([n for n, _ in pairs], sampling, [k for _, k in pairs])
    for node in nodes:
        engine.free(node)
    return found


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "SHARED_BYTES", 2**60)  # every row has its own copy of its prompt


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_captured_steps_draw_what_eager_steps_draw(name: str, temperature: float, copies: None) -> None:
    """Members that share a row, rows that split, end and are replaced, slots that grow: 82 tokens where 64 were reserved."""
    plain, captured, made = engines(name, rows=5, endless=temperature == 0)
    for new_tokens in (82, 9):
        sampling = Sampling(temperature=temperature, max_new_tokens=new_tokens, seed=1)
        want, got = run(plain, prompts(4), sampling), run(captured, prompts(4), sampling)
        assert [t.tokens for t in got] == [t.tokens for t in want]
        for x, y in zip(got, want):
            assert torch.allclose(torch.tensor(x.logprobs), torch.tensor(y.logprobs), atol=1e-4)
    sizes = {size for r in made for size in r.sizes}
    assert sum(r.calls for r in made) > 89 and captured.policy.decisions["graphs"]["value"] == "captured"
    assert len(sizes) > 2 if temperature else max(sizes) >= 4
    assert captured.spend.sampled_tokens == plain.spend.sampled_tokens and captured.spend.useful_flops == plain.spend.useful_flops


def test_what_is_launched_counts_the_dummies_and_the_whole_span(copies: None) -> None:
    _, captured, made = engines("llama")
    nodes = captured.prefill_many(prompts(3, shortest=20, longest=20))
    read = captured.spend.executed_flops
    run(captured, prompts(3, shortest=20, longest=20), Sampling(max_new_tokens=5), samples=1)
    for node in nodes:
        captured.free(node)
    shape = captured.shape
    body, head = 2 * shape.body_parameters, 2 * shape.vocabulary * shape.hidden
    attention = 2 * shape.query_heads * (shape.key_width + shape.value_width) * shape.layers * 32
    prefill = sum(n.cost.executed_flops for n in nodes)
    assert made[0].sizes == [3] and made[0].calls == 4
    assert captured.spend.executed_flops - read - prefill == 4 * 3 * (body + attention) + 5 * 3 * head


@pytest.mark.parametrize("sampling", [Sampling(top_p=0.9), Sampling(top_k=5, stop=("z",)), Sampling(min_p=0.05)])
def test_any_sampling_is_drawn_outside_the_graph(sampling: Sampling, copies: None) -> None:
    plain, captured, made = engines("qwen3", rows=4)
    sampling = Sampling(**{**vars(sampling), "max_new_tokens": 20})
    want, got = (run(e, prompts(3), sampling) for e in (plain, captured))
    assert [t.tokens for t in got] == [t.tokens for t in want] and made[0].calls > 10


def test_graphs_outlive_a_call_and_end_with_the_slots_or_the_weights(copies: None) -> None:
    _, captured, made = engines("llama")
    given, sampling = prompts(3, shortest=5, longest=9), Sampling(max_new_tokens=8)
    for _ in range(3):
        run(captured, given, sampling, samples=1)
    assert len(made) == 1 and made[0].sizes == [3] and made[0].calls == 21  # one capture served three calls
    run(captured, given, Sampling(max_new_tokens=80), samples=1)  # wider slots
    assert len(made) == 3  # to begin with, and as they grow
    captured.policy.version += 1
    run(captured, given, sampling, samples=1)
    assert len(made) == 4 and captured.policy.decisions["graphs"]["value"] == "captured"


def test_a_shape_is_captured_once_it_has_come_often_enough(copies: None) -> None:
    plain, captured, made = engines("llama", patience=PATIENCE)
    given = prompts(2, shortest=5, longest=5)
    run(captured, given, Sampling(max_new_tokens=PATIENCE + 1), samples=1)
    assert not made  # the first token is the prompt's
    want, got = (run(e, given, Sampling(max_new_tokens=12), samples=1) for e in (plain, captured))
    assert [t.tokens for t in got] == [t.tokens for t in want]
    assert sum(r.calls for r in made) > 0


def test_rows_that_share_a_node_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "SHARED_BYTES", 0)
    plain, captured, made = engines("qwen3")
    want, got = (run(e, prompts(2), Sampling(max_new_tokens=6)) for e in (plain, captured))
    assert [t.tokens for t in got] == [t.tokens for t in want] and not made


def test_an_engine_whose_step_cannot_be_captured_runs_eagerly_and_says_so(copies: None) -> None:
    plain, captured, _ = engines("gemma3")
    asked: list[int] = []

    def refusing(work: object):
        asked.append(1)
        return refuse(work)

    captured.graphs = DecodeGraphs(captured, lambda: refusing, 0)
    want, got = (run(e, prompts(3), Sampling(max_new_tokens=8)) for e in (plain, captured))
    assert [t.tokens for t in got] == [t.tokens for t in want] and len(asked) == 1
    decided = captured.policy.decisions["graphs"]
    assert decided["value"] == "eager" and "not permitted when stream is capturing" in decided["why"]


def test_numbers_that_are_not_finite_do_not_stay_in_slots(copies: None) -> None:
    _, captured, _ = engines("llama")
    given, sampling = prompts(2, shortest=5, longest=5), Sampling(max_new_tokens=6)
    (before,) = [t.tokens for t in run(captured, given[:1], sampling, samples=1)]
    kept = captured.policy.body.norm.weight.data.clone()

    def spoil() -> None:
        if captured.arena.slots:
            for pair in captured.arena.slots.values():
                pair[1].fill_(torch.nan)

    captured.poll = spoil
    with pytest.raises(DivergedError):
        run(captured, given, sampling, samples=1)
    captured.poll = None
    assert not captured.arena.slots and torch.equal(kept, captured.policy.body.norm.weight.data)
    assert run(captured, given[:1], sampling, samples=1)[0].tokens == before
