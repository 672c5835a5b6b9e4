"""A real vLLM server against the local engine on the same weights: run by hand, nothing here starts a server.

In an environment of its own (it wants a GPU, or vLLM's CPU build), with a model folder that both can read:

    pip install vllm
    vllm serve FOLDER --served-model-name peer --dtype float32 --enforce-eager --max-model-len 512 --port 8000

Then, in burnish's environment:

    BURNISH_VLLM_URL=http://127.0.0.1:8000 BURNISH_VLLM_MODEL=FOLDER python -m pytest -m peer tests/engines/test_vllm_peer.py -s

FOLDER is any Hugging Face folder with a chat template that fits in memory, such as Qwen3-0.6B. For the test of processed
log-probabilities, start a second server with --logprobs-mode processed_logprobs and name it in BURNISH_VLLM_PROCESSED_URL.
bf16 servers agree less: set BURNISH_VLLM_TOLERANCE=0.1 (log-probabilities) then. Another server's name: BURNISH_VLLM_NAME.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import pytest

from burnish.core.errors import MachineError
from burnish.core.records import Message, Sampling, Trajectory
from burnish.data.chat import ChatFormat
from burnish.engines.connect import connect
from burnish.engines.endpoint import Endpoint
from burnish.engines.local.engine import LocalEngine
from burnish.engines.vllm import VllmEngine
from burnish.models.load import load_policy

URL = os.environ.get("BURNISH_VLLM_URL", "")
FOLDER = os.environ.get("BURNISH_VLLM_MODEL", "")
NAME = os.environ.get("BURNISH_VLLM_NAME", "peer")
PROCESSED_URL = os.environ.get("BURNISH_VLLM_PROCESSED_URL", "")
TOLERANCE = float(os.environ.get("BURNISH_VLLM_TOLERANCE", "1e-3"))
pytestmark = [pytest.mark.peer, pytest.mark.skipif(not (URL and FOLDER), reason="needs a vLLM server: see the top of this file")]
ASKED = ["How much is 2 + 3?", "Name three rivers of Europe.", "Say one word.", "What is the capital of Peru?", "Count to twelve."]


@cache
def both() -> tuple[LocalEngine, VllmEngine, list[tuple[int, ...]]]:
    policy = load_policy(FOLDER, dtype="float32")
    chat = ChatFormat(policy.tokenizer)
    there = connect(Endpoint(URL), NAME, tokenizer=policy.tokenizer, end_ids=chat.end_ids)
    assert isinstance(there, VllmEngine)
    return LocalEngine(policy, end_ids=chat.end_ids), there, [chat.prompt([Message("user", text)]) for text in ASKED]


def rows(engine: Any, sampling: Sampling, samples: int = 1) -> list[Trajectory]:
    nodes = [engine.prefill(ids) for ids in both()[2]]
    return engine.sample([n for n in nodes for _ in range(samples)], sampling, [(i, s) for i in range(len(nodes)) for s in range(samples)])


def test_greedy_agrees_up_to_rounding() -> None:
    """A near-tie may fall the other way, and everything after it differs; most rows must agree to the end."""
    here, there, _ = both()
    sampling = Sampling(temperature=0.0, max_new_tokens=32)
    pairs = list(zip(rows(here, sampling), rows(there, sampling)))
    same = sum((a.completion, a.text, a.finish) == (b.completion, b.text, b.finish) for a, b in pairs)
    print(f"{same} of {len(pairs)} greedy rows are equal")
    assert same >= len(pairs) - 1
    assert all(a.completion[:4] == b.completion[:4] for a, b in pairs)


def test_logprobs_are_the_models_own_at_any_temperature() -> None:
    """What vLLM reports, what it scores, and what the local engine scores are one thing."""
    here, there, prompts = both()
    assert there.can == {"ids", "logprobs", "score"}
    worst = 0.0
    for t in rows(there, Sampling(temperature=0.6, top_p=0.9, top_k=20, max_new_tokens=24, seed=5)):
        first = len(t.tokens) - len(t.completion)
        ours = here.score([here.prefill(t.completion, here.prefill(t.tokens[:first]))])[0]
        theirs = there.score([there.prefill(t.completion, there.prefill(t.tokens[:first]))])[0]
        assert t.logprobs == pytest.approx(theirs, abs=TOLERANCE) and t.logprobs == pytest.approx(ours, abs=TOLERANCE)
        worst = max(worst, *(abs(a - b) for a, b in zip(t.logprobs or (), ours)))
    print(f"log-probabilities differ by {worst:.1e} at most")
    assert len(prompts) == len(ASKED)


def test_seeds_limits_and_stop_strings() -> None:
    _, there, _ = both()
    warm = Sampling(temperature=1.0, max_new_tokens=16, seed=2)
    first, again = rows(there, warm, 2), rows(there, warm, 2)
    assert [t.completion for t in first] == [t.completion for t in again]
    assert len({t.completion for t in first}) > len(first) // 2
    assert [t.completion for t in rows(there, Sampling(max_new_tokens=16, seed=3), 2)] != [t.completion for t in first]
    plain = rows(there, Sampling(temperature=0.0, max_new_tokens=32))[4]
    assert all(len(t.completion) == 3 and t.finish == "length" for t in rows(there, Sampling(max_new_tokens=3, temperature=0.0)))
    stop = plain.text[len(plain.text) // 2 :][:2]
    cut = rows(there, Sampling(temperature=0.0, max_new_tokens=32, stop=(stop,)))[4]
    assert cut.text == plain.text[: plain.text.index(stop)] and cut.finish == "stop_string"
    assert cut.completion == plain.completion[: len(cut.completion)]
    ended = [t for t in rows(there, Sampling(temperature=0.0, max_new_tokens=200)) if t.finish == "stop"]
    assert ended and all(t.completion[-1] in there.end_ids for t in ended)  # the end token is among the ids, and not in the text


def test_what_does_not_fit_is_said() -> None:
    _, there, prompts = both()
    assert there.context is not None
    with pytest.raises(MachineError, match="400"):
        long = there.prefill(prompts[0] * (there.context // len(prompts[0]) + 2))
        there.context, kept = None, there.context
        try:
            there.sample([long], Sampling(max_new_tokens=1), [(0, 0)])
        finally:
            there.context = kept


@pytest.mark.skipif(not PROCESSED_URL, reason="needs a server with --logprobs-mode processed_logprobs")
def test_processed_logprobs_are_noticed() -> None:
    words = both()[0].policy.tokenizer
    assert connect(Endpoint(PROCESSED_URL), NAME, tokenizer=words).can == {"ids"}
