"""Ordered dropout of factorised layers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from nasgraph.declare import ops_in
from nasgraph.errors import ConfigError, SpaceError
from nasgraph.space import TRIES, Architecture, Choice, Label, SearchSpace
from nasgraph.training.policies.base import Policy
from nasgraph.training.policies.sizes import check_labels
from nasgraph.transforms.low_rank import LowRank


class OrderedDropout(Policy):
    """One layer at a random rank, all others at their largest (Horvath et al., Maestro, ICML 2024).

    So the leading ranks of a layer, which more steps train, become the more important ones. Decisions that are no
    ranks are drawn uniformly. If ranks of the space may also be ``None``, the plain layers are trained beside: a second
    path of the step has ``None`` wherever it can.

    Args:
        ranks: of each choice of a rank the labels from small to large, without ``None``; default: all choices of
            ``LowRank`` ranks, whose options must then be all whole numbers or all fractions.

    Raises: SpaceError: a label that the space does not have. ConfigError: the space has no ranks, or mixed ones.
    """

    def __init__(self, space: SearchSpace, ranks: Mapping[str, Sequence[Label]] | None = None) -> None:
        if ranks is None:
            ranks = {choice.name: _ascending(choice) for choice in rank_choices(space)}
        for name, labels in ranks.items():
            for label in labels:
                check_labels(space, {name: label})
        self.space, self.ranks = space, {name: tuple(labels) for name, labels in ranks.items() if labels}
        if not self.ranks:
            raise ConfigError(f"ordered_dropout: space '{space.name}' has no choice of a LowRank rank")
        self.plain = {name for name in self.ranks if None in space.choices[name].labels}

    def sample(self, step: int, rng: random.Random) -> list[Architecture]:
        for _ in range(TRIES):
            drawn: dict[str, Label] = {}
            full = self._at({name: labels[-1] for name, labels in self.ranks.items()}, drawn, rng)
            layer = rng.choice([name for name in full if name in self.ranks] or [""])
            found = [full]
            if layer:
                found = [self._at({layer: rng.choice(self.ranks[layer])}, drawn, rng)]
            if self.plain & set(full):
                found.append(self._at(dict.fromkeys(self.plain), drawn, rng))
            if not any(self.space.violated(arch) for arch in found):
                return found
        raise SpaceError(f"no architectures at full rank met the constraints of '{self.space.name}'")

    def _at(self, ranks: Mapping[str, Label], drawn: dict[str, Label], rng: random.Random) -> Architecture:
        """Largest ranks but for ``ranks``; what is no rank is taken from ``drawn``, or drawn and put there."""

        def pick(choice: Choice) -> Label:
            if choice.name in ranks:
                return ranks[choice.name]
            if choice.name in self.ranks:
                return self.ranks[choice.name][-1]
            if choice.name not in drawn:
                drawn[choice.name] = rng.choice(choice.labels)
            return drawn[choice.name]

        return self.space.decide(pick)


def rank_choices(space: SearchSpace) -> list[Choice]:
    """The choices that are the ``rank`` of a ``LowRank`` transform somewhere in ``space``."""
    found = {
        op.kwargs["rank"].name: space.choices[op.kwargs["rank"].name]
        for node in space._ops.values()
        for op in ops_in(node)
        if op.make is LowRank and isinstance(op.kwargs.get("rank"), Choice)
    }
    return list(found.values())


def _ascending(choice: Choice) -> list[Label]:
    pairs = [(choice.option(label), label) for label in choice.labels if choice.option(label) is not None]
    if len({type(option) for option, _ in pairs}) > 1:
        raise ConfigError(f"ordered_dropout: '{choice.name}' mixes ranks and shares of full rank: give ranks in order")
    return [label for _, label in sorted(pairs)]
