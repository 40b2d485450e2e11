"""Graph neural networks for graph classification: layers of :mod:`gnn_node`, a readout, a head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nasgraph.errors import SpaceError
from nasgraph.ops import add, concat, maximum
from nasgraph.search_spaces.gnn_node import HEADS, activations, check_widths, convolutions, degree_counts, norms
from nasgraph.search_spaces.inputs import graphs_inputs
from nasgraph.space import Call, Choice, Node, Op, SearchSpace

READOUTS = ("sum", "mean", "max")


class Readout(nn.Module):
    """Sum, mean or maximum over the nodes of each graph (``how``); a graph without nodes gives zeros.

    Shapes: x ``(nodes, channels)``, graph ``(nodes,)`` int64, sizes ``(graphs,)`` -> ``(graphs, channels)``.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        if how not in READOUTS:
            raise SpaceError(f"no readout '{how}': there are {', '.join(READOUTS)}")
        self.how = how

    def forward(self, x: Tensor, graph: Tensor, sizes: Tensor) -> Tensor:
        zeros = x.new_zeros(sizes.shape[0], x.shape[1])
        places = graph[:, None].expand(-1, x.shape[1])
        if self.how == "max":
            return zeros.scatter_reduce(0, places, x, "amax", include_self=False)
        total = zeros.scatter_add(0, places, x)
        return total / sizes[:, None] if self.how == "mean" else total


def gnn_graph(
    features: int,
    classes: int,
    layers: int = 3,
    widths: Sequence[int] = (16, 32, 64),
    degrees: Sequence[int] | None = None,
) -> SearchSpace:
    """Graph classifiers: up to ``layers`` layers of convolution, norm and activation, a readout, a head of two layers.

    All layers share width, norm, activation and dropout. The readout reads layer ``depth``, or all layers up to it
    (``jump``; with ``cat`` as in Xu et al., ICLR 2019). The first layer of the head has ``width`` channels.

    Args:
        features: channels of the node features.
        classes: number of classes.
        layers: the largest depth, at least 1.
        widths: channels of the layers, ascending multiples of 8 (attention heads share them).
        degrees: ``degrees[d]`` is the number of nodes with ``d`` incoming edges, for PNA; default: all nodes have 4.

    Shapes: x ``(nodes, features)``, edge_index ``(2, edges)``, graph ``(nodes,)``, sizes ``(graphs,)`` -> logits
    ``(graphs, classes)``; see :func:`nasgraph.search_spaces.inputs.graphs_inputs`.
    Size: 17,691,210 architectures with the defaults.
    Raises: SpaceError: no layer, a width that is not a multiple of 8, or degrees of no node.
    """
    if layers < 1:
        raise SpaceError(f"gnn_graph needs at least one layer, not {layers}")
    check_widths(widths)
    space = SearchSpace("gnn_graph")
    x, edges, graph, sizes = graphs_inputs(space, features)
    width = Choice("width", list(widths), ordered=True)
    heads = Choice("heads", list(HEADS), ordered=True)
    attention_dropout = Choice("attention_dropout", [0.0, 0.3], ordered=True)
    layer = convolutions(width, heads, attention_dropout, degree_counts(degrees))
    norm, activation = Choice("norm", norms()), Choice("activation", activations())
    rate = Choice("dropout", [0.0, 0.2, 0.5], ordered=True)
    residual = Choice("residual", {"none": Op(nn.Identity), "add": Call(add)})
    jump = Choice("jump", {"last": Op(nn.Identity), "cat": Call(concat), "max": Call(maximum)})

    h = x
    read: dict[str, Node] = {}  # by depth: what the readout reads
    for i in range(1, layers + 1):
        before = h
        if i > 1:
            h = space.add(f"drop{i}", Op(nn.Dropout, p=rate), h)
        h = space.add(f"conv{i}", Choice(f"conv{i}", layer), h, edges)
        h = space.add(f"norm{i}", norm, h)
        h = space.add(f"act{i}", activation, h)
        if i > 1:
            h = space.add(f"residual{i}", residual, h, before)
        read[str(i)] = h if i == 1 else space.add(f"jump{i}", jump, h, read[str(i - 1)])
    readout = Choice("readout", [Op(Readout, label=how, how=how) for how in READOUTS])
    h = space.add("readout", readout, Choice("depth", read), graph, sizes)
    h = space.add("hidden", Op(nn.Linear, out_features=width), h)
    h = space.add("drop", Op(nn.Dropout, p=rate), space.add("hidden_act", activation, h))
    space.output(space.add("head", Op(nn.Linear, out_features=classes), h))
    return space
