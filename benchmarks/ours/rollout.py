"""burnish's rollouts: `LocalEngine`, prefill and sample, as a run's sampling does it.

    {"do": "prepare", "model": FOLDER, "threads": 2} -> "probe_logprob" of the first prompt's tokens, by `engine.score`
    {"do": "step", "prompts": [[...]], "lengths": [...]} -> {"seconds": S, "lengths": [...], "prefill_tokens": N, FLOPs}

Every row is to end at its own length: the limit of a slot, `max_new_tokens` for all rows of a call, is set for each row
as it is seated, and no token ends a row. Nothing else of the engine is touched.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from benchmarks.protocol import BEGAN, Answer, serve, versions

held: dict[str, Any] = {}


def prepare(*, model: str, threads: int, probe: list[int], setting: str) -> Answer:
    import torch

    import burnish.engines.local.engine as local
    from burnish.engines.local.rollout import Rollout
    from burnish.models.load import load_policy

    imported = time.perf_counter()
    torch.set_num_threads(threads)

    class Ends(Rollout):
        """Rows that end where they are told to."""

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.ends[:] = False

        def _draw(self, slots: Any, hidden: Any) -> list[int]:
            if slots is not None:  # rows that were just seated
                self.limit[slots] = self.position[slots] + [held["lengths"][r] for r in self.request[slots]]
            return super()._draw(slots, hidden)

    local.Rollout = Ends  # type: ignore[misc]
    policy = load_policy(model)
    engine = local.LocalEngine(policy)
    score = sum(engine.score([engine.prefill(probe)])[0])
    held.update(policy=policy, LocalEngine=local.LocalEngine)
    shape = policy.shape
    return {
        "import_seconds": imported - BEGAN, "probe_logprob": score, "dtype": str(policy.dtype).removeprefix("torch."),
        "token_flops": 2 * shape.body_parameters + 2 * shape.vocabulary * shape.hidden,
        "body_flops": 2 * shape.body_parameters, "versions": versions("torch", "transformers"),
    }  # fmt: skip


def step(*, prompts: list[list[int]], lengths: list[int]) -> Answer:
    from burnish.core.records import Sampling

    held["lengths"] = lengths
    held["steps"] = held.get("steps", 0) + 1
    begin = time.perf_counter()
    engine = held["LocalEngine"](held["policy"])
    nodes = engine.prefill_many(prompts)
    found = engine.sample(nodes, Sampling(max_new_tokens=max(lengths), seed=held["steps"]), [(i, 0) for i in range(len(nodes))])
    seconds = time.perf_counter() - begin
    spend = engine.spend
    return {
        "seconds": seconds, "lengths": [len(t.completion) for t in found], "useful_tokens": spend.sampled_tokens,
        "prefill_tokens": spend.prefill_tokens, "useful_flops": spend.useful_flops, "executed_flops": spend.executed_flops,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(serve(prepare, step))
