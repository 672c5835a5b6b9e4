"""Forest attention under a decoder body: the packed tree, every shared segment once. See benchmarks/tree.py."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.protocol import serve
from benchmarks.trees import Body, random_body


class Ours(Body):
    def load(self, length: list[int], parent: list[int], dtype: str, tiny: bool) -> None:
        import torch

        from burnish.forest.attention import Forest, register
        from burnish.forest.stream import Layout
        from burnish.models.shape import shape_of

        self.layout, self.plan_of = Layout(tuple(length), tuple(parent)), Forest
        self.model = random_body(dtype, tiny)
        self.model.set_attn_implementation(register())
        self.tokens = torch.tensor(self.ids(self.layout.size))
        self.shape = shape_of(self.model, self.model.get_decoder(), self.model.get_output_embeddings())

    def forward(self) -> Any:
        self.plan = self.plan_of(self.layout)
        given = {"input_ids": self.tokens[None], "position_ids": self.layout.position[None], "plan": self.plan}
        return self.model.get_decoder()(**given, use_cache=False).last_hidden_state[0]

    def rows(self, hidden: Any) -> Any:
        return hidden

    def said(self) -> dict[str, Any]:
        from burnish.core.ledger import attention_flops, train_flops

        body = 6 * self.shape.body_parameters * self.layout.size
        spans = list(zip(self.layout.first_position, self.layout.length))
        useful = train_flops(self.shape, self.layout.size, 0, spans)
        assert useful == body + 3 * attention_flops(self.shape, spans)
        return {"positions": self.layout.size, "useful_flops": useful, "executed_flops": body + self.plan.flops + self.plan.flops_backward}


if __name__ == "__main__":
    body = Ours()
    sys.exit(serve(body.prepare, body.step))
