"""Structured pruning of a model that exists: which layers must follow when channels, heads or layers are removed.

The model is traced by ``torch.fx``, and each value's channel axis is followed: through activations, pooling, norms,
depthwise convolutions and some graph convolutions, which are cut too; sums and products tie what they join. Whatever is
not known to treat channels apart (``cat``, ``view``, softmax, a module without a rule) makes the channels that reach it
fixed, with the reason. So do the model's inputs and outputs.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from nasgraph.errors import SpaceError
from nasgraph.transforms.layers import CONVOLUTIONS, KINDS, is_message_passing
from nasgraph.transforms.shrink import NORMS, Cut, Group, full_size

POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d, nn.Upsample),
    *(nn.ZeroPad2d, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
APART = (  # each entry alone
    *(nn.Identity, nn.Dropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Tanh, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign),
)
LAYERS = tuple(KINDS)
GRAPH_CONVS = {  # by name, PyG's convolutions that aggregate each channel alone, and their linear layers
    "GCNConv": ("lin",),
    "SAGEConv": ("lin_l", "lin_r"),
    "GraphConv": ("lin_rel", "lin_root"),
}
AGGREGATIONS = ("add", "sum", "mean", "max", "min")
POOL_CALLS = {
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.interpolate),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool2d, F.dropout2d),
}
APART_CALLS = {
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.gelu, F.silu, F.mish, F.tanh, F.sigmoid, F.hardswish, F.dropout),
    *(F.hardsigmoid, F.hardtanh, F.softplus, torch.relu, torch.tanh, torch.sigmoid, operator.neg, torch.abs),
    *("relu", "tanh", "sigmoid", "contiguous", "clone", "detach", "float", "abs", "neg", "relu_"),
}
JOINS = {
    *(operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul, operator.truediv),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum),
    *("add", "add_", "sub", "mul", "mul_", "div"),
}
SHAPES = ("shape", "ndim", "dtype", "device")
PROJECTIONS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
)
OUTPUTS = ("output.dense", "out_proj", "o_proj", "out_lin", "to_out.0", "to_out")


def groups(model: nn.Module, inputs: Sequence[Tensor] | None = None) -> dict[str, Group]:
    """By the name of each layer whose output channels can be removed, the group that then follows.

    Layers that are tied to each other have one and the same group.

    Args: inputs: if given, the model is run once and each value's shape is checked against what was followed. Without
        them a mean over axis 1 after a linear layer makes channels fixed: it may be over positions, or over channels.

    Raises: SpaceError: the model cannot be traced.
    """
    return _traced(model, inputs).groups()


def group_of(
    model: nn.Module,
    name: str,
    follow: str | None = None,
    inputs: Sequence[Tensor] | None = None,
    checked: bool = False,
) -> Group:
    """The group of the output channels of the layer ``name``.

    If ``model`` as a whole cannot be traced, the modules around the layer are tried from the inside out. ``follow``
    names the layer that reads this one's output, for a model where that fails too: the caller vouches that between
    the two each channel is treated alone, and that nothing else reads it. It is looked for in the modules around the
    layer: ``output.dense`` of ``layer.0.intermediate.dense`` is ``layer.0.output.dense``.

    Args:
        inputs: examples, as in :func:`groups`. If ``follow`` is needed, the model is run on them without one channel.
        checked: the group was found before with ``inputs``, which then need not be given again.

    Raises: SpaceError: the channels are fixed, nothing around the layer can be traced, or ``follow`` is wrong; why.
    """
    layer = model.get_submodule(name)
    if not isinstance(layer, LAYERS):
        kinds = ", ".join(kind.__name__ for kind in LAYERS)
        raise SpaceError(f"'{name}' is a {type(layer).__name__}; channels are removed from {kinds}")
    told = None if follow is None else _followed(model, name, follow)
    parts = name.split(".")
    reason = ""
    for depth in [0, *range(len(parts) - 1, 0, -1)]:
        scope = ".".join(parts[:depth])
        try:
            found = _traced(model.get_submodule(scope), inputs if depth == 0 else None, checked)
        except SpaceError as error:
            reason = reason or str(error)
            continue
        below = ".".join(parts[depth:])
        group = found.groups().get(below)
        if group is not None:
            shared = _shared(model, [f"{scope}.{cut.module}" if scope else cut.module for cut in group.cuts])
            if shared:
                raise SpaceError(f"channels of '{name}' are fixed: '{shared}' shares its weight")
            cuts = tuple(Cut(f"{scope}.{c.module}" if scope else c.module, c.end, c.inner, c.outer) for c in group.cuts)
            if told is not None and told.cuts[1].module not in {cut.module for cut in cuts if cut.end == "in"}:
                raise SpaceError(f"'{told.cuts[1].module}' does not read the channels of '{name}': leave out `follow`")
            return Group(group.size, cuts, group.exact)
        if depth == 0:
            raise SpaceError(f"channels of '{name}' are fixed: {found.why(below)}")
    around = model.get_submodule(name.rpartition(".")[0])
    if is_message_passing(around):  # it has a bias, or layers, of as many channels
        raise SpaceError(
            f"channels of '{name}' in a {type(around).__name__} are fixed, as {reason}: use a mask (structure 'rows')"
        )
    if told is None:
        raise SpaceError(
            f"what reads '{name}' is not known, as {reason}: "
            "name that layer, such as follow='output.dense', if each channel is treated alone in between"
        )
    if inputs is not None:
        _run_without_one(model, told, inputs)
    return told


def _run_without_one(model: nn.Module, group: Group, inputs: Sequence[Tensor]) -> None:
    """Raises: SpaceError: ``model`` without the last channel of ``group`` cannot read ``inputs``."""
    if group.size == 1:
        return
    smaller = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    group.keep(smaller, range(group.size - 1))
    try:
        with torch.no_grad():
            smaller.eval()(*inputs)
    except Exception as error:
        name, reader = (cut.module for cut in group.cuts)
        text = str(error).split("\n")[0]
        raise SpaceError(
            f"more than '{reader}' depends on the channels of '{name}': without one of them the model fails ({text})"
        ) from error


def heads_of(model: nn.Module, name: str) -> Group:
    """The heads of the attention module ``name``: separate projections of query, key and value, and an output one.

    Known by their names: those of Hugging Face's BERT and its kin, and this package's ``SelfAttention``. The output
    projection may lie beside the module, in the one around it.

    Raises: SpaceError: they are not found, or keys have another number of heads than queries.
    """
    module = model.get_submodule(name)
    for inner, attention in module.named_modules():
        own = ".".join(part for part in (name, inner) if part)
        if isinstance(getattr(attention, "enter", None), nn.Linear) and hasattr(attention, "head_width"):
            width, count = int(attention.head_width), int(attention.heads)
            cuts = Cut(f"{own}.enter", "out", width, 3), Cut(f"{own}.leave", "in", width)
            return Group(count, cuts, counts=((own, "heads", 1),))
        for names in PROJECTIONS:
            layers = [getattr(attention, part, None) for part in names]
            if all(isinstance(layer, nn.Linear) for layer in layers):
                return _separate(model, own, names)
    raise SpaceError(
        f"'{name}' ({type(module).__name__}) has no heads that can be removed: separate linear layers "
        f"{' or '.join('/'.join(names) for names in PROJECTIONS)} are needed, or nasgraph's SelfAttention"
    )


def remove_layers(model: nn.Module, name: str, keep: float, how: str = "magnitude", seed: int = 0) -> list[str]:
    """Of the ``ModuleList`` or ``Sequential`` ``name``, ``round(keep * n)`` modules stay, at least one.

    They stay under their names; the others are left out, so that a loop over the list skips them. For residual blocks
    of one shape.

    Args: how: ``magnitude`` (L2 norm of a module's parameters), ``random`` (by ``seed``) or ``first``.

    Returns: names of those that stay.
    Raises: SpaceError: not such a list, or an empty one.
    """
    layers = model.get_submodule(name)
    stays = layers_that_stay(model, name, keep, how, seed)
    for each in list(layers._modules):
        if each not in stays:
            del layers._modules[each]
    return stays


def layers_that_stay(model: nn.Module, name: str, keep: float, how: str = "magnitude", seed: int = 0) -> list[str]:
    """What :func:`remove_layers` would leave. Raises: SpaceError: ``name`` is not such a list, or an empty one."""
    layers = model.get_submodule(name)
    if not isinstance(layers, nn.ModuleList | nn.Sequential) or len(layers) == 0:
        raise SpaceError(f"'{name}' is a {type(layers).__name__}; layers are removed from a ModuleList or Sequential")
    group = Group(len(layers), ())
    if how == "magnitude":
        squares = [[p.detach().double().square().sum().item() for p in each.parameters()] for each in layers]
        importance = torch.tensor([sum(each) for each in squares], dtype=torch.float64)
    else:
        importance = group.importance(model, how, seed)
    names = list(layers._modules)
    return [names[i] for i in group.best(importance, max(1, round(keep * len(names)))).tolist()]


def prune_to(model: nn.Module, group: Group, name: str, keep: float, how: str, seed: int = 0) -> None:
    """Keep ``round(keep * n)`` channels or heads of ``group``, at least one; ``n`` counts those before any removal.

    Raises: SpaceError: another ratio was kept of the same group before; ``name`` is for the message.
    """
    cut = group.cuts[0]
    layer = model.get_submodule(cut.module)
    axis = 1 if isinstance(layer, nn.Embedding) else 0
    full = full_size(layer, "weight", axis) // (cut.inner * cut.outer)
    count = max(1, round(keep * full))
    if group.size == full:
        group.keep(model, group.best(group.importance(model, how, seed), count))
    elif group.size != count:
        raise SpaceError(
            f"'{name}' is tied to layers that keep {group.size} of {full} channels, and should keep {count}: "
            "give one layer of a group a ratio, or all the same"
        )


def _separate(model: nn.Module, name: str, names: Sequence[str]) -> Group:
    attention = model.get_submodule(name)
    heads = next((h for h in ("num_attention_heads", "num_heads", "n_heads", "heads") if hasattr(attention, h)), None)
    if heads is None:
        raise SpaceError(f"'{name}' ({type(attention).__name__}) does not say how many heads it has")
    count = int(getattr(attention, heads))
    widths = [_linear(model, each).out_features for each in _below(name, names)]
    if len(set(widths)) > 1:
        raise SpaceError(f"'{name}': queries, keys and values are {widths} wide, so heads are shared: not removable")
    parent = name.rpartition(".")[0]
    leave = next((f for scope in (name, parent) for f in _below(scope, OUTPUTS) if _is_linear(model, f)), None)
    if leave is None:
        raise SpaceError(f"'{name}' has no output projection called {', '.join(OUTPUTS)}, in it or beside it")
    width = widths[0] // count
    cuts = (*(Cut(f"{name}.{part}" if name else part, "out", width) for part in names), Cut(leave, "in", width))
    more = ((name, "all_head_size", width),) if hasattr(attention, "all_head_size") else ()
    return Group(count, cuts, counts=((name, heads, 1), *more))


def _below(scope: str, names: Sequence[str]) -> list[str]:
    return [f"{scope}.{each}" if scope else each for each in names]


def _is_linear(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(model.get_submodule(name), nn.Linear)
    except AttributeError:
        return False


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _followed(model: nn.Module, name: str, follow: str) -> Group:
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        reader = ".".join([*parts[:depth], follow])
        if reader != name and _is_linear(model, reader):
            if not _is_linear(model, name) or _linear(model, reader).in_features != _linear(model, name).out_features:
                raise SpaceError(f"'{reader}' does not read the channels of '{name}'")
            return Group(_linear(model, name).out_features, (Cut(name, "out"), Cut(reader, "in")))
    raise SpaceError(f"no linear layer called '{follow}' around '{name}'")


def _shared(model: nn.Module, names: Sequence[str]) -> str | None:
    """A module beside ``names`` that has the weight of one of them."""
    mine = {id(parameter) for name in names for parameter in model.get_submodule(name).parameters(recurse=False)}
    for name, module in model.named_modules():
        if name not in names and any(id(p) in mine for p in module.parameters(recurse=False)):
            return str(name)
    return None


# ---- tracing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Value:
    """The channels of a traced value. ``axis``: 1 or -1. ``flat``: other axes were flattened into theirs."""

    key: tuple[str, str]
    axis: int
    flat: bool = False


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LAYERS) or is_message_passing(m) or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module, inputs: Sequence[Tensor] | None, checked: bool = False) -> _Channels:
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        text = str(error).split("\n")[0]
        why = "" if "co_varnames" in text else f" ({text})"  # what it says of a forward with *args or **kwargs
        raise SpaceError(f"torch.fx cannot trace the forward of {type(model).__name__}{why}") from error
    if inputs is not None:
        was = model.training
        with torch.no_grad():
            ShapeProp(fx.GraphModule(model, graph).eval()).propagate(*inputs)
        model.train(was)
    return _Channels(model, graph, checked)


class _Channels:
    """Which channels of a traced model are one and the same: a union of keys ``(layer, end)``."""

    def __init__(self, model: nn.Module, graph: fx.Graph, checked: bool) -> None:
        self.model, self.checked = model, checked
        self.above: dict[tuple[str, str], tuple[str, str]] = {}
        self.sizes: dict[tuple[str, str], int | None] = {}
        self.fixed: dict[tuple[str, str], str] = {}  # with the reason
        self.inexact: set[tuple[str, str]] = set()
        self.refused: dict[str, str] = {}  # graph convolutions, with the reason
        self.cuts: dict[tuple[str, str], tuple[tuple[str, str], int]] = {}  # (layer, end): whose channels, width
        values: dict[fx.Node, _Value | None] = {}
        for node in graph.nodes:
            values[node] = self._after(node, [values[source] for source in node.all_input_nodes])
            self._check_shape(node, values[node])
        for name in dict.fromkeys(name for name, _ in self.cuts):
            shared = _shared(model, [name])
            if shared:
                for end in ("in", "out", "both"):
                    if (name, end) in self.cuts:
                        self._fix(self.cuts[name, end][0], f"'{shared}' shares the weight of '{name}'")

    def groups(self) -> dict[str, Group]:
        """See :func:`groups`."""
        members: dict[tuple[str, str], list[tuple[str, str, int]]] = {}
        for (name, end), (key, width) in self.cuts.items():
            members.setdefault(self._root(key), []).append((name, end, width))
        found: dict[str, Group] = {}
        for root, ends in members.items():
            size = self.sizes[root]
            if root in self.fixed or size is None:
                continue
            ends.sort(key=lambda each: ("out", "both", "in").index(each[1]))  # the first is one that makes channels
            cuts = tuple(Cut(name, end, width // size) for name, end, width in ends)
            group = Group(size, cuts, root not in self.inexact)
            found |= {cut.module: group for cut in cuts if cut.end == "out"}
        return found

    def why(self, name: str) -> str:
        """Why the output channels of the layer ``name`` are fixed."""
        if (name, "out") in self.cuts:
            return self.fixed[self._root(self.cuts[name, "out"][0])]
        layer, parent = self.model.get_submodule(name), name.rpartition(".")[0]
        if is_message_passing(self.model.get_submodule(parent)):
            return self.refused.get(parent, f"'{parent}' is not called")
        depthwise = getattr(layer, "groups", 1) > 1
        return "its groups tie it to what it reads: name that" if depthwise else "it is not called"

    # ---- the union --------------------------------------------------------------------------------------------

    def _root(self, key: tuple[str, str]) -> tuple[str, str]:
        while key in self.above:
            key = self.above[key]
        return key

    def _new(self, key: tuple[str, str], size: int | None) -> tuple[str, str]:
        self.sizes.setdefault(key, size)
        return key

    def _fix(self, key: tuple[str, str], reason: str) -> None:
        self.fixed.setdefault(self._root(key), reason)

    def _join(self, one: tuple[str, str], other: tuple[str, str], where: str) -> None:
        a, b = self._root(one), self._root(other)
        if a == b:
            return
        if None not in (self.sizes[a], self.sizes[b]) and self.sizes[a] != self.sizes[b]:
            self._fix(a, f"{where} joins {self.sizes[a]} with {self.sizes[b]} channels")
            self._fix(b, self.fixed[a])
            return
        self.above[b] = a
        self.sizes[a] = self.sizes[a] if self.sizes[a] is not None else self.sizes[b]
        if b in self.fixed:
            self._fix(a, self.fixed[b])
        if b in self.inexact:
            self.inexact.add(a)

    # ---- one node ---------------------------------------------------------------------------------------------

    def _after(self, node: fx.Node, sources: list[_Value | None]) -> _Value | None:
        """The channels of what ``node`` returns; None: it has none that are followed."""
        read = [source for source in sources if source is not None]
        if node.op == "placeholder":
            return None
        if node.op == "output":
            return self._stop(read, "the model returns it")
        if node.op == "get_attr":
            return None
        if node.op == "call_module":
            layer = self.model.get_submodule(str(node.target))
            if is_message_passing(layer):
                return self._graph_convolution(node, layer, sources)
            return self._module(str(node.target), layer, sources)
        return self._call(node, sources, read)

    def _stop(self, read: Sequence[_Value], reason: str) -> _Value | None:
        """These channels are fixed, and nothing after them is followed."""
        for value in read:
            self._fix(value.key, reason)
        return None

    def _module(self, name: str, layer: nn.Module, sources: list[_Value | None]) -> _Value | None:
        value = sources[0] if sources else None
        if isinstance(layer, LAYERS):
            return self._layer(name, layer, value)
        if value is None:
            return None
        if isinstance(layer, APART):
            return value
        if isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1) and value.axis == 1:
            return _Value(value.key, -1, True)
        if isinstance(layer, POOLS) and value.axis == 1:
            return value
        if isinstance(layer, NORMS):
            return self._norm(name, layer, value)
        if isinstance(layer, nn.PReLU):
            if layer.num_parameters > 1:
                self._cut(name, "both", value, layer.num_parameters)
            return value
        return self._stop([v for v in sources if v is not None], f"'{name}' ({type(layer).__name__}) reads it")

    def _layer(self, name: str, layer: nn.Module, value: _Value | None) -> _Value:
        if isinstance(layer, CONVOLUTIONS):
            depthwise = 1 < layer.groups == layer.in_channels == layer.out_channels
            if depthwise and value is not None and value.axis == 1:
                self._cut(name, "both", value, layer.out_channels)
                return value
            axis, width, out = 1, layer.in_channels, layer.out_channels
        elif isinstance(layer, nn.Linear):
            axis, width, out = -1, layer.in_features, layer.out_features
        else:
            axis, width, out = -1, 0, int(layer.embedding_dim)  # type: ignore[arg-type]
        key = self._new((name, "out"), out)
        if getattr(layer, "groups", 1) > 1:
            self._fix(key, f"'{name}' is a convolution in groups")
            self._stop([value] if value else [], f"'{name}' is a convolution in groups")
        else:
            self.cuts[name, "out"] = key, out
            if value is not None and value.axis != axis:
                self._stop([value], f"'{name}' reads along another axis")
            elif value is not None and width:
                self._cut(name, "in", value, width)
        return _Value(key, axis)

    def _graph_convolution(self, node: fx.Node, conv: nn.Module, sources: list[_Value | None]) -> _Value | None:
        """Its linear layers read and make the same channels; itself it may have a bias."""
        name = str(node.target)
        parts, aggregation = GRAPH_CONVS.get(type(conv).__name__), getattr(conv, "aggr", None)
        reason = f"'{name}' is a {type(conv).__name__}; channels are followed through {', '.join(GRAPH_CONVS)}"
        if parts is None or not type(conv).__module__.startswith("torch_geometric."):
            self.refused[name] = f"{reason}: use a mask there (structure 'rows')"
        elif getattr(conv, "normalize", False) and parts != ("lin",):  # of GCN it is the adjacency that is normalised
            self.refused[name] = f"'{name}' normalises over its channels"
        elif getattr(conv, "project", False) or aggregation not in AGGREGATIONS:
            self.refused[name] = f"'{name}' projects or aggregates by {aggregation}, not by {', '.join(AGGREGATIONS)}"
        elif not isinstance(next(iter(node.args), None), fx.Node) or any(sources[1:]):
            self.refused[name] = f"'{name}' reads more than one tensor of nodes, or not first"
        if name in self.refused or parts is None:
            return self._stop([source for source in sources if source is not None], self.refused[name])
        layers = [(f"{name}.{part}", getattr(conv, part)) for part in parts if hasattr(conv, part)]
        key = self._new((layers[0][0], "out"), layers[0][1].out_features)
        for below, linear in layers:
            self.cuts[below, "out"] = key, linear.out_features
            if sources[0] is not None:
                self._cut(below, "in", sources[0], linear.in_features)
                self._cut(name, "in", sources[0], linear.in_features)
        self.cuts[name, "both"] = key, layers[0][1].out_features
        return _Value(key, -1)

    def _norm(self, name: str, layer: nn.Module, value: _Value) -> _Value | None:
        if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
            if value.axis != -1 or len(layer.normalized_shape) != 1:
                return self._stop([value], f"'{name}' ({type(layer).__name__}) takes the mean over more than channels")
            self._cut(name, "both", value, layer.normalized_shape[0])
            self.inexact.add(self._root(value.key))
        else:
            self._cut(name, "both", value, int(layer.num_features))  # type: ignore[arg-type]
        return value

    def _cut(self, name: str, end: str, value: _Value, width: int) -> None:
        """The layer ``name`` has to follow ``value``, which is ``width`` wide at its ``end``."""
        size = self.sizes[self._root(value.key)]
        if size is None or width % size or (width != size and not value.flat):
            self._fix(value.key, f"'{name}' reads {width} channels of {size}")
            return
        before = self.cuts.get((name, end))
        if before is not None:
            self._join(before[0], value.key, f"'{name}'")
        self.cuts[name, end] = value.key, width

    def _call(self, node: fx.Node, sources: list[_Value | None], read: list[_Value]) -> _Value | None:
        target: Callable[..., Any] | str = node.target
        about = target in ("size", "dim") or (target is getattr and node.args[1] in SHAPES)
        if about or not read:
            return None
        value = read[0]
        if target in APART_CALLS or (target in POOL_CALLS and value.axis == 1):
            return value
        if target in JOINS:
            return self._joined(node, sources, read)
        if _flattens(node) and value.axis == 1:
            return _Value(value.key, -1, True)
        if target in (torch.mean, "mean"):
            return self._mean(node, value)
        called = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        return self._stop(read, f"{called} reads it")

    def _joined(self, node: fx.Node, sources: list[_Value | None], read: list[_Value]) -> _Value | None:
        """A sum or product: all tensors have the same channels. A number changes nothing."""
        if len(read) < len(sources):
            return self._stop(read, f"'{node.name}' joins it with what cannot be cut")
        first = read[0]
        for other in read[1:]:
            if (other.axis, other.flat) != (first.axis, first.flat):
                return self._stop(read, f"'{node.name}' joins channels of different axes")
            self._join(first.key, other.key, f"'{node.name}'")
        return first

    def _mean(self, node: fx.Node, value: _Value) -> _Value | None:
        axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        axes = axes if isinstance(axes, list | tuple) else [axes]
        kept = bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))
        if value.axis == 1 and sorted(axes, key=str) in ([2, 3], [-1, -2], [2], [-1]) and not value.flat:
            whole = len(axes) == 2
            if kept or not whole:
                return value
            return _Value(value.key, -1)
        if value.axis == -1 and list(axes) == [1] and not value.flat:
            shape = getattr(node.all_input_nodes[0].meta.get("tensor_meta"), "shape", None)
            if shape is None and not self.checked:
                return self._stop(
                    [value], f"'{node.name}' takes the mean over axis 1, of positions or of channels: give inputs"
                )
            if shape is None or len(shape) > 2:
                return value
        return self._stop([value], f"'{node.name}' takes the mean over channels")

    def _check_shape(self, node: fx.Node, value: _Value | None) -> None:
        """With example inputs: the axis that was followed has as many entries as there are channels."""
        meta = node.meta.get("tensor_meta")
        if value is None or meta is None or not hasattr(meta, "shape"):
            return
        size = self.sizes[self._root(value.key)]
        length = int(meta.shape[value.axis])
        if size is None or length % size or (length != size and not value.flat):
            self._fix(value.key, f"'{node.name}' has {length} entries where {size} channels were expected")


def _flattens(node: fx.Node) -> bool:
    """``flatten(x, 1)``, ``x.view(n, -1)`` and the like."""
    rest = node.args[1:]
    if node.target in (torch.flatten, "flatten"):
        return rest in ((1,), (1, -1)) or (not rest and dict(node.kwargs) == {"start_dim": 1})
    if node.target in ("view", "reshape"):
        return len(rest) == 2 and isinstance(rest[1], int) and rest[1] == -1
    return False
