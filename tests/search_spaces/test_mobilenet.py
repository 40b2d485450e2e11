"""Counts and costs against published numbers and closed forms; a subnet of the supernet is its slice."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

from nasgraph.build import build
from nasgraph.errors import SpaceError
from nasgraph.objectives.cost import count_flops
from nasgraph.search_spaces.mobilenet import ONCE_FOR_ALL, InvertedResidual, Resize, divisible, mobilenet
from nasgraph.space import Architecture, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.supernet.variants import variants
from nasgraph.testing import SpaceExam

SMALL: dict[str, Any] = {
    "image_channels": 1,
    "image_size": 8,
    "classes": 3,
    "stem": 8,
    "stem_stride": 1,
    "first": 8,
    "stages": ((8, 1, 1, 2), (16, 2, 1, 2)),
    "last": 16,
}
MOBILENET_V2 = {  # table 2 of Sandler et al., CVPR 2018
    **ONCE_FOR_ALL,
    "resolutions": (224,),
    "kernels": (3,),
    "expands": (6,),
    "stages": ((24, 2, 2, 2), (32, 2, 3, 3), (64, 2, 4, 4), (96, 1, 3, 3), (160, 2, 3, 3), (320, 1, 1, 1)),
}


class TestExam(SpaceExam):
    space = staticmethod(lambda: mobilenet(**SMALL))
    classes = 3
    formats = ("code", "torch-export", "onnx")


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return mobilenet(**SMALL)


def samples(space: SearchSpace, n: int, seed: int = 0) -> list[Architecture]:
    rng = random.Random(seed)
    return [space.sample(rng) for _ in range(n)]


def test_once_for_all_has_2e19_networks_of_each_image_size() -> None:
    """Section 3.1 of the paper: ((3 x 3)^2 + (3 x 3)^3 + (3 x 3)^4)^5 = 2 x 10^19, and 25 image sizes."""
    size = mobilenet(**ONCE_FOR_ALL).size()
    assert size == 25 * (9**2 + 9**3 + 9**4) ** 5
    assert round(size / 25 / 1e19, 1) == 2.2


def test_the_size_is_that_of_the_docstring_and_of_an_enumeration() -> None:
    assert mobilenet().size() == 2 * 2 * (9 + 9**2) * (9 + 9**2 + 9**3) ** 2 == 241_473_960
    small = mobilenet(**{**SMALL, "kernels": (3, 5), "expands": (2, 4)})
    assert small.size() == 2 * 2 * (4 + 4**2) ** 2 == sum(1 for _ in small.enumerate())


def test_mobilenet_v2_has_its_published_parameters_and_multiplications() -> None:
    """3.4 M parameters and 300 M multiply-adds in table 4 of the paper; 3,504,872 are those of its ImageNet weights."""
    space = mobilenet(**MOBILENET_V2)
    assert space.size() == 1
    model = build(space, space.sample(random.Random(0)))
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_504_872
    multiplications = count_flops(model, (torch.zeros(1, 3, 224, 224),)) / 2
    assert multiplications == pytest.approx(300e6, rel=0.01)


def parameters(arch: Architecture, image_channels: int, classes: int, last: int, stages: Any, stem: int) -> int:
    """Closed form: a convolution of k x k, in -> out, in groups, has k^2 in out / groups, its BatchNorm 2 out."""
    width = divisible(stem * arch["width"])
    total = 9 * image_channels * width + 2 * width  # stem
    total += (9 * width + 2 * width) + (width**2 + 2 * width)  # first block, as wide as the stem here
    for i, (full, _, _, _) in enumerate(stages, 1):
        for j in range(1, int(arch[f"depth{i}"]) + 1):
            out, hidden = divisible(full * arch["width"]), width * arch[f"expand{i}_{j}"]
            total += (width * hidden + 2 * hidden) + (arch[f"kernel{i}_{j}"] ** 2 * hidden + 2 * hidden)
            total += hidden * out + 2 * out
            width = out
    return total + width * last + 2 * last + last * classes + classes


def test_parameters_follow_the_closed_form(space: SearchSpace) -> None:
    counts = set()
    for arch in samples(space, 25):
        expected = parameters(arch, 1, 3, 16, SMALL["stages"], 8)
        counts.add(expected)
        assert sum(p.numel() for p in build(space, arch).parameters()) == expected
    assert len(counts) > 15


@pytest.mark.parametrize(("channels", "multiple"), [(16, 16), (8, 8), (3, 8), (24 * 0.5, 16), (40 * 0.5, 24), (12, 16)])
def test_channels_are_multiples_of_8_and_lose_at_most_a_tenth(channels: float, multiple: int) -> None:
    assert divisible(channels) == multiple
    assert multiple >= 0.9 * channels


def test_networks_see_images_of_the_chosen_size(space: SearchSpace) -> None:
    for arch in samples(space, 6):
        model = build(space, arch)
        seen: list[tuple[int, ...]] = []
        model.get_submodule("stem").register_forward_hook(lambda m, i, o, s=seen: s.append(i[0].shape[2:]))
        model(torch.zeros(2, 1, 8, 8))
        assert seen == [(arch["resolution"], arch["resolution"])]


def test_resize_halves_by_averages_and_leaves_the_right_size_alone() -> None:
    """Bilinear by a factor of 2 samples between four pixels: their mean."""
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(Resize(4)(x), nn.functional.avg_pool2d(x, 2), atol=1e-6)
    assert Resize(8)(x) is x


def test_a_block_adds_its_input_where_shapes_agree() -> None:
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    for out, stride in ((8, 1), (8, 2), (16, 1)):
        block = InvertedResidual(8, out, 5, expand=3, stride=stride)
        nn.init.zeros_(block.project[1].weight)  # its BatchNorm: nothing comes through the convolutions
        expected = x if (out, stride) == (8, 1) else torch.zeros(2, out, 6 // stride, 6 // stride)
        assert torch.equal(block(x), expected)


# ---- in a supernet -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def supernet(space: SearchSpace) -> Supernet:
    return Supernet(space)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_subnet_is_its_slice(supernet: Supernet, n: int) -> None:
    images = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(n))
    for arch in samples(supernet.space, 15, seed=n):
        for training in (False, True):
            alone, shared = supernet.extract(arch).train(training), supernet.subnet(arch).train(training)
            assert torch.equal(alone(images), shared(images)), arch


def test_smaller_blocks_use_the_leading_channels_and_the_middle_of_the_kernel(supernet: Supernet) -> None:
    large = {name: choice.labels[-1] for name, choice in supernet.space.choices.items()}
    small = {**large, "kernel1_1": 3, "expand1_1": 3}
    whole = supernet.extract(large).get_submodule("block1_1").state_dict()
    part = supernet.extract(supernet.space.architecture(small)).get_submodule("block1_1").state_dict()
    assert torch.equal(part["expand.0.weight"], whole["expand.0.weight"][:24])
    assert torch.equal(part["depthwise.0.weight"], whole["depthwise.0.weight"][:24, :, 2:5, 2:5])
    assert torch.equal(part["project.0.weight"], whole["project.0.weight"][:, :24])


def test_transformed_kernels_start_as_middles_learn_and_leave_as_plain_convolutions() -> None:
    """OFA's kernel transform: w5 = T75 vec(centre5(w7)), w3 = T53 vec(centre3(w5)), T = I at the start."""
    supernet = Supernet(mobilenet(**SMALL, kernel_transform=True))
    large = {name: choice.labels[-1] for name, choice in supernet.space.choices.items()}
    small = supernet.space.architecture({**large, "kernel1_1": 3})
    largest = supernet.extract(large).get_submodule("block1_1.depthwise.0").weight
    assert torch.equal(supernet.extract(small).get_submodule("block1_1.depthwise.0").weight, largest[:, :, 2:5, 2:5])
    first = supernet.store["block1_1", "TransformedResidual", "depthwise.0.transform_7_5"]
    second = supernet.store["block1_1", "TransformedResidual", "depthwise.0.transform_5_3"]
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    supernet.subnet(small).train()(images).square().sum().backward()
    for transform in (first, second):
        assert transform.grad is not None and transform.grad.any()
        with torch.no_grad():
            transform.add_(torch.randn(transform.shape, generator=torch.Generator().manual_seed(1)))
    model = supernet.extract(small)
    five = (largest[:, 0, 1:6, 1:6].flatten(1) @ first.T).view(-1, 5, 5)
    three = (five[:, 1:4, 1:4].flatten(1) @ second.T).view(-1, 1, 3, 3)
    depthwise = model.get_submodule("block1_1.depthwise.0")
    assert torch.allclose(depthwise.weight, three, atol=1e-5)
    assert type(depthwise) is nn.Conv2d and type(model.get_submodule("block1_1")) is InvertedResidual
    for arch in samples(supernet.space, 8):
        assert torch.equal(supernet.extract(arch)(images), supernet.subnet(arch)(images)), arch


def test_the_store_is_as_large_as_the_largest_network(supernet: Supernet) -> None:
    large = {name: choice.labels[-1] for name, choice in supernet.space.choices.items()}
    assert supernet.numel == supernet.params(large) == parameters(Architecture(large), 1, 3, 16, SMALL["stages"], 8)


def test_decisions_that_do_not_change_a_shape_are_not_forms() -> None:
    """Of a block: 2 widths x 3 kernels x 3 expansions x 2 image sizes, whatever stands before it."""
    assert max(map(len, variants(mobilenet()).values())) == 36


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kernels": (3, 4)}, "kernel 4 is not odd"),
        ({"stages": ()}, "stages is empty"),
        ({"stages": ((8, 1, 0, 2),)}, r"stage 1 is \[8, 1, 0, 2\]"),
        ({"stages": ((8, 1, 2),)}, r"stage 1 is \[8, 1, 2\]"),
        ({"stages": ((8, 4, 1, 2), (8, 2, 1, 1))}, "images of 6 pixels end as a single one"),
        ({"widths": (1.0, 0.5)}, "must be ascending"),
    ],
)
def test_a_wrong_setting_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(SpaceError, match=said):
        mobilenet(**{**SMALL, **change})
