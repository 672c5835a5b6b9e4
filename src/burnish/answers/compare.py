"""Is this answer that answer? Exact, after normalising; no tolerance that a lucky guess could hide in."""

from __future__ import annotations

from burnish.answers.extract import final_answer, normalised


def same(answer: str | None, gold: str) -> bool:
    """Both say the same number or the same words. None is never right."""
    return answer is not None and normalised(answer) == normalised(gold)


def answers_with(text: str, gold: str) -> bool:
    """The completion's marked answer is the gold answer."""
    return same(final_answer(text), gold)
