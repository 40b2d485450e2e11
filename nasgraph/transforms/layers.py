"""Layers that transforms can rewrite: the plain classes, with places for what a transform adds.

A layer keeps its parameters, their names and its numbers; only its class changes (:func:`extended`). What is added
lies in three places, each a dict of modules by the name of the transform, run in the order in which they were added:

``on_input``
    reads the input, returns it changed: a quantiser of activations.
``on_weight``
    reads the weight, returns it changed: a mask, a quantiser of weights.
``beside``
    reads the layer's input as it came, returns what is added to the layer's output: an adapter.

A module of these places that has parameters of its own sets ``own_slices = True`` if a supernet should cut them by
that module's rules (default: leading entries) and not by those of the layer that it sits in.
"""

from __future__ import annotations

import sys
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nasgraph.errors import SpaceError

PLACES = ("on_input", "on_weight", "beside")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Transformed(nn.Module):
    """What all rewritten layers share."""

    weight: Tensor
    on_input: nn.ModuleDict
    on_weight: nn.ModuleDict
    beside: nn.ModuleDict

    def effective_weight(self) -> Tensor:
        """The weight that the layer works with: masked and quantised."""
        weight = self.weight
        for step in self.on_weight.values():
            weight = step(weight)
        return weight.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """The layer's own result with changed input and weight, and what stands beside it added."""
        read = x
        for step in self.on_input.values():
            read = step(read)
        out = self.run(read, self.effective_weight())
        for adapter in self.beside.values():
            out = out + adapter(x)
        return out

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """The plain layer with another weight."""
        raise NotImplementedError


class TransformedLinear(Transformed, nn.Linear):
    """``nn.Linear``, rewritten."""

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """See :class:`Transformed`."""
        return F.linear(x, weight, self.bias)


class TransformedConv1d(Transformed, nn.Conv1d):
    """``nn.Conv1d``, rewritten."""

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """See :class:`Transformed`."""
        out: Tensor = self._conv_forward(x, weight, self.bias)
        return out


class TransformedConv2d(Transformed, nn.Conv2d):
    """``nn.Conv2d``, rewritten."""

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """See :class:`Transformed`."""
        out: Tensor = self._conv_forward(x, weight, self.bias)
        return out


class TransformedConv3d(Transformed, nn.Conv3d):
    """``nn.Conv3d``, rewritten."""

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """See :class:`Transformed`."""
        out: Tensor = self._conv_forward(x, weight, self.bias)
        return out


class TransformedEmbedding(Transformed, nn.Embedding):
    """``nn.Embedding``, rewritten. ``max_norm`` would write into the weight, so it is refused."""

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """See :class:`Transformed`."""
        return F.embedding(x, weight, self.padding_idx, None, self.norm_type, self.scale_grad_by_freq, self.sparse)


# Exact classes only: a subclass may use its weight without calling itself, as nn.MultiheadAttention's projection does.
KINDS: dict[type[nn.Module], type[Transformed]] = {
    nn.Linear: TransformedLinear,
    nn.Conv1d: TransformedConv1d,
    nn.Conv2d: TransformedConv2d,
    nn.Conv3d: TransformedConv3d,
    nn.Embedding: TransformedEmbedding,
}


def extended(layer: nn.Module) -> Transformed:
    """``layer`` with places for transforms, in place: its class changes, its parameters and their names do not.

    Raises: TypeError: not one of ``KINDS``. SpaceError: an embedding with ``max_norm``.
    """
    if isinstance(layer, Transformed):
        return layer
    kind = KINDS.get(type(layer))
    if kind is None:
        raise TypeError(f"{type(layer).__name__} is not one of {', '.join(k.__name__ for k in KINDS)}")
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        raise SpaceError("an embedding with max_norm writes into its weight: make it without, or do not name it")
    layer.__class__ = kind
    for place in PLACES:
        layer.add_module(place, nn.ModuleDict())
    return layer  # type: ignore[return-value]


def plain(layer: nn.Module) -> nn.Module:
    """A rewritten layer whose places are empty gets its plain class back, in place."""
    if isinstance(layer, Transformed) and not any(len(getattr(layer, place)) for place in PLACES):
        layer.__class__ = next(known for known, kind in KINDS.items() if kind is type(layer))  # type: ignore[assignment]
        for place in PLACES:
            delattr(layer, place)
    return layer


def is_pyg_linear(layer: nn.Module) -> bool:
    """Whether ``layer`` is PyG's ``Linear``, which is not an ``nn.Linear``."""
    dense = sys.modules.get("torch_geometric.nn.dense.linear")
    return dense is not None and type(layer) is dense.Linear


def is_message_passing(layer: nn.Module) -> bool:
    """Whether ``layer`` is a convolution of PyG."""
    pyg = sys.modules.get("torch_geometric.nn.conv.message_passing")
    return pyg is not None and isinstance(layer, pyg.MessagePassing)


def plain_linears(module: nn.Module) -> nn.Module:
    """PyG's ``Linear`` layers become ``nn.Linear`` with the same parameters; the function stays the same."""
    found: list[Any] = [each for each in module.modules() if is_pyg_linear(each)]
    for layer in found:
        bias = layer.bias is not None
        linear = nn.Linear(layer.in_channels, layer.out_channels, bias, device="meta")
        linear.weight = layer.weight
        linear.bias = layer.bias
        for name, buffer in layer.named_buffers(recurse=False):  # what record_inputs has seen
            linear.register_buffer(name, buffer, persistent=name not in layer._non_persistent_buffers_set)
        module = swapped(module, layer, linear.train(layer.training))
    return module


def without_shortcuts(module: nn.Module) -> nn.Module:
    """PyTorch's encoder layers call what they hold: their fused kernel for evaluation reads weights past the layers."""
    for layer in module.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and rewritten_layers(layer):
            layer.activation_relu_or_gelu = 0  # what the layer looks at before it takes the kernel
    return module


def swapped(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """``root`` with ``new`` wherever ``old`` was; ``new`` itself if ``root`` was ``old``."""
    if old is new:
        return root
    if root is old:
        return new
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
    return root


def rewritten_layers(module: nn.Module) -> dict[str, Transformed]:
    """By their names, the layers that transforms have rewritten."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Transformed)}
