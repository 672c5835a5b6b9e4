"""How large a micro-batch may be: decided once from measured bytes and what is free, halved when memory runs out.

The decision cannot change a result beyond rounding (weights are fixed before the split), so it is free to follow the
machine; it is written down and replayed, so that a resume is the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from burnish.core.errors import MachineError
from burnish.core.machine import free_host_bytes, resident_bytes, return_freed_memory
from burnish.forest.pack import Micro
from burnish.forest.stream import Tree
from burnish.models.load import free_cuda_bytes
from burnish.models.policy import Policy
from burnish.models.recompute import Checkpointing
from burnish.train.activations import FEWEST_HEAD_ROWS, Activations, Run, ceiling, measure
from burnish.train.optim import Optimiser

MOST_TOKENS = 8192  # products are no faster beyond it
# tokens times hidden squared beyond which a CPU's hardly are: Gemma-270M's LoRA step took 8 % longer at 512 tokens a micro-batch than
# at 8,192 (docs/notebook.md), in two thirds of the memory; a narrow model is bound by calls, and wants them large
CPU_WORK = 4e8
LEAST_ON_CPU = 768
FEW_TOKENS = 512  # and slower below it: then a third more work for the same tokens is the better bargain
SHARE = 0.8  # of what is free: an allocator returns memory in other pieces than it was asked for, and others run here too


@dataclass(frozen=True)
class Plan:
    """One micro-batch: at most so many stream tokens and head rows (None: any number), and what its backward runs again."""

    micro_tokens: int
    head_rows: int | None = None
    checkpointing: Checkpointing = "off"

    def __str__(self) -> str:
        rows = "" if self.head_rows is None else f" and {self.head_rows} labels"
        return f"at most {self.micro_tokens} tokens{rows} a forward, checkpointing {self.checkpointing}"


@dataclass(frozen=True)
class Holdings:
    """Bytes that stand there through every step, from the tensors that exist; moments as they will be."""

    weights: int
    masters: int
    gradients: int
    moments: int
    moments_to_come: int = 0

    @staticmethod
    def of(policy: Policy, optimiser: Optimiser) -> Holdings:
        """Sizes of what a policy and its optimiser hold. A tied or shared tensor counts once."""
        masters = [kept for m in optimiser.masters.values() if (kept := m.beside()) is not None]
        gradients = [m.gradient for m in optimiser.masters.values()]
        wanted = optimiser.moments_bytes
        return Holdings(
            weights=bytes_of([*policy.model.parameters(), *policy.model.buffers()]), masters=bytes_of(masters),
            gradients=bytes_of(gradients), moments=wanted, moments_to_come=max(0, wanted - bytes_of(optimiser.moments())),
        )  # fmt: skip

    @property
    def total(self) -> int:
        return self.weights + self.masters + self.gradients + self.moments


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Of distinct storages."""
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def free_bytes(device: torch.device) -> int:
    """What can still be allocated on the device of the weights."""
    return free_cuda_bytes(device) if device.type == "cuda" else free_host_bytes()


def used_bytes(device: torch.device) -> int:
    """What this process holds there now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device. torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text and ("allocate memory" in text or "not enough memory" in text)


@dataclass
class Memory:
    """One stage's plans: `plans[i]` holds from its step on. See module.

    micro_tokens, checkpointing   what the recipe says; auto is decided here
    limit                         the most bytes this process may hold during a step (None: what the machine has free)
    longest                       tokens of the stage's longest tree (0: that of the batch)
    record                        called with the decision whenever it changes, before a step follows it
    """

    micro_tokens: int | Literal["auto"] = "auto"
    checkpointing: Checkpointing | Literal["auto"] = "auto"
    limit: int | None = None
    longest: int = 0
    record: Callable[[Mapping[str, Any]], None] = lambda decision: None
    plans: list[tuple[int, Plan]] = field(default_factory=list[tuple[int, Plan]])
    why: str = ""
    measured: dict[str, Any] = field(default_factory=dict[str, Any])
    holdings: Holdings | None = None
    activations: dict[Checkpointing, Activations] = field(default_factory=dict[Checkpointing, Activations])

    @staticmethod
    def fixed(micro_tokens: int, head_rows: int | None = None, checkpointing: Checkpointing = "off") -> Memory:
        """No measuring: this plan, from the first step on."""
        return Memory(micro_tokens, checkpointing, plans=[(0, Plan(micro_tokens, head_rows, checkpointing))], why="as given")

    # ---- as a decision

    def to_json(self) -> dict[str, Any]:
        plans = [{"step": step, **asdict(plan)} for step, plan in self.plans]
        return {"value": str(self.plans[-1][1]), "why": self.why, "measured": self.measured, "plans": plans}

    def replay(self, decision: Mapping[str, Any]) -> Memory:
        """Take over what was decided at the first start."""
        self.plans = [(p["step"], Plan(p["micro_tokens"], p["head_rows"], p["checkpointing"])) for p in decision["plans"]]
        self.why, self.measured = decision["why"], dict(decision["measured"])
        return self

    def plan(self, step: int) -> Plan:
        """What step `step` follows (the first is 1)."""
        return [plan for since, plan in self.plans if since <= step][-1]

    def follow(self, step: int, policy: Policy) -> Plan:
        """The plan of this step, with the policy and the allocator set to it: where memory is short, freed is free."""
        plan = self.plan(step)
        policy.checkpoint(plan.checkpointing)
        if policy.device.type == "cpu" and (self.limit is not None or plan.checkpointing != "off"):
            return_freed_memory()
        return plan

    # ---- at the first step

    def decide(self, policy: Policy, optimiser: Optimiser, trees: Sequence[Tree], run: Run) -> None:
        """Measure and choose. `trees` are the first batch's. Raises MachineError with a table where the longest cannot fit."""
        longest = max(self.longest, *(tree.size for tree in trees))
        wanted: list[Checkpointing] = ["off", "layers"] if self.checkpointing == "auto" else [self.checkpointing]
        need = self.micro_tokens if self.micro_tokens != "auto" else max(longest, FEW_TOKENS)
        room: dict[Checkpointing, int] = {}
        budget, most = 0, MOST_TOKENS
        if policy.device.type == "cpu":
            most = min(most, max(LEAST_ON_CPU, int(CPU_WORK / policy.shape.hidden**2)))
        if wanted[0] == "off" and self._ample(policy, optimiser, most if self.micro_tokens == "auto" else self.micro_tokens, longest):
            return
        for what in wanted:
            try:
                policy.checkpoint(what)
                self.activations[what] = measure(policy, trees, run)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                raise self.failure(policy, optimiser, "not even a small micro-batch fits") from error
            optimiser.zero()
            self.holdings = Holdings.of(policy, optimiser)
            budget = self._budget(policy.device)
            room[what] = self._tokens(self.activations[what], budget, max(longest, most if self.micro_tokens == "auto" else self.micro_tokens))
            if room[what] >= need:
                break
        chosen = max(room, key=lambda what: (room[what] >= need, min(room[what], most), what == "off"))
        activations = self.activations[chosen]
        if room[chosen] < longest:
            raise self._too_small(longest, budget, chosen, policy.device)
        tokens = self.micro_tokens if self.micro_tokens != "auto" else min(room[chosen], most)
        rows = self._rows(activations, max(tokens, longest), budget)
        self.plans = [(0, Plan(tokens, rows, chosen))]
        per = activations.kept.per_token / 1e3
        free = "of the limit" if self.limit is not None else "free"
        self.why = f"{budget / 1e9:.2f} GB {free} for activations, measured at {per:.3g} kB a token; the longest row has {longest}"
        if self.micro_tokens != "auto":
            self.why += "; micro_tokens as the recipe says"
        if "off" in self.activations and chosen == "layers":
            self.why += f" (without checkpointing {self.activations['off'].kept.per_token / 1e3:.3g} kB: {max(0, room['off'])} tokens would fit)"
        self.measured = {"budget_bytes": budget, "holdings": asdict(self.holdings or Holdings(0, 0, 0, 0)), "activations": activations.to_json()}
        self.record(self.to_json())

    def _ample(self, policy: Policy, optimiser: Optimiser, tokens: int, longest: int) -> bool:
        """Decide without measuring, where even a count that is too high fits."""
        self.holdings = Holdings.of(policy, optimiser)
        budget, most = self._budget(policy.device), ceiling(policy, max(tokens, longest))
        if most is None or most > budget:
            return False
        self.plans = [(0, Plan(tokens, None, "off"))]
        free = "of the limit" if self.limit is not None else "free"
        self.why = f"{budget / 1e9:.2f} GB {free} for activations, which take less than {most / 1e9:.2f} by a count of the model's parts"
        if self.micro_tokens != "auto":
            self.why += "; micro_tokens as the recipe says"
        self.measured = {"budget_bytes": budget, "holdings": asdict(self.holdings), "ceiling_bytes": most}
        self.record(self.to_json())
        return True

    def _budget(self, device: torch.device) -> int:
        """Bytes for activations: what is free, or what the limit leaves, less the moments still to come."""
        assert self.holdings is not None
        free = SHARE * free_bytes(device)
        if self.limit is not None:
            free = min(free, SHARE * (self.limit - used_bytes(device)))
        return int(free) - self.holdings.moments_to_come

    def _tokens(self, activations: Activations, budget: int, most: int) -> int:
        """The most tokens that fit, up to `most`, with the head as small as it can be."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if activations.peak(middle, min(middle, FEWEST_HEAD_ROWS)) <= budget:
                low = middle
            else:
                high = middle - 1
        return low

    def _rows(self, activations: Activations, tokens: int, budget: int) -> int | None:
        """None where every token may be a label, else how many may."""
        if activations.peak(tokens, tokens) <= budget:
            return None
        low, high = FEWEST_HEAD_ROWS, tokens
        while low < high:
            middle = (low + high + 1) // 2
            if activations.peak(tokens, middle) <= budget:
                low = middle
            else:
                high = middle - 1
        return low

    # ---- when it was not enough

    def shrink(self, step: int, micro: Micro, policy: Policy, optimiser: Optimiser, error: BaseException) -> Plan:
        """From `step` on half of what `micro` holds, which did not fit; where that is one tree, checkpointing.

        Raises MachineError with a table where neither is left.
        """
        plan = self.plan(step)
        tokens = len(micro.stream.tokens)
        if len(set(micro.stream.layout.root)) > 1:
            smaller = replace(plan, micro_tokens=max(1, min(plan.micro_tokens, tokens) // 2))
        elif plan.checkpointing == "off" and self.checkpointing == "auto":
            smaller = replace(plan, checkpointing="layers")
        else:
            message = f"a single row of {tokens} tokens does not fit, checkpointing {plan.checkpointing}"
            raise self.failure(policy, optimiser, message, tokens) from error
        self.plans = [(since, p) for since, p in self.plans if since < step] + [(step, smaller)]
        self.why = f"{self.why}; out of memory in step {step} with {plan}"
        self.record(self.to_json())
        if policy.device.type == "cuda":
            torch.cuda.empty_cache()  # what is left in pieces becomes whole again
        return smaller

    def _too_small(self, longest: int, budget: int, what: Checkpointing, device: torch.device) -> MachineError:
        assert self.holdings is not None
        need = self.activations[what].peak(longest, min(longest, FEWEST_HEAD_ROWS))
        kept = "; it needs " + f"{need / 1e9:.2f} GB for activations and {max(0, budget) / 1e9:.2f} GB are left"
        return MachineError(
            f"the longest row ({longest} tokens) does not fit, checkpointing {what}{kept}\n{self.table(longest, what, device)}",
            where="train.memory_bytes" if self.limit is not None else "memory",
            remedy="lower train.max_tokens with on_long_row: drop or truncate, train an adapter, use a smaller model"
            + (", or raise train.memory_bytes" if self.limit is not None else ", or free some memory"),
        )

    def failure(self, policy: Policy, optimiser: Optimiser, message: str, tokens: int = FEW_TOKENS) -> MachineError:
        """The error to raise: what did not fit, and where the memory is."""
        self.holdings = Holdings.of(policy, optimiser)
        return MachineError(
            f"out of memory: {message}\n{self.table(tokens, policy.checkpointing, policy.device)}",
            where="train",
            remedy="lower train.max_tokens with on_long_row: drop or truncate, train an adapter, or use a smaller model",
        )

    def table(self, tokens: int, what: Checkpointing, device: torch.device) -> str:
        """One line an item, in bytes of 10^9."""
        held = self.holdings or Holdings(0, 0, 0, 0)
        rows = {"weights": held.weights, "masters": held.masters, "gradients": held.gradients, "moments": held.moments}
        known: Any = self.activations.get(what)
        if known is not None:
            few = min(tokens, FEWEST_HEAD_ROWS)
            rows |= {
                f"head, a chunk of {few} rows": int(known.head(few)),
                f"activations of {tokens} tokens": int(max(known.kept.at(tokens), known.layers.at(tokens))),
            }
        rows["free"] = free_bytes(device)
        return "\n".join(f"    {name:<32} {size / 1e9:>9.3f} GB" for name, size in rows.items())
