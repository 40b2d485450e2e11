"""A network for use instead of training: weights as they are after masks and quantisers, layers plain where possible.

Masks and weight quantisers are functions of the weight: their result takes the weight's place and they are dropped.
Activation quantisers read what comes in, so they stay; ``ranges.freeze_ranges`` fixes their ranges. Adapters stay, or
are merged.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nasgraph.errors import ExportError
from nasgraph.transforms.layers import Transformed, plain, rewritten_layers


@runtime_checkable
class Coded(Protocol):
    """A module in ``on_weight`` that says in how many bits its weight is: costs and exporters go by it.

    ``quantizers.WeightQuantizer`` is one. So is every module of one's own with these two; it must come last in
    ``on_weight``, and give ``(codes + offset) * scale`` in its ``forward``, exactly. ``offset`` is 0 if it has none.
    """

    bits: int

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What is to be stored of ``weight``, 16 bits at most.

        Returns: codes, int32, of the shape of ``weight``: ``-2^(bits-1)`` to ``2^(bits-1) - 1``, for 1 bit -1 or 1
            (0 where a mask left nothing); and their scale, of one entry, ``(out, 1, ...)``, or ``(out, groups)`` for
            runs of ``group_size`` neighbours, which is then an attribute too.
        """


@dataclass(frozen=True)
class StoredWeight:
    """What is to be stored for the weight of a rewritten layer.

    A quantised weight is ``(codes + offset) * scale``, exactly, where each run of ``group`` entries of a row has one
    scale. A row is an output channel, or all of the weight if there is one scale.

    Args:
        codes: int32, of the weight's shape; None: the weight is not quantised.
        scale: ``(rows, groups)``; the last group of a row may be shorter.
        bits: of a code; of a float where there are no codes.
        group: entries that share a scale.
        offset: 0, or 0.5 for nested bits.
        kept: bool, of the weight's shape: False where a mask made it 0; None: no mask.
    """

    codes: Tensor | None
    scale: Tensor | None
    bits: int
    group: int = 0
    offset: float = 0.0
    kept: Tensor | None = None

    @property
    def density(self) -> float:
        """The share of entries that the mask kept; 1.0 without a mask."""
        return 1.0 if self.kept is None else float(self.kept.float().mean())


@dataclass(frozen=True)
class Deployed:
    """A network for use, and by the names of its layers, what their weights are to be stored as.

    ``weights`` holds the layers whose weight a mask or a quantiser changed; the weights of all others are floats.
    """

    model: nn.Module
    weights: Mapping[str, StoredWeight]


def deploy(model: nn.Module, merge_adapters: bool = False) -> Deployed:
    """A copy of ``model`` in eval mode without masks and weight quantisers; the output stays the same bit for bit.

    A layer that nothing else stands at is of its plain class again. The weights do not train any more.

    Args:
        merge_adapters: add what adapters add to the weight they stand beside: a plain layer again, equal to rounding
            (1e-5). The sum is a float weight, so a quantised one with an adapter is quantised no longer.

    Raises: ExportError: an adapter that cannot be merged (it has no ``delta``); names the layer.
    """
    made = copy.deepcopy(model).eval()
    weights: dict[str, StoredWeight | None] = {}
    with torch.no_grad():
        for name, layer in rewritten_layers(made).items():
            weight = layer.effective_weight()
            if len(layer.on_weight):
                weights[name] = stored(layer)
                layer.on_weight.clear()
            if merge_adapters and len(layer.beside):
                weight = _merged(name, layer, weight)
                weights.pop(name, None)
            if weight is not layer.weight:
                layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
            plain(layer)
    return Deployed(made, {name: weight for name, weight in weights.items() if weight is not None})


def stored(layer: Transformed) -> StoredWeight | None:
    """What ``layer.effective_weight()`` is to be stored as; None: as any float weight.

    Codes need what quantises (:class:`Coded`) to come last.
    """
    weight, kept = layer.weight.detach(), None
    steps = list(layer.on_weight.items())
    for name, step in steps[:-1]:
        weight = step(weight)
        kept = weight != 0 if name == "prune" else kept
    if not steps:
        return None
    name, last = steps[-1]
    if not isinstance(last, Coded):
        weight = last(weight)
        kept = weight != 0 if name == "prune" else kept
        return None if kept is None else StoredWeight(None, None, 8 * weight.element_size(), kept=kept & (weight != 0))
    codes, scale = last.codes(weight)
    offset: float = getattr(last, "offset", 0.0)
    if kept is not None and (offset or bool(codes[~kept].any())):
        kept = None  # without a code for 0 the mask is undone
    rows = scale.detach().reshape(len(scale) if scale.dim() else 1, -1).contiguous()
    group: Any = weight.numel() // len(rows) if rows.shape[1] == 1 else last.group_size
    return StoredWeight(codes, rows, last.bits, group, offset, kept)


def _merged(name: str, layer: Transformed, weight: Tensor) -> Tensor:
    for adapter in layer.beside.values():
        delta: Any = getattr(adapter, "delta", None)
        if delta is None:
            raise ExportError(f"layer '{name}': {type(adapter).__name__} has no delta() to add to the weight")
        weight = weight + delta()
    layer.beside.clear()
    return weight
