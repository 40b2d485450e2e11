"""The few functions and modules that spaces need beside torch and torch-geometric."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Zero(nn.Module):
    """No connection: zeros of the input's shape. Simplification removes it wherever it is added to something."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class SparseDropout(nn.Dropout):
    """Dropout of features that are mostly zero: draws for the other entries only, so it is quicker on a CPU.

    The distribution is that of ``nn.Dropout``, since a zero stays zero either way. It is ``nn.Dropout`` itself for
    features that are not on a CPU, that need a gradient, or of which more than a quarter are not zero.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not input.is_cpu or input.requires_grad:
            return super().forward(input)
        where = input.nonzero(as_tuple=True)
        if 4 * len(where[0]) > input.numel():
            return super().forward(input)
        return torch.zeros_like(input).index_put(where, F.dropout(input[where], self.p))


def add(first: Tensor, *rest: Tensor) -> Tensor:
    """Sum of one or more tensors of one shape. Raises: ValueError: their shapes differ."""
    _one_shape("add", first, *rest)
    for other in rest:
        first = first + other
    return first


def concat(*tensors: Tensor) -> Tensor:
    """Tensors ``(..., c_i)`` side by side: ``(..., sum c_i)``."""
    return torch.cat(tensors, dim=-1)


def maximum(first: Tensor, *rest: Tensor) -> Tensor:
    """Element-wise maximum of one or more tensors of one shape. Raises: ValueError: their shapes differ."""
    _one_shape("maximum", first, *rest)
    for other in rest:
        first = torch.maximum(first, other)
    return first


def _one_shape(function: str, *tensors: Tensor) -> None:
    """No broadcasting: simplification relies on it. What is traced has no shape yet and is checked by the builder."""
    shapes = {tuple(tensor.shape) for tensor in tensors if isinstance(tensor, Tensor)}
    if len(shapes) > 1:
        raise ValueError(f"{function} needs tensors of one shape")
