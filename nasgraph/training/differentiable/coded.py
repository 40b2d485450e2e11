"""NAC: untrained weights; only the architecture parameters learn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nasgraph.errors import ConfigError
from nasgraph.space import Choice, Label
from nasgraph.supernet import Supernet
from nasgraph.training.differentiable.mixture import OUTPUT, Bound, Mixture, one_of
from nasgraph.training.differentiable.relaxed import (
    Batches,
    Fixed,
    Losses,
    OnStep,
    Parameters,
    Relaxed,
    alpha_optimizer,
    backward_through,
    chooses_parts,
    drawn_from,
    gradients,
)
from nasgraph.training.shared import _seed

if TYPE_CHECKING:
    from nasgraph.supernet.structure import Key


def coded(
    supernet: Supernet,
    steps: int,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
    sparsity: float = 0.5,
    restarts: int = 4,
    start: str = "orthogonal",
    readout: bool = True,
    readout_lr: float = 0.05,
    readout_share: float = 0.5,
    alpha_lr: float = 3e-4,
    alpha_decay: float = 1e-3,
    samples: int | None = None,
    fixed: Fixed | None = None,
) -> Relaxed:
    """Neural architecture coding (Xu et al., "Do Not Train It", ICML 2023): ``min over alpha`` of

        CE(f(x; w_0, alpha), y_val) + sparsity * sum over choices of |alpha_hat|_1,   alpha_hat = alpha / |alpha|_2

    with weights ``w_0`` that are never trained. Operations and inputs are mixed by ``sum_o alpha_hat_o op_o(x)``; the
    space's own activations are used. Searched are the choices between operations or between nodes; every other choice
    keeps one label: its largest if it is an ordered choice of whole numbers (a size), else its first (a dropout rate),
    and the result has that label.

    Each restart begins with other weights and alphas of 1e-3 each, and votes for the largest alpha of each choice.
    Probabilities are the shares of votes, with the mean softmax of ``alpha_hat`` as one vote more, which decides ties.
    The supernet's store is neither read nor changed.

    Args:
        steps: in all; each restart takes its share.
        on_step: called with the number of the step and its losses: NaN if no read-out is trained, and the validation
            loss.
        start: of the weights: ``"orthogonal"`` matrices, or as the ``"store"`` begins.
        readout: train the last layer (the nodes with parameters that nothing with parameters follows) on the training
            batch. The paper's theory has untrained features up to a linear read-out; without it, an untrained layer
            has a larger loss than no layer, and what destroys the features wins.
        readout_lr: of Adam. readout_share: of each restart's steps, the first ones, in which only the read-out learns.
        alpha_lr, alpha_decay: of Adam with betas (0.5, 0.999).
        samples, fixed: as in :func:`tangle`.

    Raises: ConfigError: an unknown start, or fewer steps than restarts. NotFinite: a loss or gradient is NaN or
        infinite; names the step, which was not taken.
    """
    one_of("start", start, ("orthogonal", "store"))
    if not 1 <= restarts <= steps:
        raise ConfigError(f"restarts is {restarts!r}: give a whole number from 1 to the number of steps, {steps}")
    if not 0 <= readout_share < 1:
        raise ConfigError(f"readout_share is {readout_share!r}: give a fraction from 0 to below 1")
    space, votes = supernet.space, dict[str, Tensor]()
    kept = {**_largest(supernet), **(fixed or {})}
    batches, history = Batches(supernet.task, samples, seed), list[Losses]()
    alphas = Parameters(supernet, kept)
    for restart in range(restarts):
        fresh = Supernet(space, seed=_seed(seed, restart)).to(supernet.device)
        store: dict[Key, Tensor] = {key: parameter.detach().clone() for key, parameter in fresh.store.items()}
        if start == "orthogonal":
            _orthogonal(store, supernet, _seed(seed, restart))
        mixture = Mixture(supernet, superpose=False, store=store)
        last = {str(i): store[key].requires_grad_(True) for i, key in enumerate(_last(mixture) if readout else ())}
        reader = torch.optim.Adam(list(last.values()), lr=readout_lr) if last else None
        for values in alphas.of.values():
            values.data.fill_(1e-3)
        adam = alpha_optimizer(alphas, alpha_lr, alpha_decay)
        opened = {name: frozenset([space.choices[name].labels[i]]) for name, i in alphas.fixed.items()}
        first, end = steps * restart // restarts, steps * (restart + 1) // restarts
        begin = first + int(readout_share * (end - first)) if readout else first
        for step in range(first, end):
            with drawn_from(supernet, _seed(seed, step)):
                train_loss = math.nan
                if reader is not None:
                    batch = batches.train(step)
                    weights = alphas.complete({name: v.detach() for name, v in coded_weights(alphas.of).items()})
                    loss = batch.losses(batch.outputs(Bound(mixture, weights, labels=opened, training=True))).mean()
                    grads = gradients(loss, last, step, "training")
                    for name, parameter in last.items():
                        parameter.grad = grads.get(name)
                    reader.step()
                    train_loss = float(loss.detach())
                batch = batches.val(step)
                weights = coded_weights(alphas.of)
                network = Bound(mixture, alphas.complete(weights), labels=opened, training=False)
                value = batch.losses(batch.outputs(network)).mean()
                sparse = torch.stack([w.abs().sum() for w in weights.values()]).sum() if weights else value * 0
                grads = gradients(value + sparsity * sparse, weights, step, "validation")
                if step >= begin:
                    backward_through(weights, grads, alphas.of)
                    adam.step()
                history.append((train_loss, float(value.detach())))
            if on_step is not None:
                on_step(step, history[-1])
        for name, values in coded_weights(alphas.of).items():
            ballot = votes.setdefault(name, torch.zeros_like(values.detach()))
            ballot[int(values.argmax())] += 1
            ballot += torch.softmax(values.detach(), dim=0) / restarts
    return alphas.relaxed(space, {name: ballot / (restarts + 1) for name, ballot in votes.items()}, history)


def coded_weights(alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each vector divided by its Euclidean norm."""
    return {name: values / values.norm().clamp_min(1e-12) for name, values in alphas.items()}


def _largest(supernet: Supernet) -> dict[str, Label]:
    def label(choice: Choice) -> Label:
        size = choice.ordered and all(isinstance(option, int) for option in choice.options)
        return choice.labels[-1] if size else choice.labels[0]

    return {name: label(choice) for name, choice in supernet.space.choices.items() if not chooses_parts(choice)}


def _orthogonal(store: Mapping[Key, Tensor], supernet: Supernet, seed: int) -> None:
    """Matrices and kernels become orthogonal, rows or columns, whichever are fewer; vectors stay as they start."""
    with drawn_from(supernet, seed):
        for tensor in store.values():
            if tensor.dim() >= 2 and tensor.is_floating_point():
                nn.init.orthogonal_(tensor)


def _last(mixture: Mixture) -> list[Key]:
    """Parameters that no other parameters follow on the way to the output."""
    found: dict[Key, None] = {}
    left, seen = [OUTPUT], {OUTPUT}
    while left:
        place = mixture.places[left.pop()]
        for form in place.forms:
            found.update(dict.fromkeys(piece.key for piece in form.pieces.values()))
            found.update(dict.fromkeys(key for piece in form.pieces.values() for _, key in piece.extra))
            for source in () if form.pieces else form.sources:
                if source in mixture.places and source not in seen:
                    seen.add(source)
                    left.append(source)
    return list(found)
