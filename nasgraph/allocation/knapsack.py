"""The best option of each item within budgets: a multiple-choice knapsack, solved exactly.

An item is a layer with its bit-widths or keep ratios, or a channel that is kept or not. ``least`` is the solver, for
several budgets; ``knapsack`` and ``greedy`` are the same problem with one budget and values instead of damage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SLACK = 1e-9  # of a budget, relative: rounding of sums


def least(
    goal: np.ndarray, items: Sequence[int], costs: Mapping[str, np.ndarray], limits: Mapping[str, float]
) -> list[int] | None:
    """One option of each item with the least sum of ``goal`` within all ``limits``, by ``scipy.optimize.milp``.

    Args:
        goal: of each option, in the order of their items.
        items: the item of each option, numbered from 0.
        costs: for each budget the cost of each option.

    Returns: positions of the options taken; None: nothing fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    places, options = np.asarray(items), np.arange(len(goal))
    rows = [LinearConstraint(csr_array((np.ones(len(goal)), (places, options))), 1, 1)]
    for name, cost in costs.items():
        scale = max(float(np.abs(cost).max()), abs(limits[name])) or 1.0  # the solver's tolerances are absolute
        rows.append(LinearConstraint(cost[None] / scale, -np.inf, limits[name] / scale))
    best = np.full(places.max() + 1, np.inf)
    np.minimum.at(best, places, goal)
    scaled = goal - best[places]  # an item's best is 0
    spread = float(scaled.max()) or 1.0
    while True:
        found = milp(
            scaled * (1e6 / spread),
            integrality=np.ones(len(goal)),
            bounds=Bounds(0, 1),
            constraints=rows,
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            return None
        chosen = np.flatnonzero(found.x > 0.5)
        over = [n for n in costs if costs[n][chosen].sum() - limits[n] > SLACK * max(abs(limits[n]), 1e-300)]
        if not over:
            return [int(i) for i in chosen]
        # It exceeds a budget by less than the solver's tolerance: leave out this one and ask again.
        rows.append(LinearConstraint(np.isin(options, chosen)[None].astype(float), -np.inf, len(best) - 1))


@dataclass(frozen=True)
class Picked:
    """One option for each item. ``options``: their positions; ``value`` and ``cost``: their sums."""

    options: tuple[int, ...]
    value: float
    cost: float


def knapsack(values: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float) -> Picked:
    """The option of each item that together have the largest value at a cost of at most ``budget``: exact.

    A channel that is kept or not has the values ``[0, value]`` and costs ``[0, cost]`` (Aflalo et al., "Knapsack
    Pruning with Inner Distillation", 2020: value ``sum |w dL/dw|``, cost in multiply-adds; channels tied to each other
    are one item). A layer has an option for each keep ratio.

    Args: values, costs: of each item, those of its options; finite.

    Raises: ValueError: the cheapest options together cost more than ``budget``, or numbers that do not belong together.
    """
    _check(values, costs, budget)
    places = [item for item, options in enumerate(values) for _ in options]
    flat_values = np.array([value for options in values for value in options], dtype=float)
    flat_costs = np.array([cost for options in costs for cost in options], dtype=float)
    chosen = least(-flat_values, places, {"cost": flat_costs}, {"cost": budget})
    assert chosen is not None  # the cheapest options fit: it was checked
    starts = np.cumsum([0, *(len(options) for options in values)])
    return _picked([i - int(starts[places[i]]) for i in chosen], values, costs)


def greedy(values: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float) -> Picked:
    """As :func:`knapsack`, but quick and not always the best: from the cheapest options up, best gain per cost first.

    Raises: ValueError: as :func:`knapsack`.
    """
    _check(values, costs, budget)
    chosen = [min(range(len(c)), key=lambda i: (c[i], -v[i])) for v, c in zip(values, costs, strict=True)]
    spent = math.fsum(c[i] for c, i in zip(costs, chosen, strict=True))
    while True:
        best, step = 0.0, None
        for item, now in enumerate(chosen):
            for option in range(len(values[item])):
                gain = values[item][option] - values[item][now]
                more = costs[item][option] - costs[item][now]
                rate = gain / more if more > 0 else math.inf
                if gain > 0 and spent + more <= budget and rate > best:
                    best, step = rate, (item, option, more)
        if step is None:
            return _picked(chosen, values, costs)
        chosen[step[0]] = step[1]
        spent += step[2]


def _picked(chosen: Sequence[int], values: Sequence[Sequence[float]], costs: Sequence[Sequence[float]]) -> Picked:
    value = math.fsum(v[i] for v, i in zip(values, chosen, strict=True))
    return Picked(tuple(chosen), value, math.fsum(c[i] for c, i in zip(costs, chosen, strict=True)))


def _check(values: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float) -> None:
    if not values or [len(v) for v in values] != [len(c) for c in costs] or not all(len(v) for v in values):
        raise ValueError("knapsack: give each item as many costs as values, and at least one")
    numbers = [x for options in (*values, *costs) for x in options]
    if not all(math.isfinite(x) for x in (*numbers, budget)):
        raise ValueError("knapsack: a value, a cost or the budget is not finite")
    least = math.fsum(min(options) for options in costs)
    if least > budget:
        raise ValueError(f"knapsack: the cheapest options cost {least:g}, more than the budget {budget:g}")
