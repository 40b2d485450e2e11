"""What can go wrong for a user. Each message is one line that names the wrong thing and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NasgraphError(Exception):
    """A mistake that the user can mend. The command line prints its message and exits with code 2."""


class ConfigError(NasgraphError):
    """A config, a command-line option or a name that nasgraph does not know."""


class SpaceError(NasgraphError):
    """A search space, or an architecture of it, that is declared wrongly."""


class DataError(NasgraphError):
    """A dataset that is missing or has the wrong form."""


class DamagedFile(NasgraphError):
    """A file of a run that is not what was written. It is refused by name, never half-read."""


class ExportError(NasgraphError):
    """A model that cannot be written in the format asked for."""


class SearchStopped(NasgraphError):
    """A search that gave up because its candidates fail. What was computed is kept."""


class NotFinite(ValueError):
    """A measurement that is NaN or infinite: a failure of the candidate, never a value."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'gcn'?`` for the known name that is nearest to ``name``, or an empty string."""
    by_lower = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f" Did you mean '{by_lower[near[0]]}'?" if near else ""
