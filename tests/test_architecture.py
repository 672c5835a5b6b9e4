"""The shape of the source, held by reading it: layers, lightness, one optimiser step, one glossary."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from burnish.cli import VERBS
from burnish.core.metrics import METRICS
from tests.test_tables import TABLES, written

SOURCE = Path(__file__).resolve().parents[1] / "src" / "burnish"
LAYERS = """
core | sandbox, answers, config, maths | forest, report | data, models | engines, train | environments | rewards
     | search, compress, merge, edit | evals | methods | synthesis | material, machine | build | judges, miniature | pipeline | estimate | api | serve, cli | __main__
"""
RANK = {name.strip(): rank for rank, names in enumerate(LAYERS.split("|")) for name in names.split(",")}
ROW_KEYS = {"step", "kind"}  # which row of metrics it is


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


@lru_cache(maxsize=512)
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def layer(path: Path) -> str:
    """The first part of a file's place: `maths`, or `build` for build.py."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def at(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(SOURCE.parent)}:{getattr(node, 'lineno', 0)}"


def runtime(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from runtime(other)
        else:
            yield from runtime(child)


def imported(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """(layer, node) of every import of ours, inside functions too. The package's own `__version__` is no layer."""
    for node in runtime(tree(path)):
        match node:
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(module="burnish", names=names):
                modules = [f"burnish.{alias.name}" for alias in names if alias.name != "__version__"]
            case ast.ImportFrom(module=str(module), level=0):
                modules = [module]
            case ast.ImportFrom():
                raise AssertionError(f"{at(path, node)}: relative import; write the whole name")
            case _:
                continue
        yield from ((name.split(".")[1], node) for name in modules if name.startswith("burnish."))


def test_each_folder_imports_only_what_stands_to_its_left() -> None:
    wrong: list[str] = []
    for path in files():
        here = layer(path)
        if path == SOURCE / "__init__.py":
            continue
        assert here in RANK, f"{path}: {here!r} has no place among the layers"
        for there, node in imported(path):
            if there != here and RANK.get(there, 99) >= RANK[here]:
                wrong.append(f"{at(path, node)}: {here} may not import {there}")
    assert not wrong, "\n".join(wrong)


def test_a_layer_to_the_right_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "burnish"
    (package / "core").mkdir(parents=True)
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import burnish.pipeline\ndef f():\n    from burnish.maths import x\n"
    (package / "core" / "bad.py").write_text(text)
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", package)
    with pytest.raises(AssertionError, match=r"burnish/core/bad.py:5: core may not import maths"):
        test_each_folder_imports_only_what_stands_to_its_left()


READY = all(map(written, TABLES))
MISSING = [verb for verb, module in VERBS.items() if not (SOURCE.parent / f"{module.replace('.', '/')}.py").exists()]
HEAVY = "[m for m in ('torch', 'transformers', 'peft', 'safetensors') if m in sys.modules]"
unready = pytest.mark.skipif(not READY, reason="a table is not written yet")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(None, id="import burnish"),
        pytest.param(["--help"], marks=pytest.mark.skipif(bool(MISSING), reason=f"not written yet: {MISSING}")),
        pytest.param(["ls"], marks=unready),
        pytest.param(["check", "first_steps/quickstart"], marks=unready),
        *(pytest.param([verb, "--help"], id=verb) for verb in VERBS if verb not in MISSING),
    ],
)
def test_looking_is_light(words: list[str] | None) -> None:
    """Each in a process of its own: what one import hides, another may not."""
    call = "import burnish" if words is None else f"from burnish.cli import invoke; assert invoke({words}) == 0"
    code = f"import sys; {call}; found = {HEAVY}; sys.exit(f'imported {{found}}' if found else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def receivers(name: str) -> Iterator[tuple[str, Path, ast.Call]]:
    """(what stands before the dot, file, call) of every `something.name(...)`."""
    for path in files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name:
                yield ast.unparse(node.func.value), path, node


@pytest.mark.skipif(not (SOURCE / "train" / "loop.py").exists(), reason="the loop is not written yet")
def test_there_is_one_optimiser_step() -> None:
    """torch's optimiser steps in one line of masters.py, masters in one of optim.py, and that is reached from one of the loop."""
    steps = [(owner.lower(), path.name, call) for owner, path, call in receivers("step")]
    torch_steps = [file for owner, file, call in steps if "optim" in owner and not call.args]
    masters = [file for owner, file, _ in steps if owner.endswith("stepper")]
    ours = [file for owner, file, call in steps if "optim" in owner and call.args]
    assert (torch_steps, masters, ours) == (["masters.py"], ["optim.py"], ["loop.py"]), steps


def test_only_the_loop_calls_backward() -> None:
    """`loss.backward()`; kernels of a backward pass are called with their gradients as arguments."""
    calls = [at(path, call) for _, path, call in receivers("backward") if not call.args]
    assert all(call.startswith("burnish/train/loop.py") for call in calls), calls


def test_no_code_asks_which_method_it_is() -> None:
    """A method's behaviour is its row; comparing its name with a string is a second table, hidden."""
    wrong: list[str] = []
    for path in files():
        if layer(path) == "methods" or path == SOURCE / "core" / "table.py":
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                named = any(ast.unparse(s).endswith((".method", ".method.name", "method_name")) for s in sides)
                texts = any(
                    isinstance(c, ast.Constant) and isinstance(c.value, str) for s in sides for c in ast.walk(s)
                )
                if named and texts:
                    wrong.append(at(path, node))
    assert not wrong, wrong


def test_every_emitted_metric_is_in_the_glossary() -> None:
    wrong: list[str] = []
    for path in files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "emit":
                names = {keyword.arg for keyword in node.keywords if keyword.arg}
                wrong += [f"{at(path, node)}: {name}" for name in sorted(names - METRICS.keys() - ROW_KEYS)]
    assert not wrong, wrong


def test_files_are_named_for_what_lives_in_them() -> None:
    places = [*SOURCE.rglob("*"), *Path(__file__).parent.rglob("*.py")]
    nameless = [str(p) for p in places if p.stem.strip("_") in ("utils", "util", "helpers", "common", "misc")]
    assert not nameless, nameless
