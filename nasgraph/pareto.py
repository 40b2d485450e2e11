"""Fronts and hypervolume: what is best when there is more than one objective.

Every function takes ``values`` ``(n, m)``: one row per candidate, one column per objective, all finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Direction = Literal["maximize", "minimize"]

MARGIN = 0.1  # of an objective's range: how far the reference point lies beyond the worst value


def pareto_front(values: ArrayLike, directions: Sequence[Direction]) -> NDArray[np.bool_]:
    """Mask ``(n,)`` of the non-dominated rows of ``values`` ``(n, m)``. Ties are all kept.

    A row dominates another if it is nowhere worse and somewhere better.

    Raises: ValueError: a value is NaN or infinite (record that trial as failed instead), or the shapes disagree.
    """
    costs = _costs(values, directions)
    rows, row_of = np.unique(costs, axis=0, return_inverse=True)  # sorted; equal rows become one
    front = np.zeros(len(rows), dtype=bool)
    rest = np.arange(len(rows))
    while len(rest):
        best = rest[0]  # the first of the rest in lexicographic order: nothing left can dominate it
        front[best] = True
        rest = rest[(rows[rest] < rows[best]).any(axis=1)]
    return np.asarray(front[row_of.reshape(-1)], dtype=np.bool_)


def reference_point(values: ArrayLike, directions: Sequence[Direction]) -> NDArray[np.float64]:
    """Reference point ``(m,)`` for the hypervolume of all runs that are compared.

    Per objective: the worst value in ``values``, moved away from the best by 10 % of the range (Ishibuchi et al. 2018
    call for a point slightly worse than the nadir, so that the extremes of a front count). Where all values are equal,
    by 10 % of their size, or by 0.1 if they are zero.

    ``values`` ``(n, m)`` must stack the rows of *every* run: hypervolumes against different points do not compare.

    Raises: ValueError: no rows, a value is NaN or infinite, or the shapes disagree.
    """
    costs = _costs(values, directions)
    if not len(costs):
        raise ValueError("a reference point needs at least one row of values")
    worst, spread = costs.max(axis=0), np.ptp(costs, axis=0)
    scale = np.where(spread > 0, spread, np.abs(worst))
    return np.asarray(_sign(directions) * (worst + MARGIN * np.where(scale > 0, scale, 1.0)), dtype=np.float64)


def hypervolume(values: ArrayLike, directions: Sequence[Direction], reference: ArrayLike) -> float:
    """Volume dominated by the rows of ``values`` ``(n, m)`` and bounded by ``reference`` ``(m,)``; no rows: 0.

    Its unit is the product of the objectives' units. Rows that do not beat the reference add nothing.
    Zitzler & Thiele 1998; computed by moocore.

    Raises: ValueError: a value is NaN or infinite, or the shapes disagree.
    """
    return _volume(_costs(values, directions), _bound(reference, directions))


def hypervolume_history(
    values: ArrayLike, directions: Sequence[Direction], reference: ArrayLike
) -> NDArray[np.float64]:
    """Hypervolume ``(n,)`` after each row of ``values`` ``(n, m)``, in order; it never falls.

    Raises: ValueError: a value is NaN or infinite, or the shapes disagree.
    """
    costs, bound = _costs(values, directions), _bound(reference, directions)
    history = np.zeros(len(costs))
    front = np.empty((0, costs.shape[1]))
    volume = 0.0
    for index, row in enumerate(costs):
        if not (front <= row).all(axis=1).any():
            front = np.vstack([front[~(row <= front).all(axis=1)], row])
            volume = _volume(front, bound)
        history[index] = volume
    return history


def _volume(costs: NDArray[np.float64], bound: NDArray[np.float64]) -> float:
    import moocore

    inside = costs[(costs < bound).all(axis=1)]
    return float(moocore.hypervolume(inside, ref=bound)) if len(inside) else 0.0


def _sign(directions: Sequence[Direction]) -> NDArray[np.float64]:
    for direction in directions:
        if direction not in ("maximize", "minimize"):
            raise ValueError(f"a direction is 'maximize' or 'minimize', not {direction!r}")
    return np.array([-1.0 if direction == "maximize" else 1.0 for direction in directions])


def _costs(values: ArrayLike, directions: Sequence[Direction]) -> NDArray[np.float64]:
    """``values`` as numbers that are all minimised."""
    table: NDArray[Any] = np.asarray(values, dtype=np.float64)
    if table.size == 0:
        table = table.reshape(0, len(directions))
    if table.ndim != 2 or table.shape[1] != len(directions) or not len(directions):
        raise ValueError(f"values must be (n, {len(directions)}), one column per direction, not {table.shape}")
    wrong = ~np.isfinite(table)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(f"values[{row}, {column}] is {table[row, column]}: record that trial as failed instead")
    return table * _sign(directions) + 0.0  # + 0.0: no negative zeros


def _bound(reference: ArrayLike, directions: Sequence[Direction]) -> NDArray[np.float64]:
    point: NDArray[Any] = np.asarray(reference, dtype=np.float64)
    if point.shape != (len(directions),) or not np.isfinite(point).all():
        raise ValueError(f"reference must be {len(directions)} finite numbers, not {reference!r}")
    return point * _sign(directions) + 0.0
