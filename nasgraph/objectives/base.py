"""What a measurement is: values that are all finite, or a failure with its reason. Failure is a value."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from nasgraph.errors import NotFinite


@dataclass(frozen=True)
class Scored:
    """What was measured of one architecture.

    Raises: NotFinite: a value is NaN or infinite; record that architecture as :class:`Failed` instead.
    """

    values: dict[str, float]
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.values.items():
            if not math.isfinite(value):
                raise NotFinite(f"{name} is {value}")


@dataclass(frozen=True)
class Failed:
    """Why an architecture has no values. ``reason`` is a short slug (error, not_finite, out_of_memory, crashed,
    timeout, exit, constraint), ``detail`` says more."""

    reason: str
    detail: str


Result = Scored | Failed
