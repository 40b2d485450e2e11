"""Transformers of elastic depth, width, heads and feed-forward size: an encoder that classifies, a causal decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasgraph.errors import SpaceError
from nasgraph.ops import add
from nasgraph.space import Call, Choice, Node, Op, SearchSpace


class Positions(nn.Module):
    """Learned positions, added (Gehring et al., ICML 2017). Shapes: ``(n, length, embed_dim)`` -> the same."""

    def __init__(self, embed_dim: int, length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, embed_dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al., NeurIPS 2017). A head has ``head_width`` channels, whatever comes in.

    One matrix makes queries, keys and values, ``(3, heads, head_width)`` rows of it in this order. So in a supernet a
    form with fewer heads uses the first heads of each third: :meth:`slice_rule`.

    Args:
        causal: a position sees itself and those before.

    Shapes: ``(n, length, embed_dim)`` -> the same.
    """

    def __init__(self, embed_dim: int, heads: int, head_width: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.head_width, self.causal = heads, head_width, causal
        self.enter = nn.Linear(embed_dim, 3 * heads * head_width)
        self.leave = nn.Linear(heads * head_width, embed_dim)

    def slice_rule(self, name: str, stored: Tensor, shape: Sequence[int]) -> Tensor:
        """Whole leading heads, and leading channels of what comes in and goes out."""
        if name.startswith("enter."):
            stored = stored.view(3, -1, self.head_width, *stored.shape[1:])[:, : self.heads].flatten(0, 2)
        return stored[tuple(slice(0, size) for size in shape)]

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        query, key, value = self.enter(x).view(n, length, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        out: Tensor = self.leave(mixed.transpose(1, 2).reshape(n, length, self.heads * self.head_width))
        return out


class MeanOverPositions(nn.Module):
    """Shapes: ``(n, length, channels)`` -> ``(n, channels)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


def transformer_encoder(
    features: int = 8,
    classes: int = 10,
    length: int = 8,
    layers: int = 4,
    widths: Sequence[int] = (16, 32, 64),
    heads: Sequence[int] = (1, 2, 4),
    ratios: Sequence[int] = (1, 2, 4),
    head_width: int = 16,
    dropout: float = 0.0,
) -> SearchSpace:
    """Transformer encoders that classify sequences of vectors: pre-norm blocks, mean over positions, a linear head.

    Args:
        features: channels of each position's vector.
        classes: number of classes.
        length: positions of a sequence.
        layers: the largest depth, at least 1.
        widths: channels of the residual stream, ascending; one choice for all layers.
        heads: attention heads, ascending; a choice of each layer.
        ratios: hidden units of the feed-forward network divided by the width, ascending; a choice of each layer.
        head_width: channels of a head.
        dropout: of what each attention and each feed-forward network adds.

    Shapes: x ``(n, length, features)`` float32 -> logits ``(n, classes)``.
    Size: 22,140 architectures with the defaults: ``widths * sum over depth d of (heads * ratios) ** d``.
    Raises: SpaceError: no layer, or a size below 1.
    """
    _check(features=features, classes=classes, length=length, layers=layers, head_width=head_width)
    space = SearchSpace("transformer_encoder")
    example = torch.randn(2, length, features, generator=torch.Generator().manual_seed(0))
    x = space.input("x", example, {0: "batch"})
    width = Choice("width", list(widths), ordered=True)
    h = space.add("embed", Op(nn.Linear, out_features=width), x)
    h = _blocks(space, h, width, length, layers, heads, ratios, head_width, dropout, causal=False)
    h = space.add("pool", Op(MeanOverPositions), h)
    space.output(space.add("head", Op(nn.Linear, out_features=classes), h))
    return space


def transformer_decoder(
    vocabulary: int = 65,
    length: int = 64,
    layers: int = 4,
    widths: Sequence[int] = (32, 64, 128),
    heads: Sequence[int] = (1, 2, 4),
    ratios: Sequence[int] = (1, 2, 4),
    head_width: int = 16,
    dropout: float = 0.0,
) -> SearchSpace:
    """Causal transformer decoders that predict the next token at each position: pre-norm blocks, a linear head.

    A text shorter than ``length`` is padded behind with anything: what comes later changes no output before it.

    Args: as of :func:`transformer_encoder`; ``vocabulary``: number of different tokens.

    Shapes: tokens ``(n, length)`` int64 -> logits ``(n, length, vocabulary)``.
    Size: 22,140 architectures with the defaults.
    Raises: SpaceError: no layer, or a size below 1.
    """
    _check(vocabulary=vocabulary, length=length, layers=layers, head_width=head_width)
    space = SearchSpace("transformer_decoder")
    example = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    tokens = space.input("tokens", example, {0: "batch"})
    width = Choice("width", list(widths), ordered=True)
    h = space.add("embed", Op(nn.Embedding, num_embeddings=vocabulary, embedding_dim=width), tokens)
    h = _blocks(space, h, width, length, layers, heads, ratios, head_width, dropout, causal=True)
    space.output(space.add("head", Op(nn.Linear, out_features=vocabulary), h))
    return space


def _blocks(
    space: SearchSpace,
    h: Node,
    width: Choice,
    length: int,
    layers: int,
    heads: Sequence[int],
    ratios: Sequence[int],
    head_width: int,
    dropout: float,
    causal: bool,
) -> Node:
    """Positions, pre-norm blocks (Xiong et al., ICML 2020) and the norm that reads the block of the chosen depth."""
    h = space.add("positions", Op(Positions, length=length), h)
    ends: dict[str, Node] = {}
    for i in range(1, layers + 1):
        count = Choice(f"heads{i}", list(heads), ordered=True)
        ratio = Choice(f"ratio{i}", list(ratios), ordered=True)
        attention = Op(SelfAttention, heads=count, head_width=head_width, causal=causal)
        branch = space.add(f"attend{i}", attention, space.add(f"attend{i}_norm", Op(nn.LayerNorm), h))
        h = space.add(f"attend{i}_sum", Call(add), h, space.add(f"attend{i}_drop", Op(nn.Dropout, p=dropout), branch))
        branch = space.add(f"feed{i}_norm", Op(nn.LayerNorm), h)
        branch = space.add(f"feed{i}_up", Op(nn.Linear, out_features=width * ratio), branch)
        branch = space.add(f"feed{i}_act", Op(nn.GELU), branch)
        branch = space.add(f"feed{i}_down", Op(nn.Linear, out_features=width), branch)
        h = space.add(f"feed{i}_sum", Call(add), h, space.add(f"feed{i}_drop", Op(nn.Dropout, p=dropout), branch))
        ends[str(i)] = h
    return space.add("norm", Op(nn.LayerNorm), Choice("depth", ends))


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise SpaceError(f"transformer: {name} is {size!r}, it must be a whole number of at least 1")
