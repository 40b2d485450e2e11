"""Scoring many subnets on one input: what two of them compute alike is computed once.

On a node task every network reads the same graph, so those that begin with the same operations on the same slices have
the same intermediate tensors, to the bit. The first layer, the most expensive one on a graph with thousands of
features, is shared by hundreds of architectures.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from nasgraph.space import Step
from nasgraph.supernet.structure import Form, Key, Structure, ran

LIMIT = 256 * 2**20  # bytes of tensors kept
NUMBERS = 1_000_000  # results told apart before all is forgotten


@dataclass(frozen=True)
class _Result:
    """One step's result and what it is made of, by number. ``measured``: the result that has its statistics."""

    step: Step
    form: Form | None
    sources: tuple[int, ...]
    measures: bool  # BatchNorm normalises by the batch, and its statistics are taken
    measured: int | None


class Scorer:
    """Outputs of structures in evaluation mode on ``inputs``, for one state of ``store``.

    BatchNorm has the statistics of ``inputs``, as :func:`nasgraph.supernet.recalibrate` takes them from one batch: a
    layer behind another is measured while the one before normalises by the batch. Operations are taken to give the same
    on the same, in evaluation mode.
    """

    def __init__(self, store: Mapping[Key, Tensor], inputs: Sequence[Tensor], limit: int = LIMIT) -> None:
        self.store, self.inputs, self.limit = store, tuple(inputs), limit
        self.bytes = 0
        self._numbers: dict[Any, int] = {}
        self._kept: OrderedDict[int, tuple[Tensor, dict[str, Tensor]]] = OrderedDict()

    def order(self, structure: Structure) -> tuple[int, ...]:
        """To sort structures by: neighbours have their first steps in common."""
        return tuple(self._results(structure)[0])

    @torch.no_grad()
    def output(self, structure: Structure) -> Tensor:
        """What the network gives."""
        results, last = self._results(structure)
        try:
            return self._value(last, results, dict(enumerate(self.inputs)))
        except _Changed:
            self._kept.clear()
            self.bytes = 0
            numbers = {piece.name: piece.of(self.store) for piece in structure.pieces}
            return structure.run(self.inputs, numbers, statistics=structure.measured([self.inputs], numbers))

    def _results(self, structure: Structure) -> tuple[dict[int, _Result], int]:
        """Each step's result, while statistics are taken and with them, and which is the output."""
        if len(self._numbers) > NUMBERS:
            self._numbers.clear()
            self._kept.clear()
            self.bytes = 0
        scored = {name: i for i, name in enumerate(structure.graph.inputs)}
        measured = dict(scored)
        results: dict[int, _Result] = {}
        for step, form in zip(structure.graph.steps, structure.forms, strict=True):
            if form is not None and isinstance(form.module, _DropoutNd):  # nothing, in evaluation
                measured[step.name], scored[step.name] = measured[step.sources[0]], scored[step.sources[0]]
                continue
            norm = form is not None and bool(form.statistics)
            before = tuple(measured[name] for name in step.sources)
            measured[step.name] = self._number(step, form, before, norm, None, results)
            after = tuple(scored[name] for name in step.sources)
            source = measured[step.name] if norm else None
            scored[step.name] = self._number(step, form, after, False, source, results)
        return results, scored[structure.graph.output]

    def _number(
        self,
        step: Step,
        form: Form | None,
        sources: tuple[int, ...],
        measures: bool,
        measured: int | None,
        results: dict[int, _Result],
    ) -> int:
        what: Any = step.op.signature if form is None else form
        next_one = len(self.inputs) + len(self._numbers)
        number = self._numbers.setdefault((what, sources, measures, measured), next_one)
        results[number] = _Result(step, form, sources, measures, measured)
        return number

    def _value(self, number: int, results: Mapping[int, _Result], values: dict[int, Tensor]) -> Tensor:
        if number not in values:
            values[number] = self._kept_or_run(number, results, values)[0]
        return values[number]

    def _kept_or_run(
        self, number: int, results: Mapping[int, _Result], values: dict[int, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        result = results[number]
        form = result.form
        statistics: dict[str, Tensor] = {}
        if form is not None and result.measures:
            statistics = form.new_statistics()
        elif result.measured is not None:
            statistics = self._kept_or_run(result.measured, results, values)[1]
        sources = [self._value(source, results, values) for source in result.sources]
        versions = [source._version for source in sources]
        numbers = {} if form is None else {piece.name: piece.of(self.store) for piece in form.pieces}
        out = ran(result.step, form, sources, numbers, False, statistics, result.measures)
        if versions != [source._version for source in sources]:
            raise _Changed
        self._keep(number, out, statistics)
        return out, statistics

    def _keep(self, number: int, out: Tensor, statistics: dict[str, Tensor]) -> None:
        self._kept[number] = out, statistics
        self.bytes += out.numel() * out.element_size()
        while self.bytes > self.limit and self._kept:
            _, (old, _) = self._kept.popitem(last=False)
            self.bytes -= old.numel() * old.element_size()


class _Changed(Exception):
    """An operation wrote into what it read."""
