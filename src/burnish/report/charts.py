"""Charts as inline SVG that stretch without stretching their text: x is a percentage of the width, y is in pixels.

Every chart says in words what it shows (`role="img"` with a label); every mark carries its numbers as a tooltip. Colours and
strokes come from classes of the style sheet, so that they follow the reader's light or dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from burnish.report import units
from burnish.report.frontier import cost
from burnish.report.markup import Child, Markup, join, tag

WIDE = 1000  # user units across a line; stretched to the width of the page
LETTER, LINE = 6.4, 13  # pixels of a label's letter and line, for placing
NARROWEST = 230  # pixels of the narrowest plot labels are placed for: a telephone of 320 less the margins
LONGEST = 28  # letters of a name in a chart; the tooltip has all of them
Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """Values to 0..1. A scale without extent puts everything in the middle."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        if self.low == self.high:
            return 0.5
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values inside the scale: steps of 1, 2 or 5; on a logarithm 1, 2, 5 of each decade."""
        if self.low == self.high:
            return [self.low]
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                found = [d * 10.0**e for e in decades for d in digits if self.low <= d * 10.0**e <= self.high]
                if len(found) <= most + 1:
                    return found
            return found[:: -(-len(found) // most)]
        rough = (self.high - self.low) / most
        step = 10.0 ** math.floor(math.log10(rough))
        step *= next(m for m in (1, 2, 5, 10) if m * step >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def share_scale(values: Sequence[float]) -> Scale:
    """From 0 to the first round share that holds every value."""
    highest = max(values, default=1.0)
    return Scale(0.0, next(top for top in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0) if top >= min(highest, 1.0)))


def fitted(values: Sequence[float], *, zero: bool = False) -> Scale:
    """A linear scale around the values with a little room, from 0 where asked and where nothing is negative."""
    low, high = min(values), max(values)
    if zero and low >= 0:
        low = 0.0
    room = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low if low == 0 and zero else low - room, high + room)


def _x(share: float) -> str:
    return f"{100 * share:.3f}%"


def _word(x: str | float, y: float, words: str, *, anchor: str = "start", class_: str = "label", dx: float | None = None) -> Markup:
    return tag("text", words, x=x, y=round(y, 1), dx=dx, text_anchor=anchor, class_=class_)


def short(name: str, longest: int = LONGEST) -> str:
    """A name that fits into a chart."""
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _svg(height: float, label: str, class_: str, *children: Child) -> Markup:
    return tag("svg", *children, class_=f"chart {class_}", width="100%", height=round(height), role="img", aria_label=label)


def _vertical_grid(scale: Scale, height: float, say: Callable[[float], str], most: int = 5) -> Markup:
    """Upright lines with their values below."""
    marks: list[Markup] = []
    for tick in scale.ticks(most):
        at = scale.at(tick)
        anchor = "start" if at < 0.03 else "end" if at > 0.97 else "middle"
        marks.append(tag("line", x1=_x(at), x2=_x(at), y1=0, y2=height, class_="grid"))
        marks.append(_word(_x(at), height + 16, say(tick), anchor=anchor, class_="tick"))
    return join(*marks)


def _level_grid(scale: Scale, height: float, say: Callable[[float], str], most: int = 4) -> Markup:
    """Level lines with their values in the left margin."""
    marks: list[Markup] = []
    for tick in scale.ticks(most):
        y = round(height * (1 - scale.at(tick)), 1)
        marks.append(tag("line", x1=0, x2="100%", y1=y, y2=y, class_="grid"))
        marks.append(_word(0, y + 4, say(tick), anchor="end", class_="tick", dx=-8))
    return join(*marks)


# ---- lines ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A named series. `dots` marks every point; the name stands beside the last one."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    class_: str
    dots: bool = False


def curve(
    lines: Sequence[Line], *, label: str, height: float, resumed: Sequence[int] = (), zero: bool = False, x_name: str = "step",
    rule: float | None = None, log: bool = False,
) -> Markup:  # fmt: skip
    """Lines over steps. A value that is None is a gap, and a resume a dashed upright line.

    rule  a level to hold the lines against, which the scale always holds; log: a logarithmic scale, with what is not
          above 0 at its foot
    """
    known = [(x, y) for line in lines for x, y in zip(line.x, line.y) if y is not None]
    if not known:
        return Markup("")
    values = [y for _, y in known] + ([] if rule is None else [rule])
    above = [y for y in values if y > 0]
    across = Scale(min(x for x, _ in known), max(x for x, _ in known))
    up = Scale(min(above) / 1.5, max(above) * 1.5, log=True) if log and above else fitted(values, zero=zero)
    paths: list[Markup] = []
    dots: list[Markup] = []
    names: list[tuple[float, float, Line]] = []
    for line in lines:
        pieces: list[list[str]] = [[]]
        last: tuple[float, float] | None = None
        for x, y in zip(line.x, line.y):
            if y is None:
                pieces.append([])
                continue
            at, down = across.at(x), round(height * (1 - up.at(max(y, up.low) if up.log else y)), 2)
            last = (at, down)
            pieces[-1].append(f"{WIDE * at:.2f},{down}")
            if line.dots:
                said = tag("title", f"{line.name}, {x_name} {units.whole(x)}: {units.plain(y)}")
                dots.append(tag("circle", said, cx=_x(at), cy=down, r=3.5, class_=f"dot {line.class_}"))
        for piece in (p for p in pieces if p):
            points = piece * 2 if len(piece) == 1 else piece
            paths.append(tag("polyline", points=" ".join(points), class_=f"line {line.class_}", vector_effect="non-scaling-stroke"))
        if last:
            names.append((*last, line))
    stretched = tag(
        "svg", *paths, x=0, y=0, width="100%", height=round(height), viewBox=f"0 0 {WIDE} {round(height)}", preserveAspectRatio="none",
        class_="stretched",
    )  # fmt: skip
    marks = [
        join(tag("line", tag("title", f"resumed after step {step}"), x1=_x(across.at(step)), x2=_x(across.at(step)), y1=0, y2=height, class_="resume"),
             _word(_x(across.at(step)), 10, "resumed", class_="note", dx=4))
        for step in resumed if across.low <= step <= across.high
    ]  # fmt: skip
    if rule is not None:
        level = round(height * (1 - up.at(rule)), 1)
        marks.append(tag("line", tag("title", f"at {_axis_number(rule)}"), x1=0, x2="100%", y1=level, y2=level, class_="rule"))
    labels: list[Markup] = []
    if len(lines) > 1:
        free = height + 14
        for _, y, line in sorted(names, key=lambda n: -n[1]):  # from the lowest up, none over the one before
            free = min(y + 4, free - 14)
            labels.append(_word("100%", max(10, free), line.name, dx=10, class_=f"label {line.class_}"))
    grid = join(_level_grid(up, height, _axis_number), _vertical_grid(across, height, units.whole, 6))
    return _svg(height + 22, label, "curve named" if labels else "curve", grid, *marks, stretched, *dots, *labels)


def _axis_number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) <= 1e-3 or abs(value) >= 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", units.MINUS)
    return f"{value:.6g}".replace("-", units.MINUS)


# ---- accuracies -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dot:
    """One measured share with its interval."""

    stage: str
    strategy: str
    value: float
    interval: Sequence[float]
    n: int
    oracle: bool
    class_: str


def dots(groups: Sequence[tuple[str, Sequence[Dot]]], scale: Scale, *, label: str) -> Markup:
    """Accuracies, one line a stage, grouped by strategy: a dot with its interval as a whisker, its value beside it."""
    marks: list[Markup] = []
    y = 6.0
    for name, group in groups:
        y += 12
        marks.append(_word(0, y, short(name), class_="name oracle" if any(d.oracle for d in group) else "name"))
        y += 2
        for dot in group:
            y += 15
            low, high, at = (scale.at(v) for v in (*dot.interval, dot.value))
            said = f"{dot.strategy}, {dot.stage}: {units.percent(dot.value)}, 95 % interval {units.interval(dot.interval)}, n = {units.whole(dot.n)}"
            kind = f"{dot.class_}{' oracle' if dot.oracle else ''}"
            marks.append(tag("line", x1=_x(low), x2=_x(high), y1=y, y2=y, class_=f"whisker {kind}"))
            marks.append(tag("circle", tag("title", said), cx=_x(at), cy=y, r=4.5, class_=f"dot {kind}"))
            right = high < 0.8
            marks.append(
                _word(_x(high if right else low), y + 4, units.percent(dot.value), anchor="start" if right else "end", dx=8 if right else -8,
                      class_=f"value {kind}")
            )  # fmt: skip
        y += 14
    return _svg(y + 22, label, "dots", _vertical_grid(scale, y, lambda v: f"{100 * v:.0f} %"), *marks)


# ---- cost and accuracy ----------------------------------------------------------------------------------------------


def frontier(points: Sequence[Row], classes: dict[str, str], scale: Scale, *, axis: str, label: str, height: float = 250) -> Markup:
    """Accuracy against cost per question; the line joins the points that no other one beats at their price or below."""
    shown = sorted((p for p in points if p[axis]), key=lambda p: (p[axis], -p["accuracy"]))
    if not shown:
        return Markup("")
    costs = [p[axis] for p in shown]
    log = max(costs) / min(costs) > 4
    room = 1.35 if log else 1.0
    across = Scale(min(costs) / room, max(costs) * room, log=True) if log else fitted(costs)
    places = [(across.at(p[axis]), height * (1 - scale.at(p["accuracy"]))) for p in shown]
    marks: list[Markup] = []
    best = [place for p, place in zip(shown, places) if p["on_frontier"]]
    steps = [f"{WIDE * x:.2f},{y:.2f}" for x, y in best]
    for p, (x, y) in zip(shown, places):
        low, high = (height * (1 - scale.at(v)) for v in p["interval"])
        said = (
            f"{p['strategy']}, {p['stage']}: {units.percent(p['accuracy'])} ({units.interval(p['interval'])}) "
            f"for {cost(p[axis], axis)} a question"
        )
        kind = classes[p["stage"]]
        marks.append(tag("line", x1=_x(x), x2=_x(x), y1=round(low, 2), y2=round(high, 2), class_=f"whisker {kind}"))
        marks.append(tag("circle", tag("title", said), cx=_x(x), cy=round(y, 3), r=4.5, class_=f"dot {kind}"))
    ranked = sorted(zip(shown, places), key=lambda each: (not each[0]["best_buy"], not each[0]["on_frontier"]))  # who is named first
    named = [(short(p["strategy"]), f"{classes[p['stage']]}{' buy' if p['best_buy'] else ''}", x, y) for p, (x, y) in ranked]
    labels = _placed(named, best, height)
    stretched = tag(
        "svg", tag("polyline", points=" ".join(steps), class_="line front", vector_effect="non-scaling-stroke"), x=0, y=0, width="100%",
        height=round(height), viewBox=f"0 0 {WIDE} {round(height)}", preserveAspectRatio="none", class_="stretched",
    )  # fmt: skip
    grid = join(
        _level_grid(scale, height, lambda v: f"{100 * v:.0f} %", 5),
        _vertical_grid(across, height, units.count, 4),
    )
    return _svg(height + 22, label, "frontier", grid, stretched, *marks, *labels)


def _placed(names: Sequence[tuple[str, str, float, float]], front: Sequence[tuple[float, float]], height: float) -> list[Markup]:
    """Each name beside its point, where it covers neither another name nor a point in the narrowest plot; else left out.

    A place that also leaves the line of the frontier free is preferred.
    """
    taken = [(NARROWEST * x - 6, y - 6, NARROWEST * x + 6, y + 6) for _, _, x, y in names]
    line = [
        (NARROWEST * (a + (b - a) * t / 24), c + (d - c) * t / 24) for (a, c), (b, d) in pairwise(front) for t in range(25)
    ]  # fmt: skip
    made = []
    for i, (name, kind, x, y) in enumerate(names):
        wide, centre = LETTER * len(name), NARROWEST * x
        places = [
            (anchor, left, down, dx, (left, down - LINE / 2, left + wide, down + LINE / 2))
            for down, gap in ((y, 9), (y - 13, 3), (y + 13, 3))
            for anchor, left, dx in (("start", centre + gap, gap), ("end", centre - gap - wide, -gap), ("middle", centre - wide / 2, 0))
            if down != y or anchor != "middle"
        ]  # fmt: skip
        free = [
            p for p in places
            if p[4][0] >= 2 and p[4][2] <= NARROWEST + 8 and p[4][1] >= -8 and p[4][3] <= height + 6
            and not any(_meet(p[4], other) for j, other in enumerate(taken) if j != i)
        ]  # fmt: skip
        clear = [p for p in free if not any(p[4][0] < px < p[4][2] and p[4][1] < py < p[4][3] for px, py in line)]
        for anchor, _, down, dx, box in (clear or free)[:1]:
            taken.append(box)
            made.append(_word(_x(x), down + 4, name, anchor=anchor, dx=dx, class_=f"label {kind}"))
    return made


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# ---- bars -----------------------------------------------------------------------------------------------------------


def bar(share: float, label: str) -> Markup:
    """A bar inside a table cell; its number stands beside it, so it is hidden from screen readers."""
    return tag(
        "svg", tag("rect", tag("title", label), x=0, y=3, width=_x(min(1.0, max(0.0, share))), height=8, class_="bar"),
        width="100%", height=14, class_="bar-chart", aria_hidden="true",
    )  # fmt: skip
