"""The resolved recipe: every value, where it came from, and back again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from burnish.config.load import load, resolve
from burnish.config.provenance import read, write
from tests.config.tables import tables  # noqa: F401
from tests.config.test_load import GOOD, recipe

pytestmark = pytest.mark.usefixtures("tables")


def test_every_value_is_written_and_each_that_is_no_default_says_where_it_came_from() -> None:
    text = write(recipe("", "", "stages.sft.train.steps=9", "evals.sums.strategies.1=vote:8"))
    lines = {line.split(":")[0].strip(): line.strip() for line in text.splitlines()}
    assert lines["model"] == "model: spark  # my.yaml:3"
    assert lines["steps"] == "steps: 9  # --set stages.sft.train.steps"
    assert lines["learning_rate"] == "learning_rate: 0.001  # my.yaml:17, the text 1e-3 read as the number 0.001"
    assert lines["strategies"] == "strategies: [greedy, vote:8]  # my.yaml:8; --set evals.sums.strategies.1"
    assert lines["clip_norm"] == "clip_norm: 1.0" and lines["adam_epsilon"] == "adam_epsilon: 1.0e-08"
    assert lines["- task"] == "- task: sums  # my.yaml:13"
    assert lines["mask"] == "mask: completion"


def test_it_is_yaml_to_any_reader_and_the_same_recipe_to_us() -> None:
    found = recipe()
    text = write(found)
    assert yaml.safe_load(text) == found.recipe.model_dump(mode="json")
    Path("resolved.yaml").write_text(text)
    assert load("resolved.yaml").recipe == found.recipe
    again = load("resolved.yaml", ["seed=5"])
    assert again.recipe == found.recipe.model_copy(update={"seed": 5})


TEXTS = st.text(
    st.characters(exclude_categories=("Cs",)) | st.sampled_from("#:-'\"\\\n\t\r\x85\u2028\ufeff\x1b no~[]{},&*!%@"),
    max_size=20,
)
NAMES = st.from_regex(r"[a-z][a-z0-9_-]{0,6}", fullmatch=True).filter(
    lambda n: n not in ("con", "prn", "aux", "nul", "base")
)


@st.composite
def recipes(draw: Any) -> dict[str, Any]:
    """Recipes with awkward texts and numbers in every kind of place."""
    number = st.floats(1e-12, 1e12, allow_nan=False)
    evals = {
        name: {
            "task": "sums",
            "rows": draw(st.integers(1, 10**12)),
            "levels": draw(st.none() | st.lists(st.sampled_from([2, 3, 4]), min_size=1, unique=True)),
            "strategies": ["greedy", f"vote:{draw(st.integers(1, 99))}"],
            "temperature": draw(number),
            "stop": draw(st.lists(TEXTS.filter(bool), max_size=3)),
        }
        for name in draw(st.lists(NAMES, max_size=2, unique=True))
    }
    stage = {
        "name": draw(NAMES),
        "method": draw(st.sampled_from(["sft", {"name": "simpo", "beta": 3, "tags": ["no", "1e5", "a: b"]}])),
        "data": {"file": draw(TEXTS.filter(bool)), "columns": draw(st.dictionaries(TEXTS, TEXTS, max_size=2))},
        "train": {"steps": 3, "learning_rate": draw(number), "clip_norm": draw(st.none() | number)},
    }
    return {
        "burnish": 1,
        "name": draw(NAMES),
        "about": draw(TEXTS),
        "model": draw(TEXTS.filter(bool)),
        "seed": draw(st.integers(0, 2**62)),
        "budget": {"flops": draw(st.none() | number)},
        "evals": evals,
        "stages": [stage],
    }


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipes())
def test_any_recipe_survives_being_written_and_read(data: dict[str, Any]) -> None:
    text = yaml.safe_dump(data, allow_unicode=False, default_style='"')
    found = resolve(read(text, "my #1\n.yaml"))
    written = write(found)
    assert resolve(read(written, "resolved.yaml")).recipe == found.recipe
    assert yaml.safe_load(written) == found.recipe.model_dump(mode="json")
    assert not re.search(r"[^\n -~]", written)


def test_the_text_of_the_recipe_is_kept_as_it_was() -> None:
    Path("my.yaml").write_text(GOOD)
    assert load("my.yaml", ["seed=1"]).text == GOOD
