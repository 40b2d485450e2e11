"""Formats that can hold no network of a space: told before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

from nasgraph import registry
from nasgraph.errors import ExportError
from nasgraph.space import SearchSpace


def check_formats(formats: Sequence[str], space: SearchSpace) -> None:
    """Ask each exporter that has an attribute ``check``, a function of the space, whether its format can ever hold it.

    A format that holds some networks of the space passes; what it cannot hold then fails by itself.

    Raises: ExportError: names the format, and why. ConfigError: an unknown format.
    """
    for name in formats:
        check = getattr(registry.resolve("exporters", name), "check", None)
        if check is None:
            continue
        try:
            check(space)
        except ExportError as error:
            raise ExportError(
                f"the format {name} can hold no network of space '{space.name}': {error} (export: leave {name} out)"
            ) from None
