from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_geometric.nn import GCNConv

from nasgraph.build import build
from nasgraph.errors import SpaceError
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.transforms.base import transformed
from nasgraph.transforms.layers import Transformed
from nasgraph.transforms.prune import Prune, kept, kept_weights, largest, recycle


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pruned(layer: nn.Module, **arguments: object) -> Transformed:
    found = transformed(layer, [Prune(**arguments)])  # type: ignore[arg-type]
    assert isinstance(found, Transformed)
    return found


def slow_mask(scores: list[float], count: int) -> list[bool]:
    """The largest, of equals the first, by sorting."""
    first = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
    return [i in first for i in range(len(scores))]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.data())
@settings(deadline=None, max_examples=80)
def test_the_largest_are_those_of_a_sort_with_ties_in_order(scores: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(scores)))
    found = largest(torch.tensor([[float(s) for s in scores]]), count)
    assert found[0].tolist() == slow_mask([float(s) for s in scores], count)


@given(st.integers(1, 6), st.integers(1, 9), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 99), st.booleans())
@settings(deadline=None, max_examples=80)
def test_masks_are_exact_and_nested(out: int, size: int, a: float, b: float, seed: int, ties: bool) -> None:
    scores = numbers(out, size, seed=seed).abs()
    scores = scores.round() if ties else scores
    less, more = sorted((a, b))
    for structure, n in (("unstructured", out * size), ("rows", size)):
        small, large = kept(scores, less, structure), kept(scores, more, structure)
        assert not bool((small & ~large).any())
        counts = small.reshape(1, -1).sum(1) if structure == "unstructured" else small.sum(1)
        assert set(counts.tolist()) == {max(1, round(less * n))}


@pytest.mark.parametrize("shape", [(3, 8), (4, 8, 3, 3)])
def test_two_of_four_along_the_inputs(shape: tuple[int, ...]) -> None:
    scores = numbers(*shape).abs()
    mask = kept(scores, None, "2:4")
    groups = mask.movedim(1, -1).reshape(-1, 4)
    assert (groups.sum(1) == 2).all()
    values = scores.movedim(1, -1).reshape(-1, 4)
    for group, value in zip(groups, values, strict=True):
        assert group.tolist() == slow_mask(value.tolist(), 2)
    assert kept(scores, None, "1:4").sum() * 4 == scores.numel()
    assert kept(scores, 1.0, "2:4").all()


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(8, 6), numbers(2, 8)),
        (nn.Conv1d(8, 4, 3), numbers(2, 8, 9)),
        (nn.Conv2d(8, 4, 3, groups=2), numbers(2, 8, 5, 5)),
        (nn.Conv3d(4, 4, 2), numbers(1, 4, 3, 3, 3)),
        (nn.Embedding(6, 8), torch.tensor([[0, 5]])),
    ],
)
@pytest.mark.parametrize("scores", ["magnitude", "random", "learned"])
@pytest.mark.parametrize("structure", ["unstructured", "rows", "2:4"])
def test_a_pruned_layer_is_the_layer_with_zeros(layer: nn.Module, x: Tensor, scores: str, structure: str) -> None:
    layer = copy.deepcopy(layer)
    plain = copy.deepcopy(layer)
    found = pruned(layer, keep=0.5, structure=structure, scores=scores)
    weight = found.effective_weight()
    half = weight.numel() // 2
    assert int(weight.count_nonzero()) == half and kept_weights(found) == (half, 2 * half)
    assert torch.equal(weight[weight != 0], plain.weight[weight != 0])  # type: ignore[index, arg-type]
    plain.weight.data.copy_(weight.detach())  # type: ignore[union-attr, operator]
    assert torch.equal(found(x), plain(x))
    twin = pruned(copy.deepcopy(plain), keep=0.5, structure=structure, scores=scores)
    twin.load_state_dict(found.state_dict())
    assert torch.equal(twin(x), found(x)) and torch.equal(copy.deepcopy(found)(x), found(x))


def test_the_mask_follows_the_weight() -> None:
    layer = pruned(nn.Linear(4, 1, bias=False), keep=0.5)
    layer.weight.data = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    assert layer.effective_weight().tolist() == [[0, -2, 3, 0]]
    layer.weight.data = torch.tensor([[9.0, -2.0, 3.0, 0.5]])
    assert layer.effective_weight().tolist() == [[9, 0, 3, 0]]


def test_random_masks_depend_on_the_seed_the_place_and_the_shape_only() -> None:
    def mask(seed: int, where: str = "*", outputs: int = 8) -> Tensor:
        torch.manual_seed(seed + outputs)  # weights differ, masks do not
        return pruned(nn.Linear(8, outputs), where=where, keep=0.5, scores="random", seed=seed).effective_weight() != 0

    assert torch.equal(mask(1), mask(1)) and not torch.equal(mask(1), mask(2))
    assert not torch.equal(mask(1), mask(1, "(|x)"))


def test_edge_popup_trains_scores_through_the_mask() -> None:
    layer = pruned(nn.Linear(6, 3), keep=0.5, scores="learned", weights="fixed")
    x, mask = numbers(5, 6), layer.on_weight["prune"]
    layer(x).square().sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None
    weight = layer.effective_weight().detach().requires_grad_()
    F.linear(x, weight, layer.bias).square().sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(mask.scores.grad, weight.grad * layer.weight * mask.scores.sign())  # paper, eq. 4


def test_signed_supermasks_have_three_values() -> None:
    layer = pruned(nn.Linear(8, 4, bias=False), scores="signed", weights="fixed")
    mask = layer.on_weight["prune"]
    mask.signed_scores.data = numbers(4, 8)
    expected = torch.where(mask.signed_scores.tanh().abs() > 0.4, mask.signed_scores.sign(), 0.0)
    constant = (2 / 8) ** 0.5 * layer.weight.sign()
    torch.testing.assert_close(layer.effective_weight(), constant * expected, rtol=0, atol=0)
    layer(numbers(5, 8)).square().sum().backward()
    assert layer.weight.grad is None and bool((mask.signed_scores.grad != 0).all())
    exact = pruned(nn.Linear(8, 4), scores="signed", keep=0.25)
    assert int(exact.effective_weight().count_nonzero()) == 8
    exact(numbers(5, 8)).square().sum().backward()
    assert int(exact.weight.grad.count_nonzero()) == 8


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])  # a transposed weight is not contiguous
def test_recycling_writes_the_best_values_over_the_worst(order: tuple[int, int]) -> None:
    layer = pruned(nn.Linear(4, 2), keep=0.5, scores="learned", weights="fixed")
    layer.weight.data = torch.arange(8.0).view(2, 4).permute(order).contiguous().permute(order)
    layer.on_weight["prune"].scores.data = torch.tensor([[0.1, 0.9, 0.3, 0.4], [0.5, 0.6, 0.7, 0.2]])
    scores = layer.on_weight["prune"].scores.clone()
    before = layer.weight.detach().clone()
    assert recycle(layer, 0.25) == 2
    expected = before.clone()
    expected[0, 0], expected[1, 3] = before[0, 1], before[1, 2]
    assert torch.equal(layer.weight, expected) and torch.equal(layer.on_weight["prune"].scores, scores)
    with pytest.raises(ValueError, match=r"at most 0\.5"):
        recycle(layer, 0.6)


def conv_space() -> SearchSpace:
    """Widths, kernels and every kind of mask; and a graph layer's twin as a linear layer."""
    space = SearchSpace("masks")
    x = space.input("x", numbers(2, 4, 6, 6), {0: "batch"})
    width = Choice("width", [4, 8], ordered=True)
    conv = Op(nn.Conv2d, out_channels=width, kernel_size=Choice("kernel", [1, 3]), padding="same")
    how = Choice("scores", ["magnitude", "random", "learned", "signed"])
    masks = [
        Prune(keep=Choice("keep", [0.25, 0.5, 1.0]), scores=how, structure=Choice("among", ["rows", "unstructured"]))
    ]
    h = space.add("conv", conv, x, transforms=masks)
    h = space.add("flat", Op(nn.Flatten), h)
    space.output(space.add("head", Op(nn.Linear, out_features=3), h, transforms=[Prune(keep=0.5, structure="2:4")]))
    return space


def test_a_masked_subnet_equals_its_extraction() -> None:
    space, rng = conv_space(), random.Random(0)
    supernet = Supernet(space)
    parts = {name for node, _, name in supernet.store if node == "conv"}
    prune = "on_weight.prune."
    assert parts == {"weight", "bias", f"{prune}scores", f"{prune}signed_scores"}
    assert supernet.store["conv", "Conv2d", f"{prune}scores"].shape == (8, 4, 3, 3)
    x = numbers(3, 4, 6, 6, seed=1)
    for architecture in rng.sample(list(space.enumerate()), 30):
        subnet, alone = supernet.subnet(architecture), supernet.extract(architecture)
        assert torch.equal(subnet(x), alone(x))
        mask = alone.conv.on_weight["prune"] if isinstance(alone.conv, Transformed) else None
        assert (mask is None) == (architecture["keep"] == 1.0 and architecture["scores"] != "signed")
        for parameter in supernet.parameters():
            parameter.grad = None
        subnet(x).square().sum().backward()
        alone(x).square().sum().backward()
        for piece in supernet._structure(architecture).pieces:
            grad, own = supernet.store[piece.key].grad, alone.get_parameter(piece.name).grad
            if own is not None:
                assert grad is not None
                torch.testing.assert_close(grad.sum(), own.sum(), rtol=1e-4, atol=1e-5)


def test_layers_of_graph_operations_are_pruned() -> None:
    conv = GCNConv(6, 4)
    found = transformed(conv, [Prune(keep=0.25)])
    assert kept_weights(found) == (6, 24)


def test_keeping_all_is_the_plain_network() -> None:
    space = SearchSpace("plain")
    x = space.input("x", numbers(2, 4))
    space.output(space.add("a", Op(nn.Linear, out_features=3), x, transforms=[Prune(keep=Choice("keep", [0.5, 1.0]))]))
    assert type(build(space, {"keep": 1.0}).a) is nn.Linear
    assert int(build(space, {"keep": 0.5}).a.effective_weight().count_nonzero()) == 6


def test_a_pruned_layer_can_be_exported() -> None:
    layer, x = pruned(nn.Linear(8, 4), keep=0.25, structure="rows"), numbers(2, 8)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": Choice("keep", [0.5, 0.0])}, r"keep is 0\.0: give a ratio above 0, at most 1"),
        ({"keep": 1.5}, r"keep is 1\.5"),
        ({"keep": True}, "keep is True"),
        ({}, "keep is None: give a ratio"),
        ({"keep": 0.5, "structure": "4:2"}, "structure is '4:2': give one of unstructured, rows"),
        ({"keep": 0.25, "structure": "2:4"}, r"2:4 keeps 0\.5, or give 1\.0"),
        ({"keep": 0.5, "scores": "best"}, "scores is 'best': give one of magnitude"),
        ({"keep": 0.5, "weights": "frozen"}, "give trained or fixed"),
        ({"keep": 0.5, "weights": "fixed"}, "nothing learns with fixed weights and magnitude scores"),
        (
            {"keep": 0.5, "structure": "channels", "scores": "learned"},
            "channels are chosen by magnitude, random or first",
        ),
        ({"keep": 0.5, "scores": "first"}, r"not by a mask \(unstructured\)"),
        ({"structure": "2:4", "scores": "signed"}, "signed scores have no 2:4"),
    ],
)
def test_bad_settings_are_refused_at_declaration(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        Prune(**arguments)  # type: ignore[arg-type]


def test_what_cannot_be_pruned_is_refused() -> None:
    with pytest.raises(SpaceError, match=r"2:4 needs inputs in groups of 4.*\(2, 6\) has 6"):
        pruned(nn.Linear(6, 2), structure="2:4")
    with pytest.raises(SpaceError, match="pruned already"):
        transformed(nn.Linear(4, 2), [Prune(keep=0.5), Prune(keep=0.25)])
    space = SearchSpace("toy")
    x = space.input("x", numbers(2, 4))
    channels = Prune(keep=0.5, structure=Choice("structure", ["rows", "channels"]))
    with pytest.raises(SpaceError, match=r"node 'a': Prune: structure 'channels'.*offer heads or widths as a choice"):
        space.add("a", Op(nn.Linear, out_features=3), x, transforms=[channels])
    with pytest.raises(SpaceError, match="existing model smaller"):
        transformed(nn.Linear(4, 2), [Prune(keep=0.5, structure="channels")])
