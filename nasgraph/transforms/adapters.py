"""Adapters: small modules beside a layer whose output is added to the layer's. Each adds exactly 0 at the start.

What they add is linear in the input, so it can be merged: :meth:`Adapter.delta` is the same as a change of the layer's
weight. ``scale`` is stored with the adapter (a buffer), because it cannot be read off its shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Entries = Sequence[Tensor | None]  # positions along each axis; None: all
SEED = 20231024  # of VeRA's frozen matrices: the same in every process


class Adapter(nn.Module):
    """What all adapters share. ``zero`` names the parameter that is 0 at the start, so that nothing is added."""

    own_slices = True
    zero: str
    scale: Tensor

    def __init__(self, layer: nn.Module, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.rank, self.dropout = rank, dropout
        self.register_buffer("scale", torch.tensor(scale).to(layer.weight))  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"rank={self.rank}" + (f", dropout={self.dropout}" if self.dropout else "")

    def adds_nothing(self) -> bool:
        """Whether it adds 0 whatever comes in, as at the start."""
        return not bool(getattr(self, self.zero).any())

    def delta(self) -> Tensor:
        """What it adds to the layer's weight, in its shape."""
        raise NotImplementedError

    def dropped(self, x: Tensor) -> Tensor:
        """The input, with dropout in training."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def kept_rule(self, name: str, entries: Entries, shape: tuple[int, ...]) -> Entries:
        """Which entries of ``name`` belong to a weight that has ``entries`` left, by axis; of others the first are."""
        return ()

    def parameter(self, name: str, *shape: int) -> nn.Parameter:
        """A new parameter called ``name``, of zeros."""
        made = nn.Parameter(torch.zeros(shape).to(self.scale))
        self.register_parameter(name, made)
        return made


class LoraLinear(Adapter):
    """``scale * B A x`` (Hu et al., LoRA, ICLR 2022). A lower rank is the first rows of A and columns of B.

    Shapes: ``A`` ``(rank, in)``, uniform in +-1/sqrt(in); ``B`` ``(out, rank)``, zeros.
    """

    zero = "B"

    def __init__(self, layer: nn.Linear, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(layer, rank, scale, dropout)
        self.A = uniform_(self.parameter("A", rank, layer.in_features), layer.in_features)
        self.B = self.parameter("B", layer.out_features, rank)

    def kept_rule(self, name: str, entries: Entries, shape: tuple[int, ...]) -> Entries:
        """A reads the layer's inputs, B writes its outputs."""
        return (None, entries[1]) if name == "A" else (entries[0],)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(self.dropped(x), self.A), self.B) * self.scale

    def delta(self) -> Tensor:
        """``scale * B A``."""
        return self.B @ self.A * self.scale


class LoraConv(Adapter):
    """A convolution to ``rank`` channels like the layer's own, then one with a kernel of 1.

    Shapes: ``A`` ``(rank, in, *kernel)``; ``B`` ``(out, rank)``, zeros.
    """

    zero = "B"

    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(layer, rank, scale, dropout)
        inputs = layer.in_channels * math.prod(layer.kernel_size)
        self.A = uniform_(self.parameter("A", rank, layer.in_channels, *layer.kernel_size), inputs)
        self.B = self.parameter("B", layer.out_channels, rank)
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation

    def kept_rule(self, name: str, entries: Entries, shape: tuple[int, ...]) -> Entries:
        """A reads the layer's inputs, B writes its outputs."""
        return (None, entries[1]) if name == "A" else (entries[0],)

    def slice_rule(self, name: str, stored: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The first channels and the middle of the kernel, as a supernet cuts the layer's own weight."""
        starts = [0, 0, *((stored.shape[axis] - shape[axis]) // 2 for axis in range(2, len(shape)))]
        return stored[tuple(slice(start, start + size) for start, size in zip(starts, shape, strict=True))]

    def forward(self, x: Tensor) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.A.dim() - 3]
        inner = convolve(self.dropped(x), self.A, None, self.stride, self.padding, self.dilation)
        return convolve(inner, self.B.view(*self.B.shape, *[1] * (self.A.dim() - 2))) * self.scale

    def delta(self) -> Tensor:
        """``scale * B A``, A as a matrix ``(rank, in * kernel)``."""
        return (self.B @ self.A.flatten(1)).view(-1, *self.A.shape[1:]) * self.scale


class LoraEmbedding(Adapter):
    """``scale * B A`` of a one-hot input. The column of ``padding_idx`` in A is 0 and stays so.

    Shapes: ``A`` ``(rank, rows of the embedding)``; ``B`` ``(channels, rank)``, zeros.
    """

    zero = "B"

    def __init__(self, layer: nn.Embedding, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(layer, rank, scale)  # no dropout: the input is numbers of rows
        self.padding_idx = layer.padding_idx
        self.A = uniform_(self.parameter("A", rank, layer.num_embeddings), layer.num_embeddings)
        self.B = self.parameter("B", layer.embedding_dim, rank)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.A[:, self.padding_idx] = 0

    def kept_rule(self, name: str, entries: Entries, shape: tuple[int, ...]) -> Entries:
        """B writes the embedding's channels, which are the second axis of its weight."""
        return (entries[1],) if name == "B" else ()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.embedding(x, self.A.T, self.padding_idx), self.B) * self.scale

    def delta(self) -> Tensor:
        """``scale * (B A)^T``."""
        return (self.B @ self.A).T * self.scale


class VeraLinear(Adapter):
    """``diag(b) B diag(d) A x``, A and B random and frozen (Kopiczko et al., VeRA, ICLR 2024).

    A and B are functions of the sizes alone, so all layers of one size have the same, a lower rank has the first rows
    of A and columns of B, and no file holds them. There is no scale.

    Shapes: ``d`` ``(rank,)``, 0.1; ``b`` ``(out,)``, zeros.
    """

    zero = "b"
    A: Tensor
    B: Tensor

    def __init__(self, layer: nn.Linear, rank: int, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__(layer, rank, 1.0, dropout)
        first, second = frozen(rank, layer.in_features), frozen(rank, layer.out_features, rank).T
        self.register_buffer("A", first.to(self.scale), persistent=False)
        self.register_buffer("B", second.to(self.scale), persistent=False)
        self.d = self.parameter("d", rank)
        self.b = self.parameter("b", layer.out_features)
        nn.init.constant_(self.d, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(self.dropped(x), self.A) * self.d, self.B) * self.b

    def delta(self) -> Tensor:
        """``diag(b) B diag(d) A``."""
        return self.b[:, None] * ((self.B * self.d) @ self.A)


class MoraLinear(Adapter):
    """A square matrix between a sum over groups and a repetition (Jiang et al., MoRA, 2024): an update of high rank.

    ``side = floor(sqrt((in + out) * rank))``: as many numbers as LoRA of that rank. Input i belongs to group ``i mod
    side``, output o reads entry ``o mod side``. There is no scale. Ranks do not nest, so each has a matrix of its own.

    Shapes: ``M_<side>`` ``(side, side)``, zeros.
    """

    def __init__(self, layer: nn.Linear, rank: int, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__(layer, rank, 1.0, dropout)
        self.ins, self.outs = layer.in_features, layer.out_features
        self.side = min(math.isqrt((self.ins + self.outs) * rank), max(self.ins, self.outs))
        self.zero = f"M_{self.side}"
        self.parameter(self.zero, self.side, self.side)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.dropped(x), (0, -self.ins % self.side))
        groups = x.reshape(*x.shape[:-1], -1, self.side).sum(-2)
        out = F.linear(groups, getattr(self, self.zero))
        return torch.cat([out] * -(-self.outs // self.side), dim=-1)[..., : self.outs]

    def delta(self) -> Tensor:
        """The matrix, repeated along both axes."""
        square: Tensor = getattr(self, self.zero)
        return square.repeat(-(-self.outs // self.side), -(-self.ins // self.side))[: self.outs, : self.ins]


class MeloraLinear(Adapter):
    """``blocks`` small LoRAs, each from its part of the input to its part of the output (Ren et al., MELoRA, ACL 2024).

    The update is block-diagonal, of rank ``blocks * rank``, with the numbers of one LoRA of rank ``rank``.

    Shapes: ``A_<blocks>`` ``(blocks, rank, in / blocks)``; ``B_<blocks>`` ``(blocks, out / blocks, rank)``, zeros.
    Raises: ValueError: ``blocks`` does not divide both sizes of the layer.
    """

    def __init__(self, layer: nn.Linear, rank: int, scale: float, dropout: float = 0.0, blocks: int = 1) -> None:
        super().__init__(layer, rank, scale, dropout)
        ins, outs = layer.in_features, layer.out_features
        if ins % blocks or outs % blocks:
            raise ValueError(f"{blocks} blocks do not divide its {ins} inputs and {outs} outputs")
        self.blocks = blocks
        self.zero = f"B_{blocks}"
        uniform_(self.parameter(f"A_{blocks}", blocks, rank, ins // blocks), ins // blocks)
        self.parameter(self.zero, blocks, outs // blocks, rank)

    def forward(self, x: Tensor) -> Tensor:
        first, second = getattr(self, f"A_{self.blocks}"), getattr(self, self.zero)
        parts = self.dropped(x).reshape(*x.shape[:-1], self.blocks, -1)
        inner = torch.einsum("...ni,nri->...nr", parts, first)
        return torch.einsum("...nr,nor->...no", inner, second).flatten(-2) * self.scale

    def delta(self) -> Tensor:
        """``scale * B A`` of each block, on the diagonal."""
        first, second = getattr(self, f"A_{self.blocks}"), getattr(self, self.zero)
        return torch.block_diag(*(second @ first)) * self.scale  # type: ignore[no-untyped-call, no-any-return]


def uniform_(parameter: nn.Parameter, inputs: int) -> nn.Parameter:
    """LoRA's start of A: Kaiming-uniform as in ``nn.Linear``, so +-1/sqrt(inputs)."""
    with torch.no_grad():
        parameter.uniform_(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs))
    return parameter


def frozen(rows: int, columns: int, fan_in: int | None = None) -> Tensor:
    """``(rows, columns)`` random numbers; fewer rows or columns are the first ones of more, up to the bound.

    Uniform in +-1/sqrt(fan_in), by default ``columns``. Each row has a generator of its own.
    """
    lines = [torch.rand(columns, generator=torch.Generator().manual_seed(SEED + row)) for row in range(rows)]
    return (2 * torch.stack(lines) - 1) / math.sqrt(fan_in or columns)
