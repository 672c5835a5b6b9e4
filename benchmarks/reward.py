"""The reward of B7, a function of TRL's signature that both systems are given: the same file, the same values.

It can be checked without a model, and its value follows from a completion's length alone, which the bench sets: so both
systems see the same rewards, group by group, although they draw different tokens. Standard library only.
"""

from __future__ import annotations

from typing import Any


def concise(completions: list[Any], completion_ids: list[list[int]], limits: list[int], **columns: Any) -> list[float]:
    """1 where a completion says something in no more tokens than its prompt allows, else 0."""
    return [float(0 < len(ids) <= limit) for ids, limit in zip(completion_ids, limits, strict=True)]
