"""``torch.compile`` of subnets: one compilation serves all that differ in sizes only.

The slices are cut outside, and the modules with the slices in them are arguments of one plain function. So the compiler
sees the widths as sizes of its inputs and not as constants of a model. Compiled and eager results differ in the last
bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasgraph.supernet.structure import Numbers, Structure

# How a step is computed: its module's place among the modules, or a function and its arguments.
Plan = tuple[tuple[int, ...], int | None, Any, tuple[tuple[str, Any], ...]]

SETTINGS: dict[str, Any] = {  # sizes of a module's tensors and its whole numbers may change without a new compilation
    "allow_unspec_int_on_nn_module": True,
    "force_parameter_static_shapes": False,
    "force_nn_module_property_static_shapes": False,
}


class Compiler:
    """Compiles each kind of structure once: the same steps of the same classes, whatever their sizes.

    Args:
        backend: of ``torch.compile``.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        self.backend = backend
        self.kinds: dict[Any, Callable[..., Tensor]] = {}

    def run(
        self, structure: Structure, inputs: Sequence[Tensor], numbers: Numbers, training: bool, statistics: Numbers
    ) -> Tensor:
        """The network's output; see :meth:`nasgraph.supernet.structure.Structure.run`."""
        places = {name: i for i, name in enumerate(structure.graph.inputs)}
        modules: list[nn.Module] = []
        plans: list[Plan] = []
        for step, form in zip(structure.graph.steps, structure.forms, strict=True):
            sources = tuple(places[name] for name in step.sources)
            if form is None:
                plans.append((sources, None, step.op.make, tuple(step.op.kwargs.items())))
            else:
                plans.append((sources, len(modules), None, ()))
                modules.append(form.module)
            places[step.name] = len(places)
        plan, last = tuple(plans), places[structure.graph.output]
        kind = (repr(plan), last, training, *(_kind(module) for module in modules))
        if kind not in self.kinds:
            # A function of its own: the compiler counts compilations by function.
            own = FunctionType(_run.__code__.replace(), _run.__globals__)
            self.kinds[kind] = torch.compile(own, backend=self.backend, dynamic=True)
        forms = [form for form in structure.forms if form is not None]
        filled = [form.fill(numbers, training, statistics) for form in forms]
        try:
            with torch._dynamo.config.patch(SETTINGS), warnings.catch_warnings():
                # It asks for the gradients of the slices, which are no leaves.
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
                return self.kinds[kind](plan, last, modules, *inputs)
        finally:
            for form, momenta in zip(forms, filled, strict=True):
                form.empty(momenta)


def _kind(module: nn.Module) -> tuple[type, ...]:
    return tuple(type(part) for part in module.modules())


def _run(plans: Sequence[Plan], last: int, modules: Sequence[nn.Module], *inputs: Tensor) -> Tensor:
    values = list(inputs)
    for sources, place, function, arguments in plans:
        read = [values[i] for i in sources]
        if place is None:
            values.append(function(*read, **dict(arguments)))
        elif type(modules[place]) is nn.LayerNorm and modules[place].elementwise_affine:
            norm = modules[place]  # its shape is a tuple, so a constant to the compiler
            values.append(F.layer_norm(read[0], norm.weight.shape, norm.weight, norm.bias, norm.eps))  # type: ignore[arg-type]
        else:
            values.append(modules[place](*read))
    return values[last]
