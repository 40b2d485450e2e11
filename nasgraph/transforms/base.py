"""A transform rewrites an operation: fewer bits, an adapter, a mask, factors. Its settings may be choices.

``space.add("conv1", Op(GCNConv, out_channels=width), x, transforms=[Quantize(weight_bits=bits)])`` declares one on a
node; ``SearchSpace.from_module(model, [Lora("*.query", rank=Choice("rank.{name}", [0, 4, 8]))])`` on a model that
already exists. Either way the network is made by :func:`transformed`: the operation first, exactly as it would be
without transforms, then each transform in the order slice, factors, mask, quantisation, adapter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, ClassVar

from torch import Tensor, nn

from nasgraph.errors import SpaceError, did_you_mean
from nasgraph.space import ConcreteOp
from nasgraph.transforms.layers import KINDS, is_pyg_linear, plain_linears, swapped, without_shortcuts


class CannotRewrite(SpaceError):
    """A transform that refuses a layer."""


@dataclass(frozen=True)
class Transform:
    """Base of all transforms. A subclass is a frozen dataclass: its fields are plain values, or choices of them.

    Args:
        where: pattern of the names of the modules to rewrite: ``*`` is any text, ``(a|b)`` one of several. All layers
            that the transform can rewrite, at or below a module of such a name, are. In a declared space names are
            those inside of one operation.
    """

    where: str = "*"

    order: ClassVar[int] = 0  # transforms of a smaller number are applied first
    maker: ClassVar[Callable[..., nn.Module]]  # what makes an operation with transforms: transformed()
    structural: ClassVar[bool] = False  # it replaces layers, so that other transforms see other layers
    freezes: ClassVar[bool] = False  # a model that it is put on is not trained any more, only what it adds
    kinds: ClassVar[tuple[type[nn.Module], ...]] = tuple(KINDS)  # of layers that it can rewrite
    amounts: ClassVar[Mapping[str, float]] = {}  # fields of which more is a larger network, and what None counts as

    def neutral(self) -> bool:
        """Whether it changes nothing: such a transform is left out, so the network is the plain one bit for bit."""
        raise SpaceError(f"{type(self).__name__} has no neutral(): say there when it changes nothing (never: False)")

    def canonical(self) -> Transform:
        """The same network by other words: settings that have no effect beside the others are at their defaults.

        Keys of architectures see this form only. So two settings have one if, on every layer, they make networks of the
        same parameters and the same function; :meth:`with_defaults` helps to write it.
        """
        return self

    def with_defaults(self, names: Iterable[str]) -> Any:
        """The same transform, but the fields ``names`` have their defaults."""
        usual: dict[str, Any] = {field.name: field.default for field in fields(self) if field.name in names}
        return replace(self, **usual)

    def rewrite(self, layer: nn.Module) -> nn.Module:
        """``layer``, one of ``kinds``, rewritten: in place, or another module in its place."""
        raise SpaceError(f"{type(self).__name__} has no rewrite(layer): return there what takes the layer's place")

    def apply(self, module: nn.Module) -> nn.Module:
        """``module`` with its layers at ``where`` rewritten, in place if possible.

        Raises: SpaceError: it has no such layer; says which layers there are and which can be rewritten.
        """
        for layer in self.targets(module):
            module = swapped(module, layer, self.rewrite(layer))
        return module

    @property
    def sizes_only(self) -> bool:
        """Whether it makes layers of an existing model smaller and adds nothing; such are applied before all others."""
        return False

    @property
    def removes(self) -> bool:
        """Whether it removes whole modules of an existing model; such are applied first of all."""
        return False

    @property
    def apart_by_size(self) -> str:
        """Why what it adds to a smaller form of a layer is no part of what it adds to the larger one; empty if it is.

        A supernet over a model stores the larger one, so the former is refused on layers that become smaller.
        """
        return ""

    def removed(self, model: nn.Module) -> frozenset[str]:
        """Names of the modules of ``model`` that it removes."""
        return frozenset()

    def tied(self, model: nn.Module, inputs: Sequence[Tensor] | None) -> frozenset[str]:
        """Called when it is declared over ``model``: names of the modules that become smaller with its own.

        Transforms of this kind on any of them must have the same settings.

        Raises: SpaceError: the module cannot become smaller.
        """
        return frozenset()

    def apply_to_model(self, model: nn.Module, name: str) -> nn.Module:
        """``model`` with the module called ``name`` rewritten, and whatever elsewhere must follow."""
        return self.apply(model)

    def targets(self, module: nn.Module) -> list[nn.Module]:
        """The layers of ``module`` that :meth:`apply` rewrites. Raises: SpaceError: there are none."""
        found = [layer for name, layer in module.named_modules() if matches(self.where, name)]
        found = [layer for layer in found if self.can_rewrite(layer)]
        if not found:
            raise SpaceError(self._nothing(module))
        return found

    def check_kind(self, module: nn.Module) -> None:
        """Raises: SpaceError: ``module`` has nothing that it could rewrite, whatever the sizes are."""
        self.targets(module)

    def fits(self, module: nn.Module) -> bool:
        """Whether a pattern that fits ``module`` means it, and not one that holds it."""
        return self.can_rewrite(module)

    def can_rewrite(self, layer: nn.Module) -> bool:
        """Whether ``layer`` itself, not one below it, is of a kind that this transform rewrites."""
        kind = nn.Linear if is_pyg_linear(layer) else type(layer)
        return kind in self.kinds or any(KINDS.get(known) is kind for known in self.kinds)

    def _nothing(self, module: nn.Module) -> str:
        below = [name for name, layer in module.named_modules() if self.can_rewrite(layer)]
        kinds = ", ".join(sorted(kind.__name__ for kind in self.kinds))
        if below:
            names = ", ".join(name or "the operation itself" for name in below[:5])
            return f"{type(self).__name__}: no layer that it can rewrite is called '{self.where}'; there are: {names}"
        return (
            f"{type(self).__name__} cannot rewrite {type(module).__name__}, which has no layer of these kinds: {kinds}"
        )

    def check_declared(self, node: str) -> None:
        """Called when it is put on ``node`` of a declared space. Raises: SpaceError: it is for existing models only."""

    def check(self, field: str, holds: Callable[[Any], bool], way_out: str) -> None:
        """Every value that ``field`` may take must meet ``holds``. For ``__post_init__``: refused at declaration.

        Raises: SpaceError: names the transform, the field, the value and ``way_out``.
        """
        for option in each_option(getattr(self, field)):
            if not holds(option):
                raise SpaceError(f"{type(self).__name__}: {field} is {option!r}: {way_out}")


def each_option(value: Any) -> Iterator[Any]:
    """All plain values that ``value`` may become; arithmetic over choices is not looked into.

    Choices and switches are known by what they have: a file with an exported model need not contain their classes.
    """
    if hasattr(value, "declared"):
        for _, option in value.declared:
            yield from each_option(option)
    elif not hasattr(value, "function"):
        yield value


def transformed(op: nn.Module, transforms: Sequence[Transform]) -> nn.Module:
    """``op`` rewritten by ``transforms``, which may come in any order. This is what makes a node with transforms.

    Raises: SpaceError: a transform finds nothing that it can rewrite.
    """
    module = op
    active = in_order(transforms)
    if active:
        module = plain_linears(module)
    for transform in active:
        try:
            module = transform.apply(module)
        except SpaceError as error:
            raise CannotRewrite(str(error)) from error
    return without_shortcuts(module)


def rewritten(model: nn.Module, transforms: Sequence[Transform]) -> nn.Module:
    """``model`` rewritten in place by ``transforms``, whose ``where`` is the full name of a module each.

    Those of modules that another one removes are left out.
    """
    active_ = in_order(transforms)
    if active_:
        model = plain_linears(model)
    left = before = {name for name, _ in model.named_modules()}
    for transform in active_:
        if transform.where in before - left:
            continue
        try:
            model = transform.apply_to_model(model, transform.where)
        except SpaceError as error:
            known = f"'{transform.where}'" in str(error)
            raise CannotRewrite(str(error) if known else f"'{transform.where}': {error}") from error
        if transform.removes:
            left = {name for name, _ in model.named_modules()}
    return without_shortcuts(model)


def in_order(transforms: Sequence[Transform]) -> list[Transform]:
    """Those that change anything, in the order in which they are applied."""

    def place(each: Transform) -> tuple[float, ...]:
        if each.removes:  # the outer ones first, so that all are chosen in the model as it was
            return 0, each.where.count(".")
        return (1, 0) if each.sizes_only else (2, each.order)

    return sorted((each for each in transforms if not each.neutral()), key=place)


def simplified(op: ConcreteOp) -> ConcreteOp:
    """A :func:`transformed` operation without its neutral transforms: the plain operation, if none is left."""
    kept = active(op.kwargs["transforms"])
    if not kept:
        inner: ConcreteOp = op.kwargs["op"]
        return ConcreteOp(inner.make, inner.kwargs, op.label, inner.is_call, op.takes)
    return ConcreteOp(op.make, {**op.kwargs, "transforms": kept}, op.label, op.is_call, op.takes)


def active(transforms: Sequence[ConcreteOp]) -> list[ConcreteOp]:
    """Those that change anything, in their canonical form, with the settings that are not at their defaults."""
    found = []
    for each in transforms:
        made = each.make(**each.kwargs)
        if not made.neutral():
            found.append(ConcreteOp(each.make, settings(made.canonical()), each.label, each.is_call, each.takes))
    return found


def settings(transform: Transform) -> dict[str, Any]:
    """What ``transform`` was given beside its defaults."""
    given = {field.name: (getattr(transform, field.name), field.default) for field in fields(transform)}
    return {name: value for name, (value, usual) in given.items() if type(value) is not type(usual) or value != usual}


Transform.maker = staticmethod(transformed)
transformed.simplified = simplified  # type: ignore[attr-defined]  # canonical.simplify looks for it
transformed.one_at_a_time = True  # type: ignore[attr-defined]  # and supernet.variants for this


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` fits ``name``, or the name of a module that it lies in."""
    expression = compiled(pattern)
    parts = name.split(".")
    return any(expression.fullmatch(".".join(parts[:n])) for n in range(len(parts), 0, -1))


@lru_cache(maxsize=4096)
def compiled(pattern: str) -> re.Pattern[str]:
    """``*`` any text, ``(a|b)`` alternatives; all else means itself. Raises: SpaceError: brackets that do not match."""
    text = "".join(".*" if c == "*" else c if c in "(|)" else re.escape(c) for c in pattern)
    try:
        return re.compile(text)
    except re.error as error:
        raise SpaceError(f"the pattern '{pattern}' cannot be read: {error}") from None


def matching(model: nn.Module, pattern: str, fits: Callable[[nn.Module], bool] | None = None) -> list[str]:
    """Names of the modules of ``model`` that ``pattern`` itself fits, without those below them.

    With ``*`` in it, modules for which ``fits`` holds come before containers: it names each layer, not the blocks.

    Raises: SpaceError: none; lists the nearest names. A module that has several names is called by the first.
    """
    expression = compiled(pattern)
    named = [(name, module) for name, module in model.named_modules() if name and expression.fullmatch(name)]
    found: list[str] = []
    layers = [(name, module) for name, module in named if fits is not None and "*" in pattern and fits(module)]
    for name, _ in layers or named:
        if not any(name.startswith(f"{above}.") for above in found):
            found.append(name)
    if not found:
        every = list(model.named_modules(remove_duplicate=False))
        again = next(((name, module) for name, module in every if name and expression.fullmatch(name)), None)
        if again is not None:
            first = next(name for name, module in every if module is again[1])
            raise SpaceError(f"'{again[0]}' is one module with '{first}': call it by that name")
        names = [name for name, _ in model.named_modules() if name]
        near = did_you_mean(pattern, names)
        some = "" if near else f" Its modules: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        raise SpaceError(f"the pattern '{pattern}' fits no module of {type(model).__name__}.{near}{some}")
    return found
