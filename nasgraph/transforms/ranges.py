"""What quantisers of activations take from a few batches: the start of a learned step, and a range that stays.

A search calls both: ``training.train`` and the training of a supernet start the steps, and the final phase freezes the
ranges of a trained network before it is scored and exported (:func:`nasgraph.training.ranges.freeze`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nasgraph.transforms.quantizers import ActivationQuantizer

Look = Callable[[ActivationQuantizer, Tensor], None]


def activation_quantizers(model: nn.Module) -> list[ActivationQuantizer]:
    """All in ``model``, each once."""
    return [module for module in model.modules() if isinstance(module, ActivationQuantizer)]


@torch.no_grad()
def freeze_ranges(model: nn.Module, batches: Iterable[Sequence[Any]]) -> nn.Module:
    """For deployment: the range of every activation becomes the one met on ``batches``, in place.

    The range of a learned step only decides whether its codes are signed. Frozen ranges are buffers, ``lowest`` and
    ``highest``: part of the ``state_dict``. A quantiser that no batch reaches stays as it is.

    Args: batches: the inputs of calls, ``model(*inputs)``; the model runs in evaluation mode.
    """
    found: dict[ActivationQuantizer, tuple[Tensor, Tensor]] = {}

    def look(part: ActivationQuantizer, x: Tensor) -> None:
        lowest, highest = found.get(part, (x.amin(), x.amax()))
        found[part] = torch.minimum(lowest, x.amin()), torch.maximum(highest, x.amax())

    with in_mode(model, training=False), watched(activation_quantizers(model), look):
        for inputs in batches:
            model(*inputs)
    for part, (lowest, highest) in found.items():
        part.freeze(lowest, highest)
    return model


@torch.no_grad()
def start_steps(model: nn.Module, batches: Iterable[Sequence[Any]]) -> nn.Module:
    """Learned steps of activations start at ``2 * mean|x| / sqrt(high)`` (Esser et al. 2020), met on ``batches``.

    A step starts before the layers behind it run, so these read what it gives.

    Args: batches: as for :func:`freeze_ranges`.
    """
    with in_mode(model, training=False), watched(activation_quantizers(model), starting()):
        for inputs in batches:
            model(*inputs)
    return model


@torch.no_grad()
def start_new_steps(model: nn.Module, batches: Iterable[Sequence[Any]]) -> nn.Module:
    """:func:`start_steps` for those that still have the value they were made with, as training is to see them.

    The model runs in training mode (BatchNorm normalises by the batch); its buffers, its mode and the global random
    state are left as they were. ``batches`` are not touched if no step is new.
    """
    new = [
        part for part in activation_quantizers(model) if part.name and is_new(part.bits, part.get_parameter(part.name))
    ]
    if not new:
        return model
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    cuda = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=cuda), in_mode(model, training=True), watched(new, starting()):
        for inputs in batches:
            model(*inputs)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return model


def is_new(bits: int, step: Tensor) -> bool:
    """Whether a learned step of ``bits`` has the value that it is made with: nothing has started or trained it."""
    made = ActivationQuantizer(bits, learned=True).get_parameter(f"step_{bits}")
    return torch.equal(step.detach().cpu(), made.detach().to(step.dtype))


def starting() -> Look:
    """What sets the step of each quantiser that it sees, to the mean over the batches so far. Inputs of 0 set none."""
    seen: dict[ActivationQuantizer, tuple[Tensor, Tensor, int]] = {}  # sum of magnitudes, least, batches

    def look(part: ActivationQuantizer, x: Tensor) -> None:
        if not part.name:
            return
        total, lowest, n = seen.get(part, (x.new_zeros(()), x.amin(), 0))
        seen[part] = total, lowest, n = total + x.abs().mean(), torch.minimum(lowest, x.amin()), n + 1
        high = 2 ** (part.bits - 1) - 1 if lowest < 0 else 2**part.bits - 1
        if total > 0:
            getattr(part, part.name).fill_(float(2 * total / n / math.sqrt(high)))

    return look


@contextmanager
def watched(parts: Iterable[ActivationQuantizer], look: Look) -> Iterator[None]:
    """Meanwhile ``look(part, x)`` is called before a quantiser reads ``x``."""

    def hook(part: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(part, ActivationQuantizer)
        look(part, args[0].detach())

    handles = [part.register_forward_pre_hook(hook) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Meanwhile ``model`` is in training or evaluation mode; each module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
