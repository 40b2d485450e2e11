"""Which networks are the same: :func:`simplify` removes what cannot matter, :func:`key` names what is left.

Two networks are the same if every setting of their parameters gives the same function, up to the order in which a sum
is rounded. ``docs/canonical_key.md`` has the rules, and what they give on NAS-Bench-201.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from nasgraph.declare import make_name
from nasgraph.space import ConcreteOp, Graph, Step

KEY_VERSION = "k1"


# ---- what is known about an operation ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Traits:
    """What simplification may assume. A user's operation declares one by an attribute: ``MyScale.keeps_zero = True``.

    identity: returns its first source. zero: returns zeros of its first source's shape. keeps_zero: returns zeros if
    its first source (a Call: all of them) is zero, whatever its parameters become. keeps_shape: the result has the
    first source's shape (a Call: all sources have the result's shape). pure: no parameters, no randomness; the same
    sources give the same result. commutative: the order of the sources does not matter. associative: ``f(f(a, b), c)``
    is ``f(a, b, c)``, and ``f(a)`` is ``a``. drops_zero: a source that is zero may be left out.
    """

    identity: bool = False
    zero: bool = False
    keeps_zero: bool = False
    keeps_shape: bool = False
    pure: bool = False
    commutative: bool = False
    associative: bool = False
    drops_zero: bool = False


Rule = Callable[[Mapping[str, Any]], Traits]
NOTHING = Traits()


def _always(traits: Traits) -> Rule:
    return lambda kwargs: traits


def _without(argument: str, traits: Traits) -> Rule:
    """An operation that keeps zero only where ``argument`` (true by default) is false."""
    return lambda kwargs: replace(traits, keeps_zero=not kwargs.get(argument, True))


def _dropout(kwargs: Mapping[str, Any]) -> Traits:
    return Traits(identity=kwargs.get("p", 0.5) == 0, keeps_zero=True, keeps_shape=True)


def _alpha_dropout(kwargs: Mapping[str, Any]) -> Traits:
    return Traits(identity=kwargs.get("p", 0.5) == 0, keeps_shape=True)


def _layer_norm(kwargs: Mapping[str, Any]) -> Traits:
    shifts = kwargs.get("elementwise_affine", True) and kwargs.get("bias", True)
    return Traits(keeps_shape=True, keeps_zero=not shifts)


ACTIVATIONS = (
    *("ReLU", "ReLU6", "LeakyReLU", "ELU", "SELU", "CELU", "GELU", "SiLU", "Mish"),
    *("Tanh", "Hardswish", "Softsign", "Tanhshrink"),
)


def _pool(kwargs: Mapping[str, Any]) -> Traits:
    size, stride, padding = (kwargs.get(name) for name in ("kernel_size", "stride", "padding"))
    centred = isinstance(size, int) and isinstance(padding, int) and size == 1 + 2 * padding
    return Traits(keeps_zero=True, pure=True, keeps_shape=centred and stride == 1 and kwargs.get("dilation", 1) == 1)


def _table() -> dict[str, Rule]:
    activation = _always(Traits(keeps_zero=True, keeps_shape=True, pure=True))
    squash = _always(Traits(keeps_shape=True, pure=True))
    rules: dict[str, Rule] = {
        "nasgraph.ops.Zero": _always(Traits(zero=True, keeps_zero=True, keeps_shape=True, pure=True)),
        "nasgraph.ops.add": _always(
            Traits(keeps_zero=True, keeps_shape=True, pure=True, commutative=True, associative=True, drops_zero=True)
        ),
        "nasgraph.ops.maximum": _always(
            Traits(keeps_zero=True, keeps_shape=True, pure=True, commutative=True, associative=True)
        ),
        "nasgraph.ops.concat": _always(Traits(keeps_zero=True, pure=True, associative=True)),
        "nasgraph.ops.SparseDropout": _dropout,
        "torch.nn.Identity": _always(Traits(identity=True, keeps_zero=True, keeps_shape=True, pure=True)),
        "torch.nn.PReLU": _always(Traits(keeps_zero=True, keeps_shape=True)),
        "torch.nn.RMSNorm": _always(Traits(keeps_zero=True, keeps_shape=True)),
        "torch.nn.LayerNorm": _layer_norm,
        "torch.nn.GroupNorm": _without("affine", Traits(keeps_shape=True)),
    }
    for name in ACTIVATIONS:
        rules[f"torch.nn.{name}"] = activation
    for name in ("Sigmoid", "Hardsigmoid", "LogSigmoid", "Softplus", "Softmax", "LogSoftmax"):
        rules[f"torch.nn.{name}"] = squash
    for name in ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d"):
        rules[f"torch.nn.{name}"] = _dropout
    for name in ("AlphaDropout", "FeatureAlphaDropout"):
        rules[f"torch.nn.{name}"] = _alpha_dropout
    for axes in ("1d", "2d", "3d"):
        for name in ("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool"):
            rules[f"torch.nn.{name}{axes}"] = _pool
        rules[f"torch.nn.BatchNorm{axes}"] = _without("affine", Traits(keeps_shape=True))
        rules[f"torch.nn.Conv{axes}"] = rules[f"torch.nn.ConvTranspose{axes}"] = _without("bias", NOTHING)
    rules["torch.nn.Linear"] = _without("bias", NOTHING)
    for name in ("Linear", "GCNConv", "GraphConv", "SAGEConv", "GATConv", "GATv2Conv"):
        rules[f"torch_geometric.nn.{name}"] = _without("bias", NOTHING)
    for name in ("BatchNorm", "LayerNorm", "GraphNorm"):
        rules[f"torch_geometric.nn.{name}"] = _always(Traits(keeps_shape=True))
    for name in ("torch.add", "torch.mul", "torch.maximum", "torch.minimum", "_operator.add", "_operator.mul"):
        rules[name] = lambda kwargs: Traits(pure=not kwargs, commutative=not kwargs)
    return rules


TABLE = _table()


def traits(op: ConcreteOp) -> Traits:
    """What is known about ``op``: its own declaration (not one that it inherits), else the table's, else nothing."""
    declared = _declared(op.make)
    if declared is not None:
        return declared
    if op.kwargs.get("inplace"):
        return NOTHING
    rule = TABLE.get(make_name(op.make))
    return rule(op.kwargs) if rule else NOTHING


@functools.lru_cache(maxsize=4096)
def _declared(make: Callable[..., Any]) -> Traits | None:
    own = getattr(make, "__dict__", {})
    names = [field.name for field in fields(Traits) if own.get(field.name) is True]
    return Traits(**dict.fromkeys(names, True)) if names else None


# ---- simplification ---------------------------------------------------------------------------------------------


def simplify(graph: Graph) -> Graph:
    """``graph`` without what cannot change its output. Steps that stay keep their names.

    Removed are identities, zeros that are added to something, steps that compute a known zero, second copies of a
    parameter-free step, sums inside sums where nobody else reads them, and what the output does not depend on.
    A zero that something needs is one ``Zero`` step, reading the earliest tensor known to have its shape.
    """
    place = {step.name: i for i, step in enumerate(graph.steps)}
    graph = replace(graph, steps=tuple(replace(step, op=_normal(step.op)) for step in graph.steps))
    for _ in range(len(graph.steps) + 1):  # mostly once or twice
        before = {step.name: step.sources for step in graph.steps}
        graph, flattened = _flatten(_reachable(_propagate(graph)))
        zero = any(traits(step.op).zero for step in graph.steps)
        if not flattened and (not zero or before == {step.name: step.sources for step in graph.steps}):
            break
    return _ordered(graph, place)


def _normal(op: ConcreteOp) -> ConcreteOp:
    """``op`` without settings that change nothing: what makes it may offer ``simplified(op)``."""
    simplified: Callable[[ConcreteOp], ConcreteOp] | None = getattr(op.make, "simplified", None)
    return op if simplified is None else simplified(op)


def _propagate(graph: Graph) -> Graph:
    """One pass forwards: every step becomes itself with simpler sources, or another name for something before it."""
    known = {step.name: traits(step.op) for step in graph.steps}
    alike = _Alike(graph, known)
    zero_of: dict[str, str] = {}  # of each class of tensors of one shape, its zero
    stands_for: dict[str, str] = {name: name for name in graph.inputs}
    zeros: set[str] = set()
    done: dict[tuple[str, tuple[str, ...]], str] = {}
    steps: list[Step] = []
    for step in graph.steps:
        facts = known[step.name]
        sources = tuple(stands_for[name] for name in step.sources)
        if facts.drops_zero:
            sources = tuple(name for name in sources if name not in zeros) or sources[:1]
        twin = step.name
        if facts.zero:
            twin = zero_of.setdefault(alike.root(step.name), step.name)
            zeros.add(twin)
            sources = ()  # found below, once it is known what is left
        elif facts.identity or (facts.associative and len(sources) == 1):
            twin = sources[0]
        elif facts.keeps_zero and all(name in zeros for name in (sources if step.op.is_call else sources[:1])):
            twin = sources[0] if facts.keeps_shape else step.name
            zeros.add(twin)
        elif facts.pure:
            ordered = tuple(sorted(sources)) if facts.commutative else sources
            twin = done.setdefault((step.op.signature, ordered), step.name)
        stands_for[step.name] = twin
        alike.join(step.name, twin)
        if twin == step.name:
            steps.append(Step(step.name, step.op, sources))
    simple = Graph(graph.inputs, tuple(steps), stands_for[graph.output])
    return _with_shapes(simple, alike, set(zero_of.values())) if zero_of else simple


class _Alike:
    """Classes of tensors that are known to have one shape."""

    def __init__(self, graph: Graph, known: Mapping[str, Traits]) -> None:
        self.parent = {name: name for name in (*graph.inputs, *(step.name for step in graph.steps))}
        for step in graph.steps:
            if known[step.name].keeps_shape or known[step.name].identity:
                for name in step.sources if step.op.is_call else step.sources[:1]:
                    self.join(name, step.name)

    def join(self, name: str, other: str) -> None:
        self.parent[self.root(name)] = self.root(other)

    def root(self, name: str) -> str:
        while self.parent[name] != name:
            self.parent[name] = self.parent[self.parent[name]]
            name = self.parent[name]
        return name


def _with_shapes(graph: Graph, alike: _Alike, zeros: set[str]) -> Graph:
    """Each of ``zeros`` reads the tensor of its shape that is soonest computed; of several, by what they are made of.

    A zero is deeper than what it reads, so following depths upwards never leads to a circle.
    """
    names = [*graph.inputs, *(step.name for step in graph.steps)]
    classes: dict[str, list[str]] = {alike.root(zero): [] for zero in zeros}
    for name in names:
        if name not in zeros and alike.root(name) in classes:
            classes[alike.root(name)].append(name)
    members = {zero: classes[alike.root(zero)] for zero in zeros}
    never = (len(names) * 2, "")
    rank: dict[str, tuple[int, str]] = {name: (0, f"{i:04}") for i, name in enumerate(graph.inputs)}
    of_zero = dict.fromkeys(zeros, never)
    while True:
        for step in graph.steps:
            if step.name in zeros:
                rank[step.name] = of_zero[step.name]
                continue
            below = [rank[name] for name in step.sources]
            made_of = [made for _, made in (sorted(below) if traits(step.op).commutative else below)]
            rank[step.name] = (min(never[0], 1 + max(below)[0]), _digest([step.op.signature, *made_of]))
        found = {zero: min(rank[name] for name in members[zero]) for zero in zeros}
        after = {zero: (depth + 1, _digest(["zero", made])) for zero, (depth, made) in found.items()}
        if after == of_zero:
            break
        of_zero = after
    order = {name: 0 for name in names}
    best = {zero: [name for name in members[zero] if rank[name] == found[zero]] for zero in zeros}
    if any(len(some) > 1 for some in best.values()):  # they differ in what reads them, if at all
        order = {names[vertex]: i for i, vertex in enumerate(canonical_order(labelled_graph(graph, every_input=True)))}
    reads = {zero: min(some, key=lambda name: order[name]) for zero, some in best.items()}
    steps = [Step(s.name, s.op, (reads[s.name],)) if s.name in zeros else s for s in graph.steps]
    return _ordered(Graph(graph.inputs, tuple(steps), graph.output), {name: i for i, name in enumerate(names)})


def _reachable(graph: Graph) -> Graph:
    reached = {graph.output}
    steps: list[Step] = []
    for step in reversed(graph.steps):
        if step.name in reached:
            reached.update(step.sources)
            steps.append(step)
    return Graph(graph.inputs, tuple(reversed(steps)), graph.output)


def _ordered(graph: Graph, place: Mapping[str, int]) -> Graph:
    """The steps in their declared order, except that what a step reads comes before it."""
    steps = {step.name: step for step in sorted(graph.steps, key=lambda step: place[step.name])}
    ordered: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if step.name not in ordered:
            for name in step.sources:
                if name in steps:
                    visit(steps[name])
            ordered[step.name] = step

    for step in steps.values():
        visit(step)
    return Graph(graph.inputs, tuple(ordered.values()), graph.output)


def _flatten(graph: Graph) -> tuple[Graph, bool]:
    """Sums (and the like) of sums that have one reader become one sum. Also says whether there were any."""
    readers = Counter(name for step in graph.steps for name in step.sources)
    readers[graph.output] += 1
    inner: dict[str, Step] = {}
    steps: dict[str, Step] = {}
    for step in graph.steps:
        if traits(step.op).associative:
            sources: list[str] = []
            for name in step.sources:
                part = inner.get(name)
                if part is not None and readers[name] == 1 and part.op.signature == step.op.signature:
                    sources.extend(part.sources)
                    del steps[name]
                else:
                    sources.append(name)
            step = inner[step.name] = Step(step.name, step.op, tuple(sources))
        steps[step.name] = step
    return Graph(graph.inputs, tuple(steps.values()), graph.output), len(steps) < len(graph.steps)


# ---- canonical form ---------------------------------------------------------------------------------------------


def key(graph: Graph) -> str:
    """Name of the network: equal for two graphs if and only if they are isomorphic once simplified.

    Steps are labelled with their operations and arguments, inputs with their position; the order of what a step reads
    counts unless the operation is commutative. Names of steps do not count.

    Returns: ``k1-`` and 32 hexadecimal digits, the same in every process and on every machine.
    """
    labelled = labelled_graph(simplify(graph))
    order = canonical_order(labelled)
    text = json.dumps([[labelled.labels[i] for i in order], *_certificate(labelled, order)])
    return f"{KEY_VERSION}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


@dataclass(frozen=True)
class Labelled:
    """A directed acyclic graph: vertex ``i`` has a label and reads ``sources[i]``, all of them before ``i``."""

    labels: tuple[str, ...]
    sources: tuple[tuple[int, ...], ...]
    commutative: tuple[bool, ...]
    output: int


def labelled_graph(graph: Graph, every_input: bool = False) -> Labelled:
    """``graph`` with numbers for names, and without the inputs that it does not read unless ``every_input``."""
    used = {graph.output, *(name for step in graph.steps for name in step.sources)}
    inputs = [(i, name) for i, name in enumerate(graph.inputs) if every_input or name in used]
    number = {name: i for i, (_, name) in enumerate(inputs)}
    for step in graph.steps:
        number[step.name] = len(number)
    return Labelled(
        tuple(f"input {i}" for i, _ in inputs) + tuple(step.op.signature for step in graph.steps),
        ((),) * len(inputs) + tuple(tuple(number[name] for name in step.sources) for step in graph.steps),
        (False,) * len(inputs) + tuple(traits(step.op).commutative for step in graph.steps),
        number[graph.output],
    )


def canonical_order(graph: Labelled) -> list[int]:
    """The vertices in an order that isomorphic graphs share (up to an automorphism)."""
    return _Search(graph).run()


def _certificate(graph: Labelled, order: Sequence[int]) -> tuple[list[list[int]], int]:
    place = {vertex: i for i, vertex in enumerate(order)}
    sources = []
    for vertex in order:
        read = [place[source] for source in graph.sources[vertex]]
        sources.append(sorted(read) if graph.commutative[vertex] else read)
    return sources, place[graph.output]


class _Search:
    """Individualisation and refinement (McKay 1981; McKay & Piperno, J. Symb. Comput. 60, 2014).

    Refinement gives each vertex a colour from what it reads and who reads it. Where vertices still share a colour, one
    after the other gets a colour of its own, and refinement goes on; of all orders found, the smallest certificate
    wins. Branches that an automorphism already found maps to an explored one are skipped.
    """

    def __init__(self, graph: Labelled) -> None:
        self.graph = graph
        self.readers: list[list[tuple[int, int]]] = [[] for _ in graph.labels]  # (reader, position; -1: any)
        for vertex, sources in enumerate(graph.sources):
            for position, source in enumerate(sources):
                self.readers[source].append((vertex, -1 if graph.commutative[vertex] else position))
        self.leaves: list[tuple[list[int], list[int], Any]] = []  # the first and the best: path, order, certificate
        self.automorphisms: list[list[int]] = []

    def run(self) -> list[int]:
        self._explore(_ranks(self._start()), [])
        return self.leaves[-1][1]

    def _start(self) -> list[Any]:
        """Colours after one pass forwards and one backwards: what a vertex is made of, and what it is used for."""
        graph = self.graph
        below: list[str] = []
        for label, sources, free in zip(graph.labels, graph.sources, graph.commutative, strict=True):
            made_of = [below[source] for source in sources]
            below.append(_digest([label, *(sorted(made_of) if free else made_of)]))
        above = [""] * len(below)
        for vertex in reversed(range(len(below))):
            uses = sorted(f"{position} {above[reader]}" for reader, position in self.readers[vertex])
            above[vertex] = _digest([below[vertex], str(vertex == graph.output), *uses])
        return above

    def _refine(self, colours: list[int]) -> list[int]:
        count = max(colours) + 1
        while count < len(colours):
            detail = []
            for vertex, sources in enumerate(self.graph.sources):
                read = [colours[source] for source in sources]
                if self.graph.commutative[vertex]:
                    read.sort()
                uses = sorted((colours[reader], position) for reader, position in self.readers[vertex])
                detail.append((colours[vertex], tuple(read), tuple(uses)))
            colours = _ranks(detail)
            before, count = count, max(colours) + 1
            if count == before:
                break
        return colours

    def _explore(self, colours: list[int], path: list[int]) -> int:
        """Explore all orders below ``path``; returns the length of the path from where the search goes on."""
        colours = self._refine(colours)
        sizes = Counter(colours)
        if len(sizes) == len(colours):
            return self._leaf(sorted(range(len(colours)), key=colours.__getitem__), path)
        target = min(colour for colour, size in sizes.items() if size > 1)
        explored: list[int] = []
        for vertex in [v for v, colour in enumerate(colours) if colour == target]:
            if explored and self._same_orbit(vertex, explored, path):
                continue
            # The colour of its own comes just before that of the vertices it was taken from.
            own = [2 * colour + (v != vertex and colour == target) for v, colour in enumerate(colours)]
            level = self._explore(_ranks(own), [*path, vertex])
            if level < len(path):
                return level
            explored.append(vertex)
        return len(path)

    def _leaf(self, order: list[int], path: list[int]) -> int:
        certificate = _certificate(self.graph, order)
        for known_path, known_order, known in self.leaves:
            if certificate == known:
                image = [0] * len(order)
                for here, there in zip(order, known_order, strict=True):
                    image[here] = there
                self.automorphisms.append(image)
                return next(i for i, (a, b) in enumerate(zip(path, known_path, strict=False)) if a != b)
        leaf = (path, order, certificate)
        if not self.leaves:
            self.leaves.append(leaf)
        elif certificate < self.leaves[-1][2]:
            self.leaves[1:] = [leaf]
        return len(path)

    def _same_orbit(self, vertex: int, explored: list[int], path: list[int]) -> bool:
        """Is ``vertex`` the image of an explored one under known automorphisms that leave ``path`` in place?"""
        maps = [image for image in self.automorphisms if all(image[v] == v for v in path)]
        orbit, fresh = {vertex}, [vertex]
        while fresh:
            here = fresh.pop()
            for image in maps:
                if image[here] not in orbit:
                    orbit.add(image[here])
                    fresh.append(image[here])
        return not orbit.isdisjoint(explored)


def _ranks(colours: Sequence[Any]) -> list[int]:
    """Each colour's place among the different colours."""
    place: dict[Any, int] = {}
    for colour in sorted(colours):
        place.setdefault(colour, len(place))
    return [place[colour] for colour in colours]


def _digest(parts: list[str]) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()
