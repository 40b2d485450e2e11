"""What a report compares: a search with an equal-budget random search, proxies with the sizes of networks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nasgraph.pareto import Direction, hypervolume_history, pareto_front, reference_point
from nasgraph.statistics import bootstrap_interval, partial_spearman, spearman

if TYPE_CHECKING:
    from nasgraph.screen import ScreenRow
    from nasgraph.study import TrialRecord

Array = NDArray[np.float64]

SIZES = (
    "params",
    "flops",
    "live_params",
    "traffic",
    "weight_bytes",
    "activation_bytes",
)  # what a proxy is held against


class Comparison:
    """A search and its random baseline with one budget, one reference point and one scale.

    Args:
        trials, baseline: in the order they ran. If the baseline is longer, the trials beyond the search's are left out.

    Attributes:
        random: the baseline's trials that are compared.
        budget: how many trials of each are compared.
        search_rows, random_rows: the first scored trial of each network.
        search_front, random_front: masks over these rows.
        reference, ideal: ``(m,)``, shared; None if nothing was scored.
        search_volume, random_volume: hypervolume after each trial, as a share of the box from ``reference`` to
            ``ideal``. A failed trial costs its budget and adds nothing.
    """

    def __init__(
        self,
        trials: Sequence[TrialRecord],
        baseline: Sequence[TrialRecord],
        objectives: Sequence[tuple[str, Direction]],
    ) -> None:
        self.trials, self.objectives = trials, objectives
        self.names = [name for name, _ in objectives]
        self.directions: list[Direction] = [direction for _, direction in objectives]
        self.random = baseline[: len(trials)]
        self.budget = len(self.random) if baseline else len(trials)
        self.search_rows, self.random_rows = distinct(trials), distinct(self.random)
        self.search_front, self.random_front = self._front(self.search_rows), self._front(self.random_rows)
        both = self.table([*self.search_rows, *self.random_rows])
        up = np.array([direction == "maximize" for direction in self.directions])
        self.reference: Array | None = reference_point(both, self.directions) if len(both) else None
        self.ideal: Array | None = np.where(up, both.max(axis=0), both.min(axis=0)) if len(both) else None
        self.search_volume, self.random_volume = self._volumes(trials), self._volumes(self.random)

    def table(self, records: Sequence[TrialRecord]) -> Array:
        """Objectives ``(n, m)`` of scored trials."""
        rows = [[record.values[name] for name in self.names] for record in records]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(self.names))

    def best(self, records: Iterable[TrialRecord]) -> float | None:
        """The best value of the first objective."""
        values = [record.values[self.names[0]] for record in records if record.state == "scored"]
        return (max if self.directions[0] == "maximize" else min)(values, default=None)

    def order(self, values: Mapping[str, float]) -> list[float]:
        """Sorts the best by the first objective to the front."""
        return [-values[name] if way == "maximize" else values[name] for name, way in self.objectives]

    def dominated(self, values: Mapping[str, float], others: Sequence[Mapping[str, float]]) -> bool:
        """Whether one of ``others`` dominates ``values``."""
        rows = [[row[name] for name in self.names] for row in (values, *others)]
        return not pareto_front(rows, self.directions)[0]

    def _front(self, records: Sequence[TrialRecord]) -> list[bool]:
        return [bool(on) for on in pareto_front(self.table(records), self.directions)]

    def _volumes(self, records: Sequence[TrialRecord]) -> list[float]:
        if self.reference is None or self.ideal is None:
            return [0.0] * len(records)
        scored = self.table([record for record in records if record.state == "scored"])
        box = float(np.abs(self.ideal - self.reference).prod())
        history = iter(hypervolume_history(scored, self.directions, self.reference) / box)
        volumes, last = [], 0.0
        for record in records:
            last = float(next(history)) if record.state == "scored" else last
            volumes.append(last)
        return volumes


def distinct(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """The first scored trial of each network."""
    found: dict[str, TrialRecord] = {}
    for record in records:
        if record.state == "scored":
            found.setdefault(record.key, record)
    return list(found.values())


@dataclass(frozen=True)
class Estimate:
    """A correlation and its 95 % bootstrap interval; None: not defined."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Correlation:
    """How the score called ``name`` orders ``n`` networks: alone, and with the number of parameters held fixed."""

    name: str
    n: int
    rho: Estimate | None
    partial: Estimate | None

    @property
    def is_size(self) -> bool:
        return self.name in SIZES


def joined(screen: Iterable[ScreenRow], scored: Iterable[TrialRecord]) -> list[tuple[ScreenRow, TrialRecord]]:
    """Candidates of the screen that were scored later, each network once."""
    trials = {record.key: record for record in distinct(scored)}
    rows: dict[str, ScreenRow] = {}
    for row in screen:
        if row.reason is None and row.key in trials:
            rows.setdefault(row.key, row)
    return [(row, trials[key]) for key, row in rows.items()]


def correlations(pairs: Sequence[tuple[ScreenRow, TrialRecord]], objective: tuple[str, Direction]) -> list[Correlation]:
    """Every score of the screen against an objective: sizes first, then proxies, the strongest first.

    Positive: a larger score goes with a *better* value. ``params`` and ``flops`` are always there, with n = 0 if nobody
    measured them.
    """
    name, direction = objective
    sign = 1 if direction == "maximize" else -1

    def values(score: str) -> list[float | None]:
        return [_number(score, row.values, trial.values, trial.info) for row, trial in pairs]

    quality = [sign * trial.values[name] for _, trial in pairs]
    params = values("params")
    scores = dict.fromkeys(score for row, _ in pairs for score in row.values)
    sizes = [size for size in SIZES if size in scores or size in ("params", "flops")]
    found = []
    for score in [*sizes, *(score for score in scores if score not in SIZES)]:
        if score == name:
            continue
        rows = [(x, y, z) for x, y, z in zip(values(score), quality, params, strict=True) if x is not None]
        x, y = [row[0] for row in rows], [row[1] for row in rows]
        sized = [(a, b, c) for a, b, c in rows if c is not None]
        partial = None
        if score != "params" and sized:
            a, b, c = (list(part) for part in zip(*sized, strict=True))
            partial = _estimate(partial_spearman(a, b, c), bootstrap_interval(a, b, c))
        found.append(Correlation(score, len(rows), _estimate(spearman(x, y), bootstrap_interval(x, y)), partial))
    proxies = [row for row in found if not row.is_size]
    proxies.sort(key=lambda row: -abs(row.rho.value) if row.rho else 1.0)
    return [*(row for row in found if row.is_size), *proxies]


def _number(name: str, *places: Mapping[str, Any]) -> float | None:
    for place in places:
        value = place.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    return None


def _estimate(value: float, interval: tuple[float, float]) -> Estimate | None:
    if math.isnan(value):
        return None
    return Estimate(value, None if math.isnan(interval[0]) else interval)
