"""What a generated file must import or contain, so that it can name the classes and functions that a model is made of.

Code of installed packages is imported under its public name. The user's own code, and nasgraph's, is copied: the
definition itself and, of its module, what the definition needs.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import site
import symtable
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nasgraph.errors import ExportError

# Modules that name the functions written in C, which do not know where they are offered.
OFFERING = ("torch", "torch.nn.functional", "torch.special", "torch.linalg", "torch.fft")
SHORT = {
    "torch.nn": ("nn", "from torch import nn"),
    "torch.nn.functional": ("F", "from torch.nn import functional as F"),
}


class Names:
    """The top level of a generated file, as it fills: ``imports`` and ``definitions`` by the name they bind.

    Args: reserved: names that the file defines itself.
    """

    def __init__(self, reserved: frozenset[str] = frozenset()) -> None:
        self.imports: dict[str, set[str]] = {}
        self.definitions: dict[str, str] = {}
        self._origin: dict[str, str] = {}  # module of each definition
        self._reserved = reserved

    @property
    def bound(self) -> set[str]:
        """All names that the file binds at its top level."""
        return {*self.imports, *self._origin, *self._reserved}

    def in_order(self) -> list[str]:
        """The texts of ``definitions``: first what others need to be defined, such as their base classes."""
        ordered: dict[str, str] = {}

        def place(name: str) -> None:
            text = self.definitions.get(name)
            if text is not None and name not in ordered:
                for needed in _needed_to_define(text):
                    if needed != name:
                        place(needed)
                ordered[name] = text

        for name in self.definitions:
            place(name)
        return list(ordered.values())

    def embed(self, thing: Any) -> None:
        """Copy the definition of ``thing``, a class or function, if it is the user's own or nasgraph's.

        Raises: ExportError: source that cannot be read, or names that clash.
        """
        module, name = _place(thing)
        if own(module):
            self._define(module, name.partition(".")[0])

    def reference(self, thing: Any) -> str:
        """The expression that names ``thing``, a class or function; imports or copies what it needs."""
        module, name = _place(thing)
        if module == "builtins":
            return name
        if own(module):
            self.embed(thing)
            return name
        root, _, rest = name.partition(".")
        module = _public(module, root)
        tail = f".{rest}" if rest else ""
        if module in SHORT and self._bind(*SHORT[module]):
            return f"{SHORT[module][0]}.{root}{tail}"
        if module != "torch" and module not in SHORT and self._bind(root, f"from {module} import {root}"):
            return f"{root}{tail}"
        self.need(module.partition(".")[0], f"import {module}", module.partition(".")[0])
        return f"{module}.{root}{tail}"

    def need(self, name: str, statement: str, what: str) -> None:
        """Bind ``name`` by the import ``statement``. Raises: ExportError: it is bound to something else."""
        if not self._bind(name, statement):
            raise ExportError(f"'{name}' would mean two things in one file, one of them {what}: rename yours")

    def _bind(self, name: str, statement: str) -> bool:
        if name in self._origin or name in self._reserved:
            return False
        statements = self.imports.setdefault(name, set()) | {statement}
        # `import a.b` and `import a.c` both bind `a`; any other two statements disagree
        if len(statements) > 1 and not all(s.startswith("import ") and " as " not in s for s in statements):
            return False
        self.imports[name] = statements
        return True

    def _define(self, module: str, name: str) -> None:
        source = _source(module)
        if self._origin.get(name) == module:
            return
        statement = source.bindings[name]
        for bound in sorted(set(_binds(statement))):
            if bound in self.bound:
                raise ExportError(f"two different things are called '{bound}', one of them in {module}: rename yours")
            self._origin[bound] = module
        text = source.text_of(statement)
        lines: dict[tuple[int, int], tuple[int, int, str]] = {}
        for found in ast.walk(statement):
            if isinstance(found, ast.ImportFrom) and own(source.absolute(found)):
                for alias in found.names:
                    self._define_from(source.absolute(found), alias.name, alias.name)
                again = [f"{alias.asname} = {alias.name}" for alias in found.names if alias.asname]
                assert found.end_lineno is not None and found.end_col_offset is not None
                start = (found.lineno, found.col_offset)
                lines[start] = (found.end_lineno, found.end_col_offset, "; ".join(again) or "pass")
            elif isinstance(found, ast.Import) and any(own(alias.name) for alias in found.names):
                raise ExportError(f"{module}: import names from {found.names[0].name}, not the module as a whole")
        for needed, at_run_time in _names_used(text).items():
            if needed != name:
                self._satisfy(source, needed, at_run_time)
        self.definitions[name] = _replaced(text, source.first_line(statement), lines)

    def _satisfy(self, source: _Source, name: str, at_run_time: bool) -> None:
        """See that ``name``, used by a definition of ``source``, means the same in the generated file."""
        statement = source.bindings.get(name)
        if statement is None:
            thing = getattr(source.module, name, None)
            if at_run_time and not hasattr(builtins, name) and hasattr(thing, "__qualname__"):  # from m import *
                self._define_from(*_place(thing), name)
            return
        if not at_run_time and (name in source.typing_only or not isinstance(statement, ast.Import | ast.ImportFrom)):
            return  # an annotation, which is never evaluated
        if isinstance(statement, ast.Import):
            alias = next(a for a in statement.names if (a.asname or a.name.partition(".")[0]) == name)
            if own(alias.name):
                raise ExportError(f"{source.name}: import names from {alias.name}, not the module as a whole")
            text = f"import {alias.name} as {alias.asname}" if alias.asname else f"import {alias.name}"
            self.need(name, text, f"an import of {source.name}")
        elif isinstance(statement, ast.ImportFrom):
            alias = next(a for a in statement.names if (a.asname or a.name) == name)
            if at_run_time or not own(source.absolute(statement)):
                self._define_from(source.absolute(statement), alias.name, name)
        else:
            self._define(source.name, name)

    def _define_from(self, module: str, name: str, bound: str) -> None:
        """What ``from module import name as bound`` does."""
        if not own(module):
            if module != "__future__":
                as_name = f" as {bound}" if bound != name else ""
                self.need(bound, f"from {module} import {name}{as_name}", f"{module}.{name}")
            return
        source = _source(module)
        if name not in source.bindings and not hasattr(source.module, name):
            raise ExportError(f"cannot copy {name} of {module}: it is a module, import the names that you need from it")
        if name in source.bindings and not isinstance(source.bindings[name], ast.Import | ast.ImportFrom):
            self._define(module, name)
        else:
            self._satisfy(source, name, True)
        if bound != name and self._origin.setdefault(bound, f"{module}.{name}") == f"{module}.{name}":
            self.definitions.setdefault(bound, f"{bound} = {name}")


@functools.cache
def own(module: str) -> bool:
    """Is the module the user's own or nasgraph's: not of the standard library, and not installed from elsewhere?

    An installed package that itself requires nasgraph (a package of search spaces) counts as own: a file that imports
    it would import nasgraph.
    """
    top = module.partition(".")[0]
    if top in ("nasgraph", "__main__"):
        return True
    if top in sys.stdlib_module_names or top in ("torch", "torch_geometric"):
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None and module not in sys.modules:
        spec = importlib.util.find_spec(module)
        file = spec.origin if spec else None
    if file is None:  # built into Python, or a folder without code
        return False
    installed = sysconfig.get_paths()
    paths = {*(installed[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")), *site.getsitepackages()}
    paths.add(site.getusersitepackages())
    if not any(Path(file).resolve().is_relative_to(Path(path).resolve()) for path in paths):
        return True
    packages = importlib.metadata.packages_distributions().get(top, [])
    needs = [requirement for package in packages for requirement in importlib.metadata.requires(package) or []]
    return any(requirement.lower().startswith("nasgraph") for requirement in needs)


def _place(thing: Any) -> tuple[str, str]:
    """Module and qualified name of a class or function. Raises: ExportError: it has none, or is local."""
    name = getattr(thing, "__qualname__", None) or getattr(thing, "__name__", None)
    if name is None:
        raise ExportError(f"{thing!r} has no name that a file could use")
    if inspect.isbuiltin(thing):
        short = name.rpartition(".")[2]
        for offering in OFFERING:
            if getattr(importlib.import_module(offering), short, None) is thing:
                return offering, short
    if "<" in name:
        raise ExportError(f"{name} is defined inside a function: define it at the top of its module")
    module = getattr(thing, "__module__", None)
    if module is None:
        raise ExportError(f"{thing!r} has no module that a file could import it from")
    return module, name


@functools.cache
def _public(module: str, name: str) -> str:
    """The shortest package above ``module`` that offers the same thing under ``name``."""
    thing = getattr(importlib.import_module(module), name, None)
    parts = module.split(".")
    for n in range(1, len(parts)):
        above = ".".join(parts[:n])
        if getattr(importlib.import_module(above), name, None) is thing:
            return above
    return module


@dataclass(frozen=True)
class _Source:
    """The text of a module and the statement that binds each of its top-level names."""

    name: str
    module: Any
    lines: list[str]
    bindings: dict[str, ast.stmt]
    typing_only: frozenset[str]

    def first_line(self, statement: ast.stmt) -> int:
        decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
        return min([statement.lineno, *(decorator.lineno for decorator in decorators)])

    def text_of(self, statement: ast.stmt) -> str:
        return "\n".join(self.lines[self.first_line(statement) - 1 : statement.end_lineno])

    def absolute(self, statement: ast.ImportFrom) -> str:
        relative = "." * statement.level + (statement.module or "")
        package = getattr(self.module, "__package__", None) or self.name.rpartition(".")[0]
        return importlib.util.resolve_name(relative, package) if statement.level else relative


@functools.cache
def _source(module: str) -> _Source:
    found = importlib.import_module(module)
    try:
        text = inspect.getsource(found)
    except (OSError, TypeError):
        raise ExportError(f"the source of {module} cannot be read: define operations in a file") from None
    bindings: dict[str, ast.stmt] = {}
    typing_only = set()
    for statement in ast.parse(text).body:
        typing = isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.dump(statement.test)
        for inner in ast.walk(statement) if typing else [statement]:
            if isinstance(inner, ast.stmt):
                for name in _binds(inner):
                    bindings[name] = inner
                    if typing:
                        typing_only.add(name)
    return _Source(module, found, text.splitlines(), bindings, frozenset(typing_only))


def _binds(statement: ast.stmt) -> Iterator[str]:
    """Names that a top-level statement binds."""
    if isinstance(statement, ast.Import):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in statement.names)
    elif isinstance(statement, ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in statement.names)
    elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        for found in ast.walk(statement):
            if isinstance(found, ast.Name) and isinstance(found.ctx, ast.Store):
                yield found.id
    elif isinstance(statement, ast.If | ast.Try | ast.With):
        for part in ("body", "orelse", "finalbody"):
            for inner in getattr(statement, part, []):
                yield from _binds(inner)
        for handler in getattr(statement, "handlers", []):
            for inner in handler.body:
                yield from _binds(inner)


def _names_used(text: str) -> dict[str, bool]:
    """Names that ``text`` takes from its module; true for those needed at run time, false for mere annotations."""
    used: dict[str, bool] = {}

    def visit(table: symtable.SymbolTable) -> None:
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (symbol.is_global() or table.get_type() == "module"):
                used[symbol.get_name()] = True
        for child in table.get_children():
            visit(child)

    visit(symtable.symtable("from __future__ import annotations\n" + text, "source", "exec"))
    for found in ast.walk(ast.parse(text)):
        if isinstance(found, ast.Name):
            used.setdefault(found.id, False)
    return used


def _needed_to_define(text: str) -> list[str]:
    """Names that must have a value before ``text`` can be run: all but those in the bodies of its functions."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            defaults = [default for default in [*node.args.defaults, *node.args.kw_defaults] if default is not None]
            for part in [*getattr(node, "decorator_list", []), *defaults]:
                visit(part)
        elif isinstance(node, ast.AnnAssign):
            for part in (node.target, node.value):
                if part is not None:
                    visit(part)
        else:
            if isinstance(node, ast.Name):
                found.append(node.id)
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(text))
    return found


def _replaced(text: str, first_line: int, changes: dict[tuple[int, int], tuple[int, int, str]]) -> str:
    """``text``, which starts at ``first_line`` of its file, with (line, column) ranges replaced."""
    lines = [line.encode() for line in text.split("\n")]
    for (line, column), (end_line, end_column, new) in sorted(changes.items(), reverse=True):
        start, end = line - first_line, end_line - first_line
        lines[start : end + 1] = [lines[start][:column] + new.encode() + lines[end][end_column:]]
    return b"\n".join(lines).decode()
