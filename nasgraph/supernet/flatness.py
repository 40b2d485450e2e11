"""How flat is the loss around the weights of a network? A score of a subnet beside its accuracy.

Zhang et al., GeNAS: Neural Architecture Search with Better Generalization, IJCAI 2023.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nasgraph.errors import NotFinite

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nasgraph.space import Label
    from nasgraph.supernet.store import Supernet
    from nasgraph.training.fewshot import FewShot

SIGMAS = (0.001, 0.003, 0.006)  # those of GeNAS
EPS = 1e-5
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def flatness(
    model: nn.Module,
    loss: Callable[[nn.Module], float],
    sigmas: Sequence[float] = SIGMAS,
    draws: int = 4,
    seed: int = 0,
) -> float:
    """Flatness of ``loss`` around the weights of ``model``: larger is flatter (GeNAS, section 3.2).

    With ``sigma_0 = 0`` and ``L_i`` the mean of the loss at ``theta + sigma_i eps``,

        F = 1 / (sum_i |L_{i+1} - L_i| / (sigma_{i+1} - sigma_i) + 1e-5).

    See :func:`losses_around` for ``L_i``. The loss is flat at most to ``F = 1e5``.

    Raises: ValueError: ``sigmas`` do not grow from above 0, or no draw. NotFinite: a loss is NaN or infinite.
    """
    losses = losses_around(model, loss, sigmas, draws, seed)
    radii = (0.0, *sigmas)
    slopes = (abs(losses[i + 1] - losses[i]) / (radii[i + 1] - radii[i]) for i in range(len(sigmas)))
    return 1.0 / (sum(slopes) + EPS)


def losses_around(
    model: nn.Module,
    loss: Callable[[nn.Module], float],
    sigmas: Sequence[float] = SIGMAS,
    draws: int = 4,
    seed: int = 0,
) -> list[float]:
    """The loss at the weights of ``model``, then its mean over Gaussian perturbations of each standard deviation.

    Each of ``draws`` directions ``eps`` (standard normal, drawn from ``seed`` on the CPU) is used at every ``sigma``
    and in both signs: the slope at the weights, which is no property of flatness, cancels. For a loss quadratic in the
    perturbed weights the expectation is ``L(theta) + sigma^2 trace(H) / 2``, H the Hessian.

    Perturbed are the parameters of all modules but normalisation layers, whose scales and shifts are not weights.
    ``model`` is left as it was; give it with the statistics of BatchNorm that the loss is to see.

    Returns: ``len(sigmas) + 1`` losses.
    Raises: ValueError: ``sigmas`` do not grow from above 0, no draw, or no parameter to perturb. NotFinite: a loss is
        NaN or infinite; names sigma.
    """
    if not sigmas or not all(a < b for a, b in zip((0.0, *sigmas), sigmas, strict=False)):
        raise ValueError(f"sigmas are {tuple(sigmas)}: give numbers above 0 that grow")
    if draws < 1:
        raise ValueError(f"{draws} draws: give at least 1")
    moved = copy.deepcopy(model)
    weights = list(_weights(moved))
    if not weights:
        raise ValueError("the model has no parameter to perturb")
    start = [weight.detach().clone() for weight in weights]
    generator = torch.Generator().manual_seed(seed)
    found = [_finite(loss(moved), 0.0)]
    totals = [0.0] * len(sigmas)
    for _ in range(draws):
        noise = [torch.randn(weight.shape, generator=generator).to(weight) for weight in weights]
        for i, sigma in enumerate(sigmas):
            for signed in (sigma, -sigma):
                _move(weights, start, noise, signed)
                totals[i] += _finite(loss(moved), sigma)
    return found + [total / (2 * draws) for total in totals]


def subnet_flatness(
    supernet: Supernet | FewShot,
    architecture: Mapping[str, Label],
    sigmas: Sequence[float] = SIGMAS,
    draws: int = 2,
    samples: int = 2048,
    split: str = "val",
    seed: int = 0,
) -> float:
    """:func:`flatness` of a subnet's loss on ``split`` of the supernet's task.

    The subnet is extracted, so only what it uses is perturbed; its BatchNorm has the statistics of the unperturbed
    weights (:meth:`Supernet.calibrated`).
    """
    model = supernet.calibrated(architecture, samples)
    return flatness(model, lambda network: supernet.task.score(network, split)["loss"], sigmas, draws, seed)


def _weights(model: nn.Module) -> Iterator[nn.Parameter]:
    seen: set[int] = set()
    for module in model.modules():
        if not isinstance(module, NORMS):
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point() and id(parameter) not in seen:  # tied weights are moved once
                    seen.add(id(parameter))
                    yield parameter


def _move(weights: Sequence[nn.Parameter], start: Sequence[Tensor], noise: Sequence[Tensor], sigma: float) -> None:
    with torch.no_grad():
        for weight, at, eps in zip(weights, start, noise, strict=True):
            weight.copy_(at + sigma * eps)


def _finite(loss: float, sigma: float) -> float:
    if not math.isfinite(loss):
        raise NotFinite(f"the loss at noise {sigma} is {loss}")
    return float(loss)
