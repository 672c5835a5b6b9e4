"""The child's side of a reward that can be killed: load one function, answer calls of it (see `sandbox.pool`)."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from burnish.rewards.base import attempt

_function: Callable[..., Any] | None = None


def prepare(settings: Mapping[str, Any]) -> None:
    """Load `file`'s (or `module`'s) `function`. A file may import what lies beside it.

    `package` is what the function imports itself: loading it belongs to the start, not to the first call's deadline.
    """
    global _function
    if package := settings.get("package"):
        importlib.import_module(package)
    if file := settings.get("file"):
        sys.path.append(os.path.dirname(file))
        spec = importlib.util.spec_from_file_location("burnish_user_reward", file)
        assert spec and spec.loader
        module = sys.modules["burnish_user_reward"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(settings["module"])
    _function = getattr(module, settings["function"])
    if not callable(_function):
        raise TypeError(f"{settings['function']} is no function")


def answer(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Score one call's samples, or cut its texts into steps (`segments`)."""
    assert _function
    if "texts" in payload:
        return {"cuts": [_function(text, **payload["settings"]) for text in payload["texts"]]}
    found, trace = attempt(
        _function, payload["arguments"], payload["settings"], payload["count"], payload.get("ends")
    )
    return {"scored": [one.to_json() for one in found], "traceback": trace}
