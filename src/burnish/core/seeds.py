"""Seeds are derived, never shared: every consumer names itself, so adding one does not move the others."""

from __future__ import annotations

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed that is a pure function of the run's seed and the consumer's name: derive(0, "sampler", 3)."""
    text = "\x1f".join([str(seed), *(f"{type(n).__name__}:{n}" for n in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
