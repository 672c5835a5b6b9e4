"""The fused head: `maths.head.head_loss` on given hidden rows, forward and backward. See benchmarks/kernel.py."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.kernel import Head
from benchmarks.protocol import serve


def burnish(hidden: Any, weight: Any, label: Any) -> Any:
    import torch

    from burnish.maths.head import head_loss
    from burnish.maths.logprobs import weighted_nll

    return head_loss(hidden, weight, label, weighted_nll(torch.ones(len(label))))[0]


if __name__ == "__main__":
    head = Head({"burnish": burnish})
    sys.exit(serve(head.prepare, head.step))
