"""Names to objects: what a config calls ``gnn_node`` or ``my_package.my_file:my_space``.

Built-in and third-party plug-ins are found alike, through entry points of the groups ``nasgraph.spaces``,
``nasgraph.tasks``, ``nasgraph.proxies``, ``nasgraph.samplers``, ``nasgraph.objectives`` and ``nasgraph.exporters``.
So the engine imports none of them, and nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from nasgraph.errors import ConfigError, did_you_mean

KINDS = ("spaces", "tasks", "proxies", "samplers", "objectives", "exporters")


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
    if ":" not in name and name not in _group(kind):
        raise ConfigError(
            f"unknown {kind[:-3] + 'y' if kind == 'proxies' else kind[:-1]} '{name}'."
            f"{did_you_mean(name, names(kind))} Known: {', '.join(names(kind))}; or name your own as module:attribute."
        )


def resolve(kind: str, name: str) -> Any:
    """The plug-in called ``name``: an installed name of that kind, or ``module:attribute`` of the user's own code.

    Raises: ConfigError: unknown name, module that cannot be imported, or attribute that the module does not have.
    """
    check(kind, name)
    module_name, _, attribute = (name if ":" in name else _group(kind)[name].value).partition(":")
    if os.getcwd() not in sys.path:  # a console script does not look into the working directory, users' files lie there
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigError(f"'{name}': {module_name} needs {error.name}, which is not installed") from error
        raise ConfigError(
            f"'{name}': there is no module {module_name} (looked in {os.getcwd()} and sys.path)"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"'{name}': module {module_name} has no {attribute}.{did_you_mean(part, vars(found))}")
        found = getattr(found, part)
    return found


def make(kind: str, name: str, arguments: Mapping[str, Any], offered: Mapping[str, Any] | None = None) -> Any:
    """Call the plug-in ``name`` with ``arguments``, and with those of ``offered`` that it has a parameter for.

    Raises: ConfigError: an argument that it does not have, or one that it needs and does not get.
    """
    function = resolve(kind, name)
    if not callable(function):
        raise ConfigError(f"'{name}' is a {type(function).__name__}; a function or class that makes one is needed")
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    what = kind[:-3] + "y" if kind == "proxies" else kind[:-1]
    for argument in arguments:
        if argument not in parameters and not takes_any:
            known = ", ".join(parameters) or "none"
            hint = did_you_mean(argument, parameters)
            raise ConfigError(f"{what} '{name}' has no argument '{argument}'.{hint} It has: {known}")
    given = {key: value for key, value in (offered or {}).items() if key in parameters} | dict(arguments)
    for parameter in parameters.values():
        needed = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if needed and parameter.name not in given:
            raise ConfigError(f"{what} '{name}' needs the argument '{parameter.name}'")
    return function(**given)
