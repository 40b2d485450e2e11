"""ZiCo: gradients that are large and steady from one batch to the next."""

from __future__ import annotations

import torch
from torch import nn

from nasgraph.errors import NotFinite
from nasgraph.predictors.zero_cost.proxy import gradients, proxy
from nasgraph.tasks.batch import Batch


@proxy(needs_labels=True, source="Li et al., ICLR 2023")
def zico(model: nn.Module, batch: Batch, parts: int = 2) -> float:
    """Inverse coefficient of variation of gradients across batches (Li et al., ICLR 2023).

    ``sum_l log sum_{w in W_l} mean_b |g_b(w)| / std_b g_b(w)`` over trainable parameters W_l of two or more axes;
    g_b is the gradient of the mean loss of sub-batch b. The batch is dealt, in an order drawn from seed 0, into
    ``parts`` sub-batches (2 as published). Entries whose std is 0 are left out, and so is a W_l with none left.

    Returns: a real number; it grows with depth. Higher is better.
    Raises: NotFinite: NaN or infinite, or no entry varies. ValueError: fewer samples than parts, or parts < 2.
    """
    n = len(batch.target)
    if parts < 2 or n < parts:
        raise ValueError(f"zico needs at least 2 sub-batches of at least 1 sample, got parts={parts} of {n} samples")
    losses = batch.losses(batch.outputs(model))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(losses.device)
    by_part = [gradients(losses[order[b::parts]].mean(), model, retain_graph=True) for b in range(parts)]
    logs = []
    for layer in zip(*by_part, strict=True):
        g = torch.stack(layer).double()
        if g.dim() < 3:  # parts x a vector
            continue
        if not g.isfinite().all():
            raise NotFinite("zico: a gradient is NaN or infinite")
        std = g.std(0, correction=0)
        varies = std > 0
        if varies.any():
            logs.append(torch.log((g.abs().mean(0)[varies] / std[varies]).sum()))
    if not logs:
        raise NotFinite("zico: no weight has a gradient that varies between sub-batches")
    return float(sum(logs))
