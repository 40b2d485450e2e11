"""What a policy is, what it asks for and what it learns."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nasgraph.space import Architecture
from nasgraph.training.distill import Divergence, kl

Key = tuple[str, str, str]  # of a stored parameter: node, option, name within the operation


@dataclass(frozen=True, eq=False)
class Path:
    """One architecture of a step and its loss: ``weight * (hard * cross-entropy + soft * divergence)``.

    Args:
        weight: of its loss in the sum or mean of the step.
        hard: share of the cross-entropy with the labels.
        soft: share of the divergence from the outputs of ``teacher``.
        teacher: the position of an earlier path of the same step, or a network in evaluation mode. No gradient
            reaches it.
        divergence: of ``(student, teacher)`` logits, both ``(n, classes)``, a scalar.

    Raises: ValueError: ``soft`` without a teacher.
    """

    architecture: Architecture
    weight: float = 1.0
    hard: float = 1.0
    soft: float = 0.0
    teacher: int | nn.Module | None = None
    divergence: Divergence = kl

    def __post_init__(self) -> None:
        if self.soft and self.teacher is None:
            raise ValueError("a path with soft targets needs a teacher")


@dataclass(frozen=True, eq=False)
class Step:
    """What one update was.

    Attributes:
        number: from 0.
        losses: of each path in nats, before its ``weight``.
        gradient_norms: of each stored parameter that the step's paths use, by (node, option, name), the Euclidean
            norm of the gradient that the optimizer was given (weighted, reduced and clipped). Computed when called,
            and only inside ``observe``.
    """

    number: int
    paths: Sequence[Path]
    losses: Sequence[float]
    gradient_norms: Callable[[], dict[Key, float]]

    @property
    def architectures(self) -> list[Architecture]:
        """Of each path."""
        return [path.architecture for path in self.paths]


class Policy:
    """What a policy is. Inherit it and give ``sample``; the rest has defaults."""

    def sample(self, step: int, rng: random.Random) -> Sequence[Architecture | Path]:
        """The architectures of one step, at least one; their gradients make one update.

        A plain architecture is a :class:`Path` that learns from the labels. ``rng`` is seeded with the training's seed
        and ``step``; draw from nothing else.
        """
        raise NotImplementedError

    def observe(self, step: Step) -> None:
        """Called after each update."""

    def state(self) -> dict[str, Any]:
        """What ``sample`` and ``observe`` changed, for a checkpoint: JSON values, and at the top level tensors."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state`` gave."""
