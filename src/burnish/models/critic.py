"""A critic: the value of a state, a linear output on the hidden row of its last token.

V(s) = w . h(s) + b, with h the policy's own final hidden row (`shared`) or that of a body of the critic's own, a copy
of the policy as the stage began (`separate`). Both start at 0, so that an untrained critic is no baseline at all. A
label's value is that of the state before it: the row that predicts it.

Exported in a folder of its own, `critic/critic.safetensors` inside the model folder: transformers and peft look for
names they know, but some servers read every safetensors file that stands beside the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from burnish.core.errors import StorageError
from burnish.forest.attention import Forest
from burnish.forest.pack import Batch
from burnish.models.policy import Policy
from burnish.models.reference import twin
from burnish.models.scoring import SCORED_TOKENS

Trunk = Literal["shared", "separate"]
FILE = "critic/critic.safetensors"


@dataclass(frozen=True)
class Values:
    """before [M]: of the state before each label; after [U]: of the state after each unit's last token; executed FLOPs."""

    before: Tensor
    after: Tensor
    flops: int


class Critic:
    """See module. `trains_body`: whether the gradient of a value goes into the body below it.

    own  the separate body, None where the policy's is shared. Of an adapted policy it is adapted too, and its adapter
         is what is trained.
    """

    def __init__(self, policy: Policy, trunk: Trunk, *, trains_body: bool) -> None:
        head = policy.head_weight()
        dtype = torch.float64 if policy.dtype == torch.float64 else torch.float32  # values are regressed: no bf16
        self.weight = nn.Parameter(torch.zeros(1, head.shape[1], dtype=dtype, device=head.device))
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype, device=head.device))
        self.trains_body = trains_body
        self.own: Policy | None = None
        if trunk == "separate":
            self.own = twin(policy)
            if trains_body:
                trained = {n for n, p in policy.body.named_parameters() if p.requires_grad}
                for name, parameter in self.own.body.named_parameters():
                    parameter.requires_grad_(name in trained)

    @property
    def trunk(self) -> Trunk:
        return "shared" if self.own is None else "separate"

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of what is trained and is the critic's own."""
        body = {} if self.own is None else {f"body.{n}": p for n, p in self.own.body.named_parameters() if p.requires_grad}
        return {"head.weight": self.weight, "head.bias": self.bias, **body}

    def value(self, rows: Tensor) -> Tensor:
        """[N] values of hidden rows [N, H], differentiable in both."""
        return (rows.to(self.weight.dtype) @ self.weight[0]) + self.bias

    @torch.no_grad()
    def values(self, policy: Policy, batch: Batch) -> Values:
        """Of every state a batch's labels stand behind, and of each unit's end; on the host."""
        body = self.own or policy
        body.train(False)
        before, after, flops = torch.zeros(batch.entries), torch.zeros(len(batch.group)), 0
        if self.weight.dtype == torch.float64:
            before, after = before.double(), after.double()
        for micro in batch.split(SCORED_TOKENS):
            plan = Forest(micro.stream.layout)
            hidden = body.hidden(micro.stream, plan)
            view = micro.view.to(hidden.device)
            before[micro.items] = self.value(hidden[view.source])[view.index].cpu()
            after[micro.units] = self.value(hidden[view.last]).cpu()
            head = 2 * hidden.shape[1] * (len(view.source) + len(view.last))
            flops += body.body_flops(micro.stream, plan, backward=False) + head
        return Values(before, after, flops)

    # ---- on disk

    def tensors(self) -> dict[str, Tensor]:
        """Everything it is, by name: head.weight, head.bias, and the whole of a separate body, its adapter merged.

        The critic is at its end: merging takes the adapter away.
        """
        found: dict[str, Tensor] = {"head.weight": self.weight, "head.bias": self.bias}
        if self.own is not None:
            body = self.own.body
            if self.own.adapted:
                merged = self.own.model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
                self.own = Policy(merged, self.own.tokenizer, source=self.own.source, probe=False)
                body = self.own.body
            found |= {f"body.{n}": p for n, p in body.state_dict().items()}
        return {n: p.detach().contiguous() for n, p in found.items()}

    def metadata(self) -> dict[str, str]:
        return {"schema": "1", "trunk": self.trunk}

    @staticmethod
    def load(folder: Path, policy: Policy) -> Critic:
        """The critic exported with the model in `folder`, for values under `policy`, which was loaded from there.

        Raises StorageError where there is none, or it is of another shape than the policy.
        """
        path = folder / FILE
        if not path.exists():
            raise StorageError("has no critic", where=str(path), remedy="name the model folder of a stage that trained one: method: ppo")
        with safe_open(path, framework="pt") as stored:
            about: Mapping[str, str] = stored.metadata()
            found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (not a mapping)
        if about["schema"] != "1":
            raise StorageError("was written by a newer burnish", where=str(path), remedy="upgrade burnish")
        critic = Critic(policy, "separate" if about["trunk"] == "separate" else "shared", trains_body=False)
        wanted = {"head.weight": critic.weight, "head.bias": critic.bias}
        if critic.own is not None:
            wanted |= {f"body.{n}": p for n, p in critic.own.body.state_dict().items()}
        misfit = sorted(wanted.keys() ^ found.keys()) or [n for n, p in wanted.items() if p.shape != found[n].shape]
        if misfit:
            raise StorageError(f"does not fit this model: {misfit[0]}", where=str(path), remedy="load it with the model it was exported with")
        with torch.no_grad():
            for name, tensor in wanted.items():
                tensor.copy_(found[name])
        return critic
