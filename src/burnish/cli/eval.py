"""`burnish eval`: how well a model answers, by which strategy, at what cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from burnish.cli import reply, wants_json
from burnish.core.errors import ConfigError

if TYPE_CHECKING:
    from burnish.config.schema import Recipe
    from burnish.train.log import Progressing


def eval(  # the verb's name
    model: Annotated[str, typer.Argument(help="A bundled model, a folder or a hub id; with --engine the server's name for it.")],
    task: Annotated[str | None, typer.Option(help="A task, such as sums.")] = None,
    file: Annotated[str | None, typer.Option(help="Or a .jsonl file of questions and answers.")] = None,
    level: Annotated[list[int] | None, typer.Option(help="Levels of the task; may be repeated.")] = None,
    rows: Annotated[int | None, typer.Option(help="How many questions.")] = None,
    strategy: Annotated[list[str] | None, typer.Option(help="greedy, vote:16, best_of:16@logprob, pass@16; may be repeated.")] = None,
    temperature: Annotated[float, typer.Option(help="Of the strategies that sample.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of questions and samples.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    engine: Annotated[str | None, typer.Option(metavar="URL", help="Sample from an OpenAI-compatible server, such as http://localhost:8000.")] = None,
    api: Annotated[str, typer.Option(help="Of --engine: auto, vllm, completions, or chat (the server renders prompts).")] = "auto",
    tokenizer: Annotated[str | None, typer.Option(help="Of --engine: a folder or hub id, where the model's name is none.")] = None,
    weights_version: Annotated[str, typer.Option(help="Of --engine: your name for the weights, kept with the results.")] = "",
    in_flight: Annotated[int, typer.Option(help="Of --engine: most requests at once.")] = 64,
) -> None:
    """Evaluate a model on a task or a file, with intervals and spend."""
    from burnish.config.load import resolve
    from burnish.config.provenance import Document
    from burnish.engines.connect import Api
    from burnish.train.log import Progressing, count

    strategies = list(strategy or ["greedy"])
    judged: dict[str, object] = {"strategies": strategies, "max_new_tokens": max_new_tokens, "temperature": temperature}
    judged |= {k: v for k, v in {"task": task, "file": file, "levels": level, "rows": rows}.items() if v is not None}
    if task and rows is None:
        judged["rows"] = 200
    recipe = resolve(
        Document("burnish eval", data={"burnish": 1, "name": "eval", "model": model, "seed": seed, "dtype": dtype, "device": device, "evals": {"eval": judged}})
    ).recipe
    progress = Progressing(wants_json())
    if engine is None:
        given = {"--api": api != "auto", "--tokenizer": tokenizer, "--weights-version": weights_version, "--in-flight": in_flight != 64}
        for option in (name for name, value in given.items() if value):
            raise ConfigError("says how a server is asked, and there is none", where=option, remedy="add --engine URL")
        result = _local(recipe, progress)
    else:
        if dtype != "auto":
            raise ConfigError("the server has loaded the model in a dtype of its own", where="--dtype", remedy="leave it out")
        if device != "auto":
            raise ConfigError("the server has its own device", where="--device", remedy="leave it out")
        if api not in get_args(Api):
            raise ConfigError(f"{api!r} given, wanted one of {', '.join(get_args(Api))}", where="--api")
        options = {"api": api, "tokenizer": tokenizer, "version": weights_version, "in_flight": in_flight}
        result = _remote(recipe, progress, engine, options)
    lines = [f"{'strategy':<22}{'accuracy':>9}  {'95 % interval':<16}{'n':>6}{'tokens/question':>17}{'FLOP/question':>15}"]
    for row in result["strategies"]:
        low, high = row["interval"]
        name, n = row["strategy"] + (" (oracle)" if row["oracle"] else ""), result["n"]
        spend = row["spend"]
        lines.append(
            f"{name:<22}{row['accuracy']:>9.1%}  {f'{low:.1%} to {high:.1%}':<16}{n:>6}{spend['sampled_tokens'] / n:>17.1f}"
            f"{'unknown' if spend['executed_flops'] is None else count(spend['executed_flops'] / n):>15}"
        )
    reply(result, "\n".join(lines + _notes(result.get("engine"))))


def _local(recipe: Recipe, progress: Progressing) -> dict[str, Any]:
    from burnish.judges import judges
    from burnish.models.load import load_policy

    policy = load_policy(recipe.model, dtype=recipe.dtype, device=recipe.device)
    (judge,) = judges(recipe, policy, [])
    progress.begin(f"eval {judge.task.name}", judge.size)
    result = judge(policy, "eval", progress.advance, lambda: None)
    progress.end()
    return result


def _remote(recipe: Recipe, progress: Progressing, url: str, options: dict[str, Any]) -> dict[str, Any]:
    """As local, with who answered, and FLOPs unknown: a server says nothing of its model's shape."""
    from burnish.judges import Questions, remote_engine

    engine, chat = remote_engine(url, recipe.model, **options)
    ((name, judged),) = recipe.evals.items()
    judge = Questions.of(name, judged, recipe.seed, chat)
    progress.begin(f"eval {judge.task.name}", judge.size)
    result = judge.ask(engine, "eval", progress.advance, lambda: None)
    progress.end()
    unknown = {"useful_flops": None, "executed_flops": None}
    rows = [row | {"spend": row["spend"] | unknown} for row in result["strategies"]]
    return result | {"strategies": rows, "spend": result["spend"] | unknown, "engine": engine.describe()}


def _notes(engine: dict[str, Any] | None) -> list[str]:
    if engine is None:
        return []
    lines = [f"answered by {engine['weights_version']} at {engine['url']} ({engine['kind']}, prompts as {engine['prompts']})"]
    if estimated := engine["usage"].get("estimated"):
        lines.append(f"the tokens of {estimated} of {sum(engine['usage'].values())} completions are estimates: the server did not report them")
    if engine["retried"]:
        lines.append(f"{engine['retried']} requests were sent again; what the server may have done for nothing is in the spend")
    return lines
