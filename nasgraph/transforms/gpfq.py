"""Post-training quantisation of a trained model, layer by layer, on a few inputs: nearest levels, and GPFQ.

GPFQ (Lybrand & Saab, A Greedy Algorithm for Quantizing Neural Networks, JMLR 2021) picks the levels of a neuron one
weight after the other, each so that it makes up for what the weights before it, and the layers before it, got wrong.
With the columns ``X_t`` of the layer's input in the float model and ``Y_t`` in the quantised one, from ``u = 0`` on::

    u += w_t X_t;  q_t = nearest level to <u, Y_t> / |Y_t|^2;  u -= q_t Y_t
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasgraph.errors import ConfigError, did_you_mean
from nasgraph.transforms.base import matches
from nasgraph.transforms.layers import Transformed, extended, plain_linears
from nasgraph.transforms.quantizers import SMALLEST, WeightQuantizer, code_range

RANGE = 1.16  # of the levels, times the greatest weight: the constant of the authors' code
METHODS = ("gpfq", "rtn")

Batches = Sequence[Sequence[Any]]  # the inputs of calls: model(*inputs)


class FixedScale(WeightQuantizer):
    """A weight whose scale is known: what post-training quantisation leaves behind."""

    scale: Tensor

    def __init__(self, scale: Tensor, bits: int, per: str = "tensor") -> None:
        super().__init__(bits, per)
        self.register_buffer("scale", scale)

    def levels(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`WeightQuantizer`."""
        through = weight / self.scale
        codes = through.detach().round().clamp(self.low, self.high)
        return codes + (through - through.detach()), self.scale


def paper_step(rows: Tensor, bits: int, per: str = "tensor") -> Tensor:
    """The step of the authors' code: 1.16 times the greatest ``|w|`` of a neuron, mean over neurons, by ``2^(b-1)``.

    Shapes: rows ``(neurons, inputs)`` -> ``(1, 1)``, or ``(neurons, 1)`` for ``per="channel"``, without the mean.
    """
    greatest = rows.abs().amax(1, keepdim=True)
    greatest = greatest.mean().reshape(1, 1) if per == "tensor" else greatest
    step: Tensor = RANGE * greatest / 2 ** (bits - 1)
    return step.clamp_min(SMALLEST)


def nearest_step(rows: Tensor, bits: int, per: str = "tensor", tries: int = 100) -> Tensor:
    """Of ``tries`` steps that with which the nearest levels have the least squared error.

    Shapes: as :func:`paper_step`.
    """
    low, high = code_range(bits)
    whole = rows.reshape(1, -1) if per == "tensor" else rows
    most = whole.abs().amax(1, keepdim=True).clamp_min(SMALLEST) / high
    steps = most * torch.linspace(0.02, 1.2, tries, dtype=rows.dtype)  # (rows, tries)
    errors = [(nearest(whole, step[:, None], low, high) * step[:, None] - whole).square().sum(1) for step in steps.T]
    return steps.gather(1, torch.stack(errors, 1).argmin(1, keepdim=True))


STEPS: dict[str, Callable[[Tensor, int, str], Tensor]] = {"paper": paper_step, "nearest": nearest_step}


def nearest(rows: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Codes of the levels nearest to ``rows`` ``(neurons, inputs)``, as floats."""
    return (rows / step).round().clamp(low, high)


def gpfq(rows: Tensor, cross: Tensor, own: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Codes of the levels that GPFQ picks for each neuron, as floats.

    The inputs are needed only as products: with u written out, ``<u, Y_t> = sum_{s<=t} w_s <X_s, Y_t> - sum_{s<t} q_s
    <Y_s, Y_t>``. A weight whose input is always 0 takes the nearest level.

    Args:
        rows: the float weights ``w``, ``(neurons, inputs)``.
        cross: ``X.T @ Y``, ``(inputs, inputs)``; ``X`` and ``Y`` are ``(samples, inputs)``.
        own: ``Y.T @ Y``, ``(inputs, inputs)``.
        step: ``(1, 1)`` or ``(neurons, 1)``; levels are ``step`` times the integers from ``low`` to ``high``.
    """
    codes, quantised = torch.zeros_like(rows), torch.zeros_like(rows)
    for t in range(rows.shape[1]):
        target = rows[:, t]
        if own[t, t] > 0:
            target = (rows[:, : t + 1] @ cross[: t + 1, t] - quantised[:, :t] @ own[:t, t]) / own[t, t]
        codes[:, t] = nearest(target[:, None], step, low, high)[:, 0]
        quantised[:, t] = codes[:, t] * step[:, 0]
    return codes


def columns(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """What the neurons of ``layer`` read, for each of its groups: ``(samples, inputs)``; a patch is a sample."""
    if isinstance(layer, Transformed):
        for step in layer.on_input.values():
            x = step(x)
    if not isinstance(layer, nn.Conv2d):
        return [x.reshape(-1, x.shape[-1])]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    patches = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    return list(patches.transpose(1, 2).flatten(0, 1).chunk(layer.groups, 1))


def quantize_model(
    model: nn.Module,
    batches: Batches,
    bits: int | Mapping[str, int],
    *,
    method: str = "gpfq",
    per: str = "tensor",
    step: str = "paper",
    where: str = "*",
) -> nn.Module:
    """A copy of ``model`` with the weights of its linear and 2d-convolution layers quantised, in order of execution.

    Each layer is fitted to its inputs in the float model and in the model whose layers before it are quantised already.
    The copy's weights lie on the levels, and each such layer has a :class:`FixedScale` that knows them.

    Args:
        batches: inputs of calls, ``model(*inputs)``; the model runs in evaluation mode. No labels are needed.
        bits: 2 (three levels) to 8; or by the names of layers, as :func:`nasgraph.allocation.bits.allocate`
            gives them: a layer that is not named, or has 16 or 32 bits, stays as it is.
        method: ``"gpfq"``, or ``"rtn"``, round to nearest on the same levels.
        per: one step for a whole ``"tensor"`` or for each ``"channel"``.
        step: ``"paper"`` (:func:`paper_step`) or ``"nearest"`` (:func:`nearest_step`).
        where: pattern of the names of the layers.

    Raises: ConfigError: an unknown setting, no layer that runs, or a layer whose weight is already rewritten.
    """
    for name, value, known in (("method", method, METHODS), ("step", step, STEPS), ("per", per, ("tensor", "channel"))):
        if value not in known:
            raise ConfigError(f"quantize_model: {name} is {value!r}: give {' or '.join(known)}")
    named = bits if isinstance(bits, Mapping) else {}
    for width in named.values() if isinstance(bits, Mapping) else [bits]:
        if width not in range(2, 9) and not (named and width in (16, 32)):
            raise ConfigError(f"quantize_model: bits is {width!r}: give 2 to 8")
    exact = plain_linears(copy.deepcopy(model)).eval()
    rounded = copy.deepcopy(exact)
    layers = executed(exact, batches, where)
    for name in named:
        if name not in layers:
            near = did_you_mean(name, layers)
            raise ConfigError(f"quantize_model: no layer that runs is called '{name}'.{near}")
    for name in layers:
        width = named.get(name, 32) if isinstance(bits, Mapping) else bits
        if width > 8:
            continue
        layer = rounded.get_submodule(name)
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        rows = layer.weight.detach().double().flatten(1)  # type: ignore[operator]
        scale = STEPS[step](rows, width, per)
        low, high = code_range(width)
        if method == "rtn":
            codes = nearest(rows, scale, low, high)
        else:
            products = input_products(exact, rounded, name, batches)
            scales = scale.expand(len(rows), 1).chunk(groups)
            parts = zip(rows.chunk(groups), products, scales, strict=True)
            codes = torch.cat([gpfq(part, cross, own, its, low, high) for part, (cross, own), its in parts])
        fix(layer, codes, scale, width, per)
    return rounded.train(model.training)


def fix(layer: nn.Module, codes: Tensor, scale: Tensor, bits: int, per: str) -> None:
    """Give ``layer`` the weight ``codes * scale`` and a quantiser that knows the scale."""
    found = extended(layer)
    weight = found.weight
    kept = scale.to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 1))
    with torch.no_grad():
        weight.copy_(codes.to(weight.dtype).reshape(weight.shape) * kept)
    found.on_weight["quantize"] = FixedScale(kept, bits, per)


def executed(model: nn.Module, batches: Batches, where: str = "*") -> list[str]:
    """The names of the linear and 2d-convolution layers at ``where``, in the order of their first call.

    Raises: ConfigError: there is none, or one whose weight a transform has rewritten.
    """
    names: dict[str, nn.Module] = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and matches(where, name)
    }
    order: list[str] = []
    with torch.no_grad(), watched(names, lambda name, *_: order.append(name)):
        model(*batches[0])
    for name in order:
        layer = names[name]
        if isinstance(layer, Transformed) and len(layer.on_weight):
            raise ConfigError(f"quantize_model: the weight of '{name}' is already rewritten: start from float weights")
    if not order:
        raise ConfigError(f"quantize_model: no linear or 2d-convolution layer at '{where}' runs")
    return list(dict.fromkeys(order))


@torch.no_grad()
def input_products(exact: nn.Module, rounded: nn.Module, name: str, batches: Batches) -> list[tuple[Tensor, Tensor]]:
    """``(X.T @ Y, Y.T @ Y)`` in float64 for each group of layer ``name``; X and Y: what it reads in the two models."""
    sums: list[tuple[Tensor, Tensor]] = []
    for inputs in batches:
        seen: list[list[list[Tensor]]] = []
        for model in (exact, rounded):
            calls: list[list[Tensor]] = []
            layer = model.get_submodule(name)

            def keep(_: str, layer: nn.Module, x: Tensor, out: Tensor, calls: list[list[Tensor]] = calls) -> None:
                calls.append([part.double() for part in columns(layer, x)])

            with watched({name: layer}, keep):
                model(*inputs)
            seen.append(calls)
        for left, right in zip(*seen, strict=True):
            products = [(x.T @ y, y.T @ y) for x, y in zip(left, right, strict=True)]
            sums = [(a + c, b + d) for (a, b), (c, d) in zip(sums, products, strict=True)] if sums else products
    return sums


@torch.no_grad()
def output_errors(
    exact: nn.Module, rounded: nn.Module, batches: Iterable[Sequence[Any]], names: list[str]
) -> list[float]:
    """Of each layer in ``names``: ``|out - out'| / |out|`` (Frobenius) of its outputs in the two models over batches.

    Both models run in evaluation mode, each from its own inputs on; so errors of the layers before count.
    """
    totals = {name: [0.0, 0.0] for name in names}
    was = [model.training for model in (exact, rounded)]
    for inputs in batches:
        outs: list[dict[str, list[Tensor]]] = []
        for model in (exact, rounded):
            found: dict[str, list[Tensor]] = {name: [] for name in names}

            def keep(name: str, layer: nn.Module, x: Tensor, out: Tensor, found: Any = found) -> None:
                found[name].append(out.double())

            with watched({name: model.get_submodule(name) for name in names}, keep):
                model.eval()(*inputs)
            outs.append(found)
        for name in names:
            for out, other in zip(outs[0][name], outs[1][name], strict=True):
                totals[name][0] += float((out - other).square().sum())
                totals[name][1] += float(out.square().sum())
    exact.train(was[0]), rounded.train(was[1])
    return [(wrong / whole) ** 0.5 if whole else 0.0 for wrong, whole in totals.values()]


@contextmanager
def watched(layers: dict[str, nn.Module], see: Callable[[str, nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``see(name, layer, input, output)`` at each call of one of ``layers``."""

    def hook(name: str) -> Callable[..., None]:
        return lambda layer, args, out: see(name, layer, args[0], out)

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
