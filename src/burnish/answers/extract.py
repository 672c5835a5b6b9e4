"""Find the final answer in a completion and bring it to a form that can be compared. No model, no torch.

The rule: an answer counts where it is *marked* (`#### 42` or `\\boxed{42}`). The last mark holds the answer. A text
that marks several different answers has none: spraying answers until one sticks is not answering.
"""

from __future__ import annotations

import re

MARK = "####"
DEEPEST = 8  # boxes within boxes
_BOX = "\\boxed{"
_NUMBER = re.compile(r"[-+\u2212]?(\d{1,3}(,\d{3})+|\d+)(\.\d*)?|[-+\u2212]?\.\d+")


def _boxed(text: str) -> list[tuple[int, str]]:
    """(where, contents) of every `\\boxed{...}` that is closed, nested braces balanced.

    One pass, however many are open. Boxes within DEEPEST others are not read: those around them disagree already.
    """
    boxes = {match.end() - 1: match.start() for match in re.finditer(re.escape(_BOX), text)}
    found: list[tuple[int, str]] = []
    opened: list[int] = []
    depth = 0
    for brace in re.finditer("[{}]", text) if boxes else ():
        if brace[0] == "{":
            opened.append(brace.start())
            depth += brace.start() in boxes
        elif opened and (begin := opened.pop()) in boxes:
            depth -= 1
            if depth < DEEPEST:
                found.append((boxes[begin], text[begin + 1 : brace.start()]))
    return found


def marked_answers(text: str) -> list[str]:
    """What stands behind each mark, in the order of the text: to the end of the line, or inside the box."""
    found = _boxed(text)
    pieces = text.split(MARK)
    at = len(pieces[0])
    for piece in pieces[1:]:
        found.append((at, piece.split("\n", 1)[0]))
        at += len(MARK) + len(piece)
    return [answer.strip() for _, answer in sorted(found)]


def final_answer(text: str) -> str | None:
    """The marked answer, or None: nothing is marked, the mark is empty, or the marks disagree."""
    answers = marked_answers(text)
    if not answers or not answers[-1]:
        return None
    last = normalised(answers[-1])
    return answers[-1] if all(normalised(answer) == last for answer in answers) else None


def after_thinking(text: str, closing: str = "</think>") -> str:
    """What follows the last closing tag; the whole text where there is none."""
    return text.rpartition(closing)[2]


def number(text: str) -> str | None:
    """The canonical decimal of a text that is one number: `+007` -> 7, `-0.0` -> 0, `1,250` -> 1250."""
    text = text.strip().removesuffix(".") or ""
    text = text.removeprefix("$").removesuffix("$").strip()
    sign, digits = ("-", text[1:].strip()) if text[:1] in ("-", "\u2212") else ("", text.removeprefix("+").strip())
    if not _NUMBER.fullmatch(digits) or digits[:1] in "-+\u2212" or not digits.isascii():
        return None
    whole, _, fraction = digits.replace(",", "").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    value = f"{whole}.{fraction}" if fraction else whole
    return value if value == "0" else sign + value


def normalised(text: str) -> str:
    """A number in canonical form, any other text without the blanks around it and with single blanks inside."""
    value = number(text)
    return " ".join(text.split()) if value is None else value


def final_number(text: str) -> str | None:
    """The marked answer as a canonical number, or None where there is none or it is not a number."""
    answer = final_answer(text)
    return None if answer is None else number(answer)


def given(text: str) -> str:
    """The marked answer, or the whole completion where nothing is marked."""
    return final_answer(text) or text


def given_key(text: str) -> str | None:
    """What votes are counted by where no task says: the answer given, normalised; None where nothing is said."""
    return normalised(given(text)) or None
