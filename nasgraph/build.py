"""An architecture becomes a module: a ``torch.fx.GraphModule`` whose code can be read and exported."""

from __future__ import annotations

import functools
import hashlib
import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from nasgraph.canonical import simplify
from nasgraph.errors import SpaceError
from nasgraph.space import ConcreteOp, Graph, Label, SearchSpace, Step

# Arguments that say how many channels come in. They are filled in, unless the space gives them.
CHANNELS_IN = (
    "in_channels",
    "in_features",
    "num_features",
    "normalized_shape",
    "num_channels",
    "input_size",
    "embed_dim",
    "d_model",
)

Shape = tuple[tuple[int, ...], torch.dtype]
Shapes = dict[tuple[str, tuple[Shape, ...]], Shape]
_known_shapes: weakref.WeakKeyDictionary[SearchSpace, Shapes] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Made:
    """The call that made a submodule: ``make(**kwargs)``, sizes of the inputs included. May be nested in kwargs."""

    make: Callable[..., Any]
    kwargs: dict[str, Any]

    def __call__(self) -> nn.Module:
        """Make the module anew."""
        module = self.thing()
        if not isinstance(module, nn.Module):
            raise SpaceError(f"{self.make!r} made a {type(module).__name__}, not an nn.Module: use Call for functions")
        return module

    def thing(self) -> Any:
        """What the call returns: an argument of another call need not be a module."""
        return self.make(**_each(self.kwargs, Made, lambda made: made.thing()))


def build(space: SearchSpace, architecture: Mapping[str, Label], seed: int = 0) -> fx.GraphModule:
    """The network of ``architecture``, without what cannot change its output.

    It is called with the space's inputs in the order of their declaration. Submodules carry the names of their nodes,
    ``model.meta["calls"]`` tells what made each of them (:class:`Made`). A node's parameters depend on ``seed`` and the
    node's name only, so the same node starts the same in every candidate. The global random state is left alone.

    Raises: SpaceError: an operation that cannot be made or run with the sizes that reach it; names the node.
    """
    return build_graph(space, simplify(space.resolve(architecture)), seed)


def build_graph(space: SearchSpace, graph: Graph, seed: int = 0) -> fx.GraphModule:
    """The network of a decided graph, as it stands. See :func:`build`."""
    shapes = _Shapes(space)
    root, calls = nn.Module(), {}
    code = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(code)
    values: dict[str, fx.Node] = {name: code.placeholder(name) for name in graph.inputs}
    with torch.random.fork_rng(devices=[]):
        for step in graph.steps:
            sources = [values[name] for name in step.sources]
            if step.op.is_call:
                shapes.after(step, None)
                try:
                    values[step.name] = step.op.make(*(fx.Proxy(s, tracer) for s in sources), **step.op.kwargs).node
                except Exception as error:
                    raise SpaceError(f"node '{step.name}' ({step.op.label}) cannot be traced: {error}") from error
                if values[step.name] not in sources:
                    values[step.name]._rename(step.name)  # in the model's code the result is called like its node
                continue
            made = _made(step.op, shapes.channels(step.sources[0]))
            if step.name in _taken_names():
                raise SpaceError(f"node '{step.name}': every model has an attribute of this name; choose another")
            torch.default_generator.manual_seed(node_seed(seed, step.name))
            try:
                module = made()
            except Exception as error:
                raise SpaceError(f"node '{step.name}': {_written(made)} failed: {error}") from error
            shapes.after(step, module)
            calls[step.name] = made
            root.add_module(step.name, module)
            values[step.name] = code.create_node("call_module", step.name, tuple(sources), name=step.name)
    code.output(values[graph.output])
    model = fx.GraphModule(root, code, class_name="Network")
    model.meta["calls"] = calls
    return model


@functools.cache
def _taken_names() -> frozenset[str]:
    return frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))


def node_seed(seed: int, name: str) -> int:
    """The seed of node ``name``'s initialisation: the same in every architecture that has the node."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


class _Shapes:
    """Shapes of all tensors of one network.

    A node's shape is found by running its operation once on a small example; an operation with the same arguments and
    the same input shapes is not run again in this space.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.known = _known_shapes.setdefault(space, {})
        self.examples: dict[str, Tensor] = {i.name: i.example for i in space.inputs.values()}
        self.shapes = {name: (tuple(example.shape), example.dtype) for name, example in self.examples.items()}

    def channels(self, name: str) -> int:
        """Channels are the last axis of ``(..., c)``, and axis 1 of images ``(b, c, h, w)`` and volumes."""
        shape, _ = self.shapes[name]
        return shape[1] if len(shape) >= 4 else shape[-1]

    def after(self, step: Step, module: nn.Module | None) -> None:
        signature = (step.op.signature, tuple(self.shapes[name] for name in step.sources))
        if signature not in self.known:
            shape = getattr(step.op.make, "shape", None)  # an operation may know it
            self.known[signature] = self._run(step, module) if shape is None else shape(step.op)
        self.shapes[step.name] = self.known[signature]

    def _run(self, step: Step, module: nn.Module | None) -> tuple[tuple[int, ...], torch.dtype]:
        inputs = [self._example(name) for name in step.sources]
        try:
            with torch.no_grad():
                result = module.eval()(*inputs) if module is not None else step.op.make(*inputs, **step.op.kwargs)
        except Exception as error:
            sizes = ", ".join(f"{name} {tuple(self.shapes[name][0])}" for name in step.sources)
            raise SpaceError(f"node '{step.name}' ({step.op.label}) cannot read {sizes}: {error}") from error
        finally:
            if module is not None:
                module.train()
        if not isinstance(result, Tensor):
            raise SpaceError(f"node '{step.name}' ({step.op.label}) returns a {type(result).__name__}, not one tensor")
        return tuple(result.shape), result.dtype

    def _example(self, name: str) -> Tensor:
        if name not in self.examples:
            shape, dtype = self.shapes[name]
            self.examples[name] = torch.zeros(shape, dtype=dtype)
        return self.examples[name]


def _made(op: ConcreteOp, channels: int) -> Made:
    kwargs: dict[str, Any] = _each(op.kwargs, ConcreteOp, lambda inner: _made(inner, channels))
    for name in _channel_arguments(op.make):
        kwargs.setdefault(name, channels)
    return Made(op.make, kwargs)


def _each(thing: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """``thing`` with everything of ``kind`` in it changed, also inside lists, tuples and dicts."""
    if isinstance(thing, kind):
        return change(thing)
    if isinstance(thing, dict):
        return {key: _each(item, kind, change) for key, item in thing.items()}
    if isinstance(thing, list | tuple):
        return type(thing)(_each(item, kind, change) for item in thing)
    return thing


@functools.lru_cache(maxsize=4096)
def _channel_arguments(make: Callable[..., Any]) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(make).parameters
    except ValueError:  # a class written in C
        return ()
    return tuple(name for name in CHANNELS_IN if name in parameters)


def _written(made: Made) -> str:
    return f"{getattr(made.make, '__name__', made.make)}({', '.join(f'{k}={v!r}' for k, v in made.kwargs.items())})"
