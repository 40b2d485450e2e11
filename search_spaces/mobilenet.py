"""Inverted residual blocks with elastic kernel, depth, expansion, width and image size, as Once-for-All has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasgraph.errors import SpaceError
from nasgraph.ops import KernelTransformConv2d
from nasgraph.space import Choice, Node, Op, SearchSpace, Switch

STAGES = ((16, 1, 1, 2), (24, 2, 1, 3), (40, 2, 1, 3))
ONCE_FOR_ALL = {
    "image_size": 224,
    "classes": 1000,
    "resolutions": tuple(range(128, 225, 4)),
    "widths": (1.0,),
    "expands": (3, 4, 6),
    "stem": 32,
    "first": 16,
    "stages": ((24, 2, 2, 4), (40, 2, 2, 4), (80, 2, 2, 4), (96, 1, 2, 4), (192, 2, 2, 4)),
    "last": 1280,
}
"""Arguments of :func:`mobilenet` for the paper's choices: 5 stages of 2 to 4 blocks, 25 image sizes. Channels are those
of its MobileNetV2-like network; its blocks with hard-swish and squeeze-and-excitation are not here."""


class Resize(nn.Module):
    """Bilinear, to ``size`` x ``size`` pixels; images of that size pass unchanged.

    Shapes: ``(B, C, H, W)`` -> ``(B, C, size, size)``.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] == self.size and x.shape[3] == self.size:
            return x
        return F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False)


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, filter each channel alone, project by a 1x1 convolution (MobileNetV2, CVPR 2018).

    BatchNorm follows each convolution, ReLU the first two (the paper's ReLU6 saturates on the inputs of synflow). With
    ``expand`` 1 there is no first. The input is added where the shapes agree.

    Shapes: ``(B, in_channels, H, W)`` -> ``(B, out_channels, ceil(H / stride), ceil(W / stride))``.
    """

    conv: type[nn.Conv2d] = nn.Conv2d  # the depthwise one

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, expand: int, stride: int = 1) -> None:
        super().__init__()
        hidden = in_channels * expand
        self.expand = conv_bn_relu(in_channels, hidden, 1) if expand > 1 else nn.Identity()
        depthwise = self.conv(hidden, hidden, kernel_size, stride, kernel_size // 2, groups=hidden, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(hidden), nn.ReLU())
        self.project = nn.Sequential(nn.Conv2d(hidden, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + out if self.adds else out


class TransformedResidual(InvertedResidual):
    """:class:`InvertedResidual` whose smaller kernels a supernet computes from the larger; extracted, it is that."""

    alone = InvertedResidual
    conv = KernelTransformConv2d


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, BatchNorm, ReLU: ``(B, in, H, W)`` -> ``(B, out, ceil(H/stride), ceil(W/stride))``."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def mobilenet(
    classes: int = 10,
    image_channels: int = 3,
    image_size: int = 32,
    resolutions: Sequence[int] | None = None,
    widths: Sequence[float] = (0.5, 1.0),
    kernels: Sequence[int] = (3, 5, 7),
    expands: Sequence[int] = (3, 4, 6),
    stem: int = 16,
    stem_stride: int = 2,
    first: int = 16,
    stages: Sequence[Sequence[int]] = STAGES,
    last: int = 128,
    kernel_transform: bool = False,
) -> SearchSpace:
    """Networks of inverted residual blocks, as in Once-for-All (Cai et al., ICLR 2020); by default for small images.

    Resize, stem, one block without expansion, the stages of :class:`InvertedResidual`, 1x1 convolution, mean over
    pixels, linear layer. Each stage has a depth, each block a kernel and an expansion; ``width`` multiplies all
    channels but ``last`` and is shared, as is ``resolution``. :data:`ONCE_FOR_ALL` has the paper's size.

    Args:
        image_channels, image_size: of the images that come in.
        resolutions: image sizes to choose from; default: three quarters of ``image_size``, rounded, and all of it.
        widths: multipliers of all channels, which become multiples of 8 (:func:`divisible`).
        kernels: sizes of the depthwise convolutions, odd.
        expands: hidden channels of a block over its input channels.
        stem, stem_stride, first: channels and stride of the stem, channels of the first block.
        stages: channels, stride of the first block, least and most blocks of each.
        last: channels before the linear layer.
        kernel_transform: in a supernet, smaller kernels are learned functions of the larger ones
            (:class:`~nasgraph.ops.KernelTransformConv2d`) instead of their middles.

    Shapes: images ``(B, image_channels, image_size, image_size)`` -> logits ``(B, classes)``.
    Size: 2 x 2 x 90 x 819 x 819 = 241,473,960 architectures with the defaults.
    Raises: SpaceError: an even kernel, a stage without blocks, or strides that leave fewer than 2 x 2 pixels.
    """
    sizes = [max(2, round(image_size * 3 / 4)), image_size] if resolutions is None else list(resolutions)
    _check(sizes, kernels, stages, stem_stride)
    space = SearchSpace("mobilenet")
    width = Choice("width", list(widths), ordered=True)

    def channels(full: int) -> Switch:
        return Switch(width, {multiplier: divisible(full * multiplier) for multiplier in widths})

    image = space.input("image", torch.zeros(2, image_channels, image_size, image_size), dynamic={0: "batch"})
    x = space.add("resize", Op(Resize, size=Choice("resolution", sizes, ordered=True)), image)
    x = space.add("stem", Op(conv_bn_relu, out_channels=channels(stem), kernel_size=3, stride=stem_stride), x)
    x = space.add("first", Op(InvertedResidual, out_channels=channels(first), kernel_size=3, expand=1), x)
    end: Node | Choice = x
    for i, (full, stride, least, most) in enumerate(stages, 1):
        ends: dict[str, Node] = {}
        for j in range(1, most + 1):
            block = Op(
                TransformedResidual if kernel_transform else InvertedResidual,
                out_channels=channels(full),
                kernel_size=Choice(f"kernel{i}_{j}", list(kernels), ordered=True),
                expand=Choice(f"expand{i}_{j}", list(expands), ordered=True),
                stride=stride if j == 1 else 1,
            )
            x = space.add(f"block{i}_{j}", block, end if j == 1 else x)
            if j >= least:
                ends[str(j)] = x
        end = Choice(f"depth{i}", ends)
    x = space.add("last", Op(conv_bn_relu, out_channels=last, kernel_size=1), end)
    x = space.add("pool", Op(nn.AdaptiveAvgPool2d, output_size=1), x)
    x = space.add("flat", Op(nn.Flatten), x)
    space.output(space.add("classifier", Op(nn.Linear, out_features=classes), x))
    return space


def divisible(channels: float) -> int:
    """The multiple of 8 that is nearest to ``channels``, one more if that loses over a tenth (MobileNetV2's rule)."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


def _check(sizes: Sequence[int], kernels: Sequence[int], stages: Sequence[Sequence[int]], stride: int) -> None:
    for kernel in kernels:
        if kernel < 1 or kernel % 2 == 0:
            raise SpaceError(f"mobilenet: kernel {kernel} is not odd, so it has no middle")
    if not stages:
        raise SpaceError("mobilenet: stages is empty: give at least one")
    pixels = -(-min(sizes) // stride)
    for i, stage in enumerate(stages, 1):
        if len(stage) != 4 or not 1 <= stage[2] <= stage[3] or min(stage) < 1:
            raise SpaceError(
                f"mobilenet: stage {i} is {list(stage)}; [channels, stride, least blocks, most blocks] needed"
            )
        pixels = -(-pixels // stage[1])
    if pixels < 2:
        raise SpaceError(
            f"mobilenet: images of {min(sizes)} pixels end as a single one: fewer strides, or larger resolutions"
        )
