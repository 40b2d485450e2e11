"""Floating-point operations of one forward pass."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nasgraph.predictors.zero_cost.proxy import proxy
from nasgraph.tasks.batch import Batch


@proxy(needs_labels=False, source="a count, by torch.utils.flop_counter")
def flops(model: nn.Module, batch: Batch) -> float:
    """Floating-point operations of one forward pass of the batch's inputs (a multiply-add counts as 2).

    Counts matrix products, convolutions and attention. Message passing (gather, scatter) and element-wise work count
    as 0, so a graph layer without a weight is free here: read it beside the edge traffic. 0 is a valid count.
    As a proxy, more is taken to be better.
    """
    # As matrix products: the counter does not know the fused kernel of CPUs, which would count as 0.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*batch.inputs)
    return float(counter.get_total_flops())
