from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nasgraph.allocation.knapsack import greedy, knapsack
from nasgraph.allocation.pruning import annealed_mask, envelope_prox, group_step, repaired_mask

ITEMS = st.lists(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), min_size=1, max_size=3), min_size=1, max_size=5
)


@given(ITEMS, st.integers(0, 30))
@settings(deadline=None, max_examples=60)
def test_the_knapsack_is_the_best_of_all(items: list[list[tuple[int, int]]], budget: int) -> None:
    values, costs = [[v for v, _ in item] for item in items], [[c for _, c in item] for item in items]
    fits = [
        sum(v[i] for v, i in zip(values, options, strict=True))
        for options in itertools.product(*(range(len(item)) for item in items))
        if sum(c[i] for c, i in zip(costs, options, strict=True)) <= budget
    ]
    if not fits:
        for function in (knapsack, greedy):
            with pytest.raises(ValueError, match="more than the budget"):
                function(values, costs, budget)
        return
    best, quick = knapsack(values, costs, budget), greedy(values, costs, budget)
    assert best.value == max(fits) and best.cost <= budget
    assert quick.value <= best.value and quick.cost <= budget


def test_the_greedy_way_is_not_always_best() -> None:
    values, costs = [[0, 6], [0, 5], [0, 5]], [[0, 5], [0, 4.5], [0, 4.5]]
    assert greedy(values, costs, 9).value == 6 and knapsack(values, costs, 9).value == 10


@pytest.mark.parametrize(
    ("values", "costs", "message"),
    [([[1]], [[1, 2]], "as many costs"), ([], [], "as many costs"), ([[math.nan]], [[1]], "not finite")],
)
def test_a_knapsack_refuses_what_makes_no_sense(
    values: list[list[float]], costs: list[list[float]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        knapsack(values, costs, 1)


@pytest.mark.parametrize("seed", range(6))
def test_the_proximal_step_is_the_numerical_optimum(seed: int) -> None:
    """Of ``|x - z|^2 / 2 + s sum d x^2 / (2 u)`` over x and the u allowed, by SLSQP, which knows no formula."""
    from scipy.optimize import minimize

    rng = np.random.default_rng(seed)
    z, d = rng.exponential(size=5), rng.uniform(0.5, 2, size=5)
    k, s = float(rng.uniform(0.5, 4)), float(rng.uniform(0.05, 1.5))

    def objective(both: np.ndarray) -> float:
        x, u = both[:5], both[5:]
        return float(((x - z) ** 2).sum() / 2 + s * (d * x**2 / (2 * u)).sum())

    def slope(both: np.ndarray) -> np.ndarray:
        x, u = both[:5], both[5:]
        return np.concatenate([x - z + s * d * x / u, -s * d * x**2 / (2 * u**2)])

    found = minimize(
        objective,
        np.concatenate([z / 2, np.full(5, k / 5)]),
        jac=slope,
        bounds=[(0, None)] * 5 + [(1e-10, 1)] * 5,
        constraints={
            "type": "ineq",
            "fun": lambda both: k - both[5:].sum(),
            "jac": lambda both: -np.eye(10)[5:].sum(0),
        },
        options={"maxiter": 2000, "ftol": 1e-15},
    )
    ours = envelope_prox(torch.tensor(z), torch.tensor(d), s, k).numpy() * z
    np.testing.assert_allclose(ours, found.x[:5], atol=2e-4)


def test_a_budget_for_all_is_plain_weight_decay_and_a_strong_step_keeps_the_budget() -> None:
    norms = torch.tensor([3.0, 0.0, 1.0])
    assert envelope_prox(norms, torch.ones(3), 0.5, 2).tolist() == pytest.approx([1 / 1.5, 0, 1 / 1.5])
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    for budget in (1, 3, 6):
        for axis in (0, 1):
            if budget <= weight.shape[axis]:
                kept = group_step(weight, axis, 0.3, budget)
                assert int((kept.norm(dim=1 - axis) > 0).sum()) == budget
                largest = weight.norm(dim=1 - axis).topk(budget).indices.sort().values
                assert torch.equal((kept.norm(dim=1 - axis) > 0).nonzero().flatten(), largest)
    with pytest.raises(ValueError, match="budget is 7"):
        group_step(weight, 0, 0.3, 7)
    with pytest.raises(ValueError, match="above 0"):
        envelope_prox(norms, torch.ones(3), 0.0, 1)


def test_annealed_masks_end_as_the_mask() -> None:
    mask = torch.arange(10_000) % 10 == 0
    rng = torch.Generator().manual_seed(0)
    assert torch.equal(annealed_mask(mask, 1.0, rng), mask) and bool(annealed_mask(mask, 0.0, rng).all())
    half = annealed_mask(mask, 0.5, rng, start=0.8)
    assert bool(half[mask].all()) and half[~mask].float().mean().item() == pytest.approx(0.4, abs=0.02)
    with pytest.raises(ValueError, match="must be in"):
        annealed_mask(mask, 1.5, rng)


def slow_repair(w: Tensor, mask: Tensor, mean: Tensor, var: Tensor, norm: Tensor, cycles: int, close: float) -> Tensor:
    """One row, entry by entry, as the paper says."""
    kept = mask.tolist()
    move = (w * mean).tolist()
    error = sum(m for m, k in zip(move, kept, strict=True) if not k)
    sign = (error > 0) - (error < 0)
    for _ in range(cycles):
        if abs(error) < close or ((error > 0) - (error < 0)) != sign:
            break
        out = [(move[i] * sign / float(var[i]), -i) for i in range(len(kept)) if not kept[i]]
        back = [(abs(float(w[i])) * float(norm[i]), i) for i in range(len(kept)) if kept[i] and move[i] * sign < 0]
        if not out or max(out)[0] <= 0 or not back:
            break
        revived, pruned = -max(out)[1], min(back)[1]
        kept[revived], kept[pruned] = True, False
        error += move[pruned] - move[revived]
    return torch.tensor(kept)


@pytest.mark.parametrize("seed", range(4))
def test_repair_moves_entries_as_the_slow_version_does_and_reduces_the_error(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 20, generator=rng)
    x = torch.randn(200, 20, generator=rng) + torch.rand(20, generator=rng)
    mean, var, norm = x.mean(0), x.var(0), x.norm(dim=0)
    mask = torch.rand(8, 20, generator=rng) < 0.4
    found = repaired_mask(weight, mask, mean, var, norm)
    for row in range(8):
        assert torch.equal(found[row], slow_repair(weight[row], mask[row], mean, var, norm, 50, 0.1))
    assert torch.equal(found.sum(1), mask.sum(1))

    def error(kept: Tensor) -> float:
        return ((weight * ~kept) @ mean).abs().mean().item()

    assert error(found) < error(mask)
