"""Bit-widths, adapter ranks, masks and factor ranks as choices, on any operation and any model.

``base.py`` has what a transform is, ``layers.py`` the places that a rewritten layer has. ``gpfq`` quantises a trained
model, ``low_rank_training`` trains factors, ``structured`` follows who depends on a channel, ``deploy`` makes rewritten
layers plain again. How much of each goes where without a search: the package ``nasgraph.allocation``.
"""

from nasgraph.transforms.base import Transform, transformed
from nasgraph.transforms.lora import Lora, merge
from nasgraph.transforms.low_rank import LowRank, record_inputs
from nasgraph.transforms.prune import Prune, kept_weights, recycle
from nasgraph.transforms.quantize import Quantize
from nasgraph.transforms.ranges import freeze_ranges, start_steps

__all__ = [
    "Lora",
    "LowRank",
    "Prune",
    "Quantize",
    "Transform",
    "freeze_ranges",
    "kept_weights",
    "merge",
    "record_inputs",
    "recycle",
    "start_steps",
    "transformed",
]
