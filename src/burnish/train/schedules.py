"""Learning-rate schedules: (step, total) -> multiplier of the peak rate. `step` counts from 0.

`warmup` below 1 is a share of the run, from 1 on a number of steps.
"""

from __future__ import annotations

import math

from burnish.core.table import Table


def warm(step: int, total: int, warmup: float) -> tuple[float | None, int]:
    """(multiplier inside the warm-up or None, warm-up steps). Rises from 0 as transformers' schedules do."""
    steps = math.ceil(warmup * total) if 0 < warmup < 1 else int(warmup)
    return (step / max(1, steps) if step < steps else None), steps


def constant(step: int, total: int, *, warmup: float = 0.0) -> float:
    """The peak rate throughout, after the warm-up (no paper)."""
    rising, _ = warm(step, total, warmup)
    return 1.0 if rising is None else rising


def linear(step: int, total: int, *, warmup: float = 0.0) -> float:
    """Falls to zero at the end: (total - step) / (total - warmup) (no paper; the default of transformers' Trainer)."""
    rising, steps = warm(step, total, warmup)
    return max(0.0, (total - step) / max(1, total - steps)) if rising is None else rising


def cosine(step: int, total: int, *, warmup: float = 0.0, floor: float = 0.0) -> float:
    """Half a cosine from the peak to `floor` times the peak (SGDR without restarts, arXiv:1608.03983, eq. 5)."""
    rising, steps = warm(step, total, warmup)
    if rising is not None:
        return rising
    done = min(1.0, (step - steps) / max(1, total - steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


SCHEDULES = Table("schedule", {"constant": constant, "linear": linear, "cosine": cosine})
