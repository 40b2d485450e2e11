"""NAS-Bench-201: one cell of 4 nodes and 6 edges, repeated (Dong & Yang, ICLR 2020, section 2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from nasgraph.errors import SpaceError
from nasgraph.ops import Zero, add
from nasgraph.space import Architecture, Call, Choice, Label, Node, Op, SearchSpace

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))  # in the order of the benchmark's strings


def nasbench201(
    channels: int = 16, classes: int = 10, cells: int = 5, image_channels: int = 3, image_size: int = 32
) -> SearchSpace:
    """The networks of NAS-Bench-201: stem, three stages of ``cells`` equal cells, residual blocks that halve the image.

    Args:
        channels: of the stem and the first stage; each later stage has twice as many.
        image_channels, image_size: of the images that come in, 3 and 32 in the benchmark. A network runs on other
            image sizes too.

    Shapes: images ``(B, image_channels, image_size, image_size)`` -> logits ``(B, classes)``.
    Size: 15,625 architectures.
    """
    space = SearchSpace("nasbench201")
    edges = edge_choices()
    image = space.input("image", torch.zeros(2, image_channels, image_size, image_size), dynamic={0: "batch"})
    x = space.add("stem", Op(nn.Conv2d, out_channels=channels, kernel_size=3, padding=1, bias=False), image)
    x = space.add("stem_norm", Op(nn.BatchNorm2d), x)
    for stage in range(3):
        if stage:
            x = _reduction(space, f"reduce{stage}", x, channels << stage)
        for cell in range(cells):
            x = _cell(space, f"stage{stage}_cell{cell}", x, edges)
    x = space.add("last_norm", Op(nn.BatchNorm2d), x)
    x = space.add("last_relu", Op(nn.ReLU), x)
    x = space.add("pool", Op(nn.AdaptiveAvgPool2d, output_size=1), x)
    x = space.add("flat", Op(nn.Flatten), x)
    space.output(space.add("classifier", Op(nn.Linear, out_features=classes), x))
    return space


def cell_space(channels: int = 16) -> SearchSpace:
    """One cell alone: feature maps ``(B, channels, H, W)`` -> the same shape. Size: 15,625 architectures."""
    space = SearchSpace("nasbench201_cell")
    x = space.input("x", torch.zeros(2, channels, 8, 8), dynamic={0: "batch"})
    space.output(_cell(space, "cell", x, edge_choices()))
    return space


def edge_choices() -> dict[tuple[int, int], Choice]:
    """The six decisions, ``edge_0_1`` to ``edge_2_3``. Every cell uses the same."""
    operations = {
        "none": Op(Zero),
        "skip_connect": Op(nn.Identity),
        "nor_conv_1x1": Op(nor_conv, kernel_size=1),
        "nor_conv_3x3": Op(nor_conv, kernel_size=3),
        "avg_pool_3x3": Op(nn.AvgPool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
    }
    return {(source, node): Choice(f"edge_{source}_{node}", operations) for source, node in EDGES}


def relu_conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """ReLU, convolution, batch normalisation: ``(B, in, H, W)`` -> ``(B, out, H/stride, W/stride)``."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def nor_conv(in_channels: int, kernel_size: int) -> nn.Sequential:
    """The cell's convolutions: :func:`relu_conv_bn` with as many channels as come in."""
    return relu_conv_bn(in_channels, in_channels, kernel_size)


nor_conv.keeps_shape = True  # type: ignore[attr-defined]  # simplification asks for it, see canonical.Traits


def to_string(architecture: Mapping[str, Label]) -> str:
    """The benchmark's notation: ``|a~0|+|b~0|c~1|+|d~0|e~1|f~2|``."""
    nodes = []
    for node in (1, 2, 3):
        nodes.append("|" + "".join(f"{architecture[f'edge_{source}_{node}']}~{source}|" for source in range(node)))
    return "+".join(nodes)


def from_string(text: str) -> Architecture:
    """The architecture that the benchmark calls ``text``. Raises: SpaceError: not one of its strings."""
    try:
        terms = [term.split("~") for node in text.split("+") for term in node.strip("|").split("|")]
        found = Architecture({f"edge_{i}_{j}": operation for (i, j), (operation, _) in zip(EDGES, terms, strict=True)})
    except ValueError:
        found = Architecture({})
    if not set(found.values()) <= set(OPERATIONS) or not found or to_string(found) != text:
        form = "|a~0|+|b~0|c~1|+|d~0|e~1|f~2|"
        raise SpaceError(f"'{text}' is no NAS-Bench-201 cell: {form} with {', '.join(OPERATIONS)}")
    return found


def _cell(space: SearchSpace, name: str, x: Node, edges: Mapping[tuple[int, int], Choice]) -> Node:
    nodes = [x]
    for node in (1, 2, 3):
        terms = [space.add(f"{name}_e{i}{node}", edges[i, node], nodes[i]) for i in range(node)]
        nodes.append(space.add(f"{name}_n{node}", Call(add), *terms))
    return nodes[3]


def _reduction(space: SearchSpace, name: str, x: Node, channels: int) -> Node:
    """A residual block of two 3x3 convolutions that halves the image."""
    body = space.add(f"{name}_a", Op(relu_conv_bn, kernel_size=3, out_channels=channels, stride=2), x)
    body = space.add(f"{name}_b", Op(relu_conv_bn, kernel_size=3, out_channels=channels), body)
    short = space.add(f"{name}_pool", Op(nn.AvgPool2d, kernel_size=2, stride=2), x)
    short = space.add(f"{name}_short", Op(nn.Conv2d, out_channels=channels, kernel_size=1, bias=False), short)
    return space.add(f"{name}_sum", Call(add), short, body)
