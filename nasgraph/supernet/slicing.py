"""Which entries of a stored parameter a smaller form of its operation uses.

By default the leading entries of each axis. Three ways to need others, each a method of the module, called on its
smaller form; ``name`` is the parameter's name below the module that has the method:

``axes_rule(name, shape) -> shape``
    The same entries in more axes, each of which is then cut on its own: rows that are heads times channels.
``slice_rule(name, stored, shape) -> Tensor``
    Which entries of ``stored`` they are. It selects (indexes, reshapes, permutes) and computes nothing.
``computed_rule(name, stored, extra) -> Tensor | None``
    The parameter as a function of what is stored and of stored parameters of the rule's own; None: it is just cut. They
    are given, with their start, by a static method ``extra_stored(forms) -> {name: Tensor}``. Entries start as
    the other rules select them, so the start of what is computed should be that selection.

The outermost module that has a rule decides, except that one with ``own_slices = True`` is not spoken for from above.

Classes that are not ours to give a method are in the tables here; the rules hold for subclasses too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Shape = tuple[int, ...]
Rule = Callable[[nn.Module, str, Tensor, Sequence[int]], Tensor]
Axes = Callable[[nn.Module, str, Shape], Shape]


@dataclass(frozen=True, eq=False)
class Cut:
    """A rule with all but the stored tensor given. ``axes``: the shape within the stored tensor."""

    func: Rule
    module: nn.Module
    name: str
    shape: Shape
    axes: Shape

    def __call__(self, stored: Tensor) -> Tensor:
        piece = self.func(self.module, self.name, stored, self.axes)
        return piece if self.axes == self.shape else piece.reshape(self.shape)


def leading(module: nn.Module, name: str, stored: Tensor, shape: Sequence[int]) -> Tensor:
    """The first entries of each axis."""
    return stored[tuple(slice(0, size) for size in shape)]


def centred(module: nn.Module, name: str, stored: Tensor, shape: Sequence[int]) -> Tensor:
    """A convolution: the first channels, and the middle of the kernel (Cai et al., Once-for-All, ICLR 2020)."""
    kernel = len(module.kernel_size)  # type: ignore[arg-type]
    channels = len(shape) - kernel if len(shape) >= kernel + 2 else len(shape)  # a bias has no kernel
    starts = [
        (full - size) // 2 if axis >= channels else 0
        for axis, (full, size) in enumerate(zip(stored.shape, shape, strict=True))
    ]
    return stored[tuple(slice(start, start + size) for start, size in zip(starts, shape, strict=True))]


def by_group(module: nn.Module, name: str, shape: Shape) -> Shape:
    """A convolution: groups, then the channels of a group. So the groups of a smaller one are groups of the larger."""
    groups = int(module.groups)  # type: ignore[arg-type]
    return (groups, shape[0] // groups, *shape[1:])


def by_head(module: nn.Module, name: str, shape: Shape) -> Shape:
    """PyG's attention: heads, then the channels of a head, wherever rows are both. ``att`` has these axes already."""
    heads, channels = int(module.heads), int(module.out_channels)  # type: ignore[arg-type]
    part = name.split(".")[0]
    if part.startswith("att") or (part in ("bias", "res", "lin_skip") and not module.concat):
        return shape
    return (1, 3, heads, channels) if part == "lin_beta" else (heads, channels, *shape[1:])


def kept(module: nn.Module, name: str, stored: Tensor, shape: Sequence[int]) -> Tensor:
    """Of a layer that was pruned to some of its channels: the entries that its ``kept_entries`` names, by axis.

    What was added to it in the weight's shape (scores of a mask) is cut as the weight is; a module with the method
    ``kept_rule(name, entries, shape)``, such as learned steps and adapters, tells from the weight's entries which are
    its own. All else, as the ranks of factors of a pruned layer, is cut to its first entries.
    """
    # The innermost: of a convolution of PyG its linear layer.
    module, name = [each for each in _owners(module, name) if "kept_entries" in each[0].__dict__][-1]
    known: dict[str, tuple[Tensor | None, ...]] = module.kept_entries  # type: ignore[assignment]
    entries = known.get(name, ())
    if name not in known and "weight" in known:
        inside, _, last = name.rpartition(".")
        own = getattr(module.get_submodule(inside), "kept_rule", None)
        if own is not None:
            entries = own(last, known["weight"], tuple(shape))
        elif tuple(shape) == tuple(module.weight.shape):  # type: ignore[arg-type]
            entries = known["weight"]
    for axis, index in enumerate(entries):
        if index is not None:
            stored = stored.index_select(axis, index.to(stored.device))
    part, _, last = name.rpartition(".")
    inner = module.get_submodule(part)
    own = getattr(type(inner), "slice_rule", None)
    return leading(module, name, stored, shape) if own is None else own(inner, last, stored, shape)


OWN_RULES = (leading, centred)
GROUPED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

RULES: dict[type[nn.Module], Rule] = dict.fromkeys(GROUPED, centred)
AXES: dict[type[nn.Module] | str, Axes] = dict.fromkeys(GROUPED, by_group)
AXES |= {  # by name: the library is not imported for a space without it
    "torch_geometric.nn.conv.gat_conv.GATConv": by_head,
    "torch_geometric.nn.conv.gatv2_conv.GATv2Conv": by_head,
    "torch_geometric.nn.conv.transformer_conv.TransformerConv": by_head,
}


def axes_of(module: nn.Module, name: str, shape: Shape) -> Shape:
    """The axes in which ``module``'s parameter ``name`` is cut. Raises: ValueError: a wrong ``axes_rule``."""
    selects = _outermost(module, name, _rule)
    found = _outermost(module, name, _axes)
    if found is None or (selects is not None and selects[1] not in OWN_RULES):
        return shape
    axes = tuple(found[1](found[0], found[2], shape))
    if math.prod(axes) != math.prod(shape):
        raise ValueError(f"its axes_rule gave {axes} for {shape}, which has another number of entries")
    return axes


def cut_for(module: nn.Module, name: str, stored: Shape, shape: Shape) -> Cut | None:
    """The function that cuts ``module``'s parameter ``name`` out of the stored tensor; None: all of it is used.

    The outermost module on the way to the parameter that has a rule decides.
    """
    axes = shape if len(stored) == len(shape) else axes_of(module, name, shape)
    owner, rule, below = _pruned(module, name) or _outermost(module, name, _rule) or (module, leading, name)
    return None if stored == shape and rule in OWN_RULES else Cut(rule, owner, below, shape, axes)


@dataclass(frozen=True, eq=False)
class Computed:
    """A ``computed_rule`` with all but the stored tensors given. ``extra``: names in the rule, and in the store."""

    module: nn.Module
    name: str
    extra: tuple[tuple[str, str], ...]

    def __call__(self, stored: Tensor, extra: Mapping[str, Tensor]) -> Tensor | None:
        return self.module.computed_rule(self.name, stored, extra)  # type: ignore[operator, no-any-return]


def extra_stored(forms: Sequence[nn.Module]) -> dict[str, Tensor]:
    """What the rules of one operation store beside its parameters, with its start. ``forms``: all of the operation."""
    found: dict[str, Tensor] = {}
    for path, module in forms[0].named_modules():
        declared = getattr(type(module), "extra_stored", None)
        if declared is not None:
            for name, start in declared([form.get_submodule(path) for form in forms]).items():
                found[f"{path}.{name}" if path else name] = start
    return found


def computed_for(module: nn.Module, name: str, names: Sequence[str]) -> Computed | None:
    """The function that computes ``module``'s parameter ``name``, if there is one; ``names``: all that is stored."""
    found = _outermost(module, name, lambda owner: getattr(type(owner), "computed_rule", None))
    if found is None:
        return None
    prefix = name.removesuffix(found[2])
    own = {parameter for parameter, _ in module.named_parameters()}
    extra = [(other.removeprefix(prefix), other) for other in names if other.startswith(prefix) and other not in own]
    return Computed(found[0], found[2], tuple(extra))


def _outermost(module: nn.Module, name: str, of: Callable[[nn.Module], Any]) -> tuple[nn.Module, Any, str] | None:
    """The first module on the way to the parameter that has what ``of`` looks for, and the parameter's name in it."""
    owners = _owners(module, name)
    first = max((depth for depth, (owner, _) in enumerate(owners) if getattr(owner, "own_slices", False)), default=0)
    for owner, below in owners[first:]:
        found = of(owner)
        if found is not None:
            return owner, found, below
    return None


def _owners(module: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """The modules on the way to the parameter, from ``module`` inwards, each with the parameter's name in it."""
    parts = name.split(".")
    return [(module.get_submodule(".".join(parts[:depth])), ".".join(parts[depth:])) for depth in range(len(parts))]


def _pruned(module: nn.Module, name: str) -> tuple[nn.Module, Rule, str] | None:
    """The layer that lost channels around a module with a ``kept_rule``, and the parameter's name in it."""
    owners = _owners(module, name)
    pruned = [(owner, kept, below) for owner, below in owners if "kept_entries" in owner.__dict__]
    return pruned[-1] if pruned and hasattr(owners[-1][0], "kept_rule") else None


def _rule(module: nn.Module) -> Rule | None:
    own = getattr(type(module), "slice_rule", None)
    if own is not None:
        return own  # type: ignore[no-any-return]
    if "kept_entries" in module.__dict__:
        return kept
    return next((RULES[kind] for kind in type(module).__mro__ if kind in RULES), None)


def _axes(module: nn.Module) -> Axes | None:
    own = getattr(type(module), "axes_rule", None)
    if own is not None:
        return own  # type: ignore[no-any-return]
    for kind in type(module).__mro__:
        found = AXES.get(kind) or AXES.get(f"{kind.__module__}.{kind.__qualname__}")
        if found is not None:
            return found
    return None


def taken(cut: Cut | None, stored: Tensor) -> Tensor:
    """What ``cut`` selects from ``stored``."""
    return stored if cut is None else cut(stored)
