"""burnish: post-training for language models, with what every step cost and was worth.

    import burnish
    run = burnish.run("first_steps/quickstart")          # a recipe, packaged or a path
    policy = burnish.load("runs/quickstart/01-sft/model")
    findings = burnish.check("my.yaml")

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Asked once by oneDNN and torch's wrapper of it, at the first product: each keeps the last 1,024 shapes of bf16 products, at half a
# megabyte a shape, and a micro-batch has a shape of its own; 32 take no more time (docs/notebook.md, 2026-11-29).
for _name, _value in (("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32"), ("LRU_CACHE_CAPACITY", "32")):
    os.environ.setdefault(_name, _value)

__version__ = "0.1.0"
__all__ = ["__version__", "check", "load", "run"]

if TYPE_CHECKING:
    from burnish.api import check, load, run


def __getattr__(name: str) -> Any:
    if name in ("run", "load", "check"):
        import burnish.api

        return getattr(burnish.api, name)
    raise AttributeError(f"module 'burnish' has no attribute {name!r}")
