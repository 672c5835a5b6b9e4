"""The same trees without forest attention: torch's SDPA with one dense mask, or every path as a padded row of its own."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.protocol import serve
from benchmarks.trees import Body, random_body


class Peer(Body):
    def load(self, length: list[int], parent: list[int], dtype: str, tiny: bool) -> None:
        import torch

        self.model = random_body(dtype, tiny)
        start, first, path = [], [], []
        for i, (n, p) in enumerate(zip(length, parent)):
            start.append(sum(length[:i]))
            first.append(0 if p < 0 else first[p] + length[p])
            path.append(([] if p < 0 else path[p]) + list(range(start[i], start[i] + n)))
        total = sum(length)
        ids = torch.tensor(self.ids(total))
        position = torch.cat([torch.arange(f, f + n) for f, n in zip(first, length)])
        leaves = [i for i in range(len(length)) if i not in parent]
        if self.system == "dense mask":
            seen = torch.zeros(total, total, dtype=torch.bool)
            for i in range(len(length)):
                for row in range(start[i], start[i] + length[i]):
                    seen[row, path[i][: first[i] + row - start[i] + 1]] = True
            self.given = {"input_ids": ids[None], "position_ids": position[None]}
            window = self.model.config.sliding_window
            near = (position[:, None] - position) < window
            self.given["attention_mask"] = {"full_attention": seen[None, None], "sliding_attention": (seen & near)[None, None]}
            self.taken = torch.arange(total)
        else:
            width = max(len(path[leaf]) for leaf in leaves)
            rows, mask = torch.zeros(len(leaves), width, dtype=torch.long), torch.zeros(len(leaves), width, dtype=torch.long)
            self.taken = torch.full((total,), -1)
            for r, leaf in enumerate(leaves):
                n = len(path[leaf])
                rows[r, :n], mask[r, :n] = ids[path[leaf]], 1
                self.taken[path[leaf]] = r * width + torch.arange(n)
            self.given = {"input_ids": rows, "attention_mask": mask}

    def forward(self) -> Any:
        return self.model.get_decoder()(**self.given, use_cache=False).last_hidden_state.flatten(0, 1)

    def rows(self, hidden: Any) -> Any:
        return hidden[self.taken]

    def said(self) -> dict[str, Any]:
        return {"positions": self.given["input_ids"].numel()}


if __name__ == "__main__":
    body = Peer()
    sys.exit(serve(body.prepare, body.step))
