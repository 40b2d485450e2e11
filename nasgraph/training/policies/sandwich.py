"""The sandwich rule with in-place distillation."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nasgraph.errors import ConfigError
from nasgraph.space import Label, Op, SearchSpace
from nasgraph.training.distill import divergence
from nasgraph.training.policies.base import Path, Policy
from nasgraph.training.policies.sizes import at_least, check_labels, extremes, with_labels

if TYPE_CHECKING:
    from nasgraph.supernet import Supernet


class Sandwich(Policy):
    """The largest, the smallest and ``n`` random architectures a step (Yu et al., BigNAS, ECCV 2020, section 3.1).

    The largest learns from the labels, the others from its outputs in the same step. Decisions that ``largest`` and
    ``smallest`` do not name are drawn anew each step: an operation is not larger than another, and a dropout rate has
    no size. Where such a decision is between operations, the largest is another network each step, and its outputs are
    no answer until all operations have learned one; so there the others learn from the labels too.

    Args:
        largest: labels of the decisions that make an architecture large; default: those of :func:`extremes` by
            parameters, for which ``supernet`` is needed.
        smallest: likewise.
        n: how many random ones.
        distill: how the others learn: ``kl`` from the teacher's probabilities; ``alpha``, by the adaptive
            alpha-divergence (Wang et al., AlphaNet, ICML 2021, who clip gradients at 1.0); ``none``, from labels.
        hard: weight of the labels beside the teacher; default: 1 where operations are chosen, otherwise 0 as published.

    Raises: SpaceError: a label that the space does not have. ConfigError: another argument is wrong.
    """

    def __init__(
        self,
        space: SearchSpace,
        largest: Mapping[str, Label] | None = None,
        smallest: Mapping[str, Label] | None = None,
        n: int = 2,
        distill: str = "kl",
        hard: float | None = None,
        supernet: Supernet | None = None,
    ) -> None:
        if largest is None or smallest is None:
            if supernet is None:
                raise ConfigError("sandwich needs the supernet, or both largest and smallest")
            ends = extremes(space, supernet.params)
            largest, smallest = largest or ends[0], smallest or ends[1]
        check_labels(space, largest)
        check_labels(space, smallest)
        self.space, self.largest, self.smallest, self.n = space, dict(largest), dict(smallest), at_least("n", n, 0)
        self.divergence = divergence(distill)
        if hard is not None and not 0 <= hard < float("inf"):
            raise ConfigError(f"hard is {hard!r}: give a weight of 0 or more")
        operations = any(isinstance(o, Op) for c in space.choices.values() if c.name not in largest for o in c.options)
        self.hard = float(operations) if hard is None else float(hard)

    def sample(self, step: int, rng: random.Random) -> list[Path]:
        first, *others = [with_labels(self.space, labels, rng) for labels in (self.largest, self.smallest)]
        others += [self.space.sample(rng) for _ in range(self.n)]
        if self.divergence is None:
            return [Path(arch) for arch in (first, *others)]
        students = (Path(arch, hard=self.hard, soft=1, teacher=0, divergence=self.divergence) for arch in others)
        return [Path(first), *students]
