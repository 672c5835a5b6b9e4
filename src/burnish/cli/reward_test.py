"""`burnish reward-test`: what rewards say of stored completions and of the gold answers, before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from burnish.cli import reply
from burnish.cli.check import Overrides
from burnish.core.errors import ConfigError

if TYPE_CHECKING:
    from burnish.config.schema import Stage
    from burnish.core.records import Scored
    from burnish.rewards.samples import Samples
    from burnish.rewards.scoring import Breakdown, Rewards

ROWS = 64
DISTINCT = 5  # values that are counted one by one


def reward_test(
    recipe: Annotated[str | None, typer.Argument(help="A recipe with rewards: packaged, or a file.")] = None,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Which stage of the recipe (the first with rewards).")] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(help="Instead of a recipe: number, '{name: regex, pattern: ...}' or file.py:function; may be repeated."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Gold answers of a task, such as sums.")] = None,
    level: Annotated[list[int] | None, typer.Option(help="Levels of the task; may be repeated.")] = None,
    file: Annotated[str | None, typer.Option(help="Gold answers of a file: prompt with completion or answer.")] = None,
    completions: Annotated[str | None, typer.Option(help="A .jsonl file of prompt, completion and columns.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows of each.")] = ROWS,
    gold: Annotated[str, typer.Option(help="The column of a file that holds the gold answer.")] = "answer",
    full: Annotated[float, typer.Option(help="What a gold answer must score at least.")] = 1.0,
) -> None:
    """Run rewards over stored completions and over gold answers, which must score full marks."""
    from burnish.rewards import samples
    from burnish.rewards.build import build

    if (recipe is None) == (not reward):
        raise ConfigError("give a recipe, or --reward, and not both", where="burnish reward-test", remedy="burnish reward-test --reward number --task sums")
    if task and file:
        raise ConfigError("both --task and --file", where="burnish reward-test", remedy="give one of the two")
    if level and not task:
        raise ConfigError("--level is of a --task", where="burnish reward-test", remedy="add --task sums")
    kept = samples.stored(completions, rows) if completions else None
    if recipe is None:
        block: Any = _blocks(reward or [])
        source = None
    else:
        source = _stage(recipe, overrides or (), stage)
        block = source.rewards
    if recipe is None and (overrides or stage):
        raise ConfigError("--set and --stage are of a recipe", where="burnish reward-test", remedy="remove them")
    right = _gold(samples, source, kept, task, level, file, rows, gold)
    with build(block, task) as rewards:
        sets = {"gold": right}
        if others := samples.answers_of_others(right):
            sets["others"] = others
        if kept:
            sets["stored"] = kept
        found = {name: rewards.score(s.prompts, s.completions, s.columns, s.groups) for name, s in sets.items()}
        held = samples.held_against_gold(rewards.components)
        failing = samples.short_of_full(rewards, right, found["gold"], full)
        data = {name: _plain(sets[name], scores) for name, scores in found.items()}
        data |= {"held_against_gold": held, "full_marks": full, "failing": [list(f) for f in failing]}
        if failing:
            raise samples.refuse(right, failing, full)
        blocks = [_table(name, sets[name], found[name], rewards) for name in found]
        reply(data, "\n\n".join([*blocks, _verdict(rewards, held, found, full)]))


def _blocks(texts: Sequence[str]) -> list[Any]:
    """Each --reward: a name, or a mapping in YAML."""
    from burnish.config.provenance import read

    return [read(text, "--reward").data if text.lstrip().startswith("{") else text for text in texts]


def _stage(recipe: str, overrides: Sequence[str], name: str | None) -> Stage:
    from burnish.config.load import load
    from burnish.core.table import did_you_mean

    loaded = load(recipe, overrides).recipe
    with_rewards = [s for s in loaded.stages if s.rewards is not None]
    if not with_rewards:
        raise ConfigError("no stage of it has rewards", where=recipe, remedy="try one alone: --reward number --task sums")
    for s in with_rewards:
        if name in (None, s.name):
            return s
    names = [s.name for s in with_rewards]
    message = f"no stage {name!r} with rewards.{did_you_mean(str(name), names)}"
    raise ConfigError(message, where="--stage", remedy=f"there are: {', '.join(names)}")


def _gold(
    samples: Any, stage: Stage | None, kept: Samples | None, task: str | None, level: list[int] | None, file: str | None, rows: int, gold: str
) -> Samples:
    """The gold answers: of --task or --file, else of the recipe's data, else of the stored completions."""
    if task:
        return samples.gold_of_task(task, level, rows)
    if file:
        return samples.gold_of_file(file, {}, rows, gold)
    if stage is not None:
        found: Samples | None = None
        for source in stage.data:
            most = min(rows, source.rows or source.limit or rows)
            if source.task:
                one = samples.gold_of_task(source.task, source.levels, most, fold=source.fold, target=source.target)
            else:
                one = samples.gold_of_file(source.file, source.columns, most, gold)
            found = one if found is None else found + one
        assert found is not None  # a stage has data
        return found
    if kept is not None:
        return samples.gold_in(kept, gold)
    raise ConfigError("nothing to score", where="burnish reward-test", remedy="add --task sums, --file rows.jsonl or --completions out.jsonl")


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _plain(given: Samples, scores: Breakdown) -> dict[str, Any]:
    values = {title: [one.to_json() for one in found] for title, found in scores.components.items()}
    total = [one.to_json() for one in scores.total]
    return {"rows": given.where, "shape": given.shape, "components": values, "total": total, "stats": scores.stats, "tracebacks": scores.tracebacks}


def _table(name: str, given: Samples, scores: Breakdown, rewards: Rewards) -> str:
    titled = {"gold": "gold answers", "others": "gold answers of other rows", "stored": "stored completions"}
    what = titled[name]
    lines = [f"{len(given.completions)} {what}, {len(set(given.groups))} prompts; functions get {given.shape}"]
    titles = [*scores.components, "total"]
    wide = max(map(len, titles))
    lines.append(f"  {'reward':<{wide}}{'weight':>8}{'mean':>9}{'std':>9}{'abstain':>9}{'errors':>8}{'timeouts':>10}{'ms':>8}  values")
    for title in titles:
        found = scores.components.get(title, scores.total)
        row = scores.stats["components"].get(title, scores.stats["total"])
        weight = f"{rewards.weights[title]:g}" if title in rewards.weights else ""
        errors = row["reward_crashes"] + row["reward_invalid"] + row["reward_infra"]
        mean, std = ("-" if row[key] is None else f"{row[key]:.3f}" for key in ("reward_mean", "reward_std"))
        cells = f"{weight:>8}{mean:>9}{std:>9}{row['reward_abstained']:>9.0%}{errors:>8}{row['reward_timeouts']:>10}"
        lines.append(f"  {title:<{wide}}{cells}{1000 * row['reward_seconds']:>8.0f}  {_distribution(found)}")
    lines += [f"  note  {text}" for text in scores.stats["warnings"]]
    for title, trace in scores.tracebacks.items():
        lines += [f"  the first traceback of {title}:", *(f"    {line}" for line in trace.rstrip().splitlines())]
    return "\n".join(lines)


def _distribution(found: Sequence[Scored]) -> str:
    """Each value with how often it came, or the quartiles where there are many."""
    values = sorted(one.value for one in found if one.value is not None)
    if not values:
        return "none"
    counts = Counter(values)
    if len(counts) <= DISTINCT:
        return ", ".join(f"{value:g} x {n}" for value, n in sorted(counts.items()))
    return "quartiles " + " ".join(f"{values[round(q * (len(values) - 1) / 4)]:.3g}" for q in range(5))


def _verdict(rewards: Rewards, held: Sequence[str], found: Mapping[str, Breakdown], full: float) -> str:
    if not held:
        return "No reward here reads a column of the data, so none was held against gold."
    said = [f"Gold scores full marks from {', '.join(held)}."]
    if rest := [title for title in rewards.weights if title not in held]:
        said.append(f"Not held against gold, as they name no column: {', '.join(rest)}.")
    for title in held if "others" in found else ():
        scores = [one.value for one in found["others"].components[title] if one.value is not None]
        if scores and min(scores) >= full:
            said.append(f"{title} gives the answers of other rows full marks too: it tells nothing apart.")
    return " ".join(said)
