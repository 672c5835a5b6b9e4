"""What crosses between host and device while rows decode. A GPU works behind the host, and most ways across make the host wait.

A step of rollout sends lengths, positions and slots, and reads the tokens drawn with their log-probabilities: one read,
which is one wait. Sending goes through pinned memory, because a copy from pageable memory waits for everything the stream
has in hand. Where more is waited for: top-p below 1 looks at the mass it has gathered (`sampling.floor_of`), and the first
step of a longer rotation or a wider slot may allocate.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def upload(x: np.ndarray, device: torch.device) -> Tensor:
    """Host numbers on the device; on a CPU the same memory."""
    own = torch.from_numpy(x)
    return own.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else own.to(device)


def download(token: Tensor, logprob: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """tokens [m] int64 and log-probabilities [m] float32 on the host, in one read; on a CPU the same memory."""
    if token.device.type == "cpu":
        return token.numpy(), logprob.numpy()
    both = torch.stack([token, logprob.double().view(torch.int64)]).cpu().numpy()
    return both[0], both[1].view(np.float64).astype(np.float32)
