"""Which decisions make a network larger."""

from __future__ import annotations

import contextlib
import functools
import math
import random
from collections.abc import Callable, Mapping

from nasgraph.declare import ops_in
from nasgraph.errors import ConfigError, SpaceError
from nasgraph.space import TRIES, Architecture, Choice, Label, Op, SearchSpace

Labels = dict[str, Label]
Size = Callable[[Architecture], float]

DRAWS = 256  # random architectures among which each choice is looked for
NOTHING = (-math.inf, -math.inf)  # what an architecture that violates a constraint is worth


def by_size(space: SearchSpace, size: Size, seed: int = 0, starts: int = 4) -> dict[str, tuple[Label, ...]]:
    """Of each choice whose labels differ in size, the labels from the smallest to the largest.

    Choices of bits, ranks and shares that transforms keep are in the order of these numbers (:func:`by_amount`),
    whatever ``size`` says: learned steps are more parameters than none. Choices between operations are left out: an
    operation is not larger than another. Another label's size is the mean over ``starts`` random architectures that
    have the choice, with that label and all else alike, whatever the constraints.

    Args:
        size: e.g. ``Supernet.params``.
    """
    rng = random.Random(f"sizes/{seed}")
    drawn = [space.sample(rng) for _ in range(DRAWS)]
    amounts = by_amount(space)
    found: dict[str, tuple[Label, ...]] = {}
    for choice in _sized(space):
        if choice.name in amounts:
            found[choice.name] = amounts[choice.name]
            continue
        sizes: dict[Label, list[float]] = {label: [] for label in choice.labels}
        for arch in [arch for arch in drawn if choice.name in arch][:starts]:
            context = {**_anything(space, rng), **arch}
            for label in choice.labels:
                with contextlib.suppress(SpaceError):  # a constraint may exclude what cannot be built
                    sizes[label].append(size(space.architecture({**context, choice.name: label})))
        means = {label: sum(each) / len(each) for label, each in sizes.items() if each}
        if len(set(means.values())) > 1:
            found[choice.name] = tuple(sorted(means, key=means.__getitem__))
    return found


def by_amount(space: SearchSpace) -> dict[str, tuple[Label, ...]]:
    """Of each choice that is an amount of a transform (its ``amounts``), the labels from the least to the most.

    Ranks among shares of full rank are left out: which is more depends on the layer.
    """
    found: dict[str, tuple[Label, ...]] = {}
    for op in (op for node in space._ops.values() for op in ops_in(node)):
        for field, none in getattr(op.make, "amounts", {}).items():
            choice = op.kwargs.get(field)
            if not isinstance(choice, Choice):
                continue
            options = {label: choice.option(label) for label in space.choices[choice.name].labels}
            amount = {label: none if option is None else option for label, option in options.items()}
            numbers = [number for number in amount.values() if isinstance(number, int | float)]
            mixed = any(0 < number < 1 for number in numbers) and any(1 < number < math.inf for number in numbers)
            if len(numbers) == len(amount) > 1 and not mixed:
                found[choice.name] = tuple(sorted(amount, key=amount.__getitem__))
    return found


def extremes(space: SearchSpace, size: Size, seed: int = 0, starts: int = 4) -> tuple[Labels, Labels]:
    """The decisions of the largest and of the smallest architecture, for :class:`Sandwich`.

    From ``starts`` architectures with each choice of :func:`by_size` at its end, these choices are moved to the label
    of largest (smallest) ``size`` one after the other, until none moves; amounts of transforms come before ``size``.
    The labels are those of the largest (smallest) architecture found; a choice that it does not have keeps its end.

    Args:
        size: e.g. ``Supernet.params``.
    """
    size = functools.cache(size)
    order = by_size(space, size, seed, starts)
    rng = random.Random(f"extremes/{seed}")
    begin = [{**_anything(space, rng), **space.sample(rng)} for _ in range(starts)]
    return _end(space, size, order, begin, 1), _end(space, size, order, begin, -1)


def _end(
    space: SearchSpace, size: Size, order: Mapping[str, tuple[Label, ...]], begin: list[Labels], sign: int
) -> Labels:
    end = {name: labels[-1 if sign > 0 else 0] for name, labels in order.items()}
    amounts = by_amount(space)

    def measured(labels: Labels, least: float = -math.inf) -> tuple[float, float]:
        """Places of the amounts in their orders, and the size, which is not looked at if these are below ``least``."""
        arch = space.architecture(labels)
        if space.violated(arch):
            return NOTHING
        places = sign * sum(amounts[name].index(label) for name, label in arch.items() if name in amounts)
        return (places, -math.inf if places < least else sign * size(arch))

    best, found = NOTHING, end
    for start in begin:
        labels = {**start, **end}
        value = measured(labels)
        if value == NOTHING:
            labels, value = dict(start), measured(start)
        moved = True
        while moved:
            moved = False
            for name in order:
                for label in order[name]:
                    other = measured({**labels, name: label}, value[0])
                    if other > value:
                        labels, value, moved = {**labels, name: label}, other, True
        if value > best:
            has = space.architecture(labels)
            best, found = value, {name: has.get(name, end[name]) for name in order}
    return found


def with_labels(space: SearchSpace, labels: Mapping[str, Label], rng: random.Random) -> Architecture:
    """An architecture with ``labels``, all else uniform. Raises: SpaceError: none met the constraints."""
    for _ in range(TRIES):
        found = space.decide(lambda choice: labels[choice.name] if choice.name in labels else rng.choice(choice.labels))
        if not space.violated(found):
            return found
    raise SpaceError(f"no architecture with {dict(labels)} met the constraints of '{space.name}'")


def check_labels(space: SearchSpace, labels: Mapping[str, Label]) -> None:
    """Raises: SpaceError: a choice or a label that ``space`` does not have."""
    for name, label in labels.items():
        if name not in space.choices:
            raise SpaceError(f"space '{space.name}' has no choice '{name}'")
        space.choices[name].option(label)


def at_least(name: str, value: object, least: int) -> int:
    """``value``, if it is a whole number that is not below ``least``. Raises: ConfigError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {value!r}: give a whole number of at least {least}")
    return value


def share(name: str, value: object) -> float:
    """``value``, if it is a number from 0 to 1. Raises: ConfigError."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ConfigError(f"{name} is {value!r}: give a number from 0 to 1")
    return float(value)


def _sized(space: SearchSpace) -> list[Choice]:
    return [choice for choice in space.choices.values() if not any(isinstance(o, Op) for o in choice.options)]


def _anything(space: SearchSpace, rng: random.Random) -> Labels:
    """A label for every choice, whether it is asked or not."""
    return {choice.name: rng.choice(choice.labels) for choice in space.choices.values()}
