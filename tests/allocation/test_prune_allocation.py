from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nasgraph.allocation.knapsack import greedy, knapsack
from nasgraph.allocation.pruning import (
    annealed_mask,
    envelope_prox,
    group_step,
    keep_costs,
    keep_ratios,
    keep_sensitivity,
    repaired_mask,
)
from nasgraph.allocation.sparse_training import annealed_masks, fewer_groups
from nasgraph.allocation.starts import effects
from nasgraph.build import build
from nasgraph.errors import ConfigError
from nasgraph.objectives.sparsity import count_kept_flops, count_kept_parameters
from nasgraph.search_spaces.prune_cnn import prune_cnn
from nasgraph.space import Architecture, SearchSpace
from nasgraph.tasks.batch import Batch
from nasgraph.tasks.images import digits_images
from nasgraph.training import TrainSettings
from nasgraph.training.loop import train
from nasgraph.transforms.prune import Prune

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


# ---- keep ratios --------------------------------------------------------------------------------------------------


def small(keeps: tuple[float, ...] = (0.1, 0.5, 1.0), scores: str = "magnitude") -> SearchSpace:
    return prune_cnn(classes=3, image_size=8, layers=2, widths=(6,), keeps=keeps, scores=scores)


def images(n: int = 20) -> Batch:
    rng = torch.Generator().manual_seed(1)
    return Batch((torch.randn(n, 1, 8, 8, generator=rng),), torch.randint(0, 3, (n,), generator=rng))


def test_what_a_ratio_spoils_is_the_correlation_with_a_network_that_is_pruned_there() -> None:
    model = build(small(), {"width1": 6, "keep1": 1.0, "width2": 6, "keep2": 1.0}, seed=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = keep_sensitivity(model, images(), (0.1, 0.5, 1.0), where="conv*")
    assert list(table) == ["conv1", "conv2"] and all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    inputs = images().inputs[0]
    whole = model.eval()(inputs).detach().double()
    for name, row in table.items():
        assert row[1.0] == 0.0 and min(row[0.1], row[0.5]) > 0
        for ratio in (0.1, 0.5):
            other = build(small(), {"width1": 6, "keep1": 1.0, "width2": 6, "keep2": 1.0}, seed=3).eval()
            setattr(other, name, Prune(keep=ratio).rewrite(getattr(other, name)))
            changed = other(inputs).detach().double()
            pairs = [each - each.mean(1, keepdim=True) for each in (whole, changed)]
            r = float(F.cosine_similarity(pairs[0].flatten(), pairs[1].flatten(), dim=0))
            assert row[ratio] == pytest.approx(-math.log(r * r + 1e-4), rel=1e-6)
    with pytest.raises(ConfigError, match="at 'dense'"):
        keep_sensitivity(model, images(), (0.5,), where="dense")


def test_costs_are_what_the_objectives_count() -> None:
    full = build(small(), {"width1": 6, "keep1": 1.0, "width2": 6, "keep2": 1.0})
    flops = keep_costs(full, images(1).inputs, (0.1, 0.5, 1.0), where="conv*")
    weights = keep_costs(full, images(1).inputs, (0.1, 0.5, 1.0), "weights", where="conv*")
    fixed = count_kept_flops(full, images(1).inputs) - flops["conv1"][1.0] - flops["conv2"][1.0]
    rest = count_kept_parameters(full) - weights["conv1"][1.0] - weights["conv2"][1.0]
    for one, two in itertools.product((0.1, 0.5, 1.0), repeat=2):
        model = build(small(), {"width1": 6, "keep1": one, "width2": 6, "keep2": two})
        assert count_kept_flops(model, images(1).inputs) == fixed + flops["conv1"][one] + flops["conv2"][two]
        assert count_kept_parameters(model) == rest + weights["conv1"][one] + weights["conv2"][two]
    with pytest.raises(ValueError, match="give flops or weights"):
        keep_costs(full, images(1).inputs, (0.5,), "bytes")


def test_ratios_are_the_least_damage_within_the_budget() -> None:
    rng = np.random.default_rng(0)
    ratios = (0.1, 0.3, 1.0)
    damage = {name: dict(zip(ratios, sorted(rng.exponential(size=3), reverse=True), strict=True)) for name in "abc"}
    costs = {
        name: {ratio: float(ratio * size) for ratio in ratios} for name, size in zip("abc", (10, 40, 90), strict=True)
    }
    for budget in (14.0, 40.0, 75.0, 140.0):
        found = keep_ratios(damage, costs, budget)
        every = [dict(zip("abc", picked, strict=True)) for picked in itertools.product(ratios, repeat=3)]
        fits = [each for each in every if sum(costs[name][ratio] for name, ratio in each.items()) <= budget]
        assert found == min(fits, key=lambda each: sum(damage[name][ratio] for name, ratio in each.items()))
    with pytest.raises(ValueError, match="more than the budget"):
        keep_ratios(damage, costs, 13.0)
    with pytest.raises(ValueError, match="layer 'a' at keep ratio 0.1 has no cost"):
        keep_ratios(damage, {}, 13.0)


# ---- training that ends sparse ------------------------------------------------------------------------------------


def test_annealed_masks_fall_from_none_to_the_mask_and_leave_no_trace() -> None:
    choices = {"width1": 6, "keep1": 0.1, "width2": 6, "keep2": 0.5}
    model = build(small(), choices, seed=3)
    plain = build(small(), {**choices, "keep1": 1.0, "keep2": 1.0}, seed=3)
    x = images().inputs[0]
    masked, whole = copy.deepcopy(model).train()(x), plain.train()(x)
    with annealed_masks(model, steps=4, seed=0):
        assert torch.equal(model.eval()(x), build(small(), choices, seed=3).eval()(x))  # no step
        seen = [model.train()(x).detach() for _ in range(6)]
    assert torch.equal(seen[0], whole) and torch.equal(seen[4], masked) and torch.equal(seen[5], masked)
    assert not any(torch.equal(each, other) for each in seen[1:4] for other in (whole, masked))
    assert torch.equal(model.train()(x), masked)
    with annealed_masks(model, steps=4, seed=0):
        again = [model.train()(x).detach() for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(seen, again, strict=False))


def test_masks_that_are_not_annealed_are_refused() -> None:
    choices = {"width1": 6, "keep1": 0.5, "width2": 6, "keep2": 0.5}
    for model, steps, message in (
        (nn.Linear(3, 3), 4, "no layer"),
        (build(small(scores="learned"), choices), 4, "learned scores"),
        (build(small(), choices), 0, "steps is 0"),
    ):
        with pytest.raises(ConfigError, match=message), annealed_masks(model, steps):
            pass


def test_groups_go_one_by_one_and_only_of_the_model_that_is_trained() -> None:
    model = build(small((1.0,)), {"width1": 6, "keep1": 1.0, "width2": 6, "keep2": 1.0}, seed=3)
    layers = {name: model.get_submodule(name) for name in ("conv1", "conv2")}
    other = nn.Linear(2, 2)
    own, others = torch.optim.Adam(model.parameters(), lr=0.01), torch.optim.Adam(other.parameters())
    counts = []

    def step() -> None:
        for optimizer, loss in ((others, other(torch.ones(1, 2)).sum()), (own, images().loss(model))):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        counts.append(tuple(int((x.weight.flatten(1).norm(dim=1) > 0).sum()) for x in layers.values()))

    with fewer_groups(layers, {"conv1": 2, "conv2": 5}, steps=6):
        for _ in range(8):
            step()
    assert counts[5:] == [(2, 5)] * 3 and counts[0][0] > 2 and sorted(counts, reverse=True) == counts
    weight = other.weight.clone()
    step()
    assert counts[-1] == (6, 6) and not torch.equal(other.weight, weight)
    for budgets, message in (({"conv1": 2}, "budget None"), ({"conv1": 7, "conv2": 1}, "has 6 slices and budget 7")):
        with pytest.raises(ConfigError, match=message), fewer_groups(layers, budgets, 6):
            pass


def test_annealing_is_a_setting_of_training_that_reaches_pruned_networks_only() -> None:
    task, choices = digits_images(train_samples=60), {"width1": 6, "keep1": 0.1, "width2": 6, "keep2": 0.1}
    space = prune_cnn(**task.sizes, layers=2, widths=(6,), keeps=(0.1, 1.0))
    found = {}
    for keep in (0.1, 1.0):
        for anneal in (0.0, 0.5):
            model = build(space, {**choices, "keep1": keep, "keep2": keep}, seed=3)
            task.fit(model, TrainSettings(epochs=2, anneal=anneal), seed=0)
            found[keep, anneal] = model.state_dict()["conv1.weight"]
    assert torch.equal(found[1.0, 0.0], found[1.0, 0.5]) and not torch.equal(found[0.1, 0.0], found[0.1, 0.5])
    model = build(space, choices, seed=3)
    with annealed_masks(model, steps=2 * len(task.epochs(0)) * 5 // 6, seed=0, start=0.5):
        task.fit(model, TrainSettings(epochs=2), seed=0)
    assert torch.equal(model.state_dict()["conv1.weight"], found[0.1, 0.5])
    with pytest.raises(ConfigError, match="anneal is 2"):
        TrainSettings(anneal=2)
    with pytest.raises(ConfigError, match="no len"):
        train(model, iter([images()]), [images()], TrainSettings(anneal=0.5), 0)


def test_the_warm_start_of_a_search_measures_the_same() -> None:
    space, whole = small(), Architecture({"width1": 6, "keep1": 1.0, "width2": 6, "keep2": 1.0})
    table = keep_sensitivity(build(space, whole, 3), images(), (0.1, 0.5, 1.0), where="conv*")
    rows = effects(space, lambda arch: build(space, arch, 3), whole, images(), "signal", lambda _: 0.0)
    found = {(row.choice, row.label): row.damage for row in rows}
    assert len(found) == 6
    for i in (1, 2):
        for ratio in (0.1, 0.5, 1.0):
            assert found[f"keep{i}", ratio] == pytest.approx(table[f"conv{i}"][ratio], rel=1e-9)
