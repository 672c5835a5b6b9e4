"""The one training loop. Only it calls backward; only `optim` steps; `evaluate` and `guards` are functions passed in.

Every step counts what it did: a batch without labels, a loss or gradient that is not finite, and a run without steps are
errors or counted skips, never silent successes.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from burnish.core.errors import CompleteError, ConfigError, DivergedError
from burnish.core.ledger import Ledger, train_flops
from burnish.core.metrics import emit
from burnish.core.records import ModelShape
from burnish.core.runs import StageFolder, append_json, cut, write_json
from burnish.core.stop import Stop
from burnish.models.policy import Policy
from burnish.train import checkpoint
from burnish.train.method import Method, Work
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


def rss_bytes() -> int:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def fit(
    policy: Policy,
    method: Method,
    settings: Settings,
    folder: StageFolder,
    *,
    schedule: Callable[[int, int], float],
    micro_tokens: int,
    stop: Stop,
    resume: bool = False,
    evaluate: Callable[[State], Mapping[str, Any] | None] | None = None,
    guards: Sequence[Guard] = (),
    on_step: Callable[[Mapping[str, Any], Mapping[str, Any], State], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> State:
    """Train `policy` in place to `method.total_steps` and return the final state.

    schedule(step, total) multiplies the learning rate; micro_tokens bounds a micro-batch's stream (it cannot change the
    result beyond rounding: weights are fixed before the split). Raises ConfigError (no step to do), DataError (a batch
    without labels), DivergedError (too many non-finite steps in a row), Interrupted (a signal; everything is saved).
    """
    if method.total_steps < 1:
        raise ConfigError("the stage has no step to do", where="train.steps", remedy="set train.steps or train.epochs above zero")
    optimiser = Optimiser(
        policy,
        learning_rate=settings.learning_rate,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
    )
    state = State()
    if resume and (found := checkpoint.latest(folder)):
        for notice in found.notices:
            say(notice)
        optimiser.load(found.tensors)
        state = State.from_json(found.state["loop"])
        policy.version = found.state["version"]
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
        body = {"loop": state.to_json(), "version": policy.version, **sizes}
        checkpoint.save(folder, state.step, optimiser.tensors(), body, keep=settings.keep_checkpoints)
        state.ledger.measure("save", time.perf_counter() - begin)

    shape = policy.shape
    saved = state.step
    try:
        for work in method.batches(state.step):
            begin = time.perf_counter()
            row = one_step(policy, method, optimiser, settings, schedule, micro_tokens, state, work, shape)
            if policy.device.type == "cuda":
                torch.cuda.synchronize(policy.device)  # the optimiser is still at work
            append_json(folder.metrics, row)
            took = time.perf_counter() - begin
            state.ledger.measure("train", took)
            state.ledger.saw_memory(peak_bytes(policy.device))
            timing = {"step": state.step, "seconds": round(took, 5), "train_tokens_per_s": round(row["stream_tokens"] / took, 1),
                      "rss_bytes": rss_bytes()}  # fmt: skip
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
    if saved != state.step:
        raise AssertionError("the last step was not saved")
    write_json(folder.ledger, state.ledger.to_json())
    return state


def one_step(
    policy: Policy, method: Method, optimiser: Optimiser, settings: Settings, schedule: Callable[[int, int], float],
    micro_tokens: int, state: State, work: Work, shape: ModelShape,
) -> dict[str, Any]:  # fmt: skip
    """One optimiser step (or one counted skip); returns the metrics row."""
    method.prepare(policy, work)
    policy.train()
    optimiser.zero()
    labels, tokens, useful, executed = 0, 0, 0, 0
    losses: list[torch.Tensor] = []  # read once, after the last micro-batch: each read would make a GPU wait
    for micro in work.batch.split(micro_tokens):
        objective, couple = method.objective(work, micro)
        out = policy(micro, objective, couple=couple)
        losses.append(out.loss.detach())
        out.loss.backward()
        layout = micro.stream.layout
        labels += len(micro.view.index)
        tokens += len(micro.stream.tokens)
        executed += out.executed_flops(True)
        useful += train_flops(shape, len(micro.stream.tokens), len(micro.view.label), zip(layout.first_position, layout.length))
        del out
    loss: float = sum(torch.stack(losses).tolist())
    norm = optimiser.gradient_norm()
    rate = settings.learning_rate * schedule(state.step, method.total_steps)
    finite = math.isfinite(loss) and bool(torch.isfinite(norm))
    state.step += 1
    if finite:
        optimiser.step(rate, norm)
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
    state.label_tokens += labels
    state.ledger.count("train", stream_tokens=tokens, label_tokens=labels, useful_flops=useful, executed_flops=executed)
    return emit(
        step=state.step, kind="train", loss=loss if math.isfinite(loss) else None, grad_norm=float(norm) if finite else None,
        lr=rate, label_tokens=labels, stream_tokens=tokens, rows=work.rows, epoch=round(work.epoch, 6),
        skipped_steps=state.skipped_steps,
    )  # fmt: skip
