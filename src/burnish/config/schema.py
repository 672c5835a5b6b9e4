"""What a recipe may say. Inert: building one reads nothing, calls nothing, decides nothing.

A field's description is the phrase that follows `wanted` in error messages, its first example what to type instead.
Contradictions between keys are refused in `contradictions`; names of table rows are looked up in `load`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from burnish.core.grammar import parse
from burnish.core.runs import check_name

FORMAT = 1  # the recipe format this burnish reads
LIKELIHOOD = "likelihood"  # the one strategy of held-out rows: nothing is sampled


Name = Annotated[str, AfterValidator(check_name)]
Strategy = Annotated[str, AfterValidator(lambda text: str(parse(text)))]
RowShape = Literal["auto", "messages", "sharegpt", "prompt_completion", "alpaca", "text", "prompt"]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A mapping of the recipe: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Choice(BaseModel):
    """A row of a table and its parameters, `{name: dpo, beta: 0.2}`; `dpo` alone is the published setting."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    name: str = Field(min_length=1, description="the name of a row, or your own file.py:function")

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Budget(Section):
    """Where to stop cleanly, save, and say so. Null means no limit."""

    seconds: float | None = Field(
        default=None, gt=0, description="a number of seconds above 0, or null", examples=[600]
    )
    tokens: Positive | None = Field(
        default=None, description="a whole number of tokens above 0, or null", examples=[1000000]
    )
    flops: float | None = Field(default=None, gt=0, description="a number of FLOPs above 0, or null", examples=["1e15"])
    money: float | None = Field(default=None, gt=0, description="an amount above 0, or null", examples=[5])


class Source(Section):
    """Training rows: made by a task, or read from a file."""

    task: str | None = Field(default=None, description="the name of a task, or null", examples=["sums"])
    levels: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="a list of levels", examples=["[2, 3]"]
    )
    rows: Positive | None = Field(default=None, description="how many rows the task makes, 1 or more", examples=[4096])
    fold: Literal["train", "validation", "test"] = Field(default="train", description="train, validation or test")
    target: Literal["rationale", "answer"] = Field(default="rationale", description="rationale or answer")
    shots: int = Field(
        default=0, ge=0, description="solved questions shown before each question, as plain text; 0 for none", examples=[8]
    )
    file: str | None = Field(default=None, min_length=1, description="the path of a data file", examples=["rows.jsonl"])
    format: RowShape = Field(default="auto", description=f"one of {', '.join(get_args(RowShape))}", examples=["auto"])
    columns: dict[str, str] = Field(
        default={},
        description="a mapping from our column to yours",
        examples=["{prompt: question, completion: answer}"],
    )
    on_bad_row: Literal["error", "skip"] = Field(default="error", description="error or skip")
    limit: Positive | None = Field(
        default=None, description="read at most this many rows, 1 or more, or null", examples=[1000]
    )


class Train(Section):
    """The one training loop. Exactly one of steps and epochs."""

    steps: Positive | None = Field(
        default=None, description="a whole number of optimiser steps above 0", examples=[100]
    )
    epochs: float | None = Field(default=None, gt=0, description="passes over the rows, a number above 0", examples=[1])
    batch_rows: int = Field(default=32, ge=1, description="rows per optimiser step, 1 or more", examples=[32])
    learning_rate: float = Field(gt=0, description="the peak step size, a number above 0", examples=["1e-4"])
    schedule: Choice = Field(
        default=Choice(name="constant"), description="a schedule, or {name: cosine, ...}", examples=["cosine"]
    )
    weight_decay: float = Field(default=0.0, ge=0, description="a number, 0 or more", examples=[0.01])
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="a number from 0 to below 1", examples=[0.9])
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="a number from 0 to below 1", examples=[0.999])
    adam_epsilon: float = Field(default=1e-8, gt=0, description="a number above 0", examples=["1e-8"])
    clip_norm: float | None = Field(
        default=1.0, gt=0, description="the largest gradient norm, above 0, or null for off", examples=[1.0]
    )
    micro_tokens: Positive | Literal["auto"] = Field(
        default="auto", description="tokens per forward pass, 1 or more, or auto", examples=["auto"]
    )
    checkpointing: Literal["auto", "off", "layers"] = Field(
        default="auto", description="auto, off or layers: what the backward computes again", examples=["auto"]
    )
    memory_bytes: float | None = Field(
        default=None,
        gt=0,
        description="the most memory the process may hold in a step, in bytes, or null for what is free",
        examples=["4e9"],
    )
    max_tokens: int | None = Field(
        default=None,
        ge=2,
        description="the longest row in tokens, 2 or more, or null for the model's own limit",
        examples=[512],
    )
    on_long_row: Literal["error", "drop", "truncate"] = Field(default="error", description="error, drop or truncate")
    checkpoint_every: Positive | None = Field(
        default=None, description="a number of steps, 1 or more, or null for only the last", examples=[100]
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="a whole number, 1 or more", examples=[2])
    validate_every: Positive | None = Field(
        default=None, description="a number of steps, 1 or more, or null for never", examples=[50]
    )
    validation_rows: Positive | None = Field(
        default=None, description="rows held out of training to judge on, 1 or more, or null for none", examples=[200]
    )
    max_skipped_steps: int = Field(
        default=10, ge=0, description="how many steps in a row may be skipped, 0 or more", examples=[10]
    )


class Reward(Choice):
    """One component of the reward, `{name: number, weight: 0.5, ...params}`; a name alone has weight 1."""

    name: str = Field(
        min_length=1, description="the name of a reward, or your own file.py:function", examples=["number"]
    )
    weight: float = Field(default=1.0, description="a number, how much it counts; 0 only records it", examples=[0.5])
    label: str | None = Field(
        default=None, min_length=1, description="what reports call it, or null for its name", examples=["brevity"]
    )
    columns: dict[str, str] = Field(
        default={}, description="a mapping from a parameter to your column", examples=["{answer: solution}"]
    )

    @property
    def title(self) -> str:
        """What reports, gates and routes call it: the label, else the row's or the function's name."""
        return self.label or self.name.rpartition(":")[2]


class Route(Section):
    """Which rewards apply to which rows: by what a column holds."""

    column: str = Field(min_length=1, description="the name of a column", examples=["source"])
    rewards: dict[str, tuple[str, ...]] | None = Field(
        default=None,
        description="a mapping from a value of the column to a list of rewards, or null where the column lists them",
        examples=["{math: [number], chat: [think]}"],
    )


class Rewards(Section):
    """What a completion is worth: components, how they are joined, and the limits of the functions that score."""

    use: tuple[Reward, ...] = Field(min_length=1, description="a reward, or a list of them", examples=["[number]"])
    combine: Choice = Field(
        default=Choice(name="sum"), description="sum, or {name: gated, gate: ...}", examples=["sum"]
    )
    steps: Choice | None = Field(
        default=None,
        description="how process rewards cut a completion into steps, or null for lines",
        examples=["numbered"],
    )
    route: Route | None = Field(default=None, description="a mapping with column, or null: all rewards everywhere")
    deadline_s: float = Field(
        default=10.0, gt=0, description="the seconds one call may take, a number above 0", examples=[10]
    )
    max_error_rate: float = Field(
        default=0.1, ge=0, le=1, description="the share of a batch that may fail, from 0 to 1", examples=[0.1]
    )
    workers: int = Field(default=2, ge=1, description="child processes for each function of yours", examples=[2])


class Curriculum(Section):
    """Prompts whose running pass rate is between low and high, and those not drawn yet, are drawn more often.

    priority  band: those within `favour` times as often as the others; variance: in proportion to p (1 - p), from once for
              what never or always passes to `favour` times for what passes half the time
    """

    priority: Literal["band", "variance"] = Field(default="band", description="band or variance", examples=["band"])
    low: float = Field(default=0.0, ge=0, lt=1, description="a pass rate from 0 to below 1, itself too low", examples=[0.0])
    high: float = Field(default=1.0, gt=0, le=1, description="a pass rate above 0, up to 1, itself too high", examples=[1.0])
    favour: float = Field(default=4.0, gt=1, description="how many times as often, a number above 1", examples=[4])
    memory: float = Field(
        default=0.5, ge=0, lt=1, description="how much of a running rate stays when a prompt is drawn again, from 0 to below 1", examples=[0.5]
    )
    above: float = Field(default=0.5, description="a number: a reward above it is a pass", examples=[0.5])


class Screen(Section):
    """Measure every prompt's pass rate once, before the first round, and leave out what is not between low and high."""

    samples: int = Field(default=8, ge=1, description="completions of each prompt to measure by, 1 or more", examples=[8])
    low: float = Field(default=0.0, ge=0, lt=1, description="a pass rate from 0 to below 1, itself too low", examples=[0.0])
    high: float = Field(default=1.0, gt=0, le=1, description="a pass rate above 0, up to 1, itself too high", examples=[1.0])
    above: float = Field(default=0.5, description="a number: a reward above it is a pass", examples=[0.5])


class Rollouts(Section):
    """How completions are drawn to be learned from. A round draws for `train.batch_rows` prompts."""

    group_size: int = Field(default=8, ge=1, description="completions for each prompt, 1 or more", examples=[8])
    temperature: float = Field(default=1.0, gt=0, description="a number above 0", examples=[1.0])
    top_k: int = Field(default=0, ge=0, description="a whole number, 0 for off", examples=[0])
    top_p: float = Field(default=1.0, gt=0, le=1, description="a number above 0, up to 1 for off", examples=[1.0])
    min_p: float = Field(default=0.0, ge=0, lt=1, description="a number from 0 (off) to below 1", examples=[0.0])
    max_new_tokens: int = Field(default=256, ge=1, description="a whole number, 1 or more", examples=[256])
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="a list of texts that end a completion", examples=['["\\n\\n"]']
    )
    refill: int = Field(
        default=0, ge=0, description="how often other prompts are drawn in place of groups of equal rewards, 0 or more",
        examples=[2],
    )  # fmt: skip
    partial: int = Field(
        default=0, ge=0,
        description="prompts drawn for beyond those of a round, 0 or more: a round ends with its first batch_rows groups, the others go on in the next",
        examples=[8],
    )  # fmt: skip
    overlong_cushion: Positive | None = Field(
        default=None,
        description="the last tokens before max_new_tokens that cost reward, 1 or more, or null for none",
        examples=[64],
    )
    old_logprobs: Literal["auto", "sampler", "trainer"] = Field(
        default="auto", description="auto, sampler or trainer: whose log-probs are those of the old policy"
    )
    stop_after_dead_rounds: Positive | None = Field(
        default=None,
        description="stop after this many rounds in a row without a live group, 1 or more, or null for never",
        examples=[10],
    )
    updates: int = Field(default=1, ge=1, description="optimiser steps that share a round's prompts, 1 or more", examples=[1])
    passes: int = Field(default=1, ge=1, description="how often a round is learned from, 1 or more", examples=[1])
    curriculum: Curriculum | None = Field(
        default=None, description="a mapping with low, high, favour ..., or null: prompts in epochs", examples=["{favour: 4}"]
    )
    screen: Screen | None = Field(default=None, description="a mapping with samples, low, high, or null: every prompt", examples=["{samples: 8}"])


class Prune(Section):
    """Rollouts that are cut where the critic has lost hope of them: V(s) < below * the best V so far, at the end of a step."""

    below: float = Field(default=0.5, gt=0, le=1, description="a share of the best value so far, above 0, up to 1", examples=[0.5])
    step_end: str = Field(default="\n", min_length=1, description="the text that ends a step", examples=['"\\n"'])
    chunk_tokens: int = Field(default=32, ge=1, description="tokens drawn between two looks, 1 or more", examples=[32])


class Critic(Section):
    """The critic of a method that takes values, such as ppo: what it is and how it learns.

    trunk           shared: a linear output on the policy's own final hidden rows; separate: on those of a body of its own,
                    a copy of the model as the stage begins
    trains_body     whether the value's gradient goes on into that body. null: into a separate one, not into the policy's
    learning_rate   null: 10 times train.learning_rate, on the same schedule
    value_coef      weight of the value's loss beside the policy's; with Adam it matters where both train one body
    value_clip      no gain from moving a value further than this from the round's own; null for none
    pretrain_steps  so many of the stage's first steps train the critic alone: the policy's weights do not change
    truncated       of a completion that was cut. scored: what it was worth is its reward as it stands, and no value
                    follows; bootstrapped: its reward is taken as unknown, and the value of its last state stands for it
    """

    trunk: Literal["shared", "separate"] = Field(default="shared", description="shared or separate", examples=["shared"])
    trains_body: bool | None = Field(default=None, description="true, false, or null: a separate body yes, the policy's no", examples=["null"])
    learning_rate: float | None = Field(
        default=None, gt=0, description="a number above 0, or null for 10 times train.learning_rate", examples=["1e-3"]
    )
    value_coef: float = Field(default=0.1, gt=0, description="a number above 0", examples=[0.1])
    value_clip: float | None = Field(default=0.2, gt=0, description="a number above 0, or null for off", examples=[0.2])
    pretrain_steps: int = Field(default=0, ge=0, description="a number of steps, 0 or more", examples=[10])
    truncated: Literal["scored", "bootstrapped"] = Field(default="scored", description="scored or bootstrapped", examples=["scored"])
    prune: Prune | None = Field(default=None, description="a mapping with below, step_end, chunk_tokens, or null", examples=["{below: 0.5}"])


class Stage(Section):
    """One step of the pipeline; it starts from the model the stage before it left."""

    name: Name = Field(description="a short name for the stage's folder", examples=["sft"])
    method: Choice = Field(description="a method, or {name: sft, ...}", examples=["sft"])
    data: tuple[Source, ...] = Field(min_length=1, description="a source of rows, or a list of them")
    train: Train = Field(description="a mapping with steps or epochs, learning_rate, batch_rows ...")
    rewards: Rewards | None = Field(
        default=None, description="a reward, a list of them, or a mapping with use, combine ...; or null"
    )
    rollouts: Rollouts | None = Field(
        default=None, description="a mapping with group_size, max_new_tokens ..., or null", examples=["{group_size: 8}"]
    )
    critic: Critic | None = Field(
        default=None, description="a mapping with trunk, learning_rate ..., or null", examples=["{trunk: separate}"]
    )
    adapter: Choice | None = Field(
        default=None, description="an adapter, {name: lora, ...}, or null", examples=["lora"]
    )
    budget: Budget = Field(default=Budget(), description="a mapping of seconds, tokens, flops, money")
    evaluate: tuple[str, ...] | None = Field(
        default=None, description="a list of eval names, or null for all of them", examples=["[sums]"]
    )


class Eval(Section):
    """Questions with known answers, and the strategies that answer them."""

    task: str | None = Field(default=None, description="the name of a task, or null", examples=["sums"])
    levels: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="a list of levels", examples=["[2, 3]"]
    )
    rows: Positive | None = Field(
        default=None, description="how many questions, 1 or more (null: all of the file)", examples=[500]
    )
    fold: Literal["test", "validation"] = Field(
        default="test", description="test or validation: an eval is never judged on training rows"
    )
    shots: int = Field(
        default=0, ge=0, description="solved questions shown before each question, as plain text; 0 for none", examples=[8]
    )
    file: str | None = Field(
        default=None, min_length=1, description="the path of a .jsonl file", examples=["test.jsonl"]
    )
    columns: dict[str, str] = Field(
        default={}, description="a mapping from our column to yours", examples=["{prompt: question, answer: gold}"]
    )
    strategies: tuple[Strategy, ...] = Field(
        default=("greedy",), min_length=1, description="a list of strategies", examples=["[greedy, vote:16]"]
    )
    temperature: (
        Annotated[float, Field(ge=0)] | Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)]
    ) = Field(
        default=1.0, description="a number, 0 or more, or a list to choose from on a validation fold", examples=[0.7]
    )
    validation_rows: Positive | None = Field(
        default=None, description="how many rows choose the temperature, 1 or more, or null", examples=[200]
    )
    max_new_tokens: int = Field(default=256, ge=1, description="a whole number, 1 or more", examples=[256])
    top_k: int = Field(default=0, ge=0, description="a whole number, 0 for off", examples=[0])
    top_p: float = Field(default=1.0, gt=0, le=1, description="a number above 0, up to 1 for off", examples=[1.0])
    min_p: float = Field(default=0.0, ge=0, lt=1, description="a number from 0 (off) to below 1", examples=[0.05])
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="a list of texts that end a completion", examples=['["\\n\\n"]']
    )


class Primary(Section):
    """The one number the verdict is about."""

    eval: str = Field(description="the name of an eval", examples=["sums"])
    strategy: Strategy = Field(default="greedy", description="one of that eval's strategies", examples=["greedy"])


class Report(Section):
    """What the report puts first."""

    primary: Primary | None = Field(default=None, description="a mapping {eval: ..., strategy: ...}, or null")


class Recipe(Section):
    """A whole run: a model, the stages it goes through, and how it is judged before the first and after each."""

    burnish: int = Field(ge=1, le=FORMAT, description=f"the recipe format, {FORMAT}", examples=[FORMAT])
    name: Name = Field(description="a short name for the run's folder", examples=["my-run"])
    about: str = Field(default="", description="a sentence about the recipe", examples=["what this shows"])
    model: str = Field(min_length=1, description="a bundled model, a local folder or a hub id", examples=["spark"])
    seed: int = Field(default=0, ge=0, lt=2**63, description="a whole number, 0 or more", examples=[0])
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="auto, float32 or bfloat16")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto, cpu or cuda")
    budget: Budget = Field(default=Budget(), description="a mapping of seconds, tokens, flops, money")
    evals: dict[Name, Eval] = Field(default={}, description="a mapping from a name to an eval")
    stages: tuple[Stage, ...] = Field(default=(), description="a list of stages")
    report: Report = Field(default=Report(), description="a mapping with primary: {eval, strategy}")

    @property
    def held_out(self) -> dict[str, str]:
        """Eval name -> stage whose held-out rows it is the likelihood of; these evals need no entry in `evals`."""
        holding = [stage.name for stage in self.stages if stage.train.validation_rows]
        return {"held_out" if len(holding) == 1 else f"held_out-{name}": name for name in holding}


SECTIONS: dict[str, type[BaseModel]] = {
    "the recipe": Recipe,
    "stages.<name>": Stage,
    "stages.<name>.train": Train,
    "stages.<name>.data": Source,
    "stages.<name>.rewards": Rewards,
    "stages.<name>.rewards.use": Reward,
    "stages.<name>.rewards.route": Route,
    "stages.<name>.rollouts": Rollouts,
    "stages.<name>.rollouts.curriculum": Curriculum,
    "stages.<name>.rollouts.screen": Screen,
    "stages.<name>.critic": Critic,
    "stages.<name>.critic.prune": Prune,
    "evals.<name>": Eval,
    "budget": Budget,
    "report": Report,
    "report.primary": Primary,
}
CHOICES: dict[str, type[Choice]] = {"reward": Reward}  # kinds whose rows have keys of ours beside their parameters
ELSEWHERE = {  # what other trainers call our keys
    "lr": "learning_rate",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "batch_size": "batch_rows",
    "per_device_train_batch_size": "batch_rows",
    "gradient_accumulation_steps": "micro_tokens",
    "gradient_checkpointing": "checkpointing",
    "activation_checkpointing": "checkpointing",
    "lr_scheduler_type": "schedule",
    "max_grad_norm": "clip_norm",
    "max_length": "max_tokens",
    "max_seq_length": "max_tokens",
    "save_steps": "checkpoint_every",
    "eval_steps": "validate_every",
    "save_total_limit": "keep_checkpoints",
    "peft": "adapter",
    "dataset": "data",
    "n_samples": "rows",
    "model_name_or_path": "model",
    "run_name": "name",
    "num_generations": "group_size",
    "max_completion_length": "max_new_tokens",
    "num_iterations": "passes",
    "max_num_gen_batches": "refill",
    "partial_rollout": "partial",
    "over_sampling_batch_size": "partial",
    "torch_dtype": "dtype",
    "reward_funcs": "rewards",
    "reward_weights": "weight",
    "reward_fn": "rewards",
    "vf_coef": "value_coef",
    "cliprange_value": "value_clip",
    "critic_warmup": "pretrain_steps",
}
