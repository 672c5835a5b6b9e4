"""Components to one reward: sums, gates, routes; what abstains and what failed stays what it is."""

from __future__ import annotations

import pytest

from burnish.core.errors import ConfigError, DataError
from burnish.core.records import Scored
from burnish.rewards.build import build
from burnish.rewards.combine import applicable, gated, routed, total, weighted_sum

WEIGHTS = {"a": 1.0, "b": 0.5}


def test_a_sum_and_a_gate() -> None:
    assert weighted_sum({"a": 2.0, "b": 3.0}, WEIGHTS) == 3.5
    assert gated({"a": 1.0, "b": 3.0}, WEIGHTS, gate="a") == 2.5
    assert gated({"a": 0.9, "b": 3.0}, WEIGHTS, gate="a") == 0.9  # the gate's own share stays
    assert gated({"a": 0.9, "b": 3.0}, WEIGHTS, gate="a", at_least=0.5) == 2.4
    assert gated({"b": 3.0}, WEIGHTS, gate="a") is None


def test_a_failure_or_an_abstention_is_never_nought() -> None:
    fine = Scored(1.0)
    assert total({"a": fine, "b": Scored(1.0)}, WEIGHTS, weighted_sum) == Scored(1.5)
    assert total({"a": fine, "b": Scored()}, WEIGHTS, weighted_sum) == Scored()
    failed = total({"a": Scored(), "b": Scored(error="infra", detail="down")}, WEIGHTS, weighted_sum)
    assert failed == Scored(error="infra", detail="b: down")
    assert total({}, WEIGHTS, weighted_sum) == Scored()


def test_a_reward_that_abstains_on_a_whole_group_does_not_apply_there() -> None:
    some = [Scored(1.0), Scored(), Scored(), Scored()]
    alls = [Scored(0.25)] * 4
    kept = applicable({"a": some, "b": alls}, [0, 0, 1, 1])
    assert [sorted(row) for row in kept] == [["a", "b"], ["a", "b"], ["b"], ["b"]]
    assert [total(row, WEIGHTS, weighted_sum) for row in kept] == [Scored(1.125), Scored(), Scored(0.125), Scored(0.125)]
    down = applicable({"a": [Scored(error="infra")] * 2}, [0, 0])
    assert [total(row, WEIGHTS, weighted_sum).error for row in down] == ["infra"] * 2  # an outage is no abstention


def test_routes() -> None:
    columns = {"source": ["math", "chat"], "rewards": ["a", ["a", "b"]]}
    assert routed(["a", "b"], "source", {"math": ["a"], "chat": ["b"]}, columns, 2) == [{"a"}, {"b"}]
    assert routed(["a", "b"], "rewards", None, columns, 2) == [{"a"}, {"a", "b"}]
    with pytest.raises(DataError, match=r"no route for source 'chat'; there are: math"):
        routed(["a"], "source", {"math": ["a"]}, columns, 2)
    with pytest.raises(DataError, match=r"holds \['a', 'b'\], wanted one or more of: a"):
        routed(["a"], "rewards", None, columns, 2)
    with pytest.raises(DataError, match="routed by the column 'kind'; the data has: source, rewards"):
        routed(["a"], "kind", None, columns, 2)


def test_each_prompt_gets_the_rewards_of_its_route() -> None:
    block = {
        "use": [{"name": "number", "weight": 2}, {"name": "think", "label": "shape"}],
        "route": {"column": "source", "rewards": {"math": ["number"], "chat": ["shape"]}},
    }
    with build(block) as rewards:
        found = rewards.score(["p"] * 3, ["#### 4", "<think>a</think>b", "x"], {"answer": ["4", None, None], "source": ["math", "chat", "chat"]}, [0, 1, 1])
    assert [one.value for one in found.total] == [2.0, 1.0, 0.0]
    assert [one.value for one in found.components["number"]] == [1.0, None, None]
    assert found.components["number"][1].detail == "not routed here"
    assert found.stats["components"]["number"]["reward_abstained"] == 0.0  # one sample was its own, and it answered


def test_a_weight_of_nought_only_records() -> None:
    with build([{"name": "number"}, {"name": "length_cap", "cap": 3, "unit": "characters", "weight": 0}]) as rewards:
        found = rewards.score(["p"] * 2, ["#### 4", "#"], {"answer": ["4", "4"]})
    assert [one.value for one in found.total] == [1.0, 0.0]
    assert [one.value for one in found.components["length_cap"]] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("numbr", r"'numbr' is not a reward\. Did you mean 'number'\?"),
        ("accuracy", r"'accuracy' is not a reward\. Did you mean 'number'\?"),
        ([], r"rewards\.use  .*at least 1"),
        ({"name": "number", "gama": 1}, r"rewards\.use\.0  reward\.gama: 'number' has no parameter 'gama'"),
        ({"name": "number", "weight": "much"}, r"rewards\.use\.0\.weight"),
        (["number", "number"], r"rewards\.use\.1\.label  two rewards are called 'number'.*\n  add label: number-2"),
        ({"use": ["number", "think"], "combine": {"name": "gated", "gate": "thinks"}}, r"'thinks' is not one of the rewards\. Did you mean 'think'\?"),
        ({"use": ["number"], "combine": {"name": "gated", "gate": "number"}}, "the gate would gate nothing"),
        ({"use": ["number"], "combine": "gated"}, "'gated' needs 'gate'"),
        ({"use": ["number"], "route": {"column": "s", "rewards": {"a": ["numbr"]}}}, r"route\.rewards\.a\.0  'numbr' is not one of the rewards"),
        ({"use": ["number", "think"], "route": {"column": "s", "rewards": {"a": ["number"]}}}, "no route leads to 'think'"),
        ({"use": ["number"], "deadline_s": 0}, r"rewards\.deadline_s"),
        ({"use": ["number"], "max_error_rate": 2}, r"rewards\.max_error_rate"),
        ({"use": ["number"], "workerz": 2}, r"rewards\.workerz"),
    ],
)
def test_blocks_that_cannot_be_meant(block: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(block)  # type: ignore[arg-type]


def test_a_column_that_a_reward_does_not_take() -> None:
    with pytest.raises(ConfigError, match=r"rewards\.use\.0\.columns\.anser  'number' takes no column 'anser'\. Did you mean 'answer'\?\n  it takes: answer"):
        build({"name": "number", "columns": {"anser": "solution"}})
