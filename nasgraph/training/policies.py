"""Path policies: which architectures of a supernet one step trains.

A policy is a class with ``sample`` and, if it learns from the losses, ``observe``. What a step trains depends on
(seed, step) and on what was observed, never on what a forward pass draws.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nasgraph.errors import SpaceError
from nasgraph.space import TRIES, Architecture, Choice, Label, Op, SearchSpace


class Policy:
    """What a policy is. Inherit it and give ``sample``.

    Attributes:
        distill: the first architecture of a step learns from the labels, the others from its outputs.
    """

    distill = False

    def sample(self, step: int, rng: random.Random) -> list[Architecture]:
        """The architectures of one step, at least one; their gradients make one update."""
        raise NotImplementedError

    def observe(self, step: int, architectures: Sequence[Architecture], losses: Sequence[float]) -> None:
        """Called after the step with the loss of each of its architectures."""

    def state(self) -> dict[str, Any]:
        """What ``observe`` changed, as plain values for a checkpoint."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state`` gave."""


class Uniform(Policy):
    """One architecture a step, each of its choices uniform (Guo et al., SPOS, ECCV 2020)."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space

    def sample(self, step: int, rng: random.Random) -> list[Architecture]:
        return [self.space.sample(rng)]


class Fair(Policy):
    """Each option of a choice once a round, and one update a round (Chu et al., FairNAS, ICCV 2021, section 3).

    A round has as many architectures as the largest choice has options. A choice deals its options in a random order
    and, once all are dealt, in another. So within a round the options of a choice differ by at most one in how often
    they are trained; each is trained exactly once if the choice is asked as often as it has options. A choice that an
    architecture does not ask deals nothing: fairness is among the architectures that have the choice.

    With constraints, cards that make a forbidden architecture are shuffled and dealt again; if no deal works, the
    architecture is drawn freely and fairness is lost for that one.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.round = max((len(choice.labels) for choice in space.choices.values()), default=1)

    def sample(self, step: int, rng: random.Random) -> list[Architecture]:
        decks: dict[str, list[Label]] = {}
        return [self._deal(decks, rng) for _ in range(self.round)]

    def _deal(self, decks: dict[str, list[Label]], rng: random.Random) -> Architecture:
        for _ in range(TRIES):
            after = {name: list(deck) for name, deck in decks.items()}
            found = self.space.decide(lambda choice, after=after: _card(choice, after, rng))  # type: ignore[misc]
            if not self.space.violated(found):
                decks.update(after)
                return found
            for deck in decks.values():
                rng.shuffle(deck)
        return self.space.sample(rng)


def _card(choice: Choice, decks: dict[str, list[Label]], rng: random.Random) -> Label:
    deck = decks.get(choice.name)
    if not deck:
        deck = decks[choice.name] = rng.sample(choice.labels, len(choice.labels))
    return deck.pop()


class Sandwich(Policy):
    """The largest, the smallest and ``n`` random architectures a step (Yu et al., BigNAS, ECCV 2020, section 3.1).

    Args:
        largest: labels of the decisions that make an architecture large, see :func:`extremes`. Decisions that it does
            not name are drawn anew each step: an operation is not larger than another, and a dropout rate has no size.
        smallest: likewise.
        n: how many random ones.
        distill: only the largest learns from the labels, the others from its outputs.
    """

    def __init__(
        self,
        space: SearchSpace,
        largest: Mapping[str, Label],
        smallest: Mapping[str, Label],
        n: int = 2,
        distill: bool = True,
    ) -> None:
        for labels in (largest, smallest):
            for name, label in labels.items():
                if name not in space.choices:
                    raise SpaceError(f"space '{space.name}' has no choice '{name}'")
                space.choices[name].option(label)
        self.space, self.largest, self.smallest, self.n = space, dict(largest), dict(smallest), n
        self.distill = distill

    def sample(self, step: int, rng: random.Random) -> list[Architecture]:
        ends = [self._with(labels, rng) for labels in (self.largest, self.smallest)]
        return [*ends, *(self.space.sample(rng) for _ in range(self.n))]

    def _with(self, labels: Mapping[str, Label], rng: random.Random) -> Architecture:
        for _ in range(TRIES):
            found = self.space.decide(
                lambda choice: labels[choice.name] if choice.name in labels else rng.choice(choice.labels)
            )
            if not self.space.violated(found):
                return found
        raise SpaceError(f"no architecture with {dict(labels)} met the constraints of '{self.space.name}'")


Labels = dict[str, Label]


def extremes(
    space: SearchSpace, size: Callable[[Architecture], float], seed: int = 0, starts: int = 8
) -> tuple[Labels, Labels]:
    """The decisions of the largest and of the smallest architecture, for :class:`Sandwich`.

    From each of ``starts`` random architectures, the choices that are no choice between operations are moved to the
    label of largest (smallest) ``size`` one after the other, until none moves. Only choices whose labels differ in size
    are named; the labels are those of the largest (smallest) architecture found.

    Args:
        size: e.g. ``Supernet.params``.
    """
    rng = random.Random(f"extremes/{seed}")
    sizes = [choice for choice in space.choices.values() if not any(isinstance(o, Op) for o in choice.options)]
    matters: set[str] = set()
    found: list[tuple[float, Labels]] = []
    begin = [space.sample(rng) for _ in range(starts)]
    for sign in (1, -1):
        best: tuple[float, Labels] | None = None
        for start in begin:
            labels: Labels = {**{choice.name: choice.labels[0] for choice in space.choices.values()}, **start}
            value, moved = sign * size(space.architecture(labels)), True
            while moved:
                moved = False
                for choice in sizes:
                    for label in choice.labels:
                        candidate = space.architecture({**labels, choice.name: label})
                        if space.violated(candidate):
                            continue
                        other = sign * size(candidate)
                        if other != value:
                            matters.add(choice.name)
                        if other > value:
                            labels[choice.name], value, moved = label, other, True
            if best is None or value > best[0]:
                best = (value, labels)
        assert best is not None
        found.append(best)
    (_, largest), (_, smallest) = found
    return {n: largest[n] for n in largest if n in matters}, {n: smallest[n] for n in smallest if n in matters}
