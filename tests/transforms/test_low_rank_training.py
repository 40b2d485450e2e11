"""Each way to find a rank against its equation."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nasgraph.errors import ConfigError, SpaceError
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.training.policies import OrderedDropout
from nasgraph.transforms.base import transformed
from nasgraph.transforms.layers import extended
from nasgraph.transforms.low_rank import LowRank, factorised
from nasgraph.transforms.low_rank_training import (
    StableRanks,
    TrainedRankPruning,
    energy_rank,
    expected_stable_rank,
    group_lasso,
    needed_rank,
    nuclear_subgradient,
    shrink,
    stable_rank,
)
from tests.transforms.toys import Scale


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data = weight.clone()
    return layer


# ---- Maestro ------------------------------------------------------------------------------------------------------


def test_group_lasso_is_the_sum_of_the_norms_of_all_tails() -> None:
    model = nn.Sequential(layer_of(drawn(6, 8)), nn.Conv2d(4, 6, 3, groups=2))
    model = transformed(model, [LowRank("0", rank=4), LowRank("1", rank=2)])
    expected = 0.0
    u, v = model[0].second.weight.detach(), model[0].first.weight.detach()
    for j in range(4):
        expected += float(u[:, j:].norm() + v[j:].norm())
    for group in range(2):
        u = model[1].second.weight.detach()[3 * group : 3 * group + 3]
        v = model[1].first.weight.detach()[2 * group : 2 * group + 2]
        for j in range(2):
            expected += float(u[:, j:].norm() + v[j:].norm())
    assert float(group_lasso(model).detach()) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(SpaceError, match="no layer of the model is factorised"):
        group_lasso(nn.Linear(2, 2))


def test_the_gradient_of_the_group_lasso_is_finite_at_zero() -> None:
    layer = factorised(layer_of(drawn(4, 4)), 3)
    with torch.no_grad():
        layer.first.weight[1:] = 0
        layer.second.weight[:, 1:] = 0
    group_lasso(layer).backward()
    assert layer.first.weight.grad.isfinite().all() and layer.second.weight.grad.isfinite().all()


def test_a_rank_below_the_threshold_is_cut_and_costs_less_than_it() -> None:
    for make in (lambda: layer_of(drawn(7, 6)), lambda: nn.Conv2d(4, 8, 3, groups=2, bias=False)):
        layer = factorised(make(), 4)
        with torch.no_grad():
            layer.first.weight[-1] *= 1e-6 if layer.groups == 1 else 1.0
        before = layer.weight.detach().clone()
        for eps in (0.0, 1e-3, 0.5, 3.0, 1e9):
            rank = needed_rank(layer, eps)
            cut = shrink(factorised_copy(layer), rank)
            assert cut.rank == rank and (cut.weight - before).norm() <= max(eps * layer.groups**0.5, 1e-5)
        assert needed_rank(layer, 1e9) == 1 and needed_rank(layer, 0.0) == 4
        x = drawn(2, 6) if layer.groups == 1 else drawn(2, 4, 5, 5)
        wanted = layer(x).shape
        assert shrink(layer, 2)(x).shape == wanted and "2" in repr(layer)
    with pytest.raises(SpaceError, match="rank 2 cannot be cut to rank 3: give 1 to 2"):
        shrink(layer, 3)
    extended(layer.first)
    with pytest.raises(SpaceError, match="cut the layer before that"):
        shrink(layer, 1)


def factorised_copy(layer: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(layer)


def two_layers(ranks: list[object], more: list[object] | None = None) -> SearchSpace:
    space = SearchSpace("toy")
    x = space.input("x", torch.zeros(2, 8))
    width = Choice("width", [6, 9])
    first = [LowRank(rank=Choice("first", ranks)), Scale(power=Choice("power", [0, 1, 2]))]
    h = space.add("a", Op(nn.Linear, out_features=width), x, transforms=first)
    second = [LowRank(rank=Choice("second", more or ranks))]
    space.output(space.add("b", Op(nn.Linear, out_features=5), h, transforms=second))
    return space


def test_ordered_dropout_moves_one_layer_and_leaves_the_others_at_full_rank() -> None:
    policy = OrderedDropout(two_layers([4, 1, 2]))
    assert policy.ranks == {"first": (1, 2, 4), "second": (1, 2, 4)}
    counts = Counter()
    for step in range(3000):
        (arch,) = policy.sample(step, random.Random(step))
        assert 4 in (arch["first"], arch["second"])
        counts[arch["first"], arch["second"]] += 1
    # either layer with 1/2, then each rank with 1/3: (4, 4) twice
    expected = {(1, 4): 500, (2, 4): 500, (4, 4): 1000, (4, 1): 500, (4, 2): 500}
    chi2 = sum((counts[key] - n) ** 2 / n for key, n in expected.items())
    assert set(counts) == set(expected) and chi2 < 18.5  # 4 degrees of freedom, p = 0.001


def test_ordered_dropout_trains_plain_layers_in_a_path_of_their_own() -> None:
    policy = OrderedDropout(two_layers([None, 0.25, 0.5], [2, 4]))
    for step in range(20):
        one, plain = policy.sample(step, random.Random(step))
        assert one["first"] is not None and plain["first"] is None and plain["second"] == 4
        assert one["width"] == plain["width"] and one["power"] == plain["power"]


def test_ordered_dropout_refuses_what_it_cannot_order() -> None:
    with pytest.raises(ConfigError, match="'first' mixes ranks and shares"):
        OrderedDropout(two_layers([2, 0.5]))
    assert OrderedDropout(two_layers([2, 0.9]), {"first": [2, 0.9], "second": [2, 0.9]}).ranks["first"] == (2, 0.9)
    with pytest.raises(SpaceError, match="no option 3"):
        OrderedDropout(two_layers([2, 4]), {"first": [2, 3]})
    space = SearchSpace("none")
    space.output(space.add("a", Op(nn.Linear, out_features=2), space.input("x", torch.zeros(1, 2))))
    with pytest.raises(ConfigError, match="'none' has no choice of a LowRank rank"):
        OrderedDropout(space)


# ---- Cuttlefish ---------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 10**6))
def test_stable_rank_is_that_of_the_singular_values(n: int, m: int, seed: int) -> None:
    weight = drawn(n, m, seed=seed)
    s = torch.linalg.svdvals(weight.double())
    assert stable_rank(weight) == pytest.approx(float((s**2).sum() / s[0] ** 2), rel=1e-3)


def test_stable_rank_of_known_matrices() -> None:
    assert stable_rank(torch.eye(5)) == pytest.approx(5.0)
    assert stable_rank(drawn(6, 1) @ drawn(1, 9)) == pytest.approx(1.0)
    assert stable_rank(torch.zeros(3, 3)) == 0.0
    conv = drawn(8, 3, 3, 3)
    assert stable_rank(conv) == pytest.approx(stable_rank(conv.flatten(1)))
    assert stable_rank(drawn(400, 300)) == pytest.approx(expected_stable_rank(400, 300), rel=0.03)  # a finite matrix


def test_a_layer_gets_the_rank_that_its_stable_rank_says_once_that_rests() -> None:
    s = torch.linspace(1.0, 0.5, 10)
    layer = layer_of(torch.diag(s))
    start = float((s**2).sum() / s[0] ** 2)
    watch = StableRanks({"a": layer}, window=3, threshold=0.01)
    assert watch.rank("a") == 10 and not watch.settled("a")
    for scale in (0.5, 0.2, 0.1, 0.1, 0.1):
        with torch.no_grad():
            layer.weight.copy_(torch.diag(torch.cat([s[:5], scale * s[5:]])))
        watch.observe()
    assert not watch.settled("a")  # the window still holds the fall
    watch.observe()
    assert watch.settled("a")
    now = float(((s[:5] ** 2).sum() + 0.01 * (s[5:] ** 2).sum()) / s[0] ** 2)
    assert watch.rank("a") == round(10 * now / start) == 7
    with pytest.raises(ValueError, match="'a' is all zero"):
        StableRanks({"a": layer_of(torch.zeros(2, 2))})


# ---- trained rank pruning -----------------------------------------------------------------------------------------


def test_energy_rank_is_the_first_that_holds_the_share() -> None:
    s = torch.tensor([3.0, 2.0, 1.0, 1.0])  # squares 9, 4, 1, 1 of 15
    assert [energy_rank(s, share) for share in (0.1, 0.6, 0.61, 13 / 15, 0.9, 1.0)] == [1, 1, 2, 2, 3, 4]
    assert energy_rank(torch.zeros(3), 0.9) >= 1


def test_the_nuclear_subgradient_is_the_gradient_of_the_sum_of_singular_values() -> None:
    weight = drawn(5, 7).double().requires_grad_()
    torch.linalg.matrix_norm(weight, "nuc").backward()
    torch.testing.assert_close(nuclear_subgradient(weight.detach()), weight.grad)
    low = drawn(6, 2).double() @ drawn(2, 5, seed=1).double()  # ||W|| + <G, H> <= ||W + H|| for every H
    g = nuclear_subgradient(low)
    for seed in range(50):
        h = drawn(6, 5, seed=seed).double() * 0.1
        norm = torch.linalg.matrix_norm(torch.stack([low, low + h]), "nuc")
        assert norm[0] + (g * h).sum() <= norm[1] + 1e-9


def test_trained_rank_pruning_truncates_every_few_steps_and_adds_the_subgradient() -> None:
    layer = nn.Conv2d(3, 8, 3, bias=False)
    layer.weight.data = drawn(8, 3, 3, 3)
    pruning = TrainedRankPruning({"a": layer}, every=3, energy=0.8, nuclear=0.5)
    layer.weight.grad = torch.ones_like(layer.weight)
    pruning.add_gradient()
    torch.testing.assert_close(layer.weight.grad, 1 + 0.5 * nuclear_subgradient(layer.weight.detach()))
    before = layer.weight.detach().clone()
    u, s, v = torch.linalg.svd(before.flatten(1), full_matrices=False)
    r = energy_rank(s, 0.8)
    for step in range(3):
        assert torch.equal(layer.weight, before) or step == 3
        pruning.after_step()
    torch.testing.assert_close(layer.weight.detach().flatten(1), u[:, :r] @ torch.diag(s[:r]) @ v[:r])
    found = factorised(layer, r)  # and LowRank loses nothing
    torch.testing.assert_close(found.weight, layer.weight, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"energy 1.5"):
        TrainedRankPruning({"a": layer}, every=3, energy=1.5)


def test_trained_rank_pruning_finds_the_rank_of_what_it_learns() -> None:
    """A linear map of rank 2 with noise: the rank that plain training ends with is higher."""
    generator = torch.Generator().manual_seed(0)
    target = drawn(10, 2, seed=1) @ drawn(2, 12, seed=2)
    x = torch.randn(40, 12, generator=generator)
    y = x @ target.T + 0.3 * torch.randn(40, 10, generator=generator)
    ranks = {}
    for nuclear, every in ((0.0, 10**9), (0.05, 20)):
        layer = layer_of(0.3 * drawn(10, 12, seed=3))
        pruning = TrainedRankPruning({"a": layer}, every=every, energy=0.98, nuclear=nuclear)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
        for _ in range(200):
            optimizer.zero_grad()
            (layer(x) - y).square().mean().backward()
            pruning.add_gradient()
            optimizer.step()
            pruning.after_step()
        singular = torch.linalg.svdvals(layer.weight.detach())
        ranks[nuclear] = energy_rank(singular, 0.9999)
    assert ranks[0.05] == 2 < ranks[0.0]
    assert math.isfinite(ranks[0.0])
