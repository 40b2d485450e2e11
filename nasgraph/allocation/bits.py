"""Which layer gets how many bits: tables of what each width costs and spoils, and the best choice within budgets.

Tables are ``{layer: {bits: number}}``. :func:`hessian_sensitivity` is HAWQ's (Dong et al., HAWQ-V2, NeurIPS 2020),
:func:`output_sensitivity` measures the network's output; :func:`allocate` is the integer program of Yao et al.,
HAWQ-V3, ICML 2021, solved exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nasgraph.allocation.knapsack import least
from nasgraph.errors import ConfigError, did_you_mean
from nasgraph.tasks.batch import Batch
from nasgraph.transforms.base import matches
from nasgraph.transforms.layers import KINDS, plain_linears
from nasgraph.transforms.quantize import Quantize

Table = Mapping[str, Mapping[int, float]]  # layer -> bits -> number


@dataclass(frozen=True)
class Budget:
    """The costs of all layers together may be at most ``limit``, in the user's own unit: bits, BOPs, ms."""

    name: str
    costs: Table
    limit: float


@dataclass(frozen=True)
class Allocation:
    """Bits of each layer, the sum of their sensitivities, and the sum of costs for each budget by its name."""

    bits: dict[str, int]
    sensitivity: float
    costs: dict[str, float]


def allocate(sensitivity: Table, budgets: Sequence[Budget], tied: Sequence[Sequence[str]] = ()) -> Allocation:
    """The bits of each layer with the least sum of sensitivities within all budgets: a multiple-choice knapsack.

    Args:
        sensitivity: each layer's widths and what they spoil.
        budgets: for each a cost of every layer at every width.
        tied: groups of layers that must have the same bits, such as those that read the same tensor.

    Raises: ConfigError: tables that do not fit together, a number that is not finite, or a budget that no allocation
        meets; names the least that one does.
    """
    groups = _groups(sensitivity, tied)
    options = [(group, bits) for group in groups for bits in sensitivity[group[0]]]
    spoilt = _sums(sensitivity, options, "sensitivity")
    costs = {budget.name: _sums(budget.costs, options, f"budget '{budget.name}'") for budget in budgets}
    limits = {budget.name: budget.limit for budget in budgets}
    chosen = least(spoilt, _places(options), costs, limits)
    if chosen is None:
        raise ConfigError(_infeasible(costs, limits, options))
    bits = {layer: options[i][1] for i in chosen for layer in options[i][0]}
    return Allocation(
        {layer: bits[layer] for layer in sensitivity},
        float(spoilt[chosen].sum()),
        {name: float(cost[chosen].sum()) for name, cost in costs.items()},
    )


Options = list[tuple[tuple[str, ...], int]]  # a group of layers and their bits


def _groups(sensitivity: Table, tied: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    group_of: dict[str, tuple[str, ...]] = {layer: (layer,) for layer in sensitivity}
    for layers in tied:
        for layer in layers:
            if layer not in sensitivity:
                raise ConfigError(f"tied layers: '{layer}' has no sensitivities.{did_you_mean(layer, sensitivity)}")
            if set(sensitivity[layer]) != set(sensitivity[layers[0]]):
                raise ConfigError(f"tied layers: '{layer}' and '{layers[0]}' have different widths to choose from")
        joined = tuple(dict.fromkeys(each for layer in layers for each in group_of[layer]))
        group_of |= dict.fromkeys(joined, joined)
    return list(dict.fromkeys(group_of.values()))


def _places(options: Options) -> list[int]:
    """For each option the number of its group."""
    numbers: dict[tuple[str, ...], int] = {}
    return [numbers.setdefault(layers, len(numbers)) for layers, _ in options]


def _sums(table: Table, options: Options, what: str) -> np.ndarray:
    """Of each option the sum over its layers."""
    for layer, bits in ((layer, bits) for layers, bits in options for layer in layers):
        if layer not in table or bits not in table[layer]:
            raise ConfigError(f"{what} has no number for layer '{layer}' at {bits} bits")
        if not np.isfinite(table[layer][bits]):
            raise ConfigError(f"{what}: layer '{layer}' at {bits} bits is {table[layer][bits]}, not a finite number")
    return np.array([sum(table[layer][bits] for layer in layers) for layers, bits in options])


def _infeasible(costs: Mapping[str, np.ndarray], limits: Mapping[str, float], options: Options) -> str:
    for name, cost in costs.items():
        cheapest: dict[tuple[str, ...], float] = {}
        for (layers, _), number in zip(options, cost, strict=True):
            cheapest[layers] = min(number, cheapest.get(layers, number))
        smallest = sum(cheapest.values())
        if smallest > limits[name]:
            return f"budget '{name}' is {limits[name]:g}: the smallest that an allocation meets is {smallest:g}"
    for name, cost in costs.items():
        others = {other: numbers for other, numbers in costs.items() if other != name}
        chosen = least(cost, _places(options), others, limits)
        if chosen is not None:
            found = f"the smallest '{name}' that an allocation meets is {cost[chosen].sum():g}"
            return f"no allocation meets all budgets: within the others, {found}, and its budget is {limits[name]:g}"
    return f"no allocation meets any {len(costs) - 1} of the {len(costs)} budgets together: raise more than one"


def layers_of(model: nn.Module, where: str = "*") -> dict[str, nn.Module]:
    """By their names, the layers of ``model`` at ``where`` whose weights :class:`Quantize` can quantise.

    Raises: ConfigError: there is none.
    """
    found = {name: layer for name, layer in model.named_modules() if type(layer) in KINDS and matches(where, name)}
    if not found:
        raise ConfigError(f"no layer of {type(model).__name__} at '{where}' can be quantised")
    return found


def weight_costs(model: nn.Module, widths: Sequence[int], where: str = "*") -> dict[str, dict[int, float]]:
    """Bits of each layer's weight at each width, scales left out."""
    model = plain_linears(copy.deepcopy(model))
    return {
        name: {bits: float(layer.weight.numel() * bits) for bits in widths}  # type: ignore[operator]
        for name, layer in layers_of(model, where).items()
    }


def hessian_traces(
    model: nn.Module, batches: Sequence[Batch], probes: int = 16, seed: int = 0, where: str = "*"
) -> dict[str, float]:
    """Mean of the diagonal of the loss's Hessian, for each layer's weight: Hutchinson's estimate.

    ``v . (H v)`` has the trace of H as its mean for random signs v; one product ``H v`` serves all layers. The loss is
    the mean over ``batches``, the model runs in evaluation mode.
    """
    model = plain_linears(copy.deepcopy(model)).eval()
    weights: dict[str, Tensor] = {name: layer.weight for name, layer in layers_of(model, where).items()}  # type: ignore[misc]
    for parameter in weights.values():
        parameter.requires_grad_()
    totals = dict.fromkeys(weights, 0.0)
    for batch in batches:
        generator = torch.Generator().manual_seed(seed)  # the same probes for each batch: H of the mean, times v
        first = torch.autograd.grad(batch.loss(model), list(weights.values()), create_graph=True)
        for _ in range(probes):
            signs = [torch.randint(0, 2, w.shape, generator=generator).to(w) * 2 - 1 for w in weights.values()]
            dot = sum(((g * v).sum() for g, v in zip(first, signs, strict=True)), torch.zeros(()))
            second = torch.autograd.grad(dot, list(weights.values()), retain_graph=True, allow_unused=True)
            for name, v, product in zip(weights, signs, second, strict=True):
                totals[name] += 0.0 if product is None else float((v * product).sum())
    return {name: total / (probes * len(batches) * weights[name].numel()) for name, total in totals.items()}


def hessian_sensitivity(
    model: nn.Module, traces: Mapping[str, float], widths: Sequence[int], quantize: Quantize | None = None
) -> dict[str, dict[int, float]]:
    """HAWQ's table: mean Hessian trace times ``|Q(w) - w|^2``. A negative trace, no minimum, counts as 0.

    ``quantize`` says how weights are quantised (its bits are not used); default: ``Quantize(method="minmax")``.
    """
    model = plain_linears(copy.deepcopy(model))
    table: dict[str, dict[int, float]] = {}
    for name, trace in traces.items():
        weight: Tensor = model.get_submodule(name).weight.detach()  # type: ignore[operator]
        errors = {bits: (rounded(weight, bits, quantize) - weight).square().sum() for bits in widths}
        table[name] = {bits: max(trace, 0.0) * float(error) for bits, error in errors.items()}
    return table


@torch.no_grad()
def output_sensitivity(
    model: nn.Module,
    batches: Sequence[Batch],
    widths: Sequence[int],
    quantize: Quantize | None = None,
    where: str = "*",
) -> dict[str, dict[int, float]]:
    """The squared error of the network's outputs, relative to them, when one layer alone is quantised.

    ``quantize``: as for :func:`hessian_sensitivity`. The model runs in evaluation mode.
    """
    model = plain_linears(copy.deepcopy(model)).eval()
    outputs = [batch.outputs(model) for batch in batches]
    size = sum(float(out.square().sum()) for out in outputs) or 1.0
    table: dict[str, dict[int, float]] = {}
    for name, layer in layers_of(model, where).items():
        weight: Tensor = layer.weight  # type: ignore[assignment]
        whole = weight.clone()
        table[name] = {}
        for bits in widths:
            weight.copy_(rounded(whole, bits, quantize))
            after = [batch.outputs(model) for batch in batches]
            wrong = sum(float((a - b).square().sum()) for a, b in zip(after, outputs, strict=True))
            table[name][bits] = wrong / size
        weight.copy_(whole)
    return table


@torch.no_grad()
def rounded(weight: Tensor, bits: int, quantize: Quantize | None = None) -> Tensor:
    """``weight`` with ``bits`` bits; itself with 32."""
    kind = quantize or Quantize(method="minmax")
    settings = {field: getattr(kind, field) for field in ("method", "per", "group_size", "nested_bits")}
    return weight if bits == 32 else Quantize(weight_bits=bits, **settings).weight_quantizer(weight)(weight)
