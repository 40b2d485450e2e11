"""Small transforms to try the machinery with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nasgraph.transforms.base import Transform
from nasgraph.transforms.layers import extended


class Gain(nn.Module):
    """Multiplies the weight; one parameter for each power."""

    own_slices = True

    def __init__(self, power: int) -> None:
        super().__init__()
        self.power = power
        self.register_parameter(f"gain_{power}", nn.Parameter(torch.tensor([float(power)])))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.get_parameter(f"gain_{self.power}")


@dataclass(frozen=True)
class Scale(Transform):
    """Weights times a learned number that starts at ``power``; 0 is none."""

    power: Any = 0
    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        self.check("power", lambda power: power in (0, 1, 2, 3), "give 0, 1, 2 or 3")

    def neutral(self) -> bool:
        return bool(self.power == 0)

    def rewrite(self, layer: nn.Module) -> nn.Module:
        found = extended(layer)
        found.on_weight["scale"] = Gain(self.power)
        return found


class Beside(nn.Module):
    """An adapter of low rank."""

    own_slices = True

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, layer.in_features))
        self.b = nn.Parameter(torch.randn(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a.T @ self.b.T


@dataclass(frozen=True)
class Adapt(Transform):
    """An adapter beside linear layers; rank 0 is none."""

    rank: Any = 0
    order: ClassVar[int] = 3
    freezes: ClassVar[bool] = True
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    def neutral(self) -> bool:
        return bool(self.rank == 0)

    def rewrite(self, layer: nn.Module) -> nn.Module:
        found = extended(layer)
        found.beside["adapt"] = Beside(layer, self.rank)  # type: ignore[arg-type]
        return found
