"""Bit-widths, adapter ranks, masks and factor ranks as choices, on any operation and any model."""

from nasgraph.transforms.base import Transform, transformed
from nasgraph.transforms.lora import Lora
from nasgraph.transforms.low_rank import LowRank
from nasgraph.transforms.prune import Prune
from nasgraph.transforms.quantize import Quantize

__all__ = ["Lora", "LowRank", "Prune", "Quantize", "Transform", "transformed"]
