"""How much to prune where: a knapsack of groups, a proximal step with an exact budget, annealed masks, mask repair.

Each is a function of tensors or numbers, so it works with whatever measures sensitivity; none of them trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nasgraph.transforms.prune import largest


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
    are one item). A layer has an option for each keep ratio. Solved as an integer program by ``scipy.optimize.milp``.

    Args: values, costs: of each item, those of its options; finite.

    Raises: ValueError: the cheapest options together cost more than ``budget``, or numbers that do not belong together.
    """
    _check(values, costs, budget)
    from scipy.optimize import LinearConstraint, milp
    from scipy.sparse import csr_array

    sizes = [len(options) for options in values]
    one = csr_array((np.ones(sum(sizes)), (np.repeat(np.arange(len(sizes)), sizes), np.arange(sum(sizes)))))
    flat_values = np.concatenate([np.asarray(options, dtype=float) for options in values])
    flat_costs = np.concatenate([np.asarray(options, dtype=float) for options in costs])
    worth = max(float(np.abs(flat_values).max()), 1e-300)  # the solver stops at gaps of 1e-6
    scale = max(abs(budget), float(np.abs(flat_costs).max()), 1e-300)
    rules = [LinearConstraint(one, 1, 1), LinearConstraint(flat_costs[None] / scale, -np.inf, budget / scale)]
    done = milp(
        -flat_values / worth, constraints=rules, integrality=np.ones(len(flat_values)), options={"mip_rel_gap": 0.0}
    )
    if done.x is None:
        raise ValueError(f"knapsack: no solution within {budget}: {done.message}")
    chosen = np.flatnonzero(done.x > 0.5)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return _picked([int(i) for i in chosen - starts], values, costs)


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


def envelope_prox(norms: Tensor, weights: Tensor, strength: float, budget: float) -> Tensor:
    """Factors by which the proximal step of the group sparse envelope shrinks each group; their support is the budget.

    The envelope ``R(w) = min over u in [0, 1], sum u <= k, of sum_j d_j |w_j|^2 / (2 u_j)`` is a convex stand-in for
    "at most k groups are not zero". ``prox(z)_j = z_j u_j / (u_j + s d_j)`` with strength ``s`` and
    ``u_j = clip(|z_j| sqrt(s d_j / (2 mu)) - s d_j, 0, 1)``, ``mu`` such that ``sum u = k`` (WGSEF: Refael, Arbel &
    Huleihel, "Learning k-Level Structured Sparse Neural Networks Using Group Envelope Regularization", 2022).
    All ``u`` are 1 if no more than k groups are not zero.

    Args:
        norms: L2 norms of the groups ``(groups,)``.
        weights: ``d``, positive, ``(groups,)``: 1, or the sizes of the groups.
        strength: of the step (learning rate times regularisation), above 0.
        budget: k, in groups; may be a fraction.

    Returns: factors in [0, 1), float64 ``(groups,)``.
    Raises: ValueError: a strength or budget of 0 or less, or weights that are not positive.
    """
    if strength <= 0 or budget <= 0 or bool((weights <= 0).any()):
        raise ValueError("envelope_prox: strength, budget and weights must be above 0")
    z, d = norms.double(), strength * weights.double()
    live = z > 0
    if budget >= int(live.sum()):
        return live / (1 + d)

    def shares(root: float) -> Tensor:  # root = 1 / sqrt(2 mu)
        return (d.sqrt() * z * root - d).clamp(0, 1)

    low, high = 0.0, float(((1 + d) / (d.sqrt() * z))[live].max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float(shares(middle).sum()) < budget else (low, middle)
    u = shares(high)
    return u / (u + d)


def group_step(weight: Tensor, axis: int, strength: float, budget: int) -> Tensor:
    """:func:`envelope_prox` of the slices of ``weight`` along ``axis``, then exactly ``budget`` of them kept.

    Those with the largest factors stay, of equals the first: the envelope alone may leave a fraction of a group.
    Returns: a tensor like ``weight``. Raises: ValueError: ``budget`` is not between 1 and the number of slices.
    """
    rows = weight.detach().movedim(axis, 0).flatten(1)
    if not 1 <= budget <= len(rows):
        raise ValueError(f"budget is {budget} of {len(rows)} groups")
    norms = rows.double().norm(dim=1)
    factors = envelope_prox(norms, torch.ones_like(norms), strength, budget)
    factors = torch.where(largest(factors, budget), factors, 0.0).to(weight.dtype)
    return weight * factors.view(-1, *[1] * (weight.dim() - 1)).movedim(0, axis)


def annealed_mask(mask: Tensor, progress: float, generator: torch.Generator, start: float = 1.0) -> Tensor:
    """Stochastic subnetwork annealing: what ``mask`` keeps stays, the rest is there with a probability that falls to 0.

    The probability is ``start * (1 + cos(pi progress)) / 2`` (Whitaker & Whitley 2024). For fine-tuning: drawn anew at
    each step, and ``mask`` itself from ``progress`` 1 on.

    Args:
        mask: bool, any shape.
        progress: share of the fine-tuning that is done, in [0, 1].

    Raises: ValueError: a progress or start outside [0, 1].
    """
    if not (0 <= progress <= 1 and 0 <= start <= 1):
        raise ValueError(f"progress {progress} and start {start} must be in [0, 1]")
    chance = start * (1 + math.cos(math.pi * progress)) / 2
    drawn = torch.rand(mask.shape, generator=generator, device=generator.device).to(mask.device) < chance
    return mask | drawn


def repaired_mask(
    weight: Tensor, mask: Tensor, mean: Tensor, variance: Tensor, norm: Tensor, cycles: int = 50, close: float = 0.1
) -> Tensor:
    """Dynamic sparsity without training (DSnoT): entries change places so that each output's mean error shrinks.

    Of a row, ``e = sum over pruned of w E[x]``. A cycle revives the pruned entry that reduces ``|e|`` most per
    variance, ``w E[x] sign(e) / Var[x]``, and prunes the kept one of least ``|w| |x|_2`` whose ``w E[x]`` has the
    opposite sign, so that ``|e|`` shrinks too; as many stay as before. A row stops when ``|e| < close``, when ``e``
    changes its sign, or when nothing is left to change (Zhang et al., ICLR 2024).

    Args:
        weight, mask: of a linear layer, ``(out, in)``; mask bool.
        mean, variance, norm: of the layer's inputs over the data, ``(in,)``; norm is the L2 norm.

    Returns: bool ``(out, in)``. Rows keep their numbers of entries.
    """
    found = mask.clone()
    moves = weight.detach() * mean
    error = (moves * ~found).sum(dim=1)
    sign = error.sign()
    cost = weight.detach().abs() * norm
    active = torch.ones_like(sign, dtype=torch.bool)
    rows = torch.arange(len(weight), device=weight.device)
    for _ in range(cycles):
        active &= (error.abs() >= close) & (error.sign() == sign)
        gain = torch.where(found, -math.inf, moves * sign[:, None] / variance.clamp(min=1e-12))
        loss = torch.where(found & (moves * sign[:, None] < 0), cost, math.inf)
        revived, pruned = gain.argmax(dim=1), loss.argmin(dim=1)
        active &= (gain[rows, revived] > 0) & loss[rows, pruned].isfinite()
        if not bool(active.any()):
            break
        which = rows[active]
        found[which, revived[which]] = True
        found[which, pruned[which]] = False
        error[which] += moves[which, pruned[which]] - moves[which, revived[which]]
    return found


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
