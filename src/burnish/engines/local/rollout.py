"""One call of `sample`: samples come and go, and those that have said the same so far are one row.

Rows run in slots 0..n-1. The samples of one prompt begin as one row with many members: what they share is computed once,
each member draws with its own noise, and a row is split, its keys and values copied, only where members draw different
tokens. That is exact, for equal prefixes have equal logits, and it is most of the work where a policy is sure: 16 samples
at temperature 0.4 of a model that has learnt its task are 1.4 to 11 times fewer rows (docs/notebook.md). A finished
sample leaves at once and waiting ones come in; when nobody waits, the last rows move into the holes, so that a step
computes running rows only. Bookkeeping is a few numpy arrays; tokens are drawn, checked and logged a step at a time,
and become Python objects once, at the end.

A trajectory costs what it would have cost alone; the engine's own spend counts what was launched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from burnish.core.errors import DivergedError
from burnish.core.ledger import attended, decode_flops
from burnish.core.records import Finish, Sampling, Span, Spend, Trajectory
from burnish.engines.base import Node, cut
from burnish.engines.local.arena import KEYS_STEP, LocalNode, place_of
from burnish.engines.local.crossing import download, upload
from burnish.engines.local.plans import Decode, Shared, trunk_of
from burnish.engines.local.sampling import draw, row_keys

if TYPE_CHECKING:
    from burnish.engines.local.engine import LocalEngine

LOGITS_BYTES = 64 * 2**20  # of one chunk of rows
FINISH: tuple[Finish, ...] = ("stop", "length", "stop_string", "partial")
STOP, LENGTH, STOP_STRING, PARTIAL = range(4)
Until = Callable[[Sequence[int]], bool]  # the requests that have just ended -> whether drawing stops
NO_TOKENS = np.zeros(0, np.int64)
MEMBERS_PER_ROW = 4  # samples let in for each row computed: many of them share a row


class Rollout:
    """One call of `sample`: the queue, the running rows with their members, and the log of what was drawn."""

    def __init__(
        self, engine: LocalEngine, nodes: Sequence[LocalNode], sampling: Sampling, keys: Sequence[tuple[int, int]],
        begun: Mapping[LocalNode, int], until: Until | None,
    ) -> None:  # fmt: skip
        self.engine, self.policy, self.sampling, self.keys, self.nodes = engine, engine.policy, sampling, keys, nodes
        self.begun, self.until, self.ended = begun, until, list[int]()
        self.device = engine.policy.device
        self.arena = engine.arena
        self.weights = engine.weights
        place = {node: i for i, node in enumerate(dict.fromkeys(nodes))}
        self.queue = deque(sorted(range(len(nodes)), key=lambda i: place[nodes[i]]))  # samples of one node side by side
        self.ends = np.zeros(engine.shape.vocabulary, bool)
        self.ends[[i for i in engine.end_ids if 0 <= i < engine.shape.vocabulary]] = True

        below: dict[Node, int] = {}
        for node in nodes:
            for above in node.chain:
                below[above] = min(below.get(above, 0) + 1, engine.rows)
        depth = {node: trunk_of(node.chain, below, engine.bytes_per_token, self.device, spared=1) for node in place}
        self.trunk = {node: cast("list[LocalNode]", node.chain[:d]) for node, d in depth.items()}
        self.own = {node: cast("list[LocalNode]", node.chain[d:]) for node, d in depth.items()}
        longest = max(sum(len(x.ids) for x in own) for own in self.own.values())
        # slots begin with room for a short answer and double: most rows end long before their limit
        size = -(-(longest + min(sampling.max_new_tokens, 64)) // KEYS_STEP) * KEYS_STEP
        # every member may come to need a slot of its own
        self.capacity = max(1, min(len(nodes), MEMBERS_PER_ROW * engine.rows, engine.tokens_held // size))
        if engine.graphs is None or self.capacity > self.arena.rows or size > self.arena.size:
            self.arena.release()  # graphs point at slots, and are kept from call to call where these serve
        self.arena.reserve(self.capacity, size)

        self.n = 0
        self.node = np.zeros(self.capacity, object)  # the node a slot's row stands below
        self.length = np.zeros(self.capacity, np.int64)  # keys in the slot
        self.position = np.zeros(self.capacity, np.int64)  # of the token in hand, which the body has not seen
        self.limit = np.zeros(self.capacity, np.int64)  # position after the last token allowed
        self.token = torch.zeros(self.capacity, dtype=torch.int64, device=self.device)
        self.live = NO_TOKENS  # requests that run, by slot
        self.slot = NO_TOKENS  # and the slot each of them is in
        self.noise = row_keys(sampling.seed, keys)
        self.plan = Decode(self.arena, self.device)
        self.shared: list[tuple[LocalNode, np.ndarray]] | None = None
        self.log: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.finish = np.full(len(nodes), PARTIAL, np.int64)
        self.attention = np.zeros(len(nodes), np.int64)
        self.launched = self.useful = 0  # FLOPs of this call
        self.tail = max((len(s.encode()) for s in sampling.stop), default=0) + 8
        self.tails = {i: list(node.path[-begun[node] :][-self.tail :]) for i, node in enumerate(nodes) if begun.get(node)}

    def run(self) -> None:
        """Until the queue and the slots are empty, or enough have ended."""
        self._admit([])
        while not self._enough() and self.n:  # asked of the last ones too
            if self.engine.poll is not None:
                self.engine.poll()
            n = self.n
            hidden, attention, launched = self._body(n)
            self._count(n, attention, launched)
            self.length[:n] += 1
            self.position[:n] += 1
            token, stays = self._draw(hidden, self.live, self.slot, self.position[self.slot], self.limit[self.slot])
            self._settle(token, stays)
            if self.n and int(self.length[: self.n].max()) >= self.arena.size:
                self._widen()

    def _enough(self) -> bool:
        """Whether whoever asked has what it wants."""
        if self.until is None or not self.ended:
            return False
        ended, self.ended = self.ended, []
        return self.until(ended)

    def _body(self, n: int) -> tuple[Tensor, np.ndarray, int]:
        """(hidden [n, H] of the running rows, attention FLOPs [n] of each, rows launched), by a graph where there is one."""
        graphs, shared = self.engine.graphs, self._shared()
        made = None if graphs is None or shared else graphs(self.token[:n], self.length[:n])
        if made is not None:
            return made.hidden, np.full(n, made.attention), made.rows
        self.plan.begin(self.length[:n], self.position[:n], shared)
        return self.weights.body(self.token[:n], self._there(self.position[:n]), self.plan), self.plan.flops_of, n

    def _count(self, n: int, attention: np.ndarray, launched: int) -> None:
        """One step of n rows: each member is charged its row's attention, the call what was launched once."""
        self.attention[self.live] += attention[self.slot]
        shape = self.engine.shape
        self.launched += 2 * (shape.body_parameters + shape.adapter_parameters) * launched + int(attention.sum())
        self.launched += (launched - n) * int(attention[0])  # rows that fill a graph up
        seen = self.position[:n] + 1
        keys = {window: int(seen.sum() if window is None else np.minimum(seen, window).sum()) for window in set(shape.windows)}
        self.useful += decode_flops(shape, n, keys) - 2 * shape.vocabulary * shape.hidden * n  # the head is counted where it draws

    def _there(self, x: np.ndarray) -> Tensor:
        # a copy: on the CPU from_numpy would share memory with bookkeeping that moves on
        return upload(x, self.device) if self.device.type == "cuda" else torch.tensor(x, device=self.device)

    # ---- rows come, split and go

    def _settle(self, token: np.ndarray, stays: np.ndarray) -> None:
        """After a draw: members that ended leave, rows whose members disagree split, holes are filled or closed."""
        live, slot, token = self.live[stays], self.slot[stays], token[stays]
        key, group = np.unique(slot * self.engine.shape.vocabulary + token, return_inverse=True)
        source, said = np.divmod(key, self.engine.shape.vocabulary)
        first = np.concatenate([[True], source[1:] != source[:-1]]) if len(source) else np.zeros(0, bool)
        holes = np.setdiff1d(np.arange(self.n), source[first], assume_unique=True)
        target = source.copy()
        if more := int((~first).sum()):
            target[~first] = np.concatenate([holes, np.arange(self.n, self.n + more)])[:more]
            self._copy(source[~first], target[~first])
            self.n = max(self.n, int(target.max()) + 1)
            holes = holes[more:]
        if len(target):
            self.token[self._there(target)] = self._there(said)
        self.live, self.slot = live, target[group]
        if len(holes) or more:
            self.shared = None
        holes = self._admit(holes.tolist())
        if holes:
            self._close(holes)
        elif more:
            self._sort()

    def _sort(self) -> None:
        """Members by slot, so that the head's rows and their members are cut into chunks together."""
        order = np.argsort(self.slot, kind="stable")
        self.live, self.slot = self.live[order], self.slot[order]

    def _copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Slots `target` become what slots `source` are."""
        for x in (self.node, self.length, self.position, self.limit):
            x[target] = x[source]
        size = -(-int(self.length[target].max()) // KEYS_STEP) * KEYS_STEP
        self.arena.move(self._there(source), self._there(target), min(size, self.arena.size))

    def _admit(self, holes: list[int]) -> list[int]:
        """Let waiting samples in, as many as rows and memory allow; -> the holes that are left."""
        while self.queue and self.n - len(holes) < self.engine.rows:
            room = min(len(self.queue), self._room() - len(self.live), self.engine.rows - (self.n - len(holes)))
            if room < 1:
                break
            holes = self._seat(np.array([self.queue.popleft() for _ in range(room)]), holes)
        return holes

    def _room(self) -> int:
        """Samples that may run at once: fewer, once slots have grown long."""
        return min(self.capacity, self.arena.rows, max(1, self.engine.tokens_held // self.arena.size))

    def _seat(self, requests: np.ndarray, holes: list[int]) -> list[int]:
        """Draw the first tokens of these samples from their nodes and seat those that go on; -> the holes left."""
        nodes = list(dict.fromkeys(self.nodes[r] for r in requests))
        if any(x.at is None for node in nodes for x in node.chain):
            self._read_ahead(nodes)
        number = {node: i for i, node in enumerate(nodes)}
        row = np.array([number[self.nodes[r]] for r in requests])
        end = np.array([node.end for node in nodes])
        begun = np.array([self.begun.get(node, 0) for node in nodes])
        limit = np.minimum(end - begun + self.sampling.max_new_tokens, self.policy.context)
        token, stays = self._draw(torch.stack([cast(Tensor, node.hidden) for node in nodes]), requests, row, end[row], limit[row])
        requests, row, token = requests[stays], row[stays], token[stays]
        if not len(requests):
            return holes
        key, group = np.unique(row * self.engine.shape.vocabulary + token, return_inverse=True)
        row, said = np.divmod(key, self.engine.shape.vocabulary)
        slots = np.array([*holes, *range(self.n, self.n + len(key))][: len(key)])
        holes = holes[len(key) :]
        own = {node: np.concatenate([NO_TOKENS, *map(place_of, self.own[node])]) for node in nodes}
        longest = max(len(x) for x in own.values())
        if longest:
            padded = [np.pad(x, (0, longest - len(x)), mode="edge") if len(x) else np.zeros(longest, np.int64) for x in own.values()]
            self.arena.seat(self._there(slots), self._there(np.stack(padded)[row]))
        self.node[slots] = [nodes[i] for i in row]
        self.length[slots] = np.array([len(x) for x in own.values()])[row]
        self.position[slots], self.limit[slots] = end[row], limit[row]
        self.token[self._there(slots)] = self._there(said)
        self.n = max(self.n, int(slots.max()) + 1)
        self.live, self.slot = np.concatenate([self.live, requests]), np.concatenate([self.slot, slots[group]])
        self._sort()
        self.shared = None
        if int(self.length[: self.n].max()) >= self.arena.size:
            self._widen()
        return holes

    def _read_ahead(self, nodes: Sequence[LocalNode]) -> None:
        """Read what these rows need and, as far as one pass goes, what the next ones will."""
        size, ahead = 0, dict.fromkeys(nodes)
        for r in self.queue:
            node = self.nodes[r]
            if node not in ahead and node.at is None:
                size += len(node.ids)
                if size > self.engine.prefill_tokens:
                    break
                ahead[node] = None
        running = {x for node in set(self.node[: self.n]) - {0} for x in self.trunk[node]}
        self.engine.read(list(ahead), running)

    def _close(self, holes: list[int]) -> None:
        """Move the last running rows into the holes, so that rows 0..n-1 are the running ones."""
        gone = set(holes)
        n = self.n - len(gone)
        source = [i for i in range(n, self.n) if i not in gone]
        if source:
            target = [i for i in sorted(gone) if i < n]
            to, away = np.array(target), np.array(source)
            self._copy(away, to)
            self.token[self._there(to)] = self.token[self._there(away)]
            moved = np.arange(self.n)
            moved[away] = to
            self.slot = moved[self.slot]
        self.n = n
        self._sort()

    def _widen(self) -> None:
        size = int(self.length[: self.n].max()) + 1
        rows = max(len(self.live), self.n, min(self.capacity, self.engine.tokens_held // (2 * self.arena.size)))
        self.arena.reserve(rows, size, running=self.n)

    def _shared(self) -> list[Shared]:
        """Trunk nodes with the rows below them. Members change when rows come, go or move; positions every step."""
        if self.shared is None:
            members: dict[LocalNode, list[int]] = {}
            for slot, own in enumerate(self.node[: self.n]):
                for node in self.trunk[own]:
                    members.setdefault(node, []).append(slot)
            self.shared = [(node, np.array(slots)) for node, slots in members.items()]
            self.shared_rows = [None if len(m) == self.n else self._there(m) for _, m in self.shared]
        return [
            Shared(cast(int, node.at), node, members, rows, self.position[members])
            for (node, members), rows in zip(self.shared, self.shared_rows)
        ]

    # ---- tokens

    def _draw(
        self, hidden: Tensor, requests: np.ndarray, row: np.ndarray, position: np.ndarray, limit: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """A token for each request from row `row` (ascending) of hidden [n, H], logged; -> tokens, and which go on."""
        n, shape = len(hidden), self.engine.shape
        flops = 2 * shape.vocabulary * shape.hidden * n
        self.launched, self.useful = self.launched + flops, self.useful + flops
        step = max(1, LOGITS_BYTES // (hidden.element_size() * shape.vocabulary))
        key, where, rows = self._there(self.noise[requests]), self._there(position), self._there(row)
        parts = []
        for a in range(0, n, step):
            own = slice(*np.searchsorted(row, [a, a + step]).tolist())
            head = self.weights.head(hidden[a : a + step])
            parts.append(draw(head, self.sampling, key[own], where[own], self.policy.logit_map, rows[own] - a))
        drawn, logprob = download(torch.cat([t for t, _ in parts]), torch.cat([x for _, x in parts]))
        stopped = self.ends[drawn]
        if not np.isfinite(logprob).all():
            raise DivergedError(
                "the model's logits are not finite", where="sample", remedy="these weights cannot be sampled from"
            )
        self.log.append((requests, drawn, logprob))
        code = np.where(stopped, STOP, np.where(position + 1 >= limit, LENGTH, -1))
        if self.sampling.stop:
            for i, (r, t) in enumerate(zip(requests.tolist(), drawn.tolist())):
                tail = self.tails.setdefault(r, [])
                tail.append(t)
                if code[i] != STOP:
                    text = self.policy.decode(tail[-self.tail :], keep_special=True)
                    if any(s in text for s in self.sampling.stop):
                        code[i] = STOP_STRING
        ended = code >= 0
        self.finish[requests[ended]] = code[ended]
        self.ended += requests[ended].tolist()
        return drawn, ~ended

    # ---- the end

    def trajectories(self) -> list[Trajectory]:
        """In the order of the requests."""
        request = np.concatenate([r for r, _, _ in self.log])
        order = np.argsort(request, kind="stable")
        token = np.concatenate([t for _, t, _ in self.log])[order]
        logprob = np.concatenate([x for _, _, x in self.log])[order]
        begin = np.concatenate([[0], np.cumsum(np.bincount(request, minlength=len(self.nodes)))])
        sampler = {
            k: getattr(self.sampling, k) for k in ("temperature", "top_k", "top_p", "min_p", "max_new_tokens", "stop", "seed")
        }
        path = {node: node.path for node in dict.fromkeys(self.nodes)}
        return [
            self._trajectory(i, path[self.nodes[i]], token[a:b].tolist(), logprob[a:b].tolist(), sampler)
            for i, (a, b) in enumerate(zip(begin.tolist(), begin[1:].tolist()))
        ]

    def _trajectory(
        self, i: int, prompt: tuple[int, ...], ids: list[int], logprobs: list[float], sampler: Mapping[str, Any]
    ) -> Trajectory:
        item, sample = self.keys[i]
        finish = FINISH[self.finish[i]]
        text = cut(self.policy.decode(ids[:-1] if finish == "stop" else ids), self.sampling.stop)
        first, end = len(prompt), len(prompt) + len(ids)
        return Trajectory(
            id=f"{item}/{sample}",
            parent=self.nodes[i].id,
            tokens=prompt + tuple(ids),
            logprobs=tuple(logprobs),
            weights_version=self.engine.weights_version,
            sampler={**sampler, "item": item, "sample": sample},
            spans=(Span("prompt", 0, first), Span("completion", first, end)),
            finish=finish,
            text=text,
            cost=self._cost(i, first, len(ids)),
        )

    def _cost(self, i: int, first: int, drawn: int) -> Spend:
        """The first token comes from the node's hidden row, so the body sees one token less than the head."""
        if not drawn:
            return Spend()
        shape = self.engine.shape
        keys = {window: attended(first, drawn - 1, window) for window in set(shape.windows)}
        head = 2 * shape.vocabulary * shape.hidden
        body = 2 * (shape.body_parameters + shape.adapter_parameters)
        return Spend(
            sampled_tokens=drawn,
            useful_flops=decode_flops(shape, drawn - 1, keys) + head,
            executed_flops=body * (drawn - 1) + head * drawn + int(self.attention[i]),
        )
