"""A rewritten operation as code: the plain operation, and the modules that transforms have put into it.

So a generated file holds the classes that its network is made of, not the transforms that made it. Used where it gives
the same network, which is tried; elsewhere the file contains the transforms.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from nasgraph.build import Made
from nasgraph.held import kind
from nasgraph.model_space import Picked
from nasgraph.transforms.layers import plain_linears
from nasgraph.transforms.quantize import QuantizedAggregation, with_quantized_aggregation

BASIC = frozenset(nn.Module().__dict__)
PRIVATE = ("kept_entries", "full_shapes", "own_slices")  # what only supernets and further pruning ask for
Tensor_ = tuple[str, tuple[int, ...] | None, torch.dtype | None]  # parameter or buffer, shape, type; None: no tensor
Part = tuple[Any, dict[str, Any], dict[str, Tensor_]]  # class, attributes, tensors
PLAIN = (type(None), bool, int, float, str, torch.dtype, enum.Enum)


def placed(module: nn.Module, parts: Mapping[str, Part]) -> nn.Module:
    """``module`` with ``parts``: by name the class, attributes and tensors of each.

    A part whose class inherits from that of the module of this name changes it; another is a new module there. A tensor
    is ``"parameter"`` or ``"buffer"``, shape and type: its numbers are to be loaded. None takes the module away.
    """
    root = plain_linears(module)
    for name, (own, attributes, tensors) in parts.items():
        above, _, last = name.rpartition(".")
        part = root.get_submodule(above)._modules.get(last) if name else root
        if own is None:
            del root.get_submodule(above)._modules[last]
            continue
        if part is None or not issubclass(own, type(part)):
            part = own.__new__(own)
            nn.Module.__init__(part)
            if not name:
                root = part
            else:
                root.get_submodule(above)._modules[last] = part
        part.__class__ = own
        part.__dict__.update(attributes)
        for key, (what, shape, dtype) in tensors.items():
            empty = None if shape is None else torch.empty(shape, dtype=dtype)
            if what == "buffer":
                part.register_buffer(key, empty)
            else:
                part.register_parameter(key, None if empty is None else nn.Parameter(empty))
    return root


def calls(made: Mapping[str, Made], model: nn.Module) -> dict[str, Made]:
    """``made``, what makes each submodule of ``model``, with transforms left out where that gives the same."""
    return {name: without_transforms(each, model.get_submodule(name)) for name, each in made.items()}


def without_transforms(made: Made, module: nn.Module) -> Made:
    """What makes ``module``, which ``made`` made, without its transforms; ``made`` if nothing else does."""
    op = plain(made)
    if op is None:
        return made
    try:
        with torch.random.fork_rng(devices=[]):
            parts = differences(plain_linears(op()), module)
            found = Made(placed, {"module": op, "parts": parts}) if parts else op
            same = outline(plain_linears(found())) == outline(module)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError):  # what stands there cannot be made so
        return made
    return found if same else made


def plain(made: Made) -> Made | None:
    """What makes the module of ``made`` before its transforms; None: ``made`` has none, or nothing tells."""
    if "transforms" not in made.kwargs:
        return None
    base = made.kwargs.get("model")
    op = made.kwargs.get("op") if base is None else base.made
    if made.kwargs.get("output") is not None and op is not None:
        op = Made(Picked, {"model": op, "output": made.kwargs["output"]})
    return op if isinstance(op, Made) else None


def differences(before: nn.Module, after: nn.Module) -> dict[str, Part]:
    """The ``parts`` of :func:`placed` that make ``after`` of ``before``. Raises: TypeError: one has no text."""
    known, found = dict(before.named_modules()), dict(after.named_modules())
    parts: dict[str, Part] = {}
    for name, module in found.items():
        own, old = kind(module), known.get(name)
        new = old is None or not issubclass(own, kind(old))
        had = {} if new or old is None else attributes(old)
        attribute = {key: value for key, value in attributes(module, whole=new).items() if had.get(key, key) != value}
        tensors = {} if new or old is None else shapes(old)
        tensor = {key: value for key, value in shapes(module, whole=new).items() if tensors.get(key) != value}
        if new or own is not kind(old) or attribute or tensor:  # type: ignore[arg-type]
            parts[name] = (named(own), attribute, tensor)
    gone = [name for name in known if name not in found and name.rpartition(".")[0] in found]
    return parts | {name: (None, {}, {}) for name in gone}


def named(own: type[nn.Module]) -> Any:
    """``own``, or the call that makes it."""
    if issubclass(own, QuantizedAggregation):
        return Made(partial(with_quantized_aggregation, own.__bases__[1]), {})
    return own


def attributes(module: nn.Module, whole: bool = False) -> dict[str, Any]:
    """Those that ``module`` has beside what every module has and what only supernets ask for.

    What no line of code gives back is left out. Raises: TypeError: there is such an attribute, and all are asked for.
    """
    found = {key: value for key, value in module.__dict__.items() if key not in BASIC and key not in PRIVATE}
    if whole and not all(map(has_text, found.values())):
        raise TypeError(f"an attribute of {type(module).__name__} cannot be written as code")
    return {key: value for key, value in found.items() if has_text(value)}


def has_text(value: Any) -> bool:
    """Whether a line of code gives ``value`` back."""
    if isinstance(value, tuple | list):
        return all(map(has_text, value))
    if isinstance(value, dict):
        return all(has_text(key) and has_text(each) for key, each in value.items())
    if isinstance(value, FunctionType | BuiltinFunctionType | type):
        return "<" not in value.__qualname__  # not made inside of a function
    return isinstance(value, PLAIN)


def shapes(module: nn.Module, whole: bool = False) -> dict[str, Tensor_]:
    """Of each tensor of ``module`` itself that is in its state, what :func:`placed` takes.

    Raises: TypeError: there is one that is in no file, and all are asked for.
    """
    if whole and any(name in module._non_persistent_buffers_set for name in module._buffers):
        raise TypeError(f"a buffer of {type(module).__name__} is in no file")
    found: dict[str, Tensor_] = {name: spec("parameter", tensor) for name, tensor in module._parameters.items()}
    return found | {
        name: spec("buffer", tensor)
        for name, tensor in module._buffers.items()
        if name not in module._non_persistent_buffers_set
    }


def spec(what: str, tensor: Tensor | None) -> Tensor_:
    """One tensor, as :func:`placed` takes it."""
    return (what, None, None) if tensor is None else (what, tuple(tensor.shape), tensor.dtype)


def outline(module: nn.Module) -> list[Any]:
    """All of ``module`` but its numbers, and attributes that have no text."""
    return [
        (name, kind(each), attributes(each), shapes(each))
        for name, each in sorted(module.named_modules(remove_duplicate=False), key=lambda pair: pair[0])
    ]
