"""Training in miniature: what a few steps or rounds of a stage take and hold, at a learning rate of 0, which leaves every weight as it was.

`estimate.py` scales what is measured here to whole stages.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from burnish.build import Built
from burnish.core.errors import DataError, MachineError
from burnish.core.ledger import train_flops
from burnish.core.machine import peak_resident_bytes, resident_bytes
from burnish.core.records import ModelShape, Spend
from burnish.core.runs import StageFolder, file_sha256
from burnish.forest.pack import Batch, Micro
from burnish.machine import gflops
from burnish.models.policy import Policy
from burnish.train.activations import measure
from burnish.train.loop import State, one_step, trial
from burnish.train.memory import Holdings, Memory, Plan
from burnish.train.method import Work
from burnish.train.optim import Optimiser

PROBE_S = 4.0  # about what one phase's miniature may take
BATCHES = 100  # optimiser batches that are counted one by one; a longer stage is as these were
CHECKPOINT_PROBE = 32 << 20


@contextmanager
def peak_since() -> Iterator[Callable[[], int]]:
    """The most resident memory from here on; where the system keeps only the process's peak, that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def most() -> int:
        try:
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            return peak_resident_bytes()

    yield most


@dataclass
class Counted:
    tokens: int
    useful_flops: int


@dataclass
class Taken:
    """Steps of the real loop at a learning rate of 0. seconds: of one; fixed_s: of one without tokens."""

    plan: Plan
    seconds: float
    fixed_s: float
    flops: int
    useful: int
    holdings: Holdings
    largest: tuple[int, int]
    grown: int
    held: int
    tracked: int
    tracked_activations: int
    activations: Callable[[tuple[int, int]], int]
    checkpoint_bytes: int
    model_bytes: int


def largest_micro(micros: Sequence[Micro], peak: Callable[[tuple[int, int]], int]) -> tuple[int, int]:
    """(tokens, head rows) of the micro-batch that holds most."""
    return max(((len(m.stream.tokens), len(m.view.label)) for m in micros), key=peak)


def few_steps(built: Built, policy: Policy) -> Taken:
    method, train = built.method, built.stage.train.model_copy(update={"learning_rate": 0.0})
    memory, shape = built.memory({}), policy.shape
    work: Work = next(iter(method.batches(0)))
    before = resident_bytes()
    with peak_since() as peak, tempfile.TemporaryDirectory() as folder:
        method.start(policy, StageFolder(Path(folder)), lambda: None)
        optimiser = Optimiser(
            policy, learning_rate=0.0, adam_beta1=train.adam_beta1, adam_beta2=train.adam_beta2, adam_epsilon=train.adam_epsilon,
            weight_decay=train.weight_decay, clip_norm=train.clip_norm, beside=method.beside(0.0),
        )  # fmt: skip
        state = State()
        rate = gflops(policy.dtype, size=512, seconds=0.05) * 1e9 * 0.4  # of a product, at first guess
        flops = work_flops(work, shape)
        share = min(1.0, PROBE_S / 3 * rate / flops)
        part = work if share == 1.0 else _cut(work, share)
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < 2 or (time.perf_counter() - begin < PROBE_S / 2 and len(times) < 8):
            executed = state.ledger.flops
            start = time.perf_counter()
            one_step(policy, method, optimiser, train, built.schedule, memory, state, part, shape)
            times.append(time.perf_counter() - start)
        executed = state.ledger.flops - executed
        fixed = 0.0
        if share < 1.0:  # the moments take as long, however few tokens there are
            small = _cut(part, 0.3)
            begin, done = time.perf_counter(), state.ledger.flops
            one_step(policy, method, optimiser, train, built.schedule, memory, state, small, shape)
            took, less = time.perf_counter() - begin, state.ledger.flops - done
            if less < executed:
                fixed = max(0.0, took - less * (min(times[1:]) - took) / (executed - less))
        grown = peak() - before
    method.close()
    middle = sorted(times[1:])[len(times[1:]) // 2]
    return _taken(built, policy, optimiser, memory, part, middle, fixed, executed, work_flops(part, shape), grown)


def _taken(
    built: Built, policy: Policy, optimiser: Optimiser, memory: Memory, part: Work, seconds: float, fixed: float, executed: int, useful: int, grown: int
) -> Taken:  # fmt: skip
    """What the miniature's steps took and hold; closes the optimiser."""
    plan = memory.plan(1)
    known = memory.activations.get(plan.checkpointing)
    if known is None:  # memory was ample, and nobody asked
        known = measure(policy, part.batch.trees, partial(trial, policy))

    def held(micro: tuple[int, int]) -> int:
        return known.peak(*micro)

    holdings = Holdings.of(policy, optimiser)
    largest = largest_micro(part.batch.split(plan.micro_tokens, plan.head_rows), held)
    added = holdings.masters + holdings.gradients + holdings.moments
    states = sum(t.numel() * t.element_size() for t in optimiser.tensors().values())
    adapter = policy.adapted and (built.stage.adapter is None or built.stage.adapter.params.get("save") != "merged")
    model = sum(p.numel() * p.element_size() for p in policy.trainable().values()) if adapter else holdings.weights
    optimiser.close()
    return Taken(
        plan=plan, seconds=seconds, fixed_s=fixed, flops=executed, useful=useful, holdings=holdings,
        largest=largest, grown=grown, held=max(1, grown - added), tracked=added + held(largest), tracked_activations=held(largest), activations=held,
        checkpoint_bytes=states, model_bytes=model,
    )  # fmt: skip


@dataclass
class TwoRounds:
    """The second of two rounds in miniature. length: tokens of a completion; tokens: of a step, the reference's among them."""

    taken: Taken
    length: float
    samples: int
    sampled: int
    scored: int
    prefill: int
    draw_s: float
    draw_useful: int
    draw_executed: int
    tokens: float
    reference: int
    held: int


def two_rounds(built: Built, policy: Policy, per_round: int) -> TwoRounds:
    """Two rounds of a stage, drawn, scored and learned from at a learning rate of 0; the first warms up.

    Raises MachineError where no completion of them has a gradient.
    """
    method, train, shape = built.method, built.stage.train, policy.shape
    memory, draw = built.memory({}), method.rounds.draw
    drawn: list[tuple[Any, float]] = []
    held = 0

    def timed(*given: Any, **named: Any) -> Any:
        nonlocal held
        before, begin = resident_bytes(), time.perf_counter()
        made = draw(*given, **named)
        drawn.append((made, time.perf_counter() - begin))
        held = max(held, resident_bytes() - before)
        return made

    method.rounds.draw = timed
    before = resident_bytes()
    with peak_since() as peak, tempfile.TemporaryDirectory() as folder:
        method.start(policy, StageFolder(Path(folder)), lambda: None)
        reference = max(0, resident_bytes() - before)
        optimiser = Optimiser(
            policy, learning_rate=0.0, adam_beta1=train.adam_beta1, adam_beta2=train.adam_beta2, adam_epsilon=train.adam_epsilon,
            weight_decay=train.weight_decay, clip_norm=train.clip_norm, beside=method.beside(0.0),
        )  # fmt: skip
        state = State()
        learned: list[tuple[float, int, int, int]] = []  # seconds, tokens, useful and executed FLOPs of each step
        part: Work | None = None
        boundary = 0
        try:
            for work in islice(method.batches(0), 2 * per_round):
                if work.step == per_round:
                    boundary = len(drawn)
                begin, many = time.perf_counter(), len(drawn)
                tokens, flops, useful = state.ledger.tokens, state.ledger.flops, _all_useful(state)
                one_step(policy, method, optimiser, train, built.schedule, memory, state, work, shape)
                here = drawn[many:]
                paid = Spend()
                for made, _ in here:
                    paid += made.spend
                seconds = time.perf_counter() - begin - sum(s for _, s in here)
                learned.append((
                    seconds, state.ledger.tokens - tokens - paid.prefill_tokens - paid.sampled_tokens - paid.scored_tokens,
                    _all_useful(state) - useful - paid.useful_flops, state.ledger.flops - flops - paid.executed_flops,
                ))  # fmt: skip
                part = work if work.made is not None else part
        except DataError as error:
            raise _cannot_tell(built, error.message) from error
        finally:
            method.close()
        grown = peak() - before
    if part is None:
        raise _cannot_tell(built, "no completion of the miniature has a gradient: the rewards of every group are equal")
    second = drawn[boundary:]
    samples = [s for made, _ in second for group in (*made.groups, *(group for _, group in made.replaced)) for s in group]
    paid = Spend()
    for made, _ in second:
        paid += made.spend
    steps = learned[per_round:]
    mean = [sum(column) / len(steps) for column in zip(*steps)]
    taken = _taken(built, policy, optimiser, memory, part, mean[0], 0.0, int(mean[3]), int(mean[2]), grown - reference - held)
    extra = len(second[0][0].greedy)
    return TwoRounds(
        taken=taken, length=sum(len(s.tokens) for s in samples) / len(samples), samples=len(samples) + extra, sampled=paid.sampled_tokens,
        scored=paid.scored_tokens, prefill=paid.prefill_tokens, draw_s=sum(s for _, s in second), draw_useful=paid.useful_flops, draw_executed=paid.executed_flops, tokens=mean[1],
        reference=reference, held=held,
    )  # fmt: skip


def _all_useful(state: State) -> int:
    return sum(row.get("useful_flops", 0) for row in state.ledger.counted.values())


def _cannot_tell(built: Built, why: str) -> MachineError:
    return MachineError(
        f"stage {built.stage.name!r} cannot be tried in miniature: {why}",
        where="burnish estimate",
        remedy=f"run it with --set stages.{built.stage.name}.budget.tokens=...: a budget stops it cleanly",
    )


def work_flops(work: Work, shape: ModelShape) -> int:
    (micro,) = work.batch.split(1 << 60)
    layout = micro.stream.layout
    return train_flops(shape, len(micro.stream.tokens), len(micro.view.label), zip(layout.first_position, layout.length))


def _cut(work: Work, share: float) -> Work:
    """The first trees of a batch, about this share of its tokens and at least one."""
    trees, left = [], share * sum(t.size for t in work.batch.trees)
    for tree in work.batch.trees:
        if trees and left < tree.size:
            break
        trees.append(tree)
        left -= tree.size
    part = Batch(trees)
    columns = {name: x[: part.entries if len(x) == work.batch.entries else len(part.group)] for name, x in work.columns.items()}
    return Work(part, rows=len(trees), where=work.where[: len(trees)], epoch=work.epoch, columns=columns)


def count_stage(built: Built, plan: Plan, shape: ModelShape) -> tuple[Counted, tuple[int, int]]:
    """(tokens and useful FLOPs of the whole stage, its largest micro-batch), from its first batches."""
    total, tokens, flops, seen = built.method.total_steps, 0, 0, 0
    largest = (0, 0)
    for work in islice(built.method.batches(0), BATCHES):
        for micro in work.batch.split(plan.micro_tokens, plan.head_rows):
            largest = max(largest, (len(micro.stream.tokens), len(micro.view.label)))
        tokens += sum(t.size for t in work.batch.trees)
        flops += work_flops(work, shape)
        seen += 1
    return Counted(tokens * total // seen, flops * total // seen), largest


def second_a_byte() -> float:
    """Writing, syncing and hashing, as a checkpoint is."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        path = Path(folder) / "probe"
        data = os.urandom(CHECKPOINT_PROBE)
        begin = time.perf_counter()
        with open(path, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        file_sha256(path)
        return (time.perf_counter() - begin) / CHECKPOINT_PROBE
