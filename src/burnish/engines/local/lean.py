"""The body and head of the common decoder families for the engine, in the fewest operations, from a copy of the weights.

transformers' modules call some 380 operations a layer for one token a row; decoding small rows is bound by those calls
and not by arithmetic. Here a layer is about fifteen: projections that read the same rows are one product, the rotation is
a look-up, and half-precision weights are stored once in the order the CPU's matrix unit reads them. Adapters are merged
into that copy, so a rollout pays nothing for them. The copy is remade when the policy's version moves.

What a layer is, is read off its modules, never off its name, and must be understood whole: an unknown part means None.
Then the result has to agree with the model's own body on a small forest, or it is not used. Either way the reason is in
`policy.decisions["decode"]`.

Axes: n rows (tokens), H query heads, Hk key-value heads, D head width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.core.errors import ConfigError
from burnish.core.machine import free_host_bytes
from burnish.engines.local.plans import Decode
from burnish.forest.attention import Forest, rotation_limit
from burnish.forest.stream import Layout
from burnish.maths.head import effective_weight
from burnish.maths.kernels import FEW, Kernels, kernels_for
from burnish.models.fused import gelu_of, way_of
from burnish.models.policy import Policy

COPIED_BYTES = 64 * 2**20  # a model whose weights take less is copied for joined products even where nothing is reordered
_PROBE = Layout((5, 3, 4, 6), (-1, 0, 0, -1))
FEW_FROM_BYTES = 2**20  # a smaller matrix stays in cache, where the stock product is as fast
_ROWS = 32  # what reordered weights are laid out for; other row counts work


class NotUnderstood(Exception):
    """Why a body cannot be run here."""


# ---- matrices -------------------------------------------------------------------------------------------------------


@cache
def reorders(device: str) -> bool:
    """Whether bf16 weights can be stored in the matrix unit's own order, with equal products. The operations are private
    to torch: where they are gone or disagree, plain products are used."""
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    try:
        x, w, b = torch.randn(5, 32).bfloat16(), torch.randn(48, 32).bfloat16(), torch.randn(48).bfloat16()
        return all(torch.allclose(_reordered(w)(x, bias), F.linear(x, w, bias), atol=0.1, rtol=0.02) for bias in (b, None))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def _reordered(weight: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)
    run = torch.ops.mkldnn._linear_pointwise
    return lambda x, bias: run(x, packed, bias, "none", [], "")


def _few(weights: Sequence[Tensor], biases: Sequence[Tensor | None], halve: bool) -> Callable[[Tensor], Tensor] | None:
    """The same product for at most FEW rows, bound by memory; None where it is not the faster.

    It reads tensors that exist anyway, or, with `halve`, a copy in bf16 of weights in float32 that are bf16's numbers."""
    kernels = kernels_for(weights[0].dtype, weights[0].device.type)
    if kernels is None or not all(w.is_contiguous() for w in weights) or sum(w.nbytes for w in weights) < FEW_FROM_BYTES:
        return None
    halves = [half for w in weights if (half := _halved(w)) is not None] if halve else []
    return kernels.few_rows(halves if len(halves) == len(weights) else weights, biases)


def halves_weights(policy: Policy) -> bool:
    """Whether the engine may keep a bf16 copy for rows that are few: weights from a bf16 file lose nothing by it as long as they
    are not trained, and are read in half the time. For processors whose bf16 products are the slower ones."""
    plain = policy.version == 0 and policy.dtype == torch.float32 and policy.device.type == "cpu"
    return plain and 2 * policy.shape.parameters < free_host_bytes() // 4


def _halved(weight: Tensor) -> Tensor | None:
    """The same numbers in bf16, or None where one of them is none of bf16's."""
    parts: list[Tensor] = []
    for part in weight.detach().split(1024):
        half = part.bfloat16()
        if not torch.equal(half.float(), part):
            return None
        parts.append(half)
    return torch.cat(parts)


class Matrix:
    """One product for several linear modules that read the same rows: x [n, in] -> [n, sum of out].

    `remake` takes their weights as they are now, adapters merged.
    """

    def __init__(self, modules: Sequence[Any], copied: bool, halve: bool) -> None:
        self.modules, self.copied = list(modules), copied
        self.run: Callable[[Tensor], Tensor]
        for module in self.modules:
            base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            if not isinstance(base, nn.Linear):
                raise NotUnderstood(f"a projection is a {type(base).__name__}")
        self.remake(halve)

    @torch.no_grad()
    def remake(self, halve: bool = False) -> None:
        weights = [effective_weight(m) for m in self.modules]
        biases = [(m.get_base_layer() if hasattr(m, "get_base_layer") else m).bias for m in self.modules]
        if any(b is None for b in biases) and not all(b is None for b in biases):
            raise NotUnderstood("only some of the projections of the same rows have a bias")
        bias = None if biases[0] is None else torch.cat(biases) if len(biases) > 1 else biases[0]
        few = _few(weights, biases, halve) if all(w is m.weight for w, m in zip(weights, self.modules)) else None
        if weights[0].dtype == torch.bfloat16 and reorders(weights[0].device.type):
            run = _reordered(weights[0] if len(weights) == 1 else torch.cat(weights))
            self.run = lambda x: few(x) if few is not None and x.shape[0] <= FEW else run(x, bias)
        elif len(weights) == 1 or self.copied:
            weight = weights[0] if len(weights) == 1 else torch.cat(weights)
            self.run = lambda x: few(x) if few is not None and x.shape[0] <= FEW else F.linear(x, weight, bias)
        else:  # a large model in full precision: its own tensors, product by product
            pairs = list(zip(weights, biases))
            self.run = lambda x: few(x) if few is not None and x.shape[0] <= FEW else torch.cat([F.linear(x, w, b) for w, b in pairs], -1)


# ---- norms and rotations --------------------------------------------------------------------------------------------


class Norm:
    """A root-mean-square norm over the last axis, as its module computes it (`models.fused.way_of`)."""

    def __init__(self, module: Any) -> None:
        way = way_of(module)
        if way is None:
            raise NotUnderstood(f"a {type(module).__name__} is no root-mean-square norm")
        self.module, self.width = module, tuple(module.weight.shape)
        self.epsilon, self.offset, self.late = way.epsilon, way.offset, way.late
        self.remake()

    @torch.no_grad()
    def remake(self) -> None:
        weight = self.module.weight
        self.wide = weight.float() + self.offset  # for the kernels, which take weights in float32
        self.plain = weight.dtype in (torch.float32, torch.float64)
        self.weight = weight + self.offset if self.plain or self.late else weight.float() + self.offset

    def __call__(self, x: Tensor) -> Tensor:
        return self.scaled(x, self.weight)

    def scaled(self, x: Tensor, weight: Tensor) -> Tensor:
        """The norm with `weight` in place of its own, broadcast against x."""
        if self.plain:
            return F.rms_norm(x, self.width, weight, self.epsilon) if weight.ndim == 1 else F.rms_norm(x, self.width, None, self.epsilon).mul_(weight)
        y = F.rms_norm(x.float(), self.width, None, self.epsilon)
        return y.to(x.dtype).mul_(weight) if self.late else y.mul_(weight).to(x.dtype)


class Rotation:
    """cos and signed sin of every position, from the body's own rotary module, grown when a later position comes.

    rotate_half(x) * sin = roll(x, D/2) * (-sin, sin), exactly.
    """

    def __init__(self, module: Any, arguments: tuple[Any, ...], likeness: Tensor) -> None:
        self.module, self.arguments, self.likeness = module, arguments, likeness
        self.cos = self.sin = likeness.new_zeros(0, 0)

    def at(self, position: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """[n, 1, D] each, for positions up to `last`."""
        if last >= len(self.cos):
            size = max(256, 2 * len(self.cos), last + 1)
            cos, sin = self.module(self.likeness, torch.arange(size, device=self.likeness.device)[None], *self.arguments)
            half = sin.shape[-1] // 2
            self.cos, self.sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
        return self.cos.index_select(0, position)[:, None], self.sin.index_select(0, position)[:, None]


# ---- a layer --------------------------------------------------------------------------------------------------------

_LAYER_PARTS = {
    "self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    "resid_attn_dropout", "resid_mlp_dropout",
}  # fmt: skip
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"}
_MLP_PARTS = {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"}


@dataclass(eq=False)
class Layer:
    """One decoder layer. `before` and `after` norms are None where the family has none there."""

    qkv: Matrix
    out: Matrix
    up: Matrix
    down: Matrix
    act: Callable[[Tensor], Tensor]
    norms: dict[str, Norm]
    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None
    norm_by_head: bool
    rotation: Rotation | None
    sizes: tuple[int, int, int]  # H, Hk, D
    gelu: bool | None  # the activation: gelu in its tanh form, or silu; None: another
    qk_weight: Tensor | None = None
    qk_wide: Tensor | None = None
    attention: tuple[float, int | None, float | None] = (1.0, None, None)  # scale, window, softcap: as the plan was told

    def remake(self) -> None:
        for matrix in (self.qkv, self.out, self.up, self.down):
            matrix.remake()
        self.remake_norms()

    def remake_norms(self) -> None:
        for norm in self.norms.values():
            norm.remake()
        if self.q_norm is not None and self.k_norm is not None and self.norm_by_head:
            heads, kv_heads, width = self.sizes
            pairs = (self.q_norm.weight, self.k_norm.weight), (self.q_norm.wide, self.k_norm.wide)
            self.qk_weight, self.qk_wide = (torch.cat([q.expand(heads, width), k.expand(kv_heads, width)]) for q, k in pairs)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [n, H + Hk, D], normed, not yet rotated, and values [n, Hk, D]."""
        heads, kv_heads, width = self.sizes
        split = heads + kv_heads
        if self.q_norm is not None and self.k_norm is not None and not self.norm_by_head:
            qkv = self.qkv.run(x)
            a, b = heads * width, split * width
            qk = torch.cat([self.q_norm(qkv[:, :a]), self.k_norm(qkv[:, a:b])], -1).view(len(x), split, width)
            return qk, qkv[:, b:].view(len(x), kv_heads, width)
        qkv = self.qkv.run(x).view(len(x), split + kv_heads, width)
        qk = qkv[:, :split]
        if self.q_norm is not None and self.qk_weight is not None:
            qk = self.q_norm.scaled(qk, self.qk_weight)
        return qk, qkv[:, split:]

    def __call__(self, index: int, x: Tensor, turn: tuple[Tensor, Tensor] | None, plan: Any) -> Tensor:
        heads, _, width = self.sizes
        qk, v = self.project(x if self.before_attention is None else self.before_attention(x))
        if turn is not None:
            qk = torch.addcmul(qk * turn[0], qk.roll(width // 2, -1), turn[1])
        q, k = qk[:, :heads], qk[:, heads:]
        out = plan(index, q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], *self.attention, None)
        y = self.out.run(out[0].transpose(0, 1).reshape(len(x), -1))
        x = x + (y if self.after_attention is None else self.after_attention(y))
        gate, up = self.up.run(x if self.before_mlp is None else self.before_mlp(x)).chunk(2, -1)
        y = self.down.run(self.act(gate).mul_(up))
        return x + (y if self.after_mlp is None else self.after_mlp(y))


    @property
    def fusible(self) -> bool:
        """Whether the kernels compute this layer: one way of norming, an activation they know, heads normed one by one."""
        norms = list(self.norms.values())
        return (
            self.gelu is not None
            and len({(n.epsilon, n.late) for n in norms}) <= 1
            and (self.q_norm is None) == (self.k_norm is None)
            and (self.q_norm is None or self.norm_by_head)
        )


def _parts(module: Any, known: set[str], what: str) -> dict[str, Any]:
    parts = dict(module.named_children())
    if strange := sorted(set(parts) - known):
        raise NotUnderstood(f"its {what} has {', '.join(strange)}")
    if own := [name for name, _ in module.named_parameters(recurse=False)]:
        raise NotUnderstood(f"its {what} has {', '.join(own)}")
    return parts


def _layer(module: Any, rotation: Rotation | None, copied: bool, halve: bool) -> Layer:
    parts = _parts(module, _LAYER_PARTS, "layer")
    attention = _parts(parts["self_attn"], _ATTENTION_PARTS, "attention") if "self_attn" in parts else {}
    mlp = _parts(parts["mlp"], _MLP_PARTS, "feed-forward block") if "mlp" in parts else {}
    act = mlp.get("act_fn", mlp.get("activation_fn"))
    if act is None or "down_proj" not in mlp or "o_proj" not in attention:
        raise NotUnderstood("its layer is not attention and a gated feed-forward block")
    qkv = [attention["qkv_proj"]] if "qkv_proj" in attention else [attention[n] for n in ("q_proj", "k_proj", "v_proj")]
    up = [mlp["gate_up_proj"]] if "gate_up_proj" in mlp else [mlp[n] for n in ("gate_proj", "up_proj")]
    names = [n for n in parts if n.endswith("layernorm")]
    norms = {n: Norm(parts[n]) for n in names} | {n: Norm(attention[n]) for n in ("q_norm", "k_norm") if n in attention}
    if "pre_feedforward_layernorm" in norms or "post_feedforward_layernorm" in norms:  # norms around, or only after, a block
        places = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
        before, after, before_mlp, after_mlp = (norms.get(p) for p in places)
    else:
        before, after, before_mlp, after_mlp = norms.get("input_layernorm"), None, norms.get("post_attention_layernorm"), None
    config = module.self_attn.config
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(module.self_attn, "head_dim", None) or config.hidden_size // heads)
    q_norm = norms.get("q_norm")

    def matrix(*modules: Any) -> Matrix:
        return Matrix(modules, copied, halve)

    made = Layer(
        matrix(*qkv), matrix(attention["o_proj"]), matrix(*up), matrix(mlp["down_proj"]),
        act, norms, before, after, before_mlp, after_mlp, q_norm, norms.get("k_norm"),
        q_norm is not None and q_norm.width == (width,), rotation, (heads, kv_heads, width), gelu_of(act),
    )  # fmt: skip
    made.remake_norms()
    return made


# ---- the whole ------------------------------------------------------------------------------------------------------


class _Told(Forest):
    """A forest that remembers what each layer told its attention."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.told: list[tuple[int, float, int | None, float | None]] = []

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:  # fmt: skip
        if sinks is not None:
            raise NotUnderstood("its attention has sinks")
        self.told.append((layer, scale, window, softcap))
        return super().__call__(layer, q, k, v, scale, window, softcap, sinks)


class LeanBody:
    """hidden [n, F] = lean(tokens [n], position [n], plan), as the policy's body would, and `head(hidden)` -> logits [n, V].

    Raises NotUnderstood for a body it cannot run or does not agree with.
    """

    def __init__(self, policy: Policy, halve: bool = False) -> None:
        body: Any = policy.body
        if policy.why_not_shared is not None:
            raise NotUnderstood(policy.why_not_shared)
        if strange := sorted({n for n, _ in body.named_children()} - {"embed_tokens", "layers", "norm", "rotary_emb"}):
            raise NotUnderstood(f"its body has {', '.join(strange)}")
        if rotation_limit(policy.config) is not None:
            raise NotUnderstood("its rotation depends on the longest row")
        self.embed = body.embed_tokens
        self.version = policy.version
        kinds = list(getattr(policy.config, "layer_types", None) or ())
        likeness = next(body.norm.parameters()).detach()[:1]
        plan = _Told(_PROBE)
        want = self._probe(policy, plan)
        if [told[0] for told in plan.told] != list(range(len(body.layers))):
            raise NotUnderstood("its layers do not call attention once each, in order")
        copied = policy.shape.parameters * likeness.element_size() <= COPIED_BYTES
        by_kind = isinstance(getattr(policy.config, "rope_parameters", None), dict) and any(
            isinstance(x, dict) for x in policy.config.rope_parameters.values()
        )
        rotations: dict[Any, Rotation] = {}
        self.layers: list[Layer] = []
        for i, module in enumerate(body.layers):
            arguments = (kinds[i],) if by_kind else ()
            turned = bool(getattr(module.self_attn, "use_rope", True))
            rotation = rotations.setdefault(arguments, Rotation(body.rotary_emb, arguments, likeness)) if turned else None
            layer = _layer(module, rotation, copied, halve)
            layer.attention = plan.told[i][1:]
            self.layers.append(layer)
        self.norm = Norm(body.norm)
        self.rotations = list(rotations.values())
        known = kernels_for(policy.dtype, policy.device.type)
        ways = {(n.epsilon, n.late) for layer in self.layers for n in layer.norms.values()} | {(self.norm.epsilon, self.norm.late)}
        self.kernels = known if len(ways) == 1 and all(layer.fusible for layer in self.layers) else None
        tokens = _probe_tokens(policy)
        with torch.no_grad():
            got = self(tokens, _PROBE.position.to(tokens.device), Forest(_PROBE))
        error = float((got.double() - want.double()).norm() / want.double().norm())
        if not error < (1e-4 if policy.dtype in (torch.float32, torch.float64) else 5e-2):
            raise NotUnderstood(f"hidden rows differ from the model's own by {error:.0e}")
        self.error = error

    @staticmethod
    def _probe(policy: Policy, plan: Forest) -> Tensor:
        training = policy.training
        policy.train(False)
        try:
            with torch.no_grad():
                tokens = _probe_tokens(policy)
                position = _PROBE.position.to(tokens.device)
                return policy.body(input_ids=tokens[None], position_ids=position[None], plan=plan, use_cache=False).last_hidden_state[0]
        finally:
            policy.train(training)

    def remake(self, version: int) -> None:
        """Take the weights as they are now."""
        for layer in self.layers:
            layer.remake()
        self.norm.remake()
        self.version = version

    def __call__(self, tokens: Tensor, position: Tensor, plan: Any) -> Tensor:
        x = self.embed(tokens)
        last = getattr(plan, "furthest", None)  # a plan that knows spares a GPU the wait
        last = int(position.max()) if last is None else last
        turns = {rotation: rotation.at(position, last) for rotation in self.rotations}
        if self.kernels is not None and isinstance(plan, Decode):
            return self._decode(self.kernels, x, turns, plan)
        for i, layer in enumerate(self.layers):
            x = layer(i, x, None if layer.rotation is None else turns[layer.rotation], plan)
        return self.norm(x)


    def _decode(self, kernels: Kernels, x: Tensor, turns: dict[Rotation, tuple[Tensor, Tensor]], plan: Decode) -> Tensor:
        """One token a row: four products a layer, and one kernel between any two of them."""
        x, epsilon, late = x.contiguous(), self.norm.epsilon, self.norm.late
        y = torch.empty_like(x)

        def step(more: Tensor | None, after: Norm | None, before: Norm | None) -> None:
            kernels.add_norm(x, more, None if after is None else after.wide, None if before is None else before.wide, epsilon, late, y)

        step(None, None, self.layers[0].before_attention)
        for i, layer in enumerate(self.layers):
            turn = None if layer.rotation is None else turns[layer.rotation]
            out = plan.fused(kernels, i, layer.qkv.run(y), layer.sizes, layer.qk_wide, epsilon, late, turn, *layer.attention)
            step(layer.out.run(out), layer.after_attention, layer.before_mlp)
            down = layer.down.run(kernels.gated(layer.up.run(y), bool(layer.gelu)))
            step(down, layer.after_mlp, self.layers[i + 1].before_attention if i + 1 < len(self.layers) else self.norm)
        return y


def _probe_tokens(policy: Policy) -> Tensor:
    size = policy.config.vocab_size
    low = min(3, size - 1)
    return torch.randint(low, min(size, 1000), (_PROBE.size,), generator=torch.Generator().manual_seed(1)).to(policy.device)


class Weights:
    """What the engine computes with: the lean body where the policy has one, else its own, and the head as one product."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.version = policy, policy.version
        self.lean: LeanBody | None = None
        self.halved = halves_weights(policy)
        try:
            self.lean = LeanBody(policy, self.halved)
            why = f"hidden rows agree with the model's own to {self.lean.error:.0e}"
        except (NotUnderstood, ConfigError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as reason:
            why = f"transformers' own modules: {reason}"
        policy.decisions["decode"] = {"value": "own" if self.lean is None else "lean", "why": why, "measured": {}}
        self._make_head()

    @torch.no_grad()
    def _make_head(self) -> None:
        weight, bias = self.policy.head_weight().detach(), self.policy.head_bias()
        few = _few([weight], [bias], self.halved)
        run = _reordered(weight) if weight.dtype == torch.bfloat16 and reorders(weight.device.type) else None

        def head(hidden: Tensor) -> Tensor:
            if few is not None and hidden.shape[0] <= FEW:
                return few(hidden)
            return F.linear(hidden, weight, bias) if run is None else run(hidden, bias)

        self.head: Callable[[Tensor], Tensor] = head

    def current(self) -> Weights:
        """The same, remade if the policy has moved on since."""
        if self.version != self.policy.version:
            if self.lean is not None:
                self.lean.remake(self.policy.version)
            self.halved = False  # trained weights are numbers of float32
            self._make_head()
            self.version = self.policy.version
        return self

    def body(self, tokens: Tensor, position: Tensor, plan: Any) -> Tensor:
        """[n, F] of n tokens under a plan."""
        if self.lean is not None:
            return self.lean(tokens, position, plan)
        out = self.policy.body(input_ids=tokens[None], position_ids=position[None], plan=plan, use_cache=False)
        return out.last_hidden_state[0]

