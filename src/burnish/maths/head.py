"""The head: log-probs of the labels and the gradient of any objective over them; logits never exist beyond one chunk.

Axes: n head rows, m entries (a row may serve several), v vocabulary, h hidden.

With y = map(h W^T + b), e = exp(y - max y) and S = sum(e), the log-prob of label t is y[t] - max y - log S. The
objective is differentiated on the small vector of log-probs, which gives c = d objective / d logprob, and then

    d objective / d z = -(c / S) (e - S onehot(t)) map'(z),        z = h W^T + b

The row factor c / S goes to the [n, h] side of the two products that follow, so the logits are overwritten once, by one
exponential, before c is known: three matrix products in all, two where the weight is frozen.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from burnish.core.errors import ConfigError
from burnish.maths.head_entropy import measured, overwrite_gradient
from burnish.maths.kernels import kernels_for

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Objective = Callable[[Tensor, slice], Tensor]
"""(logprobs [m] of these entries, which entries) -> scalar sum, its weights fixed for the whole optimiser batch.

Gradient flows to the log-probs alone: a captured tensor that requires grad receives none.
"""


@dataclass(frozen=True)
class WithEntropy:
    """An objective and a term linear in the entropies of its labels' distributions: objective + sum_i weight_i H_i.

    A bonus has negative weights, fixed for the whole optimiser batch. The head writes H into `measured` [m], in nats
    and detached; both are in entry order and on any device. `weight` None only measures.
    """

    objective: Objective
    measured: Tensor
    weight: Tensor | None = None

    def __call__(self, logprobs: Tensor, entries: slice) -> Tensor:
        return self.objective(logprobs, entries)


Fused = Callable[[Tensor, float, float | None, float, bool], tuple[Tensor, Tensor]]
"""(z [n, v], scale, softcap, temperature, keep) -> top, mass [n, 1]: see `maths.kernels.Kernels.overwrite_exp`."""

LOGITS_BYTES = 256 * 2**20  # of one chunk, where `rows` does not say
FEWEST_ROWS = 64  # a narrower product is bound by reading the weight
ENOUGH_ROWS, ENOUGH_BYTES = 512, 32 * 2**20  # on a CPU a chunk that has both is no faster for being larger
TILE = {"cpu": 2**21}  # numbers worked on at once: 8 MB stay in cache between the elementwise passes
TILE_ELSEWHERE = 2**26  # where launches cost more than cache misses


@dataclass(frozen=True)
class LogitMap:
    """What a head does after its linear: logits = softcap(scale * z) / temperature, softcap(x) = cap * tanh(x / cap).

    The soft cap is Gemma 2's (section 2.2, arXiv:2408.00118). Raises ConfigError for a factor that is not positive.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("scale", "softcap", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise _misfit(f"{value} given, wanted a positive number", f"logit_map.{name}")

    def __call__(self, z: Tensor) -> Tensor:
        """Logits from h W^T + b, differentiable."""
        z = z * self.scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature

    def slope(self, y: Tensor) -> Tensor | float:
        """d logits / d (h W^T + b), from the logits themselves; a plain number where it is the same everywhere."""
        constant = self.scale / self.temperature
        if self.softcap is None:
            return constant
        return (1 - (y * (self.temperature / self.softcap)) ** 2) * constant

    def overwrite(self, z: Tensor) -> Tensor:
        """`__call__` in place and without a graph."""
        if self.softcap is None:
            constant = self.scale / self.temperature
            return z if constant == 1.0 else z.mul_(constant)
        return z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)


IDENTITY = LogitMap()


def head_loss(
    hidden: Float[Tensor, "n h"],
    weight: Float[Tensor, "v h"],
    label: Int[Tensor, "n"],
    objective: Objective,
    *,
    index: Int[Tensor, "m"] | None = None,
    couple: Int[Tensor, "m"] | None = None,
    bias: Float[Tensor, "v"] | None = None,
    logit_map: LogitMap = IDENTITY,
    rows: int | None = None,
    sink: Float[Tensor, "v h"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "m"]]:
    """The objective over the labels' log-probs, with a graph to hidden, weight and bias, and those log-probs, detached.

    `index[i]` is the head row of entry i (None: entries are the rows). `couple` (non-decreasing) names what an
    objective couples: entries of one id reach one call of it (None: tokens stand alone), as do entries that share a
    row. A chunk is at most `rows` rows (None: 256 MiB of logits); where more is coupled, its logits are made twice.
    Gradients are formed here, in fp32 over chunks, and *returned* from backward times the incoming gradient: never
    written to `.grad`, so tied weights, loss scales, accumulation and data-parallel hooks hold. With a `sink`, an fp32
    buffer that sums the weight's gradient over micro-batches in one process, the backward adds to it and returns no
    gradient of the weight: a vocabulary times hidden tensor less, or two where the weight is also the embedding.
    Raises ConfigError when shapes, dtypes, the order of `couple` or the objective's result do not fit.
    """
    _check(hidden, weight, label, index, couple, bias)
    inputs = (hidden, weight, bias)
    grad = torch.is_grad_enabled()  # inside an autograd.Function the answer is always no
    wanted = tuple(grad and x is not None and x.requires_grad for x in inputs)
    limit = row_limit(len(label), weight, rows, weight_trained=wanted[1])
    order, chunks = chunks_of(len(label), index, couple, limit)
    with torch.no_grad():
        entropic = isinstance(objective, WithEntropy)
        one_pass = _Pass(hidden, weight, bias, label, logit_map, limit, defer=sink is not None, entropic=entropic)
        loss, logprobs, gradients = one_pass.run(objective, index, order, chunks, wanted)
    if not any(wanted):
        return loss, logprobs
    return cast(Any, Formed).apply(loss, gradients, one_pass.deferred, sink if wanted[1] else None, *inputs), logprobs


@torch.no_grad()
def head_logprobs(
    hidden: Float[Tensor, "n h"],
    weight: Float[Tensor, "v h"],
    label: Int[Tensor, "n"],
    *,
    bias: Float[Tensor, "v"] | None = None,
    logit_map: LogitMap = IDENTITY,
    rows: int | None = None,
) -> Float[Tensor, "n"]:
    """Log-probs of the labels, in fp32 (fp64 for fp64), one chunk of logits at a time; no gradient.

    Raises ConfigError when shapes or dtypes do not fit.
    """
    _check(hidden, weight, label, None, None, bias)
    limit = row_limit(len(label), weight, rows, weight_trained=False)
    one_pass = _Pass(hidden, weight, bias, label, logit_map, limit)
    out = torch.empty(len(label), dtype=one_pass.wide, device=hidden.device)
    for part in even_parts(slice(0, len(label)), limit):
        out[part] = one_pass.score(part, keep=False).logprob
    return out


def head_flops(
    rows: int, vocabulary: int, hidden: int, *, weight_trained: bool, backward: bool, recomputed: int = 0
) -> int:
    """FLOPs of the head's matrix products: 2 V H a row for logits, as many with `backward` for the hidden rows, and
    again for a trained weight: 6 V H in all, 4 V H frozen. Rows made twice (`recomputed_rows`) cost 2 V H more.
    """
    passes = (1 + backward * (1 + weight_trained)) * rows + backward * recomputed
    return 2 * vocabulary * hidden * passes


def recomputed_rows(
    count: int,
    weight: Float[Tensor, "v h"],
    *,
    index: Int[Tensor, "m"] | None = None,
    couple: Int[Tensor, "m"] | None = None,
    rows: int | None = None,
) -> int:
    """How many of `count` head rows `head_loss` makes logits for twice, because more is coupled than a chunk holds."""
    limit = row_limit(count, weight, rows, weight_trained=weight.requires_grad)
    parts = [even_parts(chunk, limit) for chunk, _ in chunks_of(count, index, couple, limit)[1]]
    return sum(p.stop - p.start for several in parts for p in several[:-1])


def effective_weight(head: nn.Module) -> Float[Tensor, "v h"]:
    """The matrix a head applies, differentiable in its adapters: W, or W + sum of s B A under peft.

    (LoRA: eq. 3, arXiv:2106.09685, s = alpha / rank.) Dropout that is off, as in evaluation, is no dropout.
    Raises ConfigError where no such matrix exists: active dropout, DoRA and other variants, a bias in B, adapters that
    are not LoRA, hooks on the head.
    """
    layer: Any = head
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise _no_matrix("has a hook that may change what it computes")
    if not hasattr(layer, "get_base_layer"):
        return _matrix(layer)
    from peft.tuners.lora import Linear as LoraLinear  # here: most heads carry no adapter

    kind: Any = LoraLinear
    if not isinstance(layer, kind):
        raise _no_matrix(f"is adapted by {type(layer).__name__}")
    weight = _matrix(layer.get_base_layer())
    if layer.merged and layer.disable_adapters:
        raise _no_matrix("has an adapter that is merged and switched off at once")
    if layer.merged or layer.disable_adapters:
        return weight
    dtype = weight.dtype
    for name in [name for name in layer.active_adapters if name in layer.lora_A]:
        dropout: Any = layer.lora_dropout[name]
        if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
            raise _no_matrix(f"has dropout in its adapter {name!r}")
        if name in layer.lora_variant or layer.fan_in_fan_out:
            raise _no_matrix(f"has an adapter {name!r} of a variant (DoRA or another) that is not W + s B A")
        if layer.lora_bias.get(name):
            raise _no_matrix(f"has a bias in its adapter {name!r}")
        weight = weight + layer.scaling[name] * (layer.lora_B[name].weight @ layer.lora_A[name].weight)
    return weight.to(dtype)


def _matrix(head: Any) -> Tensor:
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise _no_matrix(f"is a {type(head).__name__} without a [vocabulary, hidden] weight of floats")
    return weight


def _no_matrix(why: str) -> ConfigError:
    remedy = "leave the head out of the adapter's targets, or train a plain LoRA on it with dropout 0"
    return ConfigError(f"the head {why}, so no one matrix describes it", where="lm_head", remedy=remedy)


# ---- where chunks may end -------------------------------------------------------------------------------------------


def row_limit(count: int, weight: Tensor, rows: int | None, *, weight_trained: bool) -> int:
    """Rows of one chunk: as asked, else as many as `LOGITS_BYTES` hold, at least `FEWEST_ROWS`, and no more than are enough.

    A narrow weight's gradient over several chunks needs an fp32 buffer; where `count` rows of logits fit into what that
    buffer would take, one chunk is both smaller and faster.
    """
    if rows is not None:
        if rows < 1:
            raise _misfit(f"{rows} given, wanted at least 1", "rows")
        return rows
    vocabulary, hidden = weight.shape
    row_bytes = vocabulary * weight.element_size()
    most = LOGITS_BYTES // row_bytes
    if weight.device.type == "cpu":
        most = min(most, max(ENOUGH_ROWS, ENOUGH_BYTES // row_bytes))
    limit = max(FEWEST_ROWS, most)
    buffer = 4 * vocabulary * hidden if weight_trained and weight.element_size() < 4 else 0
    return count if limit < count <= limit + buffer // row_bytes else limit


def chunks_of(
    count: int, index: Tensor | None, couple: Tensor | None, limit: int
) -> tuple[Tensor | None, list[tuple[slice, slice]]]:
    """Row order (None: as given) and the chunks in it: pairs of row and entry slices that cover everything once.

    Rows are put in the order of the first entry that draws them; a cut is legal where no row before it serves an entry
    after it and no id of `couple` straddles it. Chunks are as even as legal cuts allow and over `limit` rows only where
    no cut is legal.
    """
    entries = count if index is None else len(index)
    if count <= limit or not entries:
        return None, [(slice(0, count), slice(0, entries))] if entries else []
    first = torch.arange(count)  # the first entry each row serves
    legal = first > 0  # whether a chunk may start at this row
    order = None
    if index is not None:
        index, entry = index.cpu().long(), torch.arange(entries)
        first = torch.full((count,), entries).scatter_reduce(0, index, entry, "amin")
        last = torch.full((count,), -1).scatter_reduce(0, index, entry, "amax")
        order = first.argsort(stable=True)  # a row that serves no entry comes last and rides in the last chunk
        first, reach = first[order], last[order].cummax(0).values
        legal[1:] &= (reach[:-1] < first[1:]) & (first[1:] < entries)
        if bool((order[1:] > order[:-1]).all()):
            order = None
    if couple is not None:
        ids = couple.cpu()
        at = first[1:].clamp(max=entries - 1)
        legal[1:] &= ids[at] != ids[at - 1]
    cuts = [*_integers(legal.nonzero()[:, 0]), count]
    entry_of = [*_integers(first[legal]), entries]
    chunks: list[tuple[slice, slice]] = []
    even, start, begin = ceil(count / ceil(count / limit)), 0, 0
    while start < count:
        fits = bisect_right(cuts, start + limit) - 1  # the last cut within the limit
        at = min(bisect_left(cuts, start + even), fits)
        if at < 0 or cuts[at] <= start:
            at = fits + 1
        chunks.append((slice(start, cuts[at]), slice(begin, entry_of[at])))
        start, begin = cuts[at], entry_of[at]
    return order, chunks


def _integers(values: Any) -> list[int]:
    return values.tolist()  # untyped in torch


def even_parts(rows: slice, limit: int) -> list[slice]:
    """Even slices of at most `limit` rows."""
    count = rows.stop - rows.start
    pieces = ceil(count / limit)
    return [slice(rows.start + count * i // pieces, rows.start + count * (i + 1) // pieces) for i in range(pieces)]


# ---- what is done to a chunk ----------------------------------------------------------------------------------------


def fused_pass(dtype: torch.dtype, device: torch.device) -> Fused | None:
    """The one kernel that passes over a chunk of logits of this dtype on this device, or None: torch's operations do.

    Asked and checked against torch when first needed; see `maths.kernels` and `maths.tiles_cuda`.
    """
    if device.type == "cuda":
        from burnish.maths import tiles_cuda  # here: it imports Triton

        return tiles_cuda.overwrite_exp if tiles_cuda.why_not(dtype, device) is None else None
    kernels = kernels_for(dtype, device.type)
    return None if kernels is None else kernels.overwrite_exp


@dataclass
class _Rows:
    """Some rows of a chunk. logprob [n], entropy [n] where asked for, and the buffer of logits [n, v], which holds

    (e - S onehot), times the slope where that varies, with mass [n] = S, divided by the slope where that is constant; or
    with entropies the z of the module's text, with top [n, 1] and mass [n, 1] = S.
    """

    z: Tensor
    logprob: Tensor
    mass: Tensor
    top: Tensor | None = None
    entropy: Tensor | None = None


@dataclass
class _Pass:
    """One call's tensors and its one buffer of logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    label: Tensor
    logit_map: LogitMap
    limit: int
    defer: bool = False
    entropic: bool = False  # also the entropy of each row, and its gradient
    deferred: tuple[Tensor, Tensor] | None = None  # the two factors of the weight's gradient, left to the backward

    def __post_init__(self) -> None:
        rows, vocabulary = min(self.limit, len(self.label)), len(self.weight)
        self.wide = torch.promote_types(self.weight.dtype, torch.float32)
        self.narrow = self.weight.dtype != self.wide
        self.tile = TILE.get(self.weight.device.type, TILE_ELSEWHERE)
        self.lines = max(1, self.tile // max(1, vocabulary))
        self.logits = self.weight.new_empty(rows, vocabulary)
        self.fused = fused_pass(self.weight.dtype, self.weight.device)
        lines = min(self.lines, rows) if self.narrow and self.fused is None else 0
        self.scratch = self.logits.new_empty(lines, vocabulary, dtype=self.wide)

    def run(
        self,
        objective: Objective,
        index: Tensor | None,
        order: Tensor | None,
        chunks: list[tuple[slice, slice]],
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """(loss, logprobs [m], gradients of hidden, weight and bias where wanted)."""
        if order is not None and index is not None:
            order = order.to(index.device)
            self.hidden, self.label = self.hidden[order], self.label[order]
            index = order.argsort()[index]
        single = len(chunks) == 1 and len(self.label) <= self.limit
        fresh, loss = True, torch.zeros((), dtype=self.wide, device=self.hidden.device)
        d_hidden = torch.zeros_like(self.hidden) if wanted[0] else None
        dtype = self.weight.dtype if single else self.wide  # a single product needs no wider sum
        late = self.defer and single
        d_weight = self.weight.new_empty(self.weight.shape, dtype=dtype) if wanted[1] and not late else None
        d_bias = loss.new_zeros(len(self.weight)) if wanted[2] else None
        logprobs = loss.new_empty(len(self.label) if index is None else len(index))
        for rows, entries in chunks:
            parts = even_parts(rows, self.limit)
            scored = [self.score(part, keep=any(wanted)) for part in parts]
            of_rows = torch.cat([one.logprob for one in scored])
            local = None if index is None else index[entries] - rows.start
            logprobs[entries] = of_rows if local is None else of_rows[local]
            value, c = _differentiate(objective, logprobs[entries], entries, grad=any(wanted))
            loss += value
            b = None
            if isinstance(objective, WithEntropy):
                value, b = _entropy_term(objective, torch.cat([cast(Tensor, one.entropy) for one in scored]), local, entries)
                loss += value
            if c is None:
                continue
            c = c if local is None else torch.zeros_like(of_rows).index_add_(0, local, c)
            one = scored[-1]  # the buffer holds the last part
            for part in reversed(parts):
                if part is not parts[-1]:
                    one = self.score(part, keep=True)
                here = slice(part.start - rows.start, part.stop - rows.start)
                z, factor = one.z, self.factor(one, self.label[part], c[here], None if b is None else b[here])
                if d_hidden is not None:
                    d_hidden[part] = torch.mm(z, self.weight) * factor[:, None]
                if d_weight is not None:
                    self.add_product(d_weight, z, (self.hidden[part] * factor[:, None]).to(z.dtype), fresh)
                elif wanted[1]:
                    self.deferred = z, (self.hidden[part] * factor[:, None]).to(z.dtype)
                if d_bias is not None:
                    d_bias += torch.mv(z.t(), factor.to(z.dtype))
                fresh = False
        if d_hidden is not None and order is not None:
            d_hidden = torch.empty_like(d_hidden).index_copy_(0, order, d_hidden)
        if d_weight is not None:
            d_weight = d_weight.zero_() if fresh else d_weight if self.defer else d_weight.to(self.weight.dtype)
        return loss, logprobs, (d_hidden, d_weight, None if d_bias is None else d_bias.to(self.weight.dtype))

    def score(self, rows: slice, *, keep: bool) -> _Rows:
        """Log-probs of these rows, and entropies where asked for. Without `keep` the buffer holds nothing of use."""
        hidden, label, z = self.hidden[rows], self.label[rows, None], self.logits[: rows.stop - rows.start]
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=z)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=z)
        at_label = self.logit_map(z.gather(1, label).to(self.wide))
        if self.entropic:  # the logits stay: their gradient waits for the objective's two derivatives
            top, mass, entropy = measured(z, self.logit_map, self.wide, self.lines)
            return _Rows(z, (at_label - top - mass.log())[:, 0], mass, top, entropy)
        if self.fused is not None:
            m = self.logit_map
            top, mass = self.fused(z, m.scale, m.softcap, m.temperature, keep)
        else:
            top, mass = self._overwrite_exp(z, keep, torch.empty_like(at_label), torch.empty_like(at_label))
        logprobs = (at_label - top - mass.log())[:, 0]
        own, slope = (at_label - top).exp_() - mass, self.logit_map.slope(at_label)
        if isinstance(slope, Tensor):
            own, slope = own * slope, 1.0
        if keep:  # by index: scatter_ would copy all of z
            z[torch.arange(len(z), device=z.device), label[:, 0]] = own[:, 0].to(z.dtype)
        return _Rows(z, logprobs, mass[:, 0] / slope)

    def factor(self, one: _Rows, label: Tensor, c: Tensor, b: Tensor | None) -> Tensor:
        """What the rows of the buffer are still to be multiplied by to be d objective / d z [n]; changes the buffer where
        entropies count."""
        if one.top is None or one.entropy is None:
            return -c / one.mass
        overwrite_gradient(
            one.z, label, self.logit_map, one.top, one.mass, one.entropy, c, torch.zeros_like(c) if b is None else b, self.lines
        )
        return torch.ones_like(c)

    def _overwrite_exp(self, z: Tensor, keep: bool, top: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        """z [n, v] becomes exp(y - top), times the slope where that varies and with `keep`; tile by tile, to stay in cache."""
        for start in range(0, len(z), self.lines):
            here = slice(start, start + self.lines)
            block = z[here]
            top[here] = self.logit_map(block.amax(1, keepdim=True).to(self.wide))  # the map rises: it keeps the maximum
            y = self.logit_map.overwrite(self.scratch[: len(block)].copy_(block) if self.narrow else block)
            slope = self.logit_map.slope(y) if keep else 1.0
            mass[here] = y.sub_(top[here]).exp_().sum(1, keepdim=True)
            if isinstance(slope, Tensor):
                y.mul_(slope)
            if self.narrow and keep:
                block.copy_(y)
        return top, mass

    def add_product(self, total: Tensor, z: Tensor, hidden: Tensor, fresh: bool) -> None:
        add_product(total, z, hidden, fresh, self.tile)


def add_product(total: Tensor, z: Tensor, hidden: Tensor, fresh: bool, tile: int) -> None:
    """total [v, h] += z^T hidden, or = where `fresh`."""
    if total.dtype == z.dtype:
        if fresh:
            torch.mm(z.t(), hidden, out=total)
        else:
            torch.addmm(total, z.t(), hidden, out=total)  # addmm_ is unseen by torch's FLOP counter
        return
    lines = max(1, tile // max(1, hidden.shape[1]))
    product = z.new_empty(min(lines, len(total)), hidden.shape[1])
    for start in range(0, len(total), lines):  # by tiles: a narrow product is added while it is still in cache
        block = total[start : start + lines]
        torch.mm(z[:, start : start + lines].t(), hidden, out=product[: len(block)])
        (block.copy_ if fresh else block.add_)(product[: len(block)])


class Formed(torch.autograd.Function):
    """A loss whose gradients already exist: backward returns them times the incoming gradient.

    With a sink, the weight's gradient is added there instead: formed already, or from its two factors, now.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        loss, gradients, deferred, sink = args[:4]
        ctx.to_sink = sink, deferred, gradients[1] if sink is not None else None
        gradients = gradients if sink is None else (gradients[0], None, gradients[2])
        ctx.save_for_backward(*gradients)
        ctx.lent = False
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        g: Tensor = grad_outputs[0]
        gradients: tuple[Tensor | None, ...] = ctx.saved_tensors
        if ctx.to_sink is None:
            raise _misfit("the weight's gradient is in the sink already", "backward", "run the forward again")
        sink, deferred, formed = ctx.to_sink
        if deferred is not None or formed is not None:
            ctx.to_sink = None  # logits of a chunk, or a gradient as large as the weight, would stay through the whole backward
        if deferred is not None:
            z, hidden = deferred
            add_product(sink, z, hidden * g.to(hidden.dtype), False, TILE.get(z.device.type, TILE_ELSEWHERE))
        elif formed is not None and g.device.type == "cpu":
            sink.add_(formed if g.item() == 1.0 else formed * g)
        elif formed is not None:
            sink.addcmul_(formed, g)  # to read g would be to wait for everything before it
        nothing = (None,) * 4
        # The common factor 1 hands the buffers over, so that autograd keeps them as `.grad` without a copy; once only,
        # because a retained graph may come back for them (and torch itself objects if they were changed in between).
        if not ctx.lent and g.device.type == "cpu" and g.item() == 1.0:
            ctx.lent = True
            return (*nothing, *gradients)
        return (*nothing, *(None if x is None else x * g for x in gradients))


def _differentiate(objective: Objective, logprobs: Tensor, entries: slice, grad: bool) -> tuple[Tensor, Tensor | None]:
    """The objective's value and its derivative by each log-prob."""
    with torch.set_grad_enabled(grad):
        small = logprobs.detach().clone().requires_grad_(grad)
        value: Any = objective(small, entries)
    if not isinstance(value, Tensor) or value.ndim:
        given = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise _misfit(f"{given} returned, wanted a scalar tensor", "objective", "end with (weight * per_item).sum()")
    if not grad:
        return value, None
    c = torch.autograd.grad(value, small, allow_unused=True)[0] if value.requires_grad else None
    if c is None:
        remedy = "compute it from the first argument, without detach, item or no_grad"
        raise _misfit("its result does not depend on the log-probs: nothing would be learned", "objective", remedy)
    return value.detach(), c


def _entropy_term(
    objective: WithEntropy, of_rows: Tensor, local: Tensor | None, entries: slice
) -> tuple[Tensor, Tensor | None]:
    """(sum of weight times entropy over these entries, its derivative by the entropy of each row or None); writes H."""
    found = of_rows if local is None else of_rows[local]
    objective.measured[entries] = found.to(objective.measured)
    if objective.weight is None:
        return found.new_zeros(()), None
    weight = objective.weight[entries].to(found)
    return (weight * found).sum(), weight if local is None else torch.zeros_like(of_rows).index_add_(0, local, weight)


def _misfit(message: str, where: str, remedy: str | None = None) -> ConfigError:
    return ConfigError(message, where=where, remedy=remedy)


def _check(
    hidden: Tensor, weight: Tensor, label: Tensor, index: Tensor | None, couple: Tensor | None, bias: Tensor | None
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise _misfit(f"hidden {list(hidden.shape)} and weight {list(weight.shape)}, wanted [n, h] and [v, h]", "head")
    if hidden.dtype != weight.dtype:
        raise _misfit(f"hidden is {hidden.dtype} and weight {weight.dtype}", "head", "cast one to the other's dtype")
    if weight.dtype == torch.float16:  # S may exceed 65,504
        raise _misfit(
            "float16 has too small a range for sums over the vocabulary", "head", "load in bfloat16 or float32"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise _misfit(f"bias {list(bias.shape)} {bias.dtype}, wanted [{len(weight)}] {weight.dtype}", "head")
    if label.shape != hidden.shape[:1]:
        raise _misfit(f"label {list(label.shape)}, wanted one for each of {len(hidden)} rows", "head")
    if index is not None and index.device.type == "cpu" and bool(((index < 0) | (index >= len(label))).any()):
        raise _misfit(f"index speaks of rows outside 0 .. {len(label) - 1}", "head")
    entries = len(label) if index is None else len(index)
    if couple is not None and len(couple) != entries:
        raise _misfit(f"couple has {len(couple)} ids for {entries} entries", "head")
    if couple is not None and bool((couple[1:] < couple[:-1]).any()):
        raise _misfit("couple decreases: what is coupled must stand together", "head", "order entries by couple")
