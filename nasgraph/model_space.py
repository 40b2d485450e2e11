"""A search space over a model that already exists: transforms with choices, put on its modules by name.

``SearchSpace.from_module(model, rules)`` makes a :class:`ModelSpace`: one node, the model, rewritten by one transform
for each rule and each module that the rule's pattern fits. Everything that takes a space takes it; the modules and
what flows between them are in ``graph()``. The model itself is never changed.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from nasgraph.build import Made, node_seed
from nasgraph.declare import as_op, choices_in, named, ways
from nasgraph.errors import SpaceError, did_you_mean
from nasgraph.held import hold
from nasgraph.space import Architecture, Choice, ConcreteOp, Label, Op, SearchSpace
from nasgraph.transforms.base import Transform, active, compiled, in_order, matching, rewritten
from nasgraph.transforms.flow import flow
from nasgraph.transforms.layers import KINDS, plain_linears
from nasgraph.tryout import check_rules

if TYPE_CHECKING:
    import networkx

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
NODE = "model"


class Base:
    """The model that a space was put over, and copies of it.

    Its numbers are not copied: they are those of the user's model. Parameters in ``frozen`` are shared by all copies.

    Args:
        output: attribute, key or index of what the model returns that is the network's output; None: all of it.
        made: how to make the same model anew, for exported code.
        held: names of BatchNorm layers that keep their running statistics, in training too.
    """

    def __init__(
        self,
        model: nn.Module,
        frozen: frozenset[str],
        output: str | int | None,
        made: Made | None = None,
        held: Sequence[str] = (),
    ) -> None:
        self.model, self.frozen, self.output, self.made, self.held = model, frozen, output, made, tuple(held)
        self.result: tuple[tuple[int, ...], torch.dtype] | None = None  # of the network, on the example
        self._removed: dict[str, frozenset[str]] = {}  # modules, by the transform that removes them
        digest = hashlib.sha256()
        for name, tensor in model.state_dict().items():
            digest.update(f"{name}/{tuple(tensor.shape)}/{tensor.dtype}/{name in frozen}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        digest.update("".join(f"{name} held;" for name in self.held).encode())
        self._name = f"{type(model).__qualname__}#{digest.hexdigest()[:16]}"

    def __repr__(self) -> str:
        return self._name

    def __deepcopy__(self, memo: dict[int, Any]) -> Base:
        return self

    def left(self, transforms: Sequence[ConcreteOp]) -> list[ConcreteOp]:
        """Those of ``transforms`` whose module no other one removes."""
        gone: set[str] = set()
        for each in transforms:
            if each.signature not in self._removed:
                self._removed[each.signature] = each.make(**each.kwargs).removed(self.model)
            gone |= self._removed[each.signature]
        return [each for each in transforms if not any(f"{each.kwargs['where']}.".startswith(f"{n}.") for n in gone)]

    def copy(self, share: bool = False) -> nn.Module:
        """The model with parameters of its own, but for those that are frozen. ``share``: with none of its own."""
        memo: dict[int, Any] = {}
        for name, parameter in self.model.named_parameters():
            numbers = parameter.detach()
            own = not (share or name in self.frozen)
            memo[id(parameter)] = nn.Parameter(
                numbers.clone() if own else numbers, requires_grad=parameter.requires_grad and name not in self.frozen
            )
        try:
            copied = copy.deepcopy(self.model, memo)
        except Exception as error:
            raise SpaceError(f"{type(self.model).__name__} cannot be copied: {error}") from error
        for name in self.held:
            hold(copied.get_submodule(name))
        return copied


class ModelSpace(SearchSpace):
    """A space over a model; see :meth:`nasgraph.space.SearchSpace.from_module`."""

    base: Base
    names: tuple[str, ...]  # of the modules that rules fit

    def model(self, architecture: Mapping[str, Label], seed: int = 0) -> nn.Module:
        """The rewritten model as its class is, with its own forward: what ``build`` makes, without a wrapper."""
        op = self.resolve(architecture).steps[0].op
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(node_seed(seed, NODE))
            return rewritten(self.base.copy(), [each.make(**each.kwargs) for each in op.kwargs["transforms"]])

    def baseline(self) -> Architecture:
        """The architecture whose every transform is neutral, so that the network is the model bit for bit.

        Raises: SpaceError: a transform has no neutral option; names the choice.
        """
        op: Any = self._ops[NODE]
        picked: dict[str, Label] = {}
        for each in op.kwargs["transforms"]:
            for cube, made in ways(each, {name: frozenset([label]) for name, label in picked.items()}):
                if made.make(**made.kwargs).neutral():
                    picked |= {name: next(iter(labels)) for name, labels in cube.items()}
                    break
            else:
                raise SpaceError(
                    f"{each.label} of '{each.kwargs['where']}' has no neutral option, so the model itself is not in "
                    "the space: add 32 bits (Quantize), rank 0 (Lora), keep 1.0 (Prune) or rank None (LowRank)"
                )
        return self.architecture(picked)

    def start(self, seed: int) -> dict[tuple[str, str, str], tuple[Tensor, bool]]:
        """What a supernet stores: by (node, option, parameter) the numbers at their largest size, and if they train.

        Frozen parameters are those of the model, not copies.
        """
        op: Any = self._ops[NODE]
        prefix = "" if self.base.output is None else "model."
        found: dict[str, tuple[Tensor, bool]] = {}
        for name, parameter in self.base.copy().named_parameters():
            found[prefix + name] = parameter.detach(), parameter.requires_grad
        for where in dict.fromkeys(each.kwargs["where"] for each in op.kwargs["transforms"]):
            mine = [each for each in op.kwargs["transforms"] if each.kwargs["where"] == where]
            for name, added in self._added(where, mine, node_seed(seed, f"{NODE}/{where}")).items():
                found[f"{prefix}{where}.{name}"] = added.detach(), added.requires_grad
        return {(NODE, op.label, name): numbers for name, numbers in found.items()}

    def _added(self, where: str, transforms: Sequence[Op], seed: int) -> dict[str, nn.Parameter]:
        """The parameters that ``transforms`` add to the module ``where``, each at its largest."""
        module = self.base.copy(share=True).get_submodule(where)
        own = {name for name, _ in module.named_parameters()}
        found: dict[str, list[nn.Parameter]] = {}
        for some in _settings(transforms):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                made = rewritten(copy.deepcopy(module), [dataclasses.replace(each, where="*") for each in some])
            for name, parameter in made.named_parameters():
                if name not in own:
                    found.setdefault(name, []).append(parameter)
        return {name: _largest(f"{where}.{name}", forms) for name, forms in found.items()}

    def graph(self) -> networkx.MultiDiGraph:
        """The modules that rules fit, and the data flow between them.

        Node attributes: ``kind`` (op), ``op`` (the class), ``choices`` (names). ``graph.graph["edges"]`` says how the
        edges were found: ``fx``, ``export``, or ``order`` (of the modules, where neither can trace the model).
        """
        import networkx

        inputs = tuple(declared.example for declared in self.inputs.values()) if self.base.result else None
        edges, how = flow(self.base.copy(share=True).eval(), self.names, inputs)
        graph = networkx.MultiDiGraph(name=self.name, edges=how)
        op: Any = self._ops[NODE]
        for name in self.names:
            mine = [each for each in op.kwargs["transforms"] if each.kwargs["where"] == name]
            choices = sorted({choice.name for each in mine for choice in choices_in(each)})
            graph.add_node(name, kind="op", op=type(self.base.model.get_submodule(name)).__name__, choices=choices)
        for first, second in edges:
            graph.add_edge(first, second, position=0, choice=None)
        return graph


def from_module(
    model: nn.Module,
    rules: Sequence[Transform],
    *,
    inputs: Inputs | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    output: str | int | None = None,
    train: Sequence[str] = (),
    make: Op | None = None,
    name: str | None = None,
) -> ModelSpace:
    """See :meth:`nasgraph.space.SearchSpace.from_module`."""
    pairs = _pairs(model, rules)
    _check(model, pairs)
    if not isinstance(train, list | tuple) or not all(isinstance(pattern, str) for pattern in train):
        raise SpaceError(f"train is {train!r}: give a list of patterns of modules that stay trainable, ['classifier']")
    frozen: frozenset[str] = frozenset()
    held: list[str] = []
    if any(rule.freezes for rule in rules):
        trained = [where for pattern in train for where in matching(model, pattern)]
        frozen = frozenset(
            parameter
            for parameter, _ in model.named_parameters()
            if not any(parameter.startswith(f"{where}.") for where in trained)
        )
        held = [
            layer
            for layer, module in model.named_modules()
            if isinstance(module, _NormBase) and module.track_running_stats
            if not any(f"{layer}.".startswith(f"{where}.") for where in trained)
        ]
    elif train:
        raise SpaceError("train names what is not frozen, and no rule freezes the model: leave it out")
    made = None if make is None else Made(make.make, make.kwargs)
    space = ModelSpace(name or type(model).__name__)
    space.base = Base(model, frozen, output, made, held)
    space.names = tuple(dict.fromkeys(where for _, where in pairs))
    examples = _inputs(model, inputs)
    _check_dynamic(dynamic or {}, examples, known_sizes=inputs is not None)
    sources = [space.input(given, example, (dynamic or {}).get(given)) for given, example in examples.items()]
    known: dict[tuple[int, str], Choice] = {}
    transforms = [
        Op(type(rule), **{**named(as_op(rule).kwargs, where, known), "where": where}) for rule, where in pairs
    ]
    picked = {} if output is None else {"output": output}
    op = Op(network, label=type(model).__name__, takes=len(sources), model=space.base, transforms=transforms, **picked)
    space.output(space.add(NODE, op, *sources))
    if inputs is not None:
        space.base.result = _result(space)
    _check_tied(space, [each.make(**each.kwargs) for each in transforms])
    check_rules(space, pairs)
    return space


def network(
    model: nn.Module | Base, transforms: Sequence[Transform], output: str | int | None = None, share: bool = False
) -> nn.Module:
    """The network of a :class:`ModelSpace`: ``model`` rewritten by ``transforms``, giving its output as one tensor."""
    made = rewritten(model if isinstance(model, nn.Module) else model.copy(share), transforms)
    return made if output is None else Picked(made, output)


def _simplified(op: ConcreteOp) -> ConcreteOp:
    kept = op.kwargs["model"].left(active(op.kwargs["transforms"]))
    return dataclasses.replace(op, kwargs={**op.kwargs, "transforms": kept})


def _shape(op: ConcreteOp) -> tuple[tuple[int, ...], torch.dtype] | None:
    base: Base = op.kwargs["model"]
    return base.result or ((0,), torch.float32)


# supernet.store looks for it: with the numbers of the model itself, since a supernet has numbers of its own
network.light = partial(network, share=True)  # type: ignore[attr-defined]
network.simplified = _simplified  # type: ignore[attr-defined]  # canonical.simplify
network.shape = _shape  # type: ignore[attr-defined]  # build: transforms change no shape, so nothing is run


class Picked(nn.Module):
    """One of the things that ``model`` returns: an attribute, a key or a position."""

    def __init__(self, model: nn.Module, output: str | int) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, *inputs: Tensor) -> Tensor:
        """What is picked."""
        picked: Tensor = self.pick(self.model(*inputs), self.output)
        return picked

    @staticmethod
    def pick(found: Any, output: str | int) -> Any:
        """The attribute, key or position ``output`` of ``found``."""
        if isinstance(output, str) and hasattr(found, output):
            return getattr(found, output)
        return found[output]


# ---- declaring --------------------------------------------------------------------------------------------------


def _pairs(model: nn.Module, rules: Sequence[Transform]) -> list[tuple[Transform, str]]:
    """Each rule with each module that its pattern means."""
    if not isinstance(model, nn.Module):
        raise SpaceError(f"from_module needs a model, an nn.Module, not {model!r}")
    if not isinstance(rules, list | tuple) or not rules:
        raise SpaceError("the rules are a list of at least one transform, such as [Lora('*.query', rank=Choice(...))]")
    pairs = []
    for rule in rules:
        if not isinstance(rule, Transform):
            raise SpaceError(f"a rule is a transform, such as Lora('*.query', rank=4), not {rule!r}")
        if not isinstance(rule.where, str):
            raise SpaceError(
                f"{type(rule).__name__}: what comes first is a pattern of module names, not {rule.where!r}"
            )
        refused = {}
        names = matching(model, rule.where, rule.fits)
        for where in names:
            try:
                dataclasses.replace(rule, where="*").targets(model.get_submodule(where))
            except SpaceError as error:
                refused[where] = error
        pairs += [(rule, where) for where in names if where not in refused]
        _say_what_stays(model, rule)
        if len(refused) == len(names) or (refused and "*" not in rule.where):
            where, why = next(iter(refused.items()))
            layers = [name for name, layer in model.named_modules() if name and rule.can_rewrite(layer)]
            some = f"; in the model there are: {', '.join(layers[:5])}" if layers else ""
            raise SpaceError(f"the pattern '{rule.where}' fits '{where}', and {why}{some}")
    return pairs


def _say_what_stays(model: nn.Module, rule: Transform) -> None:
    """Warn of layers that a pattern with ``*`` fits, whose matrix no transform can rewrite: GPT-2's ``Conv1D``."""
    fitting = compiled(rule.where).fullmatch
    stay = {
        name: type(layer).__name__
        for name, layer in model.named_modules()
        if "*" in rule.where and fitting(name) and not any(layer.children())
        if isinstance(weight := getattr(layer, "weight", None), nn.Parameter) and weight.dim() > 1
        if not rule.can_rewrite(layer) and type(layer) not in KINDS
    }
    if stay:
        kinds, first = " and ".join(sorted(set(stay.values()))), next(iter(stay))
        warnings.warn(
            f"{type(rule).__name__}('{rule.where}') leaves {len(stay)} layers of class {kinds} as they are, "
            f"such as '{first}': no transform can rewrite these",
            stacklevel=5,  # who calls SearchSpace.from_module
        )


def _check(model: nn.Module, pairs: Sequence[tuple[Transform, str]]) -> None:
    """No module is rewritten twice by one kind of transform."""
    for i, (rule, where) in enumerate(pairs):
        for other, there in pairs[:i]:
            outer, inner = sorted((where, there), key=len)
            removing = where != there and (rule.removes or other.removes)
            if type(rule) is type(other) and f"{inner}.".startswith(f"{outer}.") and not removing:
                raise SpaceError(
                    f"two rules of {type(rule).__name__} fit '{inner}' ('{other.where}' and '{rule.where}'): narrow one"
                )


def _check_tied(space: ModelSpace, transforms: Sequence[Transform]) -> None:
    """Modules that become smaller together do so by the same settings."""
    model = plain_linears(space.base.copy(share=True))
    inputs = tuple(declared.example for declared in space.inputs.values()) if space.base.result else None
    tied = [each.tied(model, inputs) for each in transforms]
    for i, each in enumerate(transforms):
        for j, other in enumerate(transforms[:i]):
            if other.where not in tied[i] or each.where not in tied[j]:
                continue
            for field in dataclasses.fields(each):
                first, second = getattr(other, field.name), getattr(each, field.name)
                if field.name not in ("where", "follow") and repr(first) != repr(second):
                    raise SpaceError(
                        f"'{other.where}' and '{each.where}' are tied: give both the same {field.name}, or use one "
                        "choice for both, Choice('k', ...) without {name}"
                    )


def _inputs(model: nn.Module, inputs: Inputs | None) -> dict[str, Tensor]:
    """By the names of ``forward``'s arguments."""
    parameters = [p for p in inspect.signature(model.forward).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    names = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL and p.kind is not p.VAR_KEYWORD]
    if inputs is None:
        needed = [p.name for p in parameters if p.default is p.empty and p.name in names]
        return {given: torch.zeros(0) for given in needed or names[:1] or ["x"]}
    if isinstance(inputs, Mapping):
        if list(inputs) != names[: len(inputs)]:
            raise SpaceError(
                f"the inputs {', '.join(inputs)} are not the first arguments of {type(model).__name__}.forward "
                f"({', '.join(names[: len(inputs) + 2])}): wrap the model in one whose forward takes them in order"
            )
        return dict(inputs)
    tensors = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    return dict(zip([*names, *(f"x{i}" for i in range(len(tensors)))], tensors, strict=False))


def _check_dynamic(dynamic: Mapping[str, Mapping[int, str]], examples: Mapping[str, Tensor], known_sizes: bool) -> None:
    """Raises: SpaceError: not of the form; an input that there is not; an axis that its example has not."""
    way_out = f"give the axes of an input by its name, such as {{'{next(iter(examples))}': {{0: 'batch'}}}}"
    if not isinstance(dynamic, Mapping):
        raise SpaceError(f"dynamic is {dynamic!r}: {way_out}")
    for given, axes in dynamic.items():
        if not isinstance(given, str) or not isinstance(axes, Mapping):
            raise SpaceError(f"dynamic has {given!r}: {axes!r}: {way_out}")
        if given not in examples:
            near = did_you_mean(given, examples) or f" There are: {', '.join(examples)}"
            raise SpaceError(f"dynamic names '{given}', which is no input of the model.{near}")
        for axis, called in axes.items():
            if type(axis) is not int or not isinstance(called, str):
                raise SpaceError(f"dynamic has {axis!r}: {called!r} for '{given}': {way_out}")
            last = examples[given].dim() - 1
            if axis < 0 or (known_sizes and axis > last):
                there = f"there are 0 to {last}" if known_sizes else "count from 0"
                raise SpaceError(f"dynamic names axis {axis} of '{given}': {there}")


def _result(space: ModelSpace) -> tuple[tuple[int, ...], torch.dtype]:
    base = space.base
    model = base.copy(share=True).eval()
    examples = [declared.example for declared in space.inputs.values()]
    try:
        with torch.no_grad():
            found = model(*examples)
    except Exception as error:
        raise SpaceError(f"{type(model).__name__} cannot read the inputs: {error}") from error
    returns = f"{type(model).__name__} returns a {type(found).__name__}"
    there = [part for part in _parts(found) if isinstance(Picked.pick(found, part), Tensor)]
    which = " or ".join(f"output={part!r}" for part in there[:5])
    way_out = f"say which with {which}" if which else "wrap the model in one that returns a tensor"
    try:
        result = found if base.output is None else Picked.pick(found, base.output)
    except Exception as error:
        raise SpaceError(f"{returns}, which has no output {base.output!r}: {way_out}") from error
    if not isinstance(result, Tensor):
        more = "" if base.output is None else f", whose {base.output!r} is a {type(result).__name__}"
        raise SpaceError(f"{returns}{more}, not one tensor: {way_out}")
    return tuple(result.shape), result.dtype


def _parts(found: Any) -> list[str | int]:
    """What may be picked of what a model returns: keys, fields, positions or attributes."""
    if isinstance(found, Mapping):
        return list(found)
    if isinstance(found, tuple | list):
        return list(getattr(found, "_fields", range(len(found))))
    return list(getattr(found, "__dict__", {}))


# ---- supernets --------------------------------------------------------------------------------------------------


def _settings(transforms: Sequence[Op]) -> Iterator[list[Transform]]:
    """Settings that together add every parameter: one transform at a time, beside each setting of structural ones."""
    structural = [each for each in transforms if getattr(each.make, "structural", False)]
    others = [each for each in transforms if each not in structural]
    for cube, first in ways(structural, {}):
        for other in [None, *others]:
            for _, second in ways([] if other is None else [other], cube):
                made = [each.make(**each.kwargs) for each in (*first, *second)]
                if in_order(made) and not any(getattr(each, "sizes_only", False) for each in made):
                    yield made


def _largest(name: str, forms: Sequence[nn.Parameter]) -> nn.Parameter:
    """The form of a parameter that has the most entries on every axis."""
    most = tuple(map(max, *(form.shape for form in forms))) if len(forms) > 1 else tuple(forms[0].shape)
    for form in reversed(forms):
        if tuple(form.shape) == most:
            return form
    shapes = " and ".join(sorted({str(tuple(form.shape)) for form in forms}))
    raise SpaceError(f"parameter '{name}' is {shapes}, which do not nest")
