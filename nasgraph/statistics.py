"""Rank correlations with their uncertainty: how well a cheap score orders candidates, and what it adds to size."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation of ``x`` ``(n,)`` and ``y`` ``(n,)``; ties get their average rank.

    Returns: a number in [-1, 1], or NaN where it is not defined: fewer than 3 pairs, or a column that is constant.
    Raises: ValueError: the lengths differ, or a value is NaN or infinite.
    """
    columns = _columns(x, y)
    return float(_correlation(*columns, counts=np.ones((1, columns.shape[1])))[0])


def partial_spearman(x: ArrayLike, y: ArrayLike, given: ArrayLike) -> float:
    """Spearman's correlation of ``x`` and ``y`` with ``given`` held fixed, all ``(n,)``.

    The ranks' first-order partial correlation, (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2)(1 - r_yz^2)) (Kendall 1942).

    Returns: a number in [-1, 1], or NaN where it is not defined: fewer than 4 rows, a column that is constant, or ``x``
    or ``y`` ordering the rows just as ``given`` does.
    Raises: ValueError: the lengths differ, or a value is NaN or infinite.
    """
    columns = _columns(x, y, given)
    return float(_partial(*columns, counts=np.ones((1, columns.shape[1])))[0])


def bootstrap_interval(
    x: ArrayLike,
    y: ArrayLike,
    given: ArrayLike | None = None,
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron 1979) of ``spearman(x, y)``, or of ``partial_spearman(x, y, given)``.

    Rows are drawn together. Resamples in which the correlation is not defined are left out.

    Returns: (low, high), or (NaN, NaN) if fewer than half of the resamples have a correlation.
    Raises: ValueError: the lengths differ, or a value is NaN or infinite.
    """
    columns = _columns(x, y) if given is None else _columns(x, y, given)
    n = columns.shape[1]
    if n < 3:
        return math.nan, math.nan
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    found = _correlation(*columns, counts=counts) if given is None else _partial(*columns, counts=counts)
    found = found[np.isfinite(found)]
    if len(found) < resamples / 2:
        return math.nan, math.nan
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _columns(*columns: ArrayLike) -> Array:
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    if any(array.ndim != 1 or array.shape != arrays[0].shape for array in arrays):
        raise ValueError(f"columns of one length are needed, not {[array.shape for array in arrays]}")
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("a value is NaN or infinite: leave that row out")
    return np.stack(arrays)


def _ranks(column: Array, counts: Array) -> Array:
    """Ranks ``(b, n)`` of ``column`` ``(n,)`` in ``b`` resamples, where row ``i`` occurs ``counts[:, i]`` times."""
    values, group = np.unique(column, return_inverse=True)
    size = np.zeros((len(counts), len(values)))
    np.add.at(size.T, group, counts.T)
    return (np.cumsum(size, axis=1) - (size - 1) / 2)[:, group]


def _correlation(x: Array, y: Array, *, counts: Array) -> Array:
    """Rank correlations ``(b,)`` in the resamples ``counts`` ``(b, n)``; NaN where not defined."""
    n = counts.sum(axis=1)
    # the mean rank is (n + 1) / 2 whatever the ties, so nothing is lost to rounding
    a, b = (_ranks(column, counts) - ((n + 1) / 2)[:, None] for column in (x, y))
    spread = np.sqrt((counts * a * a).sum(axis=1) * (counts * b * b).sum(axis=1))
    defined = (spread > 0) & (n >= 3)
    r = (counts * a * b).sum(axis=1) / np.where(defined, spread, 1)
    return np.where(defined, np.clip(r, -1, 1), np.nan)


def _partial(x: Array, y: Array, z: Array, *, counts: Array) -> Array:
    xy, xz, yz = (_correlation(a, b, counts=counts) for a, b in ((x, y), (x, z), (y, z)))
    left = (1 - xz * xz) * (1 - yz * yz)
    defined = (left > 1e-12) & (counts.sum(axis=1) >= 4)
    r = (xy - xz * yz) / np.sqrt(np.where(defined, left, 1))
    return np.where(defined, np.clip(r, -1, 1), np.nan)
