"""Candidates that a supernet scores: the objectives are the same, nothing is trained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn

from nasgraph.objectives.base import Candidate, Evaluator, Objective
from nasgraph.space import Label, SearchSpace
from nasgraph.training.loop import Fit, TrainSettings

if TYPE_CHECKING:
    from nasgraph.supernet import Supernet
    from nasgraph.tasks.base import Task
    from nasgraph.training.fewshot import FewShot


class SharedCandidate(Candidate):
    """An architecture as a supernet holds it.

    ``model`` is its extraction. ``fits`` is one :class:`Fit` of 0 epochs whose ``val`` is the supernet's validation
    accuracy; its ``val_loss`` was not measured and is NaN.
    """

    def __init__(
        self,
        space: SearchSpace,
        arch: Mapping[str, Label],
        task: Task,
        settings: TrainSettings,
        supernet: Supernet | FewShot,
        samples: int,
    ) -> None:
        super().__init__(space, arch, task, settings)
        self.supernet, self.samples = supernet, samples

    @cached_property
    def model(self) -> nn.Module:
        return self.supernet.extract(self.arch)

    @cached_property
    def params(self) -> int:
        return self.supernet.params(self.arch)

    @cached_property
    def fits(self) -> list[Fit]:
        start = time.perf_counter()
        accuracy = self.supernet.evaluate([self.arch], samples=self.samples)[0]
        self.info["score_seconds"] = time.perf_counter() - start
        return [Fit(accuracy, math.nan, 0, 0, self.info["score_seconds"])]

    @cached_property
    def trained(self) -> nn.Module:
        return self.supernet.calibrated(self.arch, self.samples)


class SharedEvaluator(Evaluator):
    """:class:`Evaluator` that trains nothing: it asks ``supernet``, which was trained on ``task``.

    Args:
        samples: training samples for the BatchNorm statistics of a candidate.
    """

    def __init__(
        self,
        space: SearchSpace | Callable[[], SearchSpace],
        task: Task,
        objectives: Sequence[Objective | str],
        supernet: Supernet | FewShot,
        samples: int,
    ) -> None:
        super().__init__(space, task, objectives)
        self.supernet, self.samples = supernet, samples

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a supernet's evaluator stays in its process: make one in each from the checkpoint")

    def candidate(self, arch: Mapping[str, Label]) -> Candidate:
        return SharedCandidate(self.space, arch, self.task, self.settings, self.supernet, self.samples)
