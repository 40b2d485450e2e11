"""Factors against the singular value decomposition, supernets against their slices."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GCNConv, SAGEConv

from nasgraph.build import build
from nasgraph.errors import SpaceError
from nasgraph.space import Architecture, Choice, Op, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.transforms import Lora, Quantize
from nasgraph.transforms.base import transformed
from nasgraph.transforms.layers import extended
from nasgraph.transforms.low_rank import Factorised, LowRank, decomposed, factorised, full_rank, rank_of, record_inputs
from tests.transforms.toys import Adapt, Scale

EDGES = torch.tensor([[0, 1, 2, 3, 1], [1, 2, 3, 0, 3]])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(layer: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return layer


LAYERS = [
    (lambda: nn.Linear(6, 9), (5, 6)),
    (lambda: nn.Linear(9, 6, bias=False), (2, 5, 9)),
    (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 8)),
    (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="circular"), (2, 3, 8, 8)),
    (lambda: nn.Conv2d(4, 8, 3, dilation=2, groups=2, bias=False), (2, 4, 8, 8)),
    (lambda: nn.Conv3d(2, 4, 2, padding="same"), (1, 2, 4, 4, 4)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_at_full_rank_the_factors_are_the_layer(make, shape) -> None:
    layer = filled(make())
    x = drawn(*shape, seed=1)
    before, weight = layer(x), layer.weight.clone()
    found = transformed(layer, [LowRank(rank=1000)])
    assert isinstance(found, Factorised) and found.rank == full_rank(layer)
    torch.testing.assert_close(found(x), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.weight, weight, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.weight, weight)  # the layer itself is not changed
    again = copy.deepcopy(found)
    again.load_state_dict(found.state_dict())
    assert torch.equal(again(x), found(x))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_the_error_is_that_of_eckart_and_young(make, shape) -> None:
    layer = filled(make())
    groups = getattr(layer, "groups", 1)
    matrices = layer.weight.detach().reshape(groups, layer.weight.shape[0] // groups, -1)
    singular = torch.linalg.svdvals(matrices)
    for rank in range(1, full_rank(layer)):
        error = (factorised(layer, rank).weight - layer.weight).square().sum()
        torch.testing.assert_close(error, singular[:, rank:].square().sum(), rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_factors_of_a_smaller_rank_lead_those_of_a_larger(n: int, m: int, seed: int) -> None:
    layer = filled(nn.Linear(n, m), seed)
    whole = factorised(layer, min(n, m))
    for rank in range(1, min(n, m) + 1):
        found = factorised(layer, rank)
        assert torch.equal(found.first.weight, whole.first.weight[:rank])
        assert torch.equal(found.second.weight, whole.second.weight[:, :rank])
        gram = found.first.weight @ found.first.weight.T  # sqrt(S) on either side
        torch.testing.assert_close(gram, found.second.weight.T @ found.second.weight, rtol=1e-3, atol=1e-4)


def test_ranks_are_numbers_or_shares_of_full_rank() -> None:
    assert [rank_of(rank, 20) for rank in (1, 20, 21, 0.5, 0.01, 0.99)] == [1, 20, 20, 10, 1, 20]
    assert full_rank(nn.Conv2d(4, 8, 3, groups=2)) == 4 and full_rank(nn.Linear(3, 5)) == 3
    for rank in (0, -1, 1.0, 0.0, 1.5, True, "4", float("nan")):
        with pytest.raises(SpaceError, match="LowRank: rank is .*give None, a whole number"):
            LowRank(rank=Choice("rank", [None, 4, rank]) if rank is not True else rank)
    with pytest.raises(SpaceError, match="method is 'qr': give 'svd' or 'activation'"):
        LowRank(rank=2, method="qr")
    with pytest.raises(SpaceError, match="LowRank cannot rewrite Embedding"):
        transformed(nn.Embedding(4, 4), [LowRank(rank=2)])
    with pytest.raises(SpaceError, match="factors come before"):
        LowRank(rank=2).apply(extended(nn.Linear(3, 3)))


def test_without_a_rank_nothing_changes() -> None:
    layer = nn.Linear(4, 4)
    assert transformed(layer, [LowRank()]) is layer and type(layer) is nn.Linear
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_frozen_and_half_precision_weights_give_such_factors() -> None:
    layer = nn.Linear(6, 6).to(torch.bfloat16)
    layer.weight.requires_grad_(False)
    found = factorised(layer, 2)
    assert found.first.weight.dtype is torch.bfloat16 and not found.second.weight.requires_grad
    assert torch.equal(found.second.bias, layer.bias)
    assert found.second.bias.data_ptr() != layer.bias.data_ptr()  # training one leaves the other


def test_a_decomposition_is_computed_once() -> None:
    weight = drawn(7, 5)
    one, other = decomposed(weight), decomposed(weight.clone())
    assert all(a is b for a, b in zip(one, other, strict=True))
    for a, b in zip(decomposed(weight.double()), torch.linalg.svd(weight.double(), full_matrices=False), strict=True):
        assert torch.equal(a, b)


def test_later_transforms_rewrite_the_factors() -> None:
    layer = filled(nn.Linear(6, 9))
    x = drawn(5, 6)
    plain = factorised(layer, 3)
    found = transformed(layer, [Adapt("first", rank=1), LowRank(rank=3), Scale(power=2)])
    first, second = plain.first.weight, plain.second.weight
    torch.testing.assert_close(found.weight, 4 * second @ first)
    adapter = found.first.beside["adapt"]
    expected = (x @ (2 * first).T + adapter(x)) @ (2 * second).T + layer.bias
    torch.testing.assert_close(found(x), expected)


# ---- activation-weighted ------------------------------------------------------------------------------------------


def test_input_statistics_are_mean_squares() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 5), nn.Linear(5, 2))
    batches = [(drawn(2, 3, 4, 4, seed=i),) for i in range(3)]
    names = list(model.state_dict())
    found = record_inputs(model, batches, "(0|3)")
    x = torch.cat([batch[0] for batch in batches])
    torch.testing.assert_close(found["0"], x.square().mean((0, 2, 3)))
    torch.testing.assert_close(found["3"], model[0](x).flatten(1).square().mean(0).detach())
    assert set(found) == {"0", "3"} and list(model.state_dict()) == names and model.training
    assert torch.equal(copy.deepcopy(model)[3].input_mean_square, found["3"])
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 6), lambda: nn.Conv2d(8, 6, 3, groups=2)])
def test_activation_weighted_factors_have_the_smallest_weighted_error(make) -> None:
    """min ||(W - LR) D|| is the rest of the singular values of W D; the plain factors are worse."""
    layer = filled(make())
    mean_square = drawn(8, seed=3).exp()
    layer.register_buffer("input_mean_square", mean_square, persistent=False)
    groups = getattr(layer, "groups", 1)
    d = mean_square.sqrt().reshape(groups, -1, 1).expand(-1, -1, layer.weight[0, 0].numel()).reshape(groups, 1, -1)

    def cut(weight: Tensor) -> Tensor:
        return weight.detach().reshape(groups, weight.shape[0] // groups, -1) * d

    singular = torch.linalg.svdvals(cut(layer.weight))
    for rank in (1, 2):
        weighted = transformed(layer, [LowRank(rank=rank, method="activation")])
        plain = transformed(layer, [LowRank(rank=rank)])
        error, other = ((cut(layer.weight) - cut(found.weight)).square().sum() for found in (weighted, plain))
        torch.testing.assert_close(error, singular[:, rank:].square().sum(), rtol=1e-4, atol=1e-4)
        assert error < other


def test_inputs_that_are_never_there_do_not_matter() -> None:
    layer = filled(nn.Linear(4, 4))
    record_inputs(layer, [(drawn(64, 4) * torch.tensor([1.0, 0.0, 1.0, 0.0]),)])
    found = transformed(layer, [LowRank(rank=2, method="activation")])
    x = drawn(8, 4, seed=5) * torch.tensor([1.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(found(x), layer(x), rtol=1e-4, atol=1e-4)


def test_activation_weights_need_statistics() -> None:
    with pytest.raises(SpaceError, match=r"call record_inputs\(model, batches\)"):
        transformed(nn.Linear(4, 4), [LowRank(rank=2, method="activation")])


# ---- in a space ---------------------------------------------------------------------------------------------------


def graph_space(ranks: list[object]) -> SearchSpace:
    space = SearchSpace("toy")
    x = space.input("x", torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), {0: "nodes"})
    edges = space.input("edge_index", EDGES, {1: "edges"})
    width = Choice("width", [4, 8], ordered=True)
    conv = {"gcn": Op(GCNConv, out_channels=width), "gat": Op(GATConv, out_channels=width, heads=2)}
    conv["sage"] = Op(SAGEConv, out_channels=width)
    rank = Choice("rank", ranks)
    more = [LowRank(rank=rank), Scale(power=Choice("power", [0, 2])), Adapt(rank=Choice("adapter", [0, 2]))]
    h = space.add("conv1", Choice("conv", conv), x, edges, transforms=more)
    space.output(space.add("head", Op(nn.Linear, out_features=3), h))
    return space


def test_subnets_over_ranks_equal_their_extraction_bit_for_bit() -> None:
    space = graph_space([None, 1, 2, 3, 0.9])
    supernet = Supernet(space)
    names = {name for node, option, name in supernet.store if (node, option) == ("conv1", "gat")}
    assert {"lin.weight", "lin.first.weight", "lin.second.weight"} <= names
    assert tuple(supernet.store["conv1", "gat", "lin.first.weight"].shape) == (5, 6)
    assert tuple(supernet.store["conv1", "gat", "lin.second.weight"].shape) == (2, 8, 5)  # by head
    inputs = (drawn(7, 6), EDGES)
    for architecture in random.Random(0).sample(list(space.enumerate()), 30):
        subnet, alone = supernet.subnet(architecture), supernet.extract(architecture)
        assert torch.equal(subnet(*inputs), alone(*inputs))
        assert list(alone.state_dict()) == list(build(space, architecture).state_dict())


def test_the_stored_factors_start_as_the_truncated_weight() -> None:
    space = SearchSpace("toy")
    x = space.input("x", torch.zeros(2, 3, 8, 8))
    transforms = [LowRank(rank=Choice("rank", [None, 1, 2, 4]))]
    space.output(space.add("conv", Op(nn.Conv2d, out_channels=6, kernel_size=3), x, transforms=transforms))
    supernet = Supernet(space)
    weight = supernet.store["conv", "Conv2d", "weight"].detach()
    u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    for rank in (1, 2, 4):
        alone = supernet.extract({"rank": rank}).conv
        assert isinstance(alone, Factorised) and alone.rank == rank
        truncated = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
        torch.testing.assert_close(alone.weight.detach().flatten(1), truncated, rtol=1e-4, atol=1e-5)
    assert torch.equal(supernet.extract({"rank": None}).conv.weight, weight)


def test_full_rank_of_a_space_is_the_plain_network() -> None:
    space = graph_space([None, 2])
    chosen = Architecture({"width": 4, "conv": "gcn", "rank": None, "power": 0, "adapter": 0})
    assert list(build(space, chosen).state_dict()) == ["conv1.bias", "conv1.lin.weight", "head.weight", "head.bias"]
    assert supernet_keys(space) >= {"lin.weight", "lin.first.weight"}


def supernet_keys(space: SearchSpace) -> set[str]:
    return {name for _, _, name in Supernet(space).store}


def test_a_factorised_layer_can_be_exported_as_a_program() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model = transformed(model, [LowRank("0", rank=2)])
    x = drawn(2, 3, 6, 6)
    program = torch.export.export(model, (x,))
    assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("beside", [Lora("(0|2)", rank=Choice("adapter.{name}", [0, 2, 3])), None])
def test_factors_of_a_model_share_weights_and_leave_it_alone(beside: Lora | None) -> None:
    """With adapters the model is frozen, and so are factors of it; without, they learn."""
    model = nn.Sequential(
        filled(nn.Linear(6, 8)), nn.ReLU(), filled(nn.Linear(8, 8)), nn.ReLU(), filled(nn.Linear(8, 3))
    )
    before, x = copy.deepcopy(model), drawn(5, 6)
    rules = [LowRank("(0|2)", rank=Choice("rank.{name}", [None, 2, 4])), beside]
    rules[1] = beside or Quantize("(0|2)", weight_bits=Choice("bits.{name}", [None, 4]))
    space = SearchSpace.from_module(model, rules, inputs=x)
    supernet = Supernet(space)
    trains = {name: parameter.requires_grad for (_, _, name), parameter in supernet.store.items()}
    assert {trains[name] for name in trains if "first.weight" in name or "bias" in name} == {beside is None}
    optimizer = torch.optim.SGD([p for p in supernet.parameters() if p.requires_grad], lr=1e-4)
    for architecture in random.Random(0).sample(list(space.enumerate()), 20):
        out = supernet.subnet(architecture)(x)
        assert torch.equal(out, supernet.extract(architecture)(x))
        if out.requires_grad:
            optimizer.zero_grad()
            out.square().mean().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert torch.equal(build(space, space.baseline())(x), before(x))


def test_activation_weighted_factors_of_a_model() -> None:
    model = nn.Sequential(filled(nn.Linear(6, 8)), nn.ReLU(), filled(nn.Linear(8, 3)))
    x = drawn(50, 6) * torch.tensor([3.0, 1.0, 0.1, 0.1, 1.0, 0.1])
    record_inputs(model, [(x,)])
    rank, method = Choice("rank", [None, 2]), Choice("method", ["svd", "activation"])
    space = SearchSpace.from_module(model, [LowRank("0", rank=rank, method=method)], inputs=x)
    errors = {}
    for label in ("svd", "activation"):
        found = build(space, {"rank": 2, "method": label})
        errors[label] = float((found(x) - model(x)).square().mean().detach())
        assert list(found.state_dict()) == list(build(space, {"rank": 2, "method": "svd"}).state_dict())
    assert errors["activation"] < errors["svd"]
