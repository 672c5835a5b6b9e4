"""The shapes in the signatures are the shapes that come and go: jaxtyping checks them at a real call."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.core.table import Table
from burnish.maths import (
    advantages,
    divergences,
    entropies,
    filters,
    head,
    logprobs,
    offline,
    ratios,
    surrogates,
    trust_region,
    units,
    values,
    weights,
)
from burnish.maths.policy_gradient import takes

beartype = pytest.importorskip("beartype")
jaxtyping = pytest.importorskip("jaxtyping")


def checked(module: ModuleType, name: str) -> Any:
    """A copy of the function with its annotations enforced; the module itself never imports jaxtyping."""
    function = getattr(module, name)
    function = getattr(function, "__wrapped__", function)
    scope = {**vars(module), **{name: getattr(jaxtyping, name) for name in ("Float", "Int", "Bool")}}
    hints = {key: eval(text, scope) for key, text in function.__annotations__.items()}

    copy: Any = type(function)(function.__code__, scope, name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__, copy.__annotations__ = function.__kwdefaults__, hints
    return jaxtyping.jaxtyped(typechecker=beartype.beartype)(copy)


HIDDEN, WEIGHT, BIAS = torch.randn(4, 3), torch.randn(7, 3), torch.randn(7)
LABEL, INDEX = torch.tensor([0, 6, 2, 2]), torch.tensor([0, 1, 1, 2, 3])
UNIT = torch.tensor([0, 0, 1, 1, 1])


def total(x: Tensor, entries: slice) -> Tensor:
    return x.sum()


COLUMNS: dict[str, Any] = {
    **dict.fromkeys(
        [
            "logprobs",
            "old_logprobs",
            "sampler_logprobs",
            "ref_logprobs",
            "log_ratio",
            "advantage",
            "value",
            "token_reward",
            "entropy",
            "noise",
        ],
        torch.rand(5),
    ),
    **dict.fromkeys(("reward", "greedy_reward", "step_reward"), torch.tensor([0.0, 1.0])),
    **dict.fromkeys(("known", "finished", "step_known"), torch.tensor([True, True])),
    "unit": UNIT,
    "group": torch.tensor([0, 0]),
    "length": torch.tensor([2, 3]),
    "step_end": torch.tensor([1, 4]),
    "rewards": torch.rand(2, 3),
    "rewards_known": torch.ones(2, 3, dtype=torch.bool),
    "component_weight": torch.ones(3),
    "reward_trace": torch.zeros(2),
    "high_covariance": torch.ones(5, dtype=torch.bool),
}


def rows_of(module: ModuleType, table: Table) -> list[tuple[ModuleType, str, list[Any], dict[str, Any]]]:
    """A call of every row with the columns it takes."""
    functions = [row for row in table.values() if row.__module__ == module.__name__]
    few = {"pass_k": 2}
    return [
        (
            module,
            f.__name__,
            [COLUMNS[c] for c in takes(f)],
            {k: v for k, v in few.items() if k in (f.__kwdefaults__ or {})},
        )
        for f in functions
    ]


PAIR, ACTIONS = torch.rand(2), torch.tensor([0, 0])
ALL = torch.tensor([True, True])

CALLS: list[tuple[ModuleType, str, list[Any], dict[str, Any]]] = [
    (head, "head_loss", [HIDDEN, WEIGHT, LABEL, total], {"index": INDEX, "couple": UNIT, "bias": BIAS}),
    (head, "head_logprobs", [HIDDEN, WEIGHT, LABEL], {"bias": BIAS}),
    (head, "recomputed_rows", [4, WEIGHT], {"index": INDEX, "couple": UNIT}),
    (head, "effective_weight", [torch.nn.Linear(3, 7)], {}),
    (logprobs, "label_logprobs", [torch.randn(4, 7), LABEL], {}),
    (logprobs, "seq_logprob", [torch.randn(5), UNIT, 2], {}),
    (logprobs, "nll", [torch.randn(5), torch.randn(5)], {}),
    (logprobs, "weighted_nll", [torch.randn(5)], {}),
    *((weights, name, [UNIT], {}) for name in weights.WEIGHTS),
    *rows_of(advantages, advantages.ADVANTAGES),
    *rows_of(ratios, ratios.RATIOS),
    *rows_of(ratios, ratios.CORRECTIONS),
    *rows_of(surrogates, surrogates.SURROGATES),
    *rows_of(divergences, divergences.KLS),
    *rows_of(filters, filters.SEQUENCE_FILTERS),
    *rows_of(filters, filters.TOKEN_FILTERS),
    (filters, "soft_overlong", [torch.tensor([1, 2])], {"longest": 4, "cushion": 2}),
    (advantages, "whiten", [torch.rand(5), torch.ones(5, dtype=torch.bool)], {}),
    (advantages, "next_trace", [torch.zeros(2), PAIR, ALL], {}),
    (divergences, "high_covariance", [torch.rand(5), torch.rand(5)], {}),
    (divergences, "token_rewards", [PAIR, UNIT], {}),
    (divergences, "exact_jsd", [torch.rand(4, 7), torch.rand(4, 7)], {}),
    (entropies, "entropy", [torch.rand(4, 7)], {}),
    (entropies, "d_entropy", [torch.rand(4, 7), torch.rand(4, 7), torch.rand(4)], {}),
    (offline, "oreo_policy", [torch.rand(5), torch.rand(5), PAIR, PAIR, UNIT, torch.tensor([0, 1])], {}),
    (offline, "oreo_value", [torch.rand(5), torch.rand(5), PAIR, PAIR, UNIT, torch.tensor([0, 1])], {}),
    (offline, "soft_value", [PAIR, ALL, ACTIONS], {}),
    (offline, "a_star", [PAIR, PAIR, PAIR, PAIR], {}),
    (offline, "minimum_risk", [PAIR, PAIR, ACTIONS], {}),
    (offline, "mixer", [UNIT], {"supervised_tokens": 1}),
    (trust_region, "natural_step", [lambda v: v, torch.ones(3)], {}),
    (units, "suffix_sum", [torch.rand(5), UNIT], {}),
    (units, "varies", [PAIR, ALL, ACTIONS], {}),
    (values, "clipped", [torch.rand(5), torch.rand(5), torch.rand(5)], {}),
]


@pytest.mark.parametrize(
    "module, name, args, kwargs", CALLS, ids=[f"{c[0].__name__.rsplit('.', 1)[1]}.{c[1]}" for c in CALLS]
)
def test_signature_holds(module: ModuleType, name: str, args: list[Any], kwargs: dict[str, Any]) -> None:
    checked(module, name)(*args, **kwargs)


def test_a_wrong_shape_is_caught() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(logprobs, "nll")(torch.randn(5), torch.randn(4))
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(head, "head_logprobs")(HIDDEN, WEIGHT[:, 1:], LABEL)
