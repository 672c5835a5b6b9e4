"""What must be equal before any speed is worth a line: each check yields (what, error, limit).

On a GPU they say whether the CUDA paths are right; on a CPU the same checks hold the CPU's, and are a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from tests.engines.chi_square import chi_square
from tests.engines.policies import Letters, prompts
from tests.forest.tiny import tiny
from torch import Tensor

from burnish.core.records import Sampling
from burnish.engines.local import plans
from burnish.engines.local.engine import LocalEngine
from burnish.engines.local.graphs import Capture, Graphs, bucket, decode_step, no_keys, span_of
from burnish.engines.local.rollout import Rollout
from burnish.engines.local.sampling import draw, row_keys
from burnish.forest.attention import Dense, Forest
from burnish.forest.pack import Batch
from burnish.forest.stream import Layout, Tree, Unit
from burnish.maths.head import LogitMap, head_loss
from burnish.maths.logprobs import label_logprobs, nll, weighted_nll
from burnish.models.policy import Policy

Found = Iterator[tuple[str, float, float]]
LAYOUTS = {
    "rows": Layout((5, 90, 1, 33), (-1, -1, -1, -1)),
    "groups": Layout((60, 40, 7, 30, 80, 20), (-1, 0, 0, -1, 3, 3)),
    "deep": Layout((40, 30, 2, 60, 10, 50, 30, 8), (-1, 0, 1, 2, 2, 1, 0, -1)),
}
EXACT = {torch.float32: 2e-5, torch.bfloat16: 3e-2}  # relative norm


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def apart(x: Tensor, y: Tensor) -> float:
    """Relative distance of two tensors, in float64 on the host."""
    x, y = x.detach().cpu().double(), y.detach().cpu().double()
    return float((x - y).norm() / y.norm().clamp_min(1e-12))


def forest_is_dense(device: torch.device) -> Found:
    """Blocks or variable-length calls against one masked block in float64, with gradients and sinks."""
    for dtype in (torch.float32, torch.bfloat16):
        for name, layout in LAYOUTS.items():
            for window, sinks in ((None, False), (None, True), (25, False)):
                g = torch.Generator().manual_seed(1)
                sizes = ((4, layout.size, 64), (2, layout.size, 64), (2, layout.size, 64))
                given = [torch.randn(1, *s, generator=g).to(dtype) for s in sizes]
                given += [torch.randn(4, generator=g).to(dtype)] if sinks else []
                dout = torch.randn(1, 4, layout.size, 64, generator=g).to(dtype)
                found = []
                for plan, to in ((Forest(layout), {"device": device}), (Dense(layout), {"dtype": torch.float64})):
                    leaves: list[Tensor] = [x.detach().to(**to).requires_grad_() for x in given]
                    q, k, v, *s = leaves
                    out = plan(0, q, k, v, 0.125, window, None, s[0] if s else None)
                    out.backward(dout.to(**to))
                    found.append([out, *(x.grad for x in leaves)])
                error = max(apart(x, y) for x, y in zip(*found))
                yield f"{name}, window {window}{', sinks' if sinks else ''}, {name_of(dtype)}", error, EXACT[dtype]


def head_is_whole_logits(device: torch.device) -> Found:
    """Loss and gradients against logits that exist whole, in float64, for each kind of map, in chunks of 40 rows."""
    for dtype in (torch.float32, torch.bfloat16):
        for logit_map in (LogitMap(), LogitMap(scale=0.5, softcap=4.0, temperature=0.8)):
            g = torch.Generator().manual_seed(2)
            h, w = torch.randn(100, 48, generator=g).to(dtype), torch.randn(1003, 48, generator=g).to(dtype)
            label, weight = torch.randint(0, 1003, (100,), generator=g), torch.rand(100, generator=g)
            leaves = [x.to(device, copy=True).requires_grad_() for x in (h, w)]
            loss, logprobs = head_loss(*leaves, label.to(device), weighted_nll(weight), logit_map=logit_map, rows=40)
            loss.backward()
            exact = [x.double().requires_grad_() for x in (h, w)]
            want = label_logprobs(logit_map(exact[0] @ exact[1].T), label)
            whole = nll(want, weight.double())
            whole.backward()
            pairs = [(loss, whole), (logprobs, want), *((x.grad, y.grad) for x, y in zip(leaves, exact))]
            yield f"{logit_map}, {name_of(dtype)}", max(apart(x, y) for x, y in pairs), EXACT[dtype]  # type: ignore[arg-type]


def policy_on(device: torch.device, name: str) -> Policy:
    return Policy(tiny(name).to(device), Letters())  # type: ignore[arg-type]


def a_step_is_the_cpus(device: torch.device) -> Found:
    """Loss, log-probs and every gradient of tiny models in float32 against the same on the CPU."""
    trees = [
        Tree((tuple(range(5, 40)), (20, 21, 22), (23, 24)), (-1, 0, 0), (Unit(1, (30, 35, 36)), Unit(2, (35, 36)))),
        Tree.row(tuple(range(30, 60)), [False] * 4 + [True] * 26),
    ]
    (micro,) = Batch(trees).split(1000)
    for name in ("qwen3", "gemma3", "gemma2", "gpt_oss"):
        found = []
        for where in (device, torch.device("cpu")):
            p = policy_on(where, name)
            out = p(micro, weighted_nll(torch.ones(len(micro.items))))
            out.loss.backward()
            grads = torch.cat([x.grad.cpu().flatten() for x in p.parameters() if x.grad is not None])
            found.append([out.loss, out.logprobs, grads])
        yield name, max(apart(x, y) for x, y in zip(*found)), 1e-4


def greedy_is_generate(device: torch.device) -> Found:
    """Share of 12 ragged prompts on which greedy decoding and transformers' own differ, in float32."""
    for name in ("qwen3", "gemma3"):
        given = prompts(12)
        engine = LocalEngine(policy_on(device, name), rows=5)
        nodes = engine.prefill_many(given)
        made = engine.sample(nodes, Sampling(temperature=0.0, max_new_tokens=16), [(i, 0) for i in range(len(given))])
        model: Any = tiny(name).to(device)
        wrong = 0
        for ids, t in zip(given, made):
            row = torch.tensor([ids], device=device)
            with torch.no_grad():
                whole = model.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=16)
            wrong += whole[0, len(ids) :].tolist() != list(t.completion)
        yield name, wrong / len(given), 0.0


def captured_is_scored(device: torch.device) -> Found:
    """Log-probs kept while sampling against the trainer's forest pass over the same tokens, float32, nats."""
    for name in ("qwen3", "gemma3"):
        engine = LocalEngine(policy_on(device, name))
        nodes = engine.prefill_many(prompts(6))
        pairs = [(n, (i, s)) for i, n in enumerate(nodes) for s in range(3)]
        made = engine.sample([n for n, _ in pairs], Sampling(max_new_tokens=12), [k for _, k in pairs])
        scores = engine.score([engine.prefill(t.completion, n) for (n, _), t in zip(pairs, made)])
        worst = max(abs(a - b) for t, s in zip(made, scores) for a, b in zip(t.logprobs or (), s))
        yield name, worst, 1e-4


def samples_follow_the_distribution(device: torch.device) -> Found:
    """Chi-square as a share of its 99.9 % bound, one level (97 tokens) and two (5,000)."""
    for vocabulary, n in ((97, 20_000), (5000, 6_000)):
        g = torch.Generator().manual_seed(3)
        logits = 1.5 * torch.randn(vocabulary, generator=g)
        for sampling in (Sampling(), Sampling(temperature=0.7, top_k=20), Sampling(top_p=0.8)):
            keys = torch.from_numpy(row_keys(7, [(i, 0) for i in range(n)])).to(device)
            count = torch.zeros(vocabulary)
            for a in range(0, n, 2000):
                rows = logits.to(device).expand(2000, -1).clone()
                token, _ = draw(rows, sampling, keys[a : a + 2000], torch.full((2000,), 5, device=device))
                count += torch.bincount(token.cpu(), minlength=vocabulary)
            z = logits / sampling.temperature
            if sampling.top_k:
                z = z.masked_fill(z < z.topk(sampling.top_k).values[-1], -torch.inf)
            p = z.double().softmax(-1)
            if sampling.top_p < 1:
                order = p.argsort(descending=True)
                before = p[order].cumsum(0) - p[order]
                p[order[before >= sampling.top_p]] = 0
                p /= p.sum()
            what = f"{vocabulary} tokens, temperature {sampling.temperature}, k {sampling.top_k}, p {sampling.top_p}"
            yield what, chi_square(count, p), 1.0


# ---- decode in lockstep, captured -------------------------------------------------------------------------------------


class Again:
    """A capture for devices without graphs: it calls the step again on its static inputs."""

    def __call__(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        outputs = work()

        def replay() -> None:
            for x, y in zip(outputs, work()):
                x.copy_(y)

        return replay, outputs


def capture_for(device: torch.device) -> Capture | None:
    return None if device.type == "cuda" else Again()  # None: a real one


class Lockstep:
    """Rows that share nothing and end together, a captured step at a time: what a graph's replay takes and gives."""

    def __init__(self, engine: LocalEngine, given: list[tuple[int, ...]], sampling: Sampling) -> None:
        self.engine, self.sampling = engine, sampling
        nodes: list[Any] = engine.prefill_many(given)
        rows = len(given)
        longest = max(map(len, given)) + sampling.max_new_tokens
        with torch.inference_mode():
            self.rollout = Rollout(engine, nodes, sampling, [(i, 0) for i in range(rows)])
            engine.arena.reserve(bucket(rows) or rows, span_of(longest))
            self.rollout._admit([])
            self.token = self.rollout.token[:rows].clone()
            self.noise = torch.from_numpy(self.rollout.noise[self.rollout.live]).to(engine.policy.device)
        self.graphs: dict[int, Graphs] = {}

    def step(self) -> tuple[Tensor, Tensor]:
        """(tokens, log-probs) of every row, in slot order."""
        r, rows = self.rollout, len(self.token)
        span = span_of(int(r.length[:rows].max()))
        with torch.inference_mode():
            if span not in self.graphs:
                capture = capture_for(self.engine.policy.device)
                self.graphs[span] = Graphs(decode_step(self.engine, self.sampling, span), capture)
            position, length = (torch.from_numpy(np.ascontiguousarray(x[:rows])) for x in (r.position, r.length))
            inputs = {
                "token": self.token,
                "position": position.to(self.token.device),
                "length": length.to(self.token.device),
                "noise": self.noise,
            }
            made = self.graphs[span](0, inputs, most=self.engine.arena.rows, blank={"length": no_keys})
            self.token = made[0].clone()
        r.length[:rows] += 1
        r.position[:rows] += 1
        return self.token, made[1].clone()


def graphs_are_eager(device: torch.device) -> Found:
    """Share of tokens that captured steps draw otherwise than the engine, float32; greedy and sampled."""
    kept, plans.SHARED_BYTES = plans.SHARED_BYTES, 2**60
    try:
        for name in ("qwen3", "gemma3"):
            for temperature in (0.0, 1.0):
                model = tiny(name, eos_token_id=None)
                model.generation_config.eos_token_id = None  # type: ignore[union-attr]
                engine = LocalEngine(Policy(model.to(device), Letters(None)))  # type: ignore[arg-type]
                sampling = Sampling(temperature=temperature, max_new_tokens=20, seed=1)
                given = prompts(3)
                nodes = engine.prefill_many(given)
                want = {i: t.completion for i, t in enumerate(engine.sample(nodes, sampling, [(i, 0) for i in range(3)]))}
                run = Lockstep(engine, given, sampling)
                made = [run.token, *(run.step()[0] for _ in range(19))]
                got = torch.stack(made, 1).tolist()
                live = run.rollout.live.tolist()
                wrong = sum(a != b for row, i in zip(got, live) for a, b in zip(row, want[i]))
                refused = [why for g in run.graphs.values() for why in g.refused.values()]
                what = f"{name}, temperature {temperature}" + (f" (not captured: {refused[0]})" if refused else "")
                yield what, wrong / (3 * 20), 0.02
    finally:
        plans.SHARED_BYTES = kept


CHECKS: dict[str, Callable[[torch.device], Found]] = {
    "forest": forest_is_dense,
    "head": head_is_whole_logits,
    "step": a_step_is_the_cpus,
    "greedy": greedy_is_generate,
    "captured": captured_is_scored,
    "sampler": samples_follow_the_distribution,
    "graphs": graphs_are_eager,
}
