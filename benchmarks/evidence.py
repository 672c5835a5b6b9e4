"""Whether a method makes the bundled model better: stored runs judged on held-out items. Standard library only.

`tools/evidence.py` makes the runs and stores them; here is what is wanted of them and how they are shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.harness import Criterion

ID, SHORT, GEMMA = "evidence", "short_runs", "gemma_grpo"
GAIN, P = 0.04, 0.01
TENTHS = 10  # of a stage, in the table of training rewards
ERRORS = 2.0  # standard errors that a reward may lie below where it began and not be said to fall
COLUMNS = ["row", "accuracy before / after", "gain (95 %)", "p", "gain by seed", "tokens sampled / trained", "TFLOP", "seconds", "steps"]


def criterion(row: Mapping[str, Any], gain: float = GAIN) -> Criterion:
    """At least `gain` over all seeds, p < P, and above zero in each seed."""
    wanted = f">= {100 * gain:g} points, p < {P:g}, each seed above 0"
    if "gain" not in row:
        return Criterion(ID, row["row"], wanted, row.get("not_measured", "not run"), None)
    each = [seed["gain"] for seed in row["seeds"]]
    met = row["gain"] >= gain and row["p"] < P and min(each) > 0
    return Criterion(ID, row["row"], wanted, f"{points(row['gain'])}, p = {row['p']:.1e}, by seed {', '.join(map(points, each))}", met)


def not_falling(row: Mapping[str, Any]) -> Criterion:
    """The mean reward of the last third of a run's rounds is not clearly below that of the first third, in any seed."""
    wanted = f"last third of rounds not {ERRORS:g} standard errors below the first"
    if "gain" not in row:
        return Criterion(SHORT, row["row"], wanted, row.get("not_measured", "not run"), None)
    curves = [seed["reward"] for seed in row["seeds"]]
    met = all(c["last"] - c["first"] >= -ERRORS * c["error"] for c in curves)
    return Criterion(SHORT, row["row"], wanted, "; ".join(f"{c['first']:.3f} -> {c['last']:.3f} (error {c['error']:.3f})" for c in curves), met)


def rising(row: Mapping[str, Any]) -> Criterion:
    """The mean reward of the last third of a run's rounds is clearly above that of the first third, in every seed."""
    wanted = f"last third of rounds {ERRORS:g} standard errors above the first"
    name = f"{row['row']}, training reward"
    if "gain" not in row:
        return Criterion(GEMMA, name, wanted, row.get("not_measured", "not run"), None)
    curves = [seed["reward"] for seed in row["seeds"]]
    met = all(c["last"] - c["first"] > ERRORS * c["error"] for c in curves)
    return Criterion(GEMMA, name, wanted, "; ".join(f"{c['first']:.3f} -> {c['last']:.3f} (error {c['error']:.3f})" for c in curves), met)


def criteria(result: Mapping[str, Any]) -> list[Criterion]:
    if result["id"] == SHORT:
        return [not_falling(row) for row in result["rows"]]
    gains = [criterion(row, result.get("wanted_gain", GAIN)) for row in result["rows"]]
    return gains + [rising(row) for row in result["rows"] if result["id"] == GEMMA]


def curve(row: Mapping[str, Any]) -> list[str]:
    """Mean training reward over all seeds by tenths of the stage, where the rounds' own are stored."""
    curves = [seed["reward"]["curve"] for seed in row.get("seeds", ()) if "curve" in seed.get("reward", {})]
    if not curves:
        return []
    found: list[str] = []
    for k in range(TENTHS):
        parts = [c[len(c) * k // TENTHS : max(len(c) * k // TENTHS + 1, len(c) * (k + 1) // TENTHS)] for c in curves]
        found.append(f"{sum(sum(part) / len(part) for part in parts) / len(parts):.3f}")
    return [row["row"], *found]


def points(share: float) -> str:
    return f"{100 * share:+.1f}"


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table in RESULTS.md. Tokens, FLOPs and seconds are of the stage, its evaluation apart, a seed on average."""
    if "gain" not in row:
        return [row["row"], "not measured: " + row.get("not_measured", "not run").splitlines()[0].replace("|", "/")] + [""] * (len(COLUMNS) - 2)
    seeds = row["seeds"]
    mean = {key: sum(seed[key] for seed in seeds) / len(seeds) for key in ("sampled_tokens", "trained_tokens", "flops", "seconds", "steps")}
    low, high = row["interval"]
    return [
        row["row"], f"{100 * row['before']:.1f} / {100 * row['after']:.1f}", f"**{points(row['gain'])}** ({points(low)} to {points(high)})", f"{row['p']:.1e}",
        ", ".join(points(seed["gain"]) for seed in seeds), f"{mean['sampled_tokens'] / 1e3:.0f} k / {mean['trained_tokens'] / 1e3:.0f} k",
        f"{mean['flops'] / 1e12:.2f}", f"{mean['seconds']:.0f}", f"{mean['steps']:.0f}",
    ]  # fmt: skip
