"""Supervised fine-tuning: the negative log-likelihood of the labels, weighted once for the whole optimiser batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from burnish.core.errors import DataError
from burnish.core.records import Rendered
from burnish.core.table import About, Table, load_row
from burnish.data.chat import Prepared
from burnish.data.sampler import Sampler
from burnish.forest.pack import Batch, Micro
from burnish.forest.stream import Tree
from burnish.maths.head import Objective
from burnish.maths.logprobs import weighted_nll
from burnish.train.method import Hooks, Material, Work

VALIDATION_ROWS_AT_ONCE = 64


@dataclass
class Supervised(Hooks):
    """Rows in the sampler's order, each a tree of one segment. `prepared` says what became of the data."""

    prepared: Prepared
    validation: Sequence[Rendered]
    sampler: Sampler
    total_steps: int
    weights: str

    def work(self, rows: Sequence[Rendered], epoch: float = 0.0) -> Work:
        batch = Batch([Tree.row(r.ids, r.trained) for r in rows])
        return Work(batch, rows=len(rows), where=tuple(r.where for r in rows), epoch=epoch)

    def batches(self, step: int) -> Iterator[Work]:
        rows = self.prepared.rows
        while step < self.total_steps:
            chosen = [rows[i] for i in self.sampler.batch(step)]
            yield self.work(chosen, epoch=(step + 1) * self.sampler.batch_rows / len(rows))
            step += 1

    def prepare(self, policy: Any, work: Work) -> None:
        if work.batch.entries == 0:
            raise DataError("a batch holds no label: nothing to learn from", where=work.where[0] if work.where else "batch")
        work.columns["weight"] = load_row("weights", self.weights)(work.batch.unit).to(torch.float32)

    def objective(self, work: Work, micro: Micro) -> tuple[Objective, torch.Tensor | None]:
        return weighted_nll(work.columns["weight"][micro.items]), None

    @torch.no_grad()
    def held_out(self, policy: Any, micro_tokens: int) -> tuple[list[tuple[float, int]], int]:
        """([(negative log-likelihood in nats, labels) of every validation row, in order], executed FLOPs)."""
        found: list[tuple[float, int]] = []
        flops = 0
        policy.train(False)
        for begin in range(0, len(self.validation), VALIDATION_ROWS_AT_ONCE):
            work = self.work(self.validation[begin : begin + VALIDATION_ROWS_AT_ONCE])
            total = torch.zeros(work.rows, dtype=torch.float64)
            for micro in work.batch.split(micro_tokens):
                out = policy(micro, weighted_nll(torch.ones(len(micro.items))))
                total.index_add_(0, work.batch.unit[micro.items], -out.logprobs.double().cpu())
                flops += out.executed_flops(False)
            found += zip(total.tolist(), work.batch.unit.bincount(minlength=work.rows).tolist())
        return found, flops


def sft(material: Material, *, mask: str = "completion", weights: str = "token_mean") -> Supervised:
    """Supervised fine-tuning: minimise - sum_i w_i log p(label_i | what came before) (maximum likelihood; no paper).

    `mask` chooses which tokens are labels, `weights` how they are averaged over the optimiser batch.
    """
    prepared, validation = material.render(load_row("mask", mask))
    sampler = material.sampler(len(prepared.rows))
    return Supervised(prepared, validation, sampler, material.steps(sampler), weights)


METHODS = Table("method", {"sft": sft}, about={"sft": About(taxonomy=("F1", "S1"))})
