"""From places in a text to tokens, with tokens that are parts of a character."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from burnish.core.records import Scored
from burnish.methods.steps import step_rewards, token_ends
from burnish.models.load import load_policy


class Pieces:
    """A vocabulary of byte strings; what is no UTF-8 yet decodes to U+FFFD, as tokenizers do. `<end>` is not shown."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = [b"", *pieces]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")


def brute(decode, ids: Sequence[int], text: str, ends: Sequence[int]) -> list[int]:
    """The definition, token by token."""
    return [*(next(k for k in range(1, len(ids) + 1) if decode(ids[:k]).startswith(text[:end])) for end in ends[:-1]), len(ids)]


def test_ends_by_hand() -> None:
    snow = "☃".encode()  # three bytes
    words = Pieces(b"a\n", b"b", b"\n", snow[:1], snow[1:2], snow[2:], b".\nc")
    ids = [1, 2, 3, 4, 5, 6, 7, 0]  # a\n b \n <three parts of a snowman> .\nc <end>
    text = words.decode(ids)
    assert text == "a\nb\n☃.\nc"
    assert token_ends(words.decode, ids, text, [2, 4, 5, 7, 8]) == [1, 3, 6, 7, 8]  # `.\nc` reaches over the border at 7
    assert token_ends(words.decode, ids, text, [8]) == [8]


def test_random_splits_into_bytes_agree_with_the_definition() -> None:
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("ab\n☃é🎈") for _ in range(rng.randint(1, 12)))
        data, pieces = text.encode(), []
        while data:
            k = rng.randint(1, 4)
            pieces.append(data[:k])
            data = data[k:]
        words = Pieces(*pieces)
        ids = [*range(1, len(pieces) + 1), 0]
        ends = sorted(rng.sample(range(1, len(text) + 1), rng.randint(1, len(text))))
        ends = [*(e for e in ends if e != len(text)), len(text)]
        assert token_ends(words.decode, ids, text, ends) == brute(words.decode, ids, text, ends)


def test_the_bundled_tokenizer() -> None:
    policy = load_policy("spark", dtype="float32", probe=False)
    text = "1+2=3\né☃\n#### 3"
    ids = [*policy.tokenizer.encode(text, add_special_tokens=False), policy.eos_ids[0]]
    ends = [6, 9, len(text)]
    found = token_ends(policy.decode, ids, text, ends)
    assert found == brute(policy.decode, ids, text, ends) and found[-1] == len(ids)
    assert policy.decode(ids[: found[0]]) == "1+2=3\n" and policy.decode(ids[: found[1]]) == "1+2=3\né☃\n"


def test_step_rewards_add_up_and_the_outcome_comes_last() -> None:
    process = Scored(0.0, spans=((3, 1.0), (5, None), (9, 0.0)))
    parts = {"p": process, "right": Scored(1.0), "seen": Scored(7.0)}
    weights = {"p": 2.0, "right": 0.5, "seen": 0.0}
    assert step_rewards(parts, weights, frozenset({"p"}), [3, 5, 9]) == ((3, 2.0), (5, None), (9, 0.5))
    parts["right"] = Scored(error="timeout")
    assert step_rewards(parts, weights, frozenset({"p"}), [3, 5, 9])[-1] == (9, None)
    broken = {"p": Scored(error="crash")}
    assert step_rewards(broken, {"p": 1.0}, frozenset({"p"}), [2, 4]) == ((2, None), (4, None))
    assert step_rewards({"right": Scored(1.0)}, {"right": 1.0}, frozenset(), [2, 4]) == ((2, None), (4, 1.0))


@pytest.mark.parametrize("end", [1, 4])
def test_the_last_step_ends_with_the_completion_even_where_its_text_is_cut(end: int) -> None:
    words = Pieces(b"a", b"b", b"STOP", b"")
    assert token_ends(words.decode, [1, 2, 3, 4], "ab"[:end], [min(end, 2)]) == [4]
