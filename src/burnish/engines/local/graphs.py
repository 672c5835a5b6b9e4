"""Decode steps as CUDA graphs: captured once a shape, replayed with one launch.

A step is any function of tensors whose rows are running rows: token, position, length, noise in; token, log-prob out. It
may write into the arena, and it may do nothing that depends on values: no host read, no shape from data. Its inputs are
copied into static tensors of the next larger row count, the graph of that count is replayed, and its outputs are handed
back cut to the rows asked for. What else the graph's addresses and shapes depend on (the arena's tensors, the span of
keys, the sampling settings) is the caller's `key`: one that was not seen before is captured, one that names memory that
is gone is `forget`-ten.

Rows past those asked for are dummies: they repeat the last row's inputs except where `blank` says what to give them, so
that they write where nobody reads. Noise is a counter hash, so a graph holds no generator's state. Not yet run on a GPU:
the bookkeeping is tested on a CPU with a capture that calls the step again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from burnish.core.records import Sampling
from burnish.engines.local.arena import KEYS_STEP
from burnish.engines.local.plans import Decode
from burnish.engines.local.sampling import draw

if TYPE_CHECKING:
    from burnish.engines.local.engine import LocalEngine

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
WARM_UPS = 2  # the first call of a kernel may allocate, compile or choose: none of that is allowed in a capture

Step = Callable[..., tuple[Tensor, ...]]
"""step(**inputs [b, ...]) -> outputs [b, ...]"""
Capture = Callable[[Callable[[], tuple[Tensor, ...]]], tuple[Callable[[], None], tuple[Tensor, ...]]]
"""work -> (replay, the tensors in which replay leaves its results)"""


def bucket(rows: int, most: int = ROWS[-1]) -> int | None:
    """The least captured row count that holds `rows` and is at most `most`; None: run eagerly."""
    at = bisect_left(ROWS, rows)
    return ROWS[at] if rows > 0 and at < len(ROWS) and ROWS[at] <= most else None


def capturable(sampling: Sampling) -> bool:
    """Whether drawing is free of values: top-p looks at the mass it has gathered so far to know whether to go on."""
    return sampling.top_p >= 1.0


def cuda_capture(pool: Any) -> Capture:
    """Capture on the current device, with memory from `pool` (`torch.cuda.graph_pool_handle()`)."""

    def capture(work: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
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

    A step that cannot be captured (it reads a value, or calls a library that does) runs eagerly from then on, and
    `refused` says why, by key.

    A warm-up runs the step before it is captured, and the capture itself runs nothing: a step that is captured has been
    run WARM_UPS times on the same inputs when its replay runs it again. It must come to the same (decode writes the same
    key to the same place).
    """

    def __init__(self, step: Step, capture: Capture | None = None, limit: int = 64) -> None:
        self.step, self.limit = step, limit
        self._capture = capture
        self._kept: dict[tuple[Hashable, int], _Captured] = {}
        self.refused: dict[Hashable, str] = {}
        self.captures = self.replays = self.eager = 0

    def __call__(
        self,
        key: Hashable | None,
        inputs: Mapping[str, Tensor],
        *,
        most: int = ROWS[-1],
        blank: Mapping[str, Callable[[Tensor, int], None]] | None = None,
    ) -> tuple[Tensor, ...]:
        """The step's outputs for inputs [n, ...]: eagerly where key is None or no bucket within `most` rows holds n.

        blank[name](tensor [b, ...], n) fills the dummy rows n.. of an input. The outputs are views of static memory: the
        next call with this key overwrites them.
        """
        rows = len(next(iter(inputs.values())))
        size = None if key is None or key in self.refused else bucket(rows, most)
        if size is None:
            self.eager += 1
            return self.step(**inputs)
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
            self._capture = self._capture or cuda_capture(torch.cuda.graph_pool_handle())
            try:
                held = _Captured(static, *self._capture(lambda: self.step(**static)))
            except RuntimeError as error:
                self.refused[key] = str(error).splitlines()[0]
                self.eager += 1
                return self.step(**inputs)
            self.captures += 1
        self._kept[name] = held  # last in, and so last to go
        while len(self._kept) > self.limit:
            del self._kept[next(iter(self._kept))]
        held.replay()
        self.replays += 1
        return tuple(x[:rows] for x in held.outputs)

    def forget(self, key: Hashable | None = None) -> None:
        """Drop the graphs of `key` (None: all), because the memory they point at is gone."""
        for name in [n for n in self._kept if key is None or n[0] == key]:
            del self._kept[name]


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
        self._seen, self._bias, self._places, self._pairs = {}, {}, {}, {}
        self._held = np.full(self.n, span - 1)  # FLOPs are counted once, at the capture, for the longest rows it serves


def span_of(longest: int) -> int:
    """The keys a step must attend to where the longest slot holds `longest` before it: doubled, so that few are captured."""
    span = KEYS_STEP
    while span <= longest:
        span *= 2
    return span


def decode_step(engine: LocalEngine, sampling: Sampling, span: int) -> Step:
    """Body, head and draw of one token a row as a `Step`: (token, position, length, noise) -> (token, log-prob).

    Inputs are as `Rollout` keeps them, for rows of one sample each that share no node: the token in hand, where it
    stands, the keys its slot holds, the sample's noise. The arena
    must have slots of at least `span` keys, and rows for a whole bucket. One step serves one arena at one size and one
    version of the weights: both are other tensors afterwards, so make another and `forget` this one's graphs.
    """
    policy, weights = engine.policy, engine.weights
    plan = StaticDecode(engine.arena, policy.device)
    lean = weights.lean
    tables: list[Any] = []  # kept alive: a graph reads the ones it was captured with, also when longer ones are made
    for rotation in lean.rotations if lean is not None else ():
        rotation.at(torch.zeros(1, dtype=torch.int64, device=policy.device), span - 1)
        tables += [rotation.cos, rotation.sin]

    def step(token: Tensor, position: Tensor, length: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        plan.begin_static(length, span)
        hidden = weights.body(token, position, plan)
        return draw(weights.head(hidden), sampling, noise, position + 1, policy.logit_map)

    step.tables = tables  # type: ignore[attr-defined]
    return step


def no_keys(length: Tensor, rows: int) -> None:
    """The `blank` of dummy rows' lengths: they write to the head of slots that nobody runs in."""
    length[rows:] = 0
