"""What methods that draw their own completions share: which round a step belongs to, drawn or read back, and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from burnish.core.errors import ConfigError, DataError, StorageError
from burnish.core.metrics import emit
from burnish.core.records import Sampling
from burnish.core.runs import StageFolder
from burnish.data.chat import Prepared
from burnish.methods.curriculum import Prompts
from burnish.methods.rounds import Carried, Round, Rounds, retire
from burnish.models.reference import Reference
from burnish.train.method import Hooks, Material, Work


class Online(Hooks):
    """A round is learned from in `updates` optimiser steps, `passes` times; each step takes its part of the questions.

    prompts          which questions a round asks: also `rounds.sampler`
    needs_reference  whether `reference` is made at the start: the policy the stage began with
    """

    validation = ()
    needs_reference = False

    def __init__(self, rounds: Rounds, prepared: Prepared, *, prompts: Prompts, updates: int, passes: int, total_steps: int) -> None:
        self.rounds, self.prepared, self.questions, self.prompts = rounds, prepared, rounds.questions, prompts
        self.updates, self.passes, self.total_steps = updates, passes, total_steps
        self.reference: Reference | None = None
        self.dead_rounds = 0
        self._round: Round | None = None
        self._drawn: tuple[int, str] | None = None  # the round in hand and the version of the weights that drew it
        self._folder: StageFolder | None = None

    def start(self, policy: Any, folder: StageFolder, poll: Callable[[], None]) -> None:
        """Before a checkpoint is loaded: the reference is the policy the stage began with."""
        self._folder, self.rounds.poll = folder, poll
        if self.needs_reference:
            self.reference = Reference(policy)

    def close(self) -> None:
        self.rounds.rewards.close()
        self.rounds.engine = self.reference = None

    def batches(self, step: int) -> Iterator[Work]:
        prompts = self.rounds.sampler.batch_rows
        per_round = self.updates * self.passes
        while step < self.total_steps:
            yield Work(None, rows=prompts // self.updates, epoch=(step // per_round + 1) * prompts / len(self.questions), step=step)
            step += 1

    @property
    def beforehand(self) -> int:
        """Completions drawn before the first round."""
        return 0 if self.prompts.screen is None else len(self.questions) * self.prompts.screen.samples

    def draw(self, policy: Any, number: int) -> Round:
        """Round `number`, with the present weights."""
        return self.rounds.draw(policy, number)

    def dead(self, drawn: Round) -> bool:
        """Whether a round has nothing to teach; too many of these in a row can stop a run."""
        return drawn.dead

    def state(self) -> dict[str, Any]:
        """What a resume needs besides the step."""
        carried = [c.to_json() for c in self.rounds.carried]
        return {"dead_rounds": self.dead_rounds, "drawn": self._drawn, "prompts": self.prompts.state(), "carried": carried}

    def load(self, state: Mapping[str, Any]) -> None:
        self.dead_rounds = state["dead_rounds"]
        self._drawn = None if state["drawn"] is None else (state["drawn"][0], state["drawn"][1])
        self.prompts.load(state["prompts"])
        self.rounds.carried = [Carried.from_json(row) for row in state.get("carried", ())]

    def round(self, policy: Any, work: Work) -> tuple[Round, range]:
        """The round this step belongs to, drawn or read back, and the questions of its part."""
        number, inside = divmod(work.step, self.updates * self.passes)
        before = self.rounds.rewards.seconds
        if self._round is None or self._round.number != number:
            self._round = self._read(number) if inside else self._draw(policy, number, work)
        work.seconds["reward"] = self.rounds.rewards.seconds - before
        part = range(inside % self.updates, len(self._round.questions), self.updates)
        work.where = tuple(self.questions[self._round.questions[q]].where for q in part)
        return self._round, part

    def _draw(self, policy: Any, number: int, work: Work) -> Round:
        """A new round, counted, logged and kept on disk."""
        if self.prompts.unscreened:
            self._screen(policy, work)
        found = self.draw(policy, number)
        work.facts |= emit(**self.prompts.saw(found))
        self._drawn = number, found.version
        self.dead_rounds = self.dead_rounds + 1 if self.dead(found) else 0
        work.spend += found.spend
        work.facts |= found.facts | emit(dead_rounds=self.dead_rounds)
        work.notices += self.rounds.news(found)
        if self._folder is not None:
            found.write(self._folder.trajectories(number))
            retire(self._folder, number)
        return found

    def _screen(self, policy: Any, work: Work) -> None:
        """Measure the pass rate of every prompt, once, and leave out those that are not within."""
        assert self.prompts.screen is not None
        measured = self.rounds.draw(policy, -1, chosen=range(len(self.questions)), group_size=self.prompts.screen.samples)
        work.spend += measured.spend
        work.notices += self.rounds.news(measured)
        work.facts |= emit(screened_prompts=self.prompts.screened(measured))

    def _read(self, number: int) -> Round:
        """The round in which a run was interrupted. What other weights drew is refused, never learned from."""
        path = None if self._folder is None else self._folder.trajectories(number)
        if path is None or not path.exists():
            raise StorageError("the round being learned from is gone", where=str(path), remedy="start the stage again, in a new run")
        found = Round.read(path)
        if self._drawn != (found.number, found.version):
            wanted = "no round" if self._drawn is None else f"round {self._drawn[0]}, drawn with weights {self._drawn[1]}"
            message = f"holds round {found.number}, drawn with weights {found.version}; the checkpoint is inside {wanted}"
            raise DataError(message, where=str(path), remedy="put back the folder's own file, or start the stage again")
        return found


def drawing(material: Material, rewards: Any, rollouts: Any) -> tuple[Rounds, dict[str, Any]]:
    """A stage's rounds, and the rest of what an `Online` is made of. `rollouts` is a config.schema.Rollouts.

    Raises DataError for the data.
    """
    prepared, questions = material.questions()
    sampler = material.sampler(len(questions))
    prompts = Prompts(sampler, rollouts.curriculum, rollouts.screen)
    sampling = Sampling(
        rollouts.temperature, rollouts.top_k, rollouts.top_p, rollouts.max_new_tokens, rollouts.stop, 0, rollouts.min_p
    )
    rounds = Rounds(
        questions, rewards, sampling, prompts, group_size=rollouts.group_size, seed=material.seed("rollouts"),
        end_ids=material.end_ids, greedy=False, refill=rollouts.refill, cushion=rollouts.overlong_cushion,
        partial=rollouts.partial,
    )  # fmt: skip
    steps = material.steps(sampler, rollouts.updates * rollouts.passes)
    return rounds, {"prepared": prepared, "prompts": prompts, "updates": rollouts.updates, "passes": rollouts.passes, "total_steps": steps}


def refuse(rollouts: Any, *names: str) -> None:
    """Raises ConfigError where a stage's `rollouts` says something that its method cannot use."""
    fields = type(rollouts).model_fields
    for name in names:
        if getattr(rollouts, name) != fields[name].default:
            raise ConfigError("does nothing for this method", where=f"rollouts.{name}", remedy=f"remove {name}")
