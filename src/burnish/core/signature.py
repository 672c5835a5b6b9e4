"""What a function takes, read from its source text: nothing is imported and nothing is executed."""

from __future__ import annotations

import ast
import hashlib
import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from burnish.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]  # the folder that holds the package


@dataclass(frozen=True)
class Parameter:
    """One keyword-only parameter of a function, or field of a keyword-only dataclass.

    `annotation` is its source text, `type` what that text means.
    """

    name: str
    annotation: str
    type: Any
    required: bool
    default: Any = None

    def __str__(self) -> str:
        return f"{self.name} (needed)" if self.required else f"{self.name}={self.default!r}"


@dataclass(frozen=True)
class Inputs:
    """What a function is given besides its settings: its other parameters by name. `rest`: any further ones (**)."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    rest: bool = False

    def __contains__(self, name: object) -> bool:
        return name in self.required or name in self.optional


@dataclass(frozen=True)
class Source:
    """A module as parsed: its docstring, the sha256 of its bytes, and what its top-level names are.

    `notes` are the docstrings of values: a string on its own right below the assignment.
    """

    path: Path
    doc: str
    sha256: str
    functions: Mapping[str, ast.FunctionDef]
    values: Mapping[str, ast.expr]
    imports: Mapping[str, tuple[str, str]]  # local name -> (module, name in it)
    classes: Mapping[str, ast.ClassDef]
    notes: Mapping[ast.expr, str]


@lru_cache(maxsize=256)
def _parse(path: Path, changed_ns: int) -> Source:
    data = path.read_bytes()
    try:
        tree = ast.parse(data, str(path))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ConfigError(f"is not Python: {getattr(error, 'msg', error)}", where=f"{path}:{line}") from error
    functions: dict[str, ast.FunctionDef] = {}
    values: dict[str, ast.expr] = {}
    imports: dict[str, tuple[str, str]] = {}
    classes: dict[str, ast.ClassDef] = {}
    notes: dict[ast.expr, str] = {}
    for node, below in zip(tree.body, [*tree.body[1:], None], strict=True):
        match node, below:
            case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value), ast.Expr(ast.Constant(str(text))):
                notes[value] = inspect.cleandoc(text)
            case _:
                pass
        match node:
            case ast.ClassDef():
                classes[node.name] = node
            case ast.FunctionDef():
                functions[node.name] = node
            case ast.Assign(targets=[ast.Name(id=name)]):
                values[name] = node.value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                values[name] = value
            case ast.ImportFrom(module=str(module), level=0):
                imports |= {a.asname or a.name: (module, a.name) for a in node.names}
            case _:
                pass
    sha = hashlib.sha256(data).hexdigest()
    return Source(path, ast.get_docstring(tree) or "", sha, functions, values, imports, classes, notes)


def read_source(path: Path) -> Source:
    """Parse a file, once as long as it does not change. Raises ConfigError when it is not Python."""
    return _parse(path, path.stat().st_mtime_ns)


def read_module(name: str) -> Source:
    """Parse a module of ours by its dotted name."""
    stem = ROOT.joinpath(*name.split("."))
    return read_source(stem.with_suffix(".py") if stem.with_suffix(".py").exists() else stem / "__init__.py")


def find(source: Source, node: ast.expr) -> tuple[Source, ast.FunctionDef | ast.ClassDef | ast.expr]:
    """Where a table's value is defined: in the module, or in the one it is imported from."""
    match node:
        case ast.Name(id=name) if name in source.functions:
            return source, source.functions[name]
        case ast.Name(id=name) if name in source.classes:
            return source, source.classes[name]
        case ast.Name(id=name) if name in source.values:
            value = source.values[name]
            return find(source, value) if isinstance(value, (ast.Name, ast.Attribute)) else (source, value)
        case ast.Name(id=name) if name in source.imports:
            module, original = source.imports[name]
            return find(read_module(module), ast.Name(original))
        case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in source.imports:
            return find(read_module(".".join(source.imports[name])), ast.Name(attribute))
        case _:
            remedy = "define it in this file, or import it with `from module import name`"
            raise unreadable(source, node, f"cannot find what {ast.unparse(node)} is", remedy)


def unreadable(source: Source, node: ast.AST, message: str, remedy: str) -> ConfigError:
    """The error for source that a description cannot be read from."""
    return ConfigError(message, where=f"{source.path}:{getattr(node, 'lineno', 1)}", remedy=remedy)


def literal(node: ast.expr) -> Any:
    """The value of a literal expression, or ... where it is not one."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ...


def _type(node: ast.AST) -> Any:
    """The type an annotation names. Raises ValueError where it is not a simple one."""
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Constant(value=str(text)):
            return _type(ast.parse(text, mode="eval").body)
        case ast.Name(id="int" | "float" | "bool" | "str" as name):
            return {"int": int, "float": float, "bool": bool, "str": str}[name]
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return Union[_type(left), _type(right)]  # noqa: UP007  (`None | None` and Literal need it)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=items):
            choices = ast.literal_eval(items)
            return Literal[choices]
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return list[_type(item)]
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=items)):
            return tuple[tuple(... if ast.unparse(i) == "..." else _type(i) for i in items)]
        case _:
            raise ValueError(ast.unparse(node))


def parameters_of(source: Source, function: ast.FunctionDef) -> tuple[Parameter, ...]:
    """The keyword-only parameters of a function. Raises ConfigError for one that no recipe could give."""
    return tuple(
        _parameter(source, argument, function.name, argument.arg, argument.annotation, default)
        for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    )


def fields_of(source: Source, node: ast.Call) -> tuple[Parameter, ...] | None:
    """The fields of the keyword-only dataclass that is called, its keywords as their defaults; None for another call.

    Raises ConfigError for a field, or a keyword of the call, that no recipe could give.
    """
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    ours = name in source.imports and ROOT.joinpath(source.imports[name][0].split(".")[0]).is_dir()
    home, kind = find(source, node.func) if name in source.classes or ours else (source, node)
    if not isinstance(kind, ast.ClassDef) or not any("kw_only=True" in ast.unparse(d) for d in kind.decorator_list):
        return None
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    return tuple(
        _parameter(home, line, kind.name, line.target.id, line.annotation, given.get(line.target.id, line.value))
        for line in kind.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    )


def _parameter(
    source: Source, where: ast.AST, owner: str, name: str, annotation: ast.expr | None, default: ast.expr | None
) -> Parameter:
    text = ast.unparse(annotation) if annotation else "nothing"
    try:
        if annotation is None:
            raise ValueError(name)
        kind = _type(annotation)
        value = None if default is None else ast.literal_eval(default)
    except (ValueError, SyntaxError) as error:
        after = f" = {ast.unparse(default)}" if default else ""
        message = f"{owner}({name}: {text}{after}) is not a setting a recipe can hold"
        remedy = "annotate int, float, bool, str, Literal, list[X], tuple[X, ...] or X | None; a literal default"
        raise unreadable(source, where, message, f"{remedy}; or make it positional") from error
    return Parameter(name, text, kind, default is None, value)


def inputs_of(function: ast.FunctionDef) -> Inputs:
    """The parameters of a function that are not keyword-only."""
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
    first_optional = len(names) - len(function.args.defaults)
    return Inputs(tuple(names[:first_optional]), tuple(names[first_optional:]), function.args.kwarg is not None)


def wanted(kind: Any) -> str:
    """A type in words: `a number or null`."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(wanted(k) for k in get_args(kind))
    if get_origin(kind) in (list, tuple):
        return f"a list of {wanted(get_args(kind)[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, "null")
