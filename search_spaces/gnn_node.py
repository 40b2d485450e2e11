"""Graph neural networks for node classification: the operators of the literature, mixed freely."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch_geometric.nn import (
    APPNP,
    MLP,
    ARMAConv,
    ChebConv,
    GATConv,
    GATv2Conv,
    GCNConv,
    GENConv,
    GINConv,
    GraphConv,
    PNAConv,
    SAGEConv,
)

from nasgraph.errors import SpaceError
from nasgraph.ops import SparseDropout, add, concat, maximum
from nasgraph.search_spaces.inputs import graph_inputs
from nasgraph.space import Call, Choice, Label, Node, Op, SearchSpace

HEADS = (1, 2, 4, 8)
RATES = (0.0, 0.3, 0.5, 0.6, 0.8)

_PLAIN: dict[str, Label] = {"depth": "1", "norm": "none", "propagate": "none"}
LITERATURE: dict[str, dict[str, Label]] = {
    # Kipf & Welling, ICLR 2017
    "gcn": _PLAIN
    | {"conv1": "gcn", "head": "gcn", "width": 16, "activation": "relu", "input_dropout": 0.5, "dropout": 0.5},
    # Velickovic et al., ICLR 2018
    "gat": _PLAIN
    | {"conv1": "gat", "head": "gat", "width": 64, "heads": 8, "activation": "elu"}
    | {"input_dropout": 0.6, "dropout": 0.6, "attention_dropout": 0.6},
    # Gasteiger et al., ICLR 2019
    "appnp": _PLAIN
    | {"conv1": "fc", "head": "linear", "width": 64, "activation": "relu", "input_dropout": 0.5, "dropout": 0.5}
    | {"propagate": "appnp", "steps": 10, "teleport": 0.1},
}
"""Choices of networks from the literature that are members of :func:`gnn_node` with its default widths."""


class PNA(nn.Module):
    """Principal neighbourhood aggregation (Corso et al., NeurIPS 2020): 4 aggregators times 3 degree scalers.

    A linear layer to ``out_channels`` comes first: the convolution makes a message of twice its input for each edge,
    and 12 aggregates of each node, too much for thousands of raw features.

    Args:
        degrees: ``degrees[d]`` is the number of nodes with ``d`` incoming edges, of the training graph. Only the mean
            degree and the mean of log(degree + 1) count.

    Shapes: x ``(nodes, in_channels)``, edge_index ``(2, edges)`` -> ``(nodes, out_channels)``.
    """

    def __init__(self, in_channels: int, out_channels: int, degrees: Sequence[int]) -> None:
        super().__init__()
        self.project = nn.Linear(in_channels, out_channels)
        self.conv = PNAConv(
            out_channels,
            out_channels,
            aggregators=["mean", "min", "max", "std"],
            scalers=["identity", "amplification", "attenuation"],
            deg=torch.tensor(degrees),
        )

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.conv(self.project(x), edge_index)
        return out


def convolutions(width: Choice, heads: Choice, attention_dropout: Choice | float, degrees: Sequence[int]) -> list[Op]:
    """The layers from which a graph network chooses; all give ``width`` channels, attention heads share them."""
    return [
        Op(GATConv, label="gat", out_channels=width // heads, heads=heads, dropout=attention_dropout),
        Op(GATv2Conv, label="gatv2", out_channels=width // heads, heads=heads, dropout=attention_dropout),
        Op(GCNConv, label="gcn", out_channels=width),
        Op(GINConv, label="gin", nn=Op(MLP, hidden_channels=width, out_channels=width, num_layers=2, norm=None)),
        Op(ChebConv, label="cheb", out_channels=width, K=2),
        Op(SAGEConv, label="sage_mean", out_channels=width, aggr="mean"),
        Op(SAGEConv, label="sage_max", out_channels=width, aggr="max"),
        Op(ARMAConv, label="arma", out_channels=width, num_stacks=2, num_layers=2, shared_weights=True),
        Op(GraphConv, label="graph", out_channels=width),
        Op(GENConv, label="gen", out_channels=width),
        Op(PNA, label="pna", out_channels=width, degrees=degrees),
        Op(nn.Linear, label="fc", out_features=width),
    ]


def norms() -> dict[str, Op]:
    """Normalisations of nodes' channels."""
    return {"none": Op(nn.Identity), "batch": Op(nn.BatchNorm1d), "layer": Op(nn.LayerNorm)}


def activations() -> dict[str, Op]:
    """Activations."""
    return {
        "relu": Op(nn.ReLU),
        "elu": Op(nn.ELU),
        "leaky_relu": Op(nn.LeakyReLU),
        "prelu": Op(nn.PReLU),
        "tanh": Op(nn.Tanh),
    }


def degree_counts(degrees: Sequence[int] | None) -> list[int]:
    """``degrees`` as PNA takes them; None: all nodes have 4 edges. Raises: SpaceError: degrees of no node."""
    counts = [0, 0, 0, 0, 1] if degrees is None else [int(count) for count in degrees]
    if sum(counts) < 1 or min(counts) < 0:
        raise SpaceError("degrees must count at least one node: degrees[d] is the number of nodes with d edges")
    return counts


def check_widths(widths: Sequence[int]) -> None:
    """Raises: SpaceError: a width that attention heads cannot share."""
    for size in widths:
        if size < 1 or size % max(HEADS):
            raise SpaceError(f"width {size} is not a multiple of {max(HEADS)}, the number of attention heads")


def gnn_node(
    features: int,
    classes: int,
    layers: int = 3,
    widths: Sequence[int] = (16, 32, 64, 128),
    degrees: Sequence[int] | None = None,
) -> SearchSpace:
    """Up to ``layers`` layers of convolution, norm, activation, then a head that may be a convolution itself.

    All layers share width, norm, activation and dropout, so that layers can be skipped, added to and joined. The first
    layer reads the features as they are; the head reads layer ``depth``, or all layers up to it (``jump``).
    :data:`LITERATURE` has well-known members: GCN, GAT and APPNP.

    Args:
        features: channels of the node features.
        classes: number of classes.
        layers: the largest depth, at least 1.
        widths: channels of the layers, ascending multiples of 8 (attention heads share them).
        degrees: ``degrees[d]`` is the number of nodes with ``d`` incoming edges, for PNA; default: all nodes have 4.

    Shapes: x ``(nodes, features)``, edge_index ``(2, edges)`` -> logits ``(nodes, classes)``.
    Size: 3,113,334,000 architectures with the defaults.
    Raises: SpaceError: no layer, a width that is not a multiple of 8, or degrees of no node.
    """
    if layers < 1:
        raise SpaceError(f"gnn_node needs at least one layer, not {layers}")
    check_widths(widths)
    counts = degree_counts(degrees)
    space = SearchSpace("gnn_node")
    x, edges = graph_inputs(space, features)
    width = Choice("width", list(widths), ordered=True)
    heads = Choice("heads", list(HEADS), ordered=True)
    attention_dropout = Choice("attention_dropout", [0.0, 0.3, 0.6], ordered=True)
    layer = convolutions(width, heads, attention_dropout, counts)
    norm, activation = Choice("norm", norms()), Choice("activation", activations())
    rate = Choice("dropout", list(RATES), ordered=True)
    # An operation that takes one input leaves the second unread, and with it all that only leads there.
    residual = Choice("residual", {"none": Op(nn.Identity), "add": Call(add)})
    jump = Choice("jump", {"last": Op(nn.Identity), "cat": Call(concat), "max": Call(maximum)})

    h = space.add("input_dropout", Op(SparseDropout, p=Choice("input_dropout", list(RATES), ordered=True)), x)
    read: dict[str, Node] = {}  # by depth: what the head reads
    for i in range(1, layers + 1):
        before = h
        if i > 1:
            h = space.add(f"drop{i}", Op(nn.Dropout, p=rate), h)
        options = layer if i == 1 else [*layer, Op(nn.Identity, label="skip")]
        h = space.add(f"conv{i}", Choice(f"conv{i}", options), h, edges)
        h = space.add(f"norm{i}", norm, h)
        h = space.add(f"act{i}", activation, h)
        if i > 1:
            h = space.add(f"residual{i}", residual, h, before)
        read[str(i)] = h if i == 1 else space.add(f"jump{i}", jump, h, read[str(i - 1)])
    h = space.add("drop", Op(nn.Dropout, p=rate), Choice("depth", read))
    head = Choice(
        "head",
        [
            Op(nn.Linear, label="linear", out_features=classes),
            Op(GCNConv, label="gcn", out_channels=classes),
            Op(GATConv, label="gat", out_channels=classes, dropout=attention_dropout),
            Op(SAGEConv, label="sage", out_channels=classes),
        ],
    )
    h = space.add("head", head, h, edges)
    steps, teleport = Choice("steps", [2, 5, 10], ordered=True), Choice("teleport", [0.1, 0.2], ordered=True)
    propagate = Choice("propagate", {"none": Op(nn.Identity), "appnp": Op(APPNP, K=steps, alpha=teleport)})
    space.output(space.add("propagate", propagate, h, edges))
    return space
