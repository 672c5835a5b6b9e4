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

# torch asks once, at its first allocation: weights and activations in pages of 2 MB where the system has them (on Linux), a page
# fault for every 512 of before. A step takes about a tenth less (docs/notebook.md, 2026-11-29).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
__all__ = ["__version__", "check", "load", "run"]

if TYPE_CHECKING:
    from burnish.api import check, load, run


def __getattr__(name: str) -> Any:
    if name in ("run", "load", "check"):
        import burnish.api

        return getattr(burnish.api, name)
    raise AttributeError(f"module 'burnish' has no attribute {name!r}")
