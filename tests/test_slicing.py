"""Rules: what a smaller form of an operation has in common with the larger one. The oracles are plain constructions."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GATv2Conv, TransformerConv

from nasgraph.errors import SpaceError
from nasgraph.export import export_model
from nasgraph.ops import KernelTransformConv2d
from nasgraph.search_spaces.inputs import graph_inputs
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.supernet import Supernet


def image_space(kind: Any, kernels: tuple[int, ...] = (3, 5, 7), **kwargs: Any) -> SearchSpace:
    """Elastic width, then a convolution of elastic kernel, depthwise or grouped as ``kwargs`` say."""
    space = SearchSpace("rules")
    x = space.input("image", torch.zeros(2, 3, 8, 8), {0: "batch"})
    width = Choice("width", [4, 8], ordered=True)
    kernel = Choice("kernel", list(kernels), ordered=True)
    groups = kwargs.pop("groups", lambda width: 1)(width)
    h = space.add("stem", Op(nn.Conv2d, out_channels=width, kernel_size=1), x)
    op = Op(kind, out_channels=width, kernel_size=kernel, padding=kernel // 2, groups=groups, **kwargs)
    space.output(space.add("conv", op, h))
    return space


def depthwise(width: Choice) -> Choice:
    return width


def by_twos(width: Choice) -> Any:
    return width // 2


def elastic(width: Choice) -> Choice:
    return Choice("groups", [1, 2, 4], ordered=True)


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n))


def shaken(supernet: Supernet) -> Supernet:
    """Trained, so to speak: nothing is at its start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return supernet


def every(space: SearchSpace) -> list[Any]:
    return list(space.enumerate())


# ---- OFA's kernel transform -----------------------------------------------------------------------------------------


def test_smaller_kernels_are_computed_in_a_chain() -> None:
    supernet = Supernet(image_space(KernelTransformConv2d))
    stored = {key[2]: parameter for key, parameter in supernet.store.items() if key[0] == "conv"}
    assert {name: tuple(p.shape) for name, p in stored.items()} == {
        "weight": (8, 8, 7, 7),
        "bias": (8,),
        "transform_7_5": (25, 25),
        "transform_5_3": (9, 9),
    }
    start = supernet.extract({"width": 4, "kernel": 3}).get_parameter("conv.weight")
    assert torch.equal(start, stored["weight"][:4, :4, 2:5, 2:5])  # the identity: the centre
    shaken(supernet)
    w7 = stored["weight"].detach()
    for width in (4, 8):
        w5, w3 = torch.zeros(width, width, 5, 5), torch.zeros(width, width, 3, 3)
        for o in range(width):
            for i in range(width):
                w5[o, i] = (stored["transform_7_5"].detach() @ w7[o, i, 1:6, 1:6].reshape(25)).reshape(5, 5)
                w3[o, i] = (stored["transform_5_3"].detach() @ w5[o, i, 1:4, 1:4].reshape(9)).reshape(3, 3)
        for kernel, expected in ((7, w7[:width, :width]), (5, w5), (3, w3)):
            model = supernet.extract({"width": width, "kernel": kernel})
            torch.testing.assert_close(model.get_parameter("conv.weight").detach(), expected)


@pytest.mark.parametrize("groups", [None, depthwise, by_twos])
def test_computed_kernels_are_materialised_to_the_bit(groups: Any) -> None:
    supernet = shaken(Supernet(image_space(KernelTransformConv2d, **({"groups": groups} if groups else {}))))
    for arch in every(supernet.space):
        for n in (1, 2, 5):
            for training in (False, True):
                alone, view = supernet.extract(arch).train(training), supernet.subnet(arch).train(training)
                assert torch.equal(alone(images(n)), view(images(n)))


def test_gradients_reach_the_transforms() -> None:
    supernet = shaken(Supernet(image_space(KernelTransformConv2d)))
    view = supernet.subnet({"width": 4, "kernel": 3})
    view(images(3)).square().sum().backward()
    weight, t75, t53 = (
        supernet.store["conv", "KernelTransformConv2d", name] for name in ("weight", "transform_7_5", "transform_5_3")
    )
    values = [tensor.detach().clone().requires_grad_() for tensor in (weight, t75, t53)]
    w5 = torch.einsum("ab,oib->oia", values[1], values[0][:4, :4, 1:6, 1:6].flatten(2)).reshape(4, 4, 5, 5)
    w3 = torch.einsum("ab,oib->oia", values[2], w5[:, :, 1:4, 1:4].flatten(2)).reshape(4, 4, 3, 3)
    stem = supernet.extract({"width": 4, "kernel": 3}).get_submodule("stem")
    bias = supernet.store["conv", "KernelTransformConv2d", "bias"].detach()[:4]
    torch.autograd.backward(F.conv2d(stem(images(3)), w3, bias, padding=1).square().sum())
    for parameter, value in zip((weight, t75, t53), values, strict=True):
        assert parameter.grad is not None and value.grad is not None and bool(value.grad.any())
        torch.testing.assert_close(parameter.grad, value.grad, rtol=1e-4, atol=1e-4)


def test_what_is_extracted_is_a_plain_convolution(tmp_path: Any) -> None:
    supernet = shaken(Supernet(image_space(KernelTransformConv2d)))
    arch = supernet.space.architecture({"width": 4, "kernel": 3})
    model = supernet.extract(arch)
    assert type(model.get_submodule("conv")) is nn.Conv2d and model.meta["calls"]["conv"].make is nn.Conv2d
    written = export_model(model, tmp_path, space=supernet.space, architecture=arch, formats=["safetensors"])
    assert [item.status for item in written] == ["ok"]
    assert type(supernet.subnet(arch)._view[1].forms[1].module) is KernelTransformConv2d  # type: ignore[union-attr]


def test_transforms_are_saved(tmp_path: Any) -> None:
    supernet = shaken(Supernet(image_space(KernelTransformConv2d)))
    supernet.save(tmp_path)
    again = Supernet.load(tmp_path, image_space(KernelTransformConv2d))
    assert all(torch.equal(parameter, again.store[key]) for key, parameter in supernet.store.items())


def oblong(in_channels: int, width: int, kernel: int) -> nn.Module:
    return KernelTransformConv2d(in_channels, width, (kernel, 3))


def test_oblong_kernels_are_refused() -> None:
    space = SearchSpace("oblong")
    x = space.input("image", torch.zeros(2, 3, 8, 8), {0: "batch"})
    space.output(space.add("conv", Op(oblong, width=4, kernel=Choice("kernel", [3, 5])), x))
    with pytest.raises(SpaceError, match="node 'conv', option 'oblong': .* square kernels"):
        Supernet(space)


# ---- groups ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [depthwise, by_twos, elastic])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_groups_of_a_smaller_convolution_are_groups_of_the_larger(kind: Any, groups: Any) -> None:
    """Each group sees only its channels; the oracle feeds the stored groups one by one to a plain convolution."""
    supernet = shaken(Supernet(image_space(kind, (1, 3), groups=groups)))
    stored = {name: supernet.store["conv", kind.__name__, name].detach() for name in ("weight", "bias")}
    assert stored["weight"].dim() == 5
    run = F.conv2d if kind is nn.Conv2d else F.conv_transpose2d
    for arch in every(supernet.space):
        model = supernet.extract(arch)
        conv = model.get_submodule("conv")
        width, kernel, n = int(arch["width"]), int(arch["kernel"]), int(conv.groups)  # type: ignore[arg-type]
        start = (stored["weight"].shape[-1] - kernel) // 2
        outs = []
        for g, x in enumerate(model.get_submodule("stem")(images(2)).chunk(n, dim=1)):
            rows, columns = width // n, width // n
            weight = stored["weight"][g, :rows, :columns, start : start + kernel, start : start + kernel]
            outs.append(run(x, weight, stored["bias"][g, : width // n], padding=kernel // 2))
        torch.testing.assert_close(model(images(2)), torch.cat(outs, dim=1))


@pytest.mark.parametrize("groups", [depthwise, by_twos, elastic])
def test_grouped_views_are_their_slices(groups: Any) -> None:
    supernet = shaken(Supernet(image_space(nn.Conv2d, (1, 3), groups=groups)))
    for arch in every(supernet.space):
        for n in (1, 2, 5):
            assert torch.equal(supernet.extract(arch)(images(n)), supernet.subnet(arch)(images(n)))


# ---- attention heads ------------------------------------------------------------------------------------------------


def attention(kind: Any, channels: Any, heads: Any = None, **kwargs: Any) -> SearchSpace:
    space = SearchSpace("attention")
    x, edges = graph_inputs(space, 5)
    op = Op(kind, out_channels=channels, heads=heads or Choice("heads", [1, 2, 4], ordered=True), **kwargs)
    h = space.add("attend", op, x, edges)
    space.output(space.add("head", Op(nn.Linear, out_features=2), h))
    return space


def graph(nodes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(nodes)
    return torch.randn(nodes, 5, generator=generator), torch.randint(nodes, (2, 3 * nodes), generator=generator)


@pytest.mark.parametrize(
    ("kind", "channels", "kwargs"),
    [
        (GATConv, [2, 3], {}),
        (GATConv, [2, 3], {"residual": True}),
        (GATv2Conv, [2, 3], {}),
        (GATv2Conv, [2, 3], {"residual": True}),
        (TransformerConv, [3], {}),  # it divides by the root of the channels
    ],
)
def test_heads_of_a_smaller_form_are_heads_of_the_larger(kind: Any, channels: list[int], kwargs: Any) -> None:
    """The largest layer with the channels of no use to the small one set to zero has the small one's heads in it."""
    supernet = shaken(Supernet(attention(kind, Choice("channels", channels, ordered=True), **kwargs)))
    largest = supernet.extract({"heads": 4, "channels": 3}).get_submodule("attend")
    for arch in every(supernet.space):
        heads, width = int(arch["heads"]), int(arch["channels"])
        small = supernet.extract(arch).get_submodule("attend")
        with torch.no_grad():
            for parameter in largest.parameters():
                if parameter.shape[0] == 12:
                    parameter.view(4, 3, *parameter.shape[1:])[:, width:] = 0
            found = largest(*graph(7)).reshape(7, 4, 3)[:, :heads, :width]
            torch.testing.assert_close(small(*graph(7)), found.flatten(1))
        largest = supernet.extract({"heads": 4, "channels": 3}).get_submodule("attend")


@pytest.mark.parametrize("kind", [GATConv, GATv2Conv, TransformerConv])
def test_views_with_heads_are_their_slices(kind: Any) -> None:
    width = Choice("width", [8, 16], ordered=True)
    heads = Choice("heads", [1, 2, 4], ordered=True)
    for kwargs in ({}, {"concat": False}):
        supernet = shaken(Supernet(attention(kind, width // heads, heads, **kwargs)))
        for arch in every(supernet.space):
            for nodes in (1, 2, 7):
                for training in (False, True):
                    alone, view = supernet.extract(arch).train(training), supernet.subnet(arch).train(training)
                    assert torch.equal(alone(*graph(nodes)), view(*graph(nodes)))
                    alone(*graph(nodes)).square().sum().backward()
                    view(*graph(nodes)).square().sum().backward()
                    own = dict(alone.named_parameters())
                    for piece in view._view[1].pieces:
                        gradient, stored = own[piece.name].grad, supernet.store[piece.key].grad
                        assert gradient is not None and stored is not None
                        assert torch.equal(stored if piece.cut is None else piece.cut(stored), gradient)
                        supernet.store[piece.key].grad = None


def test_one_head_is_stored_as_it_is() -> None:
    supernet = Supernet(attention(GATConv, Choice("channels", [2, 3], ordered=True), 1))
    assert tuple(supernet.store["attend", "GATConv", "lin.weight"].shape) == (3, 5)


class Halves(nn.Module):
    """Gates and values in one projection."""

    def __init__(self, in_features: int, width: int, wrong: bool = False) -> None:
        super().__init__()
        self.project = nn.Linear(in_features, 2 * width)
        self.wrong = wrong

    def axes_rule(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (3 if self.wrong else 2, shape[0] // 2, *shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.project(x).chunk(2, dim=-1)
        out: Tensor = torch.sigmoid(gate) * value
        return out


@pytest.mark.parametrize("wrong", [False, True])
def test_a_module_declares_its_axes(wrong: bool) -> None:
    space = SearchSpace("halves")
    x = space.input("x", torch.zeros(4, 5), {0: "nodes"})
    op = Op(Halves, width=Choice("width", [2, 4], ordered=True), wrong=wrong)
    space.output(space.add("head", Op(nn.Linear, out_features=2), space.add("halves", op, x)))
    if wrong:
        with pytest.raises(SpaceError, match=r"node 'halves', option 'Halves', parameter 'project.weight'.*axes_rule"):
            Supernet(space)
        return
    supernet = Supernet(space)
    stored = supernet.store["halves", "Halves", "project.weight"]
    assert tuple(stored.shape) == (2, 4, 5)
    weight = supernet.extract({"width": 2}).get_parameter("halves.project.weight")
    assert torch.equal(weight, torch.cat([stored[0, :2], stored[1, :2]]))


def test_random_architectures_of_all_rules_share_nothing_by_accident() -> None:
    """A form that is trained leaves what only the others use."""
    supernet = Supernet(image_space(nn.Conv2d, (1, 3), groups=by_twos))
    rng = random.Random(0)
    for _ in range(5):
        arch = supernet.space.sample(rng)
        for parameter in supernet.parameters():
            parameter.grad = None
        supernet.subnet(arch)(images(3)).square().sum().backward()
        piece = next(p for p in supernet._structure(arch).pieces if p.name == "conv.weight")
        gradient = supernet.store[piece.key].grad
        assert gradient is not None
        used = gradient if piece.cut is None else piece.cut(gradient)
        assert gradient.count_nonzero() == used.count_nonzero() > 0
