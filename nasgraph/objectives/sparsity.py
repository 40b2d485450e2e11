"""Costs of networks with masks: what is left of the parameters, and of the arithmetic if zeros were skipped.

Exact counts on the untrained model. They are what a sparse format and a sparse kernel could reach; a dense kernel
stores and multiplies the zeros too (``params`` and ``flops``).
"""

from __future__ import annotations

from torch import Tensor, nn

from nasgraph.objectives.base import Candidate, Objective
from nasgraph.objectives.cost import count_flops, count_parameters
from nasgraph.transforms.layers import Transformed, rewritten_layers
from nasgraph.transforms.prune import kept_entries


def count_kept_parameters(model: nn.Module) -> int:
    """Number of parameters that are not masked. Scores of learned masks do not count: the mask is what is used."""
    total = count_parameters(model)
    for layer, zeros in _pruned(model):
        scores = sum(parameter.numel() for parameter in layer.on_weight["prune"].parameters())
        total -= zeros + scores
    return total


def count_kept_flops(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """:func:`~nasgraph.objectives.cost.count_flops` less 2 for each masked weight of each output position."""
    skipped = 0
    handles = []
    for layer, zeros in _pruned(model):
        if isinstance(layer, nn.Embedding):
            continue

        def count(module: nn.Module, given: tuple[Tensor, ...], out: Tensor, zeros: int = zeros) -> None:
            nonlocal skipped
            channels = module.weight.shape[0]  # type: ignore[index]
            skipped += 2 * zeros * (out.numel() // int(channels))

        handles.append(layer.register_forward_hook(count))
    try:
        total = count_flops(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return total - skipped


def _pruned(model: nn.Module) -> list[tuple[Transformed, int]]:
    """The layers with masks, and how many entries each masks now."""
    layers = [layer for layer in rewritten_layers(model).values() if "prune" in layer.on_weight]
    return [(layer, layer.weight.numel() - kept_entries(layer)) for layer in layers]


def _kept_params(candidate: Candidate) -> float:
    return float(count_kept_parameters(candidate.model))


def _kept_flops(candidate: Candidate) -> float:
    return float(count_kept_flops(candidate.model, candidate.task.inputs))


kept_params = Objective("kept_params", "minimize", _kept_params)
kept_flops = Objective("kept_flops", "minimize", _kept_flops)
