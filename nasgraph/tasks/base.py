"""What a task is: data, a loss and a metric behind six names. Anything that has them is one; nothing is inherited."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import nn

from nasgraph.tasks.batch import Batch
from nasgraph.training.loop import Fit, TrainSettings


@runtime_checkable
class Task(Protocol):
    """Data, a loss and a metric.

    A task travels to worker processes, so it pickles small: it keeps how to get its data and loads them at first use.

    Attributes:
        name: for reports and manifests.
        sizes: keyword arguments that a function making a search space receives, e.g. ``features`` and ``classes``.
        inputs: what ``model(*inputs)`` takes; costs, latency and exports are taken on them.

    Optional: ``baseline()``, what must be beaten: values such as ``test_accuracy`` of a logistic regression, or a dict
    of such values for each of several references by name; ``notes``, plain values for the card of an exported model.
    """

    name: str

    @property
    def sizes(self) -> dict[str, int]: ...

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]: ...

    def batch(self, n: int, seed: int) -> Batch:
        """``n`` training samples (all of them, if there are fewer), balanced over classes, drawn from ``seed``."""
        ...

    def fit(self, model: nn.Module, settings: TrainSettings, seed: int) -> Fit:
        """Train ``model`` in place with early stopping on the validation split; its best weights are left in it."""
        ...

    def score(self, model: nn.Module, split: str) -> dict[str, float]:
        """``{"accuracy": ..., "loss": ...}`` on ``"train"``, ``"val"`` or ``"test"``."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 over the data and its splits, in hexadecimal."""
        ...

    def to(self, device: str | torch.device) -> Task:
        """The same task with its tensors on ``device``."""
        ...
