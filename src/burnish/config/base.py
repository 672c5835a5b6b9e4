"""A recipe that says only how it differs from another one: `base: policy_gradient/grpo` and `set: {stages.rl.method: dapo}`.

The keys under `set` are those of `--set` on the command line, put into the base in their order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

from burnish.config.faults import Fault, Key, RecipeError
from burnish.config.overrides import expand, put
from burnish.config.provenance import Document

KEYS = ("burnish", "name", "about", "base", "set")


def on_base(document: Document, read_base: Callable[[str], Document]) -> Document:
    """The base with the changes made, under the name of the recipe; every value still says where it came from.

    read_base: a packaged name or a path to a document. Raises RecipeError for other keys beside a base, and for a base
    that stands on another.
    """
    given = cast(dict[str, Any], document.data)
    faults = [
        Fault(document.where((key,)), f"{key}: beside a base there is no key of its own", f"write it under set: with its dotted name, {key}...")
        for key in given
        if key not in KEYS
    ]
    if "name" not in given:
        faults.append(Fault(document.name, "a recipe with a base needs a name of its own: its runs have their own folder", "add name: ..."))
    if not isinstance(given["base"], str):
        faults.append(Fault(document.where(("base",)), "base: wanted the name or the path of a recipe", "type base: policy_gradient/grpo"))
    changes = cast(dict[str, Any], given.get("set") or {})
    if not isinstance(given.get("set", changes), dict):
        faults.append(Fault(document.where(("set",)), "set: wanted a mapping of dotted keys", "type set: {stages.rl.method: dapo}"))
    if faults:
        raise RecipeError([*document.faults, *faults])
    found = read_base(given["base"])
    whole = isinstance(found.data, dict)
    if not whole or "base" in found.data:
        why = "has a base itself" if whole else "is no recipe"
        raise RecipeError([Fault(document.where(("base",)), f"base: {given['base']} {why}", "name a recipe that stands on its own")])
    expand(found)
    found = dataclasses.replace(found, name=document.name, text=document.text, faults=[*document.faults, *found.faults])
    own: list[Key] = [(key,) for key in ("burnish", "name", "about") if key in given]
    set_: list[Key] = [("set", key) for key in changes]
    for key in (*own, *set_):
        try:
            put(found, str(key[-1]).split("."), _part(document, key))
        except RecipeError as error:
            found.faults.extend(error.faults)
    return found


def _part(document: Document, key: Key) -> Document:
    """What stands at a key, as a document of its own that is called by its place."""
    value = document.data
    for part in key:
        value = value[part]
    tables = ({k[len(key) :]: v for k, v in table.items() if k[: len(key)] == key} for table in (document.places, document.typed, document.spoilt))
    places, typed, spoilt = tables
    return Document(document.where(key), data=value, places=places, typed=typed, spoilt=spoilt)
