"""Spaces with quantised activations that every format can export."""

from __future__ import annotations

import torch
from torch import nn

from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.transforms import Quantize


def perceptron(image_channels: int, image_size: int, classes: int, activations: str = "dynamic") -> SearchSpace:
    """Two linear layers; weights and activations of each in 4 or 8 bits. Size: 32."""
    space = SearchSpace("perceptron")
    low = Quantize(
        weight_bits=Choice("weights.{name}", [4, 8]),
        activation_bits=Choice("activations.{name}", [4, 8]),
        activations=activations,
    )
    h = space.input("image", torch.zeros(2, image_channels, image_size, image_size), {0: "batch"})
    h = space.add("flat", Op(nn.Flatten), h)
    h = space.add("hidden", Op(nn.Linear, out_features=Choice("width", [8, 16])), h, transforms=[low])
    h = space.add("act", Op(nn.ReLU), h)
    space.output(space.add("head", Op(nn.Linear, out_features=classes), h, transforms=[low]))
    return space
