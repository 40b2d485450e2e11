"""Names to objects: what a config calls ``gnn_node`` or ``my_package.my_file:my_space``.

Built-in and third-party plug-ins are found alike, through entry points of the groups ``nasgraph.spaces``,
``nasgraph.tasks``, ``nasgraph.proxies``, ``nasgraph.samplers``, ``nasgraph.objectives``, ``nasgraph.exporters``,
``nasgraph.policies`` and ``nasgraph.relaxations``.
So the engine imports none of them, and nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from nasgraph.errors import ConfigError, NasgraphError, did_you_mean

KINDS = ("spaces", "tasks", "proxies", "samplers", "objectives", "exporters", "policies", "relaxations")


@cache
def _group(kind: str) -> dict[str, EntryPoint]:
    if kind not in KINDS:
        raise KeyError(f"no such kind of plug-in: {kind}")
    return {entry.name: entry for entry in entry_points(group=f"nasgraph.{kind}")}


def names(kind: str) -> list[str]:
    """Sorted names of the installed plug-ins of one kind (``spaces``, ``tasks``, ``proxies``, ...)."""
    return sorted(_group(kind))


def check(kind: str, name: str) -> None:
    """Refuse an unknown name without importing anything.

    Raises: ConfigError: ``name`` is neither installed nor of the form ``module:attribute``.
    """
    singular = _singular(kind)
    if ":" in name:
        if not re.fullmatch(r"[^\W\d]\w*(\.\w+)*:[^\W\d]\w*(\.\w+)*", name):
            raise ConfigError(f"{singular} '{name}' is not module:attribute, as in my_package.my_file:my_{singular}")
    elif name not in _group(kind):
        raise ConfigError(
            f"unknown {singular} '{name}'.{did_you_mean(name, names(kind))} "
            f"Known: {', '.join(names(kind))}; or name your own as module:attribute."
        )


def resolve(kind: str, name: str) -> Any:
    """The plug-in called ``name``: an installed name of that kind, or ``module:attribute`` of the user's own code.

    The user's own modules are looked for in the working directory too.

    Raises: ConfigError: unknown name, module that cannot be imported, or attribute that the module does not have.
    """
    check(kind, name)
    own = ":" in name
    module_name, _, attribute = (name if own else _group(kind)[name].value).partition(":")
    if own and os.getcwd() not in sys.path:  # a console script does not look into the working directory
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigError(f"'{name}': {module_name} needs {error.name}, which is not installed") from error
        looked = f"looked in {os.getcwd()} and sys.path"
        raise ConfigError(f"'{name}': there is no module {module_name} ({looked})") from error
    except Exception as error:
        raise ConfigError(f"'{name}': {module_name} cannot be imported: {_where(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            hint = did_you_mean(part, [known for known in dir(found) if not known.startswith("_")])
            raise ConfigError(f"'{name}': {module_name} has no {attribute}.{hint}")
        found = getattr(found, part)
    return found


def make(kind: str, name: str, arguments: Mapping[str, Any], offered: Mapping[str, Any] | None = None) -> Any:
    """Call the plug-in ``name`` with ``arguments``, and with those of ``offered`` that it has a parameter for.

    Raises: ConfigError: an argument that it does not have, or one that it needs and does not get.
    """
    function, what = resolve(kind, name), f"{_singular(kind)} '{name}'"
    if not callable(function):
        raise ConfigError(f"{what} is a {type(function).__name__}; a function or class that makes one is needed")
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for argument in arguments:
        if argument not in parameters and not takes_any:
            hint = did_you_mean(argument, parameters)
            raise ConfigError(f"{what} has no argument '{argument}'.{hint} It has: {', '.join(parameters) or 'none'}")
    given = {key: value for key, value in (offered or {}).items() if key in parameters} | dict(arguments)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for parameter in parameters.values():
        if parameter.default is parameter.empty and parameter.kind in named and parameter.name not in given:
            there = f"; it is offered {', '.join(sorted(offered))}" if offered else ""
            raise ConfigError(f"{what} needs the argument '{parameter.name}'{there}")
    try:
        return function(**given)
    except NasgraphError:
        raise
    except Exception as error:  # the user's own function: one line with the place, not a page
        raise ConfigError(f"{what} failed: {_where(error)}") from error


def _singular(kind: str) -> str:
    return kind[:-3] + "y" if kind in ("proxies", "policies") else kind[:-1]


def _where(error: Exception) -> str:
    """Type, text and line of what an import raised, in one line."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})".replace("\n", " ")
