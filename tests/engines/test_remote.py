"""Engines over HTTP when things go wrong: every fault ends in a retry that is counted or in one error that names the place."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from burnish.core.errors import BurnishError, ConfigError, DataError, MachineError
from burnish.core.records import Message, Sampling, Spend, Trajectory
from burnish.engines.connect import connect, models
from burnish.engines.endpoint import KEY as KEY_NAME
from burnish.engines.endpoint import MOST_WAIT_S, Answer, Endpoint, Refused, Request, address, backoff
from burnish.engines.remote import Conversation, RemoteEngine
from burnish.engines.vllm import VllmEngine
from burnish.search.base import within
from tests.engines.policies import prompts
from tests.engines.server import KEY, WORDS, Server, serving

GIVEN = prompts(3, shortest=4)
GREEDY = Sampling(temperature=0.0, max_new_tokens=6)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as fake:
        yield fake


def endpoint(fake: Server, **more: Any) -> Endpoint:
    return Endpoint(fake.url, **({"key": "", "backoff_s": 0.001, "timeout_s": 10.0} | more))


def vllm(fake: Server, **more: Any) -> VllmEngine:
    return VllmEngine(endpoint(fake, **more), "tiny", tokenizer=WORDS, context=512)


def remote(fake: Server, **more: Any) -> RemoteEngine:
    how: dict[str, Any] = {"tokenizer": WORDS, "prompts": "text"} | more
    return RemoteEngine(endpoint(fake), "tiny", **how)


def ask(engine: Any, sampling: Sampling = GREEDY, rows: int = 1) -> list[Trajectory]:
    node = engine.prefill(GIVEN[0])
    return engine.sample([node] * rows, sampling, [(0, s) for s in range(rows)])


# ---- what goes better the second time


@pytest.mark.parametrize(("fault", "lost"), [("429", 0), ("503", 0), ("500", 1), ("502", 1), ("truncated", 1), ("disconnect", 1)])
def test_a_passing_fault_is_tried_again_and_counted(server: Server, fault: str, lost: int) -> None:
    engine = vllm(server)
    (want,) = ask(engine)
    server.faults = [fault, fault]
    before = engine.spend
    (found,) = ask(engine)
    assert (found.text, found.completion) == (want.text, want.completion)
    assert found.meta == {"usage": "counted", "attempts": 3, "lost": 2 * lost}
    size = len(GIVEN[0])
    assert found.cost == Spend(prefill_tokens=size * (1 + 2 * lost), sampled_tokens=len(found.completion))
    assert engine.spend.prefill_tokens - before.prefill_tokens == found.cost.prefill_tokens
    assert engine.describe()["retried"] == 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("429", r"POST http://127.0.0.1:\d+/v1/completions \(row 1 of 1\)  it answered 429: slow down \(3 attempts\)"),
        ("500", r"it answered 500: trouble with key .* \(3 attempts\)"),
        ("truncated", r"the answer broke off after 60 bytes \(3 attempts\)"),
        ("disconnect", r"the connection broke: .* \(3 attempts\)"),
    ],
)
def test_a_lasting_one_is_an_error(server: Server, fault: str, said: str) -> None:
    server.faults = [fault] * 9
    with pytest.raises(MachineError, match=said) as error:
        ask(vllm(server, attempts=3))
    assert error.value.exit_code == 4 and len(server.seen) == 3


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_every_wait_has_a_deadline(server: Server, fault: str) -> None:
    server.faults = [fault] * 9
    begin = time.monotonic()
    with pytest.raises(MachineError, match=r"\(row 1 of 1\)  no answer within 0.3 s \(2 attempts\)"):
        ask(vllm(server, attempts=2, timeout_s=0.3))
    assert 0.6 <= time.monotonic() - begin < 3


def test_waits_grow_spread_and_end() -> None:
    assert [backoff(k, 0.5, 0.0) for k in (1, 2, 3)] == [0.5, 1.0, 2.0]
    assert [backoff(k, 0.5, 1.0) for k in (1, 2, 3)] == [0.25, 0.5, 1.0]
    assert backoff(1, 0.5, 0.3, after_s=7.0) == 7.0 and backoff(30, 0.5, 0.0) == backoff(1, 0.5, 0.0, 1e9) == MOST_WAIT_S


def test_a_long_wait_is_cut_short_by_poll(server: Server) -> None:
    server.faults = ["500"] * 9
    engine = vllm(server, backoff_s=50.0)
    begin, calls = time.monotonic(), iter(range(3))

    def poll() -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    engine.poll = poll
    with pytest.raises(KeyboardInterrupt):
        ask(engine)
    assert time.monotonic() - begin < 2


# ---- what is wrong for good


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("wrong_model", "asked 'tiny', and 'somebody-else' answered"),
        ("odd_usage", r"a usable usage.completion_tokens \(it is -3\)"),
        ("no_choices", "lacks choices: a list of one"),
        ("no_text", "lacks the text of the completion"),
        ("filtered", "not 'content_filter'"),
        ("nan", "lacks a log-probability for each sampled token"),
        ("few_logprobs", r"a log-probability for each of 6 tokens \(it has 5\)"),
        ("no_ids", "holds no token ids"),
        ("other_prompt", "answered another prompt than was sent"),
        ("added_token", r"tokens were sent and the server read \d+: it adds or cuts tokens"),
        ("html", "this is no API: it answered with '<html>a page</html>'"),
        ("400", "it answered 400: trouble"),
    ],
)
def test_an_answer_that_cannot_be_used_is_not_used(server: Server, fault: str, said: str) -> None:
    server.faults = [fault]
    engine = vllm(server)
    with pytest.raises(MachineError, match=said):
        ask(engine)
    assert len(server.seen) == 1 and engine.spend == Spend()  # not tried again


def test_weights_that_change_during_a_call_are_not_sampled_from(server: Server) -> None:
    engine = vllm(server)
    engine.version = "step-1"
    assert ask(engine)[0].weights_version == "tiny@step-1"
    server.hold_s = 0.1
    engine.poll = lambda: setattr(engine, "version", "step-2")
    with pytest.raises(MachineError, match="asked version tiny@step-1, and the server was at tiny@step-2"):
        ask(engine)


def test_a_prompt_without_room_is_refused_here(server: Server) -> None:
    engine = vllm(server)
    engine.context = len(GIVEN[0]) + 2
    (t,) = ask(engine)
    assert (len(t.completion), t.finish, server.seen[-1]["max_tokens"]) == (2, "length", 2)
    engine.context = len(GIVEN[0])
    with pytest.raises(DataError, match=f"has {len(GIVEN[0])} tokens; the server takes"):
        ask(engine)


def test_what_the_api_has_not_is_refused_and_not_left_out(server: Server) -> None:
    for sampling, name in ((Sampling(top_k=5), "top_k"), (Sampling(min_p=0.1), "min_p")):
        with pytest.raises(ConfigError, match=rf"sampling.{name}  this API has no {name}"):
            ask(remote(server), sampling)
    engine = vllm(server)
    with pytest.raises(ConfigError, match="in another order"):
        ask(engine, Sampling(top_p=0.9, min_p=0.1))
    assert not server.seen
    greedy = ask(engine)[0].completion
    for sampling in (Sampling(top_k=1, max_new_tokens=6), Sampling(min_p=0.999, max_new_tokens=6)):
        assert ask(engine, sampling)[0].completion == greedy


# ---- what is sent, and what is kept


def test_nothing_is_left_to_the_servers_defaults(server: Server) -> None:
    engine = vllm(server)
    engine.end_ids = (7, 8)
    ask(engine, Sampling(temperature=0.7, top_p=0.9, max_new_tokens=5, stop=("x",), seed=1))
    sent = server.seen[-1]
    assert (sent["temperature"], sent["top_p"], sent["top_k"], sent["min_p"]) == (0.7, 0.9, 0, 0.0)
    assert (sent["repetition_penalty"], sent["presence_penalty"], sent["frequency_penalty"]) == (1.0, 0, 0)
    assert (sent["stop"], sent["stop_token_ids"], sent["skip_special_tokens"]) == (["x"], [7, 8], False)
    assert sent["prompt"] == list(GIVEN[0]) and "messages" not in sent


def test_tokens_past_a_stop_string_are_paid_for_and_dropped(server: Server) -> None:
    text = ask(vllm(server))[0].text
    sampling = Sampling(temperature=0.0, max_new_tokens=6, stop=(text[2:4],))
    (want,) = ask(vllm(server), sampling)
    server.faults = ["past_stop"]
    (found,) = ask(vllm(server), sampling)
    assert (found.completion, found.text, found.logprobs) == (want.completion, want.text, want.logprobs)
    assert found.cost.sampled_tokens == want.cost.sampled_tokens + 2


@pytest.mark.parametrize(
    ("more", "how", "sampled"),
    [
        ({}, "estimated", 6),  # by the tokenizer
        ({"logprobs": True}, "estimated", 6),
        ({"prompts": "ids"}, "estimated", 6),
    ],
)
def test_missing_usage_is_marked(server: Server, more: dict[str, Any], how: str, sampled: int) -> None:
    server.faults = ["", "no_usage"]
    engine = remote(server, **more)
    (reported,), (found,) = ask(engine), ask(engine)
    assert reported.meta["usage"] == "reported" and found.meta["usage"] == how
    assert found.cost == Spend(prefill_tokens=len(GIVEN[0]), sampled_tokens=sampled) == reported.cost
    assert engine.describe()["usage"] == {"reported": 1, how: 1}


def test_ids_that_were_sent_and_returned_need_no_usage(server: Server) -> None:
    server.faults = ["no_usage"]
    assert ask(vllm(server))[0].meta["usage"] == "counted"


def test_a_budget_cuts_samples_whose_ids_are_unknown() -> None:
    with serving("text") as fake:
        found = ask(remote(fake, logprobs=True), Sampling(max_new_tokens=6), rows=2)
    kept = within(found, found[0].cost.sampled_tokens + 2)
    assert [t.finish for t in kept] == ["length", "budget"]
    assert kept[1].tokens == GIVEN[0] and kept[1].cost.sampled_tokens == 2 == len(kept[1].logprobs or ())


def test_scoring_shares_requests_and_counts_what_is_sent(server: Server) -> None:
    engine = vllm(server)
    root = engine.prefill(GIVEN[0])
    child, other = engine.prefill((5, 6), root), engine.prefill((9,), root)
    server.faults = ["500"]
    root_scores, child_scores, other_scores = engine.score([root, child, other])
    assert len(server.seen) == 3  # two leaves, one of them twice
    assert [len(s) for s in (root_scores, child_scores, other_scores)] == [len(GIVEN[0]) - 1, 2, 1]
    size = len(GIVEN[0])
    sent = (size + 2) + (size + 1) + server.seen[0]["prompt"].__len__()
    assert engine.spend.prefill_tokens + engine.spend.scored_tokens == sent
    assert engine.spend.scored_tokens == size - 1 + 2 + 1 and engine.spend.sampled_tokens == 2


# ---- many at once


def test_many_run_at_once_and_no_more_than_allowed() -> None:
    with serving(hold_s=0.05) as fake:
        engine = vllm(fake, in_flight=4)
        found = ask(engine, Sampling(max_new_tokens=2), rows=12)
        assert [t.id for t in found] == [f"0/{s}" for s in range(12)]
        assert fake.most_at_once == 4
        assert len(fake.seen) == 12 and fake.connections == 4  # each kept for the next request
        assert {t.meta["attempts"] for t in found} == {1}


def test_giving_up_leaves_nothing_under_way() -> None:
    with serving() as fake:
        fake.faults = ["hang"] * 4
        engine = vllm(fake, in_flight=4)
        calls = iter(range(6))

        def poll() -> None:
            if next(calls, None) is None:
                raise KeyboardInterrupt

        engine.poll = poll
        with pytest.raises(KeyboardInterrupt):
            ask(engine, rows=20)
        seen = len(fake.seen)
        end = time.monotonic() + 5
        while any(t.name == "burnish endpoint" for t in threading.enumerate()) and time.monotonic() < end:
            time.sleep(0.01)
        assert not [t for t in threading.enumerate() if t.name == "burnish endpoint"]
        assert len(fake.seen) == seen == 4  # the others were never sent


# ---- keys and addresses


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_NAME, KEY)
    with serving(key=KEY) as fake:
        good = Endpoint(fake.url, backoff_s=0.001, attempts=2)
        assert "tiny" in models(good) and fake.headers[-1]["Authorization"] == f"Bearer {KEY}"
        fake.faults = ["500"] * 2
        said = [repr(good)]
        with pytest.raises(MachineError) as error:
            good.ask(Request("POST", "/completions", {}))
        said.append(str(error.value))
        monkeypatch.setenv(KEY_NAME, KEY + "-old")
        with pytest.raises(Refused, match=r"the key was not accepted: Incorrect API key provided: Bearer \*\*\*") as refused:
            models(Endpoint(fake.url))
        said += [str(refused.value), str(VllmEngine(good, "tiny", tokenizer=WORDS).describe())]
        monkeypatch.setenv(KEY_NAME, KEY + "\n")
        with pytest.raises(ConfigError, match=KEY_NAME) as odd:
            Endpoint(fake.url)
        said.append(str(odd.value))
        monkeypatch.delenv(KEY_NAME)
        with pytest.raises(Refused, match="it wants a key") as none:
            models(Endpoint(fake.url))
        assert f"export {KEY_NAME}" in str(none.value)
    assert not [text for text in said if KEY in text] and "***" in said[1]


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
        ("https://host/api/v1", "https://host/api/v1"),
        ("https://host/v1beta/openai/", "https://host/v1beta/openai"),
        ("https://host/deep", "https://host/deep/v1"),
    ],
)
def test_addresses(url: str, found: str) -> None:
    assert address(url) == found


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://user:sk-1@host", "http://host?key=sk-1"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError, match="http://") as error:
        address(url)
    assert "sk-1" not in str(error.value)


def test_nobody_there() -> None:
    import socket

    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(MachineError, match=rf"GET http://127.0.0.1:{port}/v1/models  it cannot be reached: .*refused") as error:
        models(Endpoint(f"http://127.0.0.1:{port}"))
    assert "is the server up" in str(error.value)


def test_the_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain proxy gets the whole address; loopback is never sent there."""
    with serving() as fake:
        monkeypatch.setenv("http_proxy", fake.url)
        monkeypatch.setenv("no_proxy", "")
        far = Endpoint("http://far.example", key="")
        with pytest.raises(Refused, match=r"GET http://far\.example/v1/models  it answered 404"):
            far.ask(Request("GET", "/models"))  # our server takes no whole addresses
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        assert endpoint(fake).ask(Request("GET", "/models")) == Answer(fake.models())


# ---- connecting: what a server can do is asked and tried


def test_a_vllm_server_is_recognised(server: Server) -> None:
    engine = connect(endpoint(server), "tiny", tokenizer=WORDS, end_ids=(7,), version="3")
    assert isinstance(engine, VllmEngine) and engine.can == {"ids", "logprobs", "score"}
    assert (engine.context, engine.end_ids, engine.weights_version) == (512, (7,), "tiny@3")


@pytest.mark.parametrize(("kind", "way"), [("openai", "ids"), ("text", "text")])
def test_ids_where_the_server_takes_them_else_text(kind: str, way: str) -> None:
    with serving(kind) as fake:
        engine = connect(endpoint(fake), "tiny", tokenizer=WORDS)
        assert (engine.prompts, engine.can, engine.context) == (way, {"logprobs"}, None)
        assert ask(engine)[0].sampler["prompts"] == way


def test_a_server_that_adds_tokens_to_ids_is_given_text() -> None:
    with serving("openai") as fake:
        fake.faults = ["added_token"]
        assert connect(endpoint(fake), "tiny", tokenizer=WORDS).prompts == "text"


@pytest.mark.parametrize("kind", ["vllm", "openai", "text"])
def test_logprobs_after_the_cut_are_not_offered(kind: str) -> None:
    with serving(kind, honest=False) as fake:
        engine = connect(endpoint(fake), "tiny", tokenizer=WORDS)
        assert engine.can == ({"ids"} if kind == "vllm" else set())
        assert ask(engine)[0].logprobs is None and "logprobs" not in fake.seen[-1]


def test_chat_needs_no_tokenizer() -> None:
    with serving("chat") as fake:
        engine = connect(endpoint(fake), "tiny", api="chat")
        assert engine.can == {"logprobs"} and engine.describe()["prompts"] == "chat"
        said = [Message("system", "be kind"), Message("user", "how much is 2 + 2?")]
        node = engine.prefill(Conversation().prompt(said))
        fake.faults = ["", "no_usage"]
        sampling = Sampling(max_new_tokens=5, seed=2)
        found = engine.sample([node] * 2, sampling, [(0, 0), (0, 1)])
        assert fake.seen[-1]["messages"] == [{"role": m.role, "content": m.content} for m in said]
        assert [len(t.logprobs or ()) for t in found] == [5, 5] == [t.meta["logprobs_of"] for t in found]
        assert found[0].text != found[1].text
        ways = [t.meta["usage"] for t in found]
        assert sorted(ways) == ["estimated", "reported"]
        other = found[ways.index("estimated")]
        assert other.cost.prefill_tokens == -(-len(node.ids) // 4)  # four bytes a token
        with pytest.raises(ConfigError, match="a chat API takes messages, and these are token ids"):
            engine.sample([engine.prefill((300, 4))], sampling, [(0, 0)])
        with pytest.raises(DataError, match="ends with a user or a tool turn"):
            Conversation().prompt([Message("assistant", "hello")])


CONNECT: list[tuple[str, dict[str, Any], type[BurnishError], str]] = [
    ("vllm", {"model": "tinny"}, ConfigError, r"has no model 'tinny'. Did you mean 'tiny'\?\n  it has: tiny, other"),
    ("nothing", {}, ConfigError, "there is no list of models here\n  type the address"),
    ("vllm", {"tokenizer": None}, ConfigError, "--tokenizer, or let the server render them with --api chat"),
    ("chat", {}, ConfigError, "the server has no completions\n  let the server render prompts: --api chat"),
    ("vllm", {"api": "chat", "faults": ["404"]}, ConfigError, "the server has no /chat/completions"),
    ("vllm", {"faults": ["401"]}, Refused, "it wants a key"),
    ("openai", {"api": "vllm"}, MachineError, "lacks token ids|holds no token ids"),
]


@pytest.mark.parametrize(("kind", "more", "error", "said"), CONNECT)
def test_what_cannot_be_connected(kind: str, more: dict[str, Any], error: type[BurnishError], said: str) -> None:
    with serving(kind) as fake:
        more = {"model": "tiny", "tokenizer": WORDS} | more
        fake.faults = more.pop("faults", [])

        def use() -> Any:
            engine = connect(endpoint(fake, attempts=1), **more)
            fake.faults = ["no_ids"] if kind == "openai" else []
            return ask(engine)

        call: Callable[[], Any] = use
        with pytest.raises(error, match=said):
            call()
