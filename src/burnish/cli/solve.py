"""`burnish solve`: an answer by a test-time strategy, and what it cost."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from burnish.cli import reply
from burnish.core.errors import ConfigError
from burnish.core.grammar import parse
from burnish.report import units
from burnish.report.markup import visible

if TYPE_CHECKING:
    from burnish.api import Solution
    from burnish.core.records import Spend


def solve(
    model: Annotated[str, typer.Argument(help="A bundled model, a folder (HF or PEFT) or a hub id.")],
    question: Annotated[str | None, typer.Argument(help="What to answer.")] = None,
    file: Annotated[Path | None, typer.Option(help="Or a .jsonl file of questions: rows with a prompt, or messages.")] = None,
    column: Annotated[str, typer.Option(help="The column of the file that holds the question.")] = "prompt",
    strategy: Annotated[str, typer.Option(help="greedy, vote:16, best_of:16@logprob ... (burnish ls strategy, ls scorer).")] = "vote:16",
    task: Annotated[str | None, typer.Option(help="A task, such as sums: says which answers are the same, lends its rule.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the samples; 0.7 unless given.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest sample.")] = 256,
    budget_tokens: Annotated[int | None, typer.Option(help="The most sampled tokens a question may cost.")] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Show every sample with its answer and score.")] = False,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Answer with a test-time strategy, and say what that cost."""
    asked = parse(strategy, "--strategy")
    if (question is None) == (file is None):
        given = "neither a question nor --file" if file is None else "both a question and --file"
        raise ConfigError(given, where="burnish solve", remedy='type burnish solve MODEL "question", or --file questions.jsonl')
    if asked.name == "greedy" and temperature is not None:
        raise ConfigError("greedy takes no temperature: it would do nothing", where="--temperature", remedy="leave it out, or type --strategy sample")
    from burnish.api import load
    from burnish.train.log import hush

    hush()
    prompts: list[Any] = [question] if file is None else _questions(file, column)
    loaded = load(model, device=device)
    options: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
    begin = time.perf_counter()
    found = loaded.solve(
        prompts, strategy=strategy, task=task, max_new_tokens=max_new_tokens, seed=seed, budget_tokens=budget_tokens, **options
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    if all(solution.text is None for solution in found):
        most = max(t.tokens for solution in found for t in solution.trace)
        message = f"no answer was finished within {units.many(most, 'token')}"
        raise ConfigError(message, where="--budget-tokens", remedy="give more, or leave it out")
    total = reduce(add, (solution.spend for solution in found))
    rows = [asdict(solution) for solution in found]
    for row in rows if not trace else ():
        del row["trace"]
    blocks = [_block(solution, trace, named=len(found) > 1) for solution in found]
    blocks.append(f"  {asked}: {_spent(total)}, {units.duration(seconds)}" + (f" for {len(found)} questions" if len(found) > 1 else ""))
    text = "\n".join(blocks)
    reply({"model": model, "strategy": str(asked), "task": task, "seconds": round(seconds, 4), "spend": asdict(total), "solutions": rows}, text)


def _questions(file: Path, column: str) -> list[list[dict[str, str]]]:
    """The conversations of a file that end with a question. Raises DataError."""
    from burnish.data import formats

    columns = None if column == "prompt" else {"prompt": column}
    found = formats.load(file, columns=columns, need="prompt")
    return [[{"role": m.role, "content": m.content} for m in example.prompt] for example in found.examples]


def _spent(spend: Spend) -> str:
    words = [f"{units.count(spend.sampled_tokens)} tokens sampled", f"{units.count(spend.prefill_tokens)} read"]
    words += [f"{units.count(spend.scored_tokens)} scored"] if spend.scored_tokens else []
    return ", ".join([*words, units.flops(spend.executed_flops)])


def _block(solution: Solution, trace: bool, *, named: bool) -> str:
    """One question's answer, and with `trace` its samples: number, tokens, score, answer, text on one line."""
    lines = [f"{visible(solution.prompt)}"] if named else []
    if solution.text is None:
        lines.append("(no answer was finished within the budget)")
    elif solution.answer is None:
        lines += [visible(solution.text), "  (no answer was found in it)"]
    else:
        lines.append(visible(solution.answer))
    whole = [t for t in solution.trace if t.finish != "budget"]
    if solution.answer is not None and len(whole) > 1:
        score = next(t.score for t in whole if t.chosen)
        same = sum(t.answer == solution.answer for t in whole)
        lines.append(f"  {same} of {len(whole)} samples say so" + ("" if score is None else f"; the one shown scores {score:.4g}"))
    wide = max((len(t.answer or "-") for t in solution.trace), default=0)
    for i, t in enumerate(solution.trace if trace else (), start=1):
        score = f"{t.score:>9.4f}  " if t.score is not None else ""
        said = " / ".join(visible(t.text).split("\n")) if t.finish != "budget" else "(cut by the budget)"
        mark = "*" if t.chosen else " "
        lines.append(f"  {mark}{i:>3}  {units.many(t.tokens, 'token'):>11}  {score}{visible(t.answer or '-'):<{min(wide, 24)}}  {said}")
    return "\n".join(lines)
