"""Rewards for the shape of a completion, whatever it answers. Pay them only where the answer is right (`gated`)."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from burnish.core.errors import DataError
from burnish.core.table import About, Table
from burnish.rewards.base import Completion, text_of

Values = list[float | None]
SCRIPTS: dict[str, tuple[str, ...]] = {  # language -> how the Unicode names of its letters begin
    "ar": ("ARABIC",),
    "el": ("GREEK",),
    "en": ("LATIN",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "ko": ("HANGUL",),
    "ru": ("CYRILLIC",),
    "th": ("THAI",),
    "zh": ("CJK",),
}


def think(
    completions: Sequence[Completion],
    *,
    opening: str = "<think>",
    closing: str = "</think>",
    begins: Literal["tag", "inside"] = "tag",
) -> Values:
    """1 for thoughts inside one pair of tags and an answer after it, else 0 (format reward, arXiv:2501.12948).

    The completion begins with the opening tag (`inside`: the prompt ended with it); each tag stands exactly once;
    neither the thoughts nor the answer are empty. A second pair, or a tag quoted in either part, scores 0.
    """
    found: Values = []
    for completion in completions:
        text = text_of(completion).strip()
        body = opening + text if begins == "inside" else text
        thoughts, _, answer = body.removeprefix(opening).partition(closing)
        once = body.count(opening) == 1 and body.count(closing) == 1
        found.append(float(once and body.startswith(opening) and bool(thoughts.strip()) and bool(answer.strip())))
    return found


@lru_cache(maxsize=65536)
def _letter(character: str) -> str | None:
    """The first word of a letter's Unicode name, its script; None for what is no letter."""
    return unicodedata.name(character, "UNNAMED").split()[0] if character.isalpha() else None


def language(
    completions: Sequence[Completion],
    *,
    language: Literal["ar", "el", "en", "he", "hi", "ja", "ko", "ru", "th", "zh"] = "en",
) -> Values:
    """The share of letters in the script of a language, from 0 to 1 (language consistency, arXiv:2501.12948).

    It tells scripts apart, not languages: French passes for English and Japanese written in kanji for Chinese. Letters
    of other scripts that look alike do not pass. A text without letters has no language: it abstains.
    """
    found: Values = []
    for completion in completions:
        scripts = [script for c in text_of(completion) if (script := _letter(c))]
        mine = sum(script.startswith(SCRIPTS[language]) for script in scripts)
        found.append(mine / len(scripts) if scripts else None)
    return found


def repetition(
    completions: Sequence[Completion],
    *,
    size: int = 3,
    most: float = 1.0,
    unit: Literal["words", "characters"] = "words",
) -> Values:
    """From 0 (no n-gram comes twice) down to -`most` (all are the same): the share of n-grams said before.

    reward = -most (1 - distinct / all) over n-grams of `size`     (repetition penalty, arXiv:2502.03373)
    Fewer units than one n-gram repeat nothing: 0. Words are split at blanks; use characters for scripts without them.
    """
    if size < 1 or most < 0:
        raise DataError(f"size {size} and most {most}: wanted size >= 1 and most >= 0", where="reward repetition")
    found: Values = []
    for completion in completions:
        text = text_of(completion).lower()
        parts = text.split() if unit == "words" else list(text)
        grams = [tuple(parts[i : i + size]) for i in range(len(parts) - size + 1)]
        found.append(-most * (1 - len(set(grams)) / len(grams)) if grams else 0.0)
    return found


def _lengths(
    completions: Sequence[Completion], ids: Sequence[Sequence[int]] | None, unit: Literal["tokens", "words", "characters"]
) -> list[int]:
    if unit == "tokens":
        if ids is None:
            remedy = "unit: words or unit: characters needs no tokens"
            raise DataError("there are no token ids here (column completion_ids)", where="reward length", remedy=remedy)
        return list(map(len, ids))
    texts = map(text_of, completions)
    return [len(text.split()) if unit == "words" else len(text) for text in texts]


def length_cap(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    cap: int,
    unit: Literal["tokens", "words", "characters"] = "tokens",
) -> Values:
    """1 for at most `cap` units, 0 for more."""
    return [float(n <= cap) for n in _lengths(completions, completion_ids, unit)]


def length_target(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    target: int,
    unit: Literal["tokens", "words", "characters"] = "tokens",
) -> Values:
    """1 at `target` units, falling evenly to 0 at none and at twice as many: max(0, 1 - |n - target| / target).

    L1's exact-length reward (eq. 1, arXiv:2503.04697) with its slope set so that the reward stays within 0 and 1.
    """
    if target < 1:
        raise DataError(f"target {target}, wanted 1 or more", where="reward length_target")
    return [max(0.0, 1 - abs(n - target) / target) for n in _lengths(completions, completion_ids, unit)]


FORMATS = Table(
    "reward",
    {
        "think": think,
        "language": language,
        "repetition": repetition,
        "length_cap": length_cap,
        "length_target": length_target,
    },
    also={"think_format": "think", "format": "think", "ngram": "repetition", "max_length": "length_cap", "l1": "length_target"},
    about={
        "think": About(taxonomy=("P16", "P18", "R3"), paper="arXiv:2501.12948", year=2025),
        "language": About(taxonomy=("P18", "R3"), paper="arXiv:2501.12948", year=2025),
        "repetition": About(taxonomy=("R3",), paper="arXiv:2502.03373", year=2025),
        "length_cap": About(taxonomy=("R3",)),
        "length_target": About(taxonomy=("R3",), paper="arXiv:2503.04697", year=2025),
    },
)
