"""Graph neural networks of few bits: the operators and the format of each component are chosen together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from torch_geometric.nn import GATConv, GCNConv, SAGEConv

from nasgraph.errors import SpaceError
from nasgraph.ops import SparseDropout
from nasgraph.search_spaces.gnn_node import RATES, activations, check_widths, convolutions, degree_counts
from nasgraph.search_spaces.inputs import graph_inputs
from nasgraph.space import Choice, Node, Op, SearchSpace
from nasgraph.transforms import Quantize, Transform

ATTENTION_DROPOUT = 0.6  # as of GAT (Velickovic et al., ICLR 2018)
FLOAT = 32  # bits that mean: not quantised
WEIGHT_BITS = (1, 2, 3, 4, 8, FLOAT)  # 1: binary, 2: ternary
ACTIVATION_BITS = (4, 8, FLOAT)

# Of the operators of gnn_node: "fc" aggregates nothing, the weights of "arma" lie in no layer that can be rewritten,
# "pna" aggregates twelve times.
OPERATORS = ("gat", "gatv2", "gcn", "gin", "cheb", "sage_mean", "sage_max", "graph", "gen")

Transforms = Callable[[str], list[Transform]]  # of the node of this name


def gnn_low_precision(
    features: int,
    classes: int,
    layers: int = 2,
    widths: Sequence[int] = (16, 32, 64),
    operators: Sequence[str] = OPERATORS,
    weight_bits: Sequence[int] = WEIGHT_BITS,
    activation_bits: Sequence[int] = ACTIVATION_BITS,
    aggregation_bits: Sequence[int] = ACTIVATION_BITS,
) -> SearchSpace:
    """Up to ``layers`` graph convolutions, then one that classifies; each has three formats of its own.

    After Zhao et al., "Learned Low Precision Graph Neural Networks" (LPGNAS, 2020), which chooses operators and formats
    jointly: ``weight_bits.conv1``, ``activation_bits.conv1`` (of what its linear layers read) and
    ``aggregation_bits.conv1`` (of the sum over neighbours), likewise for every layer. A layer that ``depth`` leaves out
    asks for no format. Weights of all widths are learned with one step for each width (LSQ); biases and attention
    vectors stay floats. 32 is float: with 32 everywhere the network is the plain one, bit for bit.

    Args:
        features: channels of the node features.
        classes: number of classes.
        layers: most convolutions before the one that classifies, at least 1.
        widths: channels between the layers, ascending multiples of 8 (attention heads share them).
        operators: some of :data:`OPERATORS`, for the layers before the last.
        weight_bits: ascending, of 1 to 8, 16 and 32.
        activation_bits: ascending, of 4 to 16 and 32. aggregation_bits: likewise.

    Shapes: x ``(nodes, features)``, edge_index ``(2, edges)`` -> logits ``(nodes, classes)``.
    Size: 25,728,961,500 architectures with the defaults.
    Raises: SpaceError: no layer, an unknown operator, a width that is not a multiple of 8, or bits out of range.
    """

    def formats(node: str) -> list[Transform]:
        return [quantize(node, weight_bits, activation_bits, aggregation_bits)]

    return graph_network("gnn_low_precision", features, classes, layers, widths, operators, formats)


def quantize(
    node: str, weight_bits: Sequence[int], activation_bits: Sequence[int], aggregation_bits: Sequence[int]
) -> Quantize:
    """The formats of ``node``, each a choice of its own."""
    return Quantize(
        weight_bits=Choice(f"weight_bits.{node}", list(weight_bits), ordered=True),
        activation_bits=Choice(f"activation_bits.{node}", list(activation_bits), ordered=True),
        aggregation_bits=Choice(f"aggregation_bits.{node}", list(aggregation_bits), ordered=True),
    )


def graph_network(
    name: str,
    features: int,
    classes: int,
    layers: int,
    widths: Sequence[int],
    operators: Sequence[str],
    transforms: Transforms,
) -> SearchSpace:
    """The space called ``name``: operator, depth, width, activation, dropouts, and ``transforms(node)`` on each layer.

    Raises: SpaceError: see :func:`gnn_low_precision`.
    """
    if layers < 1:
        raise SpaceError(f"{name} needs at least one layer, not {layers}")
    unknown = [each for each in operators if each not in OPERATORS]
    if unknown or not operators:
        raise SpaceError(f"{name}: operators are some of {', '.join(OPERATORS)}; not {unknown or 'none'}")
    check_widths(widths)
    space = SearchSpace(name)
    x, edges = graph_inputs(space, features)
    width = Choice("width", list(widths), ordered=True)
    heads = Choice("heads", [1, 4, 8], ordered=True)
    rate, activation = Choice("dropout", list(RATES), ordered=True), Choice("activation", activations())
    every = convolutions(width, heads, ATTENTION_DROPOUT, degree_counts(None))
    mine = [op for op in every if op.label in operators]

    h = space.add("input_dropout", Op(SparseDropout, p=Choice("input_dropout", list(RATES), ordered=True)), x)
    ends: dict[str, Node] = {}
    for i in range(1, layers + 1):
        if i > 1:
            h = space.add(f"drop{i}", Op(nn.Dropout, p=rate), h)
        h = space.add(f"conv{i}", Choice(f"conv{i}", mine), h, edges, transforms=transforms(f"conv{i}"))
        h = ends[str(i)] = space.add(f"act{i}", activation, h)
    h = space.add("drop", Op(nn.Dropout, p=rate), Choice("depth", ends))
    head = Choice(
        "head",
        [
            Op(GCNConv, label="gcn", out_channels=classes),
            Op(GATConv, label="gat", out_channels=classes, dropout=ATTENTION_DROPOUT),
            Op(SAGEConv, label="sage", out_channels=classes),
        ],
    )
    space.output(space.add("head", head, h, edges, transforms=transforms("head")))
    return space
