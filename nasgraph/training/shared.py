"""Training the store of a supernet: one plain loop."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nasgraph.errors import ConfigError, NotFinite, did_you_mean
from nasgraph.space import Architecture
from nasgraph.training.loop import TrainSettings, _optimizer
from nasgraph.training.policies import Policy

if TYPE_CHECKING:
    from nasgraph.supernet import Supernet
    from nasgraph.tasks.batch import Batch

REDUCTIONS = ("sum", "mean")
ALL = 2**31  # samples: more than any task has


def train_shared(
    supernet: Supernet,
    policy: Policy,
    steps: int,
    settings: TrainSettings,
    seed: int,
    reduction: str,
    samples: int | None,
    checkpoint: str | os.PathLike[str] | None,
    every: int,
    on_step: Callable[[int, Sequence[float]], None] | None,
) -> list[float]:
    """See :meth:`nasgraph.supernet.Supernet.train`."""
    if reduction not in REDUCTIONS:
        raise ConfigError(f"unknown reduction {reduction!r}.{did_you_mean(reduction, REDUCTIONS)} Known: sum, mean.")
    if supernet.optimizer is None or supernet.settings != settings:
        supernet.settings = settings
        supernet.optimizer = _optimizer(list(supernet.parameters()), settings)
    supernet.resume(policy)
    whole = supernet.task.batch(ALL, seed) if samples is None else None
    history = []
    for step in range(supernet.step, steps):
        batch = whole or supernet.task.batch(samples or ALL, _seed(seed, step))
        paths = policy.sample(step, random.Random(f"paths/{seed}/{step}"))
        losses = _step(supernet, batch, paths, policy.distill, reduction, step, _seed(seed, step))
        supernet.step = step + 1
        policy.observe(step, paths, losses)
        supernet.policy_state = (type(policy).__qualname__, policy.state())
        history.append(sum(losses) / len(losses))
        if on_step is not None:
            on_step(step, losses)
        if checkpoint is not None and (supernet.step % every == 0 or supernet.step == steps):
            if not _all_finite([parameter.detach() for parameter in supernet.parameters()]):
                raise NotFinite(f"step {step}: a stored parameter is not finite; the checkpoint before is kept")
            supernet.save(checkpoint)
    return history


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """``KL(teacher || student)`` of the classes, mean over samples, in nats; no gradient to the teacher.

    Shapes: both logits ``(n, classes)`` -> scalar.
    """
    target = F.log_softmax(teacher.detach(), dim=-1)
    return F.kl_div(F.log_softmax(student, dim=-1), target, reduction="batchmean", log_target=True)


def _step(
    supernet: Supernet,
    batch: Batch,
    paths: Sequence[Architecture],
    distill: bool,
    reduction: str,
    step: int,
    seed: int,
) -> list[float]:
    """One update; the store is left alone if a loss or a gradient is not finite."""
    assert supernet.optimizer is not None
    supernet.optimizer.zero_grad(set_to_none=True)
    weight = 1.0 / len(paths) if reduction == "mean" else 1.0
    losses: list[float] = []
    teacher: Tensor | None = None
    cuda = [supernet.device.index or 0] if supernet.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        for path in paths:
            outputs = batch.outputs(supernet.subnet(path).train())
            loss = batch.losses(outputs).mean() if teacher is None else distillation(outputs, teacher)
            if distill and teacher is None:
                teacher = outputs.detach()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                supernet.optimizer.zero_grad(set_to_none=True)
                raise NotFinite(f"step {step}: the loss of {path.to_json()} is {losses[-1]}; the step was not taken")
            (loss * weight).backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in supernet.parameters() if parameter.grad is not None]
    if not _all_finite(gradients):
        supernet.optimizer.zero_grad(set_to_none=True)
        names = ", ".join(path.to_json() for path in paths)
        raise NotFinite(f"step {step}: a gradient of {names} is not finite; the step was not taken")
    supernet.optimizer.step()
    return losses


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    return bool(torch.nn.utils.get_total_norm(tensors, norm_type=math.inf).isfinite()) if tensors else True


def _seed(seed: int, step: int) -> int:
    return random.Random(f"step/{seed}/{step}").getrandbits(62)
