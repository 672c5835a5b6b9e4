"""Other heads: TRL's `ChunkedLogProbFunction` as its trainers call it, and whole logits. See benchmarks/kernel.py."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.kernel import Head
from benchmarks.protocol import serve


def trl(hidden: Any, weight: Any, label: Any) -> Any:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return -ChunkedLogProbFunction.apply(hidden, weight, None, label, 1.0, 32768, None, 1.0, ("log_probs",))[0].sum()


def whole(hidden: Any, weight: Any, label: Any) -> Any:
    from torch.nn.functional import cross_entropy, linear

    return cross_entropy(linear(hidden, weight).float(), label, reduction="sum")


if __name__ == "__main__":
    head = Head({"trl": trl, "whole logits": whole})
    sys.exit(serve(head.prepare, head.step))
