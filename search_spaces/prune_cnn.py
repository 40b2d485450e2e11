"""A small convolutional network whose widths and masks are chosen: fewer channels, or fewer weights in more of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nasgraph.errors import SpaceError
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.transforms.prune import Prune


def prune_cnn(
    classes: int = 10,
    image_channels: int = 1,
    image_size: int = 28,
    layers: int = 3,
    widths: Sequence[int] = (8, 16, 24, 32),
    keeps: Sequence[float] = (0.125, 0.25, 0.5, 1.0),
    scores: str = "magnitude",
    structure: str = "unstructured",
    seed: int = 0,
) -> SearchSpace:
    """Blocks of 3x3 convolution, BatchNorm, ReLU and 2x2 max pooling, mean over pixels, a linear layer.

    Each block has a width and a keep ratio of its convolution's weights; what the mask keeps is said by ``scores`` and
    ``structure`` (:class:`~nasgraph.transforms.prune.Prune`). The linear layer is not pruned.

    Args:
        image_channels, image_size: of the images that come in.
        layers: blocks, at least 1; each halves the image while it has more than 3 pixels a side.
        widths: channels of a block, ascending.
        keeps: shares of a convolution's weights that stay, ascending; 1.0 is no mask.
        seed: of ``scores="random"``.

    Shapes: images ``(B, image_channels, image_size, image_size)`` -> logits ``(B, classes)``.
    Size: ``(widths x keeps) ** layers``, 4,096 with the defaults.
    Raises: SpaceError: no layer, or a ratio out of range.
    """
    if layers < 1:
        raise SpaceError(f"prune_cnn: layers is {layers}: give at least one")
    space = SearchSpace("prune_cnn")
    x = space.input("image", torch.zeros(2, image_channels, image_size, image_size), dynamic={0: "batch"})
    size = image_size
    for i in range(1, layers + 1):
        width = Choice(f"width{i}", list(widths), ordered=True)
        keep = Choice(f"keep{i}", list(keeps), ordered=True)
        conv = Op(nn.Conv2d, out_channels=width, kernel_size=3, padding=1, bias=False)
        mask = Prune(keep=keep, scores=scores, structure=structure, seed=seed * layers + i)
        x = space.add(f"conv{i}", conv, x, transforms=[mask])
        x = space.add(f"norm{i}", Op(nn.BatchNorm2d), x)
        x = space.add(f"relu{i}", Op(nn.ReLU), x)
        if size > 3:
            x = space.add(f"pool{i}", Op(nn.MaxPool2d, kernel_size=2), x)
            size //= 2
    x = space.add("pool", Op(nn.AdaptiveAvgPool2d, output_size=1), x)
    x = space.add("flat", Op(nn.Flatten), x)
    space.output(space.add("classifier", Op(nn.Linear, out_features=classes), x))
    return space
