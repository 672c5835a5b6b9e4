"""Decode steps as CUDA graphs: captured once a shape, replayed with one launch.

A step is any function of tensors whose rows are running rows. It may write into the arena, and it may do nothing that
depends on values: no host read, no shape from data. Its inputs are copied into static tensors of the next larger row
count, the graph of that count is replayed, and its outputs are handed back cut to the rows asked for. Rows past those
asked for are dummies: they repeat the last row's inputs except where `blank` says what to give them, so that they write
where nobody reads.

What the engine captures (`DecodeGraphs`) is the body: it is where the launches are. The head is one product, and while the
device works through the body the host sends off the head and the draw, whose rows are samples and not rows of the body.
Not captured: rows that share nodes, whose members change (plans.trunk_of keeps them rare on a GPU).

Not yet run on a GPU: what is done is tested on a CPU with a capture that calls the step again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from burnish.engines.local.arena import KEYS_STEP
from burnish.engines.local.crossing import upload
from burnish.engines.local.plans import Decode

if TYPE_CHECKING:
    from burnish.engines.local.engine import LocalEngine

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
WARM_UPS = 2  # the first call of a kernel may allocate, compile or choose: none of that is allowed in a capture
PATIENCE = 4  # eager steps of a shape before it is captured: about what a capture costs, so that none costs twice its worth

Step = Callable[..., tuple[Tensor, ...]]
"""step(**inputs [b, ...]) -> outputs [b, ...]"""
Capture = Callable[[Callable[[], tuple[Tensor, ...]]], tuple[Callable[[], None], tuple[Tensor, ...]]]
"""work -> (replay, the tensors in which replay leaves its results)"""


def bucket(rows: int, most: int = ROWS[-1]) -> int | None:
    """The least row count that is captured and holds `rows`, `most` among them; None, run eagerly: none does."""
    if not 0 < rows <= min(most, ROWS[-1]):
        return None
    return min(ROWS[bisect_left(ROWS, rows)], most)


def cuda_capture(device: torch.device) -> Capture:
    """Capture on `device`, into one pool of memory for all that this one captures: they are replayed one after another."""
    pool: Any = torch.cuda.graph_pool_handle()
    side = torch.cuda.Stream(device)

    def capture(work: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        with torch.cuda.device(device):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    work()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                made = work()
        return graph.replay, made

    return capture


@dataclass
class _Captured:
    inputs: dict[str, Tensor]
    replay: Callable[[], None]
    outputs: tuple[Tensor, ...]


class Graphs:
    """Captured steps by (key, rows). `limit`: the most kept; the one replayed longest ago goes first.

    A key names everything but the inputs that a graph's addresses and shapes depend on: one key, one step. One that cannot
    be captured (it reads a value, or calls a library that does) runs as it is from then on, and `refused` says why.

    A warm-up runs the step before it is captured, and the capture itself runs nothing: a step that is captured has been
    run WARM_UPS times on the same inputs when its replay runs it again. It must come to the same (decode writes the same
    key to the same place).
    """

    def __init__(self, capture: Capture, limit: int = 64) -> None:
        self.limit = limit
        self._capture = capture
        self._kept: dict[tuple[Hashable, int], _Captured] = {}
        self.refused: dict[Hashable, str] = {}
        self.captures = self.replays = 0

    def __call__(
        self,
        key: Hashable,
        step: Step,
        inputs: Mapping[str, Tensor],
        *,
        most: int = ROWS[-1],
        blank: Mapping[str, Callable[[Tensor, int], None]] | None = None,
    ) -> tuple[Tensor, ...]:
        """The step's outputs for inputs [n, ...], by a graph of `bucket(n, most)` rows; as it is where there is none.

        blank[name](tensor [b, ...], n) fills the dummy rows n.. of an input. The outputs are views of static memory: the
        next call with this key overwrites them.
        """
        rows = len(next(iter(inputs.values())))
        size = None if key in self.refused else bucket(rows, most)
        if size is None:
            return step(**inputs)
        name = key, size
        held = self._kept.pop(name, None)
        static = {k: x.new_empty(size, *x.shape[1:]) for k, x in inputs.items()} if held is None else held.inputs
        for k, x in inputs.items():
            y = static[k]
            y[:rows].copy_(x)
            if rows < size:
                if blank is not None and k in blank:
                    blank[k](y, rows)
                else:
                    y[rows:] = x[-1:]
        if held is None:
            try:
                held = _Captured(static, *self._capture(lambda: step(**static)))
            except RuntimeError as error:
                self.refused[key] = (str(error).splitlines() or [type(error).__name__])[0]
                return step(**inputs)
            self.captures += 1
        self._kept[name] = held  # last in, and so last to go
        while len(self._kept) > self.limit:
            del self._kept[next(iter(self._kept))]
        held.replay()
        self.replays += 1
        return tuple(x[:rows] for x in held.outputs)


# ---- the step of rows that share nothing ------------------------------------------------------------------------------


class StaticDecode(Decode):
    """`Decode` of rows whose lengths the host does not look at: every row sees `span` keys of its slot, less a mask.

    Only for rows without shared nodes, whose members would have to be static too.
    """

    def begin_static(self, length: Tensor, span: int) -> None:
        """length [n] on the device: keys each slot holds before this token, below `span` everywhere."""
        self.n, self.span, self.shared, self.furthest = len(length), span, (), span - 1
        self.flops_of = np.zeros(self.n, np.int64)
        self._shortest = 0
        self._length = length
        self._rows = torch.arange(self.n, device=self.device)
        self._seen, self._bias, self._places, self._launched = {}, {}, {}, {}
        self._held = np.full(self.n, span - 1)  # FLOPs are counted once, at the capture, for the longest rows it serves


def span_of(longest: int) -> int:
    """The keys a step attends to where the longest slot holds `longest` before it: doubled up to 256, so that few are
    captured, then by quarters of the next power of two, so that few are read in vain."""
    power = max(KEYS_STEP, 1 << longest.bit_length())
    step = power if power <= 256 else power // 4
    return (longest // step + 1) * step


def body_step(engine: LocalEngine, plan: StaticDecode, span: int) -> Step:
    """The body of one token a row as a `Step`: (token, length) -> (hidden [n, H],), with `plan` in hand afterwards.

    For rows that share no node: the token in hand stands at position `length`, which is what its slot holds. Slots must
    have `span` keys. A step serves one arena at one size and one version of the weights: both are other tensors after.
    """
    weights = engine.weights
    tables: list[Any] = []  # kept alive: a graph reads the ones it was captured with, also when longer ones are made
    for rotation in weights.lean.rotations if weights.lean is not None else ():
        rotation.at(torch.zeros(1, dtype=torch.int64, device=plan.device), span - 1)
        tables += [rotation.cos, rotation.sin]

    def step(token: Tensor, length: Tensor) -> tuple[Tensor, ...]:
        plan.begin_static(length, span)
        return (weights.body(token, length, plan),)

    step.tables = tables  # type: ignore[attr-defined]
    return step


def no_keys(length: Tensor, rows: int) -> None:
    """The `blank` of dummy rows' lengths: they write to the head of slots that nobody runs in."""
    length[rows:] = 0


# ---- what the engine asks ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replayed:
    """hidden [n, H], until the next step; attention FLOPs of one row; rows launched, dummies among them."""

    hidden: Tensor
    attention: int
    rows: int


class DecodeGraphs:
    """The bodies of an engine's decode steps as graphs. `policy.decisions["graphs"]` says whether, or why not.

    new_capture  makes what captures; asked again whenever the arena or the weights have moved and all graphs are dropped
                 (a pool of memory does not outlive the last graph in it)
    patience     eager steps of a shape before it is captured
    """

    def __init__(self, engine: LocalEngine, new_capture: Callable[[], Capture] | None = None, patience: int = PATIENCE) -> None:
        self.engine, self.patience = engine, patience
        self._new_capture = new_capture or (lambda: cuda_capture(engine.policy.device))
        self._plan = StaticDecode(engine.arena, engine.policy.device)
        self._serves: tuple[int, int] | None = None  # the arena's and the weights' version
        self._graphs: Graphs | None = None
        self._steps: dict[int, tuple[Step, int]] = {}  # and the attention FLOPs of one row, by span
        self._asked: dict[tuple[int, int], int] = {}
        self._decide("captured", f"a decode step is one launch from its {patience + 1}th time on")

    def _decide(self, value: str, why: str) -> None:
        self.on = value == "captured"
        self.engine.policy.decisions["graphs"] = {"value": value, "why": why, "measured": {}}

    def forget(self) -> None:
        """Drop all graphs."""
        self._graphs = self._serves = None
        self._steps.clear()
        self._asked.clear()

    def __call__(self, token: Tensor, length: np.ndarray) -> Replayed | None:
        """The body of rows 0..n-1, which share no node: token [n] in hand, length [n] keys in their slots. None: eagerly."""
        arena, serves = self.engine.arena, (self.engine.arena.remade, self.engine.weights.version)
        size = bucket(len(length), arena.rows)
        if not self.on or size is None:
            return None
        if self._serves != serves:
            self.forget()
            self._serves = serves
        span = min(span_of(int(length.max())), arena.size)
        self._asked[span, size] = self._asked.get((span, size), 0) + 1
        if self._asked[span, size] <= self.patience:
            return None
        self._graphs = self._graphs or Graphs(self._new_capture())
        step, attention = self._steps.get(span) or (body_step(self.engine, self._plan, span), 0)
        inputs = {"token": token, "length": upload(length.copy(), token.device)}
        (hidden,) = self._graphs(span, step, inputs, most=arena.rows, blank={"length": no_keys})
        attention = attention or int(self._plan.flops_of[0])  # the step's Python ran just now: it was captured
        self._steps[span] = step, attention
        if self._graphs.refused:  # it ran as it is; what one span cannot no other will
            self._decide("eager", f"a decode step cannot be captured: {self._graphs.refused[span]}")
            self.forget()
            size = len(length)
        return Replayed(hidden, attention, size)
