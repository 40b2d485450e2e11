"""Quantisation as a choice: layers that compute with the numbers that few bits can hold, and learn so.

The weight stays a float parameter; each forward pass rounds it to ``codes * scale`` (fake quantisation), and the
gradient passes the rounding as if it were not there (straight-through, Bengio et al. 2013). ``docs/quantisation.md``.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasgraph.errors import SpaceError
from nasgraph.transforms.base import Transform, each_option, matches
from nasgraph.transforms.layers import extended

FLOAT = (None, 32)  # bits that mean: left as it is
SMALLEST = 1e-8  # of a scale: a weight of zeros has one too
TWN_THRESHOLD = 0.7  # times the mean of |w| (Li et al., Ternary Weight Networks, 2016, eq. 6)


def round_through(x: Tensor) -> Tensor:
    """``x`` rounded, exactly; its gradient is that of ``x``."""
    return x.round().detach() + (x - x.detach())


def scaled_gradient(x: Tensor, factor: Tensor | float) -> Tensor:
    """``x``, exactly; its gradient is multiplied by ``factor``."""
    return x.detach() + (x - x.detach()) * factor


def code_range(bits: int) -> tuple[int, int]:
    """The least and the greatest code: {-1, 1} for 1 bit, {-1, 0, 1} for 2, all ``2 ** bits`` integers above."""
    return (-1, 1) if bits <= 2 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


class WeightQuantizer(nn.Module):
    """A weight in few bits. A subclass says which ``levels`` and by which scale.

    ``weight == (codes + offset) * scale`` after quantisation, exactly; ``offset`` is 0 but for nested bits.

    Args:
        bits: of a code. A binary code is -1 or 1; it is 0 for a weight that is exactly 0: one that a mask took out.
        per: what shares a scale: the whole ``"tensor"``, a ``"channel"`` (axis 0), or a ``"group"`` of ``group_size``
            consecutive entries of a channel; the last group of a channel may be smaller.

    Shapes: ``weight`` of ``d`` axes with ``out`` channels; scale ``(1,) * d``, ``(out, 1, ...)`` of ``d`` axes, or
    ``(out, groups)``.
    """

    offset: float = 0.0

    def __init__(self, bits: int, per: str = "tensor", group_size: int = 64) -> None:
        super().__init__()
        self.bits, self.per, self.group_size = bits, per, group_size
        self.low, self.high = code_range(bits)

    def levels(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes as floats that carry the gradient, and the scale."""
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        """The quantised weight, of the same shape."""
        codes, scale = self.levels(weight)
        return (codes + self.offset) * self.spread(scale, weight)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What is to be stored: codes of the shape of ``weight``, int32, and the scale."""
        codes, scale = self.levels(weight)
        return codes.to(torch.int32), scale

    def spread(self, scale: Tensor, weight: Tensor) -> Tensor:
        """``scale`` so that it can be multiplied with ``weight``."""
        if self.per != "group":
            return scale
        members = weight[0].numel()
        return scale.repeat_interleave(self.group_size, 1)[:, :members].reshape(weight.shape)

    def grouped(self, weight: Tensor) -> Tensor:
        """The entries that share a scale along the last axis, zeros behind them in the last group of a channel."""
        if self.per == "tensor":
            return weight.reshape(1, 1, -1)
        if self.per == "channel":
            return weight.reshape(weight.shape[0], 1, -1)
        rows = weight.reshape(weight.shape[0], -1)
        padded = F.pad(rows, (0, -rows.shape[1] % self.group_size))
        return padded.reshape(weight.shape[0], -1, self.group_size)

    def one_each(self, values: Tensor, weight: Tensor) -> Tensor:
        """``values`` ``(rows, groups)`` of :meth:`grouped` entries in the shape of a scale."""
        return values if self.per == "group" else values.reshape(-1, *[1] * (weight.dim() - 1))

    def mean_magnitude(self, weight: Tensor) -> Tensor:
        """The mean of ``|weight|`` over the entries that share a scale and are not 0, as those that a mask took out."""
        entries = self.grouped(weight.abs())
        return self.one_each(entries.sum(-1) / entries.count_nonzero(-1).clamp_min(1), weight)


class MinMax(WeightQuantizer):
    """Scales computed from the weight as it is sliced; no parameter. The gradient takes them for constants.

    Above 2 bits: the smallest step that clips nothing. Binary: sign(w) times the mean of ``|w|`` (Rastegari et al.,
    XNOR-Net, 2016). Ternary: 0 below a threshold, the mean of ``|w|`` of the rest above (Li et al. 2016).
    """

    def levels(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`WeightQuantizer`."""
        fixed = weight.detach()
        if self.bits == 1:
            scale = self.mean_magnitude(fixed).clamp_min(SMALLEST)
            codes = fixed.sign()
        elif self.bits == 2:
            large = (fixed.abs() > self.spread(TWN_THRESHOLD * self.mean_magnitude(fixed), fixed)).to(weight.dtype)
            scale = self.mean_magnitude(fixed * large).clamp_min(SMALLEST)
            codes = fixed.sign() * large
        else:
            entries = self.grouped(fixed)
            step = torch.maximum(entries.amax(-1) / self.high, entries.amin(-1) / self.low)
            scale = self.one_each(step, fixed).clamp_min(SMALLEST)
            codes = (fixed / self.spread(scale, fixed)).round().clamp(self.low, self.high)
        through = weight / self.spread(scale, fixed)
        return codes + (through - through.detach()), scale


class LearnedStep(WeightQuantizer):
    """The step is a parameter called ``step_<bits>`` (Esser et al., Learned Step Size Quantization, ICLR 2020).

    ``codes = round(clip(w / s, low, high))`` (eq. 1); the gradient of ``s`` is ``round(w / s) - w / s`` inside of the
    range and the bound outside (eq. 3), times ``1 / sqrt(N * high)`` for ``N`` weights that share it (section 2.2); the
    start is ``2 * mean|w| / sqrt(high)`` (section 2.1). Each width has a step of its own. A step for each channel is
    called ``step_<bits>_channel``, and a supernet cuts it as it cuts the rows of the weight.
    """

    def __init__(self, weight: Tensor, bits: int, per: str = "tensor", group_size: int = 64) -> None:
        super().__init__(bits, per, group_size)
        more = {"tensor": "", "channel": "_channel", "group": f"_group{group_size}"}[per]
        self.name = f"step_{bits}{more}"
        self.own_slices = per == "tensor"
        start = 2 * self.mean_magnitude(weight.detach()) / math.sqrt(self.high)
        self.register_parameter(self.name, nn.Parameter(start.clamp_min(SMALLEST)))

    def levels(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`WeightQuantizer`."""
        step: Tensor = getattr(self, self.name)  # a supernet puts a tensor in the parameter's place
        factor = 1 / math.sqrt(weight.numel() / step.numel() * self.high)
        scale = scaled_gradient(step, factor).abs().clamp_min(SMALLEST)
        return round_through((weight / self.spread(scale, weight)).clamp(self.low, self.high)), scale


class NestedBits(WeightQuantizer):
    """The codes of ``bits`` bits are the leading bits of the codes of ``largest`` bits: one weight for all widths.

    A code ``c`` stands for the middle of its cell, ``(c + 1/2) * scale``, at every width: leading bits alone would
    round everything down. So there is no zero. The cells of ``2 ** bits`` codes cover ``[-max|w|, max|w|]``.
    """

    offset = 0.5

    def __init__(self, bits: int, largest: int = 8, per: str = "tensor", group_size: int = 64) -> None:
        super().__init__(bits, per, group_size)
        self.largest = largest
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def levels(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`WeightQuantizer`. The scale is a constant to the gradient."""
        fixed = weight.detach()
        half = 2 ** (self.largest - 1)
        finest = self.one_each(self.grouped(fixed.abs()).amax(-1), fixed).clamp_min(SMALLEST) / half
        whole = (fixed / self.spread(finest, fixed)).floor().clamp(-half, half - 1)
        dropped = 2 ** (self.largest - self.bits)
        scale = finest * dropped
        through = weight / self.spread(scale, fixed)
        return (whole / dropped).floor() + (through - through.detach()), scale


class ActivationQuantizer(nn.Module):
    """A tensor of activations in ``bits`` bits, one scale for all of it.

    Its range is that of the present tensor, until it is frozen (:func:`freeze_ranges`). Codes are unsigned if the range
    has nothing below 0, else signed. With ``learned`` the step is a parameter, ``step_<bits>``, as for
    :class:`LearnedStep`; it starts as for a normal distribution (:func:`start_steps` starts it from inputs).
    """

    own_slices = True

    def __init__(self, bits: int, learned: bool = False) -> None:
        super().__init__()
        self.bits, self.name = bits, f"step_{bits}" if learned else ""
        if learned:
            start = 2 * math.sqrt(2 / math.pi) / math.sqrt(2 ** (bits - 1) - 1)
            self.register_parameter(self.name, nn.Parameter(torch.tensor([start])))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape, quantised."""
        low, high, scale = self.grid(x)
        return round_through((x / scale).clamp(low, high)) * scale

    @torch.no_grad()
    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of the shape of ``x``, int32, and the scale: their product is the quantised ``x``."""
        low, high, scale = self.grid(x)
        return (x / scale).clamp(low, high).round().to(torch.int32), scale

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The least code, the greatest code and the scale for ``x``."""
        lowest, highest = self.range(x)
        signed = lowest < 0
        half = 2 ** (self.bits - 1)
        low = torch.where(signed, -half, 0).to(x.dtype)
        high = torch.where(signed, half - 1, 2 * half - 1).to(x.dtype)
        if self.name:
            features = x.numel() / x.shape[0] if x.dim() else 1
            step = scaled_gradient(getattr(self, self.name), (features * high) ** -0.5)
            return low, high, step.abs().clamp_min(SMALLEST)
        return low, high, torch.maximum(highest / high, lowest / -half).clamp_min(SMALLEST)

    def range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the greatest entry: the frozen ones, or those of ``x``."""
        if "lowest" in self._buffers:
            return self.get_buffer("lowest"), self.get_buffer("highest")
        return x.detach().min(), x.detach().max()  # amin without axes does not export to ONNX

    def freeze(self, lowest: Tensor, highest: Tensor) -> None:
        """Take ``[lowest, highest]`` for the range of every tensor from now on. They become buffers."""
        self.register_buffer("lowest", lowest.detach().clone())
        self.register_buffer("highest", highest.detach().clone())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}lowest" in state_dict:
            self.freeze(state_dict[f"{prefix}lowest"], state_dict[f"{prefix}highest"])
        super()._load_from_state_dict(state_dict, prefix, *args)


class QuantizedAggregation(nn.Module):
    """What a PyG convolution's class inherits from so that its ``aggregate`` is quantised.

    After aggregation: the range grows with the degree (Tailor et al., Degree-Quant, ICLR 2021).
    """

    on_aggregate: nn.Module

    def aggregate(self, *args: Any, **kwargs: Any) -> Tensor:
        """The convolution's own aggregation, quantised."""
        out: Tensor = self.on_aggregate(super().aggregate(*args, **kwargs))  # type: ignore[misc]
        return out


@functools.cache
def with_quantized_aggregation(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``kind``, a PyG convolution, that quantises what it aggregates."""
    return type(f"Quantized{kind.__name__}", (QuantizedAggregation, kind), {"__module__": kind.__module__})


def message_passing(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and layer of each PyG convolution in ``module``, itself included."""
    pyg = sys.modules.get("torch_geometric.nn.conv.message_passing")
    return [] if pyg is None else [(n, m) for n, m in module.named_modules() if isinstance(m, pyg.MessagePassing)]


@dataclass(frozen=True)
class Quantize(Transform):
    """Weights, inputs and aggregated messages of layers in few bits.

    Args:
        weight_bits: None or 32: float. 16 and 3 to 8: codes ``-2^(b-1) .. 2^(b-1)-1`` times a scale. 2: ternary, 1:
            binary.
        activation_bits: of the layer's input; None or 32: float; 4 to 16. Not of an embedding, which reads indices.
        aggregation_bits: of what a PyG convolution has aggregated; None or 32: float; 4 to 16.
        method: of the weights. ``"lsq"``: a learned step (:class:`LearnedStep`; binary has none, as in ``"minmax"``);
            ``"minmax"``: computed from the weight (:class:`MinMax`); ``"nested"``: leading bits of the codes of
            ``nested_bits`` bits (:class:`NestedBits`), for 2 bits and more, 4 levels with 2.
        per: what shares a scale of weights: ``"tensor"``, ``"channel"`` or ``"group"`` of ``group_size`` entries.
        activations: ``"dynamic"``: the range of the present tensor; ``"lsq"``: a learned step.

    Raises: SpaceError: a setting out of range, at declaration; nothing to rewrite, when the network is built.
    """

    weight_bits: Any = None
    activation_bits: Any = None
    aggregation_bits: Any = None
    method: Any = "lsq"
    per: Any = "tensor"
    group_size: Any = 64
    activations: Any = "dynamic"
    nested_bits: Any = 8

    order: ClassVar[int] = 2
    apart: ClassVar[tuple[tuple[str, ...], ...]] = (  # settings of three things that do not concern each other
        ("weight_bits", "method", "per", "group_size", "nested_bits"),
        ("activation_bits", "activations"),
        ("aggregation_bits", "activations"),
    )

    def __post_init__(self) -> None:
        one_of(self, "weight_bits", (*FLOAT, 16, *range(1, 9)), "give 1 (binary), 2 (ternary), 3 to 8, 16 or None")
        for field in ("activation_bits", "aggregation_bits"):
            one_of(self, field, (*FLOAT, *range(4, 17)), "give 4 to 16, or None for float")
        one_of(self, "method", ("lsq", "minmax", "nested"), "give 'lsq', 'minmax' or 'nested'")
        one_of(self, "per", ("tensor", "channel", "group"), "give 'tensor', 'channel' or 'group'")
        one_of(self, "activations", ("dynamic", "lsq"), "give 'dynamic' or 'lsq'")
        one_of(self, "nested_bits", range(2, 17), "give 2 to 16, the largest of the nested widths")
        self.check("group_size", lambda size: type(size) is int and size > 1, "give the entries of a group, 2 or more")
        if "nested" in each_option(self.method):
            most = min(each_option(self.nested_bits), default=16)
            fits = f"nested bits are 2 to {most}: raise nested_bits, or take another method for binary"
            self.check("weight_bits", lambda bits: bits in FLOAT or 2 <= bits <= most, fits)

    def neutral(self) -> bool:
        """See :class:`Transform`."""
        return all(bits in FLOAT for bits in (self.weight_bits, self.activation_bits, self.aggregation_bits))

    def can_rewrite(self, layer: nn.Module) -> bool:
        """See :class:`Transform`."""
        weights_stay = self.weight_bits in FLOAT
        return super().can_rewrite(layer) and not (weights_stay and isinstance(layer, nn.Embedding))

    def apply(self, module: nn.Module) -> nn.Module:
        """See :class:`Transform`. Aggregation is a matter of a whole convolution: its class changes, in place."""
        if not (self.weight_bits in FLOAT and self.activation_bits in FLOAT):
            module = super().apply(module)
        if self.aggregation_bits not in FLOAT:
            found = [layer for name, layer in message_passing(module) if matches(self.where, name)]
            if not found:
                there = ", ".join(name or "the operation itself" for name, _ in message_passing(module)) or "none"
                raise SpaceError(
                    f"Quantize: aggregation_bits needs a PyG convolution (MessagePassing) at '{self.where}' of "
                    f"{type(module).__name__}; there is: {there}"
                )
            for layer in found:
                if isinstance(layer, QuantizedAggregation):
                    raise SpaceError(f"Quantize: the aggregation of {type(layer).__name__} is quantised twice")
                layer.__class__ = with_quantized_aggregation(type(layer))  # type: ignore[arg-type]
                layer.fuse = False  # type: ignore[assignment]  # a fused product would pass by `aggregate`
                layer.add_module("on_aggregate", ActivationQuantizer(self.aggregation_bits, self.activations == "lsq"))
        return module

    def rewrite(self, layer: nn.Module) -> nn.Module:
        """See :class:`Transform`."""
        found = extended(layer)
        if self.weight_bits not in FLOAT:
            if self.method == "nested" and "prune" in found.on_weight:
                raise SpaceError(
                    "Quantize: nested codes have none for 0, which a pruned weight needs: use lsq or minmax"
                )
            once(found.on_weight, layer)["quantize"] = self.weight_quantizer(found.weight)
        if self.activation_bits not in FLOAT and not isinstance(layer, nn.Embedding):
            once(found.on_input, layer)["quantize"] = ActivationQuantizer(
                self.activation_bits, self.activations == "lsq"
            )
        return found

    def weight_quantizer(self, weight: Tensor) -> WeightQuantizer:
        """What quantises ``weight``."""
        if self.method == "nested":
            return NestedBits(self.weight_bits, self.nested_bits, self.per, self.group_size)
        if self.method == "minmax" or self.weight_bits == 1:
            return MinMax(self.weight_bits, self.per, self.group_size)
        return LearnedStep(weight, self.weight_bits, self.per, self.group_size)


def one_of(transform: Transform, field: str, values: Iterable[Any], way_out: str) -> None:
    """Every value that ``field`` may take must be one of ``values``. Raises: SpaceError: one is not."""
    known = [(type(value), value) for value in values]
    transform.check(field, lambda value: (type(value), value) in known, way_out)


def once(place: nn.ModuleDict, layer: nn.Module) -> nn.ModuleDict:
    """``place``, where no quantiser may be yet. Raises: SpaceError: there is one."""
    if "quantize" in place:
        raise SpaceError(f"Quantize: {layer} is quantised twice: let the patterns of `where` not overlap")
    return place


@torch.no_grad()
def observed(model: nn.Module, batches: Iterable[Sequence[Any]]) -> dict[ActivationQuantizer, Tensor]:
    """Of each quantiser of activations, over ``model(*inputs)`` for all batches: least, greatest, mean magnitude."""
    seen: dict[ActivationQuantizer, list[Tensor]] = {}

    def look(quantizer: nn.Module, args: tuple[Tensor]) -> None:
        x = args[0].detach()
        seen.setdefault(quantizer, []).append(torch.stack([x.amin(), x.amax(), x.abs().mean()]))  # type: ignore[arg-type]

    parts = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    hooks = [part.register_forward_pre_hook(look) for part in parts]
    training = model.training
    model.eval()
    try:
        for inputs in batches:
            model(*inputs)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    found = {part: torch.stack(rows) for part, rows in seen.items()}
    return {part: torch.stack([r[:, 0].amin(), r[:, 1].amax(), r[:, 2].mean()]) for part, r in found.items()}


def freeze_ranges(model: nn.Module, batches: Iterable[Sequence[Any]]) -> nn.Module:
    """For deployment: the range of every activation becomes the one met on ``batches``, in place.

    Args: batches: the inputs of calls, ``model(*inputs)``; the model runs in evaluation mode.
    """
    for part, (lowest, highest, _) in observed(model, batches).items():
        part.freeze(lowest, highest)
    return model


def start_steps(model: nn.Module, batches: Iterable[Sequence[Any]]) -> nn.Module:
    """Learned steps of activations start at ``2 * mean|x| / sqrt(high)`` (Esser et al. 2020), met on ``batches``."""
    for part, (lowest, _, magnitude) in observed(model, batches).items():
        if part.name:
            high = 2 ** (part.bits - 1) - 1 if lowest < 0 else 2**part.bits - 1
            part.get_parameter(part.name).data.fill_(float(2 * magnitude / math.sqrt(high)))
    return model
