"""Jacobian covariance: does the untrained network respond differently to different samples?"""

from __future__ import annotations

import torch
from torch import nn

from nasgraph.errors import NotFinite
from nasgraph.predictors.zero_cost.proxy import cast_to, proxy
from nasgraph.tasks.batch import Batch

EPS = 1e-5


@proxy(needs_labels=False, source="Mellor et al. 2020, arXiv 2006.04647v1")
def jacov(model: nn.Module, batch: Batch) -> float:
    """Spectrum of the correlations between the samples' input gradients (Mellor et al. 2020, first version).

    ``- sum_i [ log(v_i + eps) + 1 / (v_i + eps) ]``, ``eps = 1e-5``, v the eigenvalues of ``corr(J)`` ``(n, n)``;
    ``J_i = d(sum of all samples' outputs) / dx_i``, x_i the row of the float input that belongs to sample i. Where
    samples share neighbours, as nodes do, ``J_i`` also holds what x_i does to the other samples. In float64.
    A constant ``J_i`` (a sample that reaches no live unit) correlates with nothing: it costs what an exact copy of
    another sample costs, an eigenvalue of 0.

    Returns: a real number, at most -n for exactly uncorrelated samples. Higher is better.
    Raises: NotFinite: NaN, or the input gradients of all samples are constant.
    ValueError: fewer than 2 samples, or no float input has a row for each row of the output.
    """
    if len(batch.target) < 2:
        raise ValueError("jacov compares samples: it needs at least 2")
    model, batch = cast_to(torch.float64, model, batch)
    inputs = tuple(x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in batch.inputs)
    outputs = model(*inputs)
    sources = [x for x in inputs if x.requires_grad and x.dim() >= 2 and len(x) == len(outputs)]
    if not sources:
        raise ValueError("jacov needs a float input with a row for each row of the output")
    chosen = outputs if batch.index is None else outputs[batch.index]
    if not chosen.requires_grad:
        raise NotFinite("jacov: the output does not depend on the inputs")
    grads = torch.autograd.grad(chosen.sum(), sources, materialize_grads=True)
    jacobian = torch.cat([g.flatten(1) for g in grads], 1)
    jacobian = jacobian if batch.index is None else jacobian[batch.index]
    centred = jacobian - jacobian.mean(1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    if not length.isfinite().all() or not (length > 0).any():
        raise NotFinite("jacov: input gradients are NaN, or constant for every sample")
    unit = torch.where(length > 0, centred / length, 0.0)
    v = torch.linalg.eigvalsh(unit @ unit.T).clamp(min=0)
    return -float((torch.log(v + EPS) + 1 / (v + EPS)).sum())
