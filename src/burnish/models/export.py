"""A policy as a folder any tool can load: Hugging Face layout, or PEFT layout for an adapter, with tokenizer and card.

The folder appears whole or not at all, and its manifest holds the sha256 of every file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from burnish import __version__
from burnish.core.runs import file_sha256, storage_errors, sync_folder, write_json
from burnish.models.policy import Policy


def export(
    policy: Policy, folder: Path, *, card: str, about: Mapping[str, Any] | None = None, beside: Mapping[str, Callable[[Path], None]] | None = None
) -> str:
    """Write the policy to `folder` (replaced whole) and return the sha256 of its weight files, joined and hashed by name.

    An adapted policy is written in PEFT layout (its base is named, not copied). Weights keep the dtype they were trained
    in, so that what was evaluated is what is loaded. `beside`: path in the folder -> what writes that file. Raises
    StorageError.
    """
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        base = policy.base
        before = base.config._attn_implementation
        base.config._attn_implementation = None  # how we ran it is nobody's business but ours
        try:
            policy.model.save_pretrained(temporary, safe_serialization=True)  # type: ignore[operator]
        finally:
            base.config._attn_implementation = before
        policy.tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        for name, write in (beside or {}).items():
            (temporary / name).parent.mkdir(exist_ok=True)
            write(temporary / name)
        paths = sorted(p for p in temporary.rglob("*") if p.is_file())
        files = {p.relative_to(temporary).as_posix(): {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in paths}
        write_json(temporary / "manifest.json", {"schema": 1, "burnish": __version__, "files": files, **(about or {})})
        for path in (*paths, temporary / "manifest.json"):
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise storage_errors(error, folder) from error
    return weights_sha256(folder)


def weights_sha256(folder: Path) -> str:
    """One hash for a model folder's weights: that of its single safetensors file, or of the list of (name, hash) of several."""
    import hashlib

    hashes = [(p.name, file_sha256(p)) for p in sorted(folder.glob("*.safetensors"))]
    if len(hashes) == 1:
        return hashes[0][1]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()


def model_card(*, name: str, base: str, method: str, adapter: bool, facts: Mapping[str, str], results: str = "") -> str:
    """README.md of an exported model: what it is, from what, how, and how to load it."""
    library = "peft" if adapter else "transformers"
    load = (
        "from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained(folder)"
        if adapter
        else "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained(folder)"
    )
    rows = "\n".join(f"| {k} | {v} |" for k, v in facts.items())
    return f"""---
base_model: {base}
library_name: {library}
tags:
- burnish
- {method}
---

# {name}

`{base}` after `{method}`, trained with burnish {__version__}.

| | |
|---|---|
{rows}

{results}
## Load it

```python
{load}
```
"""
