"""Where lorafit holds on to its libraries, read from its own source and from what is installed.

A seam is a method of a library that a class of ours overrides, a value of a library's object that one sets, or a
private name that we read. Python says nothing when a library drops one: an override is then a method nobody calls.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

import lorafit

PACKAGE = Path(lorafit.__file__).parent
NOT_LIBRARIES = {*sys.stdlib_module_names, "lorafit"}
OF_TUPLES = {"_replace", "_asdict", "_fields"}
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Source:
    """One of our modules, as it runs and as it is written."""

    module: ModuleType
    tree: ast.Module

    def place(self, line: int) -> str:
        """`lorafit/training/train.py:62`."""
        return f"{Path(str(self.module.__file__)).relative_to(PACKAGE.parent).as_posix()}:{line}"

    def find(self, *kinds: type[ast.AST]) -> Iterator[Any]:
        """Nodes of these kinds."""
        return (node for node in nodes(self.tree) if isinstance(node, kinds))

    def stands_for(self, node: ast.expr | None) -> Any:
        """The thing behind a dotted name; None where only a run knows."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        owner = self.stands_for(node.value) if isinstance(node, ast.Attribute) else None
        return getattr(owner, node.attr, None) if isinstance(owner, ModuleType | type) else None  # type: ignore[union-attr]

    @cached_property
    def names(self) -> dict[str, Any]:
        """What the module's names stand for, those imported under `if TYPE_CHECKING:` included."""
        blocks = [one for one in self.tree.body if isinstance(one, ast.If) and ast.unparse(one.test) == "TYPE_CHECKING"]
        lines = [line for block in blocks for line in block.body if isinstance(line, ast.ImportFrom)]
        for_types = {
            one.asname or one.name: getattr(import_module(str(line.module)), one.name)
            for line in lines
            for one in line.names
        }
        return for_types | vars(self.module)


@dataclass(frozen=True)
class OwnClass:
    """A class of ours with a library's above it."""

    kind: type
    source: Source
    node: ast.ClassDef

    @property
    def lines(self) -> list[tuple[type, ...]]:
        """Where Python looks for its methods; of one that is mixed into others, in each that is used in the end."""
        return _lines(self.kind)

    @property
    def above(self) -> list[type]:
        """The libraries' classes; of each line the nearest first."""
        return [one for line in self.lines for one in line if is_of_library(one)]


@cache
def nodes(tree: ast.AST) -> tuple[ast.AST, ...]:
    """All of a tree, which takes as long as everything else here."""
    return tuple(ast.walk(tree))


@cache
def sources() -> tuple[Source, ...]:
    """All of our modules."""
    found = pkgutil.walk_packages(lorafit.__path__, "lorafit.")
    modules = [import_module(one.name) for one in found if not one.name.endswith("__main__")]
    return tuple(Source(one, ast.parse(Path(str(one.__file__)).read_text(encoding="utf-8"))) for one in modules)


@cache
def own_classes() -> tuple[OwnClass, ...]:
    """Each class of ours that ends up with a library's above it."""
    written = [(source, node) for source in sources() for node in source.tree.body if isinstance(node, ast.ClassDef)]
    found = [OwnClass(vars(source.module)[node.name], source, node) for source, node in written]
    return tuple(own for own in found if own.above)


def _lines(kind: type) -> list[tuple[type, ...]]:
    known: list[type] = kind.__subclasses__()
    below = [one for one in known if one.__module__.startswith("lorafit.")]
    return [line for one in below for line in _lines(one)] or [kind.__mro__]


def is_of_library(thing: Any) -> bool:
    """Whether a module, class or function is neither ours nor Python's."""
    name = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", None)
    return isinstance(name, str) and name.partition(".")[0] not in NOT_LIBRARIES


def seam(kind: type, name: str) -> str:
    """`transformers.Trainer._save`."""
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}.{name}"


# Overrides


def overrides() -> dict[str, list[str]]:
    """Seam, by the class in which the library begins it -> where ours override it."""
    found = defaultdict(list)
    for own, method, theirs in _overriding():
        found[seam(theirs[-1], method.name)].append(own.source.place(method.lineno))
    return found


def written_as(name: str) -> list[str]:
    """Where classes of ours with a library's above them have a method or set a value of this name."""
    return [
        own.source.place(node.lineno)
        for own in own_classes()
        for node in nodes(own.node)
        if (isinstance(node, ast.FunctionDef) and node.name == name)
        or (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr == name)
    ]


def odd_parameters() -> Iterator[str]:
    """Overrides that could not be called as the library's own method is."""
    for own, method, theirs in _overriding():
        for kind in theirs:
            for parameter in misfits(vars(own.kind)[method.name], vars(kind)[method.name]):
                yield f"{own.source.place(method.lineno)}: {seam(kind, method.name)}: {parameter}"


def _overriding() -> Iterator[tuple[OwnClass, ast.FunctionDef, list[type]]]:
    for own in own_classes():
        for method in (one for one in own.node.body if isinstance(one, ast.FunctionDef) and one.name != "__init__"):
            if theirs := [one for one in own.above if method.name in vars(one)]:
                yield own, method, theirs


def misfits(ours: Any, theirs: Any) -> list[str]:
    """Parameters of a library's method that ours does not take, and those that ours needs and nobody gives."""
    takes, gives = _parameters(_function(ours)), _parameters(_function(theirs))
    if gives is None or takes is None:
        return []
    is_open = any(one.kind in VARIADIC for one in takes.values())
    refused = [] if is_open else [name for name, one in gives.items() if one.kind not in VARIADIC and name not in takes]
    if any(one.kind in VARIADIC for one in gives.values()):
        return refused
    needed = [name for name, one in takes.items() if one.default is one.empty and one.kind not in VARIADIC]
    return [*refused, *(name for name in needed if name not in gives)]


def _parameters(function: Any) -> dict[str, inspect.Parameter] | None:
    """None of what has no signature, or is no function."""
    try:
        return dict(inspect.signature(function).parameters)
    except (ValueError, TypeError):
        return None


def _function(value: Any) -> Any:
    """What a property, a class method or the like is made of."""
    for name in ("fget", "func", "__func__"):
        value = getattr(value, name, value)
    return value


# Values and names


def values_set() -> dict[str, list[str]]:
    """Seam -> where a class of ours sets a value that a library's class sets, too."""
    found = defaultdict(list)
    for own in own_classes():
        values = [line for line in own.node.body if not (isinstance(line, ast.AnnAssign) and line.value is None)]
        in_class = [one for line in values for one in _targets(line) if isinstance(one, ast.Name)]
        names = [(one.id, one.lineno) for one in in_class] + [(one.attr, one.lineno) for one in _set_on_self(own.node)]
        for name, line in names:
            if holders := [one for one in own.above if name in instance_names(one)]:
                found[seam(holders[-1], name)].append(own.source.place(line))
    return found


def names_read_on_self() -> Iterator[str]:
    """Attributes of `self`, and of parameters that are declared as such an object, that nobody gives it."""
    for own in own_classes():
        if not hasattr(own.kind, "__getattr__"):
            yield from _unknown(own.kind, "self", own.node, own.source)
    declared = {own.kind for own in own_classes()} | {TrainingArguments, TrainerControl, TrainerState}
    for source in sources():
        for function in source.find(ast.FunctionDef):
            for one in [*function.args.args, *function.args.kwonlyargs]:
                kind = source.stands_for(one.annotation)
                if isinstance(kind, type) and kind in declared and not hasattr(kind, "__getattr__"):
                    yield from _unknown(kind, one.arg, function, source)


def _unknown(kind: type, variable: str, within: ast.AST, source: Source) -> Iterator[str]:
    known = [frozenset().union(*map(instance_names, line)) for line in _lines(kind)]
    for node in nodes(within):
        if not isinstance(node, ast.Attribute) or not is_name(node.value, variable):
            continue
        if not all(node.attr in names for names in known):
            yield f"{source.place(node.lineno)}: {kind.__name__}.{node.attr}"


def is_name(node: ast.expr, *names: str) -> bool:
    """Whether an expression is one of these variables."""
    return isinstance(node, ast.Name) and node.id in names


def is_super(node: ast.expr) -> bool:
    """Whether an expression is `super()`."""
    return isinstance(node, ast.Call) and is_name(node.func, "super")


@cache
def instance_names(kind: type) -> frozenset[str]:
    """What an object has from this class: written there, declared, or set by its methods."""
    found = {*vars(kind), *inspect.get_annotations(kind)}
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError):
        return frozenset(found)
    return frozenset(found | {one.attr for one in _set_on_self(tree)})


def _set_on_self(tree: ast.AST) -> Iterator[ast.Attribute]:
    for node in nodes(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_name(node.value, "self"):
            yield node


def _targets(line: ast.stmt) -> list[ast.expr]:
    if isinstance(line, ast.Assign):
        return line.targets
    return [line.target] if isinstance(line, ast.AnnAssign) else []


@cache
def private_names() -> dict[str, list[str]]:
    """Private names of objects that are not ours, nor modules or classes -> where they are read or set."""
    own = {name for source in sources() for name in _names_given(source)} | OF_TUPLES
    found = defaultdict(list)
    for source in sources():
        for node in source.find(ast.Attribute):
            is_private = node.attr.startswith("_") and not node.attr.endswith("__") and node.attr not in own
            holder = ast.unparse(node.value)
            if (
                is_private
                and holder not in ("self", "cls", "super()")
                and not _is_static(source.stands_for(node.value))
            ):
                found[node.attr].append(source.place(node.lineno))
    return found


def _names_given(source: Source) -> Iterator[str]:
    for node in source.find(ast.FunctionDef, ast.ClassDef):
        yield node.name
    for node in source.find(ast.Assign, ast.AnnAssign):
        yield from (one.id for one in _targets(node) if isinstance(one, ast.Name))
    yield from (one.attr for one in _set_on_self(source.tree))


def _is_static(thing: Any) -> bool:
    return isinstance(thing, ModuleType | type)


def names_gone() -> Iterator[str]:
    """What we import from libraries, or read or replace in their modules and classes, and is not there."""
    for source in sources():
        for line in source.find(ast.ImportFrom):
            root = str(line.module).partition(".")[0]
            if not line.level and root not in NOT_LIBRARIES and find_spec(root):
                yield from (
                    f"{source.place(line.lineno)}: {line.module}.{one.name}"
                    for one in line.names
                    if not has(import_module(str(line.module)), one.name)
                )
        for node in source.find(ast.Attribute):
            owner = source.stands_for(node.value)
            if _is_static(owner) and is_of_library(owner) and not has(owner, node.attr):
                yield f"{source.place(node.lineno)}: {ast.unparse(node)}"


def has(owner: ModuleType | type, name: str) -> bool:
    """Also a module that is not imported yet, and what instances of a class have."""
    if isinstance(owner, type):
        return hasattr(owner, name) or any(name in instance_names(one) for one in owner.__mro__)
    return hasattr(owner, name) or (hasattr(owner, "__path__") and find_spec(f"{owner.__name__}.{name}") is not None)


# Calls


def refused_calls() -> Iterator[str]:
    """Our calls of a library's functions and classes, and of `super()`, that these do not take."""
    for source in sources():
        for call in source.find(ast.Call):
            called = source.stands_for(call.func)
            if is_of_library(called) and (reason := refusal(called, call)):
                yield f"{source.place(call.lineno)}: {ast.unparse(call.func)}: {reason}"
    for own in own_classes():
        for call in (node for node in nodes(own.node) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Attribute) and is_super(call.func.value):
                name = call.func.attr
                theirs = next((vars(one)[name] for one in own.above if name in vars(one)), None)
                if reason := refusal(_function(theirs), call, of_method=not isinstance(theirs, staticmethod)):
                    yield f"{own.source.place(call.lineno)}: super().{name}: {reason}"


def refusal(called: Any, call: ast.Call, *, of_method: bool = False) -> str:
    """What is wrong with the arguments; empty where they fit or no signature is known."""
    if isinstance(called, type) and called.__init__ is object.__init__:  # type: ignore[misc]  # asked for just that
        return ""  # written in another language, which says `self` among the parameters
    try:
        # transformers copies class methods so that they seem to lose their first parameter twice.
        signature = inspect.signature(called, follow_wrapped=not inspect.ismethod(getattr(called, "__wrapped__", None)))
    except (ValueError, TypeError):
        return ""
    positional = [one for one in call.args if not isinstance(one, ast.Starred)]
    named = {one.arg: one for one in call.keywords if one.arg}
    is_open = len(positional) < len(call.args) or len(named) < len(call.keywords)
    bind = signature.bind_partial if is_open else signature.bind
    try:
        bind(*([None] * of_method), *positional, **named)
    except TypeError as error:
        return str(error)
    return ""
