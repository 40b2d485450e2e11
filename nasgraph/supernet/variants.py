"""Every form that each operation of a space can take: its arguments, and the sizes that reach it.

One walk forwards. Of each node it keeps the shapes that the node's tensor can have, each with the decisions that lead
to it; decisions that make no difference to the shape are dropped at once. So the walk sees 3e9 architectures as a few
hundred forms, and exactly those that occur (before constraints).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nasgraph.build import Made, _made, _Shapes, _written
from nasgraph.declare import Cube, reads, ways
from nasgraph.errors import SpaceError
from nasgraph.space import Choice, ConcreteOp, Label, Op, SearchSpace, Step, Switch

Shape = tuple[int, ...]
Tensors = tuple[Shape, torch.dtype]

LIMIT = 20_000  # forms of one node


@dataclass(frozen=True, eq=False)
class Variant:
    """One form of an operation. ``module`` is on the meta device: it has shapes and no numbers."""

    made: Made
    module: nn.Module

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of each parameter."""
        return {name: tuple(parameter.shape) for name, parameter in self.module.named_parameters()}


def variants(space: SearchSpace) -> dict[tuple[str, str], list[Variant]]:
    """By (node, option): its forms that have parameters, in an order that only the space's declaration decides.

    Raises: SpaceError: no architecture can be built, or a node has more than 20,000 forms.
    """
    if space._output is None:
        raise SpaceError(f"space '{space.name}' has no output: call space.output(node)")
    tables: dict[str, list[tuple[Cube, Tensors]]] = {
        name: [({}, (tuple(declared.example.shape), declared.example.dtype))] for name, declared in space.inputs.items()
    }
    known: dict[tuple[str, tuple[Tensors, ...]], tuple[Tensors, Variant | None] | SpaceError] = {}
    found: dict[tuple[str, str], list[Variant]] = {}
    failed: SpaceError | None = None
    for name in space._ops:
        names = options(space, name)
        forms: list[tuple[Cube, Tensors]] = []
        for cube, op, make, sources in _readings(space, name, apart=True):
            for joined, shapes in _joined(cube, [tables[source] for source in sources]):
                signature = (op.signature, shapes)
                if signature not in known:
                    known[signature] = _form(space, Step(name, op, sources), shapes)
                form = known[signature]
                if isinstance(form, SpaceError):  # a constraint may exclude it; build() will tell
                    failed = failed or form
                    continue
                forms.append((joined, form[0]))
                if len(forms) > LIMIT:
                    raise SpaceError(f"node '{name}' has more than {LIMIT:,} forms: offer fewer sizes in a supernet")
                mine = found.setdefault((name, names[id(make)]), [])
                if form[1] is not None and form[1] not in mine:
                    mine.append(form[1])
        tables[name] = _merged(forms, space.choices)
    if not any(tables[source.name] for _, source in ways(space._output, {})):
        raise failed or SpaceError(f"space '{space.name}' has no architecture")
    return {key: forms for key, forms in found.items() if forms}


def options(space: SearchSpace, node: str) -> dict[int, str]:
    """Of each ``Op`` that ``node`` may be (by ``id``) the option's name: the labels that lead to it, or its own.

    Options that :meth:`SearchSpace.narrowed` left out are named too, so the others are called as before.
    """
    names: dict[int, str] = {}
    for path, op in _paths(space._ops[node], ()):
        if id(op) not in names:
            name = "/".join(map(str, path)) or op.label
            while name in names.values():  # the labels 1 and "1"
                name += "'"
            names[id(op)] = name
    return names


def chosen(space: SearchSpace, node: str, architecture: Mapping[str, Label]) -> Op:
    """The ``Op`` that ``node`` is in ``architecture``."""
    thing = space._ops[node]
    while not isinstance(thing, Op):
        thing = _next(thing, architecture)
    return thing


def _next(thing: Any, architecture: Mapping[str, Label]) -> Any:
    if isinstance(thing, Switch):
        return thing.cases[architecture[thing.choice.name]]
    return thing.option(architecture[thing.name])


def _paths(thing: Any, path: tuple[Label, ...]) -> Iterator[tuple[tuple[Label, ...], Op]]:
    if isinstance(thing, Op):
        yield path, thing
        return
    for label, option in thing.declared:
        yield from _paths(option, (*path, label))


def _readings(
    space: SearchSpace, node: str, apart: bool = False
) -> Iterator[tuple[Cube, ConcreteOp, Op, tuple[str, ...]]]:
    """Every way to decide what ``node`` is and what it reads. ``apart``: with one transform at a time."""
    for cube, make in ways(space._ops[node], {}, whole=True):
        for some in _parts(make) if apart else [make]:
            for with_op, op in ways(some, cube):
                for decided, sources in ways(space._sources[node][: reads(op)], with_op):
                    yield decided, op, make, tuple(source.name for source in sources)


def _parts(op: Op) -> list[Op]:
    """Operations that together show all parameters of ``op``.

    Transforms of one operation add parameters without looking at each other, so one at a time shows them all: a sum of
    their options, not a product. Those that replace a layer (``structural``) are always there.
    """
    transforms = op.kwargs.get("transforms") if getattr(op.make, "one_at_a_time", False) else None
    if not transforms:
        return [op]
    always = [each for each in transforms if getattr(each.make, "structural", False)]
    lists = [[*always, part] for each in transforms if each not in always for part in _apart(each)] or [always]
    return [Op(op.make, label=op.label, takes=op.takes, **{**op.kwargs, "transforms": some}) for some in lists]


def _apart(op: Op) -> list[Op]:
    """A transform that rewrites several things which do not concern each other (its ``apart``), one at a time."""
    groups = getattr(op.make, "apart", ())
    shared = {name: value for name, value in op.kwargs.items() if not any(name in group for group in groups)}
    parts = [{name: op.kwargs[name] for name in group if name in op.kwargs} for group in groups]
    return [Op(op.make, label=op.label, **shared, **part) for part in parts] or [op]


def _joined(cube: Cube, tables: list[list[tuple[Cube, Tensors]]]) -> Iterator[tuple[Cube, tuple[Tensors, ...]]]:
    """What the sources can be together, given ``cube``."""
    for entries in itertools.product(*tables):
        joined: Cube = cube
        for other, _ in entries:
            joined = _both(joined, other)
        if all(joined.values()):
            yield joined, tuple(tensor for _, tensor in entries)


def _both(one: Cube, other: Cube) -> Cube:
    """Where both hold; a choice without labels if they never do."""
    return {**one, **{name: labels & one.get(name, labels) for name, labels in other.items()}}


def _merged(forms: list[tuple[Cube, Tensors]], choices: Mapping[str, Choice]) -> list[tuple[Cube, Tensors]]:
    """The same shapes under the same decisions, in fewer entries."""
    before = -1
    while before != sum(len(cube) + 1 for cube, _ in forms):
        before = sum(len(cube) + 1 for cube, _ in forms)
        for name in dict.fromkeys(name for cube, _ in forms for name in cube):
            every = frozenset(choices[name].labels)
            groups: dict[tuple[tuple[tuple[str, frozenset[Label]], ...], Tensors], frozenset[Label]] = {}
            for cube, tensor in forms:
                # Sorted by name: the order of a set differs between processes, and the start of the store follows it.
                rest = tuple(
                    sorted(((other, cube[other]) for other in cube if other != name), key=lambda item: item[0])
                )
                groups[rest, tensor] = groups.get((rest, tensor), frozenset()) | cube.get(name, every)
            forms = [
                (dict(rest) if labels == every else {**dict(rest), name: labels}, tensor)
                for (rest, tensor), labels in groups.items()
            ]
    return forms


def _form(space: SearchSpace, step: Step, sources: tuple[Tensors, ...]) -> tuple[Tensors, Variant | None] | SpaceError:
    """Make and run one operation on tensors like ``sources``: what comes out, and what was made."""
    shapes = _Shapes(space)
    shapes.shapes.update(zip(step.sources, sources, strict=True))
    variant = None
    try:
        if step.op.is_call:
            shapes.after(step, None)
        else:
            made = _made(step.op, shapes.channels(step.sources[0]))
            with torch.random.fork_rng(devices=[]):
                try:
                    module = made()
                except Exception as error:
                    raise SpaceError(f"node '{step.name}': {_written(made)} failed: {error}") from error
                shapes.after(step, module)
            if next(module.parameters(), None) is not None:
                variant = Variant(made, module.to("meta"))
    except SpaceError as error:
        return error
    return shapes.shapes[step.name], variant
