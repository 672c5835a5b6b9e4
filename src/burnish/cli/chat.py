"""`burnish chat`: talk to a model from the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from burnish.cli import reply, wants_json


def chat(
    model: Annotated[str, typer.Argument(help="A bundled model, a folder (HF or PEFT) or a hub id.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this one message and stop.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Talk to a model. An empty line or Ctrl-D ends; /new starts over."""
    from burnish.api import load
    from burnish.train.log import hush

    hush()
    loaded = load(model, device=device)
    head = [{"role": "system", "content": system}] if system else []
    options = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    if prompt is not None or wants_json():
        text = prompt if prompt is not None else sys.stdin.read().strip()
        answer = loaded.generate([[*head, {"role": "user", "content": text}]], **options)[0]
        reply({"model": model, "prompt": text, "answer": answer}, answer)
        return
    turns: list[dict[str, str]] = []
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"{model}: an empty line ends, /new starts over")
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            break
        if not line:
            break
        if line == "/new":
            turns = []
            continue
        turns.append({"role": "user", "content": line})
        answer = loaded.generate([[*head, *turns]] if loaded.has_template else [line], **options)[0]
        turns.append({"role": "assistant", "content": answer})
        print(answer, flush=True)
