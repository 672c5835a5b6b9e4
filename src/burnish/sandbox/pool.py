"""Killable workers: user code in child processes that exchange JSON lines, each with a deadline that holds.

A worker is a fresh interpreter in a process group of its own. At its deadline the group is killed (SIGKILL: no handler,
no loop in C and no child process outlives it) and another worker takes its place. No signal handler, no alarm and no
thread of ours is involved, so the pool works from any thread. It bounds time and keeps crashes out; it does not confine
hostile programs. A process that leaves the group (setsid) escapes it.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from burnish.core.errors import MachineError

ROOT = Path(__file__).resolve().parents[2]  # the folder that holds the package
REPLY_LIMIT = 64 << 20  # bytes of one reply
SHOWN_OUTPUT = 4096  # bytes of what a worker printed that are kept
TICK_S = 0.1  # how often a silent worker is looked at


@dataclass(frozen=True)
class Job:
    """One call: `payload` is JSON for the target's `answer`, `deadline_s` how long it may take."""

    payload: Any
    deadline_s: float


@dataclass(frozen=True)
class Reply:
    """What became of a job: a value, or how it failed. `printed` is the end of what the worker printed meanwhile."""

    value: Any = None
    fault: Literal["timeout", "crash"] | None = None
    detail: str = ""
    traceback: str = ""
    printed: str = ""
    seconds: float = 0.0


class Unusable(MachineError):
    """A worker that cannot be started: its target does not load. `traceback` says where."""

    def __init__(self, message: str, *, where: str | None = None, traceback: str = "") -> None:
        self.traceback = traceback
        super().__init__(message, where=where)


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    requests: int
    replies: int
    output: IO[bytes]
    deadline: float
    ready: bool = False
    job: int | None = None
    began: float = 0.0
    outgoing: bytes = b""
    incoming: bytearray = field(default_factory=bytearray)
    printed: bytes = b""
    ended: set[int] = field(default_factory=set[int])  # pipes that the child's side has closed


class Pool:
    """`workers` children that import `target` (a module with `prepare(settings)` and `answer(payload)`).

    Children are started at the first call, each within `start_s` seconds. `close` ends them; so does losing the pool.
    """

    def __init__(self, target: str, settings: Any = None, *, workers: int = 2, start_s: float = 60.0) -> None:
        if workers < 1:
            raise ValueError(f"{workers} workers do no work")
        self.target, self.settings, self.size, self.start_s = target, settings, workers, start_s
        self.started = 0  # workers ever started: more than `workers` means that some were replaced
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._closed = False
        self._finalizer = weakref.finalize(self, _end_all, self._workers)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill what is left of every worker's group and collect it. The pool takes no further calls."""
        self._closed = True
        self._finalizer()

    @property
    def pids(self) -> list[int]:
        return [w.process.pid for w in self._workers]

    def run(self, jobs: Sequence[Job]) -> list[Reply]:
        """Every job's reply, in the order of the jobs, whichever worker took it and whenever it came."""
        found: list[Reply | None] = [None] * len(jobs)
        for index, reply in self.each(jobs):
            found[index] = reply
        return [reply for reply in found if reply is not None]

    def each(self, jobs: Sequence[Job]) -> Generator[tuple[int, Reply], None, None]:
        """(index, reply) as replies come. Leaving early kills the calls in hand. Raises Unusable."""
        if self._closed:
            raise ValueError("the pool is closed")
        with self._lock:
            waiting = deque(range(len(jobs)))
            left = len(jobs)
            try:
                while left:
                    self._fill(min(self.size, left))
                    for worker in self._workers:
                        if worker.ready and worker.job is None and waiting:
                            _give(worker, waiting.popleft(), jobs)
                    for index, reply in self._turn():
                        left -= 1
                        yield index, reply
            finally:
                for worker in [w for w in self._workers if w.job is not None]:
                    self._drop(worker)

    # ---- one turn ----------------------------------------------------------------------------------------------------

    def _fill(self, size: int) -> None:
        for worker in [w for w in self._workers if w.job is None and w.process.poll() is not None and w.ready]:
            self._drop(worker)  # died between two calls
        while len(self._workers) < size:
            self._workers.append(_start(self.target, self.settings, self.start_s))
            self.started += 1

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        _end(worker)

    def _turn(self) -> list[tuple[int, Reply]]:
        """Move bytes, then look who answered, died or is late."""
        now = time.monotonic()
        active = [w for w in self._workers if w.job is not None or not w.ready]
        with selectors.DefaultSelector() as selector:
            for worker in active:
                for number in {worker.replies, worker.output.fileno()} - worker.ended:
                    selector.register(number, selectors.EVENT_READ, worker)
                if worker.outgoing:
                    selector.register(worker.requests, selectors.EVENT_WRITE, worker)
            soonest = min((w.deadline for w in active), default=now)
            for key, _ in selector.select(max(0.0, min(soonest - now, TICK_S))):
                _move(key.data, key.fd)
        found: list[tuple[int, Reply]] = []
        for worker in active:
            if (reply := self._outcome(worker)) is not None:
                found.append((reply[0], reply[1]))
        return found

    def _outcome(self, worker: _Worker) -> tuple[int, Reply] | None:
        now = time.monotonic()
        seconds = now - worker.began
        if b"\n" in worker.incoming:
            line, _, rest = bytes(worker.incoming).partition(b"\n")
            worker.incoming = bytearray(rest)
            said = _read(line)
            if worker.job is None:
                if said.get("ready") is True:
                    worker.ready = True
                    return None
                self._drop(worker)
                raise Unusable(said.get("unusable", "answered nonsense"), traceback=said.get("traceback", ""))
            job = worker.job
            if said.get("id") == job and ("value" in said or "crash" in said):
                worker.job = None
                printed = worker.printed.decode(errors="replace")
                if "value" in said:
                    return job, Reply(said["value"], printed=printed, seconds=seconds)
                return job, Reply(None, "crash", said["crash"], said.get("traceback", ""), printed, seconds)
            self._drop(worker)
            return job, Reply(None, "crash", "wrote over its own answers", seconds=seconds)
        too_long = len(worker.incoming) > REPLY_LIMIT
        dead = worker.process.poll() is not None
        if not (dead or too_long or now >= worker.deadline):
            return None
        if dead:
            _move(worker, worker.replies)  # what it wrote before it died
            _move(worker, worker.output.fileno())
            if b"\n" in worker.incoming:
                return self._outcome(worker)
        printed = worker.printed.decode(errors="replace")
        job, code = worker.job, worker.process.poll()
        self._drop(worker)
        if job is None:
            why = f"ended {_exit(code)} before it was ready" if dead else f"was not ready within {self.start_s:g} s"
            raise Unusable(why, traceback=printed)
        if too_long:
            return job, Reply(None, "crash", f"answered more than {REPLY_LIMIT:,} bytes", "", printed, seconds)
        if dead:
            return job, Reply(None, "crash", f"its process ended {_exit(code)}", "", printed, seconds)
        return job, Reply(None, "timeout", f"killed after {seconds:.1f} s", "", printed, seconds)


# ---- one worker ----------------------------------------------------------------------------------------------------


def _start(target: str, settings: Any, start_s: float) -> _Worker:
    """A fresh interpreter. `-P`: the working folder is not searched for modules."""
    requests_read, requests = os.pipe()
    replies, replies_write = os.pipe()
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from burnish.sandbox.child import main; main()"
    threads = {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, str(requests_read), str(replies_write), target],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(requests_read, replies_write),
            start_new_session=True,
            env={**os.environ, **threads, "PYTHONUNBUFFERED": "1"},
        )
    except OSError as error:
        for number in (requests_read, requests, replies, replies_write):
            os.close(number)
        raise Unusable(f"cannot be started: {error}") from error
    os.close(requests_read)
    os.close(replies_write)
    assert process.stdout
    for number in (requests, replies, process.stdout.fileno()):
        os.set_blocking(number, False)
    now = time.monotonic()
    first = json.dumps({"settings": settings}).encode() + b"\n"
    return _Worker(process, requests, replies, process.stdout, now + start_s, began=now, outgoing=first)


def _give(worker: _Worker, index: int, jobs: Sequence[Job]) -> None:
    job = jobs[index]
    cpu_s = 10 + 2 * job.deadline_s * (os.cpu_count() or 1)
    asked = {"id": index, "payload": job.payload, "cpu_s": cpu_s}
    worker.job, worker.printed = index, b""
    worker.outgoing = json.dumps(asked).encode() + b"\n"
    worker.began = time.monotonic()
    worker.deadline = worker.began + job.deadline_s


def _move(worker: _Worker, number: int) -> None:
    """Bytes out of, or into, one pipe of a worker, as many as pass without waiting."""
    try:
        if number == worker.requests:
            worker.outgoing = worker.outgoing[os.write(number, worker.outgoing) :]
            return
        data = os.read(number, 1 << 20)
        if not data:
            worker.ended.add(number)
        elif number == worker.replies:
            worker.incoming += data
        else:
            worker.printed = (worker.printed + data)[-SHOWN_OUTPUT:]
    except BlockingIOError:
        pass
    except OSError:
        worker.outgoing = b""  # the reader is gone: the worker is dead, which `_outcome` sees


def _end(worker: _Worker) -> None:
    """Kill the group, collect the child, close the pipes."""
    try:
        os.killpg(worker.process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        worker.process.kill()
    worker.process.wait()
    worker.output.close()
    os.close(worker.requests)
    os.close(worker.replies)


def _end_all(workers: list[_Worker]) -> None:
    while workers:
        _end(workers.pop())


def _read(line: bytes) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _exit(code: int | None) -> str:
    if code is not None and code < 0:
        return f"by {signal.Signals(-code).name}"
    return f"with exit code {code}"
