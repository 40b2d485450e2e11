"""The few functions and modules that spaces need beside torch and torch-geometric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


class KernelTransformConv2d(nn.Conv2d):
    """A convolution whose smaller kernels a supernet computes from the larger (Cai et al., Once-for-All, ICLR 2020).

    Of the sizes that the space offers, say 7, 5 and 3: ``w5 = T75 vec(centre5(w7))`` and ``w3 = T53 vec(centre3(w5))``,
    with matrices of 25 x 25 and 9 x 9 for each layer, shared by its channels, that are learned from the identity on.
    Everywhere else it is ``nn.Conv2d``, and that is what extraction gives. Kernels are square.
    """

    alone = nn.Conv2d

    @staticmethod
    def extra_stored(forms: Sequence[nn.Module]) -> dict[str, Tensor]:
        sizes = {form.kernel_size for form in forms if isinstance(form, nn.Conv2d)}
        if any(height != width for height, width in sizes):
            raise ValueError(f"KernelTransformConv2d has square kernels, not {sorted(sizes)}")
        sides = sorted((side for side, _ in sizes), reverse=True)
        return {f"transform_{a}_{b}": torch.eye(b * b) for a, b in zip(sides, sides[1:], strict=False)}

    def computed_rule(self, name: str, stored: Tensor, extra: Mapping[str, Tensor]) -> Tensor | None:
        if name != "weight":
            return None
        shape = tuple(self.weight.shape)
        channels = shape[:2] if stored.dim() == 4 else (self.groups, shape[0] // self.groups, shape[1])
        kernel = stored[tuple(slice(0, size) for size in channels)]
        for transform in extra.values():
            side = round(transform.shape[0] ** 0.5)
            if side < shape[-1]:
                break
            start = (kernel.shape[-1] - side) // 2
            centre = kernel[..., start : start + side, start : start + side]
            kernel = (centre.flatten(-2) @ transform.T).reshape(centre.shape)
        return kernel.reshape(shape)


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
    shapes = [tensor.shape for tensor in tensors if isinstance(tensor, Tensor)]
    if any(shape != shapes[0] for shape in shapes):  # compared, not hashed: torch.compile would fix the sizes
        raise ValueError(f"{function} needs tensors of one shape")
