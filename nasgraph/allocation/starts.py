"""First trials without training: what each option of each transform costs and breaks, alone, on one batch.

    rows = effects(space, network, reference, batch, "sensitivity", cost)
    front(rows)                   the assignments from the cheapest to the least damaging

Damage is added up over choices as if they did not act on each other (as in HAWQ-V2, Dong et al., NeurIPS 2020), so the
best assignments are a knapsack whose fractional optimum is found exactly. They are starts, not results: the search
evaluates them like any other trial. :func:`first_trials` does all of it.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nasgraph.build import build, node_seed
from nasgraph.declare import choices_in, ops_in, ways
from nasgraph.errors import ConfigError, SpaceError, did_you_mean
from nasgraph.space import Architecture, Choice, Label, Op, SearchSpace
from nasgraph.tasks.batch import Batch
from nasgraph.transforms.base import Transform, transformed
from nasgraph.transforms.damage import METHODS
from nasgraph.transforms.lora import Lora
from nasgraph.transforms.low_rank import LowRank
from nasgraph.transforms.prune import Prune
from nasgraph.transforms.quantize import Quantize

Network = Callable[[Architecture], nn.Module]
Cost = Callable[[Architecture], float]


# Transforms of which a method says nothing.
SILENT: dict[str, tuple[type[Transform], ...]] = {
    "stable_rank": (Lora, Prune, Quantize),
    "gradients": (LowRank, Prune, Quantize),
    "sqnr": (Lora,),
}


@dataclass(frozen=True)
class Effect:
    """What one option of one choice does to the reference network.

    Attributes:
        damage: see :data:`nasgraph.transforms.damage.METHODS`; smaller is better.
        cost: with this option, everything else as in the reference.
    """

    choice: str
    label: Label
    damage: float
    cost: float


@dataclass(frozen=True)
class Assignment:
    """An option for each choice, and the sums that are expected of it: damage and cost beside the reference's."""

    labels: dict[str, Label]
    damage: float
    cost: float


# ---- the space ----------------------------------------------------------------------------------------------------


def transform_ops(space: SearchSpace) -> list[Op]:
    """The transforms declared in ``space``, with their choices open."""
    found: dict[int, Op] = {}
    for node in space._ops.values():
        for op in ops_in(node):
            if isinstance(op.make, type) and issubclass(op.make, Transform):
                found[id(op)] = op
    return list(found.values())


def transform_choices(space: SearchSpace) -> list[str]:
    """Names of the choices that are settings of transforms."""
    return list(dict.fromkeys(choice.name for op in transform_ops(space) for choice in choices_in(op)))


def says_something(method: str, space: SearchSpace) -> bool:
    """Whether a method of :data:`nasgraph.transforms.damage.METHODS` is for some transform of ``space`` with a choice.

    Of transforms of one's own that is not known, so they count.
    """
    kinds = {op.make for op in transform_ops(space) if any(choices_in(op))}
    silent = SILENT.get(method, ())
    return any(not (isinstance(kind, type) and issubclass(kind, silent)) for kind in kinds)


def reference(space: SearchSpace, given: Mapping[str, Label] | None = None) -> Architecture:
    """The architecture that transforms change least: neutral where they can be, else ``None`` or the largest number.

    Choices that belong to no transform are as in ``given``, or drawn.

    Raises: SpaceError: no transform of the space has a choice.
    """
    if not transform_choices(space):
        raise SpaceError(f"space '{space.name}' has no transform with a choice: there is nothing to measure")
    mildest: dict[str, Label] = {}
    for op in transform_ops(space):
        for cube, made in ways(op, {name: frozenset([label]) for name, label in mildest.items()}):
            if made.make(**made.kwargs).neutral():
                mildest |= {name: next(iter(labels)) for name, labels in cube.items() if len(labels) == 1}
                break
        else:
            for choice in choices_in(op):
                mildest.setdefault(choice.name, _mildest(space.choices[choice.name]))
    others = given if given is not None else space.sample(random.Random(0))
    return _decided(space, {**others, **mildest})


def _mildest(choice: Choice) -> Label:
    """The label of ``None`` or of the largest number among the options; the first, if they are neither."""
    options = {label: choice.option(label) for label in choice.labels}
    for label, option in options.items():
        if option is None:
            return label
    numbers = [label for label, option in options.items() if isinstance(option, int | float)]
    return max(numbers, key=options.__getitem__) if len(numbers) == len(options) else choice.labels[0]


def _decided(space: SearchSpace, labels: Mapping[str, Label]) -> Architecture:
    """The architecture of ``labels``; the first label of each choice that is asked and not named."""
    return space.decide(lambda choice: labels.get(choice.name, choice.labels[0]))


def networks_of(space: SearchSpace, trained: nn.Module, seed: int = 0) -> Network:
    """Networks whose operations are those of ``trained``, rewritten: for a declared space without a supernet.

    ``trained`` is :func:`plain_network`, trained. The network of an architecture has its operations and parameters,
    rewritten by the architecture's transforms, without further training.
    """

    def network(architecture: Architecture) -> nn.Module:
        model = build(space, architecture, seed)
        for name, made in model.meta["calls"].items():
            module = copy.deepcopy(trained.get_submodule(name))
            if made.make is transformed:
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(node_seed(seed, name))
                    module = transformed(module, [each.thing() for each in made.kwargs["transforms"]])
            setattr(model, name, module)
        return model.to(next(trained.parameters()).device).eval()

    return network


def plain_network(space: SearchSpace, architecture: Mapping[str, Label], seed: int = 0) -> nn.Module:
    """The network of ``architecture`` without any transform, untrained."""
    model = build(space, architecture, seed)
    for name, made in list(model.meta["calls"].items()):
        if made.make is transformed:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(node_seed(seed, name))
                setattr(model, name, made.kwargs["op"]())
    return model


# ---- the table and its front --------------------------------------------------------------------------------------


def effects(
    space: SearchSpace, network: Network, architecture: Architecture, batch: Batch, method: str, cost: Cost
) -> list[Effect]:
    """Every option of every transform's choice, alone, in the network of ``architecture``.

    Args:
        network: makes the trained network of an architecture: ``Supernet.calibrated``, :func:`networks_of`, or
            ``functools.partial(build, space)`` for a space over a trained model.
        method: a name in :data:`nasgraph.transforms.damage.METHODS`.
        cost: of an architecture, e.g. its bits.

    Raises: ConfigError: an unknown method.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}.{did_you_mean(method, METHODS)} Known: {', '.join(METHODS)}.")
    start = network(architecture).eval()
    damage, own = METHODS[method](start, batch), cost(architecture)
    rows: list[Effect] = []
    for name in transform_choices(space):
        if name not in architecture:
            continue
        for label in space.choices[name].labels:
            if label == architecture[name]:
                rows.append(Effect(name, label, damage(start), own))
                continue
            changed = _decided(space, {**architecture, name: label})
            rows.append(Effect(name, label, damage(network(changed).eval()), cost(changed)))
    return rows


def front(rows: Sequence[Effect], architecture: Mapping[str, Label]) -> list[Assignment]:
    """Assignments on the lower hull of (cost, damage), from the cheapest to the least damaging.

    Each has the least damage among all that cost no more, both added up over choices. A choice whose options all do
    the same damage is one that the method says nothing of: it stays as in ``architecture``.
    """
    tables: dict[str, list[Effect]] = {}
    for row in rows:
        tables.setdefault(row.choice, []).append(row)
    at: dict[str, Effect] = {}
    steps: list[tuple[float, int, str, Effect]] = []
    for name, table in tables.items():
        if max(row.damage for row in table) == min(row.damage for row in table):
            continue
        hull = _hull(table)
        at[name] = hull[0]
        gains = [(a.damage - b.damage) / (b.cost - a.cost) for a, b in zip(hull, hull[1:], strict=False)]
        steps += [(-gain, i, name, row) for i, (gain, row) in enumerate(zip(gains, hull[1:], strict=True))]
    found = [_assignment(at, tables, architecture)]
    for _, _, name, row in sorted(steps, key=lambda step: step[:3]):
        at[name] = row
        found.append(_assignment(at, tables, architecture))
    return found


def _hull(table: Sequence[Effect]) -> list[Effect]:
    """The lower convex hull from the cheapest option to the least damaging one."""
    hull: list[Effect] = []
    for row in sorted(table, key=lambda row: (row.cost, row.damage)):
        if hull and row.damage >= hull[-1].damage:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], row):
            hull.pop()
        hull.append(row)
    return hull


def _above(a: Effect, b: Effect, c: Effect) -> bool:
    """Whether ``b`` lies on or above the line from ``a`` to ``c``."""
    return (b.damage - a.damage) * (c.cost - a.cost) >= (c.damage - a.damage) * (b.cost - a.cost)


def _assignment(
    at: Mapping[str, Effect], tables: Mapping[str, Sequence[Effect]], architecture: Mapping[str, Label]
) -> Assignment:
    damage, cost = 0.0, 0.0
    for name, row in at.items():
        own = next(each for each in tables[name] if each.label == architecture[name])
        damage, cost = damage + row.damage - own.damage, cost + row.cost - own.cost
    return Assignment({name: row.label for name, row in at.items()}, damage, cost)


def within(assignments: Sequence[Assignment], budget: float) -> Assignment:
    """The least damaging of :func:`front` whose cost, beside the reference's, is at most ``budget``.

    Raises: ConfigError: even the cheapest costs more.
    """
    fitting = [each for each in assignments if each.cost <= budget]
    if not fitting:
        raise ConfigError(f"the cheapest assignment changes the cost by {assignments[0].cost:g}, above {budget:g}")
    return min(fitting, key=lambda each: each.damage)


def first_trials(
    space: SearchSpace,
    network: Network,
    architecture: Architecture,
    batch: Batch,
    cost: Cost,
    methods: Sequence[str] = ("sensitivity", "gradients"),
    n: int = 8,
) -> list[Architecture]:
    """``n`` architectures, or fewer, from the cheapest to the least damaging: for ``Study.run(first=...)``.

    Each method has a front of the choices that it says something of; a choice belongs to the first such method. An
    architecture has the assignments at the same share of the way along each front. Those that break a constraint of
    the space are left out; of the others ``n`` are taken at equal distances.
    """
    fronts: list[list[Assignment]] = []
    taken: set[str] = set()
    for method in methods:
        rows = [row for row in effects(space, network, architecture, batch, method, cost) if row.choice not in taken]
        fronts.append(front(rows, architecture))
        taken |= set(fronts[-1][0].labels)
    found: dict[Architecture, None] = {}
    points = max(len(assignments) for assignments in fronts)
    for i in range(points):
        labels: dict[str, Label] = dict(architecture)
        for assignments in fronts:
            labels |= assignments[round(i * (len(assignments) - 1) / max(1, points - 1))].labels
        found.setdefault(_decided(space, labels))
    allowed = [each for each in found if not space.violated(each)]
    chosen = [round(i * (len(allowed) - 1) / max(1, n - 1)) for i in range(n)] if allowed else []
    return [allowed[i] for i in dict.fromkeys(chosen)]
