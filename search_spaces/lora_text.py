"""Ranks of adapters on a decoder that has learned one half of a text and is adapted to the other, rewritten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nasgraph.errors import SpaceError
from nasgraph.pretrained import pretrained
from nasgraph.search_spaces.transformer import Positions, SelfAttention
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.tasks.adapted_text import adapted_text
from nasgraph.training.loop import TrainSettings
from nasgraph.transforms import Lora


class CausalBlock(nn.Module):
    """Causal attention, then a feed-forward network four times as wide; pre-norm (Xiong et al., ICML 2020)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attend = nn.LayerNorm(width), SelfAttention(width, heads, width // heads, causal=True)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        out: Tensor = x + self.down(torch.relu(self.up(self.norm2(x))))
        return out


class TextTransformer(nn.Module):
    """Predicts the next token at each position. Shapes: ``(n, length)`` int64 -> ``(n, length, vocabulary)``."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocabulary, width), Positions(width, length)
        self.blocks = nn.ModuleList([CausalBlock(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.positions(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


def lora_text(
    vocabulary: int | None = None,
    length: int = 32,
    dataset: str = "tinyshakespeare",
    path: str | None = None,
    ranks: Sequence[int] = (0, 1, 2, 3, 4, 5, 6, 8, 12, 16),
    layers: int = 3,
    width: int = 48,
    heads: int = 4,
    alpha: float = 16.0,
    scale: str = "alpha/r_max",
    epochs: int = 20,
) -> SearchSpace:
    """A rank for every linear layer of a decoder that knows the first half of a text.

    The model is trained on that half at the first call (``epochs`` of 100 steps, about a minute) and kept in the cache.
    All of it is frozen; adapt it to the second half, rewritten, with the task ``adapted_text``.

    Args:
        vocabulary: of the task, which must have that of the text.
        length: positions of a sequence.
        dataset, path: the text, see :func:`~nasgraph.tasks.text.characters`.
        ranks: of every adapter, ascending; 0 is none.
        layers, width, heads: of the model.
        alpha, scale: see :class:`~nasgraph.transforms.Lora`.
        epochs: of the training before.

    Shapes: tokens ``(n, length)`` int64 -> logits ``(n, length, vocabulary)``.
    Size: ``len(ranks) ** (4 * layers + 1)``: 10,000,000,000,000 with the defaults.
    Raises: SpaceError: the task has another vocabulary. DataError: the text is missing.
    """
    task = adapted_text((0.0, 0.5), "same", dataset, path, length)
    known = task.sizes["vocabulary"]
    if vocabulary not in (None, known):
        raise SpaceError(f"lora_text: the text has {known} characters, the task {vocabulary}: give both the same text")
    sizes: dict[str, Any] = {"vocabulary": known, "length": length, "width": width, "layers": layers, "heads": heads}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TextTransformer(**sizes)
    settings = TrainSettings(epochs=epochs, lr=0.003, weight_decay=0.01, patience=epochs, optimizer="adamw")
    base = pretrained(model, task, settings)
    rank = Choice("rank.{name}", list(ranks), ordered=True)
    return SearchSpace.from_module(
        base,
        [Lora("(head|blocks.*.(enter|leave|up|down))", rank=rank, alpha=alpha, scale=scale)],
        inputs=task.batch(2, 0).inputs,
        dynamic={"tokens": {0: "batch"}},
        make=Op(TextTransformer, **sizes),
        name="lora_text",
    )
