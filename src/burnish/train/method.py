"""What a method gives the loop: where batches come from, what is done to a whole batch, and the objective of a part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from burnish.core.records import Rendered, Spend
from burnish.core.runs import StageFolder
from burnish.data.chat import Mask, Prepared
from burnish.data.sampler import Sampler
from burnish.forest.pack import Batch, Micro
from burnish.maths.head import Objective
from burnish.models.policy import Policy, RowLoss
from burnish.train.memory import Plan
from burnish.train.optim import Beside, Optimiser


@dataclass(frozen=True)
class Pass:
    """One forward and backward of a micro-batch. policy: whose; objective None: nothing but what `on_rows` says."""

    policy: Policy
    objective: Objective | None
    couple: Tensor | None = None
    on_rows: RowLoss | None = None


@dataclass
class Work:
    """One optimiser batch. `columns` are captured tensors in the batch's entry order [M] or unit order [units].

    made   None until `prepare` where a method makes its own data, and after it where there is nothing to learn from it
    part     (step, steps) of the part of the stage its learning rate is scheduled over; None: the whole stage
    restart  weights by name to begin again from, without moments; None: go on
    spend    what making it cost an engine; facts: metrics of it besides the loop's own; notices: what a person should know
    seconds  phase -> the wall time of `prepare` that is not the training's own
    policy_moves  False where only what is trained beside the policy learns from it
    """

    made: Batch | None
    rows: int
    where: tuple[str, ...] = ()
    epoch: float = 0.0
    columns: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    part: tuple[int, int] | None = None
    restart: Mapping[str, Tensor] | None = None
    spend: Spend = field(default_factory=Spend)
    facts: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    policy_moves: bool = True

    @property
    def batch(self) -> Batch:
        """The batch, once there is one."""
        assert self.made is not None
        return self.made

    def logged(self) -> dict[str, Any]:
        """The facts that are metrics."""
        return {name: value for name, value in self.facts.items() if not name.startswith("_")}


class Material(Protocol):
    """What a method is built from: a stage's data and the numbers that order it. `build` makes it."""

    def render(self, mask: Mask) -> tuple[Prepared, tuple[Rendered, ...]]:
        """(training rows, validation rows) as ids, labels chosen by `mask`. Raises DataError."""
        ...

    def sampler(self, rows: int) -> Sampler: ...

    def questions(self, hint: str | None = None) -> tuple[Prepared, list[Any]]:
        """(the rows as prompts to be answered, the same as `methods.rounds.Question`). Raises DataError.

        hint  what takes the place of the last turn where the answer is told
        """
        ...

    def gold(self, questions: Sequence[Any]) -> list[tuple[int, ...]]:
        """The completion each question's own row gives, its end included. Raises DataError for a row without one."""
        ...

    def scored(self, reward: str) -> tuple[Prepared, list[float]]:
        """Completions with the number in their column `reward`, or stored ones with their own. Raises DataError."""
        ...

    def text(self, token: int) -> str:
        """What a token adds to a text."""
        ...

    def steps(self, sampler: Sampler, each: int = 1) -> int:
        """Optimiser steps of the whole stage, `each` of them for every batch of rows where epochs say how many."""
        ...

    def seed(self, purpose: str) -> int:
        """A seed of this stage's own."""
        ...

    @property
    def end_ids(self) -> Sequence[int]:
        """What ends a completion."""
        ...


class Hooks:
    """What most methods have nothing to say to."""

    def start(self, policy: Any, folder: StageFolder, poll: Callable[[], None]) -> None:
        """Before the first step, and before a checkpoint is loaded. `poll` raises when the run is asked to stop."""

    def close(self) -> None:
        """After the last step, also when it failed."""

    def state(self) -> dict[str, Any]:
        """What a resume needs besides the step, as JSON."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""

    def objective(self, work: Work, micro: Micro) -> tuple[Objective, Tensor | None]:
        """The objective of one micro-batch and its coupling ids [M] (None: tokens are independent)."""
        raise NotImplementedError

    def forwards(self, policy: Policy, work: Work, micro: Micro) -> Sequence[Pass]:
        """What is run of one micro-batch: the policy under `objective`."""
        return [Pass(policy, *self.objective(work, micro))]

    def observe(self, work: Work, micro: Micro, logprobs: Tensor) -> None:
        """The trainer's log-probs of a micro-batch, detached."""

    def beside(self, learning_rate: float) -> Beside | None:
        """What is trained beside a policy that is trained at `learning_rate`, once `start` was called."""
        return None

    def exports(self) -> Mapping[str, Callable[[Path], None]]:
        """Files that go with the trained model: path in its folder -> what writes it."""
        return {}

    def update(self, policy: Any, optimiser: Optimiser, work: Work, plan: Plan, rate: float) -> int | None:
        """A step of the method's own in place of clipping and the optimiser's, from gradients that are finite.

        Returns the FLOPs it executed; None: the optimiser is to step.
        """
        return None


class Method(Protocol):
    """Three hooks of the one loop, and those of `Hooks`. `batches(step)` starts at that step and is a pure function of it."""

    total_steps: int

    def batches(self, step: int) -> Iterator[Work]: ...

    def prepare(self, policy: Any, work: Work) -> None:
        """No gradient, whole batch: rollouts and rewards, weights, reference log-probs, statistics."""
        ...

    def objective(self, work: Work, micro: Micro) -> tuple[Objective, Tensor | None]:
        """The objective of one micro-batch and its coupling ids [M] (None: tokens are independent)."""
        ...

    def start(self, policy: Any, folder: StageFolder, poll: Callable[[], None]) -> None: ...

    def close(self) -> None: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: Mapping[str, Any]) -> None: ...

    def forwards(self, policy: Policy, work: Work, micro: Micro) -> Sequence[Pass]: ...

    def observe(self, work: Work, micro: Micro, logprobs: Tensor) -> None: ...

    def update(self, policy: Any, optimiser: Optimiser, work: Work, plan: Plan, rate: float) -> int | None: ...

    def beside(self, learning_rate: float) -> Beside | None: ...

    def exports(self) -> Mapping[str, Callable[[Path], None]]: ...
