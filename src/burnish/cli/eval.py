"""`burnish eval`: how well a model answers, by which strategy, at what cost."""

from __future__ import annotations

from typing import Annotated

import typer

from burnish.cli import reply, wants_json


def eval(  # the verb's name
    model: Annotated[str, typer.Argument(help="A bundled model, a folder or a hub id.")],
    task: Annotated[str | None, typer.Option(help="A task, such as sums.")] = None,
    file: Annotated[str | None, typer.Option(help="Or a .jsonl file of questions and answers.")] = None,
    level: Annotated[list[int] | None, typer.Option(help="Levels of the task; may be repeated.")] = None,
    rows: Annotated[int | None, typer.Option(help="How many questions.")] = None,
    strategy: Annotated[list[str] | None, typer.Option(help="greedy, vote:16, best_of:16@logprob, pass@16; may be repeated.")] = None,
    temperature: Annotated[float, typer.Option(help="Of the strategies that sample.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of questions and samples.")] = 0,
) -> None:
    """Evaluate a model on a task or a file, with intervals and spend."""
    from burnish.config.load import resolve
    from burnish.config.provenance import Document
    from burnish.train.log import Progressing, count

    strategies = list(strategy or ["greedy"])
    judged: dict[str, object] = {"strategies": strategies, "max_new_tokens": max_new_tokens, "temperature": temperature}
    judged |= {k: v for k, v in {"task": task, "file": file, "levels": level, "rows": rows}.items() if v is not None}
    if task and rows is None:
        judged["rows"] = 200
    recipe = resolve(
        Document("burnish eval", data={"burnish": 1, "name": "eval", "model": model, "seed": seed, "dtype": dtype, "evals": {"eval": judged}})
    ).recipe
    from burnish.build import judges
    from burnish.models.load import load_policy

    progress = Progressing(wants_json())
    policy = load_policy(model, dtype=recipe.dtype)
    (judge,) = judges(recipe, policy, [])
    progress.begin(f"eval {task or file}", judge.size)
    result = judge(policy, "eval", progress.advance, lambda: None)
    progress.end()
    lines = [f"{'strategy':<22}{'accuracy':>9}  {'95 % interval':<16}{'n':>6}{'tokens/question':>17}{'FLOP/question':>15}"]
    for row in result["strategies"]:
        low, high = row["interval"]
        name, n = row["strategy"] + (" (oracle)" if row["oracle"] else ""), result["n"]
        spend = row["spend"]
        lines.append(
            f"{name:<22}{row['accuracy']:>9.1%}  {f'{low:.1%} to {high:.1%}':<16}{n:>6}{spend['sampled_tokens'] / n:>17.1f}"
            f"{count(spend['executed_flops'] / n):>15}"
        )
    reply(result, "\n".join(lines))
