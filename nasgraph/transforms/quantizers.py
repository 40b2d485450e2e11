"""Modules that give a tensor the values that few bits can hold: weights and activations.

Each forward pass rounds to ``codes * scale`` (fake quantisation); the gradient passes the rounding as if it were not
there (straight-through, Bengio et al. 2013).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    called ``step_<bits>_channel``, and a supernet cuts it as it cuts the rows of the weight. So it does with steps of
    groups; a group of a layer that has lost inputs takes the step of the group that its first entry was in.
    """

    def __init__(self, weight: Tensor, bits: int, per: str = "tensor", group_size: int = 64) -> None:
        super().__init__(bits, per, group_size)
        more = {"tensor": "", "channel": "_channel", "group": f"_group{group_size}"}[per]
        self.name = f"step_{bits}{more}"
        self.own_slices = per == "tensor"
        start = 2 * self.mean_magnitude(weight.detach()) / math.sqrt(self.high)
        self.register_parameter(self.name, nn.Parameter(start.clamp_min(SMALLEST)))
        self.area = math.prod(weight.shape[2:])  # entries of a kernel

    def kept_rule(
        self, name: str, entries: Sequence[Tensor | None], shape: tuple[int, ...]
    ) -> tuple[Tensor | None, ...]:
        """Which steps belong to a weight that has ``entries`` left, by axis; ``shape`` is theirs (``supernet``)."""
        if self.per == "tensor":
            return ()
        rows, columns = entries[:2]
        if self.per != "group" or columns is None:
            return (rows,)
        first = torch.arange(shape[1]) * self.group_size
        return rows, (columns.cpu()[first // self.area] * self.area + first % self.area) // self.group_size

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

    Its range is that of the present tensor, until it is frozen (``ranges.freeze_ranges``). Codes are unsigned if the
    range has nothing below 0, else signed. With ``learned`` the step is a parameter, ``step_<bits>``, as for
    :class:`LearnedStep`; it starts as for a normal distribution (``ranges.start_steps`` starts it from inputs).
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
