"""Built networks against modules written by hand with the same weights."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, fx, nn
from torch_geometric.nn import MLP, GATConv, GCNConv, GINConv, SAGEConv

from nasgraph.build import Made, build, node_seed
from nasgraph.errors import SpaceError
from nasgraph.ops import Zero, add, concat, maximum
from nasgraph.space import Call, Choice, Op, SearchSpace

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 5]])


def tabular() -> SearchSpace:
    space = SearchSpace("tabular")
    x = space.input("x", X, dynamic={0: "rows"})
    width = Choice("width", [4, 8])
    first = space.add("first", Op(nn.Linear, out_features=width), x)
    norm = space.add("norm", Choice("norm", [Op(nn.BatchNorm1d), Op(nn.LayerNorm), Op(nn.Identity), Op(Zero)]), first)
    second = space.add("second", Op(nn.Linear, out_features=width), norm)
    joined = space.add("joined", Choice("join", [Call(add), Call(concat), Call(maximum)]), second, first)
    space.output(space.add("head", Op(nn.Linear, out_features=3), joined))
    return space


def graph_space(op: Op | Choice, *more: Op) -> SearchSpace:
    space = SearchSpace("graph")
    x = space.input("x", X, dynamic={0: "nodes"})
    edges = space.input("edge_index", EDGES, dynamic={1: "edges"})
    h = space.add("conv", op, x, edges)
    for i, layer in enumerate(more):
        h = space.add(f"more{i}", layer, h, edges)
    space.output(h)
    return space


# ---- the module -------------------------------------------------------------------------------------------------


def test_the_code_can_be_read():
    model = build(tabular(), {"width": 4, "norm": "LayerNorm", "join": "concat"})
    assert isinstance(model, fx.GraphModule) and type(model).__name__ == "Network"
    assert [line.split(";")[0].strip() for line in model.code.strip().splitlines()] == [
        "def forward(self, x):",
        "first = self.first(x)",
        "norm = self.norm(first)",
        "second = self.second(norm)",
        "joined = torch.cat((second, first), dim = -1)",
        "head = self.head(joined)",
        "return head",
    ]
    assert [name for name, _ in model.named_children()] == ["first", "norm", "second", "head"]


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(5, 8), nn.BatchNorm1d(8)
        self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return self.head(self.second(self.norm(first)) + first)


@pytest.mark.parametrize("train", [True, False])
def test_it_is_the_network_written_by_hand(train):
    model = build(tabular(), {"width": 8, "norm": "BatchNorm1d", "join": "add"}).train(train)
    hand = ByHand().train(train)
    hand.load_state_dict(model.state_dict())
    assert torch.equal(model(X), hand(X))
    model(X).square().sum().backward()
    hand(X).square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), hand.parameters(), strict=True))


def test_what_cannot_matter_is_not_built():
    model = build(tabular(), {"width": 8, "norm": "Identity", "join": "add"})
    assert [name for name, _ in model.named_children()] == ["first", "second", "head"]


def test_inputs_that_are_not_read_are_still_taken():
    space = SearchSpace("unread")
    space.input("unread", X)
    space.output(space.add("head", Op(nn.Linear, out_features=2), space.input("x", X)))
    model = build(space, {})
    assert torch.equal(model(torch.full_like(X, 9.0), X), model.head(X))


def test_a_network_may_be_its_input():
    space = SearchSpace("identity")
    space.output(space.add("i", Op(nn.Identity), space.input("x", X)))
    assert torch.equal(build(space, {})(X), X)


def test_copies_are_equal_and_independent():
    model = build(tabular(), {"width": 4, "norm": "Identity", "join": "add"})
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X)) and twin.meta["calls"].keys() == model.meta["calls"].keys()
    with torch.no_grad():
        twin.first.weight.zero_()
    assert not torch.equal(twin(X), model(X))


def test_calls_make_the_submodules_anew():
    model = build(tabular(), {"width": 8, "norm": "BatchNorm1d", "join": "concat"})
    calls = model.meta["calls"]
    assert calls["first"] == Made(nn.Linear, {"out_features": 8, "in_features": 5})
    assert calls["norm"].kwargs == {"num_features": 8}
    assert calls["head"].kwargs == {"out_features": 3, "in_features": 16}
    for name, made in calls.items():
        module = made()
        module.load_state_dict(model.get_submodule(name).state_dict())
        assert str(module) == str(model.get_submodule(name))


# ---- where parameters start -------------------------------------------------------------------------------------


def test_a_node_starts_the_same_in_every_candidate():
    space = tabular()
    models = [build(space, arch, seed=3) for arch in space.enumerate() if arch["width"] == 8]
    assert len(models) == 12
    assert all(torch.equal(model.first.weight, models[0].first.weight) for model in models)
    with torch.random.fork_rng():
        torch.manual_seed(node_seed(3, "first"))
        assert torch.equal(nn.Linear(5, 8).weight, models[0].first.weight)


def test_the_start_depends_on_seed_and_name():
    arch = {"width": 8, "norm": "Identity", "join": "add"}
    space = tabular()
    model, again, other = build(space, arch), build(space, arch), build(space, arch, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.first.weight, other.first.weight)
    space = SearchSpace("twins")
    x = space.input("x", X)
    twins = [space.add(name, Op(nn.Linear, out_features=4), x) for name in ("a", "b")]
    space.output(space.add("sum", Call(add), *twins))
    model = build(space, {})
    assert not torch.equal(model.a.weight, model.b.weight)


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    random.seed(5)
    before = random.getstate()
    build(tabular(), {"width": 8, "norm": "BatchNorm1d", "join": "add"})
    assert torch.equal(torch.rand(3), expected)
    assert random.getstate() == before


def test_building_leaves_no_trace_in_running_statistics():
    model = build(tabular(), {"width": 8, "norm": "BatchNorm1d", "join": "add"})
    assert model.norm.num_batches_tracked == 0 and not model.norm.running_mean.any() and model.training


# ---- sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, kwargs, width", [
    (GCNConv, {"out_channels": 7}, 7),
    (SAGEConv, {"out_channels": 7}, 7),
    (GATConv, {"out_channels": 7, "heads": 3}, 21),
    (GATConv, {"out_channels": 7, "heads": 3, "concat": False}, 7),
])  # fmt: skip
def test_layers_on_graphs(make, kwargs, width):
    model = build(graph_space(Op(make, **kwargs), Op(GCNConv, out_channels=2)), {})
    assert model.more0.in_channels == width
    hand = make(5, **kwargs)
    hand.load_state_dict(model.conv.state_dict())
    last = GCNConv(width, 2)
    last.load_state_dict(model.more0.state_dict())
    assert torch.equal(model(X, EDGES), last(hand(X, EDGES), EDGES))


def test_a_network_runs_on_graphs_of_other_sizes():
    model = build(graph_space(Op(GATConv, out_channels=4, heads=2)), {})
    assert model(torch.randn(50, 5), torch.randint(0, 50, (2, 200))).shape == (50, 8)


def test_takes_is_known_from_forward_or_given():
    """A fully connected layer among convolutions reads the nodes only; ReLU too."""
    choice = Choice("op", [Op(GCNConv, out_channels=4), Op(nn.Linear, label="fc", out_features=4), Op(nn.ReLU)])
    space = graph_space(choice)
    assert torch.equal(build(space, {"op": "ReLU"})(X, EDGES), X.relu())
    model = build(space, {"op": "fc"})
    assert torch.equal(model(X, EDGES), model.conv(X))
    model = build(graph_space(Op(many, takes=1)), {})
    assert torch.equal(model(X, EDGES), X)


class Count(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        return tensors[0] * len(tensors)


def many() -> nn.Module:
    return Count()


def test_images_have_their_channels_on_axis_one():
    space = SearchSpace("images")
    h = space.input("image", torch.zeros(2, 3, 8, 10))
    h = space.add("conv", Op(nn.Conv2d, out_channels=6, kernel_size=3), h)
    h = space.add("norm", Op(nn.BatchNorm2d), h)
    h = space.add("pool", Op(nn.AdaptiveAvgPool2d, output_size=2), h)
    h = space.add("flat", Op(nn.Flatten), h)
    space.output(space.add("head", Op(nn.Linear, out_features=4), h))
    model = build(space, {})
    hand = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4))
    hand.load_state_dict(dict(zip(hand.state_dict(), model.state_dict().values(), strict=True)))
    image = torch.randn(2, 3, 8, 10)
    assert torch.equal(model(image), hand(image))


class Scaled(nn.Module):
    """A user's own operation: nothing of it is known to nasgraph."""

    def __init__(self, in_channels: int, power: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(in_channels))
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x**self.power


def test_a_module_of_ones_own():
    model = build(graph_space(Op(Scaled, power=2)), {})
    assert torch.equal(model(X, EDGES), model.conv.scale * X**2)


def test_operations_inside_arguments():
    inner = Op(MLP, channel_list=None, hidden_channels=8, out_channels=Choice("out", [3, 4]), num_layers=2, norm=None)
    space = graph_space(Op(GINConv, nn=inner, train_eps=True))
    model = build(space, {"out": 4})
    assert isinstance(model.conv.nn, MLP) and model.conv.nn.channel_list == [5, 8, 4]
    assert model.meta["calls"]["conv"].kwargs["nn"].kwargs["in_channels"] == 5
    hand = GINConv(MLP([5, 8, 4], norm=None), train_eps=True)
    hand.load_state_dict(model.conv.state_dict())
    assert torch.equal(model(X, EDGES), hand(X, EDGES))


# ---- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", [add, maximum])
@pytest.mark.parametrize("width", [9, 1])
def test_tensors_of_two_widths_cannot_be_joined(joint, width):
    """A width of 1 would be broadcast by torch; here it is a mistake too."""
    space = SearchSpace("widths")
    x = space.input("x", X)
    first = space.add("first", Op(nn.Linear, out_features=8), x)
    second = space.add("second", Op(nn.Linear, out_features=width), x)
    space.output(space.add("joined", Call(joint), first, second))
    with pytest.raises(SpaceError, match=rf"node 'joined' .* cannot read first \(6, 8\), second \(6, {width}\)"):
        build(space, {})


def broken(in_channels: int) -> nn.Module:
    return {}[in_channels]


def pair(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x


def not_a_module(in_channels: int) -> int:
    return in_channels


def branching(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize("op, message", [
    (Op(nn.Linear, out_features=4, wrong=1), r"node 'n': Linear\(out_features=4, wrong=1, in_features=5\) failed"),
    (Op(nn.Linear), "node 'n': Linear.* failed"),
    (Op(broken), r"node 'n': broken\(in_channels=5\) failed"),
    (Op(not_a_module), "node 'n': .* not an nn.Module: use Call"),
    (Op(nn.Conv2d, out_channels=4, kernel_size=3), "node 'n' .* cannot read x"),
    (Op(Pair), "node 'n' .* returns a tuple, not one tensor"),
    (Call(pair), "node 'n' .* returns a tuple, not one tensor"),
    (Call(branching), "node 'n' .* cannot be traced"),
])  # fmt: skip
def test_mistakes_name_the_node(op, message):
    space = SearchSpace("mistakes")
    space.output(space.add("n", op, space.input("x", X)))
    with pytest.raises(SpaceError, match=message):
        build(space, {})


@pytest.mark.parametrize("name", ["forward", "graph", "code", "train", "training", "meta"])
def test_names_that_every_model_has_are_refused(name):
    space = SearchSpace("names")
    space.output(space.add(name, Op(nn.Linear, out_features=2), space.input("x", X)))
    with pytest.raises(SpaceError, match=f"node '{name}'"):
        build(space, {})


class Stack(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


def test_operations_inside_lists_are_made():
    space = SearchSpace("nested")
    x = space.input("x", torch.randn(2, 5))
    space.output(space.add("stack", Op(Stack, layers=[Op(nn.Linear, out_features=5), Op(nn.ReLU)]), x))
    model = build(space, space.architecture({}))
    assert [type(layer) for layer in model.stack.layers] == [nn.Linear, nn.ReLU]


def whole(x):
    return (x > 0).long()


def test_shapes_are_known_by_type_too():
    """An operation that was run on floats may give another type on whole numbers."""
    space = SearchSpace("types")
    x = space.input("x", torch.randn(2, 5))
    plain, number = space.add("plain", Op(nn.Identity), x), space.add("whole", Call(whole), x)
    again = space.add("again", Op(nn.Flatten), Choice("read", {"plain": plain, "whole": number}))
    embed = Op(nn.Embedding, num_embeddings=2, embedding_dim=3)
    space.output(space.add("end", Choice("end", {"linear": Op(nn.Linear, out_features=3), "embed": embed}), again))
    for architecture in ({"read": "plain", "end": "linear"}, {"read": "whole", "end": "embed"}):
        build(space, space.architecture(architecture))
