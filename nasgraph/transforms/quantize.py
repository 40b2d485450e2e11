"""Quantisation as a choice: layers that compute with the numbers that few bits can hold, and learn so.

The weight stays a float parameter; ``quantizers.py`` has what rounds it. ``docs/quantisation.md``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from nasgraph.errors import SpaceError
from nasgraph.transforms.base import Transform, each_option, matches
from nasgraph.transforms.layers import extended, is_message_passing
from nasgraph.transforms.quantizers import ActivationQuantizer, LearnedStep, MinMax, NestedBits, WeightQuantizer

FLOAT = (None, 32)  # bits that mean: left as it is


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
    return [(name, layer) for name, layer in module.named_modules() if is_message_passing(layer)]


@dataclass(frozen=True)
class Quantize(Transform):
    """Weights, inputs and aggregated messages of layers in few bits.

    Args:
        weight_bits: None or 32: float. 16 and 3 to 8: codes ``-2^(b-1) .. 2^(b-1)-1`` times a scale. 2: ternary, 1:
            binary.
        activation_bits: of the layer's input; None or 32: float; 4 to 16. Not of an embedding, which reads indices: in
            a space over a model one whose weight stays float is left as it is.
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
    amounts: ClassVar[Mapping[str, float]] = {"weight_bits": 32, "activation_bits": 32, "aggregation_bits": 32}
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

    def canonical(self) -> Quantize:
        """See :class:`Transform`."""
        unused = [
            name for name in ("weight_bits", "activation_bits", "aggregation_bits") if getattr(self, name) in FLOAT
        ]
        if "weight_bits" in unused:
            unused += ["method", "per", "group_size", "nested_bits"]
        elif self.weight_bits == 1:
            unused += ["method"]  # both compute the scale
        if "activation_bits" in unused and "aggregation_bits" in unused:
            unused += ["activations"]
        if self.per != "group":
            unused += ["group_size"]
        if self.method != "nested" or self.weight_bits != 16:
            unused += ["nested_bits"]  # leading bits are the same, whatever follows them
        found: Quantize = self.with_defaults(unused)
        return found

    def can_rewrite(self, layer: nn.Module) -> bool:
        """See :class:`Transform`."""
        weights_stay = self.weight_bits in FLOAT
        return super().can_rewrite(layer) and not (weights_stay and isinstance(layer, nn.Embedding))

    def fits(self, module: nn.Module) -> bool:
        """See :class:`Transform`. What aggregates is a whole convolution."""
        aggregates = any(bits not in FLOAT for bits in each_option(self.aggregation_bits))
        return super().fits(module) or (aggregates and any(module is each for _, each in message_passing(module)))

    def apply(self, module: nn.Module) -> nn.Module:
        """See :class:`Transform`. Aggregation is a matter of a whole convolution: its class changes, in place."""
        if not (self.weight_bits in FLOAT and self.activation_bits in FLOAT):
            module = super().apply(module)
        if self.aggregation_bits not in FLOAT:
            for layer in self.aggregating(module):
                if isinstance(layer, QuantizedAggregation):
                    raise SpaceError(f"Quantize: the aggregation of {type(layer).__name__} is quantised twice")
                layer.__class__ = with_quantized_aggregation(type(layer))  # type: ignore[arg-type]
                layer.fuse = False  # type: ignore[assignment]  # a fused product would pass by `aggregate`
                layer.add_module("on_aggregate", ActivationQuantizer(self.aggregation_bits, self.activations == "lsq"))
        return module

    def apply_to_model(self, model: nn.Module, name: str) -> nn.Module:
        """See :class:`Transform`. Embeddings that other options quantise may have nothing to quantise in this one."""
        return model if self._leaves(model) else super().apply_to_model(model, name)

    def _leaves(self, module: nn.Module) -> bool:
        """Whether only inputs are to be quantised, and at ``where`` are embeddings alone, which read indices."""
        if self.weight_bits not in FLOAT or self.aggregation_bits not in FLOAT:
            return False
        found = [layer for name, layer in module.named_modules() if matches(self.where, name)]
        known = [layer for layer in found if super(Quantize, self).can_rewrite(layer)]
        return bool(known) and all(isinstance(layer, nn.Embedding) for layer in known)

    def check_kind(self, module: nn.Module) -> None:
        """See :class:`Transform`."""
        if not (self.weight_bits in FLOAT and self.activation_bits in FLOAT):
            self.targets(module)
        if self.aggregation_bits not in FLOAT:
            self.aggregating(module)

    def aggregating(self, module: nn.Module) -> list[nn.Module]:
        """The PyG convolutions of ``module`` at ``where``. Raises: SpaceError: there are none."""
        found = [layer for name, layer in message_passing(module) if matches(self.where, name)]
        if not found:
            there = ", ".join(name or "the operation itself" for name, _ in message_passing(module)) or "none"
            raise SpaceError(
                f"Quantize: aggregation_bits needs a PyG convolution (MessagePassing) at '{self.where}' of "
                f"{type(module).__name__}; there is: {there}"
            )
        return found

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
        kind = type(layer).__name__.removeprefix("Transformed")
        raise SpaceError(f"Quantize: a {kind} layer is quantised twice: let the patterns of `where` not overlap")
    return place
