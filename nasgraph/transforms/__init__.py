"""Bit-widths, adapter ranks, masks and factor ranks as choices, on any operation and any model."""

from nasgraph.transforms.base import Transform, transformed

__all__ = ["Transform", "transformed"]
