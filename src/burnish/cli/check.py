"""`burnish check`: what a recipe would do, without doing it."""

from __future__ import annotations

from typing import Annotated

import typer

from burnish.cli import reply
from burnish.config.check import Checked, EvalPlan, StagePlan
from burnish.config.check import check as check_recipe
from burnish.config.load import load
from burnish.config.provenance import Resolved

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value, such as stages.sft.train.steps=3."),
]


def check(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe, such as first_steps/quickstart, or a file.")],
    overrides: Overrides = None,
) -> None:
    """Check a recipe and show what it would do, without doing it."""
    resolved = load(recipe, overrides or ())
    checked = check_recipe(resolved)
    checked.refuse()
    given = {key: origin for key, origin in resolved.provenance.items() if origin != "default"}
    data = {**checked.to_json(), "recipe": resolved.recipe.model_dump(mode="json"), "given": given}
    reply(data, _page(recipe, resolved, checked))


def _page(name: str, resolved: Resolved, checked: Checked) -> str:
    recipe = resolved.recipe
    lines = [f"{recipe.name}: model {recipe.model}, dtype {recipe.dtype}, seed {recipe.seed}"]
    limits = {key: value for key, value in recipe.budget.model_dump().items() if value is not None}
    if limits:
        lines.append("  stops at  " + ", ".join(f"{value:g} {key}" for key, value in limits.items()))
    lines += [f"  stage  {plan.name}: {_stage(plan)}" for plan in checked.stages]
    lines += [f"  eval   {plan.name}: {_eval(plan)}" for plan in checked.evals]
    lines += [f"  note   {f.key}: {f.message}" for f in checked.findings]
    origins = list(resolved.provenance.values())
    overridden = sum(origin.startswith("--set") for origin in origins)
    default = origins.count("default")
    written = len(origins) - overridden - default
    lines.append(f"  values {written} from the recipe, {overridden} from --set, {default} by default")
    return "\n".join([*lines, f"Nothing is wrong, and nothing was run. To run it: burnish run {name}"])


def _stage(plan: StagePlan) -> str:
    rows = "rows of the file" if plan.rows is None else f"{plan.rows:,} rows"
    steps = "as many steps" if plan.steps is None else f"{plan.steps:,} steps"
    passes = "" if plan.epochs is None else f" = {plan.epochs:g} passes"
    tokens = "" if plan.tokens_at_most is None else f", at most {plan.tokens_at_most:,} tokens"
    held = f"; {plan.held_out:,} more are held out and judged on" if plan.held_out else ""
    return f"{plan.method}, {steps} of {plan.rows_per_step:,} rows over {rows}{passes}{tokens}{held}"


def _eval(plan: EvalPlan) -> str:
    rows = "all rows" if plan.rows is None else f"{plan.rows:,} rows"
    times = "the base model" if plan.times == 1 else f"{plan.times} models"
    tokens = "" if plan.sampled_tokens_at_most is None else f", at most {plan.sampled_tokens_at_most:,} sampled tokens"
    return f"{plan.source}, {rows} by {times}: {', '.join(plan.strategies)}{tokens}"
