"""One contract, every engine: the local one on a tiny model, the scripted one, and those over HTTP against a server on
loopback that is backed by the local one. What an engine cannot do it says, and refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from burnish.core.errors import ConfigError, DataError
from burnish.core.records import Sampling, Spend, Trajectory
from burnish.core.seeds import derive
from burnish.engines.base import Node, Prompt, StaleNodeError, need
from burnish.engines.endpoint import Endpoint
from burnish.engines.local.engine import LocalEngine
from burnish.engines.pool import Pool
from burnish.engines.remote import RemoteEngine
from burnish.engines.scripted import Scripted
from burnish.engines.vllm import VllmEngine
from tests.engines.policies import Letters, policy, prompts
from tests.engines.server import WORDS, Server, serving

GIVEN = prompts(6)
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)
WARM = Sampling(temperature=1.0, max_new_tokens=12, seed=3)
ENGINES = ("local", "scripted", "remote ids", "remote text", "vllm")


def local_rows(sampling: Sampling, keys: Sequence[tuple[int, int]]) -> list[Trajectory]:
    """What the local engine says to `GIVEN`, row by row, key (item, sample)."""
    engine = LocalEngine(policy("llama"))
    return engine.sample([engine.prefill(GIVEN[item]) for item, _ in keys], sampling, keys)


@pytest.fixture(scope="module")
def truth() -> list[Trajectory]:
    return local_rows(GREEDY, [(i, 0) for i in range(len(GIVEN))])


@dataclass
class Case:
    """An engine, and how it is expected to charge."""

    name: str
    engine: Any
    server: Server | None = None

    @property
    def forks(self) -> bool:
        return "fork" in self.engine.can

    def prefill(self, ids: Sequence[int], parent: Node | None = None) -> Node:
        return self.engine.prefill(ids, parent)


@pytest.fixture(params=ENGINES)
def case(request: pytest.FixtureRequest, truth: list[Trajectory]) -> Iterator[Case]:
    name = request.param
    if name == "local":
        yield Case(name, LocalEngine(policy("llama")))
    elif name == "scripted":
        # longer than any limit here, because the script does not end where a limit or a stop string will end it
        long = local_rows(Sampling(temperature=0.0, max_new_tokens=40), [(i, 0) for i in range(len(GIVEN))])
        scripts = {i: [t.completion, *((*t.completion[s:], 9, s) for s in range(1, 6))] for i, t in enumerate(long)}
        yield Case(name, Scripted(scripts, decode=Letters().decode))
    else:
        kind = {"remote ids": "openai", "remote text": "text", "vllm": "vllm"}[name]
        with serving(kind) as server:
            endpoint = Endpoint(server.url, key="", backoff_s=0.01, timeout_s=20)
            if name == "vllm":
                engine = VllmEngine(endpoint, "tiny", tokenizer=WORDS, context=512)
            else:
                how: Any = name.split()[1]
                engine = RemoteEngine(endpoint, "tiny", tokenizer=WORDS, prompts=how, logprobs=True)
            yield Case(name, engine, server)


def rows(case: Case, sampling: Sampling, keys: Sequence[tuple[int, int]]) -> list[Trajectory]:
    nodes = [case.prefill(GIVEN[item]) for item, _ in keys]
    found = case.engine.sample(nodes, sampling, keys)
    for node in nodes:
        case.engine.free(node)
    return found


def ids_of(t: Trajectory) -> tuple[int, ...] | str:
    """What two samples are compared by: ids where there are any."""
    return t.completion if any(s.kind == "completion" for s in t.spans) else t.text


def test_greedy_is_the_local_engines(case: Case, truth: list[Trajectory]) -> None:
    before = case.engine.spend
    order = [3, 0, 5, 1, 4, 2]
    found = dict(zip(order, rows(case, GREEDY, [(i, 0) for i in order])))
    for i, want in enumerate(truth):
        t = found[i]
        assert (t.id, t.text, t.finish) == (f"{i}/0", want.text, want.finish)
        assert t.tokens[: len(GIVEN[i])] == GIVEN[i] and t.spans[0].end == len(GIVEN[i])
        assert t.cost.sampled_tokens == want.cost.sampled_tokens
        assert t.weights_version == case.engine.weights_version
        assert t.sampler["temperature"] == 0.0 and (t.sampler["item"], t.sampler["sample"]) == (i, 0)
        if "ids" in case.engine.can:
            assert t.completion == want.completion and t.tokens == want.tokens
        else:
            with pytest.raises(DataError, match=f"trajectory {i}/0  its token ids are not known"):
                t.completion  # noqa: B018
    done = case.engine.spend
    assert done.sampled_tokens - before.sampled_tokens == sum(t.cost.sampled_tokens for t in truth)
    assert done.prefill_tokens - before.prefill_tokens == sum(map(len, GIVEN))


def test_logprobs_are_the_local_engines_or_none(case: Case) -> None:
    keys = [(i, 0) for i in range(len(GIVEN))]
    cool = Sampling(temperature=0.5, top_p=0.9, max_new_tokens=8, seed=1)
    if case.name == "scripted":
        assert all(t.logprobs == (-1.0,) * len(t.completion) for t in rows(case, cool, keys))
        return
    engine = LocalEngine(policy("llama"))
    seeds = [0 if case.name == "local" else derive(1, "sample", *key) for key in keys]
    for (item, _), seed, t in zip(keys, seeds, rows(case, cool, keys)):
        node = engine.prefill(GIVEN[item])
        want = t if case.name == "local" else engine.sample([node], Sampling(0.5, 0, 0.9, 8, seed=seed), [(0, 0)])[0]
        (scored,) = engine.score([engine.prefill(want.completion, node)])
        assert t.logprobs == pytest.approx(scored, abs=1e-4) and t.text == want.text
        assert len(t.logprobs or ()) == t.cost.sampled_tokens


def test_limits_and_stop_strings(case: Case, truth: list[Trajectory]) -> None:
    keys = [(i, 0) for i in range(len(GIVEN))]
    for t in rows(case, Sampling(temperature=0.0, max_new_tokens=1), keys):
        assert (t.cost.sampled_tokens, t.finish) == (1, "length")
    text = truth[2].text
    stop = (text[4:6], "never said~~")
    (t,) = rows(case, Sampling(temperature=0.0, max_new_tokens=12, stop=stop), [(2, 0)])
    assert t.text == text[: text.index(stop[0])]
    assert t.cost.sampled_tokens == text.index(stop[0]) + 2
    if "ids" in case.engine.can:
        assert t.finish == "stop_string"
        assert t.completion == truth[2].completion[: text.index(stop[0]) + 2]  # with the token that completed it
    else:
        assert t.finish == "stop"  # this API does not say which


def test_the_end_token_is_kept_in_the_ids_and_not_in_the_text(case: Case, truth: list[Trajectory]) -> None:
    if not hasattr(case.engine, "end_ids") or "ids" not in case.engine.can:
        pytest.skip("it is not told what ends a row")
    end = truth[1].completion[4]  # an ordinary token, which decoding would show
    case.engine.end_ids = (end,)
    (t,) = rows(case, GREEDY, [(1, 0)])
    size = truth[1].completion.index(end) + 1
    assert (t.completion, t.finish) == (truth[1].completion[:size], "stop")
    assert t.text == WORDS.decode(t.completion[:-1]) and t.cost.sampled_tokens == size


def test_a_row_is_a_function_of_its_key(case: Case) -> None:
    keys = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    whole = [ids_of(t) for t in rows(case, WARM, keys)]
    assert len(set(whole)) == 5
    assert [ids_of(t) for t in rows(case, WARM, keys[::-1])] == whole[::-1]
    assert [ids_of(t) for key in keys for t in rows(case, WARM, [key])] == whole
    if case.name != "scripted":
        assert [ids_of(t) for t in rows(case, Sampling(max_new_tokens=12, seed=4), keys)] != whole


def test_what_it_says_is_what_it_does(case: Case, truth: list[Trajectory]) -> None:
    for capability in ("fork", "ids", "logprobs", "score"):
        if capability in case.engine.can:
            need(case.engine, "a test", capability)  # type: ignore[arg-type]
        else:
            with pytest.raises(ConfigError, match="a test  needs an engine that can"):
                need(case.engine, "a test", capability)  # type: ignore[arg-type]
    root = case.prefill(GIVEN[0])
    child = case.prefill(truth[0].completion, root)
    if "score" not in case.engine.can:
        with pytest.raises(ConfigError, match="cannot score tokens that it did not sample"):
            case.engine.score([child])
        return
    before = case.engine.spend
    got = case.engine.score([child, root, child])
    assert got[0] == got[2] and list(map(len, got)) == [len(child.ids), len(root.ids) - 1, len(child.ids)]
    if case.name != "scripted":
        engine = LocalEngine(policy("llama"))
        above = engine.prefill(GIVEN[0])
        want = engine.score([engine.prefill(truth[0].completion, above), above])
        assert got[0] == pytest.approx(want[0], abs=1e-4) and got[1] == pytest.approx(want[1], abs=1e-4)
        assert case.engine.spend.scored_tokens - before.scored_tokens == len(child.path) - 1


def test_nodes(case: Case) -> None:
    root = case.prefill(GIVEN[0])
    again = case.prefill(GIVEN[0])
    child = case.prefill((5, 6, 7), root)
    assert again is root and child.path == GIVEN[0] + (5, 6, 7) and child.start == len(GIVEN[0])
    forks = case.engine.fork(child, 2)
    assert all(node is child for node in forks)
    flat = case.prefill(child.path)
    key = [(0, 0)]
    chained, whole = case.engine.sample([child], GREEDY, key)[0], case.engine.sample([flat], GREEDY, key)[0]
    assert chained.tokens == whole.tokens and chained.text == whole.text and chained.parent == child.id
    for node in (root, again, child, *forks, flat):
        case.engine.free(node)
    for gone in (root, child, flat):
        with pytest.raises(StaleNodeError, match="was freed"):
            case.engine.sample([gone], GREEDY, key)
    assert not case.engine._nodes
    with pytest.raises(DataError, match="at least one token"):
        case.prefill(())


def test_a_shared_prefix_is_charged_once_or_for_every_row(case: Case) -> None:
    keys = [(0, s) for s in range(4)]
    root = case.prefill(GIVEN[0])
    before = case.engine.spend if case.name == "scripted" else Spend()
    found = case.engine.sample([root] * 4, WARM, keys)
    size = len(GIVEN[0])
    charged = root.cost.prefill_tokens + sum(t.cost.prefill_tokens for t in found)
    assert charged == (size if case.forks else 4 * size)
    assert case.engine.spend.prefill_tokens == charged
    assert case.engine.spend.sampled_tokens - before.sampled_tokens == sum(t.cost.sampled_tokens for t in found)


def test_a_pool_draws_prefixes(case: Case) -> None:
    pool, asked = Pool(case.engine), [Prompt(i, GIVEN[i]) for i in range(2)]
    few = pool.draw(asked, WARM, 2)
    many = pool.draw(asked, WARM, 4)
    assert [d.samples for d in few] == [d.samples[:2] for d in many]
    for item, drawn in enumerate(many):
        assert drawn.spend.prefill_tokens == len(GIVEN[item]) * (1 if case.forks else 4)
    assert not case.engine._nodes


WRONG: list[tuple[Callable[[Case, Node], object], str]] = [
    (lambda c, n: c.engine.sample([n], Sampling(temperature=-1), [(0, 0)]), "sampling.temperature"),
    (lambda c, n: c.engine.sample([n], Sampling(stop=("",)), [(0, 0)]), "sampling.stop"),
    (lambda c, n: c.engine.sample([n], WARM, []), "0 keys for 1 nodes"),
    (lambda c, n: c.engine.sample([n, n], WARM, [(0, 1), (0, 1)]), "given twice"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_what_cannot_be_meant_is_refused(case: Case, call: Callable[[Case, Node], object], message: str) -> None:
    node = case.prefill(GIVEN[0])
    with pytest.raises(ConfigError, match=message):
        call(case, node)
    assert case.server is None or not case.server.seen
    assert case.engine.sample([], GREEDY, []) == [] and case.engine.score([]) == [] if "score" in case.engine.can else True


def test_what_poll_raises_stops_it_and_it_goes_on_after(case: Case, truth: list[Trajectory]) -> None:
    if case.name == "scripted":
        pytest.skip("it never waits")
    if case.server is not None:
        case.server.hold_s = 0.2
    calls = 0

    def poll() -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise KeyboardInterrupt

    case.engine.poll = poll
    with pytest.raises(KeyboardInterrupt):
        rows(case, GREEDY, [(0, 0), (1, 0)])
    case.engine.poll = None
    assert rows(case, GREEDY, [(0, 0)])[0].text == truth[0].text
