"""Rewards that compare the completion's answer with the data's, and with the other answers of the group.

An answer counts where it is marked (`#### 42` or `\\boxed{42}`); a completion whose marks disagree has none. The gold
column is `answer` (say `columns: {answer: solution}` where yours has another name); a gold text that is itself marked
(`... #### 42`) stands for what it marks. A gold answer of the wrong kind makes the reward abstain.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, Literal

from burnish.answers.compare import same
from burnish.answers.extract import after_thinking, final_answer, normalised
from burnish.answers.extract import number as canonical
from burnish.core.errors import DataError
from burnish.core.table import About, Table, load_row
from burnish.data.tasks.base import Item
from burnish.rewards.base import Completion, text_of

Part = Literal["all", "after_think"]
Values = list[float | None]
_CHOICE = re.compile(r"(?:\\text\{)?\(?\s*([A-Za-z])\s*\)?[.:]?\}?", re.ASCII)


def given(completion: Completion, part: Part) -> str | None:
    """The completion's marked answer; `after_think` reads only what follows `</think>` (all of it where there is none)."""
    text = text_of(completion)
    return final_answer(after_thinking(text) if part == "after_think" else text)


def wanted(gold: Any) -> str:
    """The gold answer: what its text marks, else the text itself."""
    text = gold if isinstance(gold, str) else str(gold)
    return final_answer(text) or text.strip()


def exact(completions: Sequence[Completion], answer: Sequence[Any], *, part: Literal["all", "after_think"] = "all") -> Values:
    """1 where the marked answer is the gold answer, as a number or as the same words; else 0."""
    return [float(same(given(c, part), wanted(gold))) for c, gold in zip(completions, answer)]


def number(completions: Sequence[Completion], answer: Sequence[Any], *, part: Literal["all", "after_think"] = "all") -> Values:
    """1 where the marked answer is the gold number, exactly; else 0. No tolerance: `0.33` is not a third."""
    found: Values = []
    for completion, gold in zip(completions, answer):
        right = canonical(wanted(gold))
        said = given(completion, part)
        found.append(None if right is None else float(said is not None and canonical(said) == right))
    return found


def graded(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    partial: float = 0.1,
    part: Literal["all", "after_think"] = "all",
) -> Values:
    """1 where the marked number is right, `partial` where it is another number, 0 where there is none.

    ReFT's terminal reward (section 3.2, arXiv:2401.08967).
    """
    found: Values = []
    for completion, gold in zip(completions, answer):
        right = canonical(wanted(gold))
        said = canonical(given(completion, part) or "")
        found.append(None if right is None else 0.0 if said is None else 1.0 if said == right else partial)
    return found


def choice(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    options: int = 4,
    part: Literal["all", "after_think"] = "all",
) -> Values:
    """1 where the marked answer is the gold letter and nothing else (`B`, `(b)`, `B.`); naming two letters is 0.

    `options`: how many letters there are, from A on. A gold answer that is none of them makes it abstain.
    """

    def letter(text: str | None) -> str | None:
        match = _CHOICE.fullmatch(text.strip()) if text else None
        known = match is not None and ord(match[1].upper()) - ord("A") < options
        return match[1].upper() if match and known else None

    found: Values = []
    for completion, gold in zip(completions, answer):
        right = letter(wanted(gold))
        found.append(None if right is None else float(letter(given(completion, part)) == right))
    return found


def members(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    separator: str = ",",
    part: Literal["all", "after_think"] = "all",
) -> Values:
    """1 where the marked answer lists exactly the gold members, in any order; one too many or too few is 0.

    Gold is a list, or a text with the same separator. Braces or brackets around the list do not matter.
    """

    def listed(value: Any) -> frozenset[str]:
        if isinstance(value, (list, tuple)):
            return frozenset(normalised(str(v)) for v in value)
        text = re.sub(r"^(?:\\?[\[{(])(.*?)(?:\\?[\]})])$", r"\1", str(value).strip(), flags=re.DOTALL)
        return frozenset(normalised(v) for v in text.split(separator)) - {""}

    found: Values = []
    for completion, gold in zip(completions, answer):
        right = listed(gold if isinstance(gold, (list, tuple)) else wanted(gold))
        said = given(completion, part)
        found.append(None if not right else float(said is not None and listed(said) == right))
    return found


def verified(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    answer: Sequence[str],
    task: Sequence[str],
    question: Sequence[str] | None = None,
    level: Sequence[int] | None = None,
    facts: Sequence[dict[str, Any]] | None = None,
) -> Values:
    """1 where the verifier of the row's own bundled task accepts the completion, else 0.

    The column `task` names it; `question` is the last turn of the prompt unless there is such a column.
    """
    found: Values = []
    for i, (prompt, completion, gold, name) in enumerate(zip(prompts, completions, answer, task)):
        asked = question[i] if question else prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        known = facts[i] if facts else {}
        item = Item(asked, str(gold), rationale="", answer="", level=level[i] if level else 0, facts=known)
        verify: Any = load_row("task", name)
        found.append(float(verify.verify(text_of(completion), item)))
    return found


def agreement(
    completions: Sequence[Completion],
    group: Sequence[int],
    task: Sequence[str] | None = None,
    *,
    form: Literal["majority", "share"] = "majority",
    part: Literal["all", "after_think"] = "all",
) -> Values:
    """1 where the answer is the one most of its group gave, else 0; no gold answer is read (TTRL, arXiv:2504.16084).

    `share`: the share of the group that gave this answer instead. An answer is the task's answer key, or the marked
    answer. A completion without one scores 0. Where two answers tie for the most, there is no majority to agree with
    and the whole group abstains; so it does where nobody answers.
    """
    keys: list[Hashable | None] = []
    for i, completion in enumerate(completions):
        if task is None:
            said = given(completion, part)
            keys.append(None if said is None else normalised(said))
        else:
            row: Any = load_row("task", task[i])
            if not row.has_answer_key:
                raise DataError(f"task {task[i]!r} has no answer key to agree on", where="reward agreement")
            text = text_of(completion)
            keys.append(row.answer_key(after_thinking(text) if part == "after_think" else text))
    ballots: dict[int, Counter[Hashable]] = defaultdict(Counter)
    sizes = Counter(group)
    for key, of in zip(keys, group):
        if key is not None:
            ballots[of][key] += 1
    found: Values = []
    for key, of in zip(keys, group):
        leading = ballots[of].most_common(2)
        if not leading:
            found.append(None)
        elif form == "share":
            found.append(ballots[of][key] / sizes[of] if key is not None else 0.0)
        elif len(leading) == 2 and leading[0][1] == leading[1][1]:
            found.append(None)
        else:
            found.append(float(key == leading[0][0]))
    return found


ANSWERS = Table(
    "reward",
    {
        "exact": exact,
        "number": number,
        "graded": graded,
        "choice": choice,
        "set": members,
        "task": verified,
        "agreement": agreement,
    },
    also={
        "accuracy": "number",
        "gsm8k": "number",
        "reft": "graded",
        "multiple_choice": "choice",
        "verifier": "task",
        "self_consistency": "agreement",
        "ttrl": "agreement",
        "majority": "agreement",
    },
    about={
        "exact": About(taxonomy=("R3",)),
        "number": About(taxonomy=("R3", "R13")),
        "graded": About(taxonomy=("P21",), paper="arXiv:2401.08967", year=2024),
        "agreement": About(taxonomy=("R13",), paper="arXiv:2504.16084", year=2025),
    },
)
