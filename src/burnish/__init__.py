"""burnish: post-training for language models, with what every step cost and was worth.

    import burnish
    run = burnish.run("first_steps/quickstart")          # a recipe, packaged or a path
    policy = burnish.load("runs/quickstart/01-sft/model")
    findings = burnish.check("my.yaml")

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "check", "load", "run"]

if TYPE_CHECKING:
    from burnish.api import check, load, run


def __getattr__(name: str) -> Any:
    if name in ("run", "load", "check"):
        import burnish.api

        return getattr(burnish.api, name)
    raise AttributeError(f"module 'burnish' has no attribute {name!r}")
