"""Gradient norm: how steep is the loss at initialisation?"""

from __future__ import annotations

from torch import nn

from nasgraph.predictors.zero_cost.proxy import gradients, positive, proxy
from nasgraph.tasks.batch import Batch


@proxy(needs_labels=True, source="Abdelfattah et al., ICLR 2021")
def grad_norm(model: nn.Module, batch: Batch) -> float:
    """Euclidean norms of the loss gradient, summed over weights (Abdelfattah et al., ICLR 2021).

    ``sum_l || dL / dW_l ||_2`` over trainable parameters of two or more axes, L the mean cross-entropy of the batch.

    Returns: a positive number. Higher is better (on NAS-Bench-101 the published rank correlation is negative).
    Raises: NotFinite: NaN or infinite, or all zero.
    """
    norms = [g.double().norm() for g in gradients(batch.loss(model), model) if g.dim() >= 2]
    return positive("grad_norm", float(sum(norms)))
