"""A network for use instead of training: weights as they are after masks and quantisers, layers plain where possible.

Masks and weight quantisers are functions of the weight: their result takes the weight's place and they are dropped.
Activation quantisers read what comes in, so they stay; ``ranges.freeze_ranges`` fixes their ranges. Adapters stay, or
are merged.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nasgraph.errors import ExportError
from nasgraph.transforms.layers import Transformed, plain, rewritten_layers
from nasgraph.transforms.quantizers import WeightQuantizer


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

    Codes need the quantiser to come last.
    """
    weight, kept = layer.weight.detach(), None
    steps = list(layer.on_weight.items())
    for name, step in steps[:-1]:
        weight = step(weight)
        kept = weight != 0 if name == "prune" else kept
    if not steps:
        return None
    name, last = steps[-1]
    if not isinstance(last, WeightQuantizer):
        weight = last(weight)
        kept = weight != 0 if name == "prune" else kept
        return None if kept is None else StoredWeight(None, None, 8 * weight.element_size(), kept=kept & (weight != 0))
    codes, scale = last.codes(weight)
    if kept is not None and (last.offset or bool(codes[~kept].any())):
        kept = None  # without a code for 0 the mask is undone
    rows = scale.detach().reshape(scale.shape[0], -1).contiguous()
    group = last.group_size if last.per == "group" else weight.numel() // len(rows)
    return StoredWeight(codes, rows, last.bits, group, last.offset, kept)


def _merged(name: str, layer: Transformed, weight: Tensor) -> Tensor:
    for adapter in layer.beside.values():
        delta: Any = getattr(adapter, "delta", None)
        if delta is None:
            raise ExportError(f"layer '{name}': {type(adapter).__name__} has no delta() to add to the weight")
        weight = weight + delta()
    layer.beside.clear()
    return weight
