"""A model with its tokenizer and adapters: owns the tensors and their version, and turns ids into text.

Body and head run in one forward, which is what a data-parallel wrapper would wrap. The body is an unmodified transformers
model that is given a plan (forest attention); the head never makes logits beyond a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from burnish.core.errors import MachineError
from burnish.core.records import ModelShape
from burnish.forest import cuda
from burnish.forest.attention import NAME, Forest, register
from burnish.forest.pack import Micro
from burnish.forest.padded import padded_outputs, padded_positions
from burnish.forest.probe import why_not
from burnish.forest.stream import Stream, Tree
from burnish.maths.head import (
    LogitMap,
    Objective,
    effective_weight,
    head_flops,
    head_logprobs,
    head_loss,
    recomputed_rows,
)
from burnish.maths.head_kl import Head
from burnish.models.fused import fuse
from burnish.models.recompute import Checkpointing, layers_of, recomputed, recomputed_parameters
from burnish.models.router import Router, find_router
from burnish.models.shape import shape_of


@dataclass(frozen=True)
class Output:
    """loss: scalar with a graph; logprobs [M]: detached, in the micro-batch's entry order.

    router_loss: what a mixture of experts added to `loss` for uneven routing, a detached scalar; None where it adds
    nothing (see `models/router.py` for when it does).
    executed_flops(backward=True) is known once the backward has run: it includes what the plan then launched.
    """

    loss: Tensor
    logprobs: Tensor
    executed_flops: Callable[[bool], int]
    router_loss: Tensor | None = None


@dataclass(frozen=True)
class RowLoss:
    """A further objective, on the hidden rows that predict the labels: `loss([N, H]) -> scalar`, as a value head's.

    through_body  whether its gradient goes on into the body, or stops at the rows
    flops         what it launches besides one linear output, its backward among it
    """

    loss: Callable[[Tensor], Tensor]
    through_body: bool
    flops: int = 0


class Policy(nn.Module):
    """See module. `why_not_shared` is None when forest attention is exact for this model, else the reason to pad rows."""

    def __init__(self, model: nn.Module, tokenizer: Any, *, source: str = "", probe: bool = True) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.source = source
        self.version = 0
        self.checkpointing: Checkpointing = "off"
        self._recomputed: int | None = None
        self.decisions: dict[str, dict[str, Any]] = {}
        # parameter -> fp32 buffer that sums its gradient, while one process's optimiser holds them (train/optim.py)
        self.sinks: dict[nn.Parameter, Tensor] = {}
        base = cast(Any, model.get_base_model() if hasattr(model, "peft_config") else model)  # type: ignore[operator]
        body = base.get_decoder()
        self._body = [base.model if body is base else body]  # in a list: already registered as part of `model`
        self._head = [base.get_output_embeddings()]
        self._base = [base]
        self.logit_map = LogitMap()
        self.why_not_shared: str | None = None
        self.router: Router | None = None
        if probe:
            norms, gates = fuse(self.body)
            why = "each is one pass over memory" if norms or gates else "no kernels for this device and dtype, or none that is understood"
            self.decisions["fused"] = {"value": f"{norms} norms, {gates} gates", "why": why, "measured": {}}
            self.logit_map = find_logit_map(base, self.body, self.head_weight(), self.head_bias())
            self.router = find_router(base, self.body)
            self.why_not_shared = why_not(base, self.body)
            if self.why_not_shared is None:
                base.set_attn_implementation(register())
                how = "forest attention agrees with separate rows"
                if self.device.type == "cuda":
                    slow = cuda.why_not(self.dtype, self.shape.key_width, self.device.index)
                    how += ", by variable-length flash calls" if slow is None else f", by three products: {slow}"
            else:
                how = f"rows are padded and prefixes are not shared: {self.why_not_shared}"
            self.decisions["attention"] = {"value": "forest" if self.why_not_shared is None else "padded", "why": how, "measured": {}}
            if self.device.type == "cuda":
                from burnish.maths import tiles_cuda  # here: it imports Triton

                slow = tiles_cuda.why_not(self.dtype, self.device)
                how = slow or "one kernel passes over a chunk of logits; it agrees with torch's operations"
                self.decisions["head"] = {"value": "triton" if slow is None else "torch", "why": how, "measured": {}}
            if self.router is not None:
                how = "the model's configuration says output_router_logits and gives router_aux_loss_coef"
                self.decisions["router_loss"] = {"value": self.router.coefficient, "why": how, "measured": {}}

    @property
    def base(self) -> Any:
        """The transformers causal LM, under any adapter."""
        return self._base[0]

    @property
    def body(self) -> nn.Module:
        """body(input_ids=[1, T], position_ids=[1, T], plan=plan, use_cache=False).last_hidden_state"""
        return self._body[0]

    @property
    def config(self) -> Any:
        return self.base.config.get_text_config()

    @property
    def shape(self) -> ModelShape:
        return shape_of(self.model, self.body, self._head[0])

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self._head[0].weight.dtype

    @property
    def adapted(self) -> bool:
        return hasattr(self.model, "peft_config")

    def head_weight(self) -> Tensor:
        """[V, H], tied, adapted or plain; differentiable in whatever is trained."""
        return effective_weight(self._head[0])

    def head_bias(self) -> Tensor | None:
        return getattr(self._head[0], "bias", None)

    def head(self, hidden: Tensor) -> Head:
        """The head over these rows [n, H], for objectives that speak of whole distributions."""
        return Head(hidden, self.head_weight(), self.head_bias(), self.logit_map)

    def sink(self, weight: Tensor) -> Tensor | None:
        """The buffer that sums the gradient of this weight, while an optimiser lends it."""
        return self.sinks.get(weight) if isinstance(weight, nn.Parameter) else None

    def train(self, mode: bool = True) -> Policy:
        """Adapters' dropout follows `mode`; the model's own dropout stays off: copies of a shared prefix must agree."""
        self.training = mode
        self.model.eval()
        for name, module in self.model.named_modules():
            if "lora_dropout" in name:
                module.train(mode)
        return self

    def hidden(self, stream: Stream, plan: Any = None, router_logits: list[Tensor] | None = None) -> Tensor:
        """[T, H] for a packed stream. Layers are run again in the backward where `checkpointing` says so.

        A list given takes the router logits [T, experts] of each routed layer.
        """
        if self.checkpointing == "off" or not torch.is_grad_enabled():
            run = nullcontext()
        else:
            run = recomputed(layers_of(self.body), keeps_rng=self.training and self.adapted)
        routed = router_logits is not None
        with run:
            if self.why_not_shared is not None:
                hidden, found = padded_outputs(self.body, stream, router_logits=routed)
            else:
                asked = {"output_router_logits": True} if routed else {}
                out = self.body(
                    input_ids=stream.tokens[None].to(self.device),
                    position_ids=stream.layout.position[None].to(self.device),
                    plan=plan if plan is not None else Forest(stream.layout),
                    use_cache=False,
                    **asked,
                )
                hidden, found = out.last_hidden_state[0], out.router_logits if routed else ()
        if router_logits is not None:
            router_logits += [x.reshape(-1, x.shape[-1]) for x in found]
        return hidden

    def checkpoint(self, what: Checkpointing) -> None:
        """What the backward runs again. Raises MachineError where this model's layers do not engage."""
        if what == "layers" and self._recomputed is None:
            mode, self.checkpointing = self.training, "off"
            self.train(False)  # no adapter's dropout: the dice stay as they are
            token = Stream.of([Tree.row([1], [False])])
            trained = list(self.trainable().values())
            self._recomputed = recomputed_parameters(lambda: self.hidden(token), layers_of(self.body), trained)
            self.train(mode)
        self.checkpointing = what

    def forward(
        self, micro: Micro, objective: Objective | None, *, couple: Tensor | None = None, rows: int | None = None,
        on_rows: RowLoss | None = None,
    ) -> Output:  # fmt: skip
        """One micro-batch: body, head and the objective's gradient on the loss rows. `couple` [M]: ids never split by a chunk.

        Where the model's own loss has a router term (`models/router.py`), it is part of this loss. `on_rows` adds its own;
        with it alone (objective None) there is no head and `logprobs` is empty.
        """
        if objective is None:
            assert on_rows is not None
            return self._rows_alone(micro, on_rows)
        plan = Forest(micro.stream.layout)
        router_logits: list[Tensor] = []
        hidden = self.hidden(micro.stream, plan, *([] if self.router is None else [router_logits]))
        view = micro.view
        predicting = hidden[view.source.to(hidden.device)]
        options: dict[str, Any] = {} if rows is None else {"rows": rows}
        weight = self.head_weight()
        loss, logprobs = head_loss(
            predicting, weight, view.label.to(hidden.device), objective,
            index=view.index.to(hidden.device), couple=couple, bias=self.head_bias(), logit_map=self.logit_map,
            sink=self.sink(weight), **options,
        )  # fmt: skip
        router_loss = None
        if self.router is not None:
            term = self.router.loss(router_logits, hidden, micro)
            loss, router_loss = loss + term.to(loss), term.detach()
        head_rows = len(view.label)
        grads, head_trained = loss.requires_grad, weight.requires_grad
        if on_rows is not None:
            loss = loss + on_rows.loss(predicting if on_rows.through_body else predicting.detach()).to(loss)
        twice = recomputed_rows(head_rows, weight, index=view.index, couple=couple, rows=rows) if couple is not None else 0

        def executed_flops(backward: bool) -> int:
            shape = self.shape
            further = 0 if on_rows is None else row_flops(head_rows, shape.hidden, on_rows, backward)
            # the head forms its gradient in the forward, so it is spent whether or not a backward follows
            head = head_flops(
                head_rows, shape.vocabulary, shape.hidden, weight_trained=head_trained, backward=grads, recomputed=twice
            )
            return self.body_flops(micro.stream, plan, backward) + head + further

        return Output(loss, logprobs, executed_flops, router_loss)

    def _rows_alone(self, micro: Micro, on_rows: RowLoss) -> Output:
        """`forward` without a head: the body runs without a graph where none is wanted."""
        plan = Forest(micro.stream.layout)
        with nullcontext() if on_rows.through_body else torch.no_grad():
            hidden = self.hidden(micro.stream, plan)
        loss = on_rows.loss(hidden[micro.view.source.to(hidden.device)])

        def executed_flops(backward: bool) -> int:
            body = self.body_flops(micro.stream, plan, backward and hidden.requires_grad)
            return body + row_flops(len(micro.view.label), self.shape.hidden, on_rows, backward)

        return Output(loss, hidden.new_zeros(0), executed_flops)

    def body_flops(self, stream: Stream, plan: Forest, backward: bool) -> int:
        """FLOPs the body launched for a stream that ran with `plan`; with its backward, once that has run too."""
        shape, layout = self.shape, stream.layout
        again = (self._recomputed or 0) if self.checkpointing != "off" else 0
        per_token = 2 * shape.body_parameters + 2 * shape.adapter_parameters
        if backward:
            per_token += (2 if shape.trained == "adapter" else 4) * shape.body_parameters + 4 * shape.adapter_parameters + 2 * again
        if self.why_not_shared is None:
            return per_token * len(stream.tokens) + plan.flops + (plan.flops_backward if backward else 0)
        # padded rows: every position, and a full square of keys in each layer
        positions = padded_positions(layout)
        pair = 2 * shape.query_heads * (shape.key_width + shape.value_width) * shape.layers
        passes = (4 if again else 3) if backward else 1
        return (per_token + passes * pair * layout.longest) * positions

    @torch.no_grad()
    def logprobs(self, micro: Micro) -> Tensor:
        """[M] log-probabilities of the micro-batch's labels, in entry order; no gradient."""
        hidden = self.hidden(micro.stream)
        view = micro.view
        rows = head_logprobs(
            hidden[view.source.to(hidden.device)], self.head_weight(), view.label.to(hidden.device),
            bias=self.head_bias(), logit_map=self.logit_map,
        )  # fmt: skip
        return rows[view.index.to(rows.device)]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a turn: the generation config's, the model config's and the tokenizer's."""
        found: list[int] = []
        for holder in (getattr(self.base, "generation_config", None), self.base.config, self.tokenizer):
            ids = getattr(holder, "eos_token_id", None)
            found += [ids] if isinstance(ids, int) else list(ids or ())
        return tuple(dict.fromkeys(found))

    @property
    def context(self) -> int:
        """The longest sequence the model was built for."""
        return int(getattr(self.config, "max_position_embeddings", None) or 2**31)

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything that is trained; a tied weight appears once."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}


def row_flops(rows: int, hidden: int, on_rows: RowLoss, backward: bool) -> int:
    """Of one linear output on `rows` hidden rows: forward, the gradient of its weight, that of the rows; and what it says."""
    return 2 * hidden * rows * (1 + (1 + on_rows.through_body if backward else 0)) + on_rows.flops


def find_logit_map(base: Any, body: nn.Module, weight: Tensor, bias: Tensor | None) -> LogitMap:
    """Which map makes this model's logits from h W^T + b: asked of the model, because four config fields spell it and two
    architectures use one field in opposite senses. Raises MachineError when none does.
    """
    config = base.config.get_text_config()
    scales = [1.0]
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale"):
        value = getattr(config, name, None)
        if value:
            scales += [float(value), 1 / float(value)]
    caps = [None]
    if cap := getattr(config, "final_logit_softcapping", None):
        caps.insert(0, cap)
    ids = torch.arange(3, 11, device=weight.device)[None] % config.vocab_size
    with torch.no_grad():
        own = base(input_ids=ids, use_cache=False).logits[0].float()
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state[0]
        linear = torch.nn.functional.linear(hidden, weight, bias).float()
        tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2
        worst: list[float] = []
        for scale in scales:
            for softcap in caps:
                guess = LogitMap(scale=scale, softcap=softcap)
                error = float((guess(linear.clone()) - own).norm() / own.norm().clamp_min(1e-12))
                worst.append(error)
                if error < tolerance:
                    return guess
    raise MachineError(
        f"no known map from hidden rows to this model's logits (closest differs by {min(worst):.1e})",
        where=type(base).__name__,
        remedy="please report the architecture; its head is not a linear map with scale and softcap",
    )


__all__ = ["NAME", "Output", "Policy", "RowLoss", "find_logit_map"]
