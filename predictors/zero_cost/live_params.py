"""Number of parameters that the output depends on."""

from __future__ import annotations

import torch
from torch import nn

from nasgraph.predictors.zero_cost.proxy import proxy
from nasgraph.tasks.batch import Batch


@proxy(needs_labels=False, source="a count; as a baseline for GradSign: see docs/proxies.md")
def live_params(model: nn.Module, batch: Batch) -> float:
    """Number of parameters from which a path of differentiable operations leads to the output.

    Decided by reachability in autograd's graph, not by whether a gradient happens to be zero. Trainable or not, a
    shared tensor once. 0 is a valid count. Parameters of a branch that is computed and not used are left out.
    """
    everything = [p.requires_grad_() for p in model.parameters() if p.is_floating_point()]
    outputs = batch.outputs(model)
    if not everything or not outputs.requires_grad:
        return 0.0
    grads = torch.autograd.grad(outputs.sum(), everything, allow_unused=True)
    return float(sum(p.numel() for p, g in zip(everything, grads, strict=True) if g is not None))
