"""Keys of a recipe that cannot both be meant, each with its arithmetic and what to type instead."""

from __future__ import annotations

import os
from collections.abc import Iterator

from burnish.config.faults import Key
from burnish.config.schema import LIKELIHOOD, Eval, Recipe, Rewards, Rollouts, Source, Stage
from burnish.core.grammar import parse
from burnish.core.signature import Inputs
from burnish.core.table import RowDescription, describe_row, did_you_mean

OF_POLICY_GRADIENTS = ("updates", "passes", "curriculum", "screen", "refill", "partial", "overlong_cushion", "old_logprobs", "stop_after_dead_rounds")  # of rollouts
Problem = tuple[Key, str, str | None]  # the key at fault, what is wrong, what to type instead


def contradictions(recipe: Recipe) -> Iterator[Problem]:
    """Every contradiction of a recipe. Opens none of the files it names."""
    if not recipe.stages and not recipe.evals:
        yield (), "neither stages nor evals: there is nothing to run", "add a stage, an eval, or both"
    for i, stage in enumerate(recipe.stages):
        first = next(j for j, other in enumerate(recipe.stages) if other.name == stage.name)
        if first != i:
            message = f"stage {i + 1} has the name {stage.name!r} of stage {first + 1}; each has its own folder"
            yield ("stages", i, "name"), message, f"type name: {stage.name}-{i + 1}"
        if stage.name == "base":
            message = "'base' is what reports call the model before the first stage"
            yield ("stages", i, "name"), message, "type another name"
        yield from _stage(recipe, ("stages", i), stage)
    for name, judged in recipe.evals.items():
        if name in recipe.held_out:
            message = (
                f"{name!r} is what the likelihood of the rows held out of stage {recipe.held_out[name]!r} is called"
            )
            yield ("evals", name), message, "type another name"
        yield from _eval(("evals", name), judged)
        for i, stage in enumerate(recipe.stages):
            for j, source in enumerate(stage.data):
                yield from _leak(("stages", i, "data", j), stage.name, source, name, judged)
    if primary := recipe.report.primary:
        if primary.eval not in {**recipe.evals, **recipe.held_out}:
            yield ("report", "primary", "eval"), *_no_eval(primary.eval, recipe)
        else:
            judged = recipe.evals.get(primary.eval)
            has = judged.strategies if judged else (LIKELIHOOD,)
            if primary.strategy not in has:
                message = f"{primary.strategy!r} is not a strategy of eval {primary.eval!r}, which has {', '.join(has)}"
                yield ("report", "primary", "strategy"), message, f"type one of: {', '.join(has)}"


def draws(row: RowDescription) -> bool:
    """Whether a method draws its own completions: it takes rollouts, or is a point of the policy-gradient algebra."""
    return "rollouts" in row.inputs or {"advantage", "surrogate"} <= {p.name for p in row.parameters}


def _no_eval(name: str, recipe: Recipe) -> tuple[str, str | None]:
    known = [*recipe.evals, *recipe.held_out]
    return f"there is no eval {name!r}.{did_you_mean(name, known)} There are: {', '.join(known) or 'none'}", None


def _stage(recipe: Recipe, key: Key, stage: Stage) -> Iterator[Problem]:
    train, at = stage.train, (*key, "train")
    if train.steps is not None and train.epochs is not None:
        message = f"both steps ({train.steps}) and epochs ({train.epochs:g}): each says when to stop"
        yield (*at, "epochs"), message, "remove one of the two (on the command line: --set ...steps=null)"
    if train.steps is None and train.epochs is None:
        yield at, "neither steps nor epochs: the stage would do nothing", "add steps: 100 or epochs: 1"
    if train.validate_every is not None and train.validation_rows is None:
        message = "there are no rows to validate on: validation_rows is null"
        yield (*at, "validate_every"), message, "add validation_rows: 200, or remove validate_every"
    for j, source in enumerate(stage.data):
        yield from _source((*key, "data", j), source)
    rows, held = _most_rows(stage), train.validation_rows or 0
    if rows is not None and rows - held < train.batch_rows:
        less = f" less {held} held out for validation" if held else ""
        message = (
            f"a step takes {train.batch_rows} rows and the data has {rows}{less}: {rows - held} < {train.batch_rows}"
        )
        yield (*at, "batch_rows"), message, f"type batch_rows: {max(1, rows - held)} or less, or ask for more rows"
    row = describe_row("method", stage.method.name)
    takes = draws(row) or "rewards" in row.inputs
    yield from _rollouts(key, stage, draws(row))
    if "rounds" in stage.method.params:
        yield from _rounds(key, stage, stage.method.params["rounds"])
    yield from _critic(key, stage, row)
    if "max_kl" in {p.name for p in row.parameters}:  # it takes steps of its own
        yield from _own_step((*key, "train"), stage)
    if takes and stage.rewards is None:
        yield (*key, "method"), f"{stage.method.name!r} learns from rewards, and there are none", "add rewards: [number]"
    if stage.rewards is not None:
        if not takes:
            yield (*key, "rewards"), f"{stage.method.name!r} takes no rewards: they would do nothing", "remove rewards"
        yield from rewards_against(stage.rewards, (*key, "rewards"))
    for j, name in enumerate(stage.evaluate or ()):
        if name not in {**recipe.evals, **recipe.held_out}:
            yield (*key, "evaluate", j), *_no_eval(name, recipe)
        elif name in (stage.evaluate or ())[:j]:
            yield (*key, "evaluate", j), f"eval {name!r} is named twice", "name it once"


def _rollouts(key: Key, stage: Stage, drawing: bool) -> Iterator[Problem]:
    """What a method that draws its own completions can and cannot be told."""
    train, block = stage.train, stage.rollouts
    if not drawing:
        if block is not None:
            yield (*key, "rollouts"), f"{stage.method.name!r} draws no completions: they would do nothing", "remove rollouts"
        return
    if train.validation_rows is not None:
        message = f"{stage.method.name!r} has no loss on held-out rows: its rows have no completions"
        yield (*key, "train", "validation_rows"), message, "remove it, and judge by evals"
    if block is not None and block.overlong_cushion is not None and block.overlong_cushion > block.max_new_tokens:
        message = f"the cushion of {block.overlong_cushion} tokens is longer than the {block.max_new_tokens} of a completion"
        yield (*key, "rollouts", "overlong_cushion"), message, f"type {block.max_new_tokens} or less"
    if block is not None and block.refill and block.group_size == 1:
        message = "a group of 1 has nothing to differ in: every group would be drawn again"
        yield (*key, "rollouts", "refill"), message, "type refill: 0, or group_size: 2 or more"
    if block is not None and block.partial >= train.batch_rows:
        message = f"{block.partial} prompts are carried on from round to round, and a round has {train.batch_rows}: it might draw nothing"
        yield (*key, "rollouts", "partial"), message, f"type less than {train.batch_rows}"
    for name, part in (("curriculum", block and block.curriculum), ("screen", block and block.screen)):
        if part and part.low >= part.high:
            yield (*key, "rollouts", name, "low"), f"no pass rate is above {part.low:g} and below {part.high:g}", "type a lower low"
    course = block and block.curriculum
    if course and course.priority == "variance" and (course.low, course.high) != (0.0, 1.0):
        message = "low and high are of priority: band; the variance is largest at a pass rate of 1/2 by itself"
        yield (*key, "rollouts", "curriculum", "priority"), message, "remove low and high, or type priority: band"
    if block is not None and block.screen is not None and train.steps is None:
        message = "how many prompts are left is known only once their pass rates are measured, so epochs of them are not"
        yield (*key, "train"), message, "type steps: 60"
    if block is not None and "rounds" not in stage.method.params and train.batch_rows % block.updates:
        message = f"{train.batch_rows} prompts of a round cannot be split evenly over {block.updates} updates"
        yield (*key, "rollouts", "updates"), message, f"type a divisor of {train.batch_rows}"


def _rounds(key: Key, stage: Stage, rounds: int) -> Iterator[Problem]:
    """Of a method that fine-tunes on what it drew, a number of times."""
    train, block = stage.train, stage.rollouts
    if rounds < 1:
        yield (*key, "method", "rounds"), f"{rounds} rounds do nothing", "type 1 or more"
    elif train.steps is None:
        message = "how many rows a round keeps is known only once they are drawn, so epochs of them are not"
        yield (*key, "train"), message, "type steps: 60, shared evenly by the rounds"
    elif train.steps % rounds:
        message = f"{train.steps} steps cannot be shared evenly by {rounds} rounds"
        yield (*key, "train", "steps"), message, f"type steps: {rounds * max(1, round(train.steps / rounds))}"
    for name in OF_POLICY_GRADIENTS if block is not None else ():
        if getattr(block, name) != Rollouts.model_fields[name].default:
            message = f"{name} are of policy gradients; a round here is learned from in {train.steps} / {rounds} steps of batch_rows rows"
            yield (*key, "rollouts", name), message, f"remove {name}"


def _critic(key: Key, stage: Stage, row: RowDescription) -> Iterator[Problem]:
    """A critic for a method without values, and numbers of it that cannot be meant."""
    block, at = stage.critic, (*key, "critic")
    if block is None:
        return
    if not takes_values(stage.method.params.get("advantage"), row):
        yield at, f"{stage.method.name!r} takes no values: a critic would do nothing", "remove critic, or type method: ppo"
        return
    if stage.train.steps is not None and block.pretrain_steps >= stage.train.steps:
        message = f"{block.pretrain_steps} of {stage.train.steps} steps for the critic alone: the policy would never move"
        yield (*at, "pretrain_steps"), message, f"type less than {stage.train.steps}"
    if block.prune is not None and stage.rollouts is not None and stage.rollouts.stop:
        message = "rollouts that are drawn in chunks see no stop string that lies across two"
        yield (*at, "prune"), message, "remove rollouts.stop, or prune"
    most = (stage.rollouts or Rollouts()).max_new_tokens
    if block.prune is not None and block.prune.chunk_tokens >= most:
        message = f"completions end at {most} tokens, before the first look at {block.prune.chunk_tokens}: none would be cut"
        yield (*at, "prune", "chunk_tokens"), message, f"type less than {most}"


def takes_values(advantage: str | None, row: RowDescription) -> bool:
    """Whether a method, with the user's own advantage where given, wants a critic's value of every state."""
    published = {p.name: p.default for p in row.parameters}
    chosen = advantage or published.get("advantage")
    return chosen is not None and "value" in describe_row("advantage", chosen).inputs


def _own_step(key: Key, stage: Stage) -> Iterator[Problem]:
    """What an optimiser would read, and a step by a trust region does not."""
    fields = type(stage.train).model_fields
    for name in ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "clip_norm"):
        if getattr(stage.train, name) != fields[name].default:
            message = f"{stage.method.name!r} makes its own step, whose length max_kl limits: {name} would do nothing"
            yield (*key, name), message, f"remove {name}"
    if stage.train.learning_rate > 1:
        message = f"{stage.method.name!r} tries this part of its full step first, and {stage.train.learning_rate:g} is more than all of it"
        yield (*key, "learning_rate"), message, "type learning_rate: 1"


def rewards_against(block: Rewards, key: Key = ()) -> Iterator[Problem]:
    """Contradictions within a `rewards` block: names met twice, gates and routes that lead nowhere."""
    titles = [reward.title for reward in block.use]
    for j, reward in enumerate(block.use):
        if reward.title in titles[:j]:
            message = f"two rewards are called {reward.title!r}, and reports tell them apart by name"
            yield (*key, "use", j, "label"), message, f"add label: {reward.title}-{j + 1}"
        inputs = describe_row("reward", reward.name).inputs
        known = [n for n in (*inputs.required, *inputs.optional) if n not in ("prompts", "completions")]
        if inputs != Inputs() and not inputs.rest:
            for name in reward.columns:
                if name not in known:
                    message = f"{reward.name!r} takes no column {name!r}.{did_you_mean(name, known)}"
                    yield (*key, "use", j, "columns", name), message, f"it takes: {', '.join(known) or 'none'}"
    if block.steps is not None and not any("steps" in describe_row("reward", r.name).inputs for r in block.use):
        message = "no reward here takes steps: they would do nothing"
        yield (*key, "steps"), message, "remove steps, or use a process reward such as task_steps"
    if "gate" in block.combine.params:
        gate = block.combine.params["gate"]
        if gate not in titles:
            message = f"{gate!r} is not one of the rewards.{did_you_mean(str(gate), titles)}"
            yield (*key, "combine", "gate"), message, f"type one of: {', '.join(titles)}"
        elif len(titles) == 1:
            yield (*key, "combine"), "there is one reward: the gate would gate nothing", "type combine: sum"
    if block.route is None or block.route.rewards is None:
        return
    for value, names in block.route.rewards.items():
        for j, name in enumerate(names):
            if name not in titles:
                message = f"{name!r} is not one of the rewards.{did_you_mean(name, titles)}"
                yield (*key, "route", "rewards", value, j), message, f"type one of: {', '.join(titles)}"
        if not names:
            yield (*key, "route", "rewards", value), "no reward applies there: nothing could be learned", "name one"
    used = {name for names in block.route.rewards.values() for name in names}
    for j, title in enumerate(titles):
        if title not in used:
            yield (*key, "use", j), f"no route leads to {title!r}: it would do nothing", "add it to a route, or remove it"


def _one_origin(
    key: Key, of: Source | Eval, *, only_task: tuple[str, ...], only_file: tuple[str, ...]
) -> Iterator[Problem]:
    """Exactly one of task and file, and no key that belongs to the other."""
    if (of.task is None) == (of.file is None):
        both = of.task is not None
        yield key, "both task and file" if both else "neither task nor file", "give one of task: ... and file: ..."
        return
    levels = describe_row("task", of.task).facts.get("levels") if of.task else None
    if of.levels and len(set(of.levels)) < len(of.levels):
        yield (*key, "levels"), f"{list(of.levels)} names a level twice", "name each once"
    if of.levels and levels and (odd := sorted(set(of.levels) - set(levels))):
        known = ", ".join(map(str, levels))
        yield (*key, "levels"), f"{of.task!r} has no level {', '.join(map(str, odd))}; it has {known}", None
    if of.task is not None and of.rows is None:
        yield key, f"task {of.task!r} makes as many rows as asked for, and none are", "add rows: 500"
    kind, stray = ("file", only_task) if of.task is None else ("task", only_file)
    fields = type(of).model_fields
    for name in stray:
        if getattr(of, name) != fields[name].default:
            other = "task" if kind == "file" else "file"
            yield (*key, name), f"{name} is for a {other}, and this is a {kind}: it would do nothing", f"remove {name}"


def _source(key: Key, source: Source) -> Iterator[Problem]:
    yield from _one_origin(
        key,
        source,
        only_task=("levels", "rows", "fold", "target", "shots"),
        only_file=("format", "columns", "on_bad_row", "limit"),
    )


def _eval(key: Key, judged: Eval) -> Iterator[Problem]:
    yield from _one_origin(key, judged, only_task=("levels", "fold", "shots"), only_file=("columns",))
    task = describe_row("task", judged.task) if judged.task else None
    specs = [parse(text) for text in judged.strategies]
    drawing = [str(spec) for spec in specs if spec.name != "greedy"]
    for i, spec in enumerate(specs):
        at = (*key, "strategies", i)
        if spec in specs[:i]:
            yield at, f"{spec} is listed twice", "list it once"
        if task and spec.name == "vote" and task.facts.get("has_answer_key") is False:
            yield at, f"{judged.task!r} has no answer key to count votes by", "use best_of:16@rule or pass@16"
        if spec.scorer == "rule" and (task is None or task.facts.get("verifier_needs_gold", True)):
            message = f"the rule of {judged.task or judged.file!r} reads the gold answer, so {spec} could not be used to answer"
            yield at, message, f"type pass@{spec.n or 16}, which says that it is an oracle"
    choices = judged.temperature if isinstance(judged.temperature, tuple) else None
    at = (*key, "temperature")
    if drawing and 0 in (choices or (judged.temperature,)):
        n = parse(drawing[0]).n
        same = f"{n} samples at temperature 0 are {n} times the same text" if n else "at temperature 0 it is greedy"
        yield at, f"temperature 0 with {drawing[0]}: {same}", "type temperature: 0.7, or leave only greedy"
    if choices is not None:
        if not drawing:
            yield at, "greedy takes no temperature: there is nothing to choose", "type one number, or add a strategy"
        if judged.file is not None:
            yield at, "a file has no validation fold to choose a temperature on", "type one number"
        if judged.fold == "validation":
            yield at, "the temperature would be chosen on the fold it is judged on", "type one number, or fold: test"
        if len(set(choices)) < len(choices):
            yield at, f"{list(choices)} names a temperature twice", "name each once"
        if judged.validation_rows is None:
            yield at, "a list is chosen from on validation rows, and none are asked for", "add validation_rows: 200"
    elif judged.validation_rows is not None:
        message = f"validation_rows chooses among temperatures, and there is one: {judged.temperature:g}"
        yield (*key, "validation_rows"), message, "type temperature: [0.4, 0.7, 1.0], or remove validation_rows"


def _leak(key: Key, stage: str, source: Source, name: str, judged: Eval) -> Iterator[Problem]:
    if source.file and judged.file and os.path.realpath(source.file) == os.path.realpath(judged.file):
        message = f"stage {stage!r} trains on {source.file}, the file eval {name!r} is judged on"
        yield (*key, "file"), message, "split it into two files"
    if source.task and source.task == judged.task and source.fold == judged.fold:
        message = (
            f"stage {stage!r} trains on the {source.fold} fold of {source.task!r}, which eval {name!r} is judged on"
        )
        yield (*key, "fold"), message, "type fold: train"


def _most_rows(stage: Stage) -> int | None:
    """Rows of the stage's data at most, as far as the recipe says."""
    each = [source.rows if source.task else source.limit for source in stage.data]
    return None if None in each else sum(filter(None, each))
