"""Nested subnets with one shared ratio."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nasgraph.errors import ConfigError, SpaceError
from nasgraph.space import TRIES, Architecture, Choice, Label, SearchSpace
from nasgraph.training.policies.base import Policy
from nasgraph.training.policies.sizes import at_least, by_size, check_labels

if TYPE_CHECKING:
    from nasgraph.supernet import Supernet


class Nested(Policy):
    """``n`` subnets of which each is a part of the next, all from the labels (Valipour et al., SortedNet, 2023).

    One ratio decides all sizes at once: at level ``i`` of ``levels`` a choice with ``m`` labels takes the one at
    ``i / (levels - 1)`` of its order, rounded. The levels of a step differ, each is equally likely. Decisions without
    a size, such as operations, are drawn once for all subnets of a step; otherwise these would not be nested.

    Args:
        order: of each size the labels from small to large; default: those of :func:`by_size` by parameters, for which
            ``supernet`` is needed.
        levels: how many ratios; default: as many as the longest order has labels.
        n: how many subnets' gradients make one update.

    Raises: SpaceError: a label that the space does not have. ConfigError: another argument is wrong.
    """

    def __init__(
        self,
        space: SearchSpace,
        supernet: Supernet | None = None,
        order: Mapping[str, Sequence[Label]] | None = None,
        levels: int | None = None,
        n: int = 2,
    ) -> None:
        if order is None:
            if supernet is None:
                raise ConfigError("nested needs the supernet, or an order of the sizes")
            order = by_size(space, supernet.params)
        for name, labels in order.items():
            for label in labels:
                check_labels(space, {name: label})
            at_least(f"the number of labels of '{name}' in order", len(labels), 1)
        self.space, self.order = space, {name: tuple(labels) for name, labels in order.items()}
        longest = max(map(len, self.order.values()), default=1)
        self.levels = longest if levels is None else at_least("levels", levels, 1)
        self.n = at_least("n", n, 1)

    def sample(self, step: int, rng: random.Random) -> list[Architecture]:
        for _ in range(TRIES):
            levels = rng.sample(range(self.levels), min(self.n, self.levels))
            others: dict[str, Label] = {}
            found = [self.at(level, others, rng) for level in levels]
            if not any(self.space.violated(arch) for arch in found):
                return found
        raise SpaceError(f"no nested architectures met the constraints of '{self.space.name}'")

    def at(self, level: int, others: dict[str, Label], rng: random.Random) -> Architecture:
        """The subnet of ``level``; decisions without a size are taken from ``others``, or drawn and put there."""

        def pick(choice: Choice) -> Label:
            labels = self.order.get(choice.name)
            if labels is None:
                if choice.name not in others:
                    others[choice.name] = rng.choice(choice.labels)
                return others[choice.name]
            if self.levels == 1:
                return labels[-1]
            last = self.levels - 1
            return labels[(2 * level * (len(labels) - 1) + last) // (2 * last)]  # rounded, halves up

        return self.space.decide(pick)
