from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn
from torch_geometric.nn import GATConv, GCNConv, MessagePassing

from nasgraph.build import build
from nasgraph.errors import SpaceError
from nasgraph.space import Architecture, Choice, Op, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.transforms.base import Transform, compiled, matches, matching, transformed
from nasgraph.transforms.layers import KINDS, Transformed, extended, plain
from tests.transforms.toys import Adapt, Scale

EDGES = torch.tensor([[0, 1, 2, 3, 1], [1, 2, 3, 0, 3]])


def graph_space(transforms: bool = True) -> SearchSpace:
    """A layer that is GCN or GAT of two widths, with a scale and an adapter of its own."""
    space = SearchSpace("toy")
    x = space.input("x", torch.randn(4, 6), {0: "nodes"})
    edges = space.input("edge_index", EDGES, {1: "edges"})
    width = Choice("width", [4, 8], ordered=True)
    conv = Choice("conv", {"gcn": Op(GCNConv, out_channels=width), "gat": Op(GATConv, out_channels=width, heads=2)})
    power, rank = Choice("power", [0, 1, 2]), Choice("rank", [0, 1, 3])
    more = [Scale(power=power), Adapt(rank=rank)] if transforms else []
    h = space.add("conv1", conv, x, edges, transforms=more)
    space.output(space.add("head", Op(nn.Linear, out_features=3), h))
    return space


def each(space: SearchSpace) -> list[Architecture]:
    return list(space.enumerate())


def test_choices_of_transforms_are_choices_of_the_space() -> None:
    space = graph_space()
    assert set(space.choices) == {"width", "conv", "power", "rank"}
    assert space.size() == 2 * 2 * 3 * 3 == len(each(space))
    assert len({space.key(architecture) for architecture in each(space)}) == 36
    assert "gcn" in space.graph().nodes["conv1"]["op"]


def test_neutral_settings_are_the_plain_network_bit_for_bit() -> None:
    space, bare = graph_space(), graph_space(transforms=False)
    inputs = (torch.randn(4, 6), EDGES)
    for conv in ("gcn", "gat"):
        chosen = Architecture({"width": 8, "conv": conv, "power": 0, "rank": 0})
        without = Architecture({"width": 8, "conv": conv})
        assert space.key(chosen) == bare.key(without)
        model, plain_model = build(space, chosen), build(bare, without)
        assert list(model.state_dict()) == list(plain_model.state_dict())
        assert torch.equal(model(*inputs), plain_model(*inputs))


def test_the_operation_starts_as_without_transforms() -> None:
    model = build(graph_space(), {"width": 8, "conv": "gcn", "power": 2, "rank": 3})
    bare = build(graph_space(transforms=False), {"width": 8, "conv": "gcn"})
    assert torch.equal(model.conv1.lin.weight, bare.conv1.lin.weight)
    layer = model.conv1.lin
    x = torch.randn(5, 6)
    expected = x @ (2 * layer.weight).T + x @ layer.beside["adapt"].a.T @ layer.beside["adapt"].b.T
    torch.testing.assert_close(layer(x), expected)


def test_a_subnet_equals_its_extraction_and_a_slice_has_the_gradient_of_the_network_alone() -> None:
    space, rng = graph_space(), random.Random(0)
    supernet = Supernet(space)
    names = {name for node, option, name in supernet.store if (node, option) == ("conv1", "gcn")}
    parts = {"lin.on_weight.scale.gain_1", "lin.on_weight.scale.gain_2", "lin.beside.adapt.a", "lin.beside.adapt.b"}
    assert names == {"lin.weight", "bias"} | parts
    assert tuple(supernet.store["conv1", "gat", "lin.beside.adapt.b"].shape) == (16, 3)
    inputs = (torch.randn(4, 6), EDGES)
    for architecture in rng.sample(each(space), 12):
        subnet, alone = supernet.subnet(architecture), supernet.extract(architecture)
        assert torch.equal(subnet(*inputs), alone(*inputs))
        for parameter in supernet.parameters():
            parameter.grad = None
        subnet(*inputs).square().sum().backward()
        alone(*inputs).square().sum().backward()
        for piece in supernet._structure(architecture).pieces:
            grad, own = supernet.store[piece.key].grad, alone.get_parameter(piece.name).grad
            assert grad is not None and own is not None
            torch.testing.assert_close(grad.sum(), own.sum(), rtol=1e-4, atol=1e-5)
            assert int((grad != 0).sum()) <= own.numel()


def test_the_template_in_a_choices_name_stands_for_the_node() -> None:
    space = SearchSpace("toy")
    h = space.input("x", torch.randn(2, 3))
    rule, conv = Scale(power=Choice("power.{name}", [0, 1])), Op(nn.Linear, out_features=3)
    for name in ("first", "second"):
        options = Choice(f"op.{name}", {"a": conv, "b": Op(nn.Linear, out_features=3, bias=False)})
        h = space.add(name, options, h, transforms=[rule])
    space.output(h)
    assert set(space.choices) == {"op.first", "op.second", "power.first", "power.second"}
    for wrong in (Scale, Scale(power=1), [Scale]):
        with pytest.raises(SpaceError, match="transforms are a list such as"):
            space.add("third", conv, h, transforms=wrong)  # type: ignore[arg-type]


def test_patterns() -> None:
    assert matches("*", "a.b") and matches("*", "")
    assert matches("a", "a.b.c") and not matches("a", "ab.c")  # at or below
    assert matches("*.(query|value)", "encoder.0.query") and not matches("*.(query|value)", "encoder.0.key")
    assert not matches("a.b", "aXb")
    with pytest.raises(SpaceError, match="cannot be read"):
        compiled("*.(query|value")


def test_a_pattern_without_a_match_lists_the_nearest_names() -> None:
    model = nn.Sequential()
    model.add_module("encoder", nn.ModuleDict({"query": nn.Linear(2, 2), "value": nn.Linear(2, 2)}))
    assert matching(model, "encoder.*") == ["encoder.query", "encoder.value"]
    assert matching(model, "*") == ["encoder"]  # what lies below belongs to it
    assert matching(model, "*", Scale().can_rewrite) == ["encoder.query", "encoder.value"]  # unless layers are meant
    with pytest.raises(SpaceError, match="encoder.query"):
        matching(model, "encoder.qery")


def test_a_transform_says_what_it_cannot_rewrite_and_what_it_can() -> None:
    with pytest.raises(SpaceError, match=r"Scale cannot rewrite ReLU.*Conv1d.*Linear"):
        transformed(nn.ReLU(), [Scale(power=1)])
    with pytest.raises(SpaceError, match="no layer that it can rewrite is called 'lin2'; there are: lin"):
        transformed(GCNConv(4, 4), [Scale("lin2", power=1)])
    with pytest.raises(SpaceError, match="Scale: power is 7: give 0, 1, 2 or 3"):
        Scale(power=Choice("power", [1, 7]))


def test_transforms_rewrite_operations_only() -> None:
    space = SearchSpace("toy")
    x = space.input("x", torch.randn(2, 3))
    from nasgraph.space import Call

    with pytest.raises(SpaceError, match="operations with parameters"):
        space.add("cat", Call(torch.cat), x, transforms=[Scale(power=1)])


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(3, 4), torch.randn(2, 3)),
        (nn.Conv1d(3, 4, 3), torch.randn(2, 3, 8)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), torch.randn(2, 3, 8, 8)),
        (nn.Conv3d(2, 2, 2, groups=2), torch.randn(2, 2, 4, 4, 4)),
        (nn.Embedding(5, 4, padding_idx=1), torch.tensor([[0, 1, 4]])),
    ],
)
def test_an_extended_layer_without_additions_is_the_layer_bit_for_bit(layer: nn.Module, x: torch.Tensor) -> None:
    before, names, kind = layer(x), list(layer.state_dict()), type(layer)
    extended(layer)
    assert isinstance(layer, Transformed) and isinstance(layer, kind)
    assert torch.equal(layer(x), before) and list(layer.state_dict()) == names
    assert torch.equal(copy.deepcopy(layer)(x), before)
    assert type(plain(layer)) is kind and torch.equal(layer(x), before)
    assert kind in KINDS


def test_layers_that_are_used_without_being_called_are_not_rewritten() -> None:
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(SpaceError, match="cannot rewrite MultiheadAttention"):
        transformed(attention, [Scale(power=1)])


@pytest.mark.parametrize("name", ["GCNConv", "SAGEConv", "GATConv", "ChebConv", "TAGConv"])
def test_swapping_the_linear_layers_of_pyg_is_exact(name: str) -> None:
    import torch_geometric.nn

    arguments = {"K": 2} if name == "ChebConv" else {}
    conv: MessagePassing = getattr(torch_geometric.nn, name)(6, 4, **arguments)
    x = torch.randn(4, 6)
    before = conv(x, EDGES)
    rewritten = transformed(conv, [Scale(power=1)])  # times 1
    assert torch.equal(rewritten(x, EDGES), before)
    assert any(type(module).__name__ == "TransformedLinear" for module in rewritten.modules())


def test_the_fused_kernel_of_encoder_layers_does_not_pass_by_what_was_added() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    rewritten = transformed(copy.deepcopy(encoder), [Scale("linear1", power=2)])
    doubled = copy.deepcopy(encoder)
    with torch.no_grad():
        doubled.linear1.weight *= 2
        fused = rewritten(x)
    torch.testing.assert_close(fused, rewritten(x))  # with gradients it never takes the kernel
    torch.testing.assert_close(fused, doubled(x), rtol=1e-4, atol=1e-5)


def test_a_transform_without_its_methods_says_which() -> None:
    class Nothing(Transform):
        pass

    class Always(Transform):
        def neutral(self) -> bool:
            return False

    with pytest.raises(SpaceError, match=r"Nothing has no neutral\(\): say there when"):
        transformed(nn.Linear(2, 2), [Nothing()])
    with pytest.raises(SpaceError, match=r"Always has no rewrite\(layer\)"):
        transformed(nn.Linear(2, 2), [Always()])
