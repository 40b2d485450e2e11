"""Divergences of a student's outputs from a teacher's. All are in nats, and no gradient reaches the teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nasgraph.errors import ConfigError, did_you_mean

Divergence = Callable[[Tensor, Tensor], Tensor]


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """``KL(teacher || student)`` of the classes, mean over samples (Yu et al., BigNAS, ECCV 2020, section 3.1).

    Its gradient is that of the cross-entropy with the teacher's probabilities.

    Shapes: both logits ``(n, classes)`` -> scalar.
    """
    target = F.log_softmax(teacher.detach(), dim=-1)
    return F.kl_div(F.log_softmax(student, dim=-1), target, reduction="batchmean", log_target=True)


def alpha_divergence(student: Tensor, teacher: Tensor, alpha: float, clip: float | None = None) -> Tensor:
    """``D_a = sum_c q (r^a - 1) / (a (a - 1))`` with ``r = p / q``, teacher ``p``, student ``q``, for each sample.

    Limits: ``KL(p || q)`` at ``a = 1``, ``KL(q || p)`` at ``a = 0`` (Wang et al., AlphaNet, ICML 2021).
    The gradient is that of ``-sum_c stopgrad(q rho) log q`` with ``rho = r^a / a`` (``log r - 1`` at ``a = 0``): the
    gradient of ``D_a``, in a form in which ``r^a`` can be clipped.

    Args:
        clip: ``r^a`` (``r`` at ``a = 1``) is clipped to ``[0, clip]``, in the value and in the gradient; has no effect
            at ``a = 0``.

    Shapes: both logits ``(n, classes)`` -> ``(n,)``.
    """
    log_q = F.log_softmax(student, dim=-1)
    with torch.no_grad():
        q, log_r = log_q.exp(), F.log_softmax(teacher, dim=-1) - log_q
        power = (alpha * log_r).exp()
        if clip is not None:
            power = power.clamp(max=clip)
        if alpha == 0:
            value, rho = -log_r, log_r - 1
        elif alpha == 1:
            value, rho = torch.xlogy(power, power), power
        else:
            value, rho = (power - 1) / (alpha * (alpha - 1)), power / alpha
        divergence, slope = (q * value).sum(-1), q * rho
    surrogate = -(slope * log_q).sum(-1)
    return surrogate - surrogate.detach() + divergence


def adaptive_alpha(student: Tensor, teacher: Tensor, low: float = -1.0, high: float = 1.0, clip: float = 5.0) -> Tensor:
    """For each sample the larger of two alpha-divergences, mean over samples (AlphaNet).

    The one at ``low`` punishes a student that is too sure, the one at ``high`` one that is not sure enough.

    Shapes: both logits ``(n, classes)`` -> scalar.
    """
    below = alpha_divergence(student, teacher, low, clip)
    above = alpha_divergence(student, teacher, high, clip)
    return torch.where(below > above, below, above).mean()


DIVERGENCES: dict[str, Divergence] = {"kl": kl, "alpha": adaptive_alpha}
NAMES = ("none", *DIVERGENCES)


def divergence(name: str) -> Divergence | None:
    """By its name in a config; None for ``none``. Raises: ConfigError: there is no such name."""
    if name not in NAMES:
        hint = did_you_mean(str(name), NAMES)
        raise ConfigError(f"unknown distillation {name!r}.{hint} Known: {', '.join(NAMES)}.")
    return DIVERGENCES.get(name)
