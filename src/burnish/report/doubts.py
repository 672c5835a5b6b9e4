"""What a reader should know before believing the verdict: warnings, the gravest first.

A `doubt` weakens the verdict or means that the run is not whole; a `note` is a fact to keep in mind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, variance
from typing import Any

from burnish.report import units
from burnish.report.drawn import draws, find
from burnish.report.pairs import SIGNIFICANT
from burnish.report.verdict import gains

FEW = 200  # questions: below this a 95 % interval is wider than about 14 points, and a choice among settings is mostly luck
NOTABLE = 0.01  # share of completions cut or rows dropped that is worth a note
GRAVE = 0.05  # ... that weakens the verdict
SILENT = 0.05  # share of completions without an answer
MOST = 20  # damaged files listed one by one
RISEN = 1.02  # validation loss at the end over its lowest
POINTS = 12  # of a reward's curve: below this its rise is not told from its noise
ROSE = 3.0  # standard errors between the reward's first and last quarter
LONGER = 2.0  # completions in the last tenth of the steps over those in the first
NARROWED = 0.25  # entropy, likewise
DEAD = 0.6  # share of groups without an advantage
ROUNDING = 1e-4  # nats: how far sampler and trainer may be apart in float32 before a step is made
CUT = 0.2  # share of completions drawn that the token limit cut
Row = Mapping[str, Any]


def warnings(report: Row, *, missing: Sequence[str], damaged: Sequence[str], planned: Sequence[str], chosen: bool) -> list[dict[str, str]]:
    """Every warning of a collected report. `chosen`: the primary metric is ours, because the recipe names none."""
    found = [*_whole(report, planned), *_files(missing, damaged), *_measured(report), *_trained(report), *_drew(report)]
    primary = report["verdict"]["primary"]
    if chosen and primary:
        text = f"The recipe names no primary metric; the verdict is about {primary['eval']} with {primary['strategy']}."
        found.append(("note", "primary", text))
    found.sort(key=lambda w: w[0] != "doubt")
    return [{"level": level, "about": about, "text": text} for level, about, text in found]


Found = Iterator[tuple[str, str, str]]


def _whole(report: Row, planned: Sequence[str]) -> Found:
    run = report["run"]
    if run["state"] != "finished":
        yield "note" if run["state"] == "stopped by budget" else "doubt", "state", run["state_words"]
    for stage in report["stages"]:
        if stage["status"] == "stopped by budget":
            why = (stage["stopped_by"] or "").removeprefix("budget: ")
            yield "note", "budget", f"{stage['name']} was stopped by its budget after {units.many(stage['steps'] or 0, 'step')}{f' ({why})' if why else ''}."
        elif stage["status"] != "complete":
            yield "doubt", "stage", f"The stage {stage['name']} is {stage['status']}."
    begun = {stage["name"] for stage in report["stages"]}
    for name in (n for n in planned if n not in begun):
        yield "doubt", "stage", f"The stage {name} is in the recipe and never began."
    if (run["starts"] or 1) > 1:
        yield "note", "resumed", f"The run was resumed {'once' if run['starts'] == 2 else units.many(run['starts'] - 1, 'time')}."


def _files(missing: Sequence[str], damaged: Sequence[str]) -> Found:
    for text in damaged[:MOST]:
        yield "doubt", "damaged", f"Damaged: {text}."
    if len(damaged) > MOST:
        yield "doubt", "damaged", f"{units.many(len(damaged) - MOST, 'more file or entry', 'more files or entries')} are damaged too."
    if missing:
        yield "note", "missing", f"Not in the run folder: {', '.join(missing)}. What {'it' if len(missing) == 1 else 'they'} would show is missing here."


def _measured(report: Row) -> Found:
    """What was measured, and how well."""
    primary = report["verdict"]["primary"]
    name = primary["eval"] if primary else None
    for evaluation in dict.fromkeys(e["eval"] for s in report["stages"] for e in s["evals"]):
        places = [(s["name"], e) for s in report["stages"] for e in s["evals"] if e["eval"] == evaluation]
        first = places[0][1]
        if first["n"] < FEW and (first["metric"] == "accuracy" or evaluation == name):
            wide = max((s["interval"][1] - s["interval"][0] for _, e in places for s in e["strategies"]), default=0)
            word = "row" if first["metric"] == "likelihood" else "question"
            text = f"{evaluation} has only {units.many(first['n'], word)}: an interval is up to {100 * wide:.0f} points wide."
            yield "doubt" if evaluation == name else "note", "n", text
        if len({e["items"] for _, e in places}) > 1:
            yield "doubt", "items", f"The stages were not asked the same questions of {evaluation}; those are not compared with each other."
        few = re.search(r"\bn\s*=\s*(\d+)", str(first["settings"].get("chosen_on", "")))
        if few and int(few[1]) < FEW:
            text = f"The temperature of {evaluation} was chosen on {units.many(int(few[1]), 'question')}: another one may be as good."
            yield "note", "temperature", text
        rows = [(stage, s) for stage, e in places for s in e["strategies"]]
        stage, worst = max(rows, key=lambda r: r[1]["truncated_share"] or 0, default=("", {"truncated_share": 0}))
        if (worst["truncated_share"] or 0) >= NOTABLE:
            limit = first["settings"].get("max_new_tokens")
            at = f"{limit} tokens (max_new_tokens)" if isinstance(limit, int) else "the token limit"
            share = units.percent(worst["truncated_share"])
            text = f"{share} of the completions of {worst['strategy']} at {stage} were cut at {at} on {evaluation}, the most of any; a cut answer is mostly a wrong one."
            yield "doubt" if worst["truncated_share"] >= GRAVE and evaluation == name else "note", "truncated", text
        stage, worst = max(rows, key=lambda r: r[1]["unanswered_share"] or 0, default=("", {"unanswered_share": 0}))
        if (worst["unanswered_share"] or 0) >= SILENT:
            share = units.percent(worst["unanswered_share"])
            text = f"No answer was found in {share} of the completions of {worst['strategy']} at {stage} on {evaluation}, the most of any."
            yield "note", "unanswered", text
    for c in report["comparisons"]:
        base = c["against_stage"] == report["stages"][0]["name"]
        same = base and primary and (c["eval"], c["strategy"]) == (primary["eval"], primary["strategy"])
        if c["kind"] == "stage" and not c["oracle"] and c["outcome"] == "worse" and not same:
            fell = f"from {units.percent(c['against_accuracy'])} to {units.percent(c['accuracy'])} ({units.probability(c['p'])})"
            where = f"at {c['stage']}" if base else f"from {c['against_stage']} to {c['stage']}"
            yield "doubt", "regression", f"{c['eval']} with {c['strategy']} got worse {where}: {fell}."
    if primary and (steps := [c for c in gains(report) if c["kind"] == "stage" and c["stage"] == primary["stage"]]):
        c = steps[-1]
        if c["outcome"] == "no significant change":
            text = f"What improved is not shown to be the work of {c['stage']}: {c['sentence'][0].lower()}{c['sentence'][1:]}"
            yield "note", "gain", text
    if primary and SIGNIFICANT / 5 < primary["p"] < SIGNIFICANT:
        text = f"The result is close to the line ({units.probability(primary['p'])}): about one run in twenty shows as much by chance."
        yield "note", "p", text


def _trained(report: Row) -> Found:
    for stage in report["stages"][1:]:
        data, curves, name = stage["data"] or {}, stage["curves"], stage["name"]
        dropped = {why: n for why, n in (data.get("dropped") or {}).items() if n}
        if dropped:
            lost, kept = sum(dropped.values()), data.get("rows") or 0
            reasons = ", ".join(f"{why}: {units.whole(n)}" for why, n in dropped.items())
            share = lost / (lost + kept)
            text = f"{name} left out {units.many(lost, 'row')} of {units.whole(lost + kept)} ({reasons})."
            yield "doubt" if share >= GRAVE else "note", "dropped", text
        if stage["skipped_steps"]:
            of = f" of {units.whole(stage['steps'])}" if stage["steps"] else ""
            text = f"{name} skipped {units.many(stage['skipped_steps'], 'step')}{of}: the loss or its gradient was not a finite number."
            yield "doubt", "skipped", text
        if stage["input"] and stage["input"] == stage["output"]:
            yield "doubt", "unchanged", f"{name} left the weights exactly as they were."
        losses = [(v, s) for v, s in zip(curves["validation_loss"], curves["validation_step"]) if v is not None] if curves else []
        if losses and losses[-1][0] > RISEN * min(losses)[0] > 0:
            low, at = min(losses)
            text = f"The validation loss of {name} was lowest at step {at} ({units.plain(low)}) and ended at {units.plain(losses[-1][0])}: shorter training may do better."
            yield "note", "overfitting", text


def _drew(report: Row) -> Found:
    """What speaks against a stage that learned from its own completions."""
    for stage in (s for s in report["stages"][1:] if draws(s)):
        name = stage["name"]
        yield from _hacked(report, stage)
        length = find(stage, "completion_tokens")
        if length and length["first"] and length["last"] > LONGER * length["first"]:
            grew = f"from {units.plain(length['first'])} to {units.plain(length['last'])} tokens"
            yield "note", "length", f"The completions of {name} grew {grew}: see whether the reward pays for length."
        entropy = find(stage, "entropy") or find(stage, "surprisal")
        if entropy and entropy["last"] < NARROWED * entropy["first"]:
            fell = f"from {units.plain(entropy['first'])} to {units.plain(entropy['last'])} nats a token"
            yield "note", "entropy", f"The {entropy['metric']} of {name} fell {fell}: it hardly tries anything new, and strategies that draw several answers gain less."
        dead = find(stage, "dead_groups")
        if dead and mean(dead["value"]) > DEAD:
            share = units.percent(mean(dead["value"]))
            yield "note", "dead groups", f"{share} of the groups of {name} were graded all alike and taught nothing: its prompts are too easy or too hard for it."
        cut = find(stage, "truncated_share")
        if cut and max(cut["first"], cut["last"]) >= GRAVE:
            worst = max(cut["first"], cut["last"])
            when = "last" if worst == cut["last"] else "first"
            text = f"{units.percent(worst)} of the completions {name} drew in its {when} tenth of the steps were cut at the token limit; their rewards are of half answers."
            yield "doubt" if worst >= CUT else "note", "truncated rollouts", text
        yield from _apart(report, stage)
        yield from _failed(stage)


def _hacked(report: Row, stage: Row) -> Found:
    """The reward rose and the held-out questions do not show it."""
    reward, primary = find(stage, "reward_mean"), report["verdict"]["primary"]
    values = reward["value"] if reward else []
    if not primary or primary["metric"] != "accuracy" or len(values) < POINTS:
        return
    quarter = len(values) // 4
    before, after = values[:quarter], values[-quarter:]
    noise = math.sqrt((variance(before) + variance(after)) / quarter)
    if mean(after) - mean(before) <= ROSE * noise:
        return
    mine = [c for c in report["comparisons"] if c["kind"] == "stage" and c["stage"] == stage["name"]
            and (c["eval"], c["strategy"]) == (primary["eval"], primary["strategy"])]  # fmt: skip
    if mine and mine[-1]["outcome"] != "better":  # against the stage before it
        c = mine[-1]
        held = "got worse" if c["outcome"] == "worse" else "did not clearly rise"
        rose = f"from {units.plain(mean(before))} to {units.plain(mean(after))}"
        text = (
            f"The reward of {stage['name']} rose {rose} while {c['eval']} with {c['strategy']} {held} ({units.points(c['difference'])} points over "
            f"{c['against_stage']}, {units.probability(c['p'])}): it may have learned what the reward pays and not what it is meant to. Read the groups."
        )
        yield "doubt", "reward", text


def _apart(report: Row, stage: Row) -> Found:
    """Sampler and trainer disagree before a step was made: in float32 by more than rounding."""
    dtype = next((d["value"] for d in report["provenance"]["decisions"] if d["name"] == "dtype"), None)
    gap = find(stage, "sampler_gap_max")
    if gap is None or dtype != "float32":
        return
    value, step = max(zip(gap["value"], gap["step"]))
    if value > ROUNDING:
        text = (
            f"About step {step} of {stage['name']} sampler and trainer were {units.plain(value)} nats apart on a token, more than the {units.plain(ROUNDING)} "
            "that rounding explains in float32: it may have trained on other probabilities than it drew with."
        )
        yield "doubt", "sampler gap", text


def _failed(stage: Row) -> Found:
    kinds = {kind: sum(s["value"]) * s["per_point"] for kind in ("timeouts", "crashes", "invalid", "infra") if (s := find(stage, f"reward_{kind}"))}
    failed = {kind: round(n) for kind, n in kinds.items() if n}
    if failed:
        said = ", ".join(f"{kind}: {units.whole(n)}" for kind, n in failed.items())
        text = f"Rewards of {stage['name']} failed on {units.many(sum(failed.values()), 'completion')} ({said}); those were learned from as if they had not been drawn."
        yield "doubt", "reward errors", text
