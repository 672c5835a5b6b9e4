"""`burnish estimate`: what a run would take, without running it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from burnish.cli import reply, wants_json
from burnish.cli.check import Overrides


def estimate(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe, such as first_steps/quickstart, or a file.")],
    overrides: Overrides = None,
) -> None:
    """Estimate a recipe's FLOPs, tokens, memory and time on this machine. Loads model and data; trains nothing."""
    from burnish.estimate import estimate as estimate_recipe
    from burnish.train.log import Progressing

    progress = Progressing(wants_json())
    found = estimate_recipe(recipe, overrides or (), lambda what: progress.say(f"measuring {what}"))
    reply(found, _page(found))


def _page(found: Mapping[str, Any]) -> str:
    from burnish.train.log import count

    machine = found["machine"]
    speeds = ", ".join(f"{name} {value:.0f} GFLOP/s" for name, value in machine["gflops"].items())
    lines = [f"{found['recipe']}: model {found['model']}, {found['dtype']}; this machine: {machine['threads']} threads, products at {speeds}", ""]
    lines.append(f"  {'stage':<10}{'phase':<14}{'time':>9}{'tokens':>10}{'FLOPs useful':>15}{'executed':>11}{'speed':>13}{'of peak':>9}")
    notes: dict[str, str] = {}
    for stage in found["stages"]:
        for phase in stage["phases"]:
            speed = "" if phase["gflops"] is None else f"{phase['gflops']:.1f} GF/s"
            share = "" if phase["efficiency"] is None else f"{phase['efficiency']:.0%}"
            lines.append(
                f"  {stage['name']:<10}{phase['name']:<14}{_time(phase['seconds']):>9}{count(phase['tokens']) if phase['tokens'] else '':>10}"
                f"{count(phase['useful_flops']) if phase['useful_flops'] else '':>15}"
                f"{count(phase['executed_flops']) if phase['executed_flops'] else '':>11}{speed:>13}{share:>9}"
            )
            if phase["assumed"]:
                notes[f"{stage['name']}/{phase['name']}"] = phase["assumed"]
    total = found["total"]
    lines.append(
        f"  {'in total':<24}{_time(total['seconds']):>9}{count(total['tokens']):>10}{count(total['useful_flops']):>15}{count(total['executed_flops']):>11}"
    )
    lines += ["", "  Peak memory above what importing the libraries takes:"]
    for stage in found["stages"]:
        items = ", ".join(f"{name} {_bytes(size)}" for name, size in stage["memory"].items() if size)
        lines.append(f"  {stage['name']:<10}{_bytes(stage['peak_bytes']):>9}  {items}")
        if stage["plan"]:
            lines.append(f"  {'':<21}{stage['plan']}")
    lines.append(f"  {'in total':<10}{_bytes(total['peak_bytes']):>9}  and {_bytes(found['baseline_bytes'])} of libraries")
    lines += [f"  assumed: {where}: {what}" for where, what in notes.items()]
    return "\n".join(lines)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _bytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
