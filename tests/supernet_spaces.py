"""Small spaces with elastic sizes, for the tests of supernets."""

from __future__ import annotations

import torch
from torch import nn

from nasgraph.space import Choice, Node, Op, SearchSpace


def small_cnn(channels: tuple[int, ...] = (4, 8), classes: int = 3) -> SearchSpace:
    """Elastic kernel, width and depth, with BatchNorm. Shapes: ``(B, 3, 8, 8)`` -> ``(B, classes)``."""
    space = SearchSpace("small_cnn")
    h: Node = space.input("image", torch.zeros(2, 3, 8, 8), dynamic={0: "batch"})
    ends: dict[str, Node] = {}
    for i in (1, 2, 3):
        kernel = Choice(f"kernel{i}", [1, 3, 5], ordered=True)
        width = Choice(f"width{i}", list(channels), ordered=True)
        h = space.add(f"conv{i}", Op(nn.Conv2d, out_channels=width, kernel_size=kernel, padding=kernel // 2), h)
        norms = {"batch": Op(nn.BatchNorm2d), "group": Op(nn.GroupNorm, num_groups=2)}
        h = space.add(f"norm{i}", Choice(f"norm{i}", norms), h)
        ends[str(i)] = h = space.add(f"act{i}", Op(nn.ReLU), h)
    h = space.add("pool", Op(nn.AdaptiveAvgPool2d, output_size=1), Choice("depth", ends))
    space.output(space.add("head", Op(nn.Linear, out_features=classes), space.add("flat", Op(nn.Flatten), h)))
    return space
