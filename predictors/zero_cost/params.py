"""Number of parameters: the baseline beside which every other proxy is shown."""

from __future__ import annotations

from torch import nn

from nasgraph.predictors.zero_cost.proxy import proxy
from nasgraph.tasks.batch import Batch


@proxy(needs_labels=False, source="a count")
def params(model: nn.Module, batch: Batch) -> float:
    """Number of parameters, trainable or not; a tensor that two layers share counts once. 0 is a valid count."""
    return float(sum(p.numel() for p in model.parameters()))
