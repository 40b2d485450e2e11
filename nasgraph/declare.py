"""What a search space is declared with: operations, choices, and the pieces that the walk makes of them.

``SearchSpace`` in ``space.py`` holds a graph of these; users import them from there. The functions below walk through
declarations: what choices and operations are in one, what it is as plain values, what its names are.
"""

from __future__ import annotations

import functools
import json
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Union

from nasgraph.errors import SpaceError, did_you_mean

if TYPE_CHECKING:
    import torch

    from nasgraph.space import SearchSpace

Label = Union[str, int, float, bool, None]  # noqa: UP007 - used at run time on Python 3.10
Cube = dict[str, frozenset[Label]]  # choice -> labels that it may have; a choice that is not named may have any


class Expr:
    """Arithmetic over choices: ``width * heads``, ``width // 2``. Its value is known once the choices are decided."""

    def __add__(self, other: Any) -> Expr:
        return Arithmetic(operator.add, self, other)

    def __radd__(self, other: Any) -> Expr:
        return Arithmetic(operator.add, other, self)

    def __sub__(self, other: Any) -> Expr:
        return Arithmetic(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Expr:
        return Arithmetic(operator.sub, other, self)

    def __mul__(self, other: Any) -> Expr:
        return Arithmetic(operator.mul, self, other)

    def __rmul__(self, other: Any) -> Expr:
        return Arithmetic(operator.mul, other, self)

    def __floordiv__(self, other: Any) -> Expr:
        return Arithmetic(operator.floordiv, self, other)

    def __rfloordiv__(self, other: Any) -> Expr:
        return Arithmetic(operator.floordiv, other, self)

    def __truediv__(self, other: Any) -> Expr:
        return Arithmetic(operator.truediv, self, other)

    def __rtruediv__(self, other: Any) -> Expr:
        return Arithmetic(operator.truediv, other, self)


class Arithmetic(Expr):
    def __init__(self, function: Callable[[Any, Any], Any], left: Any, right: Any) -> None:
        self.function, self.left, self.right = function, left, right

    def __repr__(self) -> str:
        return f"{self.function.__name__}({self.left!r}, {self.right!r})"


class Choice(Expr):
    """A named decision. Used in two places, it is one decision (a shared width, a repeated cell).

    Args:
        name: identifies the decision within its space.
        options: a list, or a dict of label -> option. An option is a plain value, an :class:`Op`, or a node to read
            from. Labels (the JSON form) default to the value itself, the operation's label or the node's name.
        ordered: the options are numbers in their natural order; samplers may use that.

    Raises: SpaceError: no options, two options of one label, or ``ordered`` options that do not ascend.
    """

    def __init__(self, name: str, options: Sequence[Any] | Mapping[str, Any] | range, *, ordered: bool = False) -> None:
        pairs: list[tuple[Label, Any]]
        if isinstance(options, Mapping):
            pairs = list(options.items())
        else:
            pairs = [(label_of(option, name), option) for option in options]
        if not pairs:
            raise SpaceError(f"choice '{name}' has no options: give it at least one")
        self.name = name
        self.labels: tuple[Label, ...] = tuple(label for label, _ in pairs)
        self.options: tuple[Any, ...] = tuple(option for _, option in pairs)
        self.declared = tuple(pairs)  # with those that SearchSpace.narrowed left out: names of options depend on them
        self.ordered = ordered
        for label in self.labels:
            if not isinstance(label, str | int | float | bool | None):
                raise SpaceError(f"choice '{name}': the label {label!r} is not a plain value")
            if self.labels.count(label) > 1:
                raise SpaceError(f"choice '{name}' has two options labelled {label!r}: pass a dict of label -> option")
        if ordered:
            numbers = all(isinstance(option, int | float) for option in self.options)
            if not numbers or any(b <= a for a, b in zip(self.options, self.options[1:], strict=False)):
                raise SpaceError(f"choice '{name}' is ordered, so its options must be ascending numbers")

    def option(self, label: Label) -> Any:
        """The option behind ``label``. Raises: SpaceError: there is no such label."""
        try:
            return self.options[self.labels.index(label)]
        except ValueError:
            hint = did_you_mean(str(label), [str(known) for known in self.labels])
            raise SpaceError(
                f"choice '{self.name}' has no option {label!r}.{hint} Options: {', '.join(map(str, self.labels))}"
            ) from None

    def __repr__(self) -> str:
        return f"Choice({self.name!r}, {list(self.labels)})"


_NOTHING = object()


class Switch(Expr):
    """A second consequence of one decision: the thing that belongs to the option which ``choice`` took.

    ``space.add("norm", Op(nn.BatchNorm1d), Switch(wiring, {"chain": second, "star": first}))`` reads what the choice
    ``wiring`` says, whatever else depends on it. Things are plain values, nodes, choices or other switches.

    Args:
        choice: the decision; it is asked if it has not been yet.
        cases: label -> thing.
        default: the thing for every label that ``cases`` does not name.

    Raises: SpaceError: a case for a label that ``choice`` does not have, or a label with neither case nor default.
    """

    def __init__(self, choice: Choice, cases: Mapping[Any, Any], default: Any = _NOTHING) -> None:
        for label in cases:
            choice.option(label)
        missing = [label for label in choice.labels if label not in cases]
        if missing and default is _NOTHING:
            raise SpaceError(f"switch on '{choice.name}' has no case for {missing[0]!r}: add it, or a default")
        self.choice = choice
        self.cases = {label: cases.get(label, default) for label in choice.labels}
        self.declared = tuple(self.cases.items())

    def __repr__(self) -> str:
        return f"Switch({self.choice.name!r}, {self.cases})"


@dataclass(frozen=True, eq=False)
class Node:
    """A tensor of the space: an input, or what an operation returns."""

    name: str
    index: int  # in order of declaration, which is a topological order
    space: SearchSpace = field(repr=False)


Source = Union[Node, Choice, Switch]  # noqa: UP007 - used at run time on Python 3.10


class Op:
    """A call that makes a module: ``Op(GCNConv, out_channels=width)``.

    Sizes of the inputs are left out: the builder knows them (``in_channels``, ``in_features``, ``num_features`` and the
    like are filled in). An operation that takes fewer inputs than its node has reads the leading ones.

    Args:
        make: an ``nn.Module`` class, or a function that returns a module. Importable by name, so not a lambda.
        label: how the option is called in a choice; default: the name of ``make``.
        takes: how many of the node's inputs the module reads; default: what its ``forward`` accepts.
        **kwargs: arguments of ``make``; choices, arithmetic over them and nested ``Op`` are allowed anywhere inside.
    """

    is_call = False

    def __init__(
        self, make: Callable[..., Any], *, label: str | None = None, takes: int | None = None, **kwargs: Any
    ) -> None:
        self.make, self.kwargs, self.takes = make, kwargs, takes
        self.label = label or make_name(make).rpartition(".")[2]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.label}, {self.kwargs})"


class Call(Op):
    """A function of the tensors, without parameters: ``Call(torch.cat)``, ``Call(add)``.

    It is traced: the model's code shows what the function does with its tensors.
    """

    is_call = True


@dataclass(frozen=True)
class ConcreteOp:
    """An operation all of whose choices are decided. ``kwargs`` holds plain values and nested ``ConcreteOp``."""

    make: Callable[..., Any]
    kwargs: dict[str, Any]
    label: str
    is_call: bool = False
    takes: int | None = None

    @functools.cached_property
    def signature(self) -> str:
        """Text that is equal for two operations if and only if they make the same module."""
        return make_name(self.make) + json.dumps(self.kwargs, sort_keys=True, default=plain)


@dataclass(frozen=True)
class Step:
    """One operation of a decided network and the names of what it reads."""

    name: str
    op: ConcreteOp
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """A decided network: ``steps`` in topological order, only what ``output`` depends on."""

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    output: str


@dataclass(frozen=True)
class Input:
    """An input of every network of a space.

    ``example`` is a small tensor of the right form (a graph of 4 nodes, a batch of 2 images): the builder learns
    shapes from it. ``dynamic`` names the axes whose length may change, e.g. ``{0: "nodes"}``.
    """

    name: str
    example: torch.Tensor
    dynamic: dict[int, str]


def as_op(thing: Any) -> Op:
    """What makes a dataclass like ``thing``, with only what differs from its defaults: choices in its fields stay."""
    given = {each.name: getattr(thing, each.name) for each in fields(thing)}
    return Op(type(thing), **{f.name: given[f.name] for f in fields(thing) if given[f.name] is not f.default})


def named(thing: Any, name: str, known: dict[tuple[int, str], Choice]) -> Any:
    """``thing`` with ``{name}`` in the names of its choices replaced by ``name``; ``known`` keeps the new choices."""
    if isinstance(thing, Choice):
        given = thing.name.replace("{name}", name)
        if given == thing.name:
            return thing
        if (id(thing), name) not in known:
            options: dict[Any, Any] = {label: named(option, name, known) for label, option in thing.declared}
            known[id(thing), name] = Choice(given, options, ordered=thing.ordered)
        return known[id(thing), name]
    if isinstance(thing, Switch):
        cases = {label: named(case, name, known) for label, case in thing.declared}
        return Switch(named(thing.choice, name, known), cases)
    if isinstance(thing, Arithmetic):
        return Arithmetic(thing.function, named(thing.left, name, known), named(thing.right, name, known))
    if isinstance(thing, Op):
        kwargs = named(thing.kwargs, name, known)
        return (
            thing if kwargs == thing.kwargs else type(thing)(thing.make, label=thing.label, takes=thing.takes, **kwargs)
        )
    if isinstance(thing, dict):
        return {key: named(item, name, known) for key, item in thing.items()}
    if isinstance(thing, list | tuple):
        return type(thing)(named(item, name, known) for item in thing)
    return thing


def make_name(make: Callable[..., Any]) -> str:
    """The shortest dotted name that finds ``make``: ``torch.nn.Linear``, not ``torch.nn.modules.linear.Linear``.

    So two classes never share a name, and the name stays when a library moves a class between its files.

    Raises: SpaceError: a lambda, or something else without a name.
    """
    if isinstance(make, functools.partial):
        return f"{make_name(make.func)}<{json.dumps([make.args, make.keywords], sort_keys=True, default=plain)}>"
    name = getattr(make, "__qualname__", None) or getattr(make, "__name__", None)
    if name is None or "<lambda>" in name:
        raise SpaceError(f"{make!r} has no name: use a class or a function defined with def")
    return _shortest_name(make, name)


@functools.lru_cache(maxsize=4096)
def _shortest_name(make: Callable[..., Any], qualname: str) -> str:
    module = getattr(make, "__module__", None) or "builtins"
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        package = ".".join(parts[:length])
        for name in (qualname, qualname.rpartition(".")[2]):
            if getattr(sys.modules.get(package), name, None) is make:
                return f"{package}.{name}"
    return f"{module}.{qualname}"


@functools.lru_cache(maxsize=4096)
def accepts(make: Callable[..., Any]) -> int | None:
    """How many positional inputs the module of class ``make`` takes; None: any number, or not known."""
    import inspect

    forward = getattr(make, "forward", None) if inspect.isclass(make) else None
    if forward is None:
        return None
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def reads(op: ConcreteOp) -> int | None:
    """How many of its node's sources the operation reads (None: all)."""
    return op.takes if op.takes is not None or op.is_call else accepts(op.make)


def label_of(option: Any, choice: str) -> Label:
    if isinstance(option, Op):
        return option.label
    if isinstance(option, Node):
        return option.name
    if isinstance(option, str | int | float | bool | None):
        return option
    raise SpaceError(f"choice '{choice}': option {option!r} has no natural label; pass a dict of label -> option")


def choices_in(thing: Any) -> Iterator[Choice]:
    if isinstance(thing, Choice):
        yield thing
    for part in parts_of(thing):
        yield from choices_in(part)


def ops_in(thing: Any) -> Iterator[Op]:
    if isinstance(thing, Op):
        yield thing
    for part in parts_of(thing):
        yield from ops_in(part)


def switches_in(thing: Any) -> Iterator[Switch]:
    if isinstance(thing, Switch):
        yield thing
    for part in parts_of(thing):
        yield from switches_in(part)


def parts_of(thing: Any) -> tuple[Any, ...]:
    """What a piece of a declaration is made of."""
    if isinstance(thing, Choice):
        return thing.options
    if isinstance(thing, Switch):
        return (thing.choice, *thing.cases.values())
    if isinstance(thing, Arithmetic):
        return (thing.left, thing.right)
    if isinstance(thing, Op):
        return tuple(thing.kwargs.values())
    if isinstance(thing, dict):
        return tuple(thing.values())
    return tuple(thing) if isinstance(thing, list | tuple) else ()


def ways(thing: Any, cube: Cube, whole: bool = False) -> Iterator[tuple[Cube, Any]]:
    """Every way to decide ``thing``, and what it is then. ``whole``: stop at an ``Op``, with its choices still open."""
    if isinstance(thing, Choice):
        for label in thing.labels:
            if label in cube.get(thing.name, thing.labels):
                yield from ways(thing.option(label), {**cube, thing.name: frozenset([label])}, whole)
    elif isinstance(thing, Switch):
        name, cases = thing.choice.name, thing.cases
        alike: dict[int, list[Label]] = {}
        for label in thing.choice.labels:
            if label in cube.get(name, thing.choice.labels):
                alike.setdefault(id(cases[label]), []).append(label)
        for labels in alike.values():
            yield from ways(cases[labels[0]], {**cube, name: frozenset(labels)}, whole)
    elif isinstance(thing, Op):
        if whole:
            yield cube, thing
            return
        for after, kwargs in ways(thing.kwargs, cube):
            yield after, ConcreteOp(thing.make, kwargs, thing.label, thing.is_call, thing.takes)
    elif isinstance(thing, Arithmetic):
        for after, (left, right) in ways((thing.left, thing.right), cube):
            yield after, thing.function(left, right)
    elif isinstance(thing, dict):
        for after, values in ways(tuple(thing.values()), cube):
            yield after, dict(zip(thing, values, strict=True))
    elif isinstance(thing, list | tuple):
        if not thing:
            yield cube, thing
            return
        for middle, first in ways(thing[0], cube):
            for after, rest in ways(tuple(thing[1:]), middle):
                yield after, type(thing)((first, *rest))
    else:
        yield cube, thing


def plain(thing: Any) -> Any:
    """``thing`` as JSON values, choices by their name."""
    if isinstance(thing, Choice):
        return {"choice": thing.name}
    if isinstance(thing, Switch):
        return {"switch": thing.choice.name, "cases": [[label, plain(case)] for label, case in thing.cases.items()]}
    if isinstance(thing, Node):
        return {"node": thing.name}
    if isinstance(thing, Op | ConcreteOp):
        takes = {} if thing.takes is None else {"takes": thing.takes}
        return {"op": make_name(thing.make), "kwargs": plain(thing.kwargs), **takes}
    if isinstance(thing, Arithmetic):
        return {thing.function.__name__: [plain(thing.left), plain(thing.right)]}
    if isinstance(thing, dict):
        return {str(key): plain(item) for key, item in thing.items()}
    if isinstance(thing, list | tuple):
        return [plain(item) for item in thing]
    if isinstance(thing, str | int | float | bool | None):
        return thing
    text = make_name(thing) if callable(thing) and hasattr(thing, "__qualname__") else repr(thing)
    if " at 0x" in text:
        raise SpaceError(f"{text} has no name that lasts: pass a plain value, a class, a function or an Op")
    return text
