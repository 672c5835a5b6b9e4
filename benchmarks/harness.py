"""The parent's side: child processes, blocks bracketed by a fixed product, and which of them count.

A block is one turn of every system of a comparison, with the product timed for about a second before, between and after.
A block during which the product ran more than 15 % slower than at the run's best measured the neighbours: it is thrown
away and repeated, a bounded number of times. Where the idle machine itself swings by more than that, its swing is the limit.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, Calibration

SETTLE_S = 4.0  # after a block whose product is slow, before it is timed again
SLOWER = 1.15  # a block whose product took this much longer than the run's best is discarded
SWING = 1.35  # at most so much is granted to a machine whose clock rises and falls by itself
ENVIRONMENTS = {
    "burnish": (Path(sys.executable), "make install"),
    "peers": (ROOT / ".venv-peers/bin/python", "make peers"),
    "vllm": (ROOT / ".venv-vllm/bin/python", "make peers-vllm"),
}
Answer = dict[str, Any]
Case = dict[str, Any]


class ChildError(RuntimeError):
    """A child failed, ended or took too long."""


class NotMeasured(RuntimeError):
    """What is needed is not here, and how to get it; or every block was discarded, and how many."""

    def __init__(self, why: str, discarded: int = 0) -> None:
        super().__init__(why)
        self.discarded = discarded


class Child:
    """A system under test in a process of its own. It runs while it is asked something and is stopped (SIGSTOP) otherwise."""

    def __init__(self, name: str, command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.name, self.log = name, log
        with open(log, "wb") as errors:
            self.process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=environment
            )

    def ask(self, do: str, limit_s: float = 1800, **order: Any) -> Answer:
        """Send one command and wait for its answer. Raises ChildError, with the end of what the child printed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        clock = threading.Timer(limit_s, self.process.kill)
        clock.start()
        try:
            self.process.send_signal(signal.SIGCONT)
            self.process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        finally:
            clock.cancel()
        answer: Answer = json.loads(line) if line else {"error": f"it ended, or took more than {limit_s:.0f} s"}
        if "error" in answer:
            with suppress(subprocess.TimeoutExpired):  # so that its last words are in the log
                self.process.wait(10)
            tail = self.log.read_text(encoding="utf-8", errors="replace").strip()[-600:]
            raise ChildError(f"{self.name}, {do}: {answer['error']}" + (f"\n{tail}" if tail else ""))
        if do != "stop":
            self.process.send_signal(signal.SIGSTOP)
        return answer

    def stop(self) -> None:
        """End the process, asked first."""
        with suppress(ChildError):
            if self.process.poll() is None:
                self.ask("stop", limit_s=60)
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()


# ---- blocks


@dataclass(frozen=True)
class Block:
    """gflops: the fixed product before, between and after its parts; answers: what each system said of its turn."""

    gflops: tuple[float, ...]
    answers: Mapping[str, Answer]


@dataclass
class Measured:
    """The blocks of one case that count, and how many did not."""

    kept: list[Block]
    discarded: int
    best_gflops: float

    def all(self, system: str, key: str) -> list[Any]:
        return [block.answers[system][key] for block in self.kept]


def tolerance(products: Sequence[float]) -> float:
    """How much slower than at its best the product may run in a block, from products of the idle machine before the run.

    15 %. A shared processor's clock may swing by 25 % with nothing else running (decision 0008): then 5 % below what it falls
    to in a fifth of the time or more, and never beyond 35 %. Both turns of a block see the same swings, and its ratio is of
    what they did in them. A single slow product is somebody else's work, and grants nothing.
    """
    usual = sorted(products)[len(products) // 5]
    return min(max(SLOWER, 1.05 * max(products) / usual), SWING)


def steady(block: Block, best: float, slower: float = SLOWER) -> bool:
    """Whether the product ran at no less than `best` / `slower` all through the block."""
    return min(block.gflops) * slower >= best


def run_blocks(
    turns: Mapping[str, Callable[[Mapping[str, Answer]], Answer]], wanted: int, gauge: Callable[[], float], *,
    best: float = 0.0, slower: float = SLOWER, repeats: int | None = None, settle: Callable[[], None] | None = None,
) -> Measured:  # fmt: skip
    """Blocks until `wanted` are steady, at most `repeats` (default: `wanted`, at least 2) more than that.

    turns: system -> its turn, called in order with the answers of this block so far. `best` is the run's best product
    so far; a better one seen later condemns earlier blocks too. Every discarded block is counted. With `settle` a product
    that is slow is timed once more after it: gigabytes freed by a turn are still on their way back to a virtual machine's host.
    """
    blocks: list[Block] = []

    def after() -> float:
        now = gauge()
        if settle is not None and now * slower < best:
            settle()
            now = max(now, gauge())
        return now

    most = wanted + (max(2, wanted) if repeats is None else repeats)
    now = gauge()
    best = max(best, now)
    while sum(steady(b, best, slower) for b in blocks) < wanted and len(blocks) < most:
        seen, answers = [now], dict[str, Answer]()
        for system, turn in turns.items():
            answers[system] = turn(answers)
            now = after()
            seen.append(now)
        best = max(best, *seen)
        blocks.append(Block(tuple(seen), answers))
    kept = [b for b in blocks if steady(b, best, slower)]
    return Measured(kept, len(blocks) - len(kept), best)


def compare(measured: Measured, ours: str, theirs: str, work: str) -> Case:
    """Median and best rates of `work` a second, and the ratio ours / theirs of each block: median and worst.

    Raises NotMeasured where no block was steady.
    """
    if not measured.kept:
        raise NotMeasured(f"no steady block: all {measured.discarded} were discarded", measured.discarded)
    rates = {s: [b.answers[s][work] / b.answers[s]["seconds"] for b in measured.kept] for s in (ours, theirs)}
    ratios = [a / b for a, b in zip(rates[ours], rates[theirs])]
    return {
        "ratio": statistics.median(ratios), "worst_ratio": min(ratios),
        "rate": {"ours": statistics.median(rates[ours]), "theirs": statistics.median(rates[theirs])},
        "best_rate": {"ours": max(rates[ours]), "theirs": max(rates[theirs])},
        "seconds": {"ours": measured.all(ours, "seconds"), "theirs": measured.all(theirs, "seconds")},
        "blocks": len(measured.kept), "discarded": measured.discarded,
        "gflops": [list(b.gflops) for b in measured.kept],
    }  # fmt: skip


def efficiency(useful: Sequence[float], executed: Sequence[float], seconds: Sequence[float], least: Sequence[float]) -> Case:
    """Over blocks: executed GFLOP/s, the least time possible over the time taken, and useful over executed FLOPs (medians)."""
    return {
        "achieved_gflops": statistics.median(e / s / 1e9 for e, s in zip(executed, seconds)),
        "of_limit": statistics.median(t / s for t, s in zip(least, seconds)),
        "work_eff": statistics.median(u / e for u, e in zip(useful, executed)),
    }


def agree(what: str, ours: float, theirs: float, tolerance: float) -> Case:
    """One check that both systems compute the same thing: relative difference against a tolerance."""
    off = abs(ours - theirs) / max(abs(theirs), 1e-30)
    return {"what": what, "ours": ours, "theirs": theirs, "off": off, "tolerance": tolerance, "ok": off <= tolerance}


def equal(case: Case) -> bool:
    """Whether every check of a case held; a case without one is not known to be equal."""
    return bool(case.get("checks")) and all(check["ok"] for check in case["checks"])


# ---- criteria


@dataclass(frozen=True)
class Criterion:
    """One line of acceptance. met: None where it was not measured."""

    id: str
    name: str
    wanted: str
    measured: str
    met: bool | None


def at_least(bench: str, name: str, wanted: float, cases: Iterable[Case], value: str = "ratio") -> Criterion:
    """Every one of `cases` has `value` >= wanted and agrees with its peer; none at all, or one that failed: not measured."""
    found = list(cases)
    gaps = [case for case in found if value not in case]
    text = f">= {wanted:g}"
    if not found or gaps:
        why = gaps[0].get("not_measured", "no such value") if gaps else "not run"
        return Criterion(bench, name, text, why, None)
    worst = min(found, key=lambda case: case[value])
    wrong = [case for case in found if not equal(case)]
    said = f"{worst[value]:.2f}"
    if "worst_ratio" in worst and value == "ratio":
        said += f" (worst block {worst['worst_ratio']:.2f})"
    if len(found) > 1:
        said += f" at {worst['case']}, the worst of {len(found)}"
    if wrong:
        said += f"; the results differ: {wrong[0]['case']}"
    return Criterion(bench, name, text, said, worst[value] >= wanted and not wrong)


def at_most(bench: str, name: str, wanted: float, cases: Iterable[Case], value: str) -> Criterion:
    """`at_least` the other way round; for memory, where equality is the speed's business."""
    found = list(cases)
    gaps = [case for case in found if value not in case]
    text = f"<= {wanted:g}"
    if not found or gaps:
        return Criterion(bench, name, text, gaps[0].get("not_measured", "no such value") if gaps else "not run", None)
    worst = max(found, key=lambda case: case[value])
    said = f"{worst[value]:.2f}" + (f" at {worst['case']}, the worst of {len(found)}" if len(found) > 1 else "")
    return Criterion(bench, name, text, said, worst[value] <= wanted)


# ---- a run


@dataclass
class Session:
    """One run of the suite: the model, the machine's speed, and the children that are alive (two at most)."""

    model: Path
    scratch: Path
    calibration: Calibration
    gauge: Callable[[], float]
    blocks: int = 3
    threads: int = 2
    smoke: bool = False
    best_gflops: float = 0.0
    slower: float = SLOWER
    say: Callable[[str], None] = print
    alive: list[Child] = field(default_factory=list)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    small_vocabulary: Callable[[], Path] = lambda: Path()
    small: Callable[[], Path] = lambda: Path()

    @contextmanager
    def child(self, name: str, where: str, module: str) -> Iterator[Child]:
        """`module` as a child in environment `where`. Raises NotMeasured where that environment is not installed."""
        python, remedy = ENVIRONMENTS[where]
        if not python.exists():
            raise NotMeasured(f"needs {python.parent.parent.name} ({remedy})")
        if len(self.alive) >= 2:
            raise AssertionError(f"{[c.name for c in self.alive]} are resident; a third would not fit")
        path = f"{ROOT / 'src'}{os.pathsep}" * (where == "burnish") + str(ROOT)
        threads = str(self.threads)
        environment = {
            **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        log = self.scratch / f"{module.rsplit('.', 1)[-1]}-{len(list(self.scratch.glob('*.log')))}.log"
        child = Child(name, [str(python), "-m", module], log=log, environment=environment)
        self.alive.append(child)
        try:
            yield child
        finally:
            child.stop()
            self.alive.remove(child)

    @contextmanager
    def pair(self, theirs: tuple[str, str, str], ours: tuple[str, str, str]) -> Iterator[Callable[[], tuple[Child, Child]]]:
        """Two children, each (name, environment, module), that are kept between cases and started again after one ended."""
        with ExitStack() as stack:
            kept: list[Child] = []

            def both() -> tuple[Child, Child]:
                if len(kept) < 2 or any(child.process.poll() is not None for child in kept):
                    stack.close()
                    kept[:] = [stack.enter_context(self.child(*who)) for who in (theirs, ours)]
                return kept[0], kept[1]

            yield both

    def prepare(self, child: Child, **order: Any) -> Answer:
        """The child's `prepare`, its versions noted."""
        ready = child.ask("prepare", threads=self.threads, **order)
        self.versions.setdefault(child.name, {}).update(ready.get("versions", {}))
        return ready

    def run(self, turns: Mapping[str, Callable[[Mapping[str, Answer]], Answer]], wanted: int | None = None) -> Measured:
        wanted = min(wanted or self.blocks, self.blocks)
        measured = run_blocks(turns, wanted, self.gauge, best=self.best_gflops, slower=self.slower, settle=lambda: time.sleep(SETTLE_S))
        self.best_gflops = measured.best_gflops
        return measured


@contextmanager
def forgiven(case: Case, say: Callable[[str], None]) -> Iterator[None]:
    """One case of a bench: what stops it is written into it, and the next one runs."""
    try:
        yield
    except (NotMeasured, ChildError) as error:
        case["not_measured"] = str(error)
        if getattr(error, "discarded", 0):
            case["discarded"] = error.discarded  # type: ignore[union-attr]
        say(f"    {case['case']}: not measured: {error}")
