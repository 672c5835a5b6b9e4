"""Print, for every family of tiny models the tests know, what `docs/families.md` says of it.

    python tools/families.py

hidden and gradient are relative norms: the packed forest against separate rows in float32, the worst of four forests of
depth 0 to 3, and for the gradient the worst single parameter. A family that cannot share prefixes prints the reason.
`engine` says whether the local engine takes it and answers six prompts as `generate` does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.engines.policies import generated, policy, prompts
from tests.forest.test_models import FORESTS, OWN, apart, in_forest, in_rows, stream_of, with_gradients
from tests.forest.tiny import PADDED, SHARE, tiny

from burnish.core.errors import MachineError
from burnish.core.records import Sampling
from burnish.engines.local.engine import LocalEngine


def engine(name: str) -> str:
    given = prompts(6)
    try:
        local = LocalEngine(policy(name))
    except MachineError:
        return "no"
    found = local.sample(
        local.prefill_many(given), Sampling(temperature=0.0, max_new_tokens=10), [(i, 0) for i in range(6)]
    )
    return "yes" if [t.completion for t in found] == generated(name, 6, 10) else "differs from generate"


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'family':<15}{'hidden':>9}{'gradient':>10}  engine  runs as")
    for name in SHARE:
        hidden = gradient = 0.0
        for layout in FORESTS.values():
            model, stream = tiny(name), stream_of(layout)
            want = with_gradients(model, in_rows(model, stream, OWN.get(name, "sdpa")), layout)
            got = with_gradients(model, in_forest(model, stream), layout)
            hidden = max(hidden, apart(got[0], want[0]))
            gradient = max(gradient, *(apart(got[1][n], g) for n, g in want[1].items()))
        print(f"{name:<15}{hidden:>9.1e}{gradient:>10.1e}  {engine(name):<7} forest", flush=True)
    for name in PADDED:
        print(f"{name:<15}{'':>19}  {engine(name):<7} padded: {policy(name).why_not_shared}", flush=True)


if __name__ == "__main__":
    main()
