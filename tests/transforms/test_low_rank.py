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
from torch_geometric.nn import Linear as PygLinear

from nasgraph.build import build
from nasgraph.errors import SpaceError
from nasgraph.space import Architecture, Choice, Op, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.transforms import Lora, Prune, Quantize
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


def test_a_decomposition_is_computed_once_for_each_larger_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda matrix, **how: calls.append(matrix) or svd(matrix, **how))
    weight = drawn(7, 5, seed=11)
    parts = {rank: decomposed(weight.clone(), rank) for rank in (3, 2, 5, 4)}
    assert len(calls) == 2  # for 3 and for 5
    for rank, (u, s, v) in parts.items():
        whole_u, whole_s, whole_v = svd(weight, full_matrices=False)
        assert torch.equal(u, whole_u[:, :rank]) and torch.equal(s, whole_s[:rank]) and torch.equal(v, whole_v[:rank])
    assert decomposed(weight.double(), 5)[0].dtype is torch.float64 and len(calls) == 3


def test_a_supernet_decomposes_each_weight_once_and_its_views_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(filled(nn.Linear(9, 8), 21), nn.ReLU(), filled(nn.Linear(8, 7), 22))
    x = drawn(4, 9)
    space = SearchSpace.from_module(model, [LowRank("*", rank=Choice("rank.{name}", [None, 2, 4, 0.9]))], inputs=x)
    calls: list[Tensor] = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda matrix, **how: calls.append(matrix) or svd(matrix, **how))
    supernet = Supernet(space)
    assert 2 <= len(calls) <= 6
    calls.clear()
    for architecture in space.enumerate():
        assert torch.equal(supernet.subnet(architecture).eval()(x), supernet.extract(architecture).eval()(x))
        assert torch.equal(supernet.extract(architecture)(x), build(space, architecture)(x))  # nothing is trained yet
    assert not calls


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


def test_activation_weights_need_statistics_when_they_are_declared() -> None:
    with pytest.raises(SpaceError, match=r"call record_inputs\(model, batches\)"):
        transformed(nn.Linear(4, 4), [LowRank(rank=2, method="activation")])
    model = nn.Sequential(filled(nn.Linear(4, 4)), nn.Sequential(filled(nn.Linear(4, 4)), PygLinear(4, 3)))
    record_inputs(model, [(drawn(8, 4),)], "1.*")
    method = Choice("method", ["svd", "activation"])
    for where in ("*", "0"):
        with pytest.raises(SpaceError, match=r"weighs the inputs of '0', and nobody has seen them: call record_inputs"):
            SearchSpace.from_module(model, [LowRank(where, rank=Choice("rank", [None, 2]), method=method)])
    SearchSpace.from_module(model, [LowRank("*", method=method)])  # no rank, nothing to weigh
    space = SearchSpace.from_module(model, [LowRank("1", rank=Choice("rank", [None, 2]), method="activation")])
    assert isinstance(space.model({"rank": 2})[1][1], Factorised)  # PyG's layer keeps what was seen
    declared = SearchSpace("declared")
    x = declared.input("x", torch.zeros(2, 4))
    with pytest.raises(SpaceError, match="node 'a': LowRank: method 'activation' .* take method 'svd'"):
        declared.add("a", Op(nn.Linear, out_features=4), x, transforms=[LowRank(rank=2, method=method)])


# ---- of layers that channels are removed from -----------------------------------------------------------------------


class Narrowing(nn.Module):
    """A sum ties two convolutions; a depthwise one follows."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = filled(nn.Conv2d(3, 8, 3, padding=1), 1), filled(nn.Conv2d(3, 8, 1), 2)
        self.norm, self.deep = nn.BatchNorm2d(8), filled(nn.Conv2d(8, 8, 3, padding=1, groups=8), 3)
        self.hidden, self.head = filled(nn.Linear(8, 12), 4), filled(nn.Linear(12, 5), 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(torch.relu(self.norm(self.one(x) + self.two(x)))).mean((2, 3))
        out: Tensor = self.head(torch.relu(self.hidden(x)))
        return out


@pytest.mark.parametrize("method", ["svd", "activation"])
def test_factors_of_a_layer_that_loses_channels(method: str) -> None:
    """Channels go first, then what is left is decomposed; in a supernet both factors are cut to the same channels."""
    model, x = Narrowing().eval(), drawn(4, 3, 6, 6)
    record_inputs(model, [(x,)])
    rules = [
        LowRank("*", rank=Choice("rank.{name}", [None, 2, 1000]), method=method),
        Prune("(one|hidden)", structure="channels", keep=Choice("keep.{name}", [0.5, 1.0])),
        Quantize("(two|head)", weight_bits=Choice("bits", [4, 32])),
    ]
    space = SearchSpace.from_module(model, rules, inputs=x)
    least = {name: choice.labels[0] for name, choice in space.choices.items()} | {"bits": 32}
    thin = build(space, least).eval()
    whole = build(space, least | {name: 1000 for name in least if name.startswith("rank")}).eval()
    torch.testing.assert_close(whole(x), thin(x), rtol=1e-3, atol=1e-3)  # at full rank it is the pruned model
    assert whole.model.hidden.second.out_features == 6 and whole.model.head.first.in_features == 6

    supernet = Supernet(space)
    pruned = least | {"rank.one": 2, "rank.deep": 2, "rank.hidden": 2, "rank.head": 2}
    rng = random.Random(0)
    for architecture in [pruned, *(space.sample(rng) for _ in range(15))]:
        alone = supernet.extract(architecture).eval()
        assert torch.equal(alone(x), supernet.subnet(architecture).eval()(x))
        assert list(alone.state_dict()) == list(build(space, architecture).state_dict())
    found, full = supernet.extract(pruned).model, supernet.extract(pruned | {"keep.one": 1.0, "keep.hidden": 1.0}).model
    rows = build(space, least).model.hidden.kept_entries["weight"][0]
    assert torch.equal(found.hidden.second.weight, full.hidden.second.weight[rows])
    assert torch.equal(found.hidden.second.bias, full.hidden.second.bias[rows])
    assert torch.equal(found.head.first.weight, full.head.first.weight[:, rows])
    channels = build(space, least).model.deep.kept_entries["weight"][0]
    assert torch.equal(found.deep.first.weight, full.deep.first.weight[channels])


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
