"""JSON over HTTP to one server: many requests at once, each with a deadline, bounded retries, and a name for what it waits.

Requests of one call run in daemon threads; the caller's thread watches deadlines, polls, and on any exception cuts every
connection, so that Ctrl-C is quick and a server sees that nobody waits any more.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import queue
import random
import re
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from typing import Any, Literal
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from burnish.core.errors import BurnishError, ConfigError, MachineError

KEY = "BURNISH_API_KEY"
CONNECT_S = 10.0
TICK_S = 0.05
MOST_BYTES = 64 * 2**20
MOST_WAIT_S = 60.0
REFUSED = (429, 503)  # the server says that it did none of the work
FAILED = (408, 500, 502, 504)


class Refused(MachineError):
    """The server understood the request and said no, for good."""

    def __init__(self, status: int, message: str, *, where: str, remedy: str | None = None) -> None:
        self.status = status
        super().__init__(message, where=where, remedy=remedy)


@dataclass(frozen=True)
class Request:
    """What is asked. `what` names it in errors, such as `row 3 of 64`."""

    method: Literal["GET", "POST"]
    path: str
    body: Mapping[str, Any] | None = None
    what: str = ""


@dataclass(frozen=True)
class Answer:
    """A JSON object, after how many attempts; `lost`: those before it whose work the server may have done for nothing."""

    data: Mapping[str, Any]
    attempts: int = 1
    lost: int = 0


class _Failed(Exception):
    """An attempt worth repeating."""

    def __init__(self, why: str, *, lost: bool, after_s: float = 0.0) -> None:
        self.why, self.lost, self.after_s = why, lost, after_s
        super().__init__(why)


def address(url: str) -> str:
    """The API's base address, `http://host:8000` -> `http://host:8000/v1`. Raises ConfigError for what is none."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        shown = url if "@" not in url else "the URL"
        raise ConfigError(f"{shown!r} is not a web address", where="engine", remedy="type one such as http://localhost:8000")
    if parts.username or parts.password or parts.query or parts.fragment:
        remedy = f"type {parts.scheme}://{parts.hostname}...; keys are read from the environment: export {KEY}=..."
        raise ConfigError("wanted a plain address, without user, key or query in it", where="engine", remedy=remedy)
    path = parts.path.rstrip("/")
    if not any(re.fullmatch(r"v\d+\w*", part) for part in path.split("/")):
        path += "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


def backoff(attempt: int, base_s: float, uniform: float, after_s: float = 0.0) -> float:
    """Seconds to wait after the attempt-th failure: base * 2^(attempt - 1), of which `uniform` in [0, 1] takes up to half
    away so that clients do not come back together; at least what the server asked for; at most a minute.
    """
    return min(MOST_WAIT_S, max(after_s, base_s * 2 ** (attempt - 1) * (1 - uniform / 2)))


class Endpoint:
    """One server. `key` (None: from the environment, if there) is sent to it and shown to nobody.

    timeout_s   deadline of one attempt, from connecting to the last byte
    attempts    most attempts of one request
    in_flight   most requests under way at once
    Raises ConfigError for an address or a key that cannot be sent.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout_s: float = 300.0,
        attempts: int = 5,
        in_flight: int = 64,
        backoff_s: float = 0.5,
    ) -> None:
        self.url = address(url)
        for name, value in (("timeout_s", timeout_s), ("attempts", attempts), ("in_flight", in_flight)):
            if value <= 0:
                raise ConfigError(f"{value} given, wanted more than 0", where=f"engine.{name}")
        self._key = os.environ.get(KEY, "") if key is None else key
        if re.search(r"[^\x21-\x7e]", self._key):
            raise ConfigError("holds a character that no key has (a space, a line end?)", where=KEY)
        self.timeout_s, self.attempts, self.in_flight, self.backoff_s = timeout_s, attempts, in_flight, backoff_s
        self._parts = urlsplit(self.url)
        self._random = random.Random()
        self._tls = ssl.create_default_context() if self._parts.scheme == "https" else None

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r})"

    def ask(self, request: Request, *, attempts: int | None = None, poll: Callable[[], None] | None = None) -> Answer:
        """One request. Raises MachineError (no usable answer), Refused (it said no)."""
        found: list[Answer] = []
        self.ask_all([request], lambda _, answer: found.append(answer), poll, attempts=attempts)
        return found[0]

    def ask_all(
        self,
        requests: Sequence[Request],
        took: Callable[[int, Answer], None],
        poll: Callable[[], None] | None = None,
        *,
        attempts: int | None = None,
    ) -> None:
        """Every request; `took(index, answer)` is called in this thread, as answers come. See `ask` for what it raises.

        The first error ends the call; what `poll` or `took` raises does too. Nothing is under way when it returns.
        """
        flight = _Flight(self, requests, attempts or self.attempts)
        flight.start()
        try:
            for _ in requests:
                index, found = flight.next(poll)
                if isinstance(found, BaseException):
                    raise found
                took(index, found)
        finally:
            flight.cut()

    # ---- one attempt

    def connect(self) -> http.client.HTTPConnection:
        """A connection, not open yet, straight or through the proxy that the environment names."""
        host, port = self._parts.hostname or "", self._parts.port
        proxy = getproxies().get(self._parts.scheme)
        if not proxy or host in ("localhost", "127.0.0.1", "::1") or proxy_bypass(host):
            return self._open(host, port)
        via = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
        connection = self._open(via.hostname or "", via.port or 80)
        if self._tls is not None:
            connection.set_tunnel(host, port or 443, headers=_proxy_key(via.username, via.password))
        return connection

    def _open(self, host: str, port: int | None) -> http.client.HTTPConnection:
        if self._tls is not None:
            return http.client.HTTPSConnection(host, port, timeout=min(CONNECT_S, self.timeout_s), context=self._tls)
        return http.client.HTTPConnection(host, port, timeout=min(CONNECT_S, self.timeout_s))

    def send(self, connection: http.client.HTTPConnection, request: Request) -> None:
        """Write the request to an open connection."""
        target = f"{self._parts.path}{request.path}"
        headers = {"Accept": "application/json", "User-Agent": "burnish"}
        if connection.host != self._parts.hostname and self._tls is None:  # a plain proxy wants the whole address
            target = f"{self.url}{request.path}"
            via = urlsplit(getproxies().get("http", ""))
            headers |= _proxy_key(via.username, via.password)
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        body = None
        if request.body is not None:
            headers["Content-Type"] = "application/json"
            body = json.dumps(request.body, separators=(",", ":")).encode()
        connection.request(request.method, target, body=body, headers=headers)

    def understand(self, request: Request, status: int, headers: Message, body: bytes) -> Mapping[str, Any]:
        """The JSON object of an answer. Raises _Failed for what may go better next time, Refused, ConfigError, MachineError."""
        where = self.where(request)
        if status in (*REFUSED, *FAILED):
            after = headers.get("Retry-After", "")
            after_s = float(after) if re.fullmatch(r"\d{1,6}(\.\d+)?", after) else 0.0
            raise _Failed(f"it answered {status}{self._said(body)}", lost=status in FAILED, after_s=after_s)
        if 300 <= status < 400:
            raise ConfigError(f"it is somewhere else: {headers.get('Location', '?')}", where=where, remedy="type that address")
        if status in (401, 403):
            has = "the key was not accepted" if self._key else "it wants a key"
            raise Refused(status, f"{has}{self._said(body)}", where=where, remedy=f"export {KEY}=... (it is never written anywhere)")
        if status != 200:
            raise Refused(status, f"it answered {status}{self._said(body)}", where=where)
        try:
            data = json.loads(body)
        except (ValueError, RecursionError) as error:
            if body.lstrip()[:1] == b"{":
                raise _Failed(f"the answer broke off after {len(body)} bytes", lost=True) from error
            shown = self._redact(body[:60].decode(errors="replace"))
            raise MachineError(f"this is no API: it answered with {shown!r}", where=where, remedy="check the address") from error
        if not isinstance(data, dict):
            raise MachineError(f"it answered with a {type(data).__name__}, wanted a JSON object", where=where)
        return data

    def where(self, request: Request) -> str:
        """How errors call it."""
        return f"{request.method} {self.url}{request.path}" + (f" ({request.what})" if request.what else "")

    def _said(self, body: bytes) -> str:
        """`: ` and the server's own words, shortened, the key taken out; empty where it said nothing."""
        text = body.decode(errors="replace")
        try:
            data: Any = json.loads(text)
            while isinstance(data, dict):
                data = next((data[k] for k in ("error", "message", "detail") if k in data), "")
            text = data if isinstance(data, str) else json.dumps(data)
        except (ValueError, RecursionError):
            text = "" if text.lstrip()[:1] == "<" else text
        text = " ".join(self._redact(text).split())
        return f": {text[:300]}" if text else ""

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def give_up(self, request: Request, failure: _Failed, attempts: int) -> MachineError:
        """The error after the last attempt."""
        times = f" ({attempts} attempts)" if attempts > 1 else ""
        remedy = "is the server up, and is this its address?" if not failure.lost else "look at the server's own log"
        return MachineError(f"{self._redact(failure.why)}{times}", where=self.where(request), remedy=remedy)

    def jitter(self) -> float:
        """Uniform in [0, 1); not seeded, because clients with one seed would come back together."""
        return self._random.random()


def _proxy_key(user: str | None, password: str | None) -> dict[str, str]:
    if not user:
        return {}
    pair = f"{unquote(user)}:{unquote(password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


class _Line:
    """A connection under way, as the watching thread sees it."""

    def __init__(self) -> None:
        self.connection: http.client.HTTPConnection | None = None
        self.socket: socket.socket | None = None
        self.due = float("inf")
        self.late = False

    def cut(self) -> None:
        """Wake whoever reads from it; from any thread."""
        if (held := self.socket) is not None:
            try:
                socket.socket.shutdown(held, socket.SHUT_RDWR)  # below TLS, whose own shutdown is not safe from here
            except OSError:
                return


class _Flight:
    """The requests of one call. Workers take them in order; the caller's thread takes answers and watches deadlines."""

    def __init__(self, endpoint: Endpoint, requests: Sequence[Request], attempts: int) -> None:
        self.endpoint, self.attempts = endpoint, attempts
        self.waiting = deque(enumerate(requests))
        self.done: queue.SimpleQueue[tuple[int, Answer | BaseException]] = queue.SimpleQueue()
        self.over = threading.Event()
        self.lines = [_Line() for _ in range(min(endpoint.in_flight, len(requests)))]

    def start(self) -> None:
        """Daemons: a name look-up that hangs cannot be cut, and must not keep the process."""
        for line in self.lines:
            threading.Thread(target=self._work, args=(line,), daemon=True, name="burnish endpoint").start()

    def next(self, poll: Callable[[], None] | None) -> tuple[int, Answer | BaseException]:
        """The next answer or error."""
        while True:
            if poll is not None:
                poll()
            try:
                return self.done.get(timeout=TICK_S)
            except queue.Empty:
                now = time.monotonic()
                for line in self.lines:
                    if now > line.due:
                        line.late = True
                        line.cut()

    def cut(self) -> None:
        """End everything under way."""
        self.over.set()
        for line in self.lines:
            line.cut()

    def _work(self, line: _Line) -> None:
        try:
            while not self.over.is_set():
                try:
                    index, request = self.waiting.popleft()
                except IndexError:
                    return
                try:
                    found: Answer | BaseException = self._answer(line, request)
                except BaseException as error:
                    found = error
                self.done.put((index, found))
        finally:
            _close(line)

    def _answer(self, line: _Line, request: Request) -> Answer:
        lost = 0
        for attempt in range(1, self.attempts + 1):
            try:
                return Answer(self._once(line, request), attempt, lost)
            except _Failed as failure:
                _close(line)
                lost += failure.lost
                wait = backoff(attempt, self.endpoint.backoff_s, self.endpoint.jitter(), failure.after_s)
                if attempt == self.attempts or self.over.wait(wait):
                    raise self.endpoint.give_up(request, failure, attempt) from None
        raise AssertionError("unreachable")

    def _once(self, line: _Line, request: Request) -> Mapping[str, Any]:
        """One attempt. Raises _Failed for everything the network can do."""
        timeout_s = self.endpoint.timeout_s
        line.late, line.due = False, time.monotonic() + timeout_s
        sent = False
        try:
            if line.connection is None:
                line.connection = self.endpoint.connect()
                line.connection.connect()
                line.socket = line.connection.sock
            if line.socket is not None:
                line.socket.settimeout(timeout_s)
            sent = True  # from here on the server may have heard it
            self.endpoint.send(line.connection, request)
            response = line.connection.getresponse()
            parts: list[bytes] = []
            size = 0
            while chunk := response.read1(1 << 16):
                parts.append(chunk)
                size += len(chunk)
                if size > MOST_BYTES:
                    raise MachineError(f"the answer is longer than {MOST_BYTES >> 20} MiB", where=self.endpoint.where(request))
            if line.late:  # cut from outside, which looks like an end
                raise TimeoutError
            line.due = float("inf")
            if response.will_close:
                _close(line)
            response.close()  # read to its end, so the connection is free for the next request
            return self.endpoint.understand(request, response.status, response.headers, b"".join(parts))
        except (BurnishError, _Failed):
            raise
        except ssl.SSLCertVerificationError as error:
            raise MachineError(f"its certificate does not hold: {error.verify_message}", where=self.endpoint.where(request)) from error
        except Exception as error:  # what a cut connection raises, and where, differs by version and by TLS
            if line.late or isinstance(error, TimeoutError):
                within = timeout_s if sent else min(CONNECT_S, timeout_s)
                raise _Failed(f"no {'answer' if sent else 'connection'} within {within:g} s", lost=sent) from error
            network = isinstance(error, (OSError, http.client.HTTPException))
            if not self.over.is_set() and (not network or isinstance(error, http.client.ImproperConnectionState)):
                raise
            verb = "the connection broke" if sent else "it cannot be reached"
            raise _Failed(f"{verb}: {str(error) or type(error).__name__}", lost=sent) from error
        finally:
            line.due = float("inf")


def _close(line: _Line) -> None:
    if line.connection is not None:
        line.connection.close()
    line.connection = line.socket = None
