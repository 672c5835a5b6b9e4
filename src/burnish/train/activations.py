"""What a micro-batch holds while it runs, in bytes: measured on a few small ones and linear from there.

Nothing is guessed from the architecture. `Watch` sees every tensor that comes and goes, on any device, and allocates
nothing; what kernels use inside themselves (a few MB) it does not see.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from burnish.forest.pack import Batch, Micro
from burnish.forest.stream import Tree, Unit
from burnish.maths.head import Objective, row_limit
from burnish.models.policy import Policy

TOKENS = (64, 192)  # of the micro-batches measured: the line through them was 0.1 % off at 4,096 (spark, fp32)
ROWS = 48


class Watch(TorchDispatchMode):
    """Bytes of the tensors made within it that are still alive (`live`), and the most there were at once (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_iter((args, kwargs)):
            if isinstance(x, Tensor):  # what was there before is not ours, and neither is a view of it
                self._meet(x, counts=False)
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                self._meet(x, counts=True)
        return out

    def _meet(self, x: Tensor, *, counts: bool) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counts else 0
        if key in self._known:
            return
        self._known[key] = weakref.ref(storage, lambda _: self._leave(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _leave(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size

    def mark(self) -> int:
        """The peak so far; from here on a new one is kept."""
        peak, self.peak = self.peak, self.live
        return peak


@dataclass(frozen=True)
class Line:
    """bytes = fixed + per_token * tokens"""

    fixed: float
    per_token: float

    @staticmethod
    def through(tokens: Sequence[int], found: Sequence[int]) -> Line:
        slope = (found[1] - found[0]) / (tokens[1] - tokens[0])
        return Line(found[0] - slope * tokens[0], slope)

    def at(self, tokens: int) -> float:
        return self.fixed + self.per_token * tokens


@dataclass(frozen=True)
class Activations:
    """Bytes a micro-batch of T tokens and N head rows holds above what stands there anyway: the largest of

    body(T)                   while the body runs forward
    kept(T) + head(N)         while the head works: one chunk of logits, and with several chunks what sums over them
    start(T) + row_after * N  while the head's gradients reach their places
    layers(T)                 while the layers run backward
    embedding(T)              while the embedding takes its gradient

    Each is a line of its own: a large vocabulary's gradient hides the layers behind it in small micro-batches.
    row_bytes        of the head, a row of the chunk; row_after: what a row leaves for the backward
    chunk_rows       rows of one chunk, where there are more than one
    several_bytes    more, where there are several chunks
    """

    body: Line
    kept: Line
    start: Line
    layers: Line
    embedding: Line
    head_fixed: float
    row_bytes: float
    row_after: float
    chunk_rows: int
    several_bytes: float

    def head(self, rows: int) -> float:
        """What the head needs for itself."""
        chunk = min(rows, self.chunk_rows)
        return self.head_fixed + self.row_bytes * chunk + self.row_after * (rows - chunk) + self.several_bytes * (rows > chunk)

    def peak(self, tokens: int, rows: int) -> int:
        """The most at once."""
        forward = max(self.body.at(tokens), self.kept.at(tokens) + self.head(rows))
        backward = max(self.start.at(tokens) + self.row_after * rows, self.layers.at(tokens), self.embedding.at(tokens))
        return int(max(forward, backward))

    def to_json(self) -> dict[str, Any]:
        return {k: round(v) if isinstance(v, float) else v for k, v in asdict(self).items()}


class Dice:
    """The state of the random generators that a step on `device` draws from, to go back to."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host = torch.get_rng_state()
        self.there = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def back(self) -> None:
        """What is drawn next is what was drawn after the state was taken."""
        torch.set_rng_state(self.host)
        if self.there is not None:
            torch.cuda.set_rng_state(self.there, self.device)


Run = Callable[[Micro, Objective, int | None, Callable[[], None]], None]
"""(micro-batch, objective, rows of a chunk or None, what to call between forward and backward): the loop's own step."""


def measure(policy: Policy, trees: Sequence[Tree], run: Run) -> Activations:
    """Run four micro-batches made of these trees' segments. Gradients are left with what they added; the dice are put back."""
    dice = Dice(policy.device)
    weight = policy.head_weight()
    limit = row_limit(2**31, weight, None, weight_trained=weight.requires_grad)
    del weight
    rows = min(ROWS, limit)
    found = [_phases(policy, like(trees, t, n), run, chunk) for t, n, chunk in (
        (TOKENS[0], 1, None), (TOKENS[1], 1, None), (TOKENS[1], rows, None), (TOKENS[1], rows, -(-rows // 2)),
    )]  # fmt: skip
    dice.back()
    body, kept, head, left, start, layers, embedding = zip(*found)
    own = [h - k for h, k in zip(head, kept)]  # of the head alone
    row_bytes = (own[2] - own[1]) / max(1, rows - 1)
    row_after = max(0.0, ((left[2] - kept[2]) - (left[1] - kept[1])) / max(1, rows - 1))
    several = own[3] - (own[2] - row_bytes * (rows - -(-rows // 2)) + row_after * (rows // 2))
    return Activations(
        body=Line.through(TOKENS, body), kept=Line.through(TOKENS, kept), start=Line.through(TOKENS, start),
        layers=Line.through(TOKENS, layers), embedding=Line.through(TOKENS, embedding),
        head_fixed=own[1] - row_bytes, row_bytes=row_bytes, row_after=row_after, chunk_rows=limit, several_bytes=max(0.0, several),
    )  # fmt: skip


def _phases(policy: Policy, micro: Micro, run: Run, chunk: int | None) -> tuple[int, ...]:
    """Bytes: peak of the body, kept by it, peak of the head, kept after it, peaks of the backward (see `Activations`)."""
    watch = Watch()
    seen: list[int] = []
    backward: dict[str, int] = {}

    def note() -> None:
        seen.extend((watch.mark(), watch.live))

    def begins(phase: str, x: Any) -> None:
        """When the gradient of `x` is there, the next phase of the backward begins."""
        if isinstance(x, Tensor) and x.requires_grad:
            x.register_hook(lambda _: backward.setdefault(phase, watch.mark()) and None)

    hook = policy.base.get_input_embeddings().register_forward_hook(lambda module, given, out: begins("layers", out))
    try:
        with watch, _after(policy, "hidden", lambda out: (note(), begins("start", out))):
            run(micro, lambda logprobs, _: -logprobs.mean(), chunk, note)
    finally:
        hook.remove()
    body, kept, head, left = seen
    last = watch.peak
    start = backward.get("start", last)
    return body, kept, head, left, start, backward.get("layers", last), last


@contextmanager
def _after(policy: Policy, name: str, call: Callable[[Any], Any]) -> Iterator[None]:
    """Within it, `call(result)` is called whenever the policy's method `name` returns."""
    method = getattr(policy, name)

    def then(*args: Any, **kwargs: Any) -> Any:
        out = method(*args, **kwargs)
        call(out)
        return out

    setattr(policy, name, then)
    try:
        yield
    finally:
        delattr(policy, name)


def like(trees: Sequence[Tree], tokens: int, rows: int) -> Micro:
    """One micro-batch of exactly `tokens` tokens and `rows` labels: these trees' segments as often as it takes, cut."""
    made: list[Tree] = []
    left, wanted = tokens, rows
    for tree in cycle(trees):
        segments, parent, room = [], [], left
        for ids, above in zip(tree.tokens, tree.parent):
            if room:
                segments.append(ids[:room])
                parent.append(above)
                room -= len(segments[-1])
        first = 0  # the leaf of the first path
        while first + 1 < len(parent) and parent[first + 1] == first:
            first += 1
        length = sum(map(len, segments[: first + 1]))
        labels = tuple(range(max(1, length - wanted), length))
        made.append(Tree(tuple(segments), tuple(parent), (Unit(first, labels),)))
        left, wanted = room, wanted - len(labels)
        if not left:
            break
    (micro,) = Batch(made).split(tokens)
    return micro
