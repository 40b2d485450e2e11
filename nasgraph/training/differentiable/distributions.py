"""TAS: distributions over widths and depths, two sizes at a time, aligned by interpolation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nasgraph.errors import ConfigError
from nasgraph.space import TRIES, Architecture, Choice, Label, Node
from nasgraph.supernet import Supernet
from nasgraph.training.differentiable.mixture import Bound, Mixture
from nasgraph.training.differentiable.relaxed import (
    Batches,
    Fixed,
    Losses,
    OnStep,
    Parameters,
    Relaxed,
    WeightSteps,
    active,
    alpha_optimizer,
    backward_through,
    drawn_from,
    gradients,
    gumbel,
    softmaxed,
    surrogate_cost,
    temperature,
)
from nasgraph.training.loop import TrainSettings
from nasgraph.training.shared import _seed


def distributions(
    supernet: Supernet,
    steps: int,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
    cost: Callable[[Architecture], float] | None = None,
    target: float | None = None,
    tolerance: float = 0.05,
    weight: float = 2.0,
    temperatures: tuple[float, float] = (5.0, 0.1),
    alpha_lr: float = 0.01,
    alpha_decay: float = 1e-3,
    settings: TrainSettings | None = None,
    samples: int | None = None,
    fixed: Fixed | None = None,
) -> Relaxed:
    """Widths and depths by their distributions (Dong & Yang, TAS, NeurIPS 2019, section 3).

    Searched are the ordered choices (sizes) and the choices between nodes to read (depth). Each step draws two labels
    of each without replacement from ``softmax((log p + Gumbel) / temperature)``, weighs them by it, runs both, aligns
    tensors of different size to the larger by adaptive averaging over the channels, and adds them. What reads the sum
    at a smaller size gets it averaged down likewise. First the logits learn on the validation batch, then the store on
    the training batch; it is trained in place.

    Choices between operations, and values that are not ordered, are drawn uniformly at each step and not learned: their
    probabilities stay equal, and the result takes their first option, unless ``fixed`` names another. The interpolated
    network is no network of the space; its result has to be trained anew. TAS does that with distillation from the
    largest network, which is left to the caller.

    Args:
        on_step: called with the number of the step and its training and validation loss.
        cost: of an architecture, above 0; default: its number of parameters. Counts only with ``target``.
        target: the cost to reach; outside ``target * (1 -+ tolerance)`` the loss gains ``weight * log E`` if the cost
            is too high and ``-weight * log E`` if it is too low, E being the expected cost over the drawn labels.
        alpha_lr, alpha_decay: of Adam with betas (0.5, 0.999).
        temperatures: first and last, linear between.
        settings, samples, fixed: as in :func:`tangle`.

    Raises: ConfigError: a target or tolerance out of range. SpaceError: the space cannot be mixed. NotFinite: a loss or
        gradient is NaN or infinite; names the step, which was not taken.
    """
    if target is not None and not (math.isfinite(target) and target > 0):
        raise ConfigError(f"target is {target!r}: give a cost above 0")
    if not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance is {tolerance!r}: give a fraction from 0 to below 1")
    space, known = supernet.space, dict[Architecture, float]()
    mixture = Mixture(supernet, align="interpolate")
    alphas = Parameters(supernet, fixed or {}, _has_size).scatter(1e-3, seed)
    batches, store = Batches(supernet.task, samples, seed), WeightSteps(supernet, settings)
    adam = alpha_optimizer(alphas, alpha_lr, alpha_decay)
    history: list[Losses] = []

    def price(architecture: Architecture) -> float:
        if architecture not in known:
            known[architecture] = float((cost or supernet.params)(architecture))
        return known[architecture]

    def draw(tau: float) -> tuple[dict[str, Tensor], dict[str, frozenset[Label]], dict[str, Label]]:
        """Weights of all choices, the labels that are open, and of each the heavier; these meet the constraints."""
        for _ in range(TRIES):
            found = drawn(tau)
            if not space.violated(active(space, found[2])):
                break
        return found

    def drawn(tau: float) -> tuple[dict[str, Tensor], dict[str, frozenset[Label]], dict[str, Label]]:
        weights, opened, path = {}, {}, {}
        for name, labels in alphas.labels.items():
            if name in alphas.of:
                weights[name], two = two_sizes(alphas.of[name], tau)
                opened[name] = frozenset(labels[i] for i in two.tolist())
                path[name] = labels[int(weights[name].argmax())]
                continue
            path[name] = labels[alphas.fixed.get(name, int(torch.randint(len(labels), ())))]
            opened[name] = frozenset([path[name]])
        return weights, opened, path

    def every_weight(weights: dict[str, Tensor], path: dict[str, Label]) -> dict[str, Tensor]:
        found = alphas.complete(weights)
        for name, labels in alphas.labels.items():
            if name not in weights:
                found[name] = torch.zeros_like(found[name])
                found[name][labels.index(path[name])] = 1
        return found

    for step in range(steps):
        tau = temperature(temperatures, step, steps)
        with drawn_from(supernet, _seed(seed, step)):
            weights, opened, path = draw(tau)
            batch = batches.val(step)
            network = Bound(mixture, every_weight(weights, path), labels=opened, training=False)
            loss = batch.losses(batch.outputs(network)).mean()
            grads = gradients(loss, weights, step, "validation")
            backward_through(weights, grads, alphas.of)
            if target is not None and alphas.of:
                shares = {
                    name: {label: w[i] for i, label in enumerate(alphas.labels[name]) if label in opened[name]}
                    for name, w in weights.items()
                }
                expected = surrogate_cost(space, price, path, shares)
                band = weight * band_loss(expected, target, tolerance)
                for name, grad in gradients(band, alphas.of, step, "cost").items():
                    before = alphas.of[name].grad
                    alphas.of[name].grad = grad if before is None else before + grad
            adam.step()
            weights, opened, path = draw(tau)
            batch = batches.train(step)
            detached = every_weight({name: w.detach() for name, w in weights.items()}, path)
            train_loss = batch.losses(batch.outputs(Bound(mixture, detached, labels=opened, training=True))).mean()
            history.append((store.take(train_loss, step), float(loss.detach())))
        if on_step is not None:
            on_step(step, history[-1])
    return alphas.relaxed(space, softmaxed(alphas.of), history)


def two_sizes(alphas: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Weights that are 0 but for two places and sum to 1, and the two places."""
    p = torch.softmax((torch.log_softmax(alphas, dim=0) + gumbel(alphas)) / tau, dim=0)
    two = torch.multinomial(p.detach().clamp_min(1e-12), 2)
    weights = torch.zeros_like(p).index_put((two,), p[two] / p[two].sum().clamp_min(1e-300))
    return weights, two


def band_loss(expected: Tensor, target: float, tolerance: float) -> Tensor:
    """``log E`` above the band around the target, ``-log E`` below it, 0 within."""
    if float(expected.detach()) > target * (1 + tolerance):
        return expected.log()
    if float(expected.detach()) < target * (1 - tolerance):
        return -expected.log()
    return expected * 0


def _has_size(choice: Choice) -> bool:
    return choice.ordered or any(isinstance(option, Node) for option in choice.options)
