"""Signal-to-noise ratio of the outputs: how far do transforms move what the network says?"""

from __future__ import annotations

import copy

import torch
from torch import nn

from nasgraph.predictors.zero_cost.proxy import proxy
from nasgraph.predictors.zero_cost.sqnr import decibels
from nasgraph.tasks.batch import Batch
from nasgraph.transforms.layers import PLACES, plain, rewritten_layers


@proxy(needs_labels=False, source="Nagel et al., ICML 2020 (output error)")
def output_sqnr(model: nn.Module, batch: Batch) -> float:
    """``10 log10(||y||^2 / ||y - y'||^2)``: y' the model's outputs, y those of the same parameters without transforms.

    Without what quantises, masks or adapts, that is; factorised layers stay.

    Returns: dB, higher is better, at most 150: the outputs are equal.
    Raises: NotFinite: an output is, or y is 0.
    """
    with torch.no_grad():
        given = batch.logits(model).double()
        wanted = batch.logits(without_transforms(model)).double()
        return decibels(float((given - wanted).square().sum() / wanted.square().sum()))


def without_transforms(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose layers have their plain classes and parameters only."""
    found = copy.deepcopy(model)
    for layer in rewritten_layers(found).values():
        for place in PLACES:
            getattr(layer, place).clear()
        plain(layer)
    for module in found.modules():
        if hasattr(module, "on_aggregate"):  # of a convolution
            module.on_aggregate = nn.Identity()
    return found
