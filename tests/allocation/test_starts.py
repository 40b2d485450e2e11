"""Tables, fronts and spectra against their slow definitions."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nasgraph.allocation.starts import (
    Effect,
    effects,
    first_trials,
    front,
    networks_of,
    plain_network,
    reference,
    transform_choices,
    within,
)
from nasgraph.build import build
from nasgraph.errors import ConfigError, SpaceError
from nasgraph.predictors.zero_cost import output_sqnr, sqnr
from nasgraph.space import Architecture, Choice, Op, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.tasks.batch import Batch
from nasgraph.transforms import Lora, LowRank, Quantize
from nasgraph.transforms.base import transformed
from nasgraph.transforms.damage import METHODS, gradient_ranks, gradient_spectra, noise, stable_ranks, weighted_layers
from nasgraph.transforms.low_rank import factorised


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    for i, parameter in enumerate(net.parameters()):
        parameter.data = 0.6 * drawn(*parameter.shape, seed=i)
    return net


def batch(n: int = 40) -> Batch:
    x = drawn(n, 6, seed=9)
    return Batch((x,), model()(x).argmax(1))  # what the model says, so that a change rather hurts


def bits_and_ranks() -> SearchSpace:
    rules = [
        Quantize("(0|2|4)", weight_bits=Choice("bits.{name}", [2, 4, 8])),
        Lora("(0|2)", rank=Choice("rank.{name}", [0, 1, 3])),
        LowRank("2", rank=Choice("factors", [2, None, 4])),
    ]
    return SearchSpace.from_module(model(), rules, inputs=batch().inputs)


def parameters(space: SearchSpace, architecture: Architecture) -> float:
    return float(sum(parameter.numel() for parameter in build(space, architecture).parameters()))


def weight_bits(space: SearchSpace, architecture: Architecture) -> float:
    """A cost that sees what the tests change: bits of weights and of adapters."""
    total = 0.0
    for _, layer in weighted_layers(build(space, architecture)):
        for part in layer.children() if hasattr(layer, "first") else [layer]:
            steps = getattr(part, "on_weight", {})
            bits = next((step.bits for step in steps.values()), 32)
            total += part.weight.numel() * bits
            total += 32 * sum(p.numel() for a in getattr(part, "beside", {}).values() for p in a.parameters())
    return total


# ---- the reference ------------------------------------------------------------------------------------------------


def test_the_reference_is_what_transforms_change_least() -> None:
    space = bits_and_ranks()
    names = ["bits.0", "bits.2", "bits.4", "rank.0", "rank.2", "factors"]
    assert sorted(transform_choices(space)) == sorted(names)
    expected = {"bits.0": 8, "bits.2": 8, "bits.4": 8, "rank.0": 0, "rank.2": 0, "factors": None}
    assert reference(space) == Architecture(expected)
    plain = SearchSpace("plain")
    width = Choice("width", [4, 8])
    plain.output(plain.add("a", Op(nn.Linear, out_features=width), plain.input("x", torch.zeros(1, 2))))
    with pytest.raises(SpaceError, match="'plain' has no transform with a choice"):
        reference(plain)


def declared() -> SearchSpace:
    space = SearchSpace("declared")
    x = space.input("x", torch.zeros(2, 6))
    bits, rank = Choice("bits", [None, 2, 4]), Choice("rank", [1, 2, None])
    first = [Quantize(weight_bits=bits), LowRank(rank=rank)]
    h = space.add("first", Op(nn.Linear, out_features=Choice("width", [8, 12])), x, transforms=first)
    space.output(space.add("head", Op(nn.Linear, out_features=3), h, transforms=[Quantize(weight_bits=bits)]))
    return space


def test_networks_of_a_trained_plain_network_are_it_rewritten() -> None:
    space = declared()
    start = reference(space, {"width": 12})
    assert start == Architecture({"width": 12, "bits": None, "rank": None})
    trained = plain_network(space, start)
    torch.testing.assert_close(trained(*batch().inputs), build(space, start)(*batch().inputs))
    for parameter in trained.parameters():
        parameter.data.mul_(3.0)
    network = networks_of(space, trained)
    assert torch.equal(network(start)(*batch().inputs), trained.eval()(*batch().inputs))
    changed = network(Architecture({"width": 12, "bits": None, "rank": 2}))
    assert torch.equal(changed.first.first.weight, factorised(trained.first, 2).first.weight)
    assert torch.equal(changed.head.weight, trained.head.weight)
    without = SearchSpace("always")  # a transform that no architecture is without
    always = [Quantize(weight_bits=Choice("bits", [2, 4]))]
    x = without.input("x", torch.zeros(2, 6))
    without.output(without.add("head", Op(nn.Linear, out_features=3), x, transforms=always))
    assert type(plain_network(without, {"bits": 4}).head) is nn.Linear


# ---- the tables ---------------------------------------------------------------------------------------------------


def test_sensitivity_is_the_rise_of_the_loss_of_one_change_alone() -> None:
    space, data = bits_and_ranks(), batch()
    start = reference(space)
    rows = effects(
        space, functools.partial(build, space), start, data, "sensitivity", functools.partial(parameters, space)
    )
    assert len(rows) == 3 * 3 + 2 * 3 + 3
    own = data.loss(build(space, start).eval())
    for row in rows:
        changed = build(space, {**start, row.choice: row.label}).eval()
        assert row.damage == pytest.approx(float((data.loss(changed) - own).detach()), abs=1e-6)
        assert row.cost == parameters(space, {**start, row.choice: row.label})
        if row.choice.startswith("rank"):
            assert row.damage == 0.0  # a new adapter adds nothing


def test_weight_noise_is_the_distance_of_the_weights() -> None:
    space, data = bits_and_ranks(), batch()
    start = reference(space)
    rows = effects(space, functools.partial(build, space), start, data, "sqnr", functools.partial(parameters, space))
    kept = dict(weighted_layers(build(space, start)))
    for row in rows:
        if row.choice == "factors" and row.label is not None:
            name = next(name for name in kept if name.endswith("2"))
            reference_weight = kept[name].effective_weight().detach()
            changed = dict(weighted_layers(build(space, {**start, "factors": row.label})))[name].weight.detach()
            expected = (changed - reference_weight).square().sum() / reference_weight.square().sum()
            assert row.damage == pytest.approx(float(expected), rel=1e-4)
    by_bits = {row.label: row.damage for row in rows if row.choice == "bits.0"}
    assert by_bits[2] > by_bits[4] > by_bits[8] == 0.0


def test_noise_of_a_layer_that_lost_channels_counts_them_as_zeros() -> None:
    w = drawn(6, 5)
    padded = torch.cat([w[:4], torch.zeros(2, 5)])
    assert noise(w, w[:4]) == pytest.approx(noise(w, padded))
    assert noise(torch.zeros(2, 2), torch.zeros(2, 2)) == 0.0


def test_spectra_are_the_singular_values_of_the_gradient() -> None:
    net, data = model(), batch()
    net[0].requires_grad_(False)  # frozen layers have gradients too
    found = gradient_spectra(net, data)
    assert all(parameter.grad is None for parameter in net.parameters())
    again = model()
    data.loss(again).backward()
    for name in ("0", "2", "4"):
        torch.testing.assert_close(found[name], torch.linalg.svdvals(again[int(name)].weight.grad))
    for name, rank in gradient_ranks(net, data, 0.9).items():
        squares = found[name].square()
        assert squares[:rank].sum() >= 0.9 * squares.sum() > squares[: rank - 1].sum()


def test_gradient_damage_is_what_a_small_step_of_that_rank_cannot_gain() -> None:
    """-dL of a step along the r leading singular vectors is step * their squares; all ranks: step * ||G||^2."""
    net, data, step = model().double(), batch(), 1e-6
    data = Batch((data.inputs[0].double(),), data.target)
    damage = METHODS["gradients"](net, data)
    start = float(data.loss(net).detach())
    data.loss(net).backward()
    whole = sum(float(net[i].weight.grad.square().sum()) for i in (0, 2, 4))
    for rank in (1, 2):
        u, s, v = torch.linalg.svd(net[2].weight.grad, full_matrices=False)
        moved = model().double()
        with torch.no_grad():
            moved[2].weight -= step * (u[:, :rank] * s[:rank]) @ v[:rank]
            gained = (start - float(data.loss(moved))) / step
        adapted = transformed(model().double(), [Lora("2", rank=rank)])
        assert 1.0 - damage(adapted) == pytest.approx(gained / whole, rel=1e-4)
    assert damage(net) == 1.0


def test_stable_ranks_follow_the_spectrum() -> None:
    net = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 40))
    net[0].weight.data = drawn(40, 2) @ drawn(2, 40, seed=1)
    net[1].weight.data = torch.eye(40)
    net[2].weight.data = drawn(40, 40, seed=2)
    found = stable_ranks(net)
    assert found["0"] <= 8 and found["1"] == 40 and found["2"] >= 35
    damage = METHODS["stable_rank"](net, batch())
    assert damage(net) == 0.0
    half = transformed(copy.deepcopy(net), [LowRank("1", rank=10)])
    assert damage(half) == pytest.approx(1 - 10 / 40)


def test_methods_by_name() -> None:
    space = bits_and_ranks()
    with pytest.raises(ConfigError, match="unknown method 'sensitivty'.*Did you mean 'sensitivity'"):
        effects(
            space,
            functools.partial(build, space),
            reference(space),
            batch(),
            "sensitivty",
            functools.partial(parameters, space),
        )


# ---- the front ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 4))
def test_each_assignment_has_the_least_damage_of_all_that_cost_no_more(seed: int, choices: int, labels: int) -> None:
    rng = random.Random(seed)
    rows = [
        Effect(f"c{c}", label, rng.choice([0.0, rng.random()]), float(rng.randint(0, 5)))
        for c in range(choices)
        for label in range(labels)
    ]
    architecture = {f"c{c}": 0 for c in range(choices)}
    tables = [[row for row in rows if row.choice == name] for name in architecture]
    tables = [table for table in tables if len({row.damage for row in table}) > 1]
    own = [next(row for row in table if row.label == 0) for table in tables]
    found = front(rows, architecture)
    every = [
        (
            sum(r.cost - o.cost for r, o in zip(p, own, strict=True)),
            sum(r.damage - o.damage for r, o in zip(p, own, strict=True)),
        )
        for p in itertools.product(*tables)
    ]
    for each in found:
        assert set(each.labels) == {table[0].choice for table in tables}
        assert each.damage <= min(damage for cost, damage in every if cost <= each.cost + 1e-9) + 1e-9
    assert found[0].cost == pytest.approx(min(cost for cost, _ in every))
    assert found[-1].damage == pytest.approx(min(damage for _, damage in every))
    costs = [each.cost for each in found]
    assert costs == sorted(costs)


def test_within_a_budget() -> None:
    rows = [Effect("a", 2, 0.5, 20.0), Effect("a", 4, 0.1, 40.0), Effect("a", 8, 0.0, 80.0)]
    found = front(rows, {"a": 8})
    assert [each.labels["a"] for each in found] == [2, 4, 8]
    assert within(found, -40.0).labels == {"a": 4} and within(found, 0.0).labels == {"a": 8}
    with pytest.raises(ConfigError, match="the cheapest assignment changes the cost by -60, above -61"):
        within(found, -61.0)


def test_first_trials_go_from_the_cheapest_to_the_least_damaging() -> None:
    space, data = bits_and_ranks(), batch()
    start, network = reference(space), functools.partial(build, space)
    found = first_trials(space, network, start, data, functools.partial(weight_bits, space), n=6)
    assert 3 <= len(found) <= 6 and len(set(found)) == len(found)
    costs = [weight_bits(space, arch) for arch in found]
    assert costs == sorted(costs)
    least = found[-1]
    assert least["rank.0"] == 3 and least["rank.2"] == 3  # damage 1 - held falls with the rank
    assert found[0]["rank.0"] == 0 and found[0]["bits.0"] == 2
    losses = [float(data.loss(build(space, arch).eval()).detach()) for arch in (found[0], found[-1])]
    assert losses[1] < losses[0]
    one = first_trials(space, network, start, data, functools.partial(weight_bits, space), methods=["sqnr"], n=4)
    assert all(arch["rank.0"] == 0 for arch in one)  # the method says nothing of adapters


def test_first_trials_keep_the_constraints_of_the_space() -> None:
    space, data = bits_and_ranks(), batch()
    space.constrain("no two bits", lambda arch: arch["bits.0"] != 2)
    found = first_trials(
        space, functools.partial(build, space), reference(space), data, functools.partial(weight_bits, space)
    )
    assert found and all(arch["bits.0"] != 2 for arch in found)


def test_first_trials_from_a_supernet() -> None:
    space = declared()
    supernet = Supernet(space)
    start = reference(space, {"width": 12})
    found = first_trials(
        space, supernet.extract, start, batch(), functools.partial(parameters, space), methods=["sqnr"], n=3
    )
    assert found[0]["rank"] == 1 and found[-1]["rank"] is None
    assert all(arch["width"] == 12 for arch in found)


# ---- proxies ------------------------------------------------------------------------------------------------------


def test_sqnr_is_the_mean_ratio_of_the_layers() -> None:
    net = transformed(model(), [Quantize("(0|2)", weight_bits=4)])
    expected = []
    for i in (0, 2):
        w, q = net[i].weight.detach().double(), net[i].effective_weight().detach().double()
        expected.append(10 * math.log10(float(w.square().sum() / (w - q).square().sum())))
    assert sqnr(net, batch()) == pytest.approx((sum(expected) + 150.0) / 3)
    assert sqnr(model(), batch()) == 150.0
    big = nn.Sequential(nn.Linear(300, 300))
    big[0].weight.data = torch.rand(300, 300, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ratios = []
    for bits in (4, 5, 6, 7):
        layer = transformed(nn.Sequential(nn.Linear(300, 300)), [Quantize("0", weight_bits=bits, method="minmax")])
        layer[0].weight.data = big[0].weight.data
        ratios.append(sqnr(layer, batch()))
    for a, b in itertools.pairwise(ratios):  # 20 log10(2) = 6.02 dB a bit
        assert b - a == pytest.approx(6.02, abs=0.8)


def test_output_sqnr_is_the_ratio_of_the_outputs() -> None:
    data, start = batch(), model()
    net = transformed(model(), [Quantize("*", weight_bits=4)])
    y, q = start(*data.inputs).detach().double(), net.eval()(*data.inputs).detach().double()
    expected = 10 * math.log10(float(y.square().sum() / (y - q).square().sum()))
    assert output_sqnr(net, data) == pytest.approx(expected, rel=1e-6)
    assert output_sqnr(start, data) == 150.0
    assert output_sqnr(transformed(model(), [Lora("*", rank=2)]), data) == 150.0  # adapters start at 0
