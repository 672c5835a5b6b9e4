"""A second device without one: tensors that compute on the CPU and say, and insist, that they are elsewhere.

A GPU's rules about where tensors are hold, operation by operation: what is there does not meet what is here, unless it
is a number, an index, or copied across on purpose. Values are those of the CPU, bit for bit, so a whole training step or
rollout runs, and every host read of a device value is counted.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

NAME = "pretended"
aten = torch.ops.aten
_indices = {  # operations that take indices from the host, and the argument they are in
    aten.index.Tensor: 1, aten.index_put_.default: 1, aten.index_put.default: 1, aten._index_put_impl_.default: 1,
    aten._unsafe_index.Tensor: 1, aten._unsafe_index_put.default: 1,
}  # fmt: skip
_across = {aten.copy_.default, aten._to_copy.default}

class _Module(_DummyBackendModule):
    """To whoever looks for an accelerator there is none: other tests run in this process."""

    def is_available(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return []


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False


# at import, because the first backward of a process fixes how many devices autograd serves
if torch._C._get_privateuse1_backend_name() != NAME:
    _setup_privateuseone_for_python_backend(NAME, _Module(), _Hook())


class MixedDevicesError(RuntimeError):
    """An operation that would fail on a GPU."""


class There(torch.Tensor):
    """A tensor of the pretended device; `here` holds its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            layout=here.layout, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.here = here
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"There({self.here!r})"

    def __setitem__(self, index: Any, value: Any) -> None:
        if not isinstance(value, Tensor):  # torch would make it there below all modes
            value = torch.full((), value, dtype=self.dtype, device=self.device)
        if isinstance(index, list):
            index = torch.tensor(index, dtype=torch.int64, device=self.device)
        super().__setitem__(index, value)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, Counter())


class _Making(TorchFunctionMode):
    """`torch.tensor` fills its result below all dispatch modes: it is made here and sent over."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and _is_there(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


class Pretending(TorchDispatchMode):
    """Within it `device="pretended"` works. `reads` counts values fetched from there, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self._making = _Making()

    def __enter__(self) -> Pretending:
        self._making.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._making.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            TorchDispatchMode.__enter__(self)  # inference mode hands composites over whole: take them apart
            try:
                return func.decompose(*args, **(kwargs or {}))
            finally:
                TorchDispatchMode.__exit__(self, None, None, None)
        return _run(func, args, kwargs or {}, self.reads)


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any], reads: Counter[str]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, There)]
    free = _indices.get(func)
    allowed = set() if free is None else {id(x) for x in tree_flatten(args[free])[0]}
    if there and func not in _across:
        if free is not None and not isinstance(args[0], There):
            raise MixedDevicesError(f"{func}: a tensor on the host is indexed by one on the device")
        if odd := [x for x in tensors if not isinstance(x, There) and x.ndim and id(x) not in allowed]:
            raise MixedDevicesError(f"{func}: {list(odd[0].shape)} on the host meets {list(there[0].shape)} on the device")
    inside = dict(kwargs)
    result_there = bool(there)
    if "device" in kwargs and kwargs["device"] is not None:
        result_there = _is_there(kwargs["device"])
        inside["device"] = torch.device("cpu")
        if there and not result_there:
            reads[str(func)] += 1
    elif func is aten.copy_.default and there:
        result_there = isinstance(args[0], There)
        if not result_there:
            reads[str(func)] += 1
    elif func is aten._local_scalar_dense.default and there:
        reads[str(func)] += 1
    known = {id(x.here): x for x in there} | {id(x): x for x in tensors if not isinstance(x, There)}
    a, k = tree_map(lambda x: x.here if isinstance(x, There) else x, (args, inside))
    made = func(*a, **k)

    def back(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) in known:
            old = known[id(x)]
            return old
        return There(x) if result_there else x

    return tree_map(back, made)


def there(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter and buffer of a module moved over, ties kept."""
    moved: dict[int, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, p in list(part._parameters.items()):
            if p is not None:
                moved.setdefault(id(p), torch.nn.Parameter(There(p.detach()), requires_grad=p.requires_grad))
                part._parameters[name] = moved[id(p)]
        for name, b in list(part._buffers.items()):
            if b is not None:
                part._buffers[name] = There(b)
    return module
