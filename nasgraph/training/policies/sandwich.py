"""The sandwich rule with in-place distillation."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nasgraph.errors import ConfigError
from nasgraph.space import Label, SearchSpace
from nasgraph.training.distill import divergence
from nasgraph.training.policies.base import Path, Policy
from nasgraph.training.policies.sizes import at_least, check_labels, extremes, with_labels

if TYPE_CHECKING:
    from nasgraph.supernet import Supernet


class Sandwich(Policy):
    """The largest, the smallest and ``n`` random architectures a step (Yu et al., BigNAS, ECCV 2020, section 3.1).

    The largest learns from the labels, the others from its outputs in the same step. Decisions that ``largest`` and
    ``smallest`` do not name are drawn anew each step: an operation is not larger than another, and a dropout rate has
    no size.

    Args:
        largest: labels of the decisions that make an architecture large; default: those of :func:`extremes` by
            parameters, for which ``supernet`` is needed.
        smallest: likewise.
        n: how many random ones.
        distill: how the others learn: ``kl`` from the teacher's probabilities; ``alpha``, by the adaptive
            alpha-divergence (Wang et al., AlphaNet, ICML 2021, who clip gradients at 1.0); ``none``, from labels.

    Raises: SpaceError: a label that the space does not have. ConfigError: another argument is wrong.
    """

    def __init__(
        self,
        space: SearchSpace,
        largest: Mapping[str, Label] | None = None,
        smallest: Mapping[str, Label] | None = None,
        n: int = 2,
        distill: str = "kl",
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

    def sample(self, step: int, rng: random.Random) -> list[Path]:
        first, *others = [with_labels(self.space, labels, rng) for labels in (self.largest, self.smallest)]
        others += [self.space.sample(rng) for _ in range(self.n)]
        if self.divergence is None:
            return [Path(arch) for arch in (first, *others)]
        return [Path(first), *(Path(arch, hard=0, soft=1, teacher=0, divergence=self.divergence) for arch in others)]
