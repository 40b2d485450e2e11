"""SynFlow: how much signal do the weights let through, whatever the data?"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nasgraph.errors import NotFinite
from nasgraph.predictors.zero_cost.proxy import cast_to, gradients, proxy, trainable, without_new_adapters
from nasgraph.tasks.batch import Batch


@proxy(needs_labels=False, source="Tanaka et al., NeurIPS 2020")
def synflow(model: nn.Module, batch: Batch) -> float:
    """Log of the synaptic flow, ``log sum_k | theta_k * dR / dtheta_k |`` (Tanaka et al., NeurIPS 2020).

    R is the sum of the samples' outputs when every parameter is replaced by its absolute value and every float input by
    ones of the same shape (inputs of integers, such as ``edge_index``, stay). Sums run over trainable parameters.
    Normalisation layers, of torch and of PyG, are bypassed: they pass their input on unchanged. In float64.

    Returns: natural logarithm, so it may be negative. Higher is better. Sum aggregation makes it grow with degree.
    Raises: NotFinite: NaN in the weights, nothing flows (log 0), or the product over layers left float64's range.
    ValueError: an adapter with B = 0, as it starts.
    """
    without_new_adapters("synflow", model)
    model, batch = cast_to(torch.float64, model, batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    for module in model.modules():
        if _is_norm(module):
            module.forward = _pass  # the model is a copy
    inputs = tuple(torch.ones_like(x) if x.is_floating_point() else x for x in batch.inputs)
    flow = Batch(inputs, batch.target, batch.index).outputs(model).sum()
    grads = gradients(flow, model)
    total = sum((p.detach() * g).abs().sum() for p, g in zip(trainable(model), grads, strict=True))
    if float(total) == 0.0:
        raise NotFinite("synflow: nothing flows from the inputs through the weights to the output")
    return float(torch.log(torch.as_tensor(total)))


synflow.check = partial(without_new_adapters, "synflow")  # type: ignore[attr-defined]  # a screen asks it at the start


def _pass(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a normalisation layer: torch and PyG keep theirs in modules of their own."""
    torch_norms = ("torch.nn.modules.batchnorm", "torch.nn.modules.normalization", "torch.nn.modules.instancenorm")
    return type(module).__module__.startswith((*torch_norms, "torch_geometric.nn.norm."))
