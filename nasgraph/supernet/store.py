"""A supernet: one store of parameters, a rule for slicing it, and every architecture as a view of it.

For every (node, option) the store keeps each parameter at the largest size that any architecture needs. An architecture
is the plain module that :func:`nasgraph.build.build` makes for it, run on slices of the store by
``torch.func.functional_call``; so any module works, and a subnet equals its extraction bit for bit.
``docs/supernet.md`` shows how to use it.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nasgraph.build import Made, _each, _made, _Shapes, build_graph, node_seed
from nasgraph.canonical import simplify
from nasgraph.errors import ConfigError, SpaceError, did_you_mean
from nasgraph.space import Architecture, Graph, Label, SearchSpace, Step
from nasgraph.supernet import checkpoint as checkpoints
from nasgraph.supernet import sharing
from nasgraph.supernet.compiled import Compiler
from nasgraph.supernet.scoring import Scorer
from nasgraph.supernet.slicing import computed_for, cut_for
from nasgraph.supernet.steps import start_new_steps
from nasgraph.supernet.stored import called, numbered, start
from nasgraph.supernet.structure import Form, Key, Piece, Structure, form, tracks
from nasgraph.supernet.variants import chosen, options, variants
from nasgraph.training.loop import TrainSettings
from nasgraph.training.policies import Policy
from nasgraph.training.shared import train_shared
from nasgraph.transforms.low_rank import sizes_only

if TYPE_CHECKING:
    from nasgraph.ranking import RankReport
    from nasgraph.tasks.base import Task
    from nasgraph.tasks.batch import Batch

STRUCTURES = 1024  # kept built
MODELS = 64  # the same for a space over a model, where each is a whole model without numbers
SAMPLES = 2048  # for BatchNorm: 64 batches of 32

_called, _numbered = called, numbered  # the names that other modules import


class Supernet:
    """The store for ``space``. The start of a parameter depends on ``seed``, its node and its option, on nothing else.

    ``task`` is what it learns and is judged by; without one it is a store to slice.

    Sizes are found by :func:`nasgraph.supernet.variants.variants`: all forms that an operation takes in the space,
    before constraints. Each entry of a stored parameter starts as in the largest form that uses it, so the largest form
    starts as it would alone.

    ``share`` lets parameters of equal name and shape be one: ``"options"`` those of a node's options,
    ``"homogeneous"`` those of nodes that are the same layer; see :mod:`nasgraph.supernet.sharing`. They start as the
    first.

    Raises: SpaceError: a parameter that has another number of axes, or other entries than a rule can give, in another
    form of the same option; names the node, the option and the parameter. ConfigError: an unknown ``share``.
    """

    def __init__(self, space: SearchSpace, task: Task | None = None, seed: int = 0, share: str | None = None) -> None:
        if share is not None and share not in sharing.RULES:
            near = did_you_mean(share, sharing.RULES)
            raise ConfigError(f"unknown share {share!r}.{near} Known: {', '.join(sharing.RULES)}.")
        self.space, self._task, self.seed, self.share = space, task, seed, share
        self.device = torch.device("cpu")
        self.store: dict[Key, nn.Parameter] = {}
        known = getattr(space, "start", None)  # a space over a model knows what to store
        found = {} if known else variants(space)
        self._limit = MODELS if known else STRUCTURES
        for own, (numbers, trains) in known(seed).items() if known else ():
            self.store[own] = nn.Parameter(numbers, requires_grad=trains)
        same = None if share is None else sharing.RULES[share](space, found)
        first: dict[Any, nn.Parameter] = {}
        for (node, option), forms in found.items():
            for name, tensor in start(forms, node, option, seed).items():
                key = (node, option, name)
                shared = key if same is None else (same(key), name, tuple(tensor.shape), tensor.dtype)
                self.store[key] = first.setdefault(shared, nn.Parameter(tensor))
        self.step = 0  # updates of training done
        self.settings: TrainSettings | None = None  # those of the optimizer
        self.optimizer: torch.optim.Optimizer | None = None
        self.policy_state: tuple[str, dict[str, Any]] | None = None  # class and state of the last policy
        self._names: dict[tuple[str, str], list[str]] = {}
        for node, option, name in self.store:
            self._names.setdefault((node, option), []).append(name)
        self._options = {node: options(space, node) for node in space._ops}
        self._of: OrderedDict[Architecture, Structure] = OrderedDict()
        self._structures: OrderedDict[Any, Structure] = OrderedDict()
        self._forms: OrderedDict[Any, Form] = OrderedDict()
        self._statistics: OrderedDict[tuple[Structure, int], dict[str, Tensor]] = OrderedDict()
        self._batches: dict[int, list[tuple[Tensor, ...]]] = {}  # for the statistics
        self._compiler: Compiler | None = None
        self._shown: tuple[Tensor, ...] | None = None  # by every batch of the task; (): they differ
        self._kept: Scorer | None = None
        self._state: list[int] = []  # of the store, when these were computed
        self.started: WeakSet[Structure] = WeakSet()  # whose learned steps have all started, see supernet.steps

    def __repr__(self) -> str:
        return f"Supernet({self.space.name!r}, {self.numel:,} numbers)"

    @property
    def task(self) -> Task:
        """What the supernet learns. Raises: ConfigError: it was made without one."""
        if self._task is None:
            raise ConfigError("this supernet has no task: make it as Supernet(space, task)")
        return self._task

    @property
    def numel(self) -> int:
        """How many numbers the store holds."""
        return sum(parameter.numel() for parameter in self.parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        """The stored parameters, in an order that the space's declaration decides."""
        return iter({id(parameter): parameter for parameter in self.store.values()}.values())

    def to(self, device: str | torch.device) -> Supernet:
        """Move the store, in place."""
        self.device = torch.device(device)
        for parameter in self.store.values():
            parameter.data = parameter.data.to(self.device)
            parameter.grad = None
        for state in self.optimizer.state.values() if self.optimizer else ():
            state.update({name: t.to(self.device) for name, t in state.items() if isinstance(t, Tensor)})
        for cache in (self._of, self._structures, self._forms, self._statistics, self._batches):
            cache.clear()
        self._kept = self._shown = None
        return self

    # ---- views ----------------------------------------------------------------------------------------------------

    def subnet(self, architecture: Mapping[str, Label]) -> Subnet:
        """``architecture`` as a callable that reads the store; its gradients arrive there."""
        found = architecture if isinstance(architecture, Architecture) else Architecture(architecture)
        return Subnet(self, found, self._structure(found))

    def compiled(self, architecture: Mapping[str, Label], backend: str | Callable[..., Any] = "inductor") -> Subnet:
        """:meth:`subnet` through ``torch.compile``. Architectures that differ in sizes only share a compilation.

        What a module keeps as a tuple of sizes is a constant to the compiler (a ``LayerNorm`` that is not a node of its
        own), and each value of it is compiled.
        """
        if self._compiler is None or self._compiler.backend is not backend:
            self._compiler = Compiler(backend)
        view = self.subnet(architecture)
        view.compiler = self._compiler
        return view

    def extract(self, architecture: Mapping[str, Label]) -> fx.GraphModule:
        """``architecture`` as a plain network of its own, with copies of its slices: what ``build`` would return.

        BatchNorm has the statistics of a new network: see :meth:`calibrated`.
        """
        structure = self._structure(Architecture(architecture))
        with sizes_only():  # the numbers are those of the store
            model = build_graph(self.space, structure.graph, self.seed).to(self.device)
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, piece in self._slices(structure).items():
                if own[name].data_ptr() != piece.data_ptr():  # but for the frozen numbers that all networks share
                    own[name].copy_(piece)
        for module in model.modules():
            module.__class__ = getattr(type(module), "alone", type(module))
        model.meta["calls"] = {name: _alone(made) for name, made in model.meta["calls"].items()}
        return model

    def start_steps(self, architecture: Mapping[str, Label], inputs: Sequence[Tensor]) -> None:
        """Learned steps of activations that nothing has trained yet start from what they read; :meth:`train` calls it.

        Args: inputs: those of a training batch, on which ``architecture`` is run in training mode.
        """
        start_new_steps(self, self._structure(Architecture(architecture)), inputs)

    def params(self, architecture: Mapping[str, Label]) -> int:
        """How many parameters ``architecture`` has."""
        return self._structure(Architecture(architecture)).numel()

    def has_batch_norm(self, architecture: Mapping[str, Label]) -> bool:
        """Whether the scores of ``architecture`` need statistics of their own."""
        return self._structure(Architecture(architecture)).has_batch_norm

    def calibrated(self, architecture: Mapping[str, Label], samples: int = SAMPLES) -> fx.GraphModule:
        """:meth:`extract` with BatchNorm statistics, in evaluation mode: exactly the network that ``evaluate`` scores.

        The statistics are the mean over batches of 32 that hold ``samples`` training samples, drawn from the
        supernet's seed; over the whole graph, once, where each batch of the task shows all of it. They are kept for
        each architecture until the store changes.
        """
        model = self.extract(architecture).eval()
        statistics = self._measured(self._structure(Architecture(architecture)), samples)
        buffers = dict(model.named_buffers())
        for name, numbers in statistics.items():
            buffers[name].copy_(numbers)
        return model

    def evaluate(
        self, architectures: Iterable[Mapping[str, Label]], samples: int = SAMPLES, split: str = "val"
    ) -> list[float]:
        """Accuracy (a fraction) of each architecture on ``split`` of the task, without training.

        Networks with BatchNorm are scored as :meth:`calibrated` makes them, with statistics from ``samples`` samples.
        On a task that shows the whole graph each time, what several networks compute alike is computed once.
        """
        found = [Architecture(architecture) for architecture in architectures]
        structures = [self._structure(architecture) for architecture in found]
        scores = [0.0] * len(found)
        scorer = self._scorer()
        order = list(range(len(found)))
        if scorer is not None:
            order.sort(key=lambda i: scorer.order(structures[i]))
        for i in order:
            model: nn.Module
            if scorer is None:
                model = Subnet(self, found[i], structures[i], self._measured(structures[i], samples))
            else:
                model = _Scored(self, found[i], structures[i], scorer)
            scores[i] = self.task.score(model, split)["accuracy"]
        return scores

    def _measured(self, structure: Structure, samples: int) -> dict[str, Tensor]:
        """Statistics of the BatchNorm layers."""
        if not structure.has_batch_norm:
            return {}
        self._forget()
        found = self._statistics.get((structure, samples))
        if found is None:
            with torch.no_grad():
                found = structure.measured(self._calibration(samples), self._slices(structure))
            self._keep(self._statistics, (structure, samples), found)
        return found

    def _calibration(self, samples: int) -> list[tuple[Tensor, ...]]:
        whole = self._whole()
        if whole is not None:
            return [whole]
        if samples not in self._batches:
            n = math.ceil(samples / 32)
            self._batches = {samples: [self.task.batch(32, _batch_seed(self.seed, i)).inputs for i in range(n)]}
        return self._batches[samples]

    def _whole(self) -> tuple[Tensor, ...] | None:
        """What each batch of the task shows, if all show the same."""
        if self._shown is None:
            one, other = (self.task.batch(1, seed).inputs for seed in (0, 1))
            self._shown = one if all(a is b for a, b in zip(one, other, strict=True)) else ()
        return self._shown or None

    def _scorer(self) -> Scorer | None:
        self._forget()
        whole = self._whole()
        if whole is None:
            return None
        if self._kept is None or any(a is not b for a, b in zip(self._kept.inputs, whole, strict=True)):
            self._kept = Scorer(self.store, whole)
        return self._kept

    def _forget(self) -> None:
        """What was computed from the store, if it has changed since."""
        state = [int(_bits(parameter.detach()).sum(dtype=torch.long)) for parameter in self.store.values()]
        if state != self._state:
            self._statistics.clear()
            self._kept = None
            self._state = state

    def rank_report(self, truth: Callable[[Architecture], float], *args: Any, **kwargs: Any) -> RankReport:
        """Hold the ranking of :meth:`evaluate` against ``truth``: see :func:`nasgraph.ranking.rank_report`."""
        from nasgraph.ranking import rank_report

        return rank_report(self, truth, *args, **kwargs)

    # ---- training -------------------------------------------------------------------------------------------------

    def train(
        self,
        policy: Policy,
        steps: int,
        *,
        settings: TrainSettings | None = None,
        seed: int = 0,
        reduction: str = "sum",
        clip: float | None = None,
        samples: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        every: int = 20,
        on_step: Callable[[int, Sequence[float]], None] | None = None,
    ) -> list[float]:
        """Train the store until ``steps`` updates are done in all, those before included.

        So an interrupted run goes on with ``Supernet.load(folder, space, task).train(...)`` and the same arguments,
        and ends with the same bits (on the CPU, with one number of threads).

        Args:
            settings: learning rate, weight decay and optimizer; the rest of it is not used. An optimizer goes on if
                its settings are those of the call before, and starts anew otherwise.
            reduction: how the gradients of a step's architectures become one update, ``"sum"`` or ``"mean"``. The
                loss of each is a mean over the batch's samples either way.
            clip: each entry of an update's gradient is clipped to ``[-clip, clip]``.
            samples: training samples per step; default: all of them, at once.
            checkpoint: a folder that :meth:`save` writes after every ``every`` updates and after the last.
            on_step: called with the number of each step and the losses of its architectures.

        Returns: of each step done here the mean loss of its architectures, in nats.
        Raises: NotFinite: a loss or a gradient is NaN or infinite; names step and architecture. The store is as the
            step before left it, and so is the checkpoint. ConfigError: an unknown reduction, a clip of 0 or less.
        """
        return train_shared(
            self, policy, steps, settings or TrainSettings(), seed, reduction, clip, samples, checkpoint, every, on_step
        )

    def resume(self, policy: Policy) -> None:
        """Give ``policy`` what its class had observed when this supernet was last trained."""
        if self.policy_state is not None and self.policy_state[0] == type(policy).__qualname__:
            policy.load(self.policy_state[1])

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write store and training state into ``folder``, at once or not at all. Returns: the JSON file's path."""
        return checkpoints.save(self, folder)

    @staticmethod
    def load(folder: str | os.PathLike[str], space: SearchSpace, task: Task | None = None) -> Supernet:
        """What :meth:`save` wrote.

        Raises: SpaceError: it is of another space or key version. DamagedFile: a file is not what was written.
            ConfigError: there is no checkpoint.
        """
        return checkpoints.load(folder, space, task)

    # ---- structures -------------------------------------------------------------------------------------------------

    def _structure(self, architecture: Architecture) -> Structure:
        structure = self._of.get(architecture)
        if structure is None:
            graph = simplify(self.space.resolve(architecture))
            picked = {step.name: self._option(step.name, architecture) for step in graph.steps}
            signature = (graph.output, *((s.name, picked[s.name], s.op.signature, s.sources) for s in graph.steps))
            structure = self._structures.get(signature)
            if structure is None:
                structure = self._build(graph, picked)
                self._keep(self._structures, signature, structure)
            self._keep(self._of, architecture, structure)
        return structure

    def _keep(self, cache: OrderedDict[Any, Any], key: Any, thing: Any) -> None:
        cache[key] = thing
        if len(cache) > self._limit:
            cache.popitem(last=False)

    def _option(self, node: str, architecture: Architecture) -> str:
        return self._options[node][id(chosen(self.space, node, architecture))]

    def _build(self, graph: Graph, picked: Mapping[str, str]) -> Structure:
        shapes, forms = _Shapes(self.space), []
        for step in graph.steps:
            forms.append(None if step.op.is_call else self._form(step, picked[step.name], shapes))
            signature = (step.op.signature, tuple(shapes.shapes[name] for name in step.sources))
            known = signature in shapes.known
            shapes.after(step, None if known or step.op.is_call else self._module(step, shapes))
        return Structure(graph, tuple(forms))

    def _module(self, step: Step, shapes: _Shapes) -> nn.Module:
        with torch.random.fork_rng(devices=[]), sizes_only():
            torch.default_generator.manual_seed(node_seed(self.seed, step.name))
            made = _made(step.op, shapes.channels(step.sources[0]))
            return Made(getattr(made.make, "light", made.make), made.kwargs)()

    def _form(self, step: Step, option: str, shapes: _Shapes) -> Form:
        signature = (step.name, option, step.op.signature, shapes.channels(step.sources[0]))
        found = self._forms.get(signature)
        if found is None:
            module = self._module(step, shapes).to(self.device)
            pieces = [self._piece(step.name, option, name, module) for name, _ in module.named_parameters()]
            found = form(module, step.name, pieces)
            self._keep(self._forms, signature, found)
        return found

    def _piece(self, node: str, option: str, name: str, module: nn.Module) -> Piece:
        key, shape = (node, option, name), tuple(module.get_parameter(name).shape)
        stored = tuple(self.store[key].shape) if key in self.store else ()
        cut = cut_for(module, name, stored, shape) if stored else None
        axes = shape if cut is None else cut.axes
        if len(stored) != len(axes) or any(a < b for a, b in zip(stored, axes, strict=True)):
            raise SpaceError(f"{called(*key)} is {shape}, larger than the {stored} that the store found for it")
        computed = computed_for(module, name, self._names[node, option])
        extra = () if computed is None else tuple((own, (node, option, full)) for own, full in computed.extra)
        return Piece(f"{node}.{name}", key, cut, computed, extra)

    def _slices(self, structure: Structure) -> dict[str, Tensor]:
        return {piece.name: piece.of(self.store) for piece in structure.pieces}


class Subnet(nn.Module):
    """A view of a supernet: called like the network of its architecture, in training or evaluation mode.

    It has no parameters of its own; gradients arrive in the store. Buffers are never written: in training mode
    BatchNorm uses the statistics of the batch and forgets them; in evaluation mode it has those of a new network.
    """

    def __init__(
        self,
        supernet: Supernet,
        architecture: Architecture,
        structure: Structure,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.architecture, self._statistics = architecture, statistics
        self.compiler: Compiler | None = None
        self._view = (supernet, structure)  # in a tuple, so that no module or parameter is registered

    def slices(self) -> dict[str, Tensor]:
        """The parameters by their names in the network; views or copies of the store that carry gradients to it."""
        supernet, structure = self._view
        return supernet._slices(structure)

    def forward(self, *inputs: Tensor) -> Tensor:
        structure, statistics = self._view[1], self._statistics or {}
        if self.compiler is not None:
            return self.compiler.run(structure, inputs, self.slices(), self.training, statistics)
        return structure.run(inputs, self.slices(), self.training, statistics)


class _Scored(nn.Module):
    """A subnet in evaluation mode. What a scorer has as inputs is left to it."""

    def __init__(self, supernet: Supernet, architecture: Architecture, structure: Structure, scorer: Scorer) -> None:
        super().__init__()
        self._of = (supernet, architecture, structure, scorer)

    def forward(self, *inputs: Tensor) -> Tensor:
        supernet, architecture, structure, scorer = self._of
        if all(a is b for a, b in zip(inputs, scorer.inputs, strict=True)):
            return scorer.output(structure)
        out: Tensor = Subnet(supernet, architecture, structure, supernet._measured(structure, SAMPLES)).eval()(*inputs)
        return out


def recalibrate(model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
    """Recompute the running statistics of ``model``'s BatchNorm layers, in place: the mean over ``batches``.

    Only these layers see the batch's statistics, everything else runs as in evaluation. ``model`` is left in evaluation
    mode. Not for a :class:`Subnet`, which has none: extract it first.

    Returns: ``model``.
    Raises: ValueError: there is no batch.
    """
    layers: list[_BatchNorm] = [module for module in model.modules() if tracks(module)]  # type: ignore[misc]
    model.eval()
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a mean over all batches, not a moving one
        layer.train()
    n = 0
    try:
        with torch.no_grad():
            for batch in batches:
                model(*batch.inputs)
                n += 1
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        model.eval()
    if n == 0:
        raise ValueError("no batch to compute statistics from")
    return model


def _alone(made: Made) -> Made:
    """An operation that only a supernet needs becomes what it is alone."""
    return Made(getattr(made.make, "alone", made.make), _each(made.kwargs, Made, _alone))


def _bits(tensor: Tensor) -> Tensor:
    """As whole numbers, so that a sum over them changes with any bit."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.uint8)


def _batch_seed(seed: int, i: int) -> int:
    return node_seed(seed, f"batch norm/{i}")
