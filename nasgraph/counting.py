"""How many architectures a space has, exactly, without enumerating them: see :func:`size`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nasgraph.declare import (
    Arithmetic,
    Choice,
    ConcreteOp,
    Label,
    Node,
    Op,
    Switch,
    choices_in,
    parts_of,
    reads,
    switches_in,
)
from nasgraph.errors import SpaceError
from nasgraph.space import SearchSpace


def size(space: SearchSpace, limit: int = 1_000_000) -> int:
    """How many architectures there are before constraints, exactly, without enumerating them.

    One pass backwards over the nodes. Partial decisions are merged when they reach the same nodes and agree on
    every choice that a node further back mentions; labels that lead to the same nodes and choices count together.

    Raises: SpaceError: more than ``limit`` partial decisions would have to be kept apart.
    """
    if space._output is None:
        raise SpaceError(f"space '{space.name}' has no output: call space.output(node)")
    alike = _alike(space)
    labels = {name: tuple(counts) for name, counts in alike.items()}
    mentions: list[set[str]] = [set()]  # choices that node i or one before it may ask
    for node in space._nodes:
        here = (space._ops.get(node.name), space._sources.get(node.name))
        mentions.append(mentions[-1] | {choice.name for choice in choices_in(here)})
    states: Counter[tuple[frozenset[int], frozenset[tuple[str, Label]]]] = Counter()
    for decided, node in _expand(space._output, {}, labels):
        kept = frozenset(item for item in decided.items() if item[0] in mentions[-1])
        states[frozenset([node.index]), kept] += math.prod(alike[name][label] for name, label in decided.items())
    for node in reversed(space._nodes):
        if node.name not in space._ops:
            continue
        after: Counter[tuple[frozenset[int], frozenset[tuple[str, Label]]]] = Counter()
        for (reached, known), count in states.items():
            if node.index not in reached:
                kept = frozenset(item for item in known if item[0] in mentions[node.index])
                after[reached, kept] += count
                continue
            before = dict(known)
            for with_op, op in _expand(space._ops[node.name], before, labels):
                for decided, sources in _expand(space._sources[node.name][: reads(op)], with_op, labels):
                    ways = math.prod(alike[name][decided[name]] for name in decided.keys() - before.keys())
                    kept = frozenset(item for item in decided.items() if item[0] in mentions[node.index])
                    after[reached - {node.index} | {source.index for source in sources}, kept] += count * ways
            if len(after) > limit:
                raise SpaceError(f"space '{space.name}' is too entangled to be counted exactly")
        states = after
    return sum(states.values())


def _alike(space: SearchSpace) -> dict[str, dict[Label, int]]:
    """Of each choice, the labels that differ in what is asked and read after them, with how many are like each."""
    effects: dict[str, list[list[Any]]] = {
        name: [[_effect(option)] for option in choice.options] for name, choice in space.choices.items()
    }
    for switch in switches_in((tuple(space._ops.values()), tuple(space._sources.values()), space._output)):
        for effect, case in zip(effects[switch.choice.name], switch.cases.values(), strict=True):
            effect.append(_effect(case))
    alike: dict[str, dict[Label, int]] = {}
    for name, choice in space.choices.items():
        first: dict[Any, Label] = {}
        counts = alike[name] = {}
        for label, effect in zip(choice.labels, effects[name], strict=True):
            like = first.setdefault(tuple(effect), label)
            counts[like] = counts.get(like, 0) + 1
    return alike


def _effect(thing: Any) -> Any:
    """What ``thing`` makes the walk ask and read, as a value to compare; None: nothing."""
    if isinstance(thing, Choice):
        return ("choice", thing.name)
    if isinstance(thing, Node):
        return ("node", thing.index)
    parts = tuple(effect for effect in map(_effect, parts_of(thing)) if effect is not None)
    if isinstance(thing, Op):
        return ("op", reads(ConcreteOp(thing.make, {}, thing.label, thing.is_call, thing.takes)), parts)
    if isinstance(thing, Switch):
        return ("switch", thing.choice.name, tuple(map(_effect, thing.cases.values())))
    return parts or None


def _expand(
    thing: Any, decided: Mapping[str, Label], labels: Mapping[str, Sequence[Label]]
) -> Iterator[tuple[dict[str, Label], Any]]:
    """Every way to decide the open choices in ``thing``: what is then decided, and ``thing`` with them in place."""
    if isinstance(thing, Choice):
        for label in (decided[thing.name],) if thing.name in decided else labels[thing.name]:
            yield from _expand(thing.option(label), {**decided, thing.name: label}, labels)
    elif isinstance(thing, Switch):
        name = thing.choice.name
        for label in (decided[name],) if name in decided else labels[name]:
            yield from _expand(thing.cases[label], {**decided, name: label}, labels)
    elif isinstance(thing, Op):
        for after, _ in _expand(tuple(thing.kwargs.values()), decided, labels):
            yield after, ConcreteOp(thing.make, {}, thing.label, thing.is_call, thing.takes)
    elif isinstance(thing, Arithmetic):
        for after, _ in _expand((thing.left, thing.right), decided, labels):
            yield after, None
    elif isinstance(thing, dict):
        yield from _expand(tuple(thing.values()), decided, labels)
    elif isinstance(thing, list | tuple):
        if not thing:
            yield dict(decided), ()
            return
        for after, head in _expand(thing[0], decided, labels):
            for last, tail in _expand(thing[1:], after, labels):
                yield last, (head, *tail)
    else:
        yield dict(decided), thing
