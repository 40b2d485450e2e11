"""A search space is a graph, and only what its output reaches is a question.

Nodes are operations, edges are tensors. An operation, any of its arguments, or the node that it reads from may be a
:class:`Choice`. Deciding an architecture walks backwards from the output: a choice is asked when, and only when,
something that the output depends on needs it. So depth is "which node the head reads from", a choice inside an option
that was not taken is never asked, and conditions need no language of their own.

One walk (:meth:`SearchSpace.decide`) serves sampling, Optuna's ``suggest_*``, decoding, mutation and enumeration.
"""

from __future__ import annotations

import copy
import hashlib
import json
import keyword
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nasgraph.declare import (
    Arithmetic,
    Call,
    Choice,
    ConcreteOp,
    Expr,
    Graph,
    Input,
    Label,
    Node,
    Op,
    Source,
    Step,
    Switch,
    accepts,
    as_op,
    choices_in,
    named,
    plain,
    reads,
    switches_in,
)
from nasgraph.errors import SpaceError, did_you_mean

if TYPE_CHECKING:
    import networkx
    import torch

    from nasgraph.model_space import ModelSpace
    from nasgraph.transforms import Transform

__all__ = [
    "Architecture",
    "Call",
    "Choice",
    "ConcreteOp",
    "Expr",
    "Graph",
    "Input",
    "Label",
    "Node",
    "Op",
    "SearchSpace",
    "Source",
    "Step",
    "Switch",
]

Pick = Callable[["Choice"], Label]

TRIES = 1000  # draws before a constraint is called impossible


class Architecture(Mapping[str, Label]):
    """A frozen mapping from each *active* choice to the label of its option. A change gives a new one."""

    __slots__ = ("_choices", "_hash")

    def __init__(self, choices: Mapping[str, Label]) -> None:
        self._choices = dict(choices)
        self._hash = hash(frozenset(self._choices.items()))

    def __getitem__(self, name: str) -> Label:
        return self._choices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Architecture], tuple[dict[str, Label]]]:
        return Architecture, (self._choices,)  # another process hashes text differently

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Architecture) and self._choices == other._choices

    def __repr__(self) -> str:
        return f"Architecture({', '.join(f'{name}={label}' for name, label in self._choices.items())})"

    def to_json(self) -> str:
        """One line of JSON, the choices sorted by name: equal architectures give equal text."""
        return json.dumps(self._choices, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """The architecture in ``text``. Raises: SpaceError: not a JSON object of plain values."""
        try:
            choices = json.loads(text)
        except json.JSONDecodeError as error:
            raise SpaceError(f"not an architecture: {error}") from None
        plain = isinstance(choices, dict) and all(isinstance(v, str | int | float | None) for v in choices.values())
        if not plain:
            raise SpaceError("not an architecture: a JSON object of choice -> label is needed")
        return cls(choices)


class SearchSpace:
    """A graph of operations with choices. Declare it, then sample, enumerate, mutate and build from it.

    Example::

        space = SearchSpace("tiny")
        x = space.input("x", torch.randn(4, 16), dynamic={0: "nodes"})
        width = Choice("width", [8, 16], ordered=True)
        first = space.add("first", Op(nn.Linear, out_features=width), x)
        second = space.add("second", Op(nn.Linear, out_features=width), first)
        space.output(space.add("head", Op(nn.Linear, out_features=3), Choice("depth", {"1": first, "2": second})))
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs: dict[str, Input] = {}
        self.choices: dict[str, Choice] = {}
        self.constraints: dict[str, Callable[[Architecture], bool]] = {}
        self._nodes: list[Node] = []
        self._ops: dict[str, Op | Choice | Switch] = {}
        self._sources: dict[str, tuple[Source, ...]] = {}
        self._output: Source | None = None

    @staticmethod
    def from_module(model: torch.nn.Module, rules: Sequence[Transform], **options: Any) -> ModelSpace:
        """A space over a model that already exists, which is never changed.

        Each rule is a transform with a pattern of module names; for every module that it fits there is one, and
        ``{name}`` in the name of a choice stands for that module: ``rank=Choice("rank.{name}", [0, 4, 8])`` is a
        choice for each, ``Choice("rank", [0, 4, 8])`` one for all.

        A rule that freezes (``Lora``) freezes the whole model, and all networks of the space share its numbers: only
        what was added is trained, and what ``train`` names.

        Args:
            rules: transforms; see ``docs/transforms.md``.
            inputs: example inputs: a tensor, a tuple, or a dict by the names of ``forward``'s first arguments. Needed
                for tasks, costs and exports, not for making models.
            dynamic: of inputs by their names, the axes whose length may change: ``{"x": {0: "batch"}}``.
            output: attribute, key or index of the output, for a model that returns more than one tensor: ``"logits"``.
            train: patterns of modules that stay trainable in a frozen model: ``["classifier"]``.
            make: ``Op(MyNet, width=8)``, which makes the same model anew: exported code contains it.
            name: of the space; default: the model's class.

        Raises: SpaceError: a pattern that fits no module (lists the nearest names), a module that a rule cannot
            rewrite, two rules of one kind for one module, inputs that the model cannot read.
        """
        from nasgraph.model_space import from_module

        return from_module(model, rules, **options)

    # ---- declare ------------------------------------------------------------------------------------------------

    def input(self, name: str, example: torch.Tensor, dynamic: Mapping[int, str] | None = None) -> Node:
        """Declare an input; networks take the inputs in the order of declaration."""
        node = self._new(name)
        self.inputs[name] = Input(name, example, dict(dynamic or {}))
        return node

    def add(self, name: str, op: Op | Choice | Switch, *sources: Source, transforms: Sequence[Transform] = ()) -> Node:
        """Declare an operation called ``name`` that reads ``sources``, each a node, or a choice or switch of nodes.

        ``transforms`` rewrite whatever the operation is: fewer bits, adapters, masks; see ``docs/transforms.md``.

        Raises: SpaceError: a name used before, a source of another space, a choice of the wrong kind of option.
        """
        if not sources:
            raise SpaceError(f"node '{name}' reads nothing: name at least one source")
        if not isinstance(transforms, list | tuple):
            raise SpaceError(f"node '{name}': transforms are a list such as [Quantize(weight_bits=4)]")
        if transforms:
            from nasgraph.tryout import check_kinds

            for each in transforms:
                if isinstance(each, type) or not hasattr(each, "check_declared"):
                    says = f"transforms are a list such as [Quantize(weight_bits=4)], and {each!r} is none"
                    raise SpaceError(f"node '{name}': {says}")
                each.check_declared(name)
            made = named([as_op(each) for each in transforms], name, {})
            rewritten = _with_transforms(op, type(transforms[0]).maker, made, name)
            check_kinds(name, op, transforms)
            op = rewritten
        for operation in self._options(op, Op, f"node '{name}': the operation"):
            self._register(operation.kwargs, f"node '{name}'")
        for source in sources:
            self._check_source(source, name)
        node = self._new(name)
        self._ops[name], self._sources[name] = op, tuple(sources)
        return node

    def output(self, node: Source) -> None:
        """Say which node, or choice or switch of nodes, is the network's output."""
        self._check_source(node, "output")
        self._output = node

    def constrain(self, name: str, holds: Callable[[Architecture], bool]) -> None:
        """Keep only architectures for which ``holds(architecture)`` is true; ``name`` is what messages call it."""
        if name in self.constraints:
            raise SpaceError(f"constraint '{name}' is declared twice")
        self.constraints[name] = holds

    def narrowed(self, labels: Mapping[str, Sequence[Label]]) -> SearchSpace:
        """The same space with fewer options: of each choice named in ``labels`` only those.

        Nodes, constraints and the order of the options stay, and a supernet calls each option as before. Choices that
        are no longer asked by any option are left out. This space is not changed.

        Raises: SpaceError: an unknown choice or label, or no label at all.
        """
        for name, some in labels.items():
            if name not in self.choices:
                raise SpaceError(f"space '{self.name}' has no choice '{name}'.{did_you_mean(name, self.choices)}")
            if not some:
                raise SpaceError(f"choice '{name}' would have no options: keep at least one")
            for label in some:
                self.choices[name].option(label)
        shared = (self.constraints, *(declared.example for declared in self.inputs.values()))
        space = copy.deepcopy(self, {id(thing): thing for thing in shared})
        space.constraints = dict(self.constraints)
        for name, some in labels.items():
            choice = space.choices[name]
            kept = tuple(label for label in choice.labels if label in some)
            choice.options = tuple(choice.option(label) for label in kept)
            choice.labels = kept
        declaration = (tuple(space._ops.values()), tuple(space._sources.values()), space._output)
        for switch in switches_in(declaration):
            switch.cases = {label: switch.cases[label] for label in switch.choice.labels}
        left = {choice.name for choice in choices_in(declaration)}
        space.choices = {name: choice for name, choice in space.choices.items() if name in left}
        return space

    def _new(self, name: str) -> Node:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise SpaceError(f"node name '{name}' is not an identifier: it becomes an attribute of the model")
        if name in self._ops or name in self.inputs:
            raise SpaceError(f"node '{name}' is declared twice")
        node = Node(name, len(self._nodes), self)
        self._nodes.append(node)
        return node

    def _check_source(self, source: Source, name: str) -> None:
        for node in self._options(source, Node, f"node '{name}': a source"):
            if node.space is not self:
                raise SpaceError(f"node '{name}' reads '{node.name}', which belongs to space '{node.space.name}'")

    def _options(self, thing: Any, kind: type, what: str) -> list[Any]:
        """All that ``thing`` (one of ``kind``, or nested choices of it) may become; registers the choices."""
        if isinstance(thing, kind):
            return [thing]
        if isinstance(thing, Choice):
            self._register(thing, what)
            return [found for option in thing.options for found in self._options(option, kind, what)]
        if isinstance(thing, Switch):
            self._register(thing, what)
            return [found for case in thing.cases.values() for found in self._options(case, kind, what)]
        raise SpaceError(f"{what} must be a {kind.__name__} or a Choice of them, not {thing!r}")

    def _register(self, thing: Any, what: str) -> None:
        for choice in choices_in(thing):
            if self.choices.setdefault(choice.name, choice) is not choice:
                raise SpaceError(f"{what}: choice '{choice.name}' is declared twice; use one Choice object for both")

    # ---- the walk -----------------------------------------------------------------------------------------------

    def _walk(self, pick: Pick) -> tuple[dict[str, Label], Graph]:
        """Backwards from the output, asking ``pick`` for each choice when it is first needed."""
        if self._output is None:
            raise SpaceError(f"space '{self.name}' has no output: call space.output(node)")
        decided: dict[str, Label] = {}

        def taken(choice: Choice) -> Label:
            if choice.name not in decided:
                decided[choice.name] = pick(choice)
            return decided[choice.name]

        def value(thing: Any) -> Any:
            if isinstance(thing, Choice):
                return value(thing.option(taken(thing)))
            if isinstance(thing, Switch):
                return value(thing.cases[taken(thing.choice)])
            if isinstance(thing, Arithmetic):
                return thing.function(value(thing.left), value(thing.right))
            if isinstance(thing, Op):
                return ConcreteOp(thing.make, value(thing.kwargs), thing.label, thing.is_call, thing.takes)
            if isinstance(thing, dict):
                return {key: value(item) for key, item in thing.items()}
            if isinstance(thing, list | tuple):
                return type(thing)(value(item) for item in thing)
            return thing

        output: Node = value(self._output)
        reached = {output.index}
        steps: list[Step] = []
        # Sources are declared before what reads them, so every reader of a node has been met when its turn comes.
        for node in reversed(self._nodes[: output.index + 1]):
            if node.index in reached and node.name in self._ops:
                op: ConcreteOp = value(self._ops[node.name])
                sources: tuple[Node, ...] = value(self._sources[node.name][: reads(op)])
                reached.update(source.index for source in sources)
                steps.append(Step(node.name, op, tuple(source.name for source in sources)))
        return decided, Graph(tuple(self.inputs), tuple(reversed(steps)), output.name)

    def decide(self, pick: Pick) -> Architecture:
        """The architecture that ``pick(choice) -> label`` decides. Constraints are not checked here."""
        return Architecture(self._walk(pick)[0])

    def architecture(self, choices: Mapping[str, Label]) -> Architecture:
        """The architecture that ``choices`` describes; labels of choices that it does not reach are dropped.

        Raises: SpaceError: an unknown choice or label, or one that is needed and missing.
        """
        for name in choices:
            if name not in self.choices:
                raise SpaceError(f"space '{self.name}' has no choice '{name}'.{did_you_mean(name, self.choices)}")

        def pick(choice: Choice) -> Label:
            if choice.name not in choices:
                raise SpaceError(f"the architecture does not decide '{choice.name}' of space '{self.name}'")
            return choices[choice.name]

        return self.decide(pick)

    def resolve(self, architecture: Mapping[str, Label]) -> Graph:
        """The network of an architecture: its operations with decided arguments, in topological order."""

        def pick(choice: Choice) -> Label:
            try:
                return architecture[choice.name]
            except KeyError:
                raise SpaceError(f"the architecture does not decide '{choice.name}' of space '{self.name}'") from None

        return self._walk(pick)[1]

    def key(self, architecture: Mapping[str, Label]) -> str:
        """Canonical key: equal for two architectures if and only if they are the same network."""
        from nasgraph.canonical import key

        return key(self.resolve(architecture))

    def violated(self, architecture: Architecture) -> list[str]:
        """Names of the constraints that ``architecture`` does not meet."""
        found = []
        for name, holds in self.constraints.items():
            try:
                if not holds(architecture):
                    found.append(name)
            except Exception as error:  # most often a choice that is not active: arch["x"] instead of arch.get("x")
                what = f"{type(error).__name__}: {error}"
                raise SpaceError(
                    f"constraint '{name}' of space '{self.name}' failed on {architecture}: {what}"
                ) from error
        return found

    # ---- explore ------------------------------------------------------------------------------------------------

    def sample(self, rng: random.Random) -> Architecture:
        """A random architecture: each choice, when asked, uniform over its options; constraints by rejection."""
        return self._accepted(lambda: self.decide(lambda choice: rng.choice(choice.labels)))

    def mutate(self, architecture: Mapping[str, Label], rng: random.Random, changes: int = 1) -> Architecture:
        """``changes`` active choices take another option; choices that become active are drawn at random."""
        mutable = [name for name in architecture if len(self.choices[name].labels) > 1]
        if not mutable:
            raise SpaceError(f"nothing to mutate: no active choice of space '{self.name}' has a second option")

        def draw() -> Architecture:
            changed = rng.sample(mutable, min(changes, len(mutable)))

            def pick(choice: Choice) -> Label:
                if choice.name in changed:
                    return rng.choice([label for label in choice.labels if label != architecture[choice.name]])
                return architecture[choice.name] if choice.name in architecture else rng.choice(choice.labels)

            return self.decide(pick)

        return self._accepted(draw)

    def crossover(self, first: Mapping[str, Label], second: Mapping[str, Label], rng: random.Random) -> Architecture:
        """Each choice from one of the parents that decide it, at random; from the space where neither does."""

        def pick(choice: Choice) -> Label:
            parents = [parent[choice.name] for parent in (first, second) if choice.name in parent]
            return rng.choice(parents or choice.labels)

        return self._accepted(lambda: self.decide(pick))

    def neighbours(self, architecture: Mapping[str, Label], rng: random.Random | None = None) -> Iterator[Architecture]:
        """All architectures that differ in one active choice.

        A choice that becomes active takes its first option, or a random one with ``rng``.
        """
        for name in architecture:
            for other in self.choices[name].labels:
                if other == architecture[name]:
                    continue
                changed = {**architecture, name: other}

                def pick(choice: Choice, changed: Mapping[str, Label] = changed) -> Label:
                    if choice.name in changed:
                        return changed[choice.name]
                    return rng.choice(choice.labels) if rng else choice.labels[0]

                found = self.decide(pick)
                if not self.violated(found):
                    yield found

    def enumerate(self) -> Iterator[Architecture]:
        """Every architecture that meets the constraints, each once, in the order of the options."""
        path: list[int] = []
        while True:
            trace: list[tuple[int, int]] = []  # (position taken, number of options) of each choice asked

            def pick(choice: Choice, trace: list[tuple[int, int]] = trace, path: list[int] = path) -> Label:
                position = path[len(trace)] if len(trace) < len(path) else 0
                trace.append((position, len(choice.labels)))
                return choice.labels[position]

            found = self.decide(pick)
            if not self.violated(found):
                yield found
            while trace and trace[-1][0] == trace[-1][1] - 1:
                trace.pop()
            if not trace:
                return
            path = [position for position, _ in trace]
            path[-1] += 1

    def size(self, limit: int = 1_000_000) -> int:
        """How many architectures there are before constraints, exactly, without enumerating them.

        Raises: SpaceError: too entangled: more than ``limit`` partial decisions would have to be kept apart.
        """
        from nasgraph.counting import size

        return size(self, limit)

    def _accepted(self, draw: Callable[[], Architecture]) -> Architecture:
        blame: Counter[str] = Counter()
        for _ in range(TRIES):
            found = draw()
            violated = self.violated(found)
            if not violated:
                return found
            blame.update(violated)
        worst = blame.most_common(1)[0][0]
        raise SpaceError(
            f"no architecture of space '{self.name}' met the constraint '{worst}' in {TRIES} draws: "
            "loosen it, or build it into the graph"
        )

    # ---- describe -----------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """The declaration as plain values: inputs, nodes, choices, constraints, output. Basis of the fingerprint."""
        return {
            "name": self.name,
            "inputs": {i.name: [list(i.example.shape), str(i.example.dtype), i.dynamic] for i in self.inputs.values()},
            "choices": {
                name: {"labels": list(choice.labels), "ordered": choice.ordered, "options": plain(choice.options)}
                for name, choice in sorted(self.choices.items())
            },
            "nodes": {name: [plain(op), plain(self._sources[name])] for name, op in self._ops.items()},
            "constraints": sorted(self.constraints),
            "output": plain(self._output),
        }

    def fingerprint(self) -> str:
        """SHA-256 of the declaration. A constraint counts by its name: its code is not looked at."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True, default=str).encode()).hexdigest()

    def graph(self) -> networkx.MultiDiGraph:
        """All nodes and possible edges, for drawing and checks.

        Node attributes: ``kind`` (input, op), ``op`` (label, or the labels of the options), ``output`` (bool).
        Edge attributes: ``position`` (which argument), ``choice`` (name of the choice that takes it, or None).
        """
        import networkx

        graph = networkx.MultiDiGraph(name=self.name)
        outputs = set() if self._output is None else {n.name for n in self._options(self._output, Node, "output")}
        for node in self._nodes:
            op = self._ops.get(node.name)
            text = "" if op is None else op.label if isinstance(op, Op) else " | ".join(str(i) for i, _ in op.declared)
            kind = "input" if op is None else "op"
            graph.add_node(node.name, kind=kind, op=text, output=node.name in outputs)
            for position, source in enumerate(self._sources.get(node.name, ())):
                decision = source.choice if isinstance(source, Switch) else source
                choice = decision.name if isinstance(decision, Choice) else None
                for read in dict.fromkeys(self._options(source, Node, f"node '{node.name}'")):
                    graph.add_edge(read.name, node.name, position=position, choice=choice)
        return graph

    def __repr__(self) -> str:
        return f"SearchSpace({self.name!r}, {len(self._ops)} nodes, {len(self.choices)} choices)"


def _with_transforms(op: Any, maker: Callable[..., Any], transforms: list[Op], node: str) -> Any:
    """``op``, or each operation that it may become, with ``transforms`` around it; by the same decisions as before."""
    if isinstance(op, Choice):
        return Switch(op, {label: _with_transforms(option, maker, transforms, node) for label, option in op.declared})
    if isinstance(op, Switch):
        cases = {label: _with_transforms(case, maker, transforms, node) for label, case in op.declared}
        return Switch(op.choice, cases)
    if not isinstance(op, Op) or op.is_call:
        raise SpaceError(f"node '{node}': transforms rewrite operations with parameters, not {op!r}")
    takes = op.takes if op.takes is not None else accepts(op.make)
    return Op(maker, label=op.label, takes=takes, op=op, transforms=transforms)
