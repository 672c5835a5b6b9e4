"""The scripted engine and the pool over it."""

from __future__ import annotations

import pytest

from burnish.core.errors import ConfigError, DataError
from burnish.core.records import Sampling, Spend
from burnish.engines.base import Prompt, StaleNodeError, cut, need
from burnish.engines.pool import Pool
from burnish.engines.scripted import Scripted

WARM = Sampling(max_new_tokens=9)


def test_it_says_what_it_was_told() -> None:
    engine = Scripted({3: ["abc", (65, 66), "a long story"], 5: ["é"]})
    node = engine.prefill((1, 2, 3))
    child = engine.prefill((4,), node)
    keys = [(3, 0), (3, 1), (3, 2), (3, 3), (5, 0)]
    found = engine.sample([node, node, child, node, child], WARM, keys)
    assert [t.text for t in found] == ["abc", "AB", "a long st", "abc", "é"]
    assert [t.finish for t in found] == ["stop", "stop", "length", "stop", "stop"]
    assert found[2].tokens[:4] == (1, 2, 3, 4) and found[2].completion == tuple(b"a long st")
    assert engine.spend == Spend(prefill_tokens=4, sampled_tokens=3 + 2 + 9 + 3 + 2)
    assert engine.sample([node], Sampling(temperature=0.0), [(3, 2)])[0].text == "abc"
    stopped = engine.sample([node], Sampling(stop=("on", "st")), [(3, 2)])[0]
    assert (stopped.text, stopped.completion, stopped.finish) == ("a l", tuple(b"a lon"), "stop_string")
    assert engine.score([node, child]) == [(-1.0, -1.0), (-1.0,)]
    with pytest.raises(DataError, match="item 9"):
        engine.sample([node], WARM, [(9, 0)])


def test_nodes_are_counted() -> None:
    engine = Scripted({0: ["x"]})
    root = engine.prefill((1, 2))
    child = engine.prefill((3,), root)
    forks = engine.fork(child, 2)
    engine.free(root)
    assert engine.held == 2
    for node in (child, *forks):
        engine.free(node)
    assert engine.held == 0 and engine.spend.prefill_tokens == 3
    with pytest.raises(StaleNodeError):
        engine.sample([root], WARM, [(0, 0)])


def test_what_an_engine_cannot_do_is_said_in_words() -> None:
    engine = Scripted({0: ["x"]}, logprob=None)
    assert engine.sample([engine.prefill((1,))], WARM, [(0, 0)])[0].logprobs is None
    need(engine, "mcts:4", "fork")
    with pytest.raises(ConfigError, match="mcts:4  needs an engine that can report the log-probability"):
        need(engine, "mcts:4", "fork", "logprobs")


def test_text_is_cut_before_the_earliest_stop_string() -> None:
    assert cut("one two", ("two", "ne")) == "o"
    assert cut("one two", ()) == cut("one two", ("three",)) == "one two"


def prompts(n: int) -> list[Prompt]:
    return [Prompt(i, (i + 1, 7)) for i in range(n)]


def test_fewer_samples_are_a_prefix_of_more_and_nothing_is_drawn_twice() -> None:
    engine = Scripted({i: [f"{i}:{s}" for s in range(16)] for i in range(3)})
    pool = Pool(engine)
    four = pool.draw(prompts(3), WARM, 4)
    assert engine.spend == Spend(prefill_tokens=6, sampled_tokens=3 * 4 * 3)
    sixteen = pool.draw(prompts(3), WARM, 16)
    assert engine.spend.sampled_tokens == sum(len(f"{i}:{s}") for i in range(3) for s in range(16))
    for few, many in zip(four, sixteen):
        assert few.samples == many.samples[:4]
    before = engine.spend
    assert pool.draw(prompts(3), WARM, 4) == four and engine.spend == before
    assert [d.spend.sampled_tokens for d in four] == [12] * 3  # charged as if drawn
    assert [d.spend.prefill_tokens for d in four] == [2] * 3
    assert engine.held == 0


def test_other_settings_items_or_weights_are_other_samples() -> None:
    engine = Scripted({i: ["x", "y"] for i in range(3)})
    pool = Pool(engine)
    pool.draw(prompts(2), WARM, 1)
    spent = engine.spend.sampled_tokens
    pool.draw(prompts(2), Sampling(max_new_tokens=9, seed=1), 1)
    pool.draw([Prompt(0, (9, 9))], WARM, 1)
    assert engine.spend.sampled_tokens == spent + 2 + 1
    engine.weights_version = "later"
    found = pool.draw(prompts(2), WARM, 1)
    assert {d.samples[0].weights_version for d in found} == {"later"}
    with pytest.raises(ConfigError, match="n  0 samples"):
        pool.draw(prompts(1), WARM, 0)


def test_one_prompt_asked_twice_is_drawn_once() -> None:
    engine = Scripted({0: ["x", "y"]})
    a, b = Pool(engine).draw([Prompt(0, (1, 2))] * 2, WARM, 2)
    assert a == b and engine.spend == Spend(prefill_tokens=2, sampled_tokens=2)
