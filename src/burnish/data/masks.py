"""Which turns of a conversation are learned: one flag per message, prompt then completion; `chat` maps them to tokens.

A message's own `train` flag wins in every row of the table. For an assistant turn the labels are what the model itself
writes: content and terminator, not the header before it. For any other chosen turn they are the whole turn. Where every
turn is chosen, every token is a label. Plain `text` rows have no turns and are learned whole under every mask.
"""

from __future__ import annotations

from burnish.core.records import Example, Message
from burnish.core.table import About, Table


def completion(example: Example) -> list[bool]:
    """Assistant turns of the completion: of a `messages` row, the last turn only."""
    return [_flagged(m, False) for m in example.prompt] + [
        _flagged(m, m.role == "assistant") for m in example.completion
    ]


def assistant(example: Example) -> list[bool]:
    """Every assistant turn, in prompt and completion alike."""
    return [_flagged(m, m.role == "assistant") for m in (*example.prompt, *example.completion)]


def everything(example: Example) -> list[bool]:
    """Every turn, headers and the user's words included: language modelling on the rendered conversation."""
    return [_flagged(m, True) for m in (*example.prompt, *example.completion)]


def _flagged(message: Message, otherwise: bool) -> bool:
    return otherwise if message.train is None else message.train


MASKS = Table(
    "mask",
    {"completion": completion, "assistant": assistant, "all": everything},
    also={
        "assistant_only": "assistant",
        "completion_only": "completion",
        "train_on_responses_only": "assistant",
        "full": "all",
    },
    about={"assistant": About(taxonomy=("S3",))},
)
