"""Single path, one shot."""

from __future__ import annotations

import random

from nasgraph.space import Architecture, SearchSpace
from nasgraph.training.policies.base import Policy


class Uniform(Policy):
    """One architecture a step, each of its choices uniform (Guo et al., SPOS, ECCV 2020)."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space

    def sample(self, step: int, rng: random.Random) -> list[Architecture]:
        return [self.space.sample(rng)]
