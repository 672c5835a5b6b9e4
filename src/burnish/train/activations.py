"""What a micro-batch holds while it runs, in bytes: measured on a few small ones and linear from there.

Where memory is ample even by a count that is too high (`ceiling`), measuring is left out: on a large vocabulary it takes
longer than a step. Else nothing is guessed from the architecture. `Watch` sees every tensor that comes and goes, on any device, and allocates
nothing; what kernels use inside themselves (a few MB) it does not see.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from burnish.forest.pack import Batch, Micro
from burnish.forest.stream import Tree, Unit
from burnish.maths.head import LOGITS_BYTES, Objective, row_limit
from burnish.models.policy import Policy

TOKENS = (64, 192)  # of the micro-batches measured: the line through them was 0.1 % off at 4,096 (spark, fp32)
FAR = 1 << 31  # more rows than any head has at once
FEWEST_HEAD_ROWS = 64
HEAD_ROWS = 4096  # the most rows the head is measured with; fewer where the vocabulary is large:
HEAD_LOGITS = 2**23  # four of the tiles it works by, beyond which its memory is a line


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
        if x.is_sparse:
            for part in (x._indices(), x._values()):
                self._meet(part, counts=counts)
            return
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
class Head:
    """bytes = fixed + chunk_row * (rows of a chunk) + row * (all rows), above what the body kept

    forward: while the head works; after: while its gradients reach their places.
    """

    fixed: float
    chunk_row: float
    row: float

    def at(self, chunk: int, rows: int) -> float:
        return self.fixed + self.chunk_row * chunk + self.row * rows


@dataclass(frozen=True)
class Activations:
    """Bytes a micro-batch of T tokens and N head rows holds above what stands there anyway: the largest of

    body(T)             while the body runs forward
    kept(T) + head(N)   while the head works and its gradients reach their places
    layers(T)           while the layers run backward
    embedding(T)        while the embedding takes its gradient

    Each is a line of its own: a large vocabulary's gradient hides the layers behind it in small micro-batches.
    one, several        the head with all rows in one chunk, which up to `one_rows` are, and with chunks of `chunk_rows`
                        at most; forward and after
    """

    body: Line
    kept: Line
    layers: Line
    embedding: Line
    one: tuple[Head, Head]
    several: tuple[Head, Head]
    one_rows: int
    chunk_rows: int

    def head(self, rows: int) -> float:
        """What the head needs for itself."""
        planes = self.one if rows <= self.one_rows else self.several
        return max(plane.at(min(rows, self.chunk_rows), rows) for plane in planes)

    def peak(self, tokens: int, rows: int) -> int:
        """The most at once."""
        return int(max(self.body.at(tokens), self.kept.at(tokens) + self.head(rows), self.layers.at(tokens), self.embedding.at(tokens)))

    def to_json(self) -> dict[str, Any]:
        return _rounded(asdict(self))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return round(value) if isinstance(value, float) else value


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
    """Run small micro-batches made of these trees' segments: two through the whole, the rest through the head alone.

    Gradients are left with what they added; the dice are put back.
    """
    dice = Dice(policy.device)
    whole = [_phases(policy, like(trees, t, 1), run, None) for t in TOKENS]
    body, kept, _, _, layers, embedding = zip(*whole)
    limit, one_rows, vocabulary = _chunks(policy.head_weight())
    n = max(4, min(HEAD_ROWS, limit, max(FEWEST_HEAD_ROWS, HEAD_LOGITS // vocabulary)) // 4 * 4)
    with _without_body(policy):
        a, b = (_head(policy, trees, run, rows, None) for rows in (n, n // 2))
        c, d, e = (_head(policy, trees, run, rows, chunk) for rows, chunk in ((n, n // 2), (n, n // 4), (n // 2, n // 4)))
    dice.back()
    one, several = [], []
    for i in range(2):  # forward, after
        slope = (a[i] - b[i]) / (n - n // 2)
        one.append(Head(a[i] - slope * n, 0.0, slope))
        chunk, row = (c[i] - d[i]) / (n // 4), (d[i] - e[i]) / (n - n // 2)
        several.append(Head(c[i] - chunk * (n // 2) - row * n, chunk, row))
    return Activations(
        body=Line.through(TOKENS, body), kept=Line.through(TOKENS, kept), layers=Line.through(TOKENS, layers),
        embedding=Line.through(TOKENS, embedding), one=(one[0], one[1]), several=(several[0], several[1]), one_rows=one_rows, chunk_rows=limit,
    )  # fmt: skip


def ceiling(policy: Policy, tokens: int) -> int | None:
    """More bytes than a micro-batch of `tokens` tokens, all of them labels, holds above what stands there anyway.

    A count of the body's modules, several times what is measured: a linear map with its input and output four times
    in float32, a norm ten times, the head's chunk three times. None where the body has parts it does not know, or rows
    are padded.
    """
    shape = policy.shape
    if policy.router is not None or policy.why_not_shared is not None:
        return None
    row = 16 * shape.hidden
    for module in policy.body.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.Linear):
            row += 16 * (module.in_features + module.out_features)
        elif own and all(p.ndim == 1 for p in own):
            row += 40 * max(own[0].numel(), shape.query_heads * shape.key_width)
        elif own and not isinstance(module, nn.Embedding):
            return None
    weight = policy.head_weight()
    size, buffer = weight.numel() // shape.hidden * weight.element_size(), 4 * weight.numel()
    head = 3 * min(tokens * size, LOGITS_BYTES + buffer) + 3 * buffer * weight.requires_grad
    return tokens * row + head


def _chunks(weight: Tensor) -> tuple[int, int, int]:
    """(rows of a chunk where there are several, the most rows that are one chunk, vocabulary): `row_limit` has the rule."""

    def rows(count: int) -> int:
        return row_limit(count, weight, None, weight_trained=weight.requires_grad)

    limit = rows(FAR)
    return limit, limit + bisect_left(range(limit + 1, FAR), True, key=lambda count: rows(count) < count), len(weight)


def _head(policy: Policy, trees: Sequence[Tree], run: Run, rows: int, chunk: int | None) -> tuple[int, int]:
    """Peaks of the head alone, forward and after, with `rows` labels: above the hidden rows it was given."""
    _, kept, forward, after, _, _ = _phases(policy, like([_flat(trees)], rows + 1, rows), run, chunk)
    return forward - kept, after - kept


def _flat(trees: Sequence[Tree]) -> Tree:
    """One row of more tokens than any head is measured with."""
    ids = [t for tree in trees for segment in tree.tokens for t in segment]
    ids = (ids * -(-2 * HEAD_ROWS // len(ids)))[: 2 * HEAD_ROWS]
    return Tree.row(ids, [False] * len(ids))


@contextmanager
def _without_body(policy: Policy) -> Iterator[None]:
    """Hidden rows from nowhere, which take a gradient as the body's would."""
    width, dtype, device = policy.shape.hidden, policy.dtype, policy.device

    def hidden(stream: Any, plan: Any = None, router_logits: list[Tensor] | None = None) -> Tensor:
        return (torch.randn(len(stream.tokens), width, device=device).to(dtype) * 0.1).requires_grad_()

    router, policy.router = policy.router, None  # no body, nothing routed
    policy.hidden = hidden
    try:
        yield
    finally:
        del policy.hidden
        policy.router = router


def _phases(policy: Policy, micro: Micro, run: Run, chunk: int | None) -> tuple[int, int, int, int, int, int]:
    """Bytes: peak of the body, kept by it, peaks of the head (forward, after), of the layers and of the embedding."""
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
        with watch, _after(policy, "hidden", lambda out: (note(), begins("head", out))):
            run(micro, lambda logprobs, _: -logprobs.mean(), chunk, note)
    finally:
        hook.remove()
    body, kept, head, _ = seen
    last = watch.peak
    return body, kept, head, backward.get("head", last), backward.get("layers", last), last


@contextmanager
def _after(policy: Policy, name: str, call: Callable[[Any], Any]) -> Iterator[None]:
    """Within it, `call(result)` is called whenever the policy's method `name` returns."""
    own, method = policy.__dict__.get(name), getattr(policy, name)

    def then(*args: Any, **kwargs: Any) -> Any:
        out = method(*args, **kwargs)
        call(out)
        return out

    setattr(policy, name, then)
    try:
        yield
    finally:
        delattr(policy, name) if own is None else setattr(policy, name, own)


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
