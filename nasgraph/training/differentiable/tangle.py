"""TangleNAS: gradient search over a store whose sizes are entangled, one forward for all of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nasgraph.space import TRIES, Label
from nasgraph.supernet import Supernet
from nasgraph.training.differentiable.mixture import Bound, Mixture, one_of
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
    chooses_parts,
    drawn_from,
    gradients,
    gumbel,
    softmaxed,
    temperature,
)
from nasgraph.training.loop import TrainSettings
from nasgraph.training.shared import _seed

SAMPLERS = ("darts", "drnas", "gdas")
Opened = dict[str, frozenset[Label]]


def tangle(
    supernet: Supernet,
    steps: int,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
    sampler: str = "darts",
    operations: str = "mix",
    norms: str = "exact",
    alpha_lr: float = 0.01,
    alpha_decay: float = 1e-3,
    temperatures: tuple[float, float] = (10.0, 0.1),
    warmup: int = 0,
    settings: TrainSettings | None = None,
    samples: int | None = None,
    fixed: Fixed | None = None,
) -> Relaxed:
    """Superposed slices with architecture weights (Sukthanker et al., "Weight-Entanglement Meets Gradient-Based NAS").

    Sizes share one run of the largest operation with ``W = sum_k alpha_k pad0(W[slice_k])``; joint sizes weigh by the
    product of their alphas. Operations and inputs are mixed by their outputs, ``sum_k alpha_k op_k(x)``. Each step
    updates the alphas on the validation batch, then the store on the training batch (first order). The store is trained
    in place; its optimizer is not kept.

    Args:
        on_step: called with the number of the step and its training and validation loss.
        sampler: how alphas become weights: ``"darts"``: their softmax (Liu et al., ICLR 2019); ``"drnas"``: a draw of
            ``Dirichlet(elu(alpha) + 1)`` (Chen et al., ICLR 2021); ``"gdas"``: one label, hard, by Gumbel-softmax with
            straight-through gradient and falling temperature (Dong & Yang, CVPR 2019).
        operations: ``"mix"``, or ``"sample"``: choices of operations and inputs are drawn as in ``gdas``, whatever the
            sampler of the sizes; only what is drawn is run.
        norms: ``"exact"``: LayerNorm and GroupNorm see each width alone. ``"full"``: the padded width at once, as
            published; then one-hot weights are not the subnet.
        alpha_lr, alpha_decay: of Adam with betas (0.5, 0.999) for the alphas.
        temperatures: of the Gumbel-softmax, first and last, linear between.
        warmup: steps before the alphas move.
        settings: optimizer of the store; see :class:`TrainSettings`.
        samples: of a training batch; default: all.
        fixed: choices that are not searched, with their labels.

    Raises: ConfigError: an unknown sampler or mode. SpaceError: the space cannot be mixed, or an unknown choice.
        NotFinite: a loss or gradient is NaN or infinite; names the step, which was not taken.
    """
    one_of("sampler", sampler, SAMPLERS)
    one_of("operations", operations, ("mix", "sample"))
    space = supernet.space
    mixture = Mixture(supernet, norms=norms)
    alphas = Parameters(supernet, fixed or {}).scatter(1e-3, seed)
    batches, store = Batches(supernet.task, samples, seed), WeightSteps(supernet, settings)
    adam = alpha_optimizer(alphas, alpha_lr, alpha_decay)
    history: list[Losses] = []
    draws = bool(space.constraints) and (sampler == "gdas" or operations == "sample")

    def weigh(tau: float) -> tuple[dict[str, Tensor], Opened]:
        """Drawn anew while what is drawn breaks a constraint, together with the most probable labels of the rest."""
        for _ in range(TRIES):
            found, opened = weighed(tau)
            labels = {name: known[0] for name, known in alphas.labels.items()}
            labels |= {name: alphas.labels[name][int(values.argmax())] for name, values in alphas.of.items()}
            labels |= {name: next(iter(drawn)) for name, drawn in opened.items()}
            if not draws or not space.violated(active(space, labels)):
                break
        return found, opened

    def weighed(tau: float) -> tuple[dict[str, Tensor], Opened]:
        found, opened = {}, {}
        for name, values in alphas.of.items():
            if sampler == "gdas" or (operations == "sample" and chooses_parts(space.choices[name])):
                found[name], index = hard(values, tau)
                opened[name] = frozenset([space.choices[name].labels[index]])
            elif sampler == "drnas":
                found[name] = torch.distributions.Dirichlet(concentration(values)).rsample()
            else:
                found[name] = F.softmax(values, dim=0)
        for name, index in alphas.fixed.items():
            opened[name] = frozenset([space.choices[name].labels[index]])
        return found, opened

    for step in range(steps):
        tau = temperature(temperatures, step, steps)
        with drawn_from(supernet, _seed(seed, step)):
            val = math.nan
            if step >= warmup and alphas.of:
                weights, opened = weigh(tau)
                batch = batches.val(step)
                network = Bound(mixture, alphas.complete(weights), labels=opened, training=False)
                loss = batch.losses(batch.outputs(network)).mean()
                backward_through(weights, gradients(loss, weights, step, "validation"), alphas.of)
                adam.step()
                val = float(loss.detach())
            weights, opened = weigh(tau)
            batch = batches.train(step)
            detached = alphas.complete({name: w.detach() for name, w in weights.items()})
            train_loss = batch.losses(batch.outputs(Bound(mixture, detached, labels=opened, training=True))).mean()
            history.append((store.take(train_loss, step), val))
        if on_step is not None:
            on_step(step, history[-1])
    final = {name: concentration(values) for name, values in alphas.of.items()}
    found = {name: c / c.sum() for name, c in final.items()} if sampler == "drnas" else softmaxed(alphas.of)
    return alphas.relaxed(space, found, history)


def concentration(alphas: Tensor) -> Tensor:
    """``elu(alpha) + 1``, at least 1e-4: the Dirichlet of DrNAS, uniform at alpha = 0."""
    return (F.elu(alphas) + 1).clamp_min(1e-4)


def hard(alphas: Tensor, tau: float) -> tuple[Tensor, int]:
    """One-hot weights of a label drawn by the softmax, with the gradient of the Gumbel-softmax; and its place."""
    soft = F.softmax((F.log_softmax(alphas, dim=0) + gumbel(alphas)) / tau, dim=0)
    index = int(soft.argmax())
    drawn = torch.zeros_like(soft)
    drawn[index] = 1
    return drawn + (soft - soft.detach()), index
