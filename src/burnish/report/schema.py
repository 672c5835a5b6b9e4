"""The shape of report.json, schema 1. `schema.json` beside this file is the same for other tools:
`python -m burnish.report.schema > schema.json`.

Null means not measured. Shares and differences are fractions (0.452), intervals are 95 % [low, high], times are seconds.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

VERSION = 1
State = Literal["finished", "stopped by budget", "running", "interrupted", "failed", "crashed", "unknown"]
Outcome = Literal["improved", "no significant change", "worse", "invalid"]
Metric = Literal["accuracy", "likelihood"]  # of answers; of the wanted tokens of held-out rows, where nothing is sampled
Share = Annotated[float, Field(ge=0, le=1)]
Whole = Annotated[int, Field(ge=0)]
Limits = Annotated[list[float], Field(min_length=2, max_length=2)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=(), strict=True)


class Run(Part):
    name: str
    folder: str
    about: str | None
    recipe: str | None
    model: str | None
    seed: int | None
    state: State = Field(description="what became of the run, judged from its files and its lock")
    state_words: str
    started: str | None
    finished: str | None
    starts: Whole | None = Field(description="how often the run was started: 1, and one more for every resume")


class Primary(Part):
    """The one comparison the verdict is about: the last stage that was evaluated, against the base model."""

    eval: str
    strategy: str
    metric: Metric
    stage: str
    n: Whole
    base: Share
    base_interval: Limits
    value: Share
    value_interval: Limits
    difference: float
    interval: Limits
    p: Share


class TrainingCost(Part):
    tokens: Whole | None = Field(description="tokens sent through the model in training")
    label_tokens: Whole | None
    executed_flops: Whole | None
    seconds: float | None


class AnswerCost(Part):
    sampled_tokens: float | None
    executed_flops: float | None


class Cost(Part):
    training: TrainingCost = Field(description="of all stages up to the one judged")
    answer: AnswerCost = Field(description="per question, by the judged stage and strategy")
    base_answer: AnswerCost


class Verdict(Part):
    outcome: Outcome
    headline: str
    sentence: str
    cost_sentence: str | None
    reasons: list[str] = Field(description="why the outcome is invalid; empty otherwise")
    primary: Primary | None
    cost: Cost | None


class Warning_(Part):
    level: Literal["doubt", "note"] = Field(description="doubt: it weakens the verdict or the run is not whole")
    about: str
    text: str


class Curves(Part):
    steps_per_point: int = Field(ge=1, description="each point stands for this many steps: mean loss, largest gradient norm")
    step: list[int]
    loss: list[float | None]
    grad_norm: list[float | None]
    lr: list[float | None]
    validation_step: list[int]
    validation_loss: list[float | None]
    resumed_after: list[int]
    median_tokens_per_s: float | None


class Series(Part):
    """A metric a method logs besides the curves; the steps that did not log it are left out."""

    metric: str = Field(description="its name in the glossary of metrics")
    reward: str | None = Field(description="of this reward alone, where there are several; null: of the step or the total")
    unit: str
    step: list[int]
    per_point: float = Field(description="how many steps a point stands for, on average")
    value: list[float] = Field(description="the mean of the steps a point stands for, of a largest value the largest")
    first: float = Field(description="mean over the first tenth of the steps that logged it")
    last: float = Field(description="mean over the last tenth")


class Drawn(Part):
    """One completion of a round, and what training made of it."""

    text: str
    cut: Whole = Field(description="characters left out at the end, to keep the file small")
    tokens: Whole
    finish: str
    rewards: dict[str, float | None]
    total: float | None = Field(description="null: no reward is known, and the completion is no part of the baseline")
    advantage: float | None = Field(description="as the objective got it, the mean over its tokens where they differ; null: not recorded")
    live: bool | None = Field(description="whether any of its tokens had a gradient")


class Group(Part):
    """One prompt of a round."""

    group: Whole
    where: str | None
    prompt: str | None
    prompt_cut: Whole
    answer: str | None
    completions: list[Drawn]
    more: Whole = Field(description="completions left out, to keep the file small")


class DrawnRound(Part):
    round: Whole = Field(description="its number, from 0")
    prompts: Whole
    groups: list[Group] = Field(description="its first few, whatever they are")


class Data(Part):
    rows: Whole | None
    validation_rows: Whole | None
    dropped: dict[str, int]
    tokens: Whole | None
    label_tokens: Whole | None
    longest: Whole | None
    format: str | None
    sources: list[str]
    notices: list[str]


class MaskedRow(Part):
    where: str
    tokens: list[tuple[str, bool]] = Field(description="(text, is it learned)")
    total: Whole
    trained: Whole
    cut: Whole = Field(description="tokens left out at the end, to keep the file small")


class Spend(Part):
    prefill_tokens: float | None
    sampled_tokens: float | None
    scored_tokens: float | None
    useful_flops: float | None
    executed_flops: float | None


class Strategy(Part):
    strategy: str
    oracle: bool = Field(description="reads the gold answer: a ceiling, left out of verdict and frontier")
    n: Whole
    accuracy: Share = Field(description="the mean of the metric")
    interval: Limits
    completions: Whole = Field(description="texts drawn for all questions; what the next four are counted in")
    truncated: Whole | None = Field(description="completions cut at the token limit")
    truncated_share: Share | None
    unanswered: Whole | None = Field(description="completions in which no answer was found")
    unanswered_share: Share | None
    per_question: Spend


class Eval(Part):
    eval: str
    task: str | None
    fold: str | None
    metric: Metric
    n: Whole
    items: str = Field(description="hash of the item ids in order: equal hashes may be compared in pairs")
    seconds: float | None
    settings: dict[str, Any]
    strategies: list[Strategy]


class Phase(Part):
    tokens: dict[str, int]
    useful_flops: Whole | None
    executed_flops: Whole | None
    seconds: float | None


class Ledger(Part):
    tokens: dict[str, int] = Field(description="by role: stream, label, prefill, sampled, scored")
    useful_flops: Whole | None
    executed_flops: Whole | None
    work_efficiency: float | None = Field(description="useful / executed over the phases that measure both")
    seconds: float | None
    peak_memory_bytes: Whole | None
    joules: float | None
    money: float | None
    phases: dict[str, Phase]


class Stage(Part):
    name: str
    folder: str | None
    method: str | None
    status: str
    steps: Whole | None
    skipped_steps: Whole | None
    stopped_by: str | None
    input: str | None
    output: str | None
    data: Data | None
    mask_view: list[MaskedRow]
    curves: Curves | None
    series: list[Series]
    rounds: list[DrawnRound] = Field(description="of a stage that draws: the first, the last, and one halfway")
    evals: list[Eval]
    ledger: Ledger | None


class Comparison(Part):
    """One system against another on the same items."""

    eval: str
    kind: Literal["stage", "strategy"]
    metric: Metric
    test: Literal["exact McNemar", "sign flips"]
    stage: str
    strategy: str
    against_stage: str
    against_strategy: str
    oracle: bool
    n: Whole
    accuracy: Share
    against_accuracy: Share
    difference: float
    interval: Limits
    p: Share
    wins: Whole = Field(description="items on which this one did better")
    losses: Whole
    outcome: Literal["better", "no significant change", "worse"]
    sentence: str


class FrontierPoint(Part):
    stage: str
    strategy: str
    accuracy: Share
    interval: Limits
    sampled_tokens: float | None
    executed_flops: float | None
    on_frontier: bool = Field(description="no other point of this eval is at least as accurate for less")
    best_buy: bool = Field(description="on the frontier, and the cheapest or clearly better than the best buy below it")
    p: Share | None = Field(description="of the paired test against the best buy below it; null off the frontier and for the cheapest")


class StageCost(TrainingCost):
    stage: str


class Frontier(Part):
    """Accuracy against one kind of cost per question."""

    eval: str
    axis: Literal["sampled_tokens", "executed_flops"] = Field(description="the cost; where strategies also score, FLOPs alone")
    points: list[FrontierPoint]
    training: list[StageCost] = Field(description="spent once to have each stage: of all stages up to it, 0 for the base model")
    sentence: str = Field(description="the best buy at every price, in words")


class SampleCompletion(Part):
    strategy: str
    text: str
    answer: str | None
    correct: bool | None
    cut: Whole = Field(description="characters left out at the end, to keep the file small")


class SampleStage(Part):
    stage: str
    completions: list[SampleCompletion]


class Sample(Part):
    eval: str
    id: str
    prompt: str
    prompt_cut: Whole
    gold: str | None
    level: str | None
    stages: list[SampleStage]


class Decision(Part):
    name: str
    value: str
    why: str | None
    measured: dict[str, Any]


class Provenance(Part):
    recipe: str | None
    resolved: str | None
    decisions: list[Decision]
    environment: dict[str, Any]
    seed: int | None
    hashes: list[tuple[str, str]]
    command: str | None


class Report(Part):
    """report.json"""

    version: Literal[1] = Field(alias="schema")
    burnish: str
    run: Run
    verdict: Verdict
    warnings: list[Warning_]
    stages: list[Stage] = Field(min_length=1, description="stages[0] is the base model")
    comparisons: list[Comparison]
    frontiers: list[Frontier]
    ledger: Ledger
    samples: list[Sample]
    provenance: Provenance


def json_schema() -> str:
    """The text of schema.json."""
    schema = Report.model_json_schema(by_alias=True)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "burnish report.json, schema 1"}
    return json.dumps(head | {k: v for k, v in schema.items() if k != "title"}, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
