"""Condition number of the neural tangent kernel: how evenly does the untrained network learn its samples?"""

from __future__ import annotations

import torch
from torch import nn

from nasgraph.errors import NotFinite
from nasgraph.predictors.zero_cost.per_sample import logit_sums, per_sample_gradients
from nasgraph.predictors.zero_cost.proxy import cast_to, proxy
from nasgraph.tasks.batch import Batch


@proxy(needs_labels=False, source="Chen, Gong & Wang (TE-NAS), ICLR 2021")
def ntk_cond(model: nn.Module, batch: Batch) -> float:
    """Negative log of the condition number of the neural tangent kernel (Chen et al., TE-NAS, ICLR 2021).

    ``-log(lambda_max / lambda_min)`` of ``K = J J^T`` ``(n, n)``, ``J_i = d(sum_c f_c(x_i)) / dtheta``: f are the
    logits, theta all trainable parameters. In float64 throughout. lambda_min is raised to ``n * 2.2e-16 * lambda_max``
    (the rounding error of an eigenvalue), so a singular kernel scores ``log(n * 2.2e-16)``.

    Memory: 8 bytes * n * m for m parameters.
    Returns: a number <= 0. Higher is better (0: all samples are learnt equally fast).
    Raises: NotFinite: NaN, or all gradients are zero. ValueError: fewer than 2 samples.
    """
    n = len(batch.target)
    if n < 2:
        raise ValueError("ntk_cond compares samples: it needs at least 2")
    model, batch = cast_to(torch.float64, model, batch)
    jacobian = torch.cat(list(per_sample_gradients(model, batch, logit_sums)))
    values = torch.linalg.eigvalsh(jacobian @ jacobian.T)
    largest = values[-1]
    if not largest > 0:
        raise NotFinite("ntk_cond: the outputs depend on no parameter, or a gradient is NaN")
    smallest = torch.maximum(values[0], n * torch.finfo(torch.float64).eps * largest)
    return float(torch.log(smallest / largest))
