"""What must be equal before any speed is worth a line: each check yields (what, error, limit).

On a GPU they say whether the CUDA paths are right; on a CPU the same checks hold the CPU's, and are a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tests.engines.chi_square import chi_square
from tests.engines.policies import Letters, prompts
from tests.forest.tiny import tiny
from torch import Tensor

from burnish.core.records import Sampling
from burnish.engines.local import plans
from burnish.engines.local.engine import LocalEngine
from burnish.engines.local.graphs import DecodeGraphs
from burnish.engines.local.sampling import draw, row_keys
from burnish.forest.attention import Dense, Forest
from burnish.forest.pack import Batch
from burnish.forest.stream import Layout, Tree, Unit
from burnish.maths.head import LogitMap, head_loss
from burnish.maths.logprobs import label_logprobs, nll, weighted_nll
from burnish.models.load import load_policy
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


# ---- the engine's ways to decode --------------------------------------------------------------------------------------


@contextmanager
def sharing(least: int) -> Iterator[None]:
    """Prefixes are shared from this many bytes a layer on, on any device."""
    kept = plans.SHARED_BYTES, plans.SHARED_BYTES_CUDA
    plans.SHARED_BYTES = plans.SHARED_BYTES_CUDA = least
    try:
        yield
    finally:
        plans.SHARED_BYTES, plans.SHARED_BYTES_CUDA = kept


def sampled(engine: LocalEngine, temperature: float) -> list[tuple[int, ...]]:
    """Four ragged prompts, three samples each, in five rows: rows split, end, and are replaced; slots grow."""
    nodes = engine.prefill_many(prompts(4))
    pairs = [(node, (i, s)) for i, node in enumerate(nodes) for s in range(3)]
    made = engine.sample([n for n, _ in pairs], Sampling(temperature=temperature, max_new_tokens=82, seed=1), [k for _, k in pairs])
    for node in nodes:
        engine.free(node)
    return [t.completion for t in made]


def differing(found: list[tuple[int, ...]], wanted: list[tuple[int, ...]]) -> float:
    """Share of rows that differ."""
    return sum(a != b for a, b in zip(found, wanted, strict=True)) / len(wanted)


def trunks_are_copies(device: torch.device) -> Found:
    """Share of rows drawn otherwise where prefixes are one block for all rows below them, float32."""
    for name in ("qwen3", "gemma3", "gpt_oss"):
        found = []
        for least in (0, 2**60):
            with sharing(least):
                engine = LocalEngine(policy_on(device, name), rows=5)
                engine.graphs = None
                found.append(sampled(engine, 1.0))
        yield name, differing(*found), 0.1  # a near tie may fall either way


class Again:
    """A capture for devices without graphs: it calls the step again on its static inputs."""

    def __call__(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        outputs = work()

        def replay() -> None:
            for x, y in zip(outputs, work()):
                x.copy_(y)

        return replay, outputs


def graphs_for(engine: LocalEngine, patience: int) -> DecodeGraphs:
    """Real ones on a GPU, else `Again`."""
    return DecodeGraphs(engine, None if engine.policy.device.type == "cuda" else Again, patience)


def graphs_are_eager(device: torch.device) -> Found:
    """Share of rows that captured steps draw otherwise than eager ones, float32; twice, so that graphs outlive a call."""
    with sharing(2**60):
        for name in ("qwen3", "gemma3", "gemma2"):
            for temperature in (0.0, 1.0):
                eager, captured = (LocalEngine(policy_on(device, name), rows=5) for _ in range(2))
                eager.graphs, captured.graphs = None, graphs_for(captured, 0)
                wrong = max(differing(sampled(captured, temperature), sampled(eager, temperature)) for _ in range(2))
                decided = captured.policy.decisions["graphs"]
                what = f"{name}, temperature {temperature}"
                if decided["value"] != "captured":  # right, but not what was to be checked
                    what, wrong = f"{what}: {decided['why']}", 1.0
                yield what, wrong, 0.1


def auto_is_the_gpu(device: torch.device) -> Found:
    """`device: auto` loads the bundled model onto the GPU where there is one, and it answers there what it answers here."""
    found = []
    for wanted in ("auto", "cpu"):
        if wanted == "auto" and device.type == "cpu":
            wanted = "cpu"
        policy = load_policy("spark", dtype="float32", device=wanted)
        engine = LocalEngine(policy)
        nodes = engine.prefill_many(prompts(6))
        made = engine.sample(nodes, Sampling(temperature=0.0, max_new_tokens=24), [(i, 0) for i in range(6)])
        found.append(([t.completion for t in made], policy.device.type))
    (there, where), (here, _) = found
    yield f"auto is {where}", float(where != device.type), 0.0
    yield "answers", differing(there, here), 0.2


CHECKS: dict[str, Callable[[torch.device], Found]] = {
    "forest": forest_is_dense,
    "head": head_is_whole_logits,
    "step": a_step_is_the_cpus,
    "sampler": samples_follow_the_distribution,
    "greedy": greedy_is_generate,
    "captured": captured_is_scored,
    "trunks": trunks_are_copies,
    "auto": auto_is_the_gpu,
    "graphs": graphs_are_eager,
}
