"""NAS-Bench-Graph: 26,206 graph neural networks with their measured accuracy, latency and size.

Source: Qin, Zhang, Wang, Zhang & Zhu, NAS-Bench-Graph: Benchmarking Graph Neural Architecture Search, NeurIPS 2022
(Apache-2.0; also on PyPI as ``nas-bench-graph``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch_geometric.nn import ARMAConv, ChebConv, GATConv, GCNConv, GINConv, GraphConv, SAGEConv

from nasgraph.errors import DataError, SpaceError, did_you_mean
from nasgraph.ops import concat
from nasgraph.search_spaces.inputs import graph_inputs
from nasgraph.space import Architecture, Call, Choice, Label, Node, Op, SearchSpace, Source, Switch

LINKS = (
    (0, 0, 0, 0),
    (0, 0, 0, 1),
    (0, 0, 1, 1),
    (0, 0, 1, 2),
    (0, 0, 1, 3),
    (0, 1, 1, 1),
    (0, 1, 1, 2),
    (0, 1, 2, 2),
    (0, 1, 2, 3),
)
"""The wirings: ``link[i]`` is the node that node ``i + 1`` reads; 0 is the input."""

OPS = ("gat", "gcn", "gin", "cheb", "sage", "arma", "graph", "fc", "skip")


@dataclass(frozen=True)
class Preset:
    """What the benchmark fixed for one dataset: sizes of its graph, and hyper-parameters found once and kept.

    Attributes:
        features, classes: of the dataset.
        pre, post: is there a linear layer before the cell, and one after it?
        width: channels of each operation.
        dropout: on the input, and before each operation that does not read the input itself.
        optimizer, lr, weight_decay, epochs: how the networks were trained.
    """

    features: int
    classes: int
    pre: bool
    post: bool
    width: int
    dropout: float
    optimizer: str
    lr: float
    weight_decay: float
    epochs: int


PRESETS = {
    "cora": Preset(1433, 7, False, True, 256, 0.7, "sgd", 0.1, 5e-4, 400),
    "citeseer": Preset(3703, 6, False, True, 256, 0.7, "sgd", 0.2, 5e-4, 400),
    "pubmed": Preset(500, 3, False, False, 128, 0.3, "sgd", 0.2, 5e-4, 500),
    "computers": Preset(767, 10, True, True, 64, 0.1, "adam", 0.005, 5e-4, 500),
    # The parameter counts of 24,639 of 26,206 rows say that there was no linear layer after the cell; published is one.
    "physics": Preset(8415, 5, True, False, 256, 0.4, "sgd", 0.01, 0.0, 200),
}


def preset(dataset: str) -> Preset:
    """The benchmark's settings for ``dataset``. Raises: SpaceError: there are none."""
    try:
        return PRESETS[dataset]
    except KeyError:
        hint = did_you_mean(dataset, PRESETS)
        raise SpaceError(f"no preset for dataset '{dataset}'.{hint} Known: {', '.join(PRESETS)}") from None


def nas_bench_graph(
    dataset: str = "cora",
    features: int | None = None,
    classes: int | None = None,
    width: int | None = None,
    dropout: float | None = None,
    apart: bool = False,
) -> SearchSpace:
    """Cells of NAS-Bench-Graph (Qin et al., NeurIPS 2022): 9 wirings of 4 nodes, 9 operations each.

    A node applies batch norm, ReLU, dropout and its operation to what it reads; what is still the raw input (itself,
    or skipped from it) goes into the operation as it is, unless the dataset's preset has a linear layer before the
    cell. The outputs of the nodes that nobody reads are concatenated, then ReLU and a linear layer (two with ``post``)
    give the logits. A skip that only copies the input is never concatenated: the benchmark drops it too.

    Args:
        dataset: whose preset to use: cora, citeseer, pubmed, computers, physics.
        features, classes, width, dropout: in place of the preset's.
        apart: the same networks, declared with more nodes: what a node does to the raw input and to other nodes, and
            the layers after each set of leaves, have names, and so weights in a supernet, of their own. Otherwise the
            weights of 256 hidden channels are those of the first 256 words.

    Shapes: x ``(nodes, features)``, edge_index ``(2, edges)`` -> logits ``(nodes, classes)``.
    Size: 59,049 architectures, 9 of them (skips only) excluded by a constraint; the others stand for 26,206 rows.
    Raises: SpaceError: unknown dataset, or a width that 4 attention heads cannot share.
    """
    given: dict[str, Any] = {"features": features, "classes": classes, "width": width, "dropout": dropout}
    settings = replace(preset(dataset), **{name: value for name, value in given.items() if value is not None})
    if settings.width % 4:
        raise SpaceError(f"width {settings.width} is not a multiple of 4, the number of attention heads")
    space = SearchSpace("nas_bench_graph")
    x, edges = graph_inputs(space, settings.features)
    raw = space.add("drop", Op(nn.Dropout, p=settings.dropout), x)
    if settings.pre:
        raw = space.add("pre", Op(nn.Linear, out_features=settings.width), raw)
    link = Choice("link", {_link_label(wiring): position for position, wiring in enumerate(LINKS)})
    ops = [Choice(f"op{i}", _operations(settings.width)) for i in range(1, 5)]
    nodes: list[Source] = [raw]  # by number: 0 is the input

    def if_raw(node: int, wiring: Sequence[int], then: Source, otherwise: Source) -> Source:
        """``then`` where ``node`` passes the input on: it is the input, or skips from a node that passes it on."""
        if node == 0:
            return then
        return Switch(ops[node - 1], {"skip": if_raw(wiring[node - 1], wiring, then, otherwise)}, otherwise)

    def by_link(source: Any) -> Source:
        return Switch(link, {_link_label(wiring): source(wiring) for wiring in LINKS})

    for i in range(1, 5):
        before = by_link(lambda wiring, i=i: nodes[wiring[i - 1]])
        h = space.add(f"norm{i}", Op(nn.BatchNorm1d), before)
        h = space.add(f"act{i}", Op(nn.ReLU), h)
        h = active = space.add(f"drop{i}", Op(nn.Dropout, p=settings.dropout), h)
        source: Source = active
        if apart and not settings.pre:
            first, later = (
                space.add(f"{name}{i}", ops[i - 1], h, edges) for name, h in (("raw", raw), ("node", active))
            )
            nodes.append(by_link(lambda wiring, i=i, a=first, b=later: if_raw(wiring[i - 1], wiring, a, b)))
            continue
        if not settings.pre:
            source = by_link(lambda wiring, i=i, h=h: if_raw(wiring[i - 1], wiring, raw, h))
        nodes.append(space.add(f"node{i}", ops[i - 1], source, edges))

    gathered: dict[tuple[int, ...], Node] = {}

    def gather(wiring: Sequence[int], leaves: Sequence[int], kept: tuple[int, ...] = ()) -> Source:
        """The leaves side by side, without those that only pass the input on."""
        if leaves:
            first, *rest = leaves
            return if_raw(first, wiring, gather(wiring, rest, kept), gather(wiring, rest, (*kept, first)))
        if not kept:  # skips only: the constraint below excludes it
            return raw
        if kept not in gathered:
            name = "".join(map(str, kept))
            gathered[kept] = space.add("leaves" + name, Call(concat), *(nodes[i] for i in kept))
            if apart:
                gathered[kept] = after(gathered[kept], "_leaves" + name)
        return gathered[kept]

    def after(h: Source, name: str = "") -> Node:
        node = space.add("act" + name, Op(nn.ReLU), h)
        return space.add("post" + name, Op(nn.Linear, out_features=settings.width), node) if settings.post else node

    leaves = by_link(lambda wiring: gather(wiring, _leaves(wiring)))
    h = space.add("skips", Op(nn.Identity), leaves) if apart else after(leaves)
    space.output(space.add("head", Op(nn.Linear, out_features=settings.classes), h))
    space.constrain("not skips only", _has_operation)
    return space


def _operations(width: int) -> list[Op]:
    return [
        Op(GATConv, label="gat", out_channels=width // 4, heads=4),
        Op(GCNConv, label="gcn", out_channels=width),
        Op(GINConv, label="gin", nn=Op(nn.Linear, out_features=width)),
        Op(ChebConv, label="cheb", out_channels=width, K=2),
        Op(SAGEConv, label="sage", out_channels=width),
        Op(ARMAConv, label="arma", out_channels=width),
        Op(GraphConv, label="graph", out_channels=width),
        Op(nn.Linear, label="fc", out_features=width),
        Op(nn.Identity, label="skip"),
    ]


def _link_label(link: Sequence[int]) -> str:
    return "".join(map(str, link))


def _leaves(link: Sequence[int]) -> list[int]:
    return [i for i in range(1, 5) if i not in link]


def _has_operation(architecture: Mapping[str, Label]) -> bool:
    return any(architecture[f"op{i}"] != "skip" for i in range(1, 5))


# ---- rows of the table ------------------------------------------------------------------------------------------

Cell = tuple[tuple[int, ...], tuple[str, ...]]  # link and operations


def cell(architecture: Mapping[str, Label]) -> Cell:
    """Link and operations of an architecture of :func:`nas_bench_graph`."""
    link = tuple(int(digit) for digit in str(architecture["link"]))
    return link, tuple(str(architecture[f"op{i}"]) for i in range(1, 5))


def architecture(link: Sequence[int], ops: Sequence[str]) -> Architecture:
    """The architecture with these links and operations."""
    return Architecture({"link": _link_label(link), **{f"op{i}": op for i, op in enumerate(ops, 1)}})


def representative(link: Sequence[int], ops: Sequence[str]) -> Cell:
    """The one cell of the benchmark's table that stands for this one.

    A skip becomes the first node, read by all that read the input, if removing it changes no concatenation: somebody
    reads it, or nobody else reads what it reads, or it only passes the input on. Then nodes are numbered anew: of all
    numberings that give one of ``LINKS``, the one with the smallest list of operations, in the order of ``OPS``.

    Raises: DataError: skips only.
    """
    if all(op == "skip" for op in ops):
        raise DataError("NAS-Bench-Graph has no row for a cell of skips only")
    readers_of = dict(enumerate(link, 1))  # node -> what it reads
    skips = 0
    for node in sorted(readers_of):
        if ops[node - 1] != "skip":
            continue
        source = readers_of[node]
        read = node in readers_of.values()
        alone = all(other == node or its != source for other, its in readers_of.items())
        if read or alone or source == 0:
            del readers_of[node]
            readers_of = {other: source if its == node else its for other, its in readers_of.items()}
            skips += 1
    # What is left are trees of nodes that read the input; skips go before them all.
    found: list[tuple[int, list[int], Cell]] = []
    for order in _orders(readers_of):
        number = {0: skips, **{node: skips + place for place, node in enumerate(order, 1)}}
        renamed = (*range(skips), *(number[readers_of[node]] for node in order))
        if renamed in LINKS:
            names = ("skip",) * skips + tuple(ops[node - 1] for node in order)
            found.append((LINKS.index(renamed), [OPS.index(name) for name in names], (renamed, names)))
    return min(found)[2]


def _orders(reads: Mapping[int, int]) -> list[tuple[int, ...]]:
    """All orders of the nodes in which each comes after what it reads."""
    if not reads:
        return [()]
    first = [node for node, source in reads.items() if source not in reads]
    return [
        (node, *rest)
        for node in first
        for rest in _orders({other: source for other, source in reads.items() if other != node})
    ]


def cell_hash(link: Sequence[int], ops: Sequence[str]) -> int:
    """The benchmark's number of a cell: the place of its link in ``LINKS``, then the places of its operations."""
    number = LINKS.index(tuple(link))
    for op in ops:
        number = number * 10 + OPS.index(op)
    return number


def row(architecture: Mapping[str, Label]) -> int:
    """Hash of the table row that stands for an architecture. Raises: DataError: skips only."""
    return cell_hash(*representative(*cell(architecture)))
