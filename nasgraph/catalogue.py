"""``nasgraph spaces``: the list of spaces, or one described: its choices, its size, its picture."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from inspect import Parameter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nasgraph import config, registry
from nasgraph.errors import ConfigError, NasgraphError, SpaceError
from nasgraph.space import SearchSpace

# Sizes of a task, for describing a space that has none of its own: those of scikit-learn's digits.
SIZES = {"features": 64, "classes": 10}


def make_space(name: str, arguments: Mapping[str, Any], sizes: Mapping[str, Any]) -> SearchSpace:
    """The space called ``name``, made with ``arguments`` and those of ``sizes`` that it takes.

    Raises: ConfigError: an argument is wrong, or what is made is no space.
    """
    space = registry.make("spaces", name, arguments, sizes)
    if not isinstance(space, SearchSpace):
        raise ConfigError(f"space '{name}' made a {type(space).__name__}, not a SearchSpace")
    return space


def listing() -> int:
    """Print the installed spaces, one line each."""
    table = Table("space", "what it is")
    for name in registry.names("spaces"):
        documentation = registry.resolve("spaces", name).__doc__ or ""
        table.add_row(name, documentation.strip().partition("\n")[0])
    console = Console(markup=False)
    console.print(table)
    console.print("Describe one:  nasgraph spaces NAME      Your own:  nasgraph spaces module:function")
    return 0


def show(name: str, overrides: Sequence[str], picture: Path | None) -> int:
    """Print a space's choices and size, and write its picture (SVG)."""
    from nasgraph.draw import draw_space

    arguments = config.override({}, overrides)
    space = make_space(name, arguments, _needed(name))
    console = Console(markup=False)
    documentation = registry.resolve("spaces", name).__doc__ or ""
    console.print(f"{space.name}: {documentation.strip().partition(chr(10))[0]}", highlight=False)
    table = Table("choice", "options", "ordered")
    for choice in space.choices.values():
        table.add_row(choice.name, ", ".join(map(str, choice.labels)), "yes" if choice.ordered else "")
    console.print(table)
    for constraint in space.constraints:
        console.print(f"constraint: {constraint}")
    try:
        console.print(f"{space.size():,} architectures" + (" before constraints" if space.constraints else ""))
    except SpaceError as error:
        console.print(str(error))
    target = picture or Path(f"{space.name}.svg")
    try:
        target.write_text(draw_space(space), encoding="utf-8")
    except OSError as error:
        raise NasgraphError(f"cannot write {target}: {error.strerror}; name another file with --draw") from None
    console.print(f"picture: {target}")
    return 0


def _needed(name: str) -> dict[str, int]:
    """Those of :data:`SIZES` that a space has no default for: its defaults fit each other."""
    made = registry.resolve("spaces", name)
    parameters = inspect.signature(made).parameters if callable(made) else {}
    return {size: n for size, n in SIZES.items() if size in parameters and parameters[size].default is Parameter.empty}
