"""burnish's rollouts: `LocalEngine`, prefill and sample, as a run's sampling does it.

    {"do": "prepare", "model": FOLDER, "threads": 2} -> "probe_logprob" of the first prompt's tokens, by `engine.score`
    {"do": "step", "prompts": [[...]], "lengths": [...]} -> {"seconds": S, "lengths": [...], "prefill_tokens": N, FLOPs}

Every sample is to end at its own length: the limit that `max_new_tokens` sets for all samples of a call is set for each,
and no token ends one. Nothing else of the engine is touched. The engine lives as long as the child, as it does in a run;
its nodes are freed after every step, so that every step reads its prompts.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import Any

from benchmarks.protocol import BEGAN, Answer, serve, versions

held: dict[str, Any] = {}


def end_as_told(told: dict[str, Any]) -> None:
    """From now on sample i of a call ends at token `told["lengths"][i]`, and no token ends one."""
    import numpy as np

    import burnish.engines.local.engine as local
    from burnish.engines.local.rollout import Rollout

    class Ends(Rollout):
        """Samples that end where they are told to."""

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.ends[:] = False
            self.told = np.array([node.end + n for node, n in zip(self.nodes, told["lengths"])])

        def _draw(self, hidden: Any, requests: Any, row: Any, position: Any, limit: Any) -> Any:
            return super()._draw(hidden, requests, row, position, self.told[requests])

    local.Rollout = Ends  # type: ignore[misc]


def prepare(*, model: str, threads: int, probe: list[int], setting: str) -> Answer:
    import torch

    from burnish.engines.local.engine import LocalEngine
    from burnish.models.load import load_policy

    imported = time.perf_counter()
    torch.set_num_threads(threads)
    end_as_told(held)
    policy = load_policy(model)
    held["engine"] = engine = LocalEngine(policy)
    node = engine.prefill(probe)
    score = sum(engine.score([node])[0])
    engine.free(node)
    shape = policy.shape
    return {
        "import_seconds": imported - BEGAN, "probe_logprob": score, "dtype": str(policy.dtype).removeprefix("torch."),
        "token_flops": 2 * shape.body_parameters + 2 * shape.vocabulary * shape.hidden,
        "body_flops": 2 * shape.body_parameters, "versions": versions("torch", "transformers"),
    }  # fmt: skip


def step(*, prompts: list[list[int]], lengths: list[int]) -> Answer:
    from burnish.core.records import Sampling

    engine, held["lengths"] = held["engine"], lengths
    held["steps"] = held.get("steps", 0) + 1
    before = engine.spend
    begin = time.perf_counter()
    nodes = engine.prefill_many(prompts)
    found = engine.sample(nodes, Sampling(max_new_tokens=max(lengths), seed=held["steps"]), [(i, 0) for i in range(len(nodes))])
    for node in nodes:
        engine.free(node)
    seconds = time.perf_counter() - begin
    spent = {k: v - getattr(before, k) for k, v in asdict(engine.spend).items()}
    return {
        "seconds": seconds, "lengths": [len(t.completion) for t in found], "useful_tokens": spent["sampled_tokens"],
        "prefill_tokens": spent["prefill_tokens"], "useful_flops": spent["useful_flops"], "executed_flops": spent["executed_flops"],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(serve(prepare, step))
