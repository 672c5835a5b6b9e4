"""Pearson's test of drawn tokens against an exact distribution."""

from __future__ import annotations

import torch
from torch import Tensor


def chi_square(count: Tensor, exact: Tensor) -> float:
    """The statistic as a share of its 99.9 % bound: below 1 passes. Tokens expected fewer than five times are one bin."""
    n = int(count.sum())
    assert n > 100 and not count[exact == 0].any(), "drew what has no probability"
    rare = exact * n < 5
    seen = torch.cat([count[~rare], count[rare].sum()[None]]).double()
    wanted = torch.cat([exact[~rare], exact[rare].sum()[None]]).double() * n
    keep = wanted > 0
    freedom = int(keep.sum()) - 1
    statistic = float(((seen - wanted)[keep] ** 2 / wanted[keep]).sum())
    # Wilson and Hilferty's normal approximation
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    return statistic / bound
