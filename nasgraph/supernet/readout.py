"""Refit the last linear layer of a network in closed form: a score of a subnet that does not depend on a shared head.

A head that all architectures share fits none of them: it has seen each kind of features a few times only. The features
below it are scored better by the readout that suits them. Untrained weights are a special case, a training-free proxy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from nasgraph.space import Label
    from nasgraph.supernet.store import Supernet
    from nasgraph.tasks.batch import Batch
    from nasgraph.training.fewshot import FewShot

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the mean squared norm of the samples' features


def refit(model: nn.Module, batch: Batch) -> float:
    """Give the last linear layer of ``model`` the ridge regression of the classes on its inputs, in place.

    Targets are 1 for a sample's class and 0 for the others. Features are centred and scaled to variance 1 over the
    samples, a constant feature is left out. Of :data:`PENALTIES` the one of the smallest leave-one-out error is taken,

        e_i = (G y)_i / G_ii,    G = (X X^T + penalty I)^-1

    (Allen 1974), so no sample but those of ``batch`` is looked at. ``model`` runs in evaluation mode. Its new outputs
    are regressions, good for an argmax, not log-probabilities. Memory: ``(n, n)`` float64 for n samples.

    Returns: mean squared leave-one-out error.
    Raises: ValueError: the output of ``model`` is not that of a linear layer with a row for each row of the output.
    """
    layer, inputs = _last_linear(model, batch)
    x = (inputs if batch.index is None else inputs[batch.index]).double()
    if len(x) != len(batch.target):
        raise ValueError(f"the last linear layer has {len(x)} inputs for {len(batch.target)} samples")
    y = F.one_hot(batch.target, layer.weight.shape[0]).double()
    mean, spread, bias = x.mean(dim=0), x.std(dim=0, correction=0), y.mean(dim=0)
    scale = torch.where(spread > 1e-9 * spread.max(), 1 / spread.clamp(min=1e-300), 0.0)
    solution, error = ridge((x - mean) * scale, y - bias)
    weight = solution * scale[:, None]
    with torch.no_grad():
        layer.weight.copy_(weight.t())
        offset = (bias - mean @ weight).to(layer.weight)
        if layer.bias is None:
            layer.bias = nn.Parameter(offset)
        else:
            layer.bias.copy_(offset)
    return error


def ridge(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Ridge regression of ``y`` ``(n, c)`` on ``x`` ``(n, f)``, both centred; the penalty by leave-one-out error.

    Returns: weights ``(f, c)`` and the mean squared leave-one-out error (the means are not taken anew for each sample).
    """
    gram = x @ x.t()
    values, vectors = torch.linalg.eigh(gram)
    size = float(gram.diagonal().mean()) or 1.0
    found: list[tuple[float, Tensor]] = []
    for penalty in PENALTIES:
        inverse = (vectors / (values.clamp(min=0) + penalty * size)) @ vectors.t()
        dual = inverse @ y
        found.append((float((dual / inverse.diagonal()[:, None]).square().mean()), dual))
    error, dual = min(found, key=lambda pair: pair[0])
    return x.t() @ dual, error


def readout_accuracy(
    supernet: Supernet | FewShot,
    architecture: Mapping[str, Label],
    samples: int = 2048,
    split: str = "val",
    seed: int = 0,
) -> float:
    """Accuracy on ``split`` of a subnet whose last linear layer is refitted on ``samples`` training samples.

    Raises: ValueError: see :func:`refit`.
    """
    model = supernet.calibrated(architecture, samples)
    refit(model, supernet.task.batch(samples, seed))
    return supernet.task.score(model, split)["accuracy"]


def _last_linear(model: nn.Module, batch: Batch) -> tuple[Any, Tensor]:
    """The layer that gives the model's output, and its input on the batch."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    layers = [m for m in model.modules() if type(m).__name__ == "Linear" and getattr(m, "weight", None) is not None]
    hooks = [layer.register_forward_hook(lambda m, i, o: calls.append((m, i[0], o))) for layer in layers]
    try:
        model.eval()
        with torch.no_grad():
            outputs = model(*batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, inputs, output in reversed(calls):
        if output is outputs and inputs.dim() == 2:
            return layer, inputs
    raise ValueError("the model does not end in a linear layer, so there is no readout to refit")
