"""The GPU suite in under nine minutes: equality first, then GPU1-GPU4. `bash benchmarks/gpu.sh [--dry] [--only a,b]`.

Needs torch, transformers and peft; no network: models are random, built from configurations of known sizes. Each item
runs in a process of its own within its budget of seconds, prints one JSON line a figure, and takes no other with it when
it fails. `--dry` runs all of it, tiny, on a CPU, in one process. With $OUT set, or on a GPU, what was measured is also
written under benchmarks/results (under $OUT): gpu-<item>.json line by line, and after each item DATE-<id>.json, which
`python -m benchmarks report` reads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script

from benchmarks.protocol import versions
from benchmarks.report import store
from benchmarks.suite import GPU

if TYPE_CHECKING:
    import torch

    from burnish.models.policy import Policy
    from burnish.train.optim import Optimiser

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 530
Line = dict[str, Any]
# width, layers, query heads, key-value heads, head width, feed-forward width, vocabulary, tied (Qwen3's own sizes)
SIZES = {
    "0.6b": (1024, 28, 16, 8, 128, 3072, 151936, True),
    "1.7b": (2048, 28, 16, 8, 128, 6144, 151936, True),
    "8b": (4096, 36, 32, 8, 128, 12288, 151936, False),
    "8b-8-layers": (4096, 8, 32, 8, 128, 12288, 151936, False),
    "tiny": (64, 2, 4, 2, 16, 128, 503, True),
}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, data sheet
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.0e12}


@dataclass(frozen=True)
class Item:
    """What one process measures for which id of the report, and the seconds it may take, imports and set-up included."""

    id: str
    seconds: int
    run: Callable[[Setting], Iterator[Line]]


@dataclass(frozen=True)
class Setting:
    device: torch.device
    dry: bool

    def size(self, name: str) -> str:
        return "tiny" if self.dry else name

    def wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def per(self, table: dict[str, float]) -> float | None:
        """The data sheet's figure for this device, or None."""
        import torch

        name = torch.cuda.get_device_name() if self.device.type == "cuda" else ""
        return next((value for key, value in table.items() if key in name), None)

    def timed(self, work: Callable[[], object], repeats: int, warm: int = 1) -> list[float]:
        """Seconds of each repeat after `warm` that are not counted."""
        seconds: list[float] = []
        for i in range(warm + repeats):
            self.wait()
            begin = time.perf_counter()
            work()
            self.wait()
            if i >= warm:
                seconds.append(time.perf_counter() - begin)
        return seconds

    def peak_bytes(self) -> int | None:
        import torch

        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def share(value: float, of: float | None) -> float | None:
    return None if of is None else round(value / of, 4)


# ---- models -------------------------------------------------------------------------------------------------------------


class NoWords:
    """Random models have no tokenizer."""

    eos_token_id = None

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))


def random_policy(setting: Setting, name: str) -> Policy:
    """Qwen3's architecture at a size, random weights made on the device, bf16 (dry: float32)."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from burnish.models.policy import Policy

    width, layers, heads, kv_heads, head_dim, inner, vocabulary, tied = SIZES[setting.size(name)]
    config = Qwen3Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        intermediate_size=inner, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=32768,
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(setting.device):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if setting.dry else torch.bfloat16, attn_implementation="sdpa"
        )
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
    return Policy(model.to(setting.device).eval(), NoWords())


def about(policy: Policy) -> Line:
    return {k: v["value"] for k, v in policy.decisions.items()} | {"parameters": policy.shape.parameters}


def random_rows(setting: Setting, tokens: int, longest: int, vocabulary: int, seed: int) -> list[Any]:
    """Rows of log-normal lengths (median 600, sigma 0.8) that fill `tokens`; the first half of each is prompt."""
    import numpy as np

    from burnish.core.records import Rendered

    draw, rows, left = np.random.default_rng(seed), [], tokens
    while left > 16:
        n = min(left, longest, max(16, int(draw.lognormal(np.log(min(600, longest // 2)), 0.8))))
        ids = tuple(draw.integers(3, vocabulary, n).tolist())
        rows.append(Rendered(ids, tuple(i >= n // 2 for i in range(n)), f"row {len(rows)}"))
        left -= n
    return rows


# ---- equality -----------------------------------------------------------------------------------------------------------


def equality(*names: str) -> Callable[[Setting], Iterator[Line]]:
    """These checks of gpu_checks, and which of the kernels they ran on. What breaks the device ends a process: so several."""

    def run(setting: Setting) -> Iterator[Line]:
        from benchmarks.gpu_checks import CHECKS

        if setting.device.type == "cuda" and "head" in names:
            yield from kernels(setting)
        for name in names:
            begin = time.perf_counter()
            try:
                found = list(CHECKS[name](setting.device))
                setting.wait()
                bad = [(what, error, limit) for what, error, limit in found if not error <= limit]
                line: Line = {"ok": not bad, "checks": len(found), "failed": bad, "worst": max(error for _, error, _ in found)}
            except Exception as error:  # one check must not cost the others
                line = {"ok": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
            yield {"figure": f"equality of {name}", **line, "seconds": round(time.perf_counter() - begin, 1)}

    return run


def kernels(setting: Setting) -> Iterator[Line]:
    """Which of the GPU's kernels are in use; None: it is."""
    import torch

    from burnish.forest import cuda
    from burnish.maths import tiles_cuda

    for width in (64, 128):
        yield {"figure": f"flash, head width {width}", "why_not": cuda.why_not(torch.bfloat16, width, setting.device.index)}
    for dtype in (torch.bfloat16, torch.float32):
        yield {"figure": f"tile kernel, {dtype}", "why_not": tiles_cuda.why_not(dtype, setting.device)}


# ---- GPU1: supervised fine-tuning ---------------------------------------------------------------------------------------


def sft(name: str, adapter: bool, tokens: int) -> Callable[[Setting], Iterator[Line]]:
    """Optimiser steps of the training loop itself over packed rows of up to 4,096 tokens."""

    def run(setting: Setting) -> Iterator[Line]:
        from burnish.methods.supervised import Supervised
        from burnish.models.adapters import lora
        from burnish.train.loop import State, one_step
        from burnish.train.memory import Memory
        from burnish.train.optim import Optimiser
        from burnish.train.schedules import constant

        policy = random_policy(setting, name)
        policy.requires_grad_(not adapter)
        if adapter:
            policy = lora(policy, rank=16)
        settings = SimpleNamespace(learning_rate=1e-5, max_skipped_steps=0)
        method = Supervised(None, (), None, 10**6, "token_mean")  # type: ignore[arg-type]
        optimiser, state = Optimiser(policy, learning_rate=1e-5), State()
        budget, longest = (400, 64) if setting.dry else (tokens, 4096)
        micro_tokens = min(budget, _micro_tokens(setting, policy, moments=optimiser))
        memory = Memory.fixed(micro_tokens)
        batches = [method.work(random_rows(setting, budget, longest, policy.shape.vocabulary, seed)) for seed in range(3)]
        taken = iter(range(100))

        def step() -> None:
            work = batches[next(taken) % len(batches)]
            row = one_step(policy, method, optimiser, settings, constant, memory, state, work, policy.shape)  # type: ignore[arg-type]
            assert row["loss"] is not None, "the loss is not finite"

        step()
        before = dict(state.ledger.counted["train"])
        seconds = setting.timed(step, 1 if setting.dry else 4, warm=0)
        spent = {k: v - before[k] for k, v in state.ledger.counted["train"].items()}
        took = sum(seconds)
        yield {
            "figure": f"GPU1 SFT {'LoRA' if adapter else 'full'} {setting.size(name)}",
            "tokens_per_s": round(spent["stream_tokens"] / took),
            "mfu": share(spent["useful_flops"] / took, setting.per(PEAKS)),
            "executed_flops_per_s": spent["executed_flops"] / took,
            "micro_tokens": micro_tokens,
            "tokens_per_step": spent["stream_tokens"] // len(seconds),
            "step_s": [round(s, 4) for s in seconds],
            "peak_bytes": setting.peak_bytes(),
            **about(policy),
        }

    return run


def _micro_tokens(setting: Setting, policy: Policy, *, moments: Optimiser) -> int:
    """What half the free memory, less the moments to come, holds of activations: in bf16 about 3 bytes for each of 16
    hidden and 4 inner numbers a layer."""
    import torch

    if setting.device.type != "cuda":
        return 200
    shape = policy.shape
    per_token = 3 * shape.layers * (16 * shape.hidden + 4 * policy.config.intermediate_size)
    free = torch.cuda.mem_get_info()[0] - 8 * sum(m.gradient.numel() for m in moments.masters.values())
    return max(1024, int(0.5 * free / per_token) // 256 * 256)


# ---- GPU2: a group-relative step ----------------------------------------------------------------------------------------


def grpo(name: str) -> Callable[[Setting], Iterator[Line]]:
    """8 prompts of 256 tokens x 16 samples of 256: rollout, then one policy-gradient step over the groups as trees."""
    return lambda setting: _grpo(setting, name)


def _grpo(setting: Setting, name: str) -> Iterator[Line]:
    import torch

    from burnish.core.records import Sampling
    from burnish.engines.local.engine import LocalEngine
    from burnish.forest.pack import Batch
    from burnish.forest.stream import Tree, Unit
    from burnish.maths.logprobs import weighted_nll
    from burnish.train.optim import Optimiser

    prompts, group, given, new = (2, 2, 12, 6) if setting.dry else (8, 16, 256, 256)
    policy = random_policy(setting, name)
    optimiser = Optimiser(policy, learning_rate=1e-6)
    engine = LocalEngine(policy, rows=prompts * group)
    draw = torch.Generator().manual_seed(1)
    vocabulary = policy.shape.vocabulary
    asked = [tuple(torch.randint(3, vocabulary, (given,), generator=draw).tolist()) for _ in range(prompts)]
    keys = [(i, s) for i in range(prompts) for s in range(group)]
    micro_tokens = _micro_tokens(setting, policy, moments=optimiser)
    rolled = trained = 0.0
    made: list[Any] = []
    trees: list[Tree] = []
    for turn in range(2):  # the second is warm
        setting.wait()
        begin = time.perf_counter()
        nodes = engine.prefill_many(asked)
        made = engine.sample([nodes[i] for i, _ in keys], Sampling(max_new_tokens=new, seed=turn), keys)
        for node in nodes:
            engine.free(node)
        setting.wait()
        rolled = time.perf_counter() - begin
        begin = time.perf_counter()
        trees = []
        for i in range(prompts):
            children = [t.completion for t, (item, _) in zip(made, keys) if item == i]
            units = [Unit(j + 1, tuple(range(given, given + len(c)))) for j, c in enumerate(children)]
            trees.append(Tree((asked[i], *children), (-1, *(0 for _ in children)), tuple(units)))
        batch = Batch(trees)
        advantage = torch.randn(prompts * group, generator=draw)
        weight = advantage[batch.unit] / batch.entries
        policy.train()
        optimiser.zero()
        for micro in batch.split(micro_tokens):
            policy(micro, weighted_nll(weight[micro.items])).loss.backward()
        optimiser.step(1e-6, optimiser.gradient_norm())
        setting.wait()
        trained = time.perf_counter() - begin
    sampled = sum(t.cost.sampled_tokens for t in made)
    yield {
        "figure": f"GPU2 group-relative step {setting.size(name)}",
        "samples_per_s": round(prompts * group / (rolled + trained), 3),
        "rollout_s": round(rolled, 4),
        "train_s": round(trained, 4),
        "rollout_tokens_per_s": round(sampled / rolled),
        "stream_tokens": sum(tree.size for tree in trees),
        "peak_bytes": setting.peak_bytes(),
        **about(policy),
    }


# ---- GPU3: decode -------------------------------------------------------------------------------------------------------


def decode(name: str, rows: tuple[int, ...], new_tokens: int) -> Callable[[Setting], Iterator[Line]]:
    """Tokens per second of independent rows through the engine, its steps captured and its steps eager."""

    def run(setting: Setting) -> Iterator[Line]:
        policy = random_policy(setting, name)
        for batch in (1, 3) if setting.dry else rows:
            line: Line = {"figure": f"GPU3 decode {setting.size(name)}, {batch} rows"}
            try:
                line |= _decode(setting, policy, batch, 8 if setting.dry else new_tokens)
            except Exception as error:  # the other row counts stand without it
                line["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            yield line | {"ok": "error" not in line, "peak_bytes": setting.peak_bytes(), **about(policy)}

    return run


def _decode(setting: Setting, policy: Policy, batch: int, new: int) -> Line:
    import torch

    from benchmarks.gpu_checks import graphs_for
    from burnish.core.records import Sampling
    from burnish.engines.local.engine import LocalEngine

    draw, vocabulary = torch.Generator().manual_seed(1), policy.shape.vocabulary
    given = [tuple(torch.randint(3, vocabulary, (16,), generator=draw).tolist()) for _ in range(batch)]
    found: Line = {}
    for how in ("eager", "captured"):
        engine = LocalEngine(policy, rows=batch)
        engine.graphs = graphs_for(engine, 0) if how == "captured" else None

        def sample(engine: LocalEngine = engine) -> None:
            nodes = engine.prefill_many(given)
            engine.sample(nodes, Sampling(max_new_tokens=new), [(i, 0) for i in range(batch)])
            for node in nodes:
                engine.free(node)

        seconds = min(setting.timed(sample, 1 if setting.dry else 2))
        found[f"{how}_tokens_per_s"] = round(batch * new / seconds)
        found[f"{how}_step_ms"] = round(1e3 * seconds / new, 3)  # the prompts' share of it is one step's
        weights = policy.shape.parameters * policy.dtype.itemsize
        found[f"{how}_of_bandwidth"] = share(weights * new / seconds, setting.per(BANDWIDTH))
        if engine.graphs is not None and not engine.graphs.on:
            found["refused"] = policy.decisions["graphs"]["why"]
        engine.arena.release()
    return found


# ---- GPU4: the head -----------------------------------------------------------------------------------------------------


def head(setting: Setting) -> Iterator[Line]:
    """16,384 rows x 248,320 tokens x 2,048, bf16: loss, gradients of rows and weight, and the pass over one chunk alone."""
    import torch

    from burnish.maths import tiles_cuda
    from burnish.maths.head import head_flops, head_loss
    from burnish.maths.logprobs import weighted_nll

    n, v, h = (64, 501, 32) if setting.dry else (16_384, 248_320, 2_048)
    dtype, device = (torch.float32 if setting.dry else torch.bfloat16), setting.device
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, h, generator=g, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(v, h, generator=g, device=device, dtype=dtype) * h**-0.5).requires_grad_()
    label = torch.randint(0, v, (n,), generator=g, device=device)
    ones = torch.ones(n, device=device)
    for trained in (True, False):
        weight.requires_grad_(trained)

        def step() -> None:
            hidden.grad = weight.grad = None
            head_loss(hidden, weight, label, weighted_nll(ones))[0].backward()

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = setting.timed(step, 2 if setting.dry else 5)
        flops = head_flops(n, v, h, weight_trained=trained, backward=True)
        yield {
            "figure": f"GPU4 head {n} x {v} x {h}, {'full' if trained else 'frozen'}",
            "ms": round(1e3 * median(seconds), 2),
            "all_ms": [round(1e3 * s, 2) for s in seconds],
            "mfu": share(flops / median(seconds), setting.per(PEAKS)),
            "peak_bytes": setting.peak_bytes(),
        }
    z = torch.randn(min(n, 528), v, generator=g, device=device, dtype=dtype)
    if tiles_cuda.why_not(dtype, device) is None:
        seconds = setting.timed(lambda: tiles_cuda.overwrite_exp(z, 1.0, None, 1.0, True), 10, warm=3)
        moved = 3 * z.numel() * z.element_size()
        rate = moved / median(seconds)
        yield {
            "figure": f"GPU4 tile kernel, {len(z)} x {v}",
            "ms": round(1e3 * median(seconds), 3),
            "bytes_per_s": rate,
            "of_bandwidth": share(rate, setting.per(BANDWIDTH)),
        }
    if not setting.dry:
        a = torch.randn(8192, 8192, device=device, dtype=dtype)
        seconds = setting.timed(lambda: a @ a, 10, warm=3)
        yield {"figure": "product 8192^3", "flops_per_s": 2 * 8192**3 / min(seconds)}


ITEMS: dict[str, Item] = {
    "equality": Item("GPU0", 55, equality("forest", "head", "step", "sampler")),
    "equality-engine": Item("GPU0", 45, equality("greedy", "captured", "trunks", "auto")),
    "equality-graphs": Item("GPU0", 35, equality("graphs")),
    "head": Item("GPU4", 40, head),
    "sft-0.6b": Item("GPU1", 40, sft("0.6b", False, 32_768)),
    "decode-0.6b": Item("GPU3", 55, decode("0.6b", (1, 8, 64, 256, 512), 64)),
    "grpo-0.6b": Item("GPU2", 50, grpo("0.6b")),
    "sft-8b-lora": Item("GPU1", 55, sft("8b", True, 16_384)),
    "decode-8b": Item("GPU3", 45, decode("8b", (1, 64, 256), 32)),
    "sft-0.6b-lora": Item("GPU1", 30, sft("0.6b", True, 32_768)),
    "grpo-1.7b": Item("GPU2", 45, grpo("1.7b")),
    "sft-8b-8-layers": Item("GPU1", 35, sft("8b-8-layers", False, 16_384)),
}
"""An 8B model's full fine-tuning needs 18 bytes a parameter, 147 GB: eight of its 36 layers stand for it."""


# ---- running ------------------------------------------------------------------------------------------------------------


def run_item(name: str, item: Item, setting: Setting, folder: Path | None, facts: Line | None = None) -> bool:
    """One item in this process: its lines printed and kept, an error a line of its own. -> whether it went through."""
    lines: list[Line] = [] if facts is None else [{"item": name} | facts]

    def keep(line: Line) -> None:
        lines.append({"item": name} | line)
        print(json.dumps(lines[-1]), flush=True)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"gpu-{name}.json").write_text(json.dumps(lines, indent=1) + "\n")

    begin = time.perf_counter()
    try:
        for line in item.run(setting):
            keep(line)
        done = all(line.get("ok", True) for line in lines)
    except Exception as error:  # reported like a figure, so that the others still run
        keep({"figure": "error", "error": f"{type(error).__name__}: {str(error)[:500]}"})
        done = False
    keep({"figure": "seconds", "seconds": round(time.perf_counter() - begin, 1), "budget_s": item.seconds})
    return done


def setting_of(dry: bool) -> tuple[Setting, Line]:
    import torch

    cuda = torch.cuda.is_available() and not dry
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    facts: Line = {"figure": "device", "device": torch.cuda.get_device_name() if cuda else "cpu", "dry": dry, "python": platform.python_version()}
    return Setting(device, dry), facts | versions("torch", "triton", "transformers", "peft")


def results(dry: bool) -> Path | None:
    out = os.environ.get("OUT")
    if out:
        return Path(out) / "benchmarks" / "results"
    return None if dry else ROOT / "benchmarks" / "results"


def collect(folder: Path, names: Sequence[str], title: str, id: str, command: str) -> None:
    """DATE-<id>.json, as the report reads it, of what the items of one id have written so far."""
    lines: list[Line] = []
    for name in names:
        path = folder / f"gpu-{name}.json"
        if ITEMS[name].id == id and path.exists():
            lines += json.loads(path.read_text(encoding="utf-8"))
    facts = [line for line in lines if line["figure"] == "device"]
    if not facts:
        return
    errors = [f"{line['item']}: {line['error']}" for line in lines if "error" in line]
    result = {
        "schema": 1, "id": id, "title": title, "date": time.strftime("%Y-%m-%d"), "command": command, "dry": facts[0]["dry"],
        "environment": {k: v for k, v in facts[0].items() if k not in ("item", "figure", "dry")},
        "seconds": sum(line["seconds"] for line in lines if line["figure"] == "seconds"), "error": errors[0] if errors else None,
        "cases": [line for line in lines if line["figure"] not in ("device", "seconds", "error")],
    }  # fmt: skip
    store(result, folder)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="The GPU suite.")
    parser.add_argument("--dry", action="store_true", help="everything tiny, on the CPU, in one process")
    parser.add_argument("--only", default=",".join(ITEMS), help=f"items, of {', '.join(ITEMS)}")
    parser.add_argument("--here", action="store_true", help="in this process (what the suite calls itself with)")
    given = parser.parse_args(arguments)
    names = given.only.split(",")
    if odd := [n for n in names if n not in ITEMS]:
        parser.error(f"no item {', '.join(odd)}; there are {', '.join(ITEMS)}")
    folder = results(given.dry)
    words = ["bash benchmarks/gpu.sh", *(["--dry"] if given.dry else []), *([f"--only {given.only}"] if names != list(ITEMS) else [])]

    def after(name: str) -> None:
        """What is there so far, for the report: also where the suite is cut off later."""
        if folder is not None:
            collect(folder, names, GPU[ITEMS[name].id], ITEMS[name].id, " ".join(words))

    if not given.here and folder is not None:
        for name in names:  # an earlier run's lines are not this one's
            (folder / f"gpu-{name}.json").unlink(missing_ok=True)
    if given.dry or given.here:
        setting, facts = setting_of(given.dry)
        if not given.dry and setting.device.type != "cuda":
            print(json.dumps({"item": names[0], "figure": "error", "error": "torch sees no CUDA device; try --dry"}))
            return 4
        print(json.dumps(facts), flush=True)
        done: list[bool] = []
        for name in names:
            done.append(run_item(name, ITEMS[name], setting, folder, facts))
            if not given.here:
                after(name)
        return 0 if all(done) else 1
    begin, codes = time.monotonic(), {}
    for name in names:
        left = DEADLINE_S - (time.monotonic() - begin)
        budget = min(ITEMS[name].seconds, left)
        if budget < 10:
            codes[name] = "no time left"
            continue
        line = [sys.executable, str(Path(__file__)), "--here", "--only", name]
        try:
            codes[name] = subprocess.run(line, timeout=budget).returncode
        except subprocess.TimeoutExpired:
            codes[name] = f"over its {budget:.0f} s"
        after(name)
    print(json.dumps({"figure": "items", "codes": codes, "seconds": round(time.monotonic() - begin, 1)}), flush=True)
    return 0 if all(code == 0 for code in codes.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
