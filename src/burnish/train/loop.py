"""The one training loop. Only it calls backward; only `optim` steps; `evaluate` and `guards` are functions passed in.

Every step counts what it did: a batch without labels, a loss or gradient that is not finite, and a run without steps are
errors or counted skips, never silent successes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from burnish.core.errors import CompleteError, ConfigError, DivergedError
from burnish.core.ledger import Ledger, forward_flops, train_flops
from burnish.core.machine import peak_resident_bytes as rss_bytes
from burnish.core.metrics import emit
from burnish.core.records import ModelShape, Spend
from burnish.core.runs import StageFolder, append_json, cut, write_json
from burnish.core.stop import Stop
from burnish.forest.pack import Micro
from burnish.maths.head import Objective
from burnish.models.policy import Output, Policy, RowLoss, row_flops
from burnish.train import checkpoint
from burnish.train.activations import Dice
from burnish.train.memory import Memory, Plan, out_of_memory
from burnish.train.method import Method, Pass, Work
from burnish.train.optim import Optimiser


class Settings(Protocol):
    """What the loop reads of a recipe's `train` block."""

    learning_rate: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    weight_decay: float
    clip_norm: float | None
    checkpoint_every: int | None
    keep_checkpoints: int
    validate_every: int | None
    max_skipped_steps: int


@dataclass
class State:
    """What the loop knows. Everything here survives a resume."""

    step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    label_tokens: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    stopped_by: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "label_tokens": self.label_tokens,
            "ledger": self.ledger.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> State:
        names = ("step", "skipped_steps", "skipped_in_a_row", "label_tokens")
        return cls(**{n: value[n] for n in names}, ledger=Ledger.from_json(value["ledger"]))


Guard = Callable[[State, Mapping[str, Any]], str | None]
"""(state, the step's metrics) -> a reason to stop, or None."""


def peak_bytes(device: torch.device) -> int:
    """The most memory held at once: of the device a policy lives on, or of this process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else rss_bytes()


def fit(
    policy: Policy,
    method: Method,
    settings: Settings,
    folder: StageFolder,
    *,
    schedule: Callable[[int, int], float],
    memory: Memory,
    stop: Stop,
    resume: bool = False,
    evaluate: Callable[[State], Mapping[str, Any] | None] | None = None,
    guards: Sequence[Guard] = (),
    on_step: Callable[[Mapping[str, Any], Mapping[str, Any], State], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> State:
    """Train `policy` in place to `method.total_steps` and return the final state.

    schedule(step, total) multiplies the learning rate; memory bounds a micro-batch (it cannot change the result beyond
    rounding, a router's term apart: weights are fixed before the split). Raises ConfigError (no step to do), DataError (a batch without
    labels), DivergedError (too many non-finite steps in a row), MachineError (one row alone does not fit into memory),
    Interrupted (a signal; everything is saved).
    """
    if method.total_steps < 1:
        raise ConfigError("the stage has no step to do", where="train.steps", remedy="set train.steps or train.epochs above zero")
    method.start(policy, folder, stop.check)
    optimiser = Optimiser(
        policy,
        learning_rate=settings.learning_rate,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        beside=method.beside(settings.learning_rate),
    )
    state = State()
    if resume and (found := checkpoint.latest(folder)):
        for notice in found.notices:
            say(notice)
        optimiser.load(found.tensors)
        state = State.from_json(found.state["loop"])
        policy.version = found.state["version"]
        method.load(found.state["method"])
        cut(folder.metrics, found.state["metrics_bytes"])
        cut(folder.timing, found.state["timing_bytes"])
        append_json(folder.timing, {"step": state.step, "kind": "resume"})
        say(f"continuing after step {state.step}")
    else:
        cut(folder.metrics, 0)
        cut(folder.timing, 0)
    if state.step > method.total_steps:
        raise CompleteError(f"the checkpoint is at step {state.step} of {method.total_steps}", where=str(folder.root))

    def save() -> None:
        begin = time.perf_counter()
        sizes = {f"{p.stem}_bytes": p.stat().st_size if p.exists() else 0 for p in (folder.metrics, folder.timing)}
        body = {"loop": state.to_json(), "version": policy.version, "method": method.state(), **sizes}
        checkpoint.save(folder, state.step, optimiser.tensors(), body, keep=settings.keep_checkpoints)
        state.ledger.measure("save", time.perf_counter() - begin)

    shape = policy.shape
    saved = state.step
    try:
        for work in method.batches(state.step):
            begin = time.perf_counter()
            row = one_step(policy, method, optimiser, settings, schedule, memory, state, work, shape, say)
            if policy.device.type == "cuda":
                torch.cuda.synchronize(policy.device)  # the optimiser is still at work
            append_json(folder.metrics, row)
            took = time.perf_counter() - begin
            state.ledger.measure("train", took - sum(work.seconds.values()))
            for phase, seconds in work.seconds.items():
                state.ledger.measure(phase, seconds)
            state.ledger.saw_memory(peak_bytes(policy.device))
            timing = {"step": state.step, "seconds": round(took, 5), "train_tokens_per_s": round(row["stream_tokens"] / took, 1),
                      "rss_bytes": rss_bytes(), **emit(**{f"{phase}_seconds": round(s, 5) for phase, s in work.seconds.items()})}  # fmt: skip
            append_json(folder.timing, timing)
            last = state.step == method.total_steps
            if evaluate is not None and settings.validate_every and (state.step % settings.validate_every == 0 or last):
                begin = time.perf_counter()
                if (more := evaluate(state)) is not None:
                    append_json(folder.metrics, emit(step=state.step, kind="validation", **more))
                state.ledger.measure("validation", time.perf_counter() - begin)
            if on_step is not None:
                on_step(row, timing, state)
            for guard in guards:
                state.stopped_by = state.stopped_by or guard(state, row)
            due = settings.checkpoint_every and state.step % settings.checkpoint_every == 0
            if due or last or stop.requested or state.stopped_by:
                save()
                saved = state.step
            stop.check()
            if state.stopped_by:
                break
    finally:
        optimiser.close()
        method.close()
    if saved != state.step:
        raise AssertionError("the last step was not saved")
    write_json(folder.ledger, state.ledger.to_json())
    return state


def one_step(
    policy: Policy, method: Method, optimiser: Optimiser, settings: Settings, schedule: Callable[[int, int], float],
    memory: Memory, state: State, work: Work, shape: ModelShape, say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """One optimiser step (or one counted skip); returns the metrics row.

    Where memory runs out the same batch begins again with smaller micro-batches: its weights were fixed before the
    split, gradients are cleared and the dice put back, so that the step is the one it would have been.
    """
    begin = time.perf_counter()
    method.prepare(policy, work)
    for notice in work.notices:
        say(f"note: {notice}")
    if work.spend != Spend():
        state.ledger.spend(work.spend, "prepare")
        work.seconds["prepare"] = time.perf_counter() - begin - work.seconds.get("reward", 0.0)
    policy.train()
    rate = settings.learning_rate * schedule(*(work.part or (state.step, method.total_steps)))
    if work.restart is not None:
        optimiser.restart(work.restart)
    if work.made is None:  # nothing in it has a gradient: counted, and no update is made
        state.step += 1
        return emit(
            step=state.step, kind="train", loss=None, grad_norm=None, lr=rate, label_tokens=0, stream_tokens=0, rows=work.rows,
            epoch=round(work.epoch, 6), skipped_steps=state.skipped_steps, **work.logged(),
        )  # fmt: skip
    if not memory.plans:
        memory.decide(policy, optimiser, work.batch.trees, partial(trial, policy))
        say(str(memory.plan(1)))
    dice = Dice(policy.device)
    while True:
        plan = memory.follow(state.step + 1, policy)
        optimiser.zero()
        try:
            done = gradients(policy, method, plan, work, shape)
            break
        except _TooLarge as failed:
            # outside its handler nothing refers to the failed forward any more, and its tensors are free
            micro, error = failed.micro, failed.error
        smaller = memory.shrink(state.step + 1, micro, policy, optimiser, error)
        say(f"out of memory in step {state.step + 1} ({plan}): the same batch again, {smaller}")
        del micro, error
        dice.back()
    loss, norm = done.loss(), optimiser.gradient_norm()
    finite = math.isfinite(loss) and bool(torch.isfinite(norm))
    state.step += 1
    if finite:
        try:
            own = method.update(policy, optimiser, work, plan, rate)
            if own is None:
                optimiser.step(rate, norm, policy_moves=work.policy_moves)
            done.executed += own or 0
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise memory.failure(policy, optimiser, "the update itself has no room") from error
        state.skipped_in_a_row = 0
    else:
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row > settings.max_skipped_steps:
            raise DivergedError(
                f"loss {loss} and gradient norm {float(norm)} at step {state.step}, {state.skipped_in_a_row} times in a row; "
                "no update was made from them",
                where=", ".join(work.where[:8]) or f"step {state.step}",
                remedy="lower train.learning_rate, or look at the rows named here; weights are as of the last finite step",
            )
    state.label_tokens += done.labels
    state.ledger.count("train", stream_tokens=done.tokens, label_tokens=done.labels, useful_flops=done.useful, executed_flops=done.executed)
    return emit(
        step=state.step, kind="train", loss=loss if math.isfinite(loss) else None, grad_norm=float(norm) if finite else None,
        lr=rate, label_tokens=done.labels, stream_tokens=done.tokens, rows=work.rows, epoch=round(work.epoch, 6),
        skipped_steps=state.skipped_steps, **done.terms(), **work.logged(),
    )  # fmt: skip


class _TooLarge(Exception):
    """A micro-batch that memory did not hold. `error` without its traceback, which would keep the tensors alive."""

    def __init__(self, micro: Micro, error: BaseException) -> None:
        self.micro, self.error = micro, error.with_traceback(None)
        super().__init__(str(error))


@dataclass
class Done:
    """What forward and backward of a whole batch did. Losses stay on their device: each read would make a GPU wait."""

    losses: list[torch.Tensor] = field(default_factory=list)
    router: list[torch.Tensor] = field(default_factory=list)
    labels: int = 0
    tokens: int = 0
    useful: int = 0
    executed: int = 0

    def loss(self) -> float:
        return math.fsum(torch.stack(self.losses).tolist()) if self.losses else math.nan

    def terms(self) -> dict[str, float | None]:
        """Parts of the loss that are the model's own, for the log."""
        if not self.router:
            return {}
        total = sum(torch.stack(self.router).tolist())
        return {"router_loss": total if math.isfinite(total) else None}


def gradients(policy: Policy, method: Method, plan: Plan, work: Work, shape: ModelShape) -> Done:
    """Forward and backward of a whole batch. A loss that is not finite spoils the gradients, which are then not used."""
    done = Done()
    for micro in work.batch.split(plan.micro_tokens, plan.head_rows):
        for run in method.forwards(policy, work, micro):  # one after the other: activations of one stand at a time
            if run.policy is not policy and run.on_rows is not None and run.on_rows.through_body:
                run.policy.checkpoint(plan.checkpointing)
            try:
                out = forward_backward(run.policy, micro, run.objective, run.couple, on_rows=run.on_rows)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                raise _TooLarge(micro, error) from None
            done.losses.append(out.loss.detach())
            if run.objective is not None:
                method.observe(work, micro, out.logprobs)
            if out.router_loss is not None:
                done.router.append(out.router_loss)
            done.executed += out.executed_flops(True)
            done.useful += useful_flops(run, micro, shape if run.policy is policy else run.policy.shape)
            del out
        done.labels += len(micro.view.index)
        done.tokens += len(micro.stream.tokens)
    return done


def useful_flops(run: Pass, micro: Micro, shape: ModelShape) -> int:
    """The least work of one pass over a micro-batch; `shape` is its policy's."""
    tokens, rows, layout = len(micro.stream.tokens), len(micro.view.label), micro.stream.layout
    segments = list(zip(layout.first_position, layout.length))
    further = 0 if run.on_rows is None else row_flops(rows, shape.hidden, run.on_rows, backward=True)
    if run.objective is not None:
        return train_flops(shape, tokens, rows, segments) + further
    return further + (train_flops if run.on_rows and run.on_rows.through_body else forward_flops)(shape, tokens, 0, segments)


def forward_backward(
    policy: Policy, micro: Micro, objective: Objective | None, couple: torch.Tensor | None = None, *,
    rows: int | None = None, on_rows: RowLoss | None = None, between: Callable[[], None] | None = None,
) -> Output:  # fmt: skip
    """One micro-batch: its gradient is added to what is there."""
    out = policy(micro, objective, couple=couple, rows=rows, on_rows=on_rows)
    if between is not None:
        between()
    out.loss.backward()
    return out


def trial(policy: Policy, micro: Micro, objective: Objective, rows: int | None, between: Callable[[], None]) -> None:
    """`forward_backward` as `activations.measure` runs it."""
    forward_backward(policy, micro, objective, rows=rows, between=between)
