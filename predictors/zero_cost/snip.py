"""SNIP: how much would the loss change if a connection were cut?"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from nasgraph.predictors.zero_cost.proxy import gradients, positive, proxy, trainable, without_new_adapters
from nasgraph.tasks.batch import Batch


@proxy(needs_labels=True, source="Lee, Ajanthan & Torr, ICLR 2019")
def snip(model: nn.Module, batch: Batch) -> float:
    """Connection sensitivity, summed (Lee et al., ICLR 2019; as a proxy: Abdelfattah et al., ICLR 2021).

    ``sum_k | theta_k * dL / dtheta_k |`` over all trainable parameters, L the mean cross-entropy of the batch.

    Returns: a positive number. Higher is better.
    Raises: NotFinite: NaN or infinite, or zero for every parameter. ValueError: an adapter with B = 0, as it starts.
    """
    without_new_adapters("snip", model)
    grads = gradients(batch.loss(model), model)
    total = sum((p.detach() * g).abs().sum(dtype=torch.float64) for p, g in zip(trainable(model), grads, strict=True))
    return positive("snip", float(total))


snip.check = partial(without_new_adapters, "snip")  # type: ignore[attr-defined]  # a screen asks it at the start
