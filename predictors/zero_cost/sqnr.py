"""Signal-to-quantisation-noise ratio: how much of the weights do quantisers and masks leave?"""

from __future__ import annotations

import math

from torch import nn

from nasgraph.predictors.zero_cost.proxy import proxy
from nasgraph.tasks.batch import Batch
from nasgraph.transforms.damage import noise, weighted_layers
from nasgraph.transforms.low_rank import Factorised, effective

MOST = 150.0  # dB: about the precision of float32


@proxy(needs_labels=False, source="Widrow & Kollar, Quantization Noise, 2008")
def sqnr(model: nn.Module, batch: Batch) -> float:
    """Mean over layers of ``10 log10(||w||^2 / ||w - Q(w)||^2)``, w a layer's weight and Q(w) what it works with.

    A layer that nothing changes counts as 150 dB, the most that any has. Factors of a layer are layers of their own:
    what was lost when it was split cannot be seen in them.

    Returns: dB, higher is better; 150 for a model without quantisers and masks. A uniform quantiser gains 6 dB a bit.
    Raises: NotFinite: a weight is.
    """
    found = []
    for _, layer in weighted_layers(model):
        for part in (layer.first, layer.second) if isinstance(layer, Factorised) else (layer,):
            found.append(decibels(noise(part.weight.detach(), effective(part).detach())))  # type: ignore[operator]
    return sum(found) / len(found) if found else MOST


def decibels(share: float) -> float:
    """``-10 log10`` of a share of noise, at most 150."""
    return -10.0 * math.log10(max(share, 10.0 ** (-MOST / 10.0))) if share == share else share
