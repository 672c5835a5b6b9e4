"""Records: what a reward may say of a sample, in JSON and back."""

from __future__ import annotations

import json

import pytest

from burnish.core.records import Scored


@pytest.mark.parametrize(
    "scored",
    [
        Scored(0.0),
        Scored(-1.5, spans=((3, 0.5), (7, None))),
        Scored(),
        Scored(detail="not routed here"),
        Scored(error="infra", detail="refused"),
        Scored(error="timeout"),
    ],
)
def test_there_and_back(scored: Scored) -> None:
    assert Scored.from_json(json.loads(json.dumps(scored.to_json(), allow_nan=False))) == scored


def test_an_error_an_abstention_and_a_nought_are_three_things() -> None:
    assert [Scored(0.0).abstains, Scored().abstains, Scored(error="crash").abstains] == [False, True, False]
    assert [s.to_json() for s in (Scored(0.0), Scored(), Scored(error="crash"))] == [{"value": 0.0}, {"value": None}, {"error": "crash"}]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Scored(1.0, "crash"),
        lambda: Scored(float("nan")),
        lambda: Scored(spans=((1, float("inf")),)),
        lambda: Scored(error="oops"),  # type: ignore[arg-type]
        lambda: Scored.from_json({}),
        lambda: Scored.from_json({"value": 1.0, "error": "crash"}),
        lambda: Scored.from_json({"value": 1.0, "score": 2}),
    ],
)
def test_what_cannot_be_meant_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError):
        wrong()  # type: ignore[operator]
