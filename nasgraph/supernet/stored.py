"""What a supernet stores of one operation: its parameters at their largest size, and their start."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nasgraph.build import node_seed
from nasgraph.errors import SpaceError
from nasgraph.supernet.slicing import OWN_RULES, Cut, Shape, axes_of, cut_for, extra_stored, taken
from nasgraph.supernet.variants import Variant


def start(forms: list[Variant], node: str, option: str, seed: int) -> dict[str, Tensor]:
    """Each parameter at the largest size over ``forms``; every entry starts as in the largest form that uses it."""
    sizes = _sizes(forms, node, option)
    kinds = {name: p.dtype for form in reversed(forms) for name, p in form.module.named_parameters()}
    stored = {name: torch.zeros(shape, dtype=kinds[name]) for name, shape in sizes.items()}
    free = {name: torch.ones(shape, dtype=torch.bool) for name, shape in sizes.items()}
    for form in sorted(forms, key=_size, reverse=True):
        cuts = {name: _checked_cut(form, name, sizes[name], node, option) for name in form.shapes}
        fresh = {name: taken(cut, free[name]) for name, cut in cuts.items()}
        if not any(bool(new.any()) for new in fresh.values()):
            continue
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(node_seed(seed, f"{node}/{option}"))
            module = form.made()
        for name, parameter in module.named_parameters():
            places = taken(cuts[name], numbered(sizes[name]))[fresh[name]]
            stored[name].view(-1)[places] = parameter.detach()[fresh[name]]
            free[name].view(-1)[places] = False
    try:
        extra = extra_stored([form.module for form in forms])
    except ValueError as error:
        raise SpaceError(f"node '{node}', option '{option}': {error}") from error
    for name, tensor in extra.items():
        if name in stored:
            raise SpaceError(f"{called(node, option, name)} is a parameter, and extra_stored has one of this name")
        stored[name] = tensor
    return stored


def _sizes(forms: list[Variant], node: str, option: str) -> dict[str, Shape]:
    """Of each parameter the largest size of each of its axes, as its rule divides them."""
    plain: dict[str, Shape] = {}
    divided: dict[str, Shape] = {}
    whole: dict[str, bool] = {}  # nothing is divided: one group, one head
    for form in forms:
        for name, shape in form.shapes.items():
            try:
                axes = axes_of(form.module, name, shape)
            except ValueError as error:
                raise SpaceError(f"{called(node, option, name)}: {error}") from error
            before = divided.setdefault(name, axes)
            if len(before) != len(axes):
                raise SpaceError(
                    f"{called(node, option, name)} is {before} in one form and {axes} in another: these do not nest, "
                    "so make them two options"
                )
            divided[name] = tuple(map(max, before, axes))
            whole[name] = whole.get(name, True) and axes == (1, *shape)
            plain[name] = tuple(map(max, plain.get(name, shape), shape))
    return {name: plain[name] if whole[name] else axes for name, axes in divided.items()}


def _size(form: Variant) -> int:
    return sum(parameter.numel() for parameter in form.module.parameters())


def _checked_cut(form: Variant, name: str, stored: Shape, node: str, option: str) -> Cut | None:
    """The cut of one parameter of ``form``; that of a declared rule is tried."""
    shape = form.shapes[name]
    cut = cut_for(form.module, name, stored, shape)
    if cut is None or cut.func in OWN_RULES:
        return cut
    try:
        places = cut(numbered(stored))
    except Exception as error:
        raise SpaceError(f"{called(node, option, name)}: its slice_rule failed on {stored}: {error}") from error
    if tuple(places.shape) != shape or len(set(places.flatten().tolist())) != places.numel():
        raise SpaceError(
            f"{called(node, option, name)}: its slice_rule must select every entry of {shape} once from {stored}, "
            f"and gave {tuple(places.shape)}"
        )
    return cut


def numbered(shape: Shape) -> Tensor:
    """A tensor of ``shape`` whose entries are their own places in memory."""
    return torch.arange(math.prod(shape)).reshape(shape)


def called(node: str, option: str, name: str) -> str:
    """How messages call a stored parameter."""
    return f"node '{node}', option '{option}', parameter '{name}'"
