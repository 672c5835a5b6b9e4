"""The local engine against transformers' own generate, and against itself in other orders, splits and memories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from burnish.core.errors import ConfigError, DataError, DivergedError, MachineError
from burnish.core.ledger import forward_flops
from burnish.core.records import Sampling, Spend, Trajectory
from burnish.engines.base import Node, StaleNodeError
from burnish.engines.local import lean, plans
from burnish.engines.local import rollout as rollout_module
from burnish.engines.local.engine import LocalEngine
from burnish.maths.kernels import FEW, Kernels, kernels_for
from burnish.models.adapters import lora
from burnish.models.policy import Policy
from tests.engines.chi_square import chi_square
from tests.engines.policies import generated, own_logprobs, policy, prompts, reference

GREEDY = Sampling(temperature=0.0, max_new_tokens=20)
WARM = Sampling(temperature=1.0, max_new_tokens=12, seed=3)
SHARING = {"slots": 2**60, "mixed": 2**12, "shared": 0}


@pytest.fixture(params=SHARING)
def sharing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Prefixes copied into slots, attended to as shared blocks, or the long ones only."""
    monkeypatch.setattr(plans, "SHARED_BYTES", SHARING[request.param])
    return request.param


def without_kernels(engine: LocalEngine) -> None:
    """Decode by torch's operations, as where there is no compiler."""
    assert engine.weights.lean is not None
    engine.weights.lean.kernels = None


def run(
    engine: LocalEngine, given: Sequence[tuple[int, ...]], sampling: Sampling, samples: int = 1
) -> list[Trajectory]:
    nodes = engine.prefill_many(given)
    rows = [(node, (i, s)) for i, node in enumerate(nodes) for s in range(samples)]
    return engine.sample([node for node, _ in rows], sampling, [key for _, key in rows])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_greedy_is_generate_and_logprobs_are_the_models_own(name: str, sharing: str) -> None:
    given = prompts(32)
    assert sum(len(p) > 7 for p in given) > 16  # longer than the window
    engine = LocalEngine(policy(name), rows=12)
    found = run(engine, given, GREEDY)
    assert [t.completion for t in found] == generated(name, 32, 20)
    scores = engine.score([engine.prefill(t.completion, engine.prefill(p)) for p, t in zip(given, found)])
    for prompt, trajectory, scored in zip(given, found, scores):
        assert trajectory.tokens[: len(prompt)] == prompt
        assert trajectory.logprobs == pytest.approx(scored, abs=1e-4)
        assert trajectory.logprobs == pytest.approx(own_logprobs(name, trajectory.tokens, len(prompt)), abs=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])  # softcap; sinks
def test_unusual_attention(name: str, sharing: str) -> None:
    given = prompts(8)
    found = run(LocalEngine(policy(name), rows=3), given, GREEDY)
    assert [t.completion for t in found] == generated(name, 8, 20)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_logprobs_of_samples_are_untempered_and_untruncated(name: str, sharing: str) -> None:
    given = prompts(6)
    sampling = Sampling(temperature=0.5, top_k=20, top_p=0.9, max_new_tokens=12)
    for t in run(LocalEngine(policy(name), rows=7), given, sampling, samples=3):  # rows of one node at unequal lengths
        first = len(t.tokens) - len(t.completion)
        assert t.logprobs == pytest.approx(own_logprobs(name, t.tokens, first), abs=1e-4)


def _tokens(found: Sequence[Trajectory]) -> dict[str, tuple[int, ...]]:
    return {t.id: t.completion for t in found}


def _mismatches(a: dict[str, tuple[int, ...]], b: dict[str, tuple[int, ...]]) -> int:
    assert a.keys() == b.keys()
    return sum(a[k] != b[k] for k in a)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_tokens_do_not_depend_on_order_or_split(name: str) -> None:
    engine = LocalEngine(policy(name))
    rows = [(ids, (i, s)) for i, ids in enumerate(prompts(16)) for s in range(3)]

    def sample(chosen: Sequence[int], rows_at_once: int = 512) -> dict[str, tuple[int, ...]]:
        engine.rows = rows_at_once
        nodes = engine.prefill_many([rows[i][0] for i in chosen])
        return _tokens(engine.sample(nodes, WARM, [rows[i][1] for i in chosen]))

    whole = sample(range(48))
    assert len(set(whole.values())) > 40  # samples of one prompt differ
    permuted = sample(torch.randperm(48, generator=torch.Generator().manual_seed(1)).tolist())
    split = sample(range(17)) | sample(range(17, 18)) | sample(range(18, 48))
    few = sample(range(48), rows_at_once=7)
    alone = sample(range(0, 48, 4), rows_at_once=1)
    # rounding may break a near-tie: of 48 rows of 12 tokens none or almost none
    assert [_mismatches(whole, other) <= 1 for other in (permuted, split, few)] == [True] * 3
    assert _mismatches({k: whole[k] for k in alone}, alone) <= 1


def test_noise_follows_seed_item_and_sample() -> None:
    engine = LocalEngine(policy("llama"))
    node = engine.prefill(prompts(1)[0])
    keys = [(0, 0), (0, 1), (1, 0)]
    a, b, c = engine.sample([node] * 3, WARM, keys)
    assert len({a.completion, b.completion, c.completion}) == 3
    again = engine.sample([node], WARM, keys[1:2])[0]
    other = engine.sample([node], Sampling(max_new_tokens=12, seed=4), keys[1:2])[0]
    assert again.completion == b.completion != other.completion


def test_slots_grow_and_late_rows_take_over(sharing: str) -> None:
    model, given = policy("gemma3", seed=5), prompts(8, 1, 9)
    sampling = Sampling(temperature=1.0, max_new_tokens=110, seed=1)
    engine = LocalEngine(model, rows=3)
    found = run(engine, given, sampling)
    assert engine.arena.size >= 110  # doubled from room for 64 and the prompt
    lengths = sorted(len(t.completion) for t in found)
    assert lengths[0] < 50 and lengths[-1] == 110
    assert _mismatches(_tokens(found), _tokens(run(LocalEngine(model), given, sampling))) <= 1


def test_little_memory_reads_again_and_says_the_same() -> None:
    given = prompts(20, shortest=20)
    roomy, tight = LocalEngine(policy("qwen3")), LocalEngine(policy("qwen3"), kv_bytes=60_000, prefill_tokens=64)
    want = _tokens(run(roomy, given, WARM, samples=2))
    assert _mismatches(want, _tokens(run(tight, given, WARM, samples=2))) <= 1
    assert tight.arena.spans.used <= max(tight.tokens_held, 64) < roomy.arena.spans.used
    before = tight.spend.prefill_tokens
    assert before == sum(map(len, given))
    assert _mismatches(want, _tokens(run(tight, given, WARM, samples=2))) <= 1
    assert tight.spend.prefill_tokens > before  # what was dropped was read again


def test_a_prefix_is_read_once(sharing: str) -> None:
    engine = LocalEngine(policy("llama"))
    root = engine.prefill(prompts(1, 12, 12)[0])
    again = engine.prefill(root.ids)
    assert again is root
    children = [engine.prefill((5, 6, 7), root), engine.prefill((8, 9), root), engine.prefill((5, 6, 7), root)]
    assert children[0] is children[2]
    found = engine.sample([*children[:2], *engine.fork(root, 2)], GREEDY, [(0, i) for i in range(4)])
    assert engine.spend.prefill_tokens == 12 + 3 + 2
    assert found[2].completion == found[3].completion
    for node in (root, again, *children, root, root):
        engine.free(node)
    assert not engine._nodes and engine.arena.spans.used == 0
    with pytest.raises(StaleNodeError, match="freed"):
        engine.sample([root], GREEDY, [(0, 0)])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_extending_is_prefilling_the_whole(name: str, sharing: str) -> None:
    whole = prompts(1, 37, 37)[0]
    cuts = [(), (20,), (3, 20), (1, 2, 9, 36)]
    engine = LocalEngine(policy(name))
    ends: list[Node] = []
    for cut in cuts:
        node: Node | None = None
        for a, b in zip((0, *cut), (*cut, 37)):
            node = engine.prefill(whole[a:b], node)
        assert node is not None and node.path == whole and node.end == 37
        ends.append(node)
    for sampling in (GREEDY, WARM):
        found = engine.sample(ends, sampling, [(0, 0)] * len(ends))
        assert len({t.completion for t in found}) == 1
        for t in found[1:]:
            assert t.logprobs == pytest.approx(found[0].logprobs, abs=1e-4)


def test_going_on_later_is_never_having_stopped() -> None:
    engine = LocalEngine(policy("gemma3", endless=True))
    root = engine.prefill(prompts(1, 15, 15)[0])
    whole = engine.sample([root], Sampling(max_new_tokens=14, seed=2), [(7, 1)])[0]
    part = engine.sample([root], Sampling(max_new_tokens=6, seed=2), [(7, 1)])[0]
    assert part.finish == "length" and part.completion == whole.completion[:6]
    more = engine.sample([engine.prefill(part.completion, root)], Sampling(max_new_tokens=8, seed=2), [(7, 1)])[0]
    assert more.completion == whole.completion[6:]


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_stopped_and_gone_on_with_is_what_one_call_draws(name: str, sharing: str) -> None:
    given = prompts(6)
    sampling = Sampling(temperature=0.8, max_new_tokens=20, seed=4)
    keys = [(i, s) for i in range(6) for s in range(2)]
    whole = run(LocalEngine(policy(name), rows=7), given, sampling, samples=2)
    assert len({len(t.completion) for t in whole}) > 1
    engine = LocalEngine(policy(name), rows=2)  # fewer than there are: some have not begun when it stops
    nodes = engine.prefill_many(given)
    told: list[int] = []

    def until(ended: Sequence[int]) -> bool:
        told.extend(ended)
        return len(told) >= 4

    first = [nodes[i] for i, _ in keys]
    cut = engine.sample(first, sampling, keys, until=until)
    ended = [i for i, t in enumerate(cut) if t.finish != "partial"]
    assert sorted(told) == ended and 4 <= len(ended) < 12
    assert all(t.completion == w.completion[: len(t.completion)] for t, w in zip(cut, whole))
    assert any(not t.completion for t in cut) and any(t.finish == "partial" and t.completion for t in cut)
    open_ = [i for i, t in enumerate(cut) if t.finish == "partial"]
    below = {i: engine.prefill(cut[i].completion, first[i]) for i in open_ if cut[i].completion}
    begun = {node: len(node.ids) for node in below.values()}
    rest = engine.sample([below.get(i, first[i]) for i in open_], sampling, [keys[i] for i in open_], begun=begun)
    for i, t in zip(open_, rest):
        assert cut[i].completion + t.completion == whole[i].completion and t.finish == whole[i].finish
        assert (cut[i].logprobs or ()) + (t.logprobs or ()) == pytest.approx(whole[i].logprobs, abs=1e-4)
    drawn = sum(t.cost.sampled_tokens for t in (*cut, *rest))
    assert drawn == engine.spend.sampled_tokens == sum(len(t.completion) for t in whole)


def test_what_was_begun_counts_towards_its_limit_and_its_stop_strings() -> None:
    engine = LocalEngine(policy("llama"))
    (prompt,) = prompts(1)
    (whole,) = run(engine, [prompt], GREEDY)
    text = [engine.policy.decode(whole.completion[:n], keep_special=True) for n in range(21)]
    at = next(n for n in range(4, 16) if len(text[n]) > len(text[n - 1]) and len(text[n - 1]) > len(text[n - 2]))
    stop = text[at][len(text[at - 2]) :]  # of the two tokens before `at`
    assert stop not in text[at - 1]
    (stopped,) = run(engine, [prompt], Sampling(temperature=0.0, max_new_tokens=20, stop=(stop,)))
    assert stopped.finish == "stop_string" and len(stopped.completion) == at
    node = engine.prefill(prompt)
    below = engine.prefill(whole.completion[: at - 1], node)
    one = {below: at - 1}
    (rest,) = engine.sample([below], Sampling(temperature=0.0, max_new_tokens=20, stop=(stop,)), [(0, 0)], begun=one)
    assert rest.finish == "stop_string" and rest.completion == whole.completion[at - 1 : at]
    (rest,) = engine.sample([below], GREEDY, [(0, 0)], begun=one)
    assert rest.finish == "length" and whole.completion[: at - 1] + rest.completion == whole.completion
    with pytest.raises(DataError, match="20 tokens were drawn of at most 20"):
        engine.sample([engine.prefill(whole.completion, node)], GREEDY, [(0, 0)], begun={engine.prefill(whole.completion, node): 20})


def test_scores_of_a_tree(sharing: str) -> None:
    engine = LocalEngine(policy("gemma3"), prefill_tokens=40)
    a = engine.prefill(prompts(1, 9, 9)[0])
    b, c = engine.prefill((4, 5, 6, 7), a), engine.prefill((4, 9), a)
    d, e = engine.prefill((11,), b), engine.prefill((50,))
    asked = [d, a, c, e, b, d]
    for node, scored in zip(asked, engine.score(asked)):
        assert scored == pytest.approx(own_logprobs("gemma3", node.path, max(node.start, 1)), abs=1e-4)
    assert engine.spend.scored_tokens == 1 + 8 + 2 + 0 + 4


def test_stop_strings_keep_their_token_and_cut_the_text() -> None:
    engine = LocalEngine(policy("qwen3", endless=True), rows=5)
    given = prompts(8)
    free = run(engine, given, GREEDY)
    stop = (free[0].text[4:7], free[1].text[0], free[2].text[-2:], "never said")
    found = run(engine, given, Sampling(temperature=0.0, max_new_tokens=20, stop=stop))
    for plain, t in zip(free, found):
        # a character a token: the first place where any stop string is complete
        ends = [plain.text.find(s) + len(s) for s in stop if s in plain.text]
        end = min(ends, default=20)
        assert t.completion == plain.completion[:end]
        assert t.logprobs == pytest.approx(plain.logprobs[:end], abs=1e-4)
        assert t.finish == ("stop_string" if ends else "length")
        begin = min((plain.text[:end].find(s) for s in stop if s in plain.text[:end]), default=20)
        assert t.text == plain.text[:begin]
    assert {t.finish for t in found} == {"stop_string", "length"}


def test_end_tokens_end_a_row() -> None:
    free = run(LocalEngine(policy("qwen3", endless=True)), prompts(8), GREEDY)
    ends = free[0].completion[3], free[1].completion[0]
    found = run(LocalEngine(policy("qwen3", endless=True), end_ids=ends), prompts(8), GREEDY)
    for plain, t in zip(free, found):
        at = next((i + 1 for i, token in enumerate(plain.completion) if token in ends), None)
        assert t.completion == plain.completion[:at]
        assert t.finish == ("length" if at is None else "stop")
        assert t.text == (plain.text if at is None else plain.text[: at - 1])
    assert len(found[1].completion) == 1


def test_weights_that_changed_refuse_old_nodes() -> None:
    model = policy("llama")
    engine = LocalEngine(model)
    old, unread = engine.prefill((5, 6, 7)), engine.prefill((5, 6, 8))
    before = engine.sample([old], GREEDY, [(0, 0)])[0]
    model.version += 1
    with torch.no_grad():
        model.head_weight().mul_(-1.0)
    with pytest.raises(StaleNodeError, match="version 0; the policy is at 1"):
        engine.sample([old], GREEDY, [(0, 0)])
    with pytest.raises(StaleNodeError):
        engine.prefill((9,), old)
    new = engine.prefill((5, 6, 7))
    assert new is not old
    found = engine.sample([new, unread], GREEDY, [(0, 0), (1, 0)])
    assert found[0].weights_version == "1" and before.weights_version == "0"
    assert found[0].completion != before.completion
    engine.free(old)
    assert engine.prefill((5, 6, 7)) is new


def test_spend_is_exact() -> None:
    engine = LocalEngine(policy("gemma3"))
    given = prompts(7)
    found = run(engine, given, WARM, samples=3)
    nodes = engine.prefill_many(given)
    assert engine.spend.sampled_tokens == sum(len(t.completion) for t in found)
    assert engine.spend.prefill_tokens == sum(map(len, given))
    alone = sum((t.cost for t in found), sum((n.cost for n in nodes), Spend()))
    assert engine.spend.executed_flops < alone.executed_flops  # samples that agree are one row; each is charged as if alone
    assert engine.spend.useful_flops <= engine.spend.executed_flops
    shape = engine.shape
    # what was launched: a head row for every distinct beginning of a completion, a body row for every one that is not empty
    begun = {(i, t.completion[:j], len(given[i])) for i, t in zip([i for i in range(7) for _ in range(3)], found) for j in range(len(t.completion))}
    steps = [forward_flops(shape, len(said) > 0, 1, [(first + len(said) - 1, 1)] if said else []) for _, said, first in begun]
    assert engine.spend.useful_flops == sum(n.cost.useful_flops for n in nodes) + sum(steps)
    for t in found:
        prompt = len(t.tokens) - len(t.completion)
        # prompt and completion read as one, the last token unread, a head row for every token drawn
        whole = forward_flops(shape, len(t.tokens) - 1, len(t.completion), [(0, len(t.tokens) - 1)])
        assert t.cost.useful_flops == whole - forward_flops(shape, prompt, 0, [(0, prompt)])


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.5])
def test_samples_that_agree_are_one_row_and_the_same_tokens(temperature: float, sharing: str) -> None:
    # alone, a sample shares a row with nobody: the same noise has to give it the same tokens and log-probabilities
    given, sampling = prompts(6), Sampling(temperature=temperature, max_new_tokens=14, seed=5)
    together = run(LocalEngine(policy("gemma3"), rows=9), given, sampling, samples=12)
    engine = LocalEngine(policy("gemma3"))
    nodes = engine.prefill_many(given)
    alone = [engine.sample([node], sampling, [(i, s)])[0] for i, node in enumerate(nodes) for s in range(12)]
    assert _mismatches(_tokens(alone), _tokens(together)) <= 1
    for a, b in zip(alone, together):
        if a.completion == b.completion:
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4) and a.finish == b.finish and a.cost.useful_flops == b.cost.useful_flops


def test_rows_split_only_where_samples_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, sizes = LocalEngine(policy("qwen3", endless=True), rows=64), list[int]()
    plain = engine.weights.body
    monkeypatch.setattr(engine.weights, "body", lambda tokens, position, plan: (sizes.append(len(tokens)), plain(tokens, position, plan))[1])
    found = run(engine, prompts(2), Sampling(temperature=0.6, max_new_tokens=6, seed=1), samples=10)
    said = [(i // 10, t.completion) for i, t in enumerate(found)]
    want = [len({(i, c[: j + 1]) for i, c in said}) for j in range(5)]
    assert sizes[-5:] == want and want[0] < 20


def test_executed_flops_are_what_torch_counts(sharing: str) -> None:
    # softcapped attention is plain products, which torch's counter sees
    engine = LocalEngine(policy("gemma2"), rows=5)
    without_kernels(engine)
    with FlopCounterMode(display=False) as counter:
        run(engine, prompts(4), WARM, samples=2)
    assert engine.spend.executed_flops == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.skipif(kernels_for(torch.float32) is None, reason="no C compiler")
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gemma2"])
def test_kernels_do_no_more_than_needed_and_agree_with_plain_operations(name: str, sharing: str) -> None:
    fused, plain = LocalEngine(policy(name)), LocalEngine(policy(name))
    without_kernels(plain)
    given = prompts(9)
    a, b = run(fused, given, WARM, samples=3), run(plain, given, WARM, samples=3)
    assert _mismatches(_tokens(a), _tokens(b)) <= 1
    for x, y in zip(a, b):
        if x.completion == y.completion:
            assert x.logprobs == pytest.approx(y.logprobs, abs=1e-4)
    assert fused.spend.useful_flops == plain.spend.useful_flops and fused.spend.executed_flops < plain.spend.executed_flops
    if sharing == "slots":  # every key a row sees, and no other
        read = sum((n.cost for n in fused.prefill_many(given)), Spend())
        assert fused.spend.executed_flops - read.executed_flops == fused.spend.useful_flops - read.useful_flops


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral", "gemma2"])
def test_the_lean_body_is_used_and_the_models_own_where_it_cannot_be(name: str) -> None:
    engine = LocalEngine(policy(name))
    assert engine.policy.decisions["decode"]["value"] == "lean"
    without_kernels(engine)
    assert [t.completion for t in run(engine, prompts(8), GREEDY)] == generated(name, 8, 20)
    engine.weights.lean = None
    assert [t.completion for t in run(engine, prompts(8), GREEDY)] == generated(name, 8, 20)


@pytest.mark.skipif(kernels_for(torch.float32) is None, reason="no C compiler")
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_a_few_rows_read_the_weights_where_they_lie_and_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = prompts(3)
    want = run(LocalEngine(policy(name)), given, WARM)
    monkeypatch.setattr(lean, "FEW_FROM_BYTES", 0)
    calls: list[int] = []
    few_rows = Kernels.few_rows

    def counted(self: Kernels, weights: Any, biases: Any) -> Any:
        product = few_rows(self, weights, biases)
        return lambda x: (calls.append(len(x)), product(x))[1]

    monkeypatch.setattr(Kernels, "few_rows", counted)
    got = run(LocalEngine(policy(name)), given, WARM)
    assert calls and max(calls) <= FEW
    assert [t.completion for t in got] == [t.completion for t in want]
    for x, y in zip(got, want):
        assert x.logprobs == pytest.approx(y.logprobs, abs=1e-4)


@pytest.mark.skipif(kernels_for(torch.float32) is None, reason="no C compiler")
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_weights_that_are_bf16s_numbers_are_read_as_such_until_they_are_trained(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[torch.dtype] = []
    few_rows = Kernels.few_rows

    def seen(self: Kernels, weights: Any, biases: Any) -> Any:
        read.append(weights[0].dtype)
        return few_rows(self, weights, biases)

    monkeypatch.setattr(Kernels, "few_rows", seen)
    monkeypatch.setattr(lean, "FEW_FROM_BYTES", 0)
    LocalEngine(policy(name))
    assert read and set(read) == {torch.float32}  # random numbers of float32 are none of bf16's

    def rounded() -> Policy:
        model = policy(name)
        with torch.no_grad():
            for p in model.model.parameters():
                p.copy_(p.bfloat16())
        return model

    read.clear()
    model, given = rounded(), prompts(3)
    engine = LocalEngine(model)
    got = run(engine, given, WARM)
    assert read and set(read) == {torch.bfloat16}
    read.clear()
    model.version += 1
    engine.sample([engine.prefill(given[0])], WARM, [(0, 0)])
    assert read and set(read) == {torch.float32}
    monkeypatch.setattr(lean, "halves_weights", lambda policy: False)
    want = run(LocalEngine(rounded()), given, WARM)
    assert [t.completion for t in got] == [t.completion for t in want]
    for x, y in zip(got, want):
        assert x.logprobs == pytest.approx(y.logprobs, abs=1e-4)


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_a_body_that_is_not_understood_is_run_as_it_is(name: str) -> None:
    model = policy(name)
    LocalEngine(model)
    assert model.decisions["decode"]["value"] == "own" and "transformers' own modules" in model.decisions["decode"]["why"]


def test_a_lean_body_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean.Norm, "scaled", lambda self, x, weight: 1.01 * x)
    model = policy("llama")
    LocalEngine(model)
    assert "differ from the model's own" in model.decisions["decode"]["why"]


@pytest.mark.parametrize("kernels", [True, False])
def test_adapters_are_merged_into_the_engines_copy_and_follow_the_version(kernels: bool) -> None:
    base = policy("gemma3")
    base.requires_grad_(False)
    adapted = lora(base, rank=4)
    engine = LocalEngine(adapted)
    if not kernels:
        without_kernels(engine)
    given = prompts(8)
    assert [t.completion for t in run(engine, given, GREEDY)] == generated("gemma3", 8, 20)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    adapted.version += 1
    found = run(engine, given, GREEDY)
    assert [t.completion for t in found] != generated("gemma3", 8, 20)
    for prompt, t in zip(given, found):
        (scored,) = engine.score([engine.prefill(t.completion, engine.prefill(prompt))])  # through peft's own layers
        assert t.logprobs == pytest.approx(scored, abs=1e-4)


def test_a_poll_that_raises_leaves_the_engine_usable() -> None:
    steps = iter(range(3))

    def stop_after_three() -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt

    engine = LocalEngine(policy("qwen3"), rows=5)
    want = run(engine, prompts(8), WARM)
    engine.poll = stop_after_three
    with pytest.raises(KeyboardInterrupt):
        run(engine, prompts(8), WARM)
    engine.poll = None
    assert run(engine, prompts(8), WARM) == want


def test_logits_are_made_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = policy("gemma3"), prompts(12)
    whole = run(LocalEngine(model), given, WARM)
    monkeypatch.setattr(rollout_module, "LOGITS_BYTES", 4 * 97 * 5)
    assert _mismatches(_tokens(whole), _tokens(run(LocalEngine(model), given, WARM))) <= 1


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_half_precision_agrees_with_scoring_to_its_rounding(name: str, sharing: str) -> None:
    engine = LocalEngine(policy(name, dtype=torch.bfloat16), rows=7)
    given = prompts(12)
    found = run(engine, given, WARM)
    scores = engine.score([engine.prefill(t.completion, engine.prefill(p)) for p, t in zip(given, found)])
    gaps = torch.tensor([abs(a - b) for t, s in zip(found, scores) for a, b in zip(t.logprobs or (), s)])
    assert float(gaps.mean()) < 0.05 and float(gaps.max()) < 0.5


def test_the_context_is_a_limit() -> None:
    model = policy("llama", endless=True, max_position_embeddings=24)
    engine = LocalEngine(model)
    with pytest.raises(DataError, match="25 tokens; the model was built for 24"):
        engine.prefill(range(3, 28))
    child = engine.prefill(range(3, 13), engine.prefill(range(3, 13)))
    with pytest.raises(DataError, match="25 tokens"):
        engine.prefill(range(3, 8), child)
    short, full = engine.prefill(range(3, 7)), engine.prefill(range(3, 7), child)
    with pytest.raises(DataError, match="nothing can follow"):
        engine.sample([short, full], GREEDY, [(0, 0), (1, 0)])
    found = engine.sample([child, short], GREEDY, [(0, 0), (1, 0)])
    assert [(len(t.completion), t.finish) for t in found] == [(4, "length"), (20, "length")]


def test_what_is_refused() -> None:
    engine = LocalEngine(policy("llama"))
    node = engine.prefill((4, 5))
    for ids in ((), (97,), (4, -1)):
        with pytest.raises(DataError):
            engine.prefill(ids)
    with pytest.raises(ConfigError, match="1 keys for 2 nodes"):
        engine.sample([node, node], GREEDY, [(0, 0)])
    with pytest.raises(ConfigError, match="given twice"):
        engine.sample([node, node], WARM, [(0, 0), (0, 0)])
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}, {"stop": ("",)}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            engine.sample([node], Sampling(**wrong), [(0, 0)])
    with pytest.raises(ConfigError, match=r"engine\.rows"):
        LocalEngine(policy("llama"), rows=0)
    assert engine.sample([], GREEDY, []) == [] and engine.score([]) == []
    with torch.no_grad():
        engine.policy.head_weight()[7, 0] = float("nan")
    with pytest.raises(DivergedError):
        engine.sample([node], WARM, [(0, 0)])


def test_a_model_that_cannot_share_is_refused() -> None:
    with pytest.raises(MachineError, match="conv"):
        LocalEngine(policy("lfm2"))


def test_sampled_frequencies_are_the_models(sharing: str) -> None:
    engine = LocalEngine(policy("gemma3"), rows=700)
    ids = prompts(1, 12, 12)[0]
    node = engine.prefill(ids)
    n = 3000
    sampling = Sampling(temperature=0.7, max_new_tokens=2, seed=11)
    found = engine.sample([node] * n, sampling, [(0, s) for s in range(n)])
    first = torch.tensor([t.completion[0] for t in found])
    with torch.no_grad():
        exact = (reference("gemma3")(torch.tensor([ids])).logits[0, -1].double() / 0.7).softmax(-1)
    assert chi_square(torch.bincount(first, minlength=97), exact) < 1
    token = int(first.mode().values)
    second = torch.tensor([t.completion[1] for t in found if t.completion[0] == token and len(t.completion) == 2])
    with torch.no_grad():
        exact = (reference("gemma3")(torch.tensor([[*ids, token]])).logits[0, -1].double() / 0.7).softmax(-1)
    assert chi_square(torch.bincount(second, minlength=97), exact) < 1
