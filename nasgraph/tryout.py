"""Settings of transforms are tried before a search, on throw-away copies: a refusal then costs no training.

A transform refuses what is out of range when it is declared. What a layer refuses (blocks that do not divide its sizes,
a convolution in groups, a second quantiser) shows only where setting and layer meet: here, and not in the middle of a
search. ``from_module`` calls :func:`check_rules`, ``SearchSpace.add`` :func:`check_kinds`, a search
:func:`check_space`.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, product
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nasgraph.build import _made, build_graph
from nasgraph.canonical import simplify
from nasgraph.declare import Choice, Label, Op, Switch, as_op, choices_in, ops_in, ways
from nasgraph.errors import SpaceError
from nasgraph.space import SearchSpace
from nasgraph.transforms.base import CannotRewrite, Transform, matches, rewritten, transformed
from nasgraph.transforms.low_rank import sizes_only

if TYPE_CHECKING:
    from nasgraph.model_space import Base, ModelSpace

LIMIT = 1000  # settings of one transform that are all tried; of more than these, each option some times
PAIRS = 200  # settings of two transforms together, likewise
ROUNDS = 4  # networks of a declared space in which each option occurs
GUESS = 8  # channels of an operation that is only looked at

Setting = tuple[dict[str, Label], Transform]  # the labels that were chosen, and what they make


def check_rules(space: ModelSpace, pairs: Sequence[tuple[Transform, str]]) -> None:
    """Try each rule on each kind of module that it is for, in every setting, and any two rules that meet on a module.

    Modules of one form are tried once, without numbers of their own. What makes layers smaller is tried in a few
    whole models in which each option occurs.

    Raises: SpaceError: names the module, the options and what refuses them.
    """
    settings = {id(rule): list(_settings(rule)) for rule, _ in pairs}
    trial = _Trial(space.base)
    alone = [(rule, where) for rule, where in pairs if not (rule.sizes_only or rule.removes)]
    for i, (rule, where) in enumerate(alone):
        for setting in settings[id(rule)]:
            trial(where, [(where, setting)])
        for other, there in alone[:i]:
            outer, inner = sorted((where, there), key=len)
            if f"{inner}.".startswith(f"{outer}."):
                for first, second in _both(settings[id(other)], settings[id(rule)]):
                    trial(outer, [(there, first), (where, second)])
    if len(alone) < len(pairs):
        for labels in _each_option(space.choices.values(), 1):
            transforms = space.resolve(labels).steps[0].op.kwargs["transforms"]
            with torch.random.fork_rng(devices=[]), sizes_only():
                made = rewritten(space.base.copy(share=True), [each.make(**each.kwargs) for each in transforms])
            for rule, where in alone:
                smaller = _smaller(made, rule, where) if rule.apart_by_size else None
                if smaller is not None:
                    raise SpaceError(
                        f"{type(rule).__name__}: another rule makes '{smaller}' smaller, and {rule.apart_by_size}, "
                        "or leave the layer out of one of the rules"
                    )


def _smaller(model: nn.Module, rule: Transform, where: str) -> str | None:
    """The first layer of ``rule`` at ``where`` that was cut."""
    named = ((name, layer) for name, layer in model.named_modules() if matches(where, name))
    return next((name for name, layer in named if "kept_entries" in layer.__dict__ and rule.can_rewrite(layer)), None)


def check_kinds(node: str, op: Op | Choice | Switch, transforms: Sequence[Transform]) -> None:
    """Refuse an operation that has no layer which a transform of ``node`` could rewrite.

    Classes are made once without numbers, with sizes that are guessed. What cannot be made so, and what depends on
    sizes, is left to :func:`check_space`.

    Raises: SpaceError: names the operation and the layers that the transform can rewrite.
    """
    settings = [setting for transform in transforms for _, setting in _settings(transform, strict=False)]
    for _, each in ways(op, {}, whole=True):
        module = _looked_at(each)
        if module is None:
            continue
        for setting in settings:
            try:
                setting.check_kind(module)
            except SpaceError as error:
                raise SpaceError(f"node '{node}': {error}") from None


def check_space(space: SearchSpace) -> None:
    """Build a few networks of a declared space in which each option occurs, if it has transforms.

    Networks that fail for another reason, and such as constraints exclude, do not count: those are trials that fail.

    Raises: SpaceError: a transform refuses a layer; names the node.
    """
    if not any(op.make is transformed for op in ops_in(tuple(space._ops.values()))):
        return
    rng = random.Random(0)
    found = [space.architecture(labels) for labels in _each_option(space.choices.values(), ROUNDS)]
    if space.constraints:
        found = [each for each in found if not space.violated(each)]
        found += [space.sample(rng) for _ in range(ROUNDS)]
    for architecture in dict.fromkeys(found):
        graph = simplify(space.resolve(architecture))
        try:
            with sizes_only():
                build_graph(space, graph)
        except SpaceError as error:
            if isinstance(error.__cause__, CannotRewrite):
                node = str(error).partition(":")[0]  # without the whole call that failed
                raise SpaceError(f"{node}: {error.__cause__}") from error


class _Trial:
    """Rewrites copies of modules of one model; what was tried on a module of the same form is not tried again."""

    def __init__(self, base: Base) -> None:
        self.base, self.done = base, set[Any]()
        self.forms: dict[str, str] = {}

    def __call__(self, outer: str, given: Sequence[tuple[str, Setting]]) -> None:
        """Try settings, each with the name of its module, at or below the module ``outer``."""
        form = self.form(outer)
        key = form, *((where[len(outer) :], repr(transform)) for where, (_, transform) in given)
        if key in self.done:
            return
        self.done.add(key)
        transforms = [replace(transform, where=where) for where, (_, transform) in given]
        with torch.random.fork_rng(devices=[]), sizes_only():
            try:
                rewritten(self.alone(outer), transforms)
            except Exception:  # perhaps it needs the modules around
                try:
                    rewritten(self.base.copy(share=True), transforms)
                except Exception as error:
                    what = str(error) if isinstance(error, SpaceError) else f"{type(error).__name__}: {error}"
                    chosen = {n.replace("{name}", at): label for at, (some, _) in given for n, label in some.items()}
                    raise SpaceError(what + _told(chosen)) from error

    def form(self, name: str) -> str:
        """Text that is equal for modules that are rewritten alike."""
        if name not in self.forms:
            module = self.base.model.get_submodule(name)
            tensors = [*module.named_parameters(), *module.named_buffers()]
            self.forms[name] = f"{module} {[(n, tuple(tensor.shape), tensor.dtype) for n, tensor in tensors]}"
        return self.forms[name]

    def alone(self, name: str) -> nn.Module:
        """A copy of the module ``name`` under its full name, with the model's numbers and nothing around it."""
        module = self.base.model.get_submodule(name)
        shared = {id(each): nn.Parameter(each.detach(), each.requires_grad) for each in module.parameters()}
        root = at = nn.Module()
        *above, last = name.split(".")
        for part in above:
            at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.add_module(last, copy.deepcopy(module, shared))
        return root


def _settings(rule: Transform, strict: bool = True) -> Iterator[Setting]:
    """The settings of ``rule`` that make different networks, without neutral ones.

    Raises: SpaceError: options that contradict each other, if ``strict``; otherwise these are left out.
    """
    known = set()
    for cube, op in _some(as_op(rule)):
        labels = {name: next(iter(options)) for name, options in cube.items()}
        try:
            made = op.make(**op.kwargs)
        except SpaceError as error:
            if not strict:
                continue
            raise SpaceError(f"{error}{_told(labels)}; offer only options that go together") from None
        if not made.neutral():
            form = made.canonical()
            if repr(form) not in known:
                known.add(repr(form))
                yield labels, form


def _told(labels: Mapping[str, Label]) -> str:
    """For the end of a message: the options that were chosen."""
    return f" (with {', '.join(f'{name} = {label}' for name, label in labels.items())})" if labels else ""


def _some(op: Op) -> Iterator[Any]:
    """The ways to decide ``op``: all, or if there are too many, some in which each option occurs."""
    if len(list(islice(ways(op, {}), LIMIT + 1))) <= LIMIT:
        yield from ways(op, {})
        return
    for labels in _each_option(choices_in(op), 4 * ROUNDS):
        yield next(ways(op, {name: frozenset([label]) for name, label in labels.items()}))


def _both(first: Sequence[Setting], second: Sequence[Setting]) -> Iterator[tuple[Setting, Setting]]:
    """Settings of two transforms together: all, or if there are too many, some in which each occurs."""
    if len(first) * len(second) <= PAIRS:
        yield from product(first, second)
        return
    longest = max(len(first), len(second))
    for i in range(longest):
        yield first[i % len(first)], second[i % len(second)]


def _each_option(choices: Iterable[Choice], rounds: int) -> Iterator[dict[str, Label]]:
    """Labels for all ``choices``: each label at least ``rounds`` times, in company that is random (but fixed)."""
    rng, named = random.Random(0), {choice.name: choice.labels for choice in choices}
    longest = max(map(len, named.values()), default=1)
    for _ in range(rounds):
        columns = [[labels[i % len(labels)] for i in range(longest)] for labels in named.values()]
        for column in columns:
            rng.shuffle(column)
        for i in range(longest):
            yield {name: column[i] for name, column in zip(named, columns, strict=True)}


def _looked_at(op: Op) -> nn.Module | None:
    """A module of ``op``, without numbers and with guessed sizes; None: that is not possible."""
    if not inspect.isclass(op.make):
        return None
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            _, concrete = next(ways(op, {}))
            return _made(concrete, GUESS)()
        except Exception:  # a size that does not go with the guess; build() tells
            return None
