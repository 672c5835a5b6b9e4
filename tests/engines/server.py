"""An OpenAI-compatible server on loopback over the local engine on a tiny model, which can be told to misbehave.

Texts, ids, log-probabilities, stop strings and seeds are the local engine's own, so that an engine over HTTP can be held
against it exactly. `faults` are used up in the order of completions requests; each request takes at most one.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from burnish.core.records import Sampling, Trajectory
from burnish.engines.local.engine import LocalEngine
from burnish.models.policy import Policy
from tests.engines.policies import EOS, Letters, policy

KEY = "sk-secret-key-123"


class Words(Letters):
    """The tiny models' tokenizer, both ways."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(c) - 33 for c in text]


WORDS = Words()


class Server:
    """What it is, what it has seen, and what it will do wrong.

    kind      vllm: everything; openai: ids in, none out; text: takes no ids; chat: messages only
    model     a tiny llama unless given, with the tokens its server ends at (end_ids)
    honest    False: log-probabilities after the cut, as some servers are started
    hold_s    how long each completion takes at least
    """

    def __init__(
        self, kind: str = "vllm", *, name: str = "tiny", honest: bool = True, hold_s: float = 0.0, key: str = "",
        model: Policy | None = None, end_ids: Sequence[int] = (EOS,),
    ) -> None:  # fmt: skip
        self.words: Any = WORDS if model is None else model.tokenizer
        self.own_end_ids = tuple(end_ids)
        self.kind, self.name, self.honest, self.hold_s, self.key = kind, name, honest, hold_s, key
        self.context: int | None = 512
        self.engine = LocalEngine(model or policy("llama"))
        self.faults: list[str] = []
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = self.connections = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.url = ""

    @contextmanager
    def working(self) -> Iterator[None]:
        """Counts how many completions are made at once; over before the answer is sent."""
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.hold_s:
                self.closing.wait(self.hold_s)
            yield
        finally:
            with self.lock:
                self.at_once -= 1

    # ---- the answers

    def models(self) -> dict[str, Any]:
        owner = "vllm" if self.kind == "vllm" else "somebody"
        card = {"id": self.name, "object": "model", "owned_by": owner}
        if self.kind == "vllm":
            card["max_model_len"] = self.context  # type: ignore[assignment]
        return {"object": "list", "data": [card, {"id": "other", "object": "model", "owned_by": owner}]}

    def prompt_of(self, body: dict[str, Any]) -> tuple[int, ...]:
        """Ids as this server reads them. Raises ValueError for what it does not take."""
        if "messages" in body:
            text = "".join(m["content"] for m in body["messages"])
            return tuple(ord(c) % 90 + 3 for c in text)
        if isinstance(body["prompt"], str):
            return tuple(self.words.encode(body["prompt"], add_special_tokens=False))
        if self.kind == "text":
            raise ValueError("prompt: wanted a string")
        return tuple(body["prompt"])

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = self.prompt_of(body)
        sampling = Sampling(
            temperature=body.get("temperature", 1.0), top_k=body.get("top_k", 0), top_p=body.get("top_p", 1.0), min_p=body.get("min_p", 0.0),
            max_new_tokens=body.get("max_tokens", 16), stop=tuple(body.get("stop", ())), seed=body.get("seed", 0),
        )  # fmt: skip
        with self.lock:
            self.engine.end_ids = (*self.own_end_ids, *body.get("stop_token_ids", ()))
            node = self.engine.prefill(ids)
            (found,) = self.engine.sample([node], sampling, [(0, 0)])
            self.engine.free(node)
            scores = self._scores(ids) if body.get("prompt_logprobs") is not None else None
        choice = self._choice(body, found)
        if scores is not None:
            ranked = {"rank": 1, "decoded_token": "?"}
            choice["prompt_logprobs"] = [None, *({str(t): {"logprob": x, **ranked}} for t, x in zip(ids[1:], scores))]
        if body.get("return_token_ids"):
            choice |= {"token_ids": list(found.completion), "prompt_token_ids": list(ids)}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(found.completion)}
        return {"id": "cmpl-1", "model": self.name, "choices": [choice], "usage": usage | {"total_tokens": sum(usage.values())}}

    def _choice(self, body: dict[str, Any], found: Trajectory) -> dict[str, Any]:
        chat, values = "messages" in body, found.logprobs or ()
        if not self.honest:
            values = (0.0,) * len(values)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if found.finish == "length" else "stop", "logprobs": None}
        if self.kind == "vllm":
            choice["stop_reason"] = body["stop"][0] if found.finish == "stop_string" else None
        if body.get("logprobs") is not None and body["logprobs"] is not False:
            shown = [f"token_id:{t}" for t in found.completion]
            choice["logprobs"] = (
                {"content": [{"token": t, "logprob": x} for t, x in zip(shown, values)]} if chat else {"tokens": shown, "token_logprobs": list(values)}
            )
        return choice | ({"message": {"role": "assistant", "content": found.text}} if chat else {"text": found.text})

    def _scores(self, ids: Sequence[int]) -> list[float]:
        node = self.engine.prefill(ids)
        (scores,) = self.engine.score([node])
        self.engine.free(node)
        return list(scores)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement
    server: Any

    def setup(self) -> None:
        super().setup()
        self.fake.connections += 1

    def log_message(self, *_: Any) -> None:
        return

    @property
    def fake(self) -> Server:
        return self.server.fake

    def reply(self, status: int, data: Any, *, cut: int | None = None, headers: dict[str, str] | None = None) -> None:
        """Send JSON; `cut`: say the whole length, send that much of it and hang up."""
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    def refused(self) -> bool:
        fake = self.fake
        fake.headers.append(dict(self.headers.items()))
        if fake.key and self.headers.get("Authorization") != f"Bearer {fake.key}":
            said = self.headers.get("Authorization", "nothing")
            self.reply(401, {"error": {"message": f"Incorrect API key provided: {said}"}})
            return True
        return False

    def do_GET(self) -> None:
        if self.refused():
            return
        if self.path == "/v1/models" and self.fake.kind != "nothing":
            self.reply(200, self.fake.models())
        else:
            self.reply(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        fake = self.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        chat = self.path == "/v1/chat/completions"
        if self.path not in ("/v1/completions", "/v1/chat/completions") or (fake.kind == "chat" and not chat):
            self.reply(404, {"detail": "Not Found"})
            return
        with fake.lock:
            fake.seen.append(body)
            fault = fake.faults.pop(0) if fake.faults else ""
        try:
            self.act(fault, body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def act(self, fault: str, body: dict[str, Any]) -> None:
        fake = self.fake
        if fault == "429":
            return self.reply(429, {"error": {"message": "slow down"}}, headers={"Retry-After": "0"})
        if fault.isdigit():
            return self.reply(int(fault), {"error": {"message": f"trouble with key {KEY}"}})
        if fault == "hang":
            return self._hang(b"")
        if fault == "drip":  # never silent for long, never finished
            return self._hang(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{")
        if fault == "disconnect":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)  # a reset, not a polite end
            self.close_connection = True
            return None
        if fault == "html":
            return self.reply(200, b"<html>a page</html>")
        try:
            with fake.working():
                answer = fake.complete(body)
        except ValueError as error:
            return self.reply(400, {"error": {"message": str(error)}})
        self.spoil(fault, answer)
        return self.reply(200, answer, cut=60 if fault == "truncated" else None)

    def spoil(self, fault: str, answer: dict[str, Any]) -> None:
        choice = answer["choices"][0]
        match fault:
            case "wrong_model":
                answer["model"] = "somebody-else"
            case "no_usage":
                del answer["usage"]
            case "odd_usage":
                answer["usage"]["completion_tokens"] = -3
            case "no_choices":
                answer["choices"] = []
            case "no_text":
                choice["text"] = None
            case "filtered":
                choice["finish_reason"] = "content_filter"
            case "nan":
                choice["logprobs"]["token_logprobs"][0] = float("nan")
            case "few_logprobs":
                choice["logprobs"]["token_logprobs"].pop()
            case "no_ids":
                del choice["token_ids"]
            case "other_prompt":
                choice["prompt_token_ids"][0] += 1
            case "added_token":
                answer["usage"]["prompt_tokens"] += 1
            case "past_stop":
                choice["token_ids"] += [5, 6]
                choice["logprobs"]["token_logprobs"] += [-1.0, -1.0]
                answer["usage"]["completion_tokens"] += 2

    def _hang(self, begin: bytes) -> None:
        self.wfile.write(begin)
        end = time.monotonic() + 30
        while not self.fake.closing.wait(0.02) and time.monotonic() < end:
            if begin:
                self.wfile.write(b" ")
        self.close_connection = True


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # a caller that finds the queue full waits a second


@contextmanager
def serving(kind: str = "vllm", **more: Any) -> Iterator[Server]:
    """A server for the time of a `with`."""
    fake = Server(kind, **more)
    http = Listener(("127.0.0.1", 0), Handler)
    http.fake = fake  # type: ignore[attr-defined]
    fake.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        fake.closing.set()
        http.shutdown()
        http.server_close()
        thread.join(5)


__all__ = ["KEY", "WORDS", "Server", "serving"]
