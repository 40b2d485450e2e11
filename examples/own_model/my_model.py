"""A model of one's own, as it might come out of a training, and a space over it: bits, channels and masks."""

import torch
from torch import Tensor, nn

from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.tasks.images import digits_images
from nasgraph.training import TrainSettings
from nasgraph.transforms import Prune, Quantize


class Net(nn.Module):
    """Two convolutions and a linear layer: images ``(batch, 1, 8, 8)`` -> logits ``(batch, 10)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        x = torch.relu(self.norm(self.conv2(x)))
        return self.head(x.mean(dim=(2, 3)))


def trained() -> Net:
    """Yours would be loaded from a file; this one takes a few seconds to train."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
    digits_images().fit(model, TrainSettings(epochs=15, lr=0.01), seed=0)
    return model


def my_space() -> SearchSpace:
    """Bits of each convolution and of what they read, channels of the second, what the head keeps. Size: 320."""
    rules = [
        Quantize("conv*", weight_bits=Choice("bits.{name}", [2, 4, 8, 32]), activation_bits=Choice("inputs", [8, 32])),
        Prune("conv2", structure="channels", keep=Choice("channels", [0.25, 0.5, 0.75, 0.875, 1.0])),
        Prune("head", keep=Choice("head", [0.5, 1.0])),
    ]
    inputs, make = torch.randn(2, 1, 8, 8), Op(Net)
    return SearchSpace.from_module(trained(), rules, inputs=inputs, dynamic={"x": {0: "batch"}}, make=make)
