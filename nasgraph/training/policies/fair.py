"""Strict fairness."""

from __future__ import annotations

import random

from nasgraph.space import TRIES, Architecture, Choice, Label, SearchSpace
from nasgraph.training.policies.base import Policy


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
