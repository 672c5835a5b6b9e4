"""A package of small tables, so that these tests do not depend on which rows burnish has."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.core import signature, table

METHODS = '''
from __future__ import annotations
from typing import Literal
from burnish.core.table import About, Table
from toy.pairs import simpo


def sft(rows, *, mask: Literal["completion", "all"] = "completion", weights: str = "token_mean"):
    """Maximum likelihood (no paper)."""


METHODS = Table(
    "method",
    {"sft": sft, "simpo": simpo},
    also={"supervised": "sft"},
    about={"sft": About(taxonomy=("S1",), year=2022)},
)
'''
PAIRS = '''
def simpo(policy, *, beta: float = 2.0, gamma: float = 1.0, steps: int | None = None, tags: list[str] = []):
    """Simple preference optimisation (arXiv:2405.14734).

    More words.
    """
'''
SCHEDULES = '''
def constant(step, total, *, warmup: float = 0.0):
    """The peak rate throughout."""


def cosine(step, total, *, warmup: float = 0.0, floor: float = 0.0):
    """Half a cosine."""


SCHEDULES = Table("schedule", {"constant": constant, "cosine": cosine})
'''
ADAPTERS = '''
def lora(policy, *, rank: int = 16, alpha: float = 32.0, targets: Literal["all"] | list[str] = "all"):
    """Low-rank adapters (arXiv:2106.09685)."""


ADAPTERS = Table("adapter", {"lora": lora})
'''
TASKS = """
from toy.sums import SUMS
from toy import words

TASKS = Table("task", {"sums": SUMS, "words": words.WORDS})
"""
SUMS = '"""Sums with a free order of operations."""\nSUMS = Task(name="sums", make=make, levels=(2, 3, 4), verifier_needs_gold=True)\n'
WORDS = '"""Word problems."""\nWORDS = Task(name="words", verifier_needs_gold=False, has_answer_key=False)\n'
STRATEGIES = '''
def greedy(engine):
    """One answer, always the likeliest token."""


def sample(engine):
    """One sample."""


def vote(engine, *, n: int = 16):
    """The answer most samples agree on (arXiv:2203.11171)."""


def best_of(engine, *, n: int = 16, scorer: str, aggregation: str | None = None):
    """The sample a scorer likes best."""


def pass_at(engine, *, n: int = 16):
    """Oracle."""


STRATEGIES = Table(
    "strategy",
    {"greedy": greedy, "sample": sample, "vote": vote, "best_of": best_of, "pass": pass_at},
    also={"self_consistency": "vote"},
)
'''
SCORERS = '''
from typing import Literal


def rule(candidates):
    """The task's own verifier."""


def prm(candidates, *, aggregation: Literal["min", "last"] = "last"):
    """A process reward model."""


SCORERS = Table("scorer", {"rule": rule, "prm": prm}, also={"verifier": "rule"})
'''


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point the registry at a toy package; the working folder is a fresh one."""
    package = tmp_path / "source" / "toy"
    package.mkdir(parents=True)
    texts = {
        "methods": METHODS,
        "pairs": PAIRS,
        "schedules": SCHEDULES,
        "adapters": ADAPTERS,
        "tasks": TASKS,
        "sums": SUMS,
        "words": WORDS,
        "strategies": STRATEGIES,
        "scorers": SCORERS,
    }
    for name, text in texts.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.setattr(signature, "ROOT", package.parent)
    places = {
        "method": ("toy.methods:METHODS",),
        "schedule": ("toy.schedules:SCHEDULES",),
        "adapter": ("toy.adapters:ADAPTERS",),
        "task": ("toy.tasks:TASKS",),
        "strategy": ("toy.strategies:STRATEGIES",),
        "scorer": ("toy.scorers:SCORERS",),
    }
    monkeypatch.setattr(table, "TABLES", places)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work
