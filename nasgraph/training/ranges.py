"""Quantised activations in a search: ranges are those of each batch until an architecture leaves with fixed ones."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from torch import nn

from nasgraph.transforms.ranges import activation_quantizers, freeze_ranges

if TYPE_CHECKING:
    from nasgraph.tasks import Task

SAMPLES, BATCH = 1024, 32


def freeze(model: nn.Module, task: Task, seed: int) -> int:
    """Freeze the ranges of ``model``'s activations, in place, on 1,024 training samples of ``task``.

    They come in batches of 32 drawn from ``seed``, without augmentation. Where each batch of the task shows the same
    (a whole graph, other splits' nodes included; labels are never read), it is shown once.

    Returns: how many ranges the model has; 0: it quantises no activations and nothing was run.
    """
    parts = activation_quantizers(model)
    if parts:
        rng = random.Random(f"ranges/{seed}")
        batches = [task.batch(BATCH, rng.getrandbits(62)).inputs for _ in range(2)]
        if all(a is b for a, b in zip(*batches, strict=True)):
            batches = batches[:1]
        else:
            batches += [task.batch(BATCH, rng.getrandbits(62)).inputs for _ in range(SAMPLES // BATCH - 2)]
        freeze_ranges(model, batches)
    return len(parts)
