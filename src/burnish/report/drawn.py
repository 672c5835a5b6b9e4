"""What a stage logged besides its loss, and what the rounds it drew looked like: the series and rounds of report.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from burnish.core.metrics import METRICS
from burnish.core.runs import StageFolder
from burnish.report.files import CreditLine, MetricsRow, Reading, RoundLine

POINTS = 300  # of a series
GROUPS, COMPLETIONS = 4, 16  # shown of a round, and of a group
TEXT = 2_000  # characters kept of a prompt or a completion
EACH = ("reward_mean", "reward_std")  # what is kept of every reward on its own, where there are several
OWN = {"loss", "grad_norm", "lr", "epoch", "rows", "label_tokens", "stream_tokens", "skipped_steps"}  # the loop's; curves and facts show them
DRAWN = "completion_tokens"  # logged by the steps that drew
AT_START = ("sampler_gap", "sampler_gap_max")  # at the steps after, the policy has moved: that is no gap between the two
Row = dict[str, Any]


def series(rows: Sequence[MetricsRow]) -> list[Row]:
    """Every number of the glossary that training steps logged, in the order of the glossary; of single rewards after the total."""
    found: dict[tuple[str, str | None], list[tuple[int, float]]] = {}
    for row in rows:
        if row.kind != "train":
            continue
        logged = {name: value for name, value in (row.model_extra or {}).items() if name not in AT_START or DRAWN in (row.model_extra or {})}
        parts = logged.get("components")
        for reward, values in (None, logged), *(parts.items() if isinstance(parts, dict) else ()):
            for name, value in values.items() if isinstance(values, dict) else ():
                known = name in EACH if reward is not None else name in METRICS and name not in OWN
                if known and isinstance(value, int | float) and not isinstance(value, bool):
                    found.setdefault((name, reward), []).append((row.step, float(value)))
    order = {name: i for i, name in enumerate(METRICS)}
    return [_thinned(name, reward, found[name, reward]) for name, reward in sorted(found, key=lambda key: order[key[0]])]


def _thinned(name: str, reward: str | None, points: Sequence[tuple[int, float]]) -> Row:
    every = -(-len(points) // POINTS)
    buckets = [[v for _, v in points[i : i + every]] for i in range(0, len(points), every)]
    values, tenth = [v for _, v in points], -(-len(points) // 10)
    return {
        "metric": name, "reward": reward, "unit": METRICS[name].unit, "step": [s for s, _ in points[::-every][::-1]],
        "per_point": len(points) / len(buckets), "value": [max(b) if name.endswith("_max") else _mean(b) for b in buckets],
        "first": _mean(values[:tenth]), "last": _mean(values[-tenth:]),
    }  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def draws(stage: Mapping[str, Any]) -> bool:
    """Whether it learns from completions of its own."""
    return any(s["metric"] in (DRAWN, "reward_mean") for s in stage["series"]) or bool(stage["rounds"])


def find(stage: Mapping[str, Any], metric: str, reward: str | None = None) -> Row | None:
    """One series of a stage, or None where it was not logged."""
    return next((s for s in stage["series"] if (s["metric"], s["reward"]) == (metric, reward)), None)


def rounds(folder: StageFolder, reading: Reading) -> list[Row]:
    """The first round that is kept, the last, and the one nearest to halfway: of each its first few groups, unselected."""
    kept = folder.rounds()
    if not kept:
        return []
    halfway = min(kept, key=lambda number: abs(2 * number - kept[-1]))
    return [made for number in sorted({kept[0], halfway, kept[-1]}) if (made := _round(folder, reading, number))]


def _round(folder: StageFolder, reading: Reading, number: int) -> Row | None:
    path = folder.trajectories(number)
    head, *drawn = reading.packed(path, RoundLine, lambda row: (row.group or 0) >= GROUPS) or [RoundLine()]
    if head.questions is None:
        return None
    credit: dict[int, CreditLine] = {}
    for part in folder.of_round(number):
        if part != path:
            rows = reading.packed(part, CreditLine, lambda row: (row.group or 0) >= GROUPS)
            credit |= {row.group: row for row in rows if row.group is not None}
    groups = range(min(GROUPS, len(head.questions)))
    made = [_group(q, [row for row in drawn if row.group == q], credit.get(q, CreditLine())) for q in groups]
    return {"round": number, "prompts": len(head.questions), "groups": [group for group in made if group["completions"]]}


def _group(number: int, drawn: Sequence[RoundLine], credit: CreditLine) -> Row:
    prompt = _words(credit.prompt)
    paid = list(zip(credit.advantages, credit.live)) if len(credit.advantages) == len(credit.live) == len(drawn) else [(None, None)] * len(drawn)
    return {
        "group": number, "where": credit.where, "prompt": None if prompt is None else prompt[:TEXT],
        "prompt_cut": max(0, len(prompt or "") - TEXT), "answer": None if credit.answer is None else str(credit.answer)[:TEXT],
        "completions": [
            {"text": row.text[:TEXT], "cut": max(0, len(row.text) - TEXT), "tokens": len(row.tokens), "finish": row.finish,
             "rewards": row.rewards, "total": row.total, "advantage": advantage, "live": live}
            for row, (advantage, live) in list(zip(drawn, paid))[:COMPLETIONS]
        ],
        "more": max(0, len(drawn) - COMPLETIONS),
    }  # fmt: skip


def _words(prompt: str | list[dict[str, Any]] | None) -> str | None:
    """A prompt as it is read: a text, one message, or messages under the names of who says them."""
    if prompt is None or isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0].get("content", ""))
    return "\n\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in prompt)
