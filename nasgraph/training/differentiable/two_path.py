"""ProxylessNAS: hard gates, two paths at a time, and a cost that gradients see."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nasgraph.errors import ConfigError
from nasgraph.space import TRIES, Architecture, Label
from nasgraph.supernet import Supernet
from nasgraph.training.differentiable.mixture import Bound, Mixture, one_of
from nasgraph.training.differentiable.relaxed import (
    SAME,
    Batches,
    Fixed,
    Losses,
    OnStep,
    Parameters,
    Relaxed,
    WeightSteps,
    active,
    drawn_from,
    gradients,
    one_hot,
    pair,
    softmaxed,
    surrogate_cost,
)
from nasgraph.training.loop import TrainSettings
from nasgraph.training.shared import _seed


def two_path(
    supernet: Supernet,
    steps: int,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
    cost: Callable[[Architecture], float] | None = None,
    reference: float | None = None,
    loss: str = "product",
    scale: float = 0.2,
    power: float = 0.3,
    strength: float = 0.1,
    alpha_lr: float = 0.01,
    warmup: int = 0,
    every: int = 1,
    settings: TrainSettings | None = None,
    samples: int | None = None,
    fixed: Fixed | None = None,
) -> Relaxed:
    """Hard gates over two paths (Cai et al., ProxylessNAS, ICLR 2019, sections 3.2 and 3.3).

    A weight step trains one path, drawn by the softmax of the alphas. An architecture step draws two labels of each
    choice without replacement and one of the two as the gate that is open; both are run, and the gradient of the gates
    moves the alphas of the two. Then the two are shifted together so that the probabilities of the other labels stay.

    Sizes are gated like operations. A gate's gradient is of first order: it sees one decision change at one node at a
    time, so of a width that two layers share it sees less than of an operation.

    Args:
        on_step: called with the number of the step and its training and validation loss.
        cost: of an architecture, above 1 for ``"product"``; default: its number of parameters. Counts only with
            ``reference``.
        reference: the cost to aim at, in the unit of ``cost``; None: no cost.
        loss: ``"product"``: ``CE * scale * (log E / log reference) ** power``; ``"sum"``:
            ``CE + strength * (E - reference) / reference``; E is the expected cost, ``sum_i p_i cost_i`` in each
            choice, with the rest of the path as drawn.
        alpha_lr: of Adam with betas (0, 0.999): without momentum, labels that are not drawn do not move.
        warmup: steps before the alphas move. every: an architecture step once in so many steps.
        settings, samples, fixed: as in :func:`tangle`.

    Raises: ConfigError: an unknown loss, or a reference out of range. NotFinite: a loss or gradient is NaN or infinite;
        names the step, which was not taken.
    """
    one_of("loss", loss, ("product", "sum"))
    least = 1.0 if loss == "product" else 0.0
    if reference is not None and not (math.isfinite(reference) and reference > least):
        raise ConfigError(f"reference is {reference!r}: give a cost above {least:g}")
    if every < 1:
        raise ConfigError(f"every is {every!r}: give a whole number of at least 1")
    space, known = supernet.space, dict[Architecture, float]()
    mixture = Mixture(supernet, superpose=False)
    alphas = Parameters(supernet, fixed or {})
    batches, store = Batches(supernet.task, samples, seed), WeightSteps(supernet, settings)
    adam = torch.optim.Adam(list(alphas.of.values()), lr=alpha_lr, betas=(0.0, 0.999)) if alphas.of else None
    history: list[Losses] = []

    def price(architecture: Architecture) -> float:
        if architecture not in known:
            known[architecture] = float((cost or supernet.params)(architecture))
        return known[architecture]

    def architecture_step(step: int) -> float:
        if adam is None or step < warmup or step % every:
            return math.nan
        pairs = {name: pair(values) for name, values in alphas.of.items()}
        shares = {name: torch.softmax(values[pairs[name]], dim=0) for name, values in alphas.of.items()}
        path = _allowed(supernet, alphas, {name: (pairs[name], p) for name, p in shares.items()})
        gates, opened = {}, {}
        for name, two in pairs.items():
            labels = space.choices[name].labels
            gates[name] = one_hot(labels.index(path[name]), len(labels), two.device).requires_grad_(True)
            opened[name] = frozenset(labels[i] for i in two.tolist())
        for name, i in alphas.fixed.items():
            opened[name] = frozenset([space.choices[name].labels[i]])
        batch = batches.val(step)
        network = Bound(mixture, alphas.complete(gates), training=False, labels=opened, path=path)
        value = batch.losses(batch.outputs(network)).mean()
        found = gradients(value, gates, step, "validation")
        slope, costs = 1.0, dict[str, Tensor]()
        if reference is not None:
            mass = {name: torch.softmax(v.detach(), dim=0)[pairs[name]].sum() for name, v in alphas.of.items()}
            open_shares = {
                name: dict(
                    zip([space.choices[name].labels[i] for i in pairs[name].tolist()], p * mass[name], strict=True)
                )
                for name, p in shares.items()
            }
            expected = surrogate_cost(space, price, path, open_shares)
            error = value.detach().double().requires_grad_(True)
            total = combined(error, expected, reference, loss, scale, power, strength)
            slope = float(torch.autograd.grad(total, error, retain_graph=True)[0])
            costs = gradients(total, alphas.of, step, "cost")
        before = {name: torch.logsumexp(values.detach()[pairs[name]], dim=0) for name, values in alphas.of.items()}
        for name, values in alphas.of.items():
            values.grad = costs.get(name)
            if name in found:
                two = pairs[name]
                mine = torch.zeros_like(values)
                mine[two] = slope * gate_gradient(found[name][two], shares[name].detach())
                values.grad = mine if values.grad is None else values.grad + mine
        adam.step()
        for name, values in alphas.of.items():
            if values.grad is not None:
                keep_others(values, pairs[name], before[name])
        return float(value.detach())

    for step in range(steps):
        with drawn_from(supernet, _seed(seed, step)):
            val = architecture_step(step)
            every_label = {name: (torch.arange(len(p)), p) for name, p in softmaxed(alphas.of).items()}
            subnet = supernet.subnet(active(space, _allowed(supernet, alphas, every_label))).train()
            batch = batches.train(step)
            history.append((store.take(batch.losses(batch.outputs(subnet)).mean(), step), val))
        if on_step is not None:
            on_step(step, history[-1])
    return alphas.relaxed(space, softmaxed(alphas.of), history)


def gate_gradient(gates: Tensor, p: Tensor) -> Tensor:
    """``dL/dalpha_i = sum_j dL/dg_j p_j (delta_ij - p_i)`` (section 3.2).

    Shapes: ``gates`` = dL/dg ``(2,)``, ``p`` ``(2,)`` -> ``(2,)``. Zero where the gates say the same up to rounding.
    """
    if float((gates - gates.mean()).abs().max()) <= SAME * float(gates.abs().max()):
        return torch.zeros_like(p)
    gates = gates.to(p.dtype)
    return p * (gates - (gates * p).sum())


def keep_others(alphas: Tensor, two: Tensor, before: Tensor) -> None:
    """Shift the ``two``, in place, so that their ``logsumexp`` is ``before``: other probabilities stay as they were."""
    with torch.no_grad():
        alphas[two] -= torch.logsumexp(alphas[two], dim=0) - before


def combined(
    error: Tensor, expected: Tensor, reference: float, loss: str, scale: float, power: float, strength: float
) -> Tensor:
    """The loss of accuracy and cost; see :func:`two_path`."""
    if loss == "product":
        return error * scale * (expected.log() / math.log(reference)) ** power
    return error + strength * (expected - reference) / reference


def _allowed(supernet: Supernet, alphas: Parameters, among: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Label]:
    """A label for every choice, drawn by the probabilities; redrawn while it breaks a constraint, 1,000 times."""
    space, path = supernet.space, dict[str, Label]()
    for _ in range(TRIES):
        for name, labels in alphas.labels.items():
            if name in among:
                places, p = among[name]
                path[name] = labels[int(places[int(torch.multinomial(p.detach(), 1))])]
            else:
                path[name] = labels[alphas.fixed.get(name, 0)]
        if not space.violated(active(space, path)):
            break
    return path
