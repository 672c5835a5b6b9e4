"""The sections of stages that draw their own completions: what rewards and policy did over the steps, and groups as drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from burnish.core.metrics import METRICS
from burnish.report import charts, units
from burnish.report.doubts import ROUNDING
from burnish.report.drawn import draws, find
from burnish.report.evidence import work_table
from burnish.report.markup import Child, Markup, join, tag
from burnish.report.parts import Section, facts, folded, quoted, table, within

Report = Mapping[str, Any]
Row = dict[str, Any]
GROUP_BYTES = 1_200_000  # of HTML
SHOWN = 90  # characters of a prompt in the line that opens it
MOST = 4  # rewards with a line of their own in a chart


@dataclass(frozen=True)
class Panel:
    """A small chart of a few metrics. `names`: what each line is called beside it, where there are several."""

    caption: str
    metrics: tuple[str, ...]
    names: tuple[str, ...] = ()
    rule: float | None = None
    log: bool = False


PANELS = (
    Panel("surprisal of what was drawn, nats a token: an estimate of the policy's entropy", ("surprisal",)),
    Panel("entropy of the policy, nats a token", ("entropy",)),
    Panel("completion length, tokens", ("completion_tokens",)),
    Panel("completions cut at the token limit, share", ("truncated_share",)),
    Panel("share of groups without any advantage (dead), of completions with a gradient (live)", ("dead_groups", "live_samples"), ("dead", "live")),
    Panel(
        "sampler and trainer apart where a round starts, nats; the line is at 1e-4, what rounding may do in float32", ("sampler_gap", "sampler_gap_max"),
        ("mean", "largest"), rule=ROUNDING, log=True,
    ),
    Panel("KL from the reference, nats a token", ("kl",)),
)  # fmt: skip
COSTS = {"prepare": "rollouts, reference", "reward": "scoring", "train": "training"}


def rollouts(report: Report) -> Section | None:
    stages = [s for s in report["stages"][1:] if draws(s)]
    if not stages:
        return None
    how = (
        "The model answers, rewards grade the answers, and it learns from the difference within a group. Rewards are of the training prompts: "
        "whether the model got better is what the held-out questions above say. Dead groups are graded all alike and teach nothing."
    )
    return Section("rollouts", "Rollouts and rewards", how, join(*(_stage(s) for s in stages)))


def _stage(stage: Row) -> Markup:
    resumed = stage["curves"]["resumed_after"] if stage["curves"] else []
    panels = [drawn for panel in PANELS if (drawn := _panel(stage, panel, resumed))]
    known = {name for panel in PANELS for name in panel.metrics} | {name for name in METRICS if name.startswith("reward_")}
    others = [
        drawn for s in stage["series"]
        if s["metric"] not in known and s["reward"] is None and min(s["value"]) < max(s["value"])
        and (drawn := _panel(stage, Panel(f"{s['metric']}: {METRICS[s['metric']].meaning}", (s["metric"],)), resumed))
    ]  # fmt: skip
    total = find(stage, "reward_mean")
    said = None if total is None else f"{units.plain(total['first'])} → {units.plain(total['last'])}"
    length = find(stage, "completion_tokens")
    return join(
        tag("h3", stage["name"]), _rewards(stage, resumed), tag("div", panels, class_="pair"),
        facts([
            ("Method", stage["method"]), ("Steps", units.whole(stage["steps"])), ("Skipped", units.whole(stage["skipped_steps"])),
            ("Reward, first and last tenth", said),
            ("Length, likewise", None if length is None else f"{units.plain(length['first'])} → {units.tokens(round(length['last'], 1))}"),
            ("Speed", None if not stage["curves"] or stage["curves"]["median_tokens_per_s"] is None
             else f"{units.count(stage['curves']['median_tokens_per_s'])} tokens/s, the median"),
        ]),
        _cost(stage), _numbers(stage), folded("Further charts", tag("div", [*others, *_optimiser(stage, resumed)], class_="pair")),
    )  # fmt: skip


def _line(s: Row, name: str, kind: str) -> charts.Line:
    return charts.Line(name, s["step"], s["value"], kind, dots=len(s["value"]) == 1)


def _rewards(stage: Row, resumed: Sequence[int]) -> Markup | None:
    """The reward over the steps: the total, and each reward on its own where there are several."""
    total = find(stage, "reward_mean")
    if total is None:
        return tag("p", "No reward was recorded.", class_="quiet")
    single = [s for s in stage["series"] if s["metric"] == "reward_mean" and s["reward"] is not None]
    lines = [_line(total, "total", "main"), *(_line(s, charts.short(s["reward"], 12), f"s{i}") for i, s in enumerate(single[:MOST], start=1))]
    said = f"Mean reward of {stage['name']}, from {units.plain(total['first'])} in the first tenth to {units.plain(total['last'])} in the last."
    said += "".join(f" {s['reward']}: from {units.plain(s['first'])} to {units.plain(s['last'])}." for s in single[:MOST])
    note = "mean reward of the completions drawn, by step"
    if len(single) > MOST:
        note += f"; {len(single) - MOST} more rewards are in the table below"
    chart = charts.curve(lines, height=200, resumed=resumed, label=said)
    return tag("figure", tag("figcaption", tag("p", note)), chart, class_="large")


def _panel(stage: Row, panel: Panel, resumed: Sequence[int]) -> Markup | None:
    found = [(find(stage, metric), name) for metric, name in zip(panel.metrics, panel.names or panel.metrics)]
    lines = [_line(s, name, kind) for (s, name), kind in zip(found, ("main", "second")) if s is not None]
    if not lines:
        return None
    said = f"{panel.caption[0].upper()}{panel.caption[1:]}. {stage['name']}: " + "; ".join(
        f"{name} from {units.plain(s['first'])} to {units.plain(s['last'])}" for s, name in found if s is not None
    ) + "."  # fmt: skip
    chart = charts.curve(lines, height=90, resumed=resumed, zero=True, label=said, rule=panel.rule, log=panel.log)
    return tag("figure", tag("figcaption", tag("p", panel.caption)), chart)


def _optimiser(stage: Row, resumed: Sequence[int]) -> list[Markup]:
    """What the training section shows of other stages."""
    curves = stage["curves"]
    made: list[Markup] = []
    for name, caption in (("loss", "loss: of a policy gradient its value says little"), ("grad_norm", "gradient norm, before clipping"), ("lr", "learning rate")):
        values = [v for v in curves[name] if v is not None] if curves else []
        if values:
            label = f"{caption.capitalize()} of {stage['name']}, from {units.plain(values[0])} to {units.plain(values[-1])}."
            chart = charts.curve([charts.Line(name, curves["step"], curves[name], "main")], height=90, resumed=resumed, zero=True, label=label)
            made.append(tag("figure", tag("figcaption", tag("p", caption)), chart))
    return made


def _cost(stage: Row) -> Markup | None:
    """What a step's parts took: drawing, scoring, training."""
    phases = stage["ledger"]["phases"] if stage["ledger"] else {}
    parts = [(title, [name], stage["ledger"]) for name, title in COSTS.items() if name in phases]
    return work_table("What the work of learning went into", parts) if len(parts) > 1 else None


def _numbers(stage: Row) -> Markup:
    rows: list[list[Child]] = [
        [join(f"{s['metric']} ", tag("small", f"of {s['reward']}" if s["reward"] is not None else METRICS[s["metric"]].meaning)),
         s["unit"], units.plain(s["first"]), units.plain(s["last"]), units.plain(min(s["value"])), units.plain(max(s["value"]))]
        for s in stage["series"]
    ]  # fmt: skip
    heads = ("Metric", "Unit", "First tenth", "Last tenth", "Lowest", "Highest")
    return folded("The same in numbers", table(f"{stage['name']}, means over the first and the last tenth of the steps", heads, rows, words=(1,)))


# ---- groups ---------------------------------------------------------------------------------------------------------


def groups(report: Report) -> Section | None:
    stages = [s for s in report["stages"][1:] if s["rounds"]]
    if not stages:
        return None
    parts: list[Child] = []
    first = stages[0]["rounds"][0]["groups"][:1]
    budget = GROUP_BYTES // sum(len(s["rounds"]) for s in stages)
    for stage in stages:
        parts.append(tag("h3", stage["name"]))
        for drawn in stage["rounds"]:
            shown, left = within(drawn["groups"], lambda group: _group(group, first=group in first), budget)
            parts.append(tag("h4", f"Round {drawn['round'] + 1}: the first {len(shown)} of {units.many(drawn['prompts'], 'prompt')}"))
            parts.append(tag("div", shown, class_="groups"))
            if left:
                parts.append(tag("p", f"{units.many(left, 'group')} left out to keep this file small.", class_="quiet"))
    how = (
        "What the model wrote while it learned, in the first round that is kept, one halfway and the last; none is picked. Open a prompt to read "
        "every answer to it with its reward. The advantage is what training used: above 0 the answer was made likelier, below 0 less likely."
    )
    return Section("groups", "Groups, as drawn", how, join(*parts))


def _group(group: Row, *, first: bool) -> Markup:
    asked = group["prompt"] or group["where"] or f"prompt {group['group'] + 1}"
    line = " ".join(asked.split())
    whole = line == asked.strip() and len(line) <= SHOWN  # the line that opens it says it all
    drawn = group["completions"]
    totals = [c["total"] for c in drawn if c["total"] is not None]
    said = "no reward known" if not totals else f"rewards all {units.plain(totals[0])}" if len(set(totals)) == 1 else (
        f"mean reward {units.plain(sum(totals) / len(totals))}"
    )  # fmt: skip
    return tag(
        "details", tag("summary", tag("span", line[:SHOWN] + ("…" if len(line) > SHOWN else ""), class_="question", dir="auto"), tag("span", said, class_="marks")),
        tag("div",
            tag("p", group["where"], class_="where") if group["where"] else None,
            tag("p", "The prompt was not recorded.", class_="quiet") if group["prompt"] is None else None if whole else quoted(group["prompt"], group["prompt_cut"]),
            tag("p", "The data's answer: ", tag("b", group["answer"], dir="auto"), class_="gold") if group["answer"] is not None else None,
            tag("div", [_completion(c, i) for i, c in enumerate(drawn, 1)], class_="beside"),
            tag("p", f"{units.many(group['more'], 'completion')} more left out to keep this file small.", class_="quiet") if group["more"] else None),
        class_="group", open=first,
    )  # fmt: skip


def _completion(c: Row, number: int) -> Markup:
    total = "no reward" if c["total"] is None else f"reward {units.plain(c['total'])}"
    advantage = None if c["advantage"] is None else units.signed(c["advantage"])
    kind = "" if not c["advantage"] else "correct" if c["advantage"] > 0 else "wrong"
    finish = {"length": "cut at the limit", "stop": "ended by itself"}.get(c["finish"], c["finish"] or "how it ended is not known")
    parts = ", ".join(f"{name} {'unknown' if value is None else units.plain(value)}" for name, value in c["rewards"].items())
    return tag(
        "div",
        tag("p", tag("b", f"{number}. {total}"), join(", advantage ", tag("span", advantage, class_=f"mark {kind}")) if advantage else None,
            (f"; {parts}" if len(c["rewards"]) > 1 else "") + f"; {units.tokens(c['tokens'])}, {finish}" + ("; no gradient" if c["live"] is False else ""),
            class_="where"),
        quoted(c["text"], c["cut"]),
    )  # fmt: skip
