"""The shapes in the signatures are the shapes that come and go: jaxtyping checks them at a real call."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.maths import head, logprobs, weights

beartype = pytest.importorskip("beartype")
jaxtyping = pytest.importorskip("jaxtyping")


def checked(module: ModuleType, name: str) -> Any:
    """A copy of the function with its annotations enforced; the module itself never imports jaxtyping."""
    function = getattr(module, name)
    function = getattr(function, "__wrapped__", function)
    scope = {**vars(module), "Float": jaxtyping.Float, "Int": jaxtyping.Int}
    hints = {key: eval(text, scope) for key, text in function.__annotations__.items()}

    copy: Any = type(function)(function.__code__, scope, name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__, copy.__annotations__ = function.__kwdefaults__, hints
    return jaxtyping.jaxtyped(typechecker=beartype.beartype)(copy)


HIDDEN, WEIGHT, BIAS = torch.randn(4, 3), torch.randn(7, 3), torch.randn(7)
LABEL, INDEX = torch.tensor([0, 6, 2, 2]), torch.tensor([0, 1, 1, 2, 3])
UNIT = torch.tensor([0, 0, 1, 1, 1])


def total(x: Tensor, entries: slice) -> Tensor:
    return x.sum()


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
]


@pytest.mark.parametrize("module, name, args, kwargs", CALLS, ids=[c[1] for c in CALLS])
def test_signature_holds(module: ModuleType, name: str, args: list[Any], kwargs: dict[str, Any]) -> None:
    checked(module, name)(*args, **kwargs)


def test_a_wrong_shape_is_caught() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(logprobs, "nll")(torch.randn(5), torch.randn(4))
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(head, "head_logprobs")(HIDDEN, WEIGHT[:, 1:], LABEL)
