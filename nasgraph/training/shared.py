"""Training the store of a supernet: one plain loop."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nasgraph.errors import ConfigError, NotFinite, did_you_mean
from nasgraph.training.loop import TrainSettings, _optimizer
from nasgraph.training.policies.base import Key, Path, Policy, Step

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
    clip: float | None,
    samples: int | None,
    checkpoint: str | os.PathLike[str] | None,
    every: int,
    on_step: Callable[[int, Sequence[float]], None] | None,
) -> list[float]:
    """See :meth:`nasgraph.supernet.Supernet.train`."""
    if reduction not in REDUCTIONS:
        raise ConfigError(f"unknown reduction {reduction!r}.{did_you_mean(reduction, REDUCTIONS)} Known: sum, mean.")
    if clip is not None and not clip > 0:
        raise ConfigError(f"clip is {clip!r}: give a number above 0, or leave it out")
    if supernet.optimizer is None or supernet.settings != settings:
        supernet.settings = settings
        supernet.optimizer = _optimizer(list(supernet.parameters()), settings)
    supernet.resume(policy)
    whole = supernet.task.batch(ALL, seed) if samples is None else None
    history = []
    for step in range(supernet.step, steps):
        batch = whole or supernet.task.batch(samples or ALL, _seed(seed, step))
        drawn = policy.sample(step, random.Random(f"paths/{seed}/{step}"))
        paths = [path if isinstance(path, Path) else Path(path) for path in drawn]
        losses = _step(supernet, batch, paths, reduction, clip, step, _seed(seed, step))
        supernet.step = step + 1
        policy.observe(Step(step, paths, losses, lambda: _gradient_norms(supernet)))
        supernet.policy_state = (type(policy).__qualname__, policy.state())
        history.append(sum(losses) / len(losses))
        if on_step is not None:
            on_step(step, losses)
        if checkpoint is not None and (supernet.step % every == 0 or supernet.step == steps):
            if not _all_finite([parameter.detach() for parameter in supernet.parameters()]):
                raise NotFinite(f"step {step}: a stored parameter is not finite; the checkpoint before is kept")
            supernet.save(checkpoint)
    return history


def _step(
    supernet: Supernet,
    batch: Batch,
    paths: Sequence[Path],
    reduction: str,
    clip: float | None,
    step: int,
    seed: int,
) -> list[float]:
    """One update; the store is left alone if a loss or a gradient is not finite. Returns: the loss of each path."""
    assert supernet.optimizer is not None
    supernet.optimizer.zero_grad(set_to_none=True)
    share = 1.0 / len(paths) if reduction == "mean" else 1.0
    losses: list[float] = []
    kept = {path.teacher for path in paths}
    outputs_of: dict[int | nn.Module, Tensor] = {}  # of teachers: paths by their position, and networks
    cuda = [supernet.device.index or 0] if supernet.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        for i, path in enumerate(paths):
            supernet.start_steps(path.architecture, batch.inputs)
            outputs = batch.outputs(supernet.subnet(path.architecture).train())
            if i in kept:
                outputs_of[i] = outputs.detach()
            loss = _loss(path, batch, outputs, outputs_of)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                supernet.optimizer.zero_grad(set_to_none=True)
                name = path.architecture.to_json()
                raise NotFinite(f"step {step}: the loss of {name} is {losses[-1]}; the step was not taken")
            if loss.requires_grad:  # not for a frozen model without adapters
                (loss * (share * path.weight)).backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in supernet.parameters() if parameter.grad is not None]
    if not _all_finite(gradients):
        supernet.optimizer.zero_grad(set_to_none=True)
        names = ", ".join(path.architecture.to_json() for path in paths)
        raise NotFinite(f"step {step}: a gradient of {names} is not finite; the step was not taken")
    if clip is not None and gradients:
        torch.nn.utils.clip_grad_value_([p for p in supernet.parameters() if p.grad is not None], clip)
    supernet.optimizer.step()
    return losses


def _loss(path: Path, batch: Batch, outputs: Tensor, outputs_of: dict[int | nn.Module, Tensor]) -> Tensor:
    """Of one path, before its weight. ``outputs`` is ``(n, classes)``."""
    loss = batch.losses(outputs).mean() * path.hard if path.hard else outputs.new_zeros(())
    if path.soft and path.teacher is not None:
        if path.teacher not in outputs_of:
            if isinstance(path.teacher, int):
                raise ValueError(f"path {path.teacher} cannot teach: it is not an earlier path of the step")
            with torch.no_grad():
                outputs_of[path.teacher] = batch.outputs(path.teacher)
        loss = loss + path.soft * path.divergence(outputs, outputs_of[path.teacher])
    return loss


def _gradient_norms(supernet: Supernet) -> dict[Key, float]:
    used = {key: parameter.grad for key, parameter in supernet.store.items() if parameter.grad is not None}
    norms = torch._foreach_norm(list(used.values())) if used else []
    return dict(zip(used, torch.stack(list(norms)).tolist() if used else [], strict=True))


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    return bool(torch.nn.utils.get_total_norm(tensors, norm_type=math.inf).isfinite()) if tensors else True


def _seed(seed: int, step: int) -> int:
    return random.Random(f"step/{seed}/{step}").getrandbits(62)
