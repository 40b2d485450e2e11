"""The relaxed network of a space: every node a weighted sum over the forms that it can take.

A *form* of a node is an operation with decided arguments, what it reads, and the sizes of that. The walk of
:mod:`nasgraph.supernet.variants` finds all of them, each with the decisions (a cube) that lead to it. Given a weight
for each label of each choice, a form weighs ``P(form) = sum over its cubes, prod over choices, sum over labels``, and

    value(node) = sum over forms of P(form) * pad(form(cut(sources)))

where ``cut`` takes the leading entries that the form reads and ``pad`` fills up with zeros to the node's largest size.
Choices shared between nodes share one vector of weights; a choice inside an option counts with the option's weight.

Forms that differ in whole numbers only (widths, kernels) are *superposed* where that gives the same: one run of the
largest form, with ``W = sum_k P(k | these) * pad(W[slice_k])`` (Sukthanker et al., TangleNAS). Whether it gives the
same is tried on numbers, form by form: LayerNorm and GroupNorm over a padded width, concatenation, attention heads do
not, and are run per form. So with one-hot weights the relaxed network equals the subnet, whatever the space.

Operations with transforms (bits, ranks, masks) are run per form: a sum of weights does not commute with rounding. Their
forms are many, one for each combination of settings, so a form's module is made when it is first run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from nasgraph.build import _made, _Shapes
from nasgraph.declare import Cube, ways
from nasgraph.errors import ConfigError, SpaceError, did_you_mean
from nasgraph.space import ConcreteOp, Label, SearchSpace, Step
from nasgraph.supernet.slicing import Shape, taken
from nasgraph.supernet.structure import without_numbers
from nasgraph.supernet.variants import Tensors, _form, _joined, _merged, _readings, options

if TYPE_CHECKING:
    from nasgraph.supernet import Supernet
    from nasgraph.supernet.structure import Key, Piece

Weights = Mapping[str, Tensor]  # choice -> (labels,)
Open = Mapping[str, frozenset[Label]]  # choice -> labels that are run; a choice that is not named has all

OUTPUT = ""  # the name of the place that reads the space's output
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(eq=False)
class Form:
    """One form of a node: what is run on what."""

    op: ConcreteOp | None  # None: the output, which is read as it is
    sources: tuple[str, ...]
    reads: tuple[Shape, ...]
    out: Shape
    make: Callable[[], tuple[nn.Module, dict[str, Piece]]] | None = None  # None: a function
    training: bool | None = None  # the mode of the module

    @functools.cached_property
    def made(self) -> tuple[nn.Module | None, dict[str, Piece]]:
        return (None, {}) if self.make is None else self.make()

    @property
    def module(self) -> nn.Module | None:
        """None for a function; it has no numbers otherwise."""
        return self.made[0]

    @property
    def pieces(self) -> dict[str, Piece]:
        """By parameter."""
        return self.made[1]


@dataclass(eq=False)
class Gate:
    """Which entries of the largest form's parameter belong to which of a group's forms."""

    masks: Tensor  # (masks, *shape), 0 or 1
    of: Tensor  # (masks, forms), 0 or 1


@dataclass(eq=False)
class Group:
    """Forms that are run at once, by the first of them, the largest."""

    members: list[int]
    form: Form
    gates: dict[str, Gate] = field(default_factory=dict)


@dataclass(eq=False)
class Place:
    """A node with all its forms, and the decisions that lead to each (``cubes``, with the number of their form)."""

    forms: list[Form]
    cubes: list[tuple[Cube, int]]
    form_of: Tensor  # (cubes,), the form of each
    masks: dict[str, tuple[Tensor, Tensor]]  # choice -> (cubes, labels) and (cubes,): it says nothing of the choice
    groups: list[Group]
    shape: Shape  # the largest
    varies: tuple[int, ...]  # axes

    def probabilities(self, weights: Weights) -> Tensor:
        """Of each form."""
        product = torch.ones(len(self.cubes), dtype=torch.float64, device=self.form_of.device)
        for name, (mask, silent) in self.masks.items():
            product = product * (mask @ weights[name].to(mask.dtype) + silent)
        return product.new_zeros(len(self.forms)).index_add(0, self.form_of, product)

    def opened(self, labels: Open, path: Mapping[str, Label]) -> list[bool]:
        """Of each form, whether some of its decisions are open, and at most one of them is not that of ``path``."""
        if not labels:
            return [True] * len(self.forms)
        found = [False] * len(self.forms)
        for cube, form in self.cubes:
            if not found[form]:
                found[form] = all(name not in labels or cube[name] & labels[name] for name in cube) and (
                    sum(name in path and path[name] not in cube[name] for name in cube) <= 1
                )
        return found


class Mixture:
    """The relaxed network of ``supernet``'s space, reading its store.

    Args:
        superpose: run forms that differ in sizes only at once, where that gives the same.
        align: ``"pad"`` with zeros, or ``"interpolate"``: the adaptive average over channels of TAS. Then every form
            with parameters is run alone, and what has none (and keeps zeros) once, at the largest size that is open.
        norms: ``"exact"``: a norm over channels is run for each width. ``"full"``: once over the padded width, as
            TangleNAS does; its statistics then count the padding.
        store: parameters to read instead of the supernet's.

    Raises: SpaceError: a node whose forms differ in their number of axes or in type cannot be mixed; names it.
    """

    def __init__(
        self,
        supernet: Supernet,
        *,
        superpose: bool = True,
        align: str = "pad",
        norms: str = "exact",
        store: Mapping[Key, Tensor] | None = None,
    ) -> None:
        one_of("align", align, ("pad", "interpolate"))
        one_of("norms", norms, ("exact", "full"))
        self.space, self.supernet, self.align, self.norms = supernet.space, supernet, align, norms
        self.store: Mapping[Key, Tensor] = supernet.store if store is None else store
        self._superposes = superpose
        self._tried: dict[Any, bool] = {}
        self.places = self._walk()

    def __call__(
        self,
        weights: Weights,
        inputs: Sequence[Tensor],
        *,
        training: bool,
        labels: Open | None = None,
        path: Mapping[str, Label] | None = None,
    ) -> Tensor:
        """The mixture's output.

        Args:
            weights: for each choice of the space the weights of its labels, in their order.
            training: dropout is on. Batch statistics are used either way, and forgotten.
            labels: of each choice those that are run; the others' weights must be 0. Default: all.
            path: the label of each choice whose weight is 1, where ``labels`` opens others of weight 0: of those, forms
                with more than one have neither value nor gradient and are not run.
        """
        labels = labels or {}
        needed: set[str] = {OUTPUT}
        chosen: dict[str, list[tuple[Group, Form]]] = {}
        for name in reversed(self.places):
            if name in needed:
                place = self.places[name]
                opened = place.opened(labels, path or {})
                chosen[name] = []
                for group in place.groups:
                    members = [i for i in group.members if opened[i]]
                    if members:
                        form = group.form if self.align == "pad" else place.forms[members[0]]
                        chosen[name].append((group, form))
                        needed.update(form.sources)
        values: dict[str, Tensor] = dict(zip(self.space.inputs, inputs, strict=True))
        for name in reversed(chosen):
            values[name] = self._value(name, chosen[name], weights, values, training)
        return values[OUTPUT]

    # ---- running --------------------------------------------------------------------------------------------------

    def _value(
        self,
        name: str,
        runs: Sequence[tuple[Group, Form]],
        weights: Weights,
        values: Mapping[str, Tensor],
        training: bool,
    ) -> Tensor:
        place = self.places[name]
        if not runs:
            raise SpaceError(f"{_called(name)} has no form with the decisions that are open: they make no architecture")
        if len(place.forms) == 1:
            return self._run(*runs[0], None, values, training)
        p = place.probabilities(weights)
        shape = place.shape
        if self.align == "interpolate":  # to the largest of those that are run
            shape = tuple(max(sizes) for sizes in zip(*(form.out for _, form in runs), strict=True))
        total: Tensor | None = None
        for group, form in runs:
            mine = p[group.members]
            out = self._fit(self._run(group, form, mine, values, training), place.varies, shape)
            if len(group.members) < len(place.forms):
                out = out * mine.sum().to(out.dtype)
            total = out if total is None else total + out
        assert total is not None
        return total

    def _run(self, group: Group, form: Form, p: Tensor | None, values: Mapping[str, Tensor], training: bool) -> Tensor:
        sources = [
            self._fit(values[name], self.places[name].varies if name in self.places else (), shape)
            for name, shape in zip(form.sources, form.reads, strict=True)
        ]
        if form.op is None:
            return sources[0]
        if form.module is None:
            result: Tensor = form.op.make(*sources, **form.op.kwargs)
            return result
        state: dict[str, Tensor] = {}
        for name, piece in form.pieces.items():
            state[name] = piece.of(self.store)
            if name in group.gates and p is not None:
                gate = group.gates[name]
                share = gate.of @ (p / p.sum().clamp_min(torch.finfo(p.dtype).tiny))
                state[name] = state[name] * torch.tensordot(share.to(gate.masks.dtype), gate.masks, dims=1)
        if form.training != training:
            _set_mode(form.module, training)
            form.training = training
        for name, buffer in form.module.named_buffers():
            state[name] = buffer.clone()
        return functional_call(form.module, state, tuple(sources)) if state else form.module(*sources)  # type: ignore[no-any-return]

    def _fit(self, x: Tensor, axes: Sequence[int], shape: Shape) -> Tensor:
        """``x`` with the sizes of ``shape`` along ``axes``."""
        for axis in axes:
            if x.shape[axis] == shape[axis]:
                continue
            if self.align == "interpolate":
                x = interpolated(x, axis, shape[axis])
            elif x.shape[axis] > shape[axis]:
                x = x.narrow(axis, 0, shape[axis])
            else:
                x = F.pad(x, (0, 0) * (x.dim() - 1 - axis) + (0, shape[axis] - x.shape[axis]))
        return x

    # ---- finding the forms ----------------------------------------------------------------------------------------

    def _walk(self) -> dict[str, Place]:
        space = self.space
        if space._output is None:
            raise SpaceError(f"space '{space.name}' has no output: call space.output(node)")
        tables: dict[str, list[tuple[Cube, Tensors]]] = {
            name: [({}, (tuple(given.example.shape), given.example.dtype))] for name, given in space.inputs.items()
        }
        known: dict[Any, Any] = {}
        places: dict[str, Place] = {}
        for name in space._ops:
            names = options(space, name)
            found: dict[Any, Form] = {}
            entries: list[tuple[Cube, Any, Tensors]] = []
            for cube, op, make, sources in _readings(space, name):
                for joined, read in _joined(cube, [tables[source] for source in sources]):
                    plain = op.kwargs["op"] if _is_transformed(op) else op  # the layer's result is as large
                    signature = (plain.signature, read)
                    if signature not in known:
                        known[signature] = _form(space, Step(name, plain, sources), read)
                    if isinstance(known[signature], SpaceError):  # a constraint may exclude it
                        continue
                    out: Tensors = known[signature][0]
                    key: Any = (names[id(make)], op.signature, sources, read)
                    if key not in found:
                        found[key] = self._found(name, names[id(make)], op, sources, read, out[0])
                    entries.append((joined, key, out))
            tables[name] = _merged([(cube, out) for cube, _, out in entries], space.choices)
            if entries:
                places[name] = self._place(name, found, entries)
        last: dict[Any, Form] = {}
        entries = []
        for cube, node in ways(space._output, {}):
            for joined, (tensor,) in _joined(cube, [tables[node.name]]):
                key = (node.name, tensor)
                last.setdefault(key, Form(None, (node.name,), (tensor[0],), tensor[0]))
                entries.append((joined, key, tensor))
        if not entries:
            raise SpaceError(f"space '{space.name}' has no architecture")
        places[OUTPUT] = self._place(OUTPUT, last, entries)
        return places

    def _found(
        self, node: str, option: str, op: ConcreteOp, sources: tuple[str, ...], read: tuple[Tensors, ...], out: Shape
    ) -> Form:
        make = None if op.is_call else functools.partial(self._made, node, option, op, sources, read)
        return Form(op, sources, tuple(shape for shape, _ in read), out, make)

    def _made(
        self, node: str, option: str, op: ConcreteOp, sources: tuple[str, ...], read: tuple[Tensors, ...]
    ) -> tuple[nn.Module, dict[str, Piece]]:
        module = self._module(node, op, sources, read)
        return module, {n: self.supernet._piece(node, option, n, module) for n, _ in module.named_parameters()}

    def _module(self, node: str, op: ConcreteOp, sources: tuple[str, ...], read: tuple[Tensors, ...]) -> nn.Module:
        shapes = _Shapes(self.space)
        shapes.shapes.update(zip(sources, read, strict=True))
        with torch.random.fork_rng(devices=[]):
            module = _made(op, shapes.channels(sources[0]))()
        module.to(self.supernet.device)
        without_numbers(module)
        return module

    def _place(self, name: str, found: dict[Any, Form], entries: list[tuple[Cube, Any, Tensors]]) -> Place:
        forms, numbers = list(found.values()), {key: i for i, key in enumerate(found)}
        if len({(len(shape), dtype) for _, _, (shape, dtype) in entries}) > 1:
            raise SpaceError(
                f"{_called(name)} is a tensor of another rank or type in another form: such options cannot be mixed"
            )
        device = self.supernet.device
        form_of = torch.tensor([numbers[key] for _, key, _ in entries], device=device)
        nothing = torch.zeros(len(entries), dtype=torch.float64, device=device)
        masks: dict[str, tuple[Tensor, Tensor]] = {}
        for column, (cube, _, _) in enumerate(entries):
            for choice, labels in cube.items():
                known = self.space.choices[choice].labels
                if labels == set(known):
                    continue
                if choice not in masks:
                    masks[choice] = nothing.new_zeros(len(entries), len(known)), nothing + 1
                mask, silent = masks[choice]
                mask[column] = torch.tensor([label in labels for label in known], dtype=mask.dtype)
                silent[column] = 0
        shapes = [form.out for form in forms]
        shape = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
        varies = tuple(axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1)
        place = Place(forms, [(cube, numbers[key]) for cube, key, _ in entries], form_of, masks, [], shape, varies)
        place.groups = self._groups(place)
        return place

    def _groups(self, place: Place) -> list[Group]:
        families: dict[Any, list[int]] = {}
        for i, form in enumerate(place.forms):
            families.setdefault(_family(form) if self._may_superpose(form) else i, []).append(i)
        groups = []
        for members in families.values():
            if len(members) == 1:
                groups.append(Group(members, place.forms[members[0]]))
                continue
            left = sorted(members, key=lambda i: _size(place.forms[i]), reverse=True)
            while left:
                largest = place.forms[left[0]]
                mine = [i for i in left if place.forms[i] is largest or self._same(largest, place.forms[i])]
                group = Group(mine, largest)
                if len(mine) > 1:
                    for name in largest.pieces:
                        gate = self._gate(largest, [place.forms[i] for i in mine], name)
                        if gate is not None:
                            group.gates[name] = gate
                groups.append(group)
                left = [i for i in left if i not in mine]
        return groups

    def _may_superpose(self, form: Form) -> bool:
        if not self._superposes or _is_transformed(form.op):
            return False
        computed = any(piece.computed is not None for piece in form.pieces.values())
        return not computed and not (form.pieces and self.align == "interpolate")

    def _gate(self, largest: Form, forms: Sequence[Form], name: str) -> Gate | None:
        masks: list[Tensor] = []
        of: list[int] = []
        for form in forms:
            mask = self._mask(largest, form, name)
            same = next((i for i, other in enumerate(masks) if torch.equal(mask, other)), len(masks))
            if same == len(masks):
                masks.append(mask)
            of.append(same)
        if len(masks) == 1 and bool(masks[0].all()):
            return None
        stacked = torch.stack(masks).to(self.store[largest.pieces[name].key].dtype)
        share = torch.zeros(len(masks), len(forms), dtype=torch.float64)
        share[of, range(len(forms))] = 1
        return Gate(stacked.to(self.supernet.device), share.to(self.supernet.device))

    def _mask(self, largest: Form, form: Form, name: str) -> Tensor:
        """Which entries of the largest form's parameter the form has."""
        shape = self.store[largest.pieces[name].key].shape
        numbered = torch.arange(shape.numel()).reshape(shape)
        used = torch.zeros(shape.numel(), dtype=torch.bool)
        used[taken(form.pieces[name].cut, numbered).flatten()] = True
        return used[taken(largest.pieces[name].cut, numbered)]

    def _same(self, largest: Form, form: Form) -> bool:
        """Is the form, padded, the largest form with its parameters padded? Tried once, on random numbers."""
        stored = tuple(tuple(self.store[piece.key].shape) for piece in largest.pieces.values())
        sides = tuple((each.op.signature if each.op else "", each.reads, each.out) for each in (largest, form))
        question = (sides, stored, largest.sources if set(largest.sources) & set(self.space.inputs) else ())
        if question not in self._tried:
            try:
                self._tried[question] = self._try(largest, form)
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
                self._tried[question] = False  # the largest form does not run on it
        return self._tried[question]

    def _try(self, largest: Form, form: Form) -> bool:
        fits = all(
            len(a) == len(b) and all(x >= y for x, y in zip(a, b, strict=True))
            for a, b in zip((largest.out, *largest.reads), (form.out, *form.reads), strict=True)
        )
        if not fits or set(largest.pieces) != set(form.pieces):
            return False
        if form.op is None:
            return True
        if self.norms == "full" and isinstance(form.module, NORMS):
            return set(map(type, (form.module, largest.module))) == {type(form.module)}
        generator = torch.Generator().manual_seed(0)
        device = self.supernet.device
        small: dict[str, Tensor] = {}
        large: dict[str, Tensor] = {}
        for name, piece in largest.pieces.items():
            numbers = torch.randn(self.store[piece.key].shape, generator=generator).mul_(0.5).to(device)
            mask = self._mask(largest, form, name)
            small[name] = taken(form.pieces[name].cut, numbers)
            large[name] = taken(piece.cut, numbers) * mask.to(device)
            if int(mask.sum()) != small[name].numel():
                return False
        few: list[Tensor] = []
        many: list[Tensor] = []
        for name, shape, padded in zip(form.sources, form.reads, largest.reads, strict=True):
            given = self.space.inputs.get(name)
            if given is not None and not given.example.is_floating_point():
                x = given.example.to(device)  # edges, classes
            else:  # not the example: it may be zeros, and hide what differs
                x = torch.randn(shape, generator=generator).to(device)
            few.append(x)
            many.append(self._padded(x, padded))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            expected = self._padded(_once(form, small, few), largest.out)
            found = _once(largest, large, many)
        return bool(expected.isfinite().all()) and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)

    def _padded(self, x: Tensor, shape: Shape) -> Tensor:
        widths = [
            side for size, full in zip(reversed(x.shape), reversed(shape), strict=True) for side in (0, full - size)
        ]
        return F.pad(x, widths) if any(widths) else x


class Bound(nn.Module):
    """A mixture with its weights, to be called like a network."""

    def __init__(
        self,
        mixture: Mixture,
        weights: Weights,
        *,
        training: bool,
        labels: Open | None = None,
        path: Mapping[str, Label] | None = None,
    ) -> None:
        super().__init__()
        self.given = (mixture, weights, training, labels, path)

    def forward(self, *inputs: Tensor) -> Tensor:
        mixture, weights, training, labels, path = self.given
        return mixture(weights, inputs, training=training, labels=labels, path=path)


def one_of(what: str, value: str, known: Sequence[str]) -> None:
    """Raises: ConfigError: ``value`` is not among ``known``."""
    if value not in known:
        raise ConfigError(f"unknown {what} {value!r}.{did_you_mean(str(value), known)} Known: {', '.join(known)}.")


def interpolated(x: Tensor, axis: int, size: int) -> Tensor:
    """``x`` with ``size`` entries along ``axis``: adaptive average over neighbours (Dong & Yang, TAS, NeurIPS 2019)."""
    last = x.movedim(axis, -1)
    flat = F.adaptive_avg_pool1d(last.reshape(1, -1, last.shape[-1]), size)
    return flat.reshape(*last.shape[:-1], size).movedim(-1, axis)


def _once(form: Form, state: dict[str, Tensor], sources: Sequence[Tensor]) -> Tensor:
    assert form.op is not None
    if form.module is None:
        result: Tensor = form.op.make(*sources, **form.op.kwargs)
        return result
    _set_mode(form.module, False)
    form.training = False
    state = {**state, **{name: buffer.clone() for name, buffer in form.module.named_buffers()}}
    return functional_call(form.module, state, tuple(sources))  # type: ignore[no-any-return]


def _set_mode(module: nn.Module, training: bool) -> None:
    """Dropout as asked; batch statistics always those of the batch."""
    module.train(training)
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.train()


def _called(place: str) -> str:
    return f"node '{place}'" if place != OUTPUT else "the output"


def _family(form: Form) -> Any:
    """Forms that differ in whole numbers only have one family: only sizes can be superposed."""
    if form.op is None:
        return form.sources
    return (form.op.make, form.op.is_call, form.sources, _without_sizes(form.op.kwargs), *_options_of(form))


def _is_transformed(op: ConcreteOp | None) -> bool:
    return op is not None and bool(getattr(op.make, "one_at_a_time", False))


def _options_of(form: Form) -> tuple[Any, ...]:
    return tuple(piece.key[1:] for piece in form.pieces.values())


def _without_sizes(thing: Any) -> str:
    if isinstance(thing, bool):
        return str(thing)
    if isinstance(thing, int):
        return "size"
    if isinstance(thing, dict):
        return str({key: _without_sizes(item) for key, item in thing.items()})
    if isinstance(thing, list | tuple):
        return str([_without_sizes(item) for item in thing])
    if isinstance(thing, ConcreteOp):
        return f"{thing.make!r}{_without_sizes(thing.kwargs)}"
    return repr(thing)


def _size(form: Form) -> tuple[int, int, int]:
    parameters = sum(p.numel() for p in form.module.parameters()) if form.module is not None else 0
    return sum(form.out), sum(map(sum, form.reads)), parameters


def index_of(space: SearchSpace, choice: str, label: Label) -> int:
    """The place of ``label`` in the weights of ``choice``. Raises: SpaceError: there is no such choice or label."""
    if choice not in space.choices:
        raise SpaceError(f"space '{space.name}' has no choice '{choice}'.{did_you_mean(choice, space.choices)}")
    space.choices[choice].option(label)
    return space.choices[choice].labels.index(label)
