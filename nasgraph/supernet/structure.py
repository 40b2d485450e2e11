"""An architecture without numbers: modules on the meta device that run on whatever tensors they are given.

A :class:`Form` is one operation in one form. The networks of a supernet share forms, so a new architecture costs
little more than to find out which it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nasgraph.held import Held
from nasgraph.space import Graph, Step
from nasgraph.supernet.slicing import Computed, Cut

Key = tuple[str, str, str]  # node, option, name of the parameter within the operation
Numbers = Mapping[str, Tensor]  # by their names in the network


@dataclass(frozen=True, eq=False)
class Piece:
    """One parameter of a network: where it is stored and how it is cut, or computed."""

    name: str  # in the network
    key: Key
    cut: Cut | None  # None: all that is stored
    computed: Computed | None = None
    extra: tuple[tuple[str, Key], ...] = ()  # what it is computed with

    def of(self, store: Mapping[Key, Tensor]) -> Tensor:
        """The parameter; contiguous and at the start of its memory, as a copy would be.

        Kernels may add in another order otherwise.
        """
        stored = store[self.key]
        piece = None
        if self.computed is not None:
            piece = self.computed(stored, {name: store[key] for name, key in self.extra})
        if piece is None:
            if self.cut is None:
                return stored
            piece = self.cut(stored)
        piece = piece.contiguous()
        return piece.clone() if piece.storage_offset() else piece


@dataclass(frozen=True, eq=False)
class Place:
    """Where a module keeps a tensor. A tied one has several places."""

    where: dict[str, Any]
    local: str
    name: str  # in the network
    blank: Tensor  # what is there when the module does not run


@dataclass(frozen=True, eq=False)
class Form:
    """One operation in one form."""

    module: nn.Module  # its parameters lie on the meta device, its buffers are those of a new one
    pieces: tuple[Piece, ...]
    parameters: tuple[Place, ...]
    buffers: tuple[Place, ...]  # but those of BatchNorm
    statistics: tuple[tuple[_BatchNorm, Place], ...]  # of BatchNorm layers

    def __call__(
        self, inputs: Sequence[Tensor], numbers: Numbers, training: bool, statistics: Numbers, calibrate: bool = False
    ) -> Tensor:
        """Run the module on ``numbers`` and leave it without them. Its buffers are never written.

        In training mode BatchNorm uses the statistics of the batch and forgets them; in evaluation mode it uses
        ``statistics``, or those of a new module for what is not in there.

        ``calibrate``: in evaluation mode, but BatchNorm uses those of the batch and adds them to ``statistics``.
        """
        momenta = self.fill(numbers, training, statistics, calibrate)
        try:
            out: Tensor = self.module(*inputs)
            return out
        finally:
            self.empty(momenta)

    def fill(
        self, numbers: Numbers, training: bool, statistics: Numbers, calibrate: bool = False
    ) -> dict[_BatchNorm, float | None]:
        """Make the module ready for one call. Returns: what :meth:`empty` needs."""
        if self.module.training is not training:
            self.module.train(training)
        for place in self.parameters:
            place.where[place.local] = numbers[place.name]
        for place in self.buffers:
            place.where[place.local] = place.blank.clone()
        momenta = {layer: layer.momentum for layer, _ in self.statistics} if calibrate else {}
        for layer in momenta:
            layer.momentum = None  # a mean over all batches, not a moving one
            layer.training = True
        for layer, place in self.statistics:
            if calibrate or not layer.training:
                place.where[place.local] = statistics.get(place.name, place.blank)
            else:
                place.where[place.local] = None  # in training they are only updated
        return momenta

    def empty(self, momenta: Mapping[_BatchNorm, float | None]) -> None:
        """Leave the module without numbers, so that they and their gradients can be freed."""
        for place in (*self.parameters, *self.buffers):
            place.where[place.local] = place.blank
        for _, place in self.statistics:
            place.where[place.local] = place.blank
        for layer, momentum in momenta.items():
            layer.momentum, layer.training = momentum, False

    def new_statistics(self) -> dict[str, Tensor]:
        """Those of BatchNorm, with nothing seen yet."""
        return {
            place.name: torch.ones_like(place.blank) if place.local == "running_var" else torch.zeros_like(place.blank)
            for _, place in self.statistics
        }


def form(module: nn.Module, node: str, pieces: Sequence[Piece]) -> Form:
    """``module`` as a :class:`Form`; its parameters lose their numbers. ``pieces``: those of its parameters."""
    names = {id(buffer): f"{node}.{name}" for name, buffer in module.named_buffers()}
    without_numbers(module)
    names |= {id(parameter): f"{node}.{name}" for name, parameter in module.named_parameters()}
    parameters, buffers, statistics = [], [], []
    for part in module.modules():
        for local, parameter in part._parameters.items():
            if parameter is not None:
                parameters.append(Place(part._parameters, local, names[id(parameter)], parameter))
        for local, buffer in part._buffers.items():
            if buffer is not None:
                place = Place(part._buffers, local, names[id(buffer)], buffer)
                if tracks(part):
                    statistics.append((part, place))
                else:
                    buffers.append(place)
    return Form(module, tuple(pieces), tuple(parameters), tuple(buffers), tuple(statistics))  # type: ignore[arg-type]


def without_numbers(module: nn.Module) -> None:
    """Move the parameters to the meta device; the buffers stay."""
    moved: dict[int, nn.Parameter] = {}  # a parameter under two names stays one
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    moved[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"))
                part._parameters[name] = moved[id(parameter)]


def tracks(module: nn.Module) -> bool:
    """Whether ``module`` is BatchNorm with running statistics, and they move."""
    return isinstance(module, _BatchNorm) and module.track_running_stats and not isinstance(module, Held)


@dataclass(frozen=True, eq=False)
class Structure:
    """A network: its steps in order, each with its form; a function has none."""

    graph: Graph
    forms: tuple[Form | None, ...]

    def __post_init__(self) -> None:
        read = {self.graph.output}
        unread: list[tuple[str, ...]] = []
        for step in reversed(self.graph.steps):
            unread.append(tuple({*step.sources} - read))
            read.update(step.sources)
        object.__setattr__(self, "_unread", tuple(reversed(unread)))  # after each step

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Of all steps, in order."""
        return tuple(piece for form in self.forms if form is not None for piece in form.pieces)

    @property
    def has_batch_norm(self) -> bool:
        """Whether a layer has running statistics."""
        return any(form is not None and form.statistics for form in self.forms)

    def numel(self) -> int:
        """How many numbers its parameters are."""
        parts = [form.module for form in self.forms if form is not None]
        return sum(parameter.numel() for part in parts for parameter in part.parameters())

    def measured(self, batches: Iterable[Sequence[Tensor]], numbers: Numbers) -> dict[str, Tensor]:
        """The statistics of all BatchNorm layers: the mean over ``batches`` of inputs."""
        found: dict[str, Tensor] = {}
        for form in self.forms:
            if form is not None:
                found |= form.new_statistics()
        with torch.no_grad():
            for inputs in batches:
                self.run(inputs, numbers, statistics=found, calibrate=True)
        return found

    def run(
        self,
        inputs: Sequence[Tensor],
        numbers: Numbers,
        training: bool = False,
        statistics: Numbers | None = None,
        calibrate: bool = False,
    ) -> Tensor:
        """The network's output on ``inputs``; see :meth:`Form.__call__`."""
        values = dict(zip(self.graph.inputs, inputs, strict=True))
        for step, form, unread in zip(self.graph.steps, self.forms, self._unread, strict=True):  # type: ignore[attr-defined]
            sources = [values[name] for name in step.sources]
            values[step.name] = ran(step, form, sources, numbers, training, statistics or {}, calibrate)
            for name in unread:
                del values[name]
        return values[self.graph.output]


def ran(
    step: Step,
    form: Form | None,
    sources: Sequence[Tensor],
    numbers: Numbers,
    training: bool,
    statistics: Numbers,
    calibrate: bool = False,
) -> Tensor:
    """What one step gives."""
    if form is not None:
        return form(sources, numbers, training, statistics, calibrate)
    out: Tensor = step.op.make(*sources, **step.op.kwargs)
    return out
