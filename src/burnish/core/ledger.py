"""What a run cost: tokens by role, useful and executed FLOPs, seconds, memory, money where known.

`counted` values are deterministic and survive a resume bit for bit; `measured` ones are this machine's.
Useful = the least work the objective needs (every distinct token once, the head on loss rows only, nothing recomputed);
executed = what forest, head and engine launched. Their ratio is the share of the work that was needed.
A multiply-add counts as two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from burnish.core.records import ModelShape, Spend


def attended(first: int, length: int, window: int | None = None) -> int:
    """Keys seen by `length` causal queries at positions first, first+1, ...: sum of min(position + 1, window)."""
    end = first + length
    if window is None or window >= end:
        return (first + 1 + end) * length // 2
    full = max(0, min(end, window) - first)  # queries that still see everything before them
    return (first + 1 + first + full) * full // 2 + (length - full) * window


def attention_flops(shape: ModelShape, segments: Iterable[tuple[int, int]]) -> int:
    """Forward attention FLOPs of segments (first position, length) over all layers: 2 Hq (dk + dv) per attended key."""
    spans = list(segments)
    per_pair = 2 * shape.query_heads * (shape.key_width + shape.value_width)
    total = 0
    for window in set(shape.windows):
        layers = shape.windows.count(window)
        total += layers * sum(attended(first, length, window) for first, length in spans)
    return per_pair * total


def forward_flops(shape: ModelShape, tokens: int, head_rows: int, segments: Iterable[tuple[int, int]]) -> int:
    """Scoring or prefill: 2 (N_b + N_adapter) T + 2 V H N + A."""
    body = 2 * (shape.body_parameters + shape.adapter_parameters) * tokens
    return body + 2 * shape.vocabulary * shape.hidden * head_rows + attention_flops(shape, segments)


def train_flops(shape: ModelShape, tokens: int, head_rows: int, segments: Iterable[tuple[int, int]]) -> int:
    """Forward and backward. Full: 6 N_b T + 6 V H N + 3A; adapters: 4 N_b T + 6 N_adapter T + 4 V H N + 3A."""
    body = (4 if shape.trained == "adapter" else 6) * shape.body_parameters * tokens + 6 * shape.adapter_parameters * tokens
    head = (6 if shape.head_trained else 4) * shape.vocabulary * shape.hidden * head_rows
    return body + head + 3 * attention_flops(shape, segments)


def decode_flops(shape: ModelShape, rows: int, attended_keys: Mapping[int | None, int]) -> int:
    """One decode step or many: `rows` new tokens with logits each; attended_keys[window] = keys seen, summed over rows."""
    per_pair = 2 * shape.query_heads * (shape.key_width + shape.value_width)
    attention = sum(per_pair * shape.windows.count(window) * keys for window, keys in attended_keys.items())
    body = 2 * (shape.body_parameters + shape.adapter_parameters) * rows
    return body + 2 * shape.vocabulary * shape.hidden * rows + attention


class Ledger:
    """Running totals by phase. `count` for deterministic quantities, `measure` for seconds."""

    def __init__(self) -> None:
        self.counted: dict[str, dict[str, int]] = {}
        self.seconds: dict[str, float] = {}
        self.peak_memory_bytes: int | None = None
        self.money: float | None = None

    def count(self, phase: str, **quantities: int) -> None:
        """Add whole numbers: `*_tokens`, `useful_flops`, `executed_flops`. Raises ValueError on any other name."""
        row = self.counted.setdefault(phase, {})
        for name, value in quantities.items():
            if not name.endswith(("_tokens", "_flops")):
                raise ValueError(f"the ledger counts *_tokens and *_flops, not {name!r}")
            row[name] = row.get(name, 0) + int(value)

    def spend(self, spend: Spend, phase: str | None = None) -> None:
        """Add what an engine spent: to one phase, or to a phase for each kind of work."""
        if phase is not None:
            self.count(phase, **asdict(spend))
            return
        self.count("prefill", prefill_tokens=spend.prefill_tokens)
        self.count("decode", sampled_tokens=spend.sampled_tokens)
        self.count("score", scored_tokens=spend.scored_tokens)
        self.count("sampling", useful_flops=spend.useful_flops, executed_flops=spend.executed_flops)

    def measure(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def saw_memory(self, used_bytes: int) -> None:
        self.peak_memory_bytes = max(self.peak_memory_bytes or 0, used_bytes)

    @property
    def flops(self) -> int:
        """Executed FLOPs so far, all phases: what a `budget.flops` is held against."""
        return sum(row.get("executed_flops", 0) for row in self.counted.values())

    @property
    def tokens(self) -> int:
        """Tokens processed so far, all phases: what a `budget.tokens` is held against."""
        roles = ("stream_tokens", "prefill_tokens", "sampled_tokens", "scored_tokens")
        return sum(row.get(role, 0) for row in self.counted.values() for role in roles)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "counted": self.counted,
            "measured": {
                "seconds": {k: round(v, 4) for k, v in self.seconds.items()},
                "peak_memory_bytes": self.peak_memory_bytes,
                "joules": None,
                "money": self.money,
            },
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ledger:
        ledger = cls()
        ledger.counted = {phase: dict(row) for phase, row in value["counted"].items()}
        ledger.seconds = dict(value["measured"]["seconds"])
        ledger.peak_memory_bytes = value["measured"]["peak_memory_bytes"]
        ledger.money = value["measured"]["money"]
        return ledger
