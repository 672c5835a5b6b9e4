"""Captured decode steps without a GPU: a capture that runs the step again on its static inputs stands in for a graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from burnish.core.records import Sampling
from burnish.engines.local import plans
from burnish.engines.local.engine import LocalEngine
from burnish.engines.local.graphs import ROWS, Graphs, bucket, capturable, decode_step, no_keys, span_of
from burnish.engines.local.rollout import Rollout
from tests.engines.policies import policy, prompts


class Recorded:
    """A capture that is faithful where a real one is: fixed inputs and outputs, no Python of the caller's on replay."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, work: Callable[[], tuple[Tensor, ...]]):
        outputs = tuple(torch.full_like(x, -1) for x in work())  # a capture computes nothing

        def replay() -> None:
            self.calls += 1
            for x, y in zip(outputs, work()):
                x.copy_(y)

        return replay, outputs


def double(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return 2 * x, x + y.sum(-1)


def test_the_least_bucket_that_holds_the_rows():
    assert [bucket(n) for n in (1, 2, 3, 5, 17, 25, 49, 65, 129, 193, 256)] == [1, 2, 4, 8, 24, 32, 64, 96, 192, 256, 256]
    assert bucket(0) is None and bucket(257) is None
    assert bucket(9, most=12) is None and bucket(9, most=16) == 16


def test_a_replay_gives_what_the_step_gives_and_captures_once_a_bucket():
    graphs = Graphs(double, Recorded())
    for n in (3, 4, 2, 3):
        x, y = torch.randn(n), torch.randn(n, 2)
        for got, want in zip(graphs("k", {"x": x, "y": y}), double(x, y)):
            torch.testing.assert_close(got, want)
    assert (graphs.captures, graphs.replays, graphs.eager) == (2, 4, 0)


def test_another_key_is_captured_apart_and_forgotten_apart():
    graphs = Graphs(double, Recorded())
    given = {"x": torch.ones(3), "y": torch.ones(3, 1)}
    graphs(1, given), graphs(2, given), graphs(1, given)
    assert graphs.captures == 2
    graphs.forget(1)
    graphs(2, given), graphs(1, given)
    assert graphs.captures == 3


def test_without_a_key_or_a_bucket_the_step_runs_as_it_is():
    graphs = Graphs(double, Recorded())
    graphs(None, {"x": torch.ones(3), "y": torch.ones(3, 1)})
    graphs("k", {"x": torch.ones(ROWS[-1] + 1), "y": torch.ones(ROWS[-1] + 1, 1)})
    graphs("k", {"x": torch.ones(3), "y": torch.ones(3, 1)}, most=3)
    assert (graphs.captures, graphs.eager) == (0, 3)


def test_the_graph_used_longest_ago_goes_first():
    graphs, given = Graphs(double, Recorded(), limit=2), {"x": torch.ones(1), "y": torch.ones(1, 1)}
    for key in ("a", "b", "a", "c", "a"):
        graphs(key, given)
    assert graphs.captures == 3
    graphs("b", given)
    assert graphs.captures == 4


def test_a_step_that_cannot_be_captured_runs_as_it_is_and_says_why():
    def refuse(work: object):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graphs, given = Graphs(double, refuse), {"x": torch.ones(3), "y": torch.ones(3, 1)}
    for _ in range(2):
        assert graphs("k", given)[0].tolist() == [2, 2, 2]
    assert graphs.eager == 2 and graphs.refused == {"k": "operation not permitted when stream is capturing"}


def test_dummy_rows_get_what_they_are_given():
    seen: list[list[float]] = []

    def step(x: Tensor, length: Tensor) -> tuple[Tensor, ...]:
        seen.append([*x.tolist(), *length.tolist()])
        return (x,)

    Graphs(step, Recorded())("k", {"x": torch.arange(3.0), "length": torch.full((3,), 7)}, blank={"length": no_keys})
    assert seen[-1] == [0, 1, 2, 2, 7, 7, 7, 0]


def test_spans_double():
    assert [span_of(n) for n in (0, 15, 16, 31, 32, 100)] == [16, 16, 32, 32, 64, 128]


def test_what_looks_at_values_is_not_captured():
    assert capturable(Sampling()) and capturable(Sampling(top_k=5)) and not capturable(Sampling(top_p=0.9))


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_captured_decode_draws_what_the_engine_draws(
    name: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "SHARED_BYTES", 2**60)  # every row has its own copy of its prompt
    sampling, keys = Sampling(temperature=temperature, max_new_tokens=24, seed=1), [(i, 0) for i in range(3)]
    engine = LocalEngine(policy(name, endless=True))
    nodes = engine.prefill_many(prompts(3))
    want = engine.sample(nodes, sampling, keys)

    with torch.inference_mode():
        rollout = Rollout(engine, nodes, sampling, keys)  # type: ignore[arg-type]
        engine.arena.reserve(bucket(3) or 0, span_of(64))
        rollout._admit([])  # reads the prompts and draws each row's first token
        assert rollout.slot.tolist() == [0, 1, 2]
        capture, made = Recorded(), [rollout.token[:3].clone()]
        logprobs = [rollout.log[0][2].clone()]
        graphs: dict[int, Graphs] = {}
        for _ in range(23):
            span = span_of(int(rollout.length.max()))
            if span not in graphs:
                graphs[span] = Graphs(decode_step(engine, sampling, span), capture)
            inputs = {
                "token": rollout.token[:3],
                "position": torch.from_numpy(rollout.position[:3]),
                "length": torch.from_numpy(rollout.length[:3]),
                "noise": torch.from_numpy(rollout.noise[rollout.live]),
            }
            token, logprob = graphs[span](0, inputs, most=engine.arena.rows, blank={"length": no_keys})
            rollout.token[:3] = token
            made.append(token.clone())
            logprobs.append(logprob.clone())
            rollout.length += 1
            rollout.position += 1
    order = rollout.live.tolist()
    got = torch.stack(made, 1).tolist()
    assert [got[order.index(i)] for i in range(3)] == [list(t.completion) for t in want]
    for i, t in enumerate(want):
        mine = torch.stack(logprobs, 1)[order.index(i)]
        torch.testing.assert_close(mine, torch.tensor(t.logprobs), atol=1e-4, rtol=0)
    assert capture.calls == 23 and sum(g.captures for g in graphs.values()) == len(graphs)
