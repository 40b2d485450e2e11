"""Learned steps of activations in a store: one for each bit-width, started when an architecture first trains it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nasgraph.supernet.structure import Form, Key, Structure
from nasgraph.transforms.quantizers import ActivationQuantizer
from nasgraph.transforms.ranges import is_new, starting, watched

if TYPE_CHECKING:
    from nasgraph.supernet.store import Supernet


def start_new_steps(supernet: Supernet, structure: Structure, inputs: Sequence[Tensor]) -> None:
    """Steps of ``structure`` that still have the value they were made with start from what they read of ``inputs``.

    Which these are is seen from the store alone, so a training that goes on from a checkpoint starts the same ones. The
    global random state is left as it was.
    """
    if structure in supernet.started:
        return
    steps = [each for form in structure.forms if form is not None for each in learned_steps(form)]
    new = [part for part, key in steps if is_new(part.bits, supernet.store[key])]
    if new:
        cuda = [supernet.device.index or 0] if supernet.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), torch.no_grad(), watched(new, starting()):
            structure.run(inputs, supernet._slices(structure), training=True)
    if not any(is_new(part.bits, supernet.store[key]) for part, key in steps):
        supernet.started.add(structure)


def learned_steps(form: Form) -> list[tuple[ActivationQuantizer, Key]]:
    """The quantisers of activations of ``form`` that learn a step, each with where it is stored."""
    keys = {piece.key[2]: piece.key for piece in form.pieces}
    named = [(name, part) for name, part in form.module.named_modules() if isinstance(part, ActivationQuantizer)]
    return [(part, keys[f"{name}.{part.name}" if name else part.name]) for name, part in named if part.name]
