"""What a transform breaks, before any training: five measures of a rewritten network beside its reference.

Each is a function ``(reference, batch) -> (changed -> damage)``; smaller is better, and 0 is no damage.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from nasgraph.tasks.batch import Batch
from nasgraph.transforms.layers import KINDS, Transformed, is_pyg_linear
from nasgraph.transforms.low_rank import Factorised, effective, full_rank
from nasgraph.transforms.low_rank_training import energy_rank, expected_stable_rank, stable_rank

Damage = Callable[[nn.Module], float]
LEAST = 1e-4  # share of the signal that is told from none


def sensitivity(model: nn.Module, batch: Batch) -> Damage:
    """How much the loss of the batch rises, in nats: for bits, masks and ranks of a trained network.

    A new adapter changes no loss; its rank is a matter of :func:`gradients`.
    """
    start = _loss(model, batch)
    return lambda changed: _loss(changed, batch) - start


def _loss(model: nn.Module, batch: Batch) -> float:
    with torch.no_grad():
        return float(batch.loss(model))


def lost_signal(model: nn.Module, batch: Batch) -> Damage:
    """``-log r^2``, with r the correlation of the logits with those of the reference: for masks, bits and ranks.

    ``r^2`` is the share of the signal that still passes. Through layers one after another shares multiply, so their
    logarithms add up. A rise of the loss does not: it hardly grows once a layer is destroyed, and the least sum of it
    would rather destroy one layer than touch two. A sample's logits count from their mean, which says nothing of its
    class. At most ``-log`` of :data:`LEAST`.
    """
    before = _centred_logits(model, batch)

    def damage(changed: nn.Module) -> float:
        after = _centred_logits(changed, batch)
        norms = float(before.norm() * after.norm())
        r = max(0.0, float((before * after).sum()) / norms) if norms else 0.0
        return max(0.0, -math.log(r * r + LEAST))

    return damage


def _centred_logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        logits = batch.outputs(model).double()
    return logits - logits.mean(dim=1, keepdim=True)


def weight_noise(model: nn.Module, batch: Batch) -> Damage:
    """``||w - w'||^2 / ||w||^2``, summed over the layers: noise-to-signal of quantised, masked or truncated weights.

    ``-10 log10`` of one layer's term is its signal-to-quantisation-noise ratio in dB. A layer that lost channels counts
    them as 0.
    """
    before = {name: effective(layer).detach() for name, layer in weighted_layers(model)}

    def damage(changed: nn.Module) -> float:
        total = 0.0
        for name, layer in weighted_layers(changed):
            if name in before:
                total += noise(before[name], effective(layer).detach())
        return total

    return damage


def noise(weight: Tensor, other: Tensor) -> float:
    """``||w - w'||^2 / ||w||^2``; a smaller ``w'`` is a part of ``w``. 0 for a weight of zeros."""
    signal = float(weight.double().square().sum())
    if weight.shape == other.shape:
        lost = float((weight.double() - other.double()).square().sum())
    else:
        lost = signal - float(other.double().square().sum())
    return lost / signal if signal else 0.0


def gradients(model: nn.Module, batch: Batch) -> Damage:
    """The share of the squared gradient of all weights that no adapter can follow: for ranks of adapters.

    An adapter of rank r can follow the r leading singular vectors of its layer's gradient; one small step then lowers
    the loss by as much as their squared singular values hold (Eckart & Young). So damage is ``1 - held / all``.
    """
    squares = {name: s.square() for name, s in gradient_spectra(model, batch).items()}
    whole = sum(float(each.sum()) for each in squares.values())

    def damage(changed: nn.Module) -> float:
        held = 0.0
        for name, layer in changed.named_modules():
            if isinstance(layer, Transformed) and name in squares:
                rank = sum(int(getattr(adapter, "rank", 0)) for adapter in layer.beside.values())
                held += float(squares[name][:rank].sum())
        return 1.0 - held / whole if whole else 0.0

    return damage


def gradient_spectra(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Singular values of the loss's gradient by each layer's weight, frozen ones too; a matrix is (out, the rest).

    The model runs in evaluation mode, in a copy.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    layers = {name: layer for name, layer in weighted_layers(model) if not isinstance(layer, Factorised)}
    weights = {name: layer.get_parameter("weight").requires_grad_(True) for name, layer in layers.items()}
    if not weights:
        return {}
    with torch.enable_grad():
        found = torch.autograd.grad(batch.loss(model), list(weights.values()), materialize_grads=True)
    return {name: torch.linalg.svdvals(g.flatten(1)) for name, g in zip(weights, found, strict=True)}


def gradient_ranks(model: nn.Module, batch: Batch, energy: float = 0.9) -> dict[str, int]:
    """By layer, the rank that holds the share ``energy`` of the squared gradient: a start for ``Lora`` ranks."""
    return {name: energy_rank(values, energy) for name, values in gradient_spectra(model, batch).items()}


def rank_shortage(model: nn.Module, batch: Batch) -> Damage:
    """The share of its :func:`stable_ranks` that a factorised layer lacks, summed: for ranks of ``LowRank``."""
    wanted = stable_ranks(model)

    def damage(changed: nn.Module) -> float:
        found = {name: layer.rank for name, layer in changed.named_modules() if isinstance(layer, Factorised)}
        return sum(max(0.0, 1.0 - rank / wanted[name]) for name, rank in found.items() if name in wanted)

    return damage


def stable_ranks(model: nn.Module) -> dict[str, int]:
    """By layer, Cuttlefish's rank of its weight: full rank times the stable rank over that of a random matrix.

    A weight of more than random spread has full rank, one of zeros has rank 1.
    """
    found = {}
    for name, layer in weighted_layers(model):
        if not isinstance(layer, Factorised | nn.Embedding):
            weight, full = effective(layer), full_rank(layer)
            share = stable_rank(weight) / expected_stable_rank(*weight.flatten(1).shape)
            found[name] = min(full, max(1, round(full * share)))
    return found


def weighted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers that transforms rewrite, rewritten or not. A factorised layer is one, and its factors are not."""
    inside: list[str] = []
    for name, layer in model.named_modules():
        if any(name.startswith(each) for each in inside):
            continue
        if isinstance(layer, Factorised):
            inside.append(f"{name}." if name else "")
            yield name, layer
        elif isinstance(layer, Transformed) or type(layer) in KINDS or is_pyg_linear(layer):
            yield name, layer


METHODS: dict[str, Callable[[nn.Module, Batch], Damage]] = {
    "sensitivity": sensitivity,
    "signal": lost_signal,
    "sqnr": weight_noise,
    "gradients": gradients,
    "stable_rank": rank_shortage,
}
