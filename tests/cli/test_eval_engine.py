"""`burnish eval --engine URL`: the same questions asked of a server, and what can go wrong on the way there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from burnish.cli import invoke
from burnish.models.load import load_policy
from tests.engines.server import Server, serving
from tests.folders import model_folder

QUESTIONS = ["--task", "sums", "--level", "2", "--rows", "5", "--max-new-tokens", "8"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "tiny", tie_word_embeddings=False)  # tied, it repeats itself


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    """vLLM names a model after its folder unless told otherwise."""
    policy = load_policy(folder, dtype="float32")
    with serving("vllm", name=str(folder), model=policy, end_ids=policy.eos_ids) as fake:
        yield fake


def told(capsys: Capture, *words: str, code: int = 0) -> dict[str, Any]:
    assert invoke(["eval", *words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_server_is_asked_the_same_questions(server: Server, folder: Path, capsys: Capture) -> None:
    words = [str(folder), *QUESTIONS, "--strategy", "greedy", "--strategy", "vote:3"]
    here = told(capsys, *words, "--dtype", "float32")
    there = told(capsys, *words, "--engine", server.url, "--weights-version", "7")
    for key in ("task", "n", "settings", "item_ids"):
        assert there[key] == here[key]
    said = [[c["text"] for s in found["samples"] for c in s["completions"] if c["strategy"] == "greedy"] for found in (here, there)]
    assert said[0] == said[1] and len(said[0]) == 5 and any(said[0])
    spend = [found["strategies"][0]["spend"] for found in (here, there)]
    assert spend[0]["sampled_tokens"] == spend[1]["sampled_tokens"] and spend[0]["prefill_tokens"] == spend[1]["prefill_tokens"]
    assert spend[0]["executed_flops"] > 0 and spend[1]["executed_flops"] is None  # nobody knows a server's FLOPs
    who = there["engine"]
    assert (who["kind"], who["weights_version"], who["prompts"]) == ("vllm", f"{folder}@7", "ids")
    assert who["usage"] == {"counted": 20} and "engine" not in here


def test_what_a_person_reads(server: Server, folder: Path, capsys: Capture) -> None:
    server.faults = ["", "429", "no_usage"]
    assert invoke(["eval", str(folder), *QUESTIONS, "--engine", server.url, "--api", "completions", "--in-flight", "1"]) == 0
    table = capsys.readouterr().out
    assert "unknown" in table and f"answered by {folder} at {server.url}/v1 (openai, prompts as " in table
    server.faults = ["", "500", "no_usage"]  # the first tries log-probabilities
    assert invoke(["eval", str(folder), *QUESTIONS, "--engine", server.url, "--api", "chat"]) == 0
    table = capsys.readouterr().out
    assert "prompts as chat" in table and "the tokens of 1 of 5 completions are estimates" in table
    assert "1 requests were sent again" in table


def test_a_strategy_that_needs_logprobs(server: Server, folder: Path, capsys: Capture) -> None:
    words = [str(folder), *QUESTIONS, "--engine", server.url, "--strategy", "best_of:2@logprob"]
    found = told(capsys, *words)
    assert found["strategies"][0]["strategy"] == "best_of:2@logprob" and found["engine"]["usage"] == {"counted": 10}
    server.honest = False
    server.seen.clear()
    error = told(capsys, *words, code=2)["error"]
    assert "needs an engine that can report the log-probability" in error["message"] and "VllmEngine offers: ids" in error["remedy"]
    assert len(server.seen) == 1  # the trial alone: refused before a question was asked


def test_what_is_wrong_is_said_with_what_to_type(server: Server, folder: Path, tmp_path: Path, capsys: Capture) -> None:
    asked = [str(folder), *QUESTIONS]
    cases: list[tuple[list[str], int, str]] = [
        ([*asked, "--engine", "localhost:8000"], 2, "type one such as http://localhost:8000"),
        ([*asked, "--engine", "http://127.0.0.1:9"], 4, "GET http://127.0.0.1:9/v1/models  it cannot be reached"),
        (["tinny", *QUESTIONS, "--engine", server.url], 2, f"it has: {folder}, other"),
        (["other", *QUESTIONS, "--engine", server.url], 2, "--tokenizer, or let the server render them with --api chat"),
        ([*asked, "--engine", server.url, "--tokenizer", str(tmp_path)], 7, "holds no tokenizer that can be loaded"),
        ([*asked, "--engine", server.url, "--api", "chat", "--tokenizer", str(folder)], 2, "takes no tokenizer"),
        ([*asked, "--engine", server.url, "--api", "grpc"], 2, "wanted one of auto, vllm, completions, chat"),
        ([*asked, "--engine", server.url, "--dtype", "bfloat16"], 2, "in a dtype of its own"),
        ([*asked, "--engine", server.url, "--in-flight", "0"], 2, "engine.in_flight  0 given"),
        ([*asked, "--api", "chat"], 2, "--api  says how a server is asked, and there is none"),
    ]
    for words, code, said in cases:
        assert invoke(["eval", *words]) == code, words
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error, error
