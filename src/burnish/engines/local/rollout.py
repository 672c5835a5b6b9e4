"""One call of `sample`: rows come and go, a token a step for every row that runs.

Rows run in slots 0..n-1: a finished row leaves at once and a waiting one takes its slot; when nobody waits, the last rows
move into the holes, so that a step computes running rows only. Row bookkeeping is a few numpy arrays; tokens are drawn,
checked and logged a step at a time, and become Python objects once, at the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from burnish.core.errors import DivergedError
from burnish.core.ledger import attended, decode_flops
from burnish.core.records import Finish, Sampling, Span, Spend, Trajectory
from burnish.engines.base import Node, cut
from burnish.engines.local.arena import KEYS_STEP, LocalNode, place_of
from burnish.engines.local.plans import Decode, Shared, trunk_of
from burnish.engines.local.sampling import draw, row_keys

if TYPE_CHECKING:
    from burnish.engines.local.engine import LocalEngine

LOGITS_BYTES = 64 * 2**20  # of one chunk of rows
FINISH: tuple[Finish, ...] = ("stop", "length", "stop_string")
STOP, LENGTH, STOP_STRING = range(3)
NO_TOKENS = np.zeros(0, np.int64)


class Rollout:
    """One call of `sample`: the queue, the running rows, and the log of what was drawn."""

    def __init__(
        self, engine: LocalEngine, nodes: Sequence[LocalNode], sampling: Sampling, keys: Sequence[tuple[int, int]]
    ) -> None:
        self.engine, self.policy, self.sampling, self.keys, self.nodes = engine, engine.policy, sampling, keys, nodes
        self.device = engine.policy.device
        self.arena = engine.arena
        self.weight, self.bias = engine.policy.head_weight(), engine.policy.head_bias()
        place = {node: i for i, node in enumerate(dict.fromkeys(nodes))}
        self.queue = deque(sorted(range(len(nodes)), key=lambda i: place[nodes[i]]))  # rows of one node side by side
        self.ends = torch.zeros(engine.shape.vocabulary, dtype=torch.bool, device=self.device)
        self.ends[[i for i in engine.end_ids if 0 <= i < engine.shape.vocabulary]] = True

        below: dict[Node, int] = {}
        for node in nodes:
            for above in node.chain:
                below[above] = min(below.get(above, 0) + 1, engine.rows)
        depth = {node: trunk_of(node.chain, below, engine.bytes_per_token, spared=1) for node in place}
        self.trunk = {node: cast("list[LocalNode]", node.chain[:d]) for node, d in depth.items()}
        self.own = {node: cast("list[LocalNode]", node.chain[d:]) for node, d in depth.items()}
        longest = max(sum(len(x.ids) for x in own) for own in self.own.values())
        # slots begin with room for a short answer and double: most rows end long before their limit
        self.arena.release()
        size = -(-(longest + min(sampling.max_new_tokens, 64)) // KEYS_STEP) * KEYS_STEP
        self.capacity = max(1, min(len(nodes), engine.rows, engine.tokens_held // size))
        self.arena.reserve(self.capacity, size)

        self.n = 0
        self.request = np.zeros(self.capacity, np.int64)
        self.length = np.zeros(self.capacity, np.int64)  # keys in the slot
        self.position = np.zeros(self.capacity, np.int64)  # of the token in hand, which the body has not seen
        self.limit = np.zeros(self.capacity, np.int64)  # position after the last token allowed
        self.noise = np.zeros(self.capacity, np.int64)
        self.token = torch.zeros(self.capacity, dtype=torch.int64, device=self.device)
        self.all_noise = row_keys(sampling.seed, keys)
        self.plan = Decode(self.arena, self.device)
        self.shared: list[tuple[LocalNode, np.ndarray]] | None = None
        self.log: list[tuple[np.ndarray, Tensor, Tensor]] = []
        self.finish = np.full(len(nodes), -1, np.int64)
        self.attention = np.zeros(len(nodes), np.int64)
        self.tails: dict[int, list[int]] = {}
        self.tail = max((len(s.encode()) for s in sampling.stop), default=0) + 8

    def run(self) -> None:
        """Until the queue and the slots are empty."""
        self.n = self.capacity
        self._replace(list(range(self.capacity)))
        while self.n:
            if self.engine.poll is not None:
                self.engine.poll()
            n = self.n
            self.plan.begin(self.length[:n], self.position[:n], self._shared())
            hidden = self.engine.body(self.token[:n], self._there(self.position[:n]), self.plan)
            self.attention[self.request[:n]] += self.plan.flops_of
            self.length[:n] += 1
            self.position[:n] += 1
            if ended := self._draw(None, hidden):
                self._replace(ended)
            elif self.n and int(self.length[: self.n].max()) >= self.arena.size:
                self._widen()

    def _there(self, x: np.ndarray) -> Tensor:
        # a copy: on the CPU from_numpy would share memory with bookkeeping that moves on
        return torch.tensor(x, device=self.device)

    # ---- rows come and go

    def _replace(self, holes: list[int]) -> None:
        """Give the slots of finished rows to waiting ones; close what holes remain."""
        while holes and self.queue:
            take = min(len(holes), len(self.queue), self._room() - (self.n - len(holes)))
            if take < 1:
                break
            slots, holes = holes[:take], holes[take:]
            holes += self._admit(np.array(slots))
        if holes:
            self._close(holes)
        self.shared = None
        if self.n and int(self.length[: self.n].max()) >= self.arena.size:
            self._widen()

    def _room(self) -> int:
        """Rows that may run at once: fewer, once slots have grown long."""
        return min(self.capacity, self.arena.rows, max(1, self.engine.tokens_held // self.arena.size))

    def _admit(self, slots: np.ndarray) -> list[int]:
        """Seat as many waiting rows, draw their first tokens from their nodes; -> slots whose row ended with it."""
        requests = np.array([self.queue.popleft() for _ in slots])
        nodes = [self.nodes[r] for r in requests]
        if any(x.at is None for node in dict.fromkeys(nodes) for x in node.chain):
            self._read_ahead(nodes)
        own = {node: np.concatenate([NO_TOKENS, *map(place_of, self.own[node])]) for node in dict.fromkeys(nodes)}
        longest = max(len(x) for x in own.values())
        padded = {node: np.pad(x, (0, longest - len(x)), mode="edge") for node, x in own.items() if len(x)}
        blank = np.zeros(longest, np.int64)
        if longest:
            self.arena.seat(self._there(slots), self._there(np.stack([padded.get(node, blank) for node in nodes])))
        self.request[slots] = requests
        self.length[slots] = [len(own[node]) for node in nodes]
        self.position[slots] = [node.end for node in nodes]
        self.limit[slots] = np.minimum(self.position[slots] + self.sampling.max_new_tokens, self.policy.context)
        self.noise[slots] = self.all_noise[requests]
        return self._draw(slots, torch.stack([cast(Tensor, node.hidden) for node in nodes]))

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
        running = {x for r in self.request[: self.n] for x in self.trunk[self.nodes[r]]}
        self.engine.read(list(ahead), running)

    def _close(self, holes: list[int]) -> None:
        """Move the last running rows into the holes, so that rows 0..n-1 are the running ones."""
        gone = set(holes)
        n = self.n - len(gone)
        source = [i for i in range(n, self.n) if i not in gone]
        if source:
            target = [i for i in sorted(gone) if i < n]
            for x in (self.request, self.length, self.position, self.limit, self.noise):
                x[target] = x[source]
            to, away = self._there(np.array(target)), self._there(np.array(source))
            self.token[to] = self.token[away]
            size = -(-int(self.length[target].max()) // KEYS_STEP) * KEYS_STEP
            self.arena.move(away, to, min(size, self.arena.size))
        self.n = n

    def _widen(self) -> None:
        size = int(self.length[: self.n].max()) + 1
        rows = max(self.n, min(self.capacity, self.engine.tokens_held // (2 * self.arena.size)))
        self.arena.reserve(rows, size, running=self.n)

    def _shared(self) -> list[Shared]:
        """Trunk nodes with the rows below them. Members change when rows come, go or move; positions every step."""
        if self.shared is None:
            members: dict[LocalNode, list[int]] = {}
            for slot, r in enumerate(self.request[: self.n].tolist()):
                for node in self.trunk[self.nodes[r]]:
                    members.setdefault(node, []).append(slot)
            self.shared = [(node, np.array(slots)) for node, slots in members.items()]
            self.shared_rows = [None if len(m) == self.n else self._there(m) for _, m in self.shared]
        return [
            Shared(cast(int, node.at), node, members, rows, self.position[members])
            for (node, members), rows in zip(self.shared, self.shared_rows)
        ]

    # ---- tokens

    def _draw(self, slots: np.ndarray | None, hidden: Tensor) -> list[int]:
        """Draw a token for each of these slots (None: all) from hidden [m, H], log it; -> slots whose row it ends."""
        into = slice(0, self.n) if slots is None else self._there(slots)
        slots = np.arange(self.n) if slots is None else slots
        position = self._there(self.position[slots])
        noise = self._there(self.noise[slots])
        step = max(1, LOGITS_BYTES // (hidden.element_size() * self.engine.shape.vocabulary))
        logit_map = self.policy.logit_map
        parts = [
            draw(
                self._head(hidden[a : a + step]), self.sampling, noise[a : a + step], position[a : a + step], logit_map
            )
            for a in range(0, len(hidden), step)
        ]
        token, logprob = torch.cat([t for t, _ in parts]), torch.cat([x for _, x in parts])
        stopped = self.ends[token].cpu().numpy()
        if not bool(torch.isfinite(logprob).all()):
            raise DivergedError(
                "the model's logits are not finite", where="sample", remedy="these weights cannot be sampled from"
            )
        self.token[into] = token
        requests = self.request[slots].copy()
        self.log.append((requests, token, logprob))
        code = np.where(stopped, STOP, np.where(self.position[slots] + 1 >= self.limit[slots], LENGTH, -1))
        if self.sampling.stop:
            for i, (r, t) in enumerate(zip(requests.tolist(), token.tolist())):
                tail = self.tails.setdefault(r, [])
                tail.append(t)
                if code[i] != STOP:
                    text = self.policy.decode(tail[-self.tail :], keep_special=True)
                    if any(s in text for s in self.sampling.stop):
                        code[i] = STOP_STRING
        ended = np.flatnonzero(code >= 0)
        self.finish[requests[ended]] = code[ended]
        return slots[ended].tolist()

    def _head(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, self.weight, self.bias)

    # ---- the end

    def trajectories(self) -> list[Trajectory]:
        """In the order of the requests."""
        request = np.concatenate([r for r, _, _ in self.log])
        order = np.argsort(request, kind="stable")
        token = torch.cat([t for _, t, _ in self.log]).cpu().numpy()[order]
        logprob = torch.cat([x for _, _, x in self.log]).float().cpu().numpy()[order]
        begin = np.concatenate([[0], np.cumsum(np.bincount(request, minlength=len(self.nodes)))])
        sampler = {
            k: getattr(self.sampling, k) for k in ("temperature", "top_k", "top_p", "max_new_tokens", "stop", "seed")
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
        shape = self.engine.shape
        keys = {window: attended(first, drawn - 1, window) for window in set(shape.windows)}
        head = 2 * shape.vocabulary * shape.hidden
        body = 2 * (shape.body_parameters + shape.adapter_parameters)
        return Spend(
            sampled_tokens=drawn,
            useful_flops=decode_flops(shape, drawn - 1, keys) + head,
            executed_flops=body * (drawn - 1) + head * drawn + int(self.attention[i]),
        )
