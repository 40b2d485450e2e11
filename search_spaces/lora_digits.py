"""Ranks of adapters on a transformer that has learned some digits and is adapted to others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nasgraph.errors import SpaceError
from nasgraph.pretrained import pretrained
from nasgraph.search_spaces.transformer import Positions, SelfAttention
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.tasks.text import digits_rows
from nasgraph.training.loop import TrainSettings
from nasgraph.transforms import Lora


class Block(nn.Module):
    """Attention, then a feed-forward network; pre-norm (Xiong et al., ICML 2020)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attend = nn.LayerNorm(width), SelfAttention(width, heads, width // heads, causal=False)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        out: Tensor = x + self.down(torch.relu(self.up(self.norm2(x))))
        return out


class RowTransformer(nn.Module):
    """Classifies sequences of vectors. Shapes: ``(n, length, features)`` -> ``(n, classes)``."""

    def __init__(self, features: int, length: int, classes: int, width: int, layers: int, heads: int = 2) -> None:
        super().__init__()
        self.embed, self.positions = nn.Linear(features, width), Positions(width, length)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.positions(self.embed(x))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x).mean(1))
        return out


def lora_digits(
    features: int = 8,
    length: int = 8,
    classes: int = 5,
    ranks: Sequence[int] = (0, 1, 2, 4, 8),
    layers: int = 3,
    width: int = 32,
    alpha: float = 2.0,
    scale: str = "alpha/sqrt(r)",
    learned: Sequence[int] = (0, 1, 2, 3, 4),
    epochs: int = 40,
) -> SearchSpace:
    """A rank for each of the four matrices of each block, on a transformer that knows the digits ``learned``.

    The model is trained on those digits at the first call (about 10 seconds) and kept in the cache. It is frozen but
    for its last layer; adapt it to the others with the task ``digits_rows`` and ``digits: [5, 6, 7, 8, 9]``.

    Args:
        ranks: of every adapter, ascending; 0 is none.
        layers, width: of the model.
        alpha, scale: see :class:`~nasgraph.transforms.Lora`.
        epochs: of the training before.

    Shapes: x ``(n, 8, 8)`` float32 -> logits ``(n, classes)``.
    Size: ``len(ranks) ** (4 * layers)``: 244,140,625 with the defaults.
    Raises: SpaceError: ``learned`` are not as many digits as the task has classes.
    """
    if len(learned) != classes:
        raise SpaceError(
            f"lora_digits: learned has {len(learned)} digits, the task {classes} classes: give the task as many, "
            "such as task.digits=[5,6,7,8,9] for five, or the space other ones (space.learned=[...])"
        )
    task = digits_rows(64 // features, digits=learned)
    sizes: dict[str, Any] = {
        "features": features,
        "length": length,
        "classes": classes,
        "width": width,
        "layers": layers,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RowTransformer(**sizes)
    settings = TrainSettings(epochs=epochs, lr=0.003, weight_decay=0.01, patience=epochs, optimizer="adamw")
    base = pretrained(model, task, settings)
    rank = Choice("rank.{name}", list(ranks), ordered=True)
    return SearchSpace.from_module(
        base,
        [Lora("blocks.*.(enter|leave|up|down)", rank=rank, alpha=alpha, scale=scale)],
        inputs=task.batch(2, 0).inputs,
        dynamic={"x": {0: "batch"}},
        train=["head"],
        make=Op(RowTransformer, **sizes),
        name="lora_digits",
    )
