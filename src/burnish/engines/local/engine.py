"""The local engine: a policy that samples. It owns no weights, only the keys and values of nodes and running rows.

Prompts are read lazily, packed, once per distinct prefix; `rollout` decodes; scoring is the trainer's own forest pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from burnish.core.errors import ConfigError, DataError, MachineError
from burnish.core.ledger import forward_flops
from burnish.core.records import ModelShape, Sampling, Spend, Trajectory
from burnish.engines.base import Node, StaleNodeError, check_rows, check_sampling
from burnish.engines.local.arena import Arena, LocalNode
from burnish.engines.local.graphs import DecodeGraphs
from burnish.engines.local.lean import Weights
from burnish.engines.local.plans import Prefill
from burnish.engines.local.rollout import Rollout, Until
from burnish.forest.attention import Forest
from burnish.forest.pack import Batch, Micro
from burnish.forest.stream import Tree, Unit
from burnish.maths.head import head_flops, head_logprobs
from burnish.models.load import free_cuda_bytes
from burnish.models.policy import Policy

KV_BYTES = 2**31
KV_SHARE = 0.5  # of a GPU's free memory: what training will add (moments, activations) is not there yet


def kv_bytes_of(policy: Policy) -> int:
    """Memory for keys and values where nobody says how much: on a GPU a share of what is free, kept as a decision."""
    if policy.device.type != "cuda":
        return KV_BYTES
    free = free_cuda_bytes(policy.device)
    value = max(1, int(KV_SHARE * free))
    why = f"{KV_SHARE:.0%} of the {free / 1e9:.1f} GB that are free on the device"
    policy.decisions["kv_bytes"] = {"value": value, "why": why, "measured": {"free_bytes": free}}
    return value


class LocalEngine:
    """See engines.base.Engine. Tokens depend on (weights, prefix, sampling, key) and on nothing else, up to rounding.

    rows            most rows decoded at once
    kv_bytes        memory for keys and values: half for nodes (the oldest unused are dropped, and read again when
                    needed), half for rows (fewer run at once when they are long). One node or row is never refused.
                    None: 2 GiB, on a GPU half of what is free there now
    prefill_tokens  most tokens of one prefill or scoring pass
    end_ids         tokens that end a row besides the policy's own: what the chat template ends a turn with
    poll            called before every decode step; what it raises stops the call and leaves the engine usable
    Raises MachineError for a model that cannot share prefixes.
    """

    can = frozenset({"fork", "ids", "logprobs", "score"})

    def __init__(
        self,
        policy: Policy,
        *,
        rows: int = 512,
        kv_bytes: int | None = None,
        prefill_tokens: int = 4096,
        end_ids: Sequence[int] = (),
        poll: Callable[[], None] | None = None,
    ) -> None:
        if policy.why_not_shared is not None:
            raise MachineError(
                f"this model cannot be sampled from by the local engine: {policy.why_not_shared}",
                where=type(policy.model).__name__,
                remedy="sample from it through a server (an OpenAI-compatible endpoint)",
            )
        kv_bytes = kv_bytes_of(policy) if kv_bytes is None else kv_bytes
        for name, value in (("rows", rows), ("kv_bytes", kv_bytes), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise ConfigError(f"{value} given, wanted at least 1", where=f"engine.{name}")
        self.policy, self.rows, self.prefill_tokens, self.poll = policy, rows, prefill_tokens, poll
        self.end_ids = tuple(dict.fromkeys((*policy.eos_ids, *end_ids)))
        self.spend = Spend()
        self.arena = Arena()
        self.shape: ModelShape = policy.shape
        width = self.shape.kv_heads * (self.shape.key_width + self.shape.value_width)
        self.bytes_per_token = width * policy.dtype.itemsize  # of one layer
        self.tokens_held = kv_bytes // 2 // (self.bytes_per_token * self.shape.layers)
        self._nodes: dict[tuple[int, tuple[int, ...]], LocalNode] = {}
        self._computed: dict[LocalNode, None] = {}  # oldest first
        self._made = 0
        self._weights = Weights(policy)
        self.graphs = DecodeGraphs(self) if policy.device.type == "cuda" else None

    @property
    def weights_version(self) -> str:
        return str(self.policy.version)

    # ---- nodes

    def prefill(self, ids: Sequence[int], parent: Node | None = None) -> Node:
        """See engines.base. Reading is put off until the node is needed, so that many are read in one packed pass."""
        return self.prefill_many([ids], None if parent is None else [parent])[0]

    def prefill_many(self, rows: Sequence[Sequence[int]], parents: Sequence[Node] | None = None) -> list[Node]:
        """A node a row. Raises DataError for a row that is empty, not of this vocabulary, or too long for the model."""
        made: list[Node] = []
        for i, row in enumerate(rows):
            parent = None if parents is None else self._live(parents[i])
            ids = tuple(map(int, row))
            if not ids:
                raise DataError("a node needs at least one token", where=f"prefill row {i}")
            if min(ids) < 0 or max(ids) >= self.shape.vocabulary:
                bad = next(t for t in ids if not 0 <= t < self.shape.vocabulary)
                raise DataError(f"token {bad} is not one of {self.shape.vocabulary}", where=f"prefill row {i}")
            end = len(ids) + (0 if parent is None else parent.end)
            if end > self.policy.context:
                raise DataError(
                    f"has {end} tokens; the model was built for {self.policy.context}",
                    where=f"prefill row {i}",
                    remedy="shorten the prompt or drop the row",
                )
            name = (0 if parent is None else id(parent)), ids
            node = self._nodes.get(name)
            if node is not None and node.version in ("", self.weights_version):
                node.uses += 1
            else:
                self._made += 1
                node = LocalNode(f"n{self._made}", ids, parent)
                if parent is not None:
                    parent.uses += 1
                self._nodes[name] = node
            made.append(node)
        return made

    def fork(self, node: Node, k: int) -> list[Node]:
        """See engines.base."""
        self._live(node).uses += k
        return [node] * k

    def free(self, node: Node) -> None:
        """See engines.base."""
        current: Node | None = self._held(node)
        while current is not None:
            current.uses -= 1
            if current.uses:
                return
            self._drop(cast(LocalNode, current))
            name = (0 if current.parent is None else id(current.parent)), current.ids
            if self._nodes.get(name) is current:
                del self._nodes[name]
            current = current.parent

    def _held(self, node: Node) -> LocalNode:
        if not isinstance(node, LocalNode) or node.uses < 1:
            raise StaleNodeError(
                "was freed, or comes from another engine", where=f"node {node.id}", remedy="prefill its tokens again"
            )
        return node

    def _live(self, node: Node) -> LocalNode:
        held = self._held(node)
        for above in held.chain:
            if above.version not in ("", self.weights_version):
                raise StaleNodeError(
                    f"was read with weights version {above.version}; the policy is at {self.weights_version}",
                    where=f"node {above.id}",
                    remedy="free it and prefill its tokens again",
                )
        return held

    def _drop(self, node: LocalNode) -> None:
        """Forget its keys and values; the node can be read again."""
        if node.at is not None:
            self.arena.spans.give(node.at, len(node.ids))
            node.at = node.hidden = None
            del self._computed[node]

    def read(self, nodes: Sequence[LocalNode], busy: set[LocalNode]) -> None:
        """Compute every node of these chains that is not held, in packed passes. `busy` ones are never dropped."""
        wanted = dict.fromkeys(cast(LocalNode, above) for node in nodes for above in node.chain)
        waiting = deque(node for node in wanted if node.at is None)
        while waiting:
            batch = [waiting.popleft()]
            size = len(batch[0].ids)
            while waiting and size + len(waiting[0].ids) <= self.prefill_tokens:
                size += len(waiting[0].ids)
                batch.append(waiting.popleft())
            excess = self.arena.spans.used + size - self.tokens_held
            for old in list(self._computed) if excess > 0 else []:
                if excess > 0 and old not in wanted and old not in busy:
                    excess -= len(old.ids)
                    self._drop(old)
            self._read_together(batch)

    def _read_together(self, batch: Sequence[LocalNode]) -> None:
        at = {cast(LocalNode, above): cast(LocalNode, above).at for node in batch for above in node.chain}
        for node in batch:
            at[node] = self.arena.allocate(len(node.ids))
        plan = Prefill(self.arena, batch, cast("Mapping[Node, int]", at), self.bytes_per_token, self.policy.device)
        hidden = self.weights.body(plan.tokens, plan.position, plan)[plan.last]
        shape = self.shape
        per_token = 2 * (shape.body_parameters + shape.adapter_parameters)
        for node, row, attention in zip(batch, hidden, plan.flops_of.tolist()):
            node.at, node.hidden, node.version = at[node], row, self.weights_version
            self._computed[node] = None
            node.cost = Spend(
                prefill_tokens=len(node.ids),
                useful_flops=forward_flops(shape, len(node.ids), 0, [(node.start, len(node.ids))]),
                executed_flops=per_token * len(node.ids) + attention,
            )
            self.spend += node.cost

    @property
    def weights(self) -> Weights:
        """What it computes with, of the policy's present version."""
        return self._weights.current()

    # ---- sampling

    @torch.inference_mode()
    def sample(
        self, nodes: Sequence[Node], sampling: Sampling, keys: Sequence[tuple[int, int]], *, begun: Mapping[Node, int] | None = None,
        until: Until | None = None,
    ) -> list[Trajectory]:  # fmt: skip
        """See engines.base. Raises DivergedError where the model's logits are not finite.

        begun  of a node: so many of its last tokens were drawn before and count towards max_new_tokens and stop strings
        until  told which rows have just ended, by their index; where it says True all others end as they are, `partial`
        """
        check_sampling(sampling)
        check_rows(nodes, keys)
        live = [self._live(node) for node in dict.fromkeys(nodes)]
        if full := next((node for node in live if node.end >= self.policy.context), None):
            raise DataError(
                f"fills the model's context of {self.policy.context} tokens: nothing can follow it",
                where=f"node {full.id}",
                remedy="shorten the prompt",
            )
        if not nodes:
            return []
        given = cast("Mapping[LocalNode, int]", begun or {})
        if full := next((node for node, drawn in given.items() if drawn >= sampling.max_new_tokens), None):
            message = f"{given[full]} tokens were drawn of at most {sampling.max_new_tokens}: nothing is left to draw"
            raise DataError(message, where=f"node {full.id}", remedy="leave out completions that are as long as they may be")
        rollout = Rollout(self, cast("Sequence[LocalNode]", nodes), sampling, keys, given, until)
        try:
            rollout.run()
        except BaseException:
            self.arena.release()  # numbers that are not finite must not lie in a slot that is used again
            raise
        made = rollout.trajectories()
        drawn = sum(t.cost.sampled_tokens for t in made)
        self.spend += Spend(sampled_tokens=drawn, useful_flops=rollout.useful, executed_flops=rollout.launched)
        return made

    # ---- scoring

    @torch.no_grad()
    def score(self, nodes: Sequence[Node]) -> list[tuple[float, ...]]:
        """See engines.base. Computed afresh with the current weights as one forest, not from what sampling kept."""
        roots: dict[Node, None] = {}
        children: dict[Node, dict[Node, None]] = {}
        for node in nodes:
            chain = self._held(node).chain
            roots[chain[0]] = None
            for above, below in pairwise(chain):
                children.setdefault(above, {})[below] = None
        asked = dict.fromkeys(nodes)
        trees: list[Tree] = []
        unit_of: list[Node] = []
        for root in roots:
            order: list[tuple[Node, int]] = []
            stack: list[tuple[Node, int]] = [(root, -1)]
            while stack:
                node, parent = stack.pop()
                stack += [(child, len(order)) for child in reversed(children.get(node, {}))]
                order.append((node, parent))
            units = [(i, node) for i, (node, _) in enumerate(order) if node in asked]
            labels = [Unit(i, tuple(range(max(node.start, 1), node.end))) for i, node in units]
            trees.append(Tree(tuple(n.ids for n, _ in order), tuple(p for _, p in order), tuple(labels)))
            unit_of += [node for _, node in units]
        if not trees:
            return []
        batch = Batch(trees)
        found = torch.zeros(batch.entries)
        for micro in batch.split(self.prefill_tokens):
            if len(micro.items):
                found[micro.items] = self._score_together(micro)
        sizes = torch.bincount(batch.unit, minlength=len(unit_of)).tolist()
        scores = dict(zip(unit_of, (tuple(part.tolist()) for part in found.split(sizes))))
        return [scores[node] for node in nodes]

    def _score_together(self, micro: Micro) -> Tensor:
        plan = Forest(micro.stream.layout)
        hidden = self.policy.hidden(micro.stream, plan)
        view = micro.view.to(hidden.device)
        weight, bias = self.policy.head_weight(), self.policy.head_bias()
        rows = head_logprobs(hidden[view.source], weight, view.label, bias=bias, logit_map=self.policy.logit_map)
        shape, layout, tokens = self.shape, micro.stream.layout, len(micro.stream.tokens)
        body = 2 * (shape.body_parameters + shape.adapter_parameters) * tokens
        head = head_flops(len(view.label), shape.vocabulary, shape.hidden, weight_trained=False, backward=False)
        self.spend += Spend(
            scored_tokens=len(micro.items),
            useful_flops=forward_flops(shape, tokens, len(view.label), zip(layout.first_position, layout.length)),
            executed_flops=body + head + plan.flops,
        )
        return rows[view.index].float().cpu()
