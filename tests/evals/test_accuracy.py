"""An eval against scripted answers: every number of its JSON by hand."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from burnish.core.errors import ConfigError, DataError
from burnish.core.records import Message, Sampling
from burnish.data.tasks.base import Item, Task
from burnish.engines.base import Prompt
from burnish.engines.local.engine import LocalEngine
from burnish.engines.scripted import Scripted
from burnish.evals.accuracy import _row, evaluate, judge_of, prompts_of, stream_of
from burnish.maths.estimators import bootstrap_mean, wilson
from burnish.search.base import Budget, strategy
from burnish.search.sampling import pass_at
from tests.engines.policies import policy

SAMPLING = Sampling(temperature=0.9, max_new_tokens=6)


def answer_key(text: str) -> Hashable | None:
    return int(text) if text.isdigit() else None


TASK = Task("toy", lambda level, rng: ITEMS[0], lambda text, item: text == item.gold, answer_key, (1,))
ITEMS = [Item(f"ask {i}", str(i), "", "", 1 + i % 2, id=f"toy/test/1/{i:04d}") for i in range(4)]
SAYS = {  # item 0: right only by vote; 1: always right; 2: right once; 3: never, and too long
    0: ["9", "0", "0"],
    1: ["1"],
    2: ["x", "2", "8", "8"],
    3: ["far too long", "5"],
}


class Plain:
    """Ids are characters."""

    template_sha256 = "abc123"

    def prompt(self, messages: Sequence[Message], *, where: str = "prompt") -> tuple[int, ...]:
        return tuple(ord(c) for c in messages[-1].content)


def engine(says: dict[int, list[str]] = SAYS, items: Sequence[Item] = ITEMS) -> Scripted:
    return Scripted({stream_of(item.id): says[i] for i, item in enumerate(items)})


def run(strategies: Sequence[str] = ("greedy", "vote:3", "pass@3", "sample"), **more: Any) -> dict[str, Any]:
    return evaluate(more.pop("engine", None) or engine(), Plain(), TASK, ITEMS, strategies, SAMPLING, **more)


def test_every_number() -> None:
    found = run(name="toys", stage="sft")
    assert {k: found[k] for k in ("schema", "eval", "task", "fold", "n", "stage")} == {
        "schema": 1, "eval": "toys", "task": "toy", "fold": "test", "n": 4, "stage": "sft",
    }  # fmt: skip
    assert found["item_ids"] == [item.id for item in ITEMS]
    settings = found["settings"]
    assert (settings["temperature"], settings["chosen_on"], settings["template"]) == (0.9, "given", "abc123")
    rows = {row["strategy"]: row for row in found["strategies"]}
    assert list(rows) == ["greedy", "vote:3", "pass@3", "sample"]
    assert rows["greedy"]["correct"] == [0, 1, 0, 0] and rows["greedy"]["accuracy"] == 0.25
    assert rows["greedy"]["interval"] == pytest.approx(wilson(1, 4))
    assert rows["vote:3"]["correct"] == [1, 1, 1, 0]  # item 2: "x" abstains, 2 and 8 tie, 2 was first
    assert rows["pass@3"]["correct"] == [1, 1, 1, 0]
    assert [r["oracle"] for r in rows.values()] == [False, False, True, False]
    prefill, drawn = 4 * 5, 3 + 3 + 3 + (6 + 1 + 6)
    assert rows["vote:3"]["spend"] == {
        "prefill_tokens": prefill, "sampled_tokens": drawn, "scored_tokens": 0, "useful_flops": 0, "executed_flops": 0,
    }  # fmt: skip
    assert rows["greedy"]["spend"]["sampled_tokens"] == 1 + 1 + 1 + 6
    assert [r["truncated"] for r in rows.values()] == [1, 2, 2, 1]  # completions cut at six tokens
    assert [r["unanswered"] for r in rows.values()] == [2, 3, 3, 2]
    sample = found["samples"][2]
    assert {k: sample[k] for k in ("id", "prompt", "gold", "level")} == {
        "id": "toy/test/1/0002", "prompt": "ask 2", "gold": "2", "level": 1,
    }  # fmt: skip
    assert sample["completions"][:3] == [
        {"strategy": "greedy", "text": "x", "answer": None, "correct": False},
        {"strategy": "vote:3", "text": "2", "answer": "2", "correct": True},
        {"strategy": "pass@3", "text": "2", "answer": "2", "correct": True},
    ]
    assert json.loads(json.dumps(found)) == found == run(name="toys", stage="sft")


def test_a_fractional_grade_has_a_bootstrap_interval() -> None:
    bound = strategy("pass@2")
    prompts = [Prompt(stream_of(item.id), (1,)) for item in ITEMS]
    outcomes = pass_at(engine(), prompts, judge_of(TASK, ITEMS), Budget(SAMPLING), n=2, draws=4)
    grades = [outcome.grade for outcome in outcomes if outcome.grade is not None]
    assert grades == [pytest.approx(g) for g in (5 / 6, 1, 1 / 2, 0)]
    row = _row(bound, grades, outcomes, TASK)
    assert row["correct"] == grades and row["accuracy"] == pytest.approx(sum(grades) / 4)
    assert row["interval"] == list(bootstrap_mean(grades))


class Tempered(Scripted):
    """Right more often at some temperatures than at others."""

    right = {0.4: 1, 0.6: 3, 0.8: 3, 1.0: 2}  # noqa: RUF012

    def sample(self, nodes: Any, sampling: Sampling, keys: Any) -> Any:
        made = super().sample(nodes, sampling, keys)
        good = self.right.get(sampling.temperature, 0)
        order = sorted({item for item, _ in keys})
        return [replace(t, text=t.text if order.index(k[0]) < good else "no") for t, k in zip(made, keys)]


def test_the_temperature_is_chosen_on_validation_by_the_strongest_vote() -> None:
    validation = [replace(item, id=f"toy/validation/1/{i}") for i, item in enumerate(ITEMS)]
    says = {stream_of(v.id): [v.gold] for v in validation} | {stream_of(v.id): [v.gold] for v in ITEMS}
    found = run(["greedy", "vote:2", "vote:3"], engine=Tempered(says), validation=validation)
    settings = found["settings"]
    assert settings["candidates"] == {"0.4": 0.25, "0.6": 0.75, "0.8": 0.75, "1": 0.5}
    assert settings["temperature"] == 0.6  # equal to 0.8, and lower
    assert settings["chosen_on"] == "validation, n=4, vote:3"
    assert found["strategies"][2]["accuracy"] == 0.75
    widest = run(["vote:2", "best_of:4@logprob", "pass@8"], engine=Tempered(says), validation=validation)
    assert widest["settings"]["chosen_on"] == "validation, n=4, best_of:4@logprob"
    alone = run(["sample"], engine=Tempered(says), validation=validation, candidates=(1.0,))
    assert alone["settings"]["chosen_on"] == "validation, n=4, sample"
    untouched = run(["greedy"], engine=Tempered(says), validation=validation)
    assert untouched["settings"]["candidates"] == {} and untouched["settings"]["temperature"] == 0.9


def test_an_item_may_bring_its_conversation() -> None:
    turns = [Message("system", "be brief"), Message("user", "ask 0?")]
    (plain, brought) = prompts_of(Plain(), [ITEMS[0], replace(ITEMS[0], id="b", facts={"prompt": turns})])
    assert plain.ids == tuple(map(ord, "ask 0")) and brought.ids == tuple(map(ord, "ask 0?"))


def test_what_is_refused() -> None:
    with pytest.raises(DataError, match="no items"):
        evaluate(engine(), Plain(), TASK, [], ["greedy"], SAMPLING)
    with pytest.raises(DataError, match="id of two items"):
        evaluate(engine(), Plain(), TASK, [ITEMS[0], ITEMS[0]], ["greedy"], SAMPLING)
    with pytest.raises(ConfigError, match="no strategies"):
        run([])
    with pytest.raises(ConfigError, match="not a strategy"):
        run(["voting:3"])
    keyless = replace(TASK, has_answer_key=False)
    with pytest.raises(ConfigError, match="no answer key"):
        evaluate(engine(), Plain(), keyless, ITEMS, ["greedy", "vote:3"], SAMPLING)
    gold = engine()
    with pytest.raises(ConfigError, match="best_of:3@rule  there is no rule"):
        run(["greedy", "best_of:3@rule"], engine=gold)
    assert gold.spend.sampled_tokens == 0  # refused before anything is drawn
    free = replace(TASK, verifier_needs_gold=False, verify=lambda text, item: text == item.question[-1])
    ruled = evaluate(engine(), Plain(), free, ITEMS, ["sample", "best_of:3@rule", "pass@3"], SAMPLING)["strategies"]
    assert [row["correct"] for row in ruled] == [[0, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    assert evaluate(engine(), Plain(), keyless, ITEMS, ["greedy"], SAMPLING)["strategies"][0]["unanswered"] == 0


def test_a_real_engine_gives_the_same_eval_twice_and_items_do_not_depend_on_their_neighbours() -> None:
    def asked(items: Sequence[Item]) -> dict[str, Any]:
        source = LocalEngine(policy("qwen3", vocab_size=128))
        return evaluate(source, Plain(), TASK, items, ["greedy", "vote:4"], replace(SAMPLING, stop=("a",)), shown=4)

    found = asked(ITEMS)
    assert found == asked(ITEMS)
    assert found["strategies"][1]["spend"]["useful_flops"] > 2 * found["strategies"][0]["spend"]["useful_flops"]
    turned = asked(ITEMS[::-1])
    assert turned["samples"] == found["samples"][::-1]
