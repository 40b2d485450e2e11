"""Everything at once on one graph neural network: operator, depth, width, bits, mask and low-rank correction."""

from __future__ import annotations

from collections.abc import Sequence

from nasgraph.search_spaces.gnn_low_precision import ACTIVATION_BITS, OPERATORS, WEIGHT_BITS, graph_network, quantize
from nasgraph.space import Choice, SearchSpace
from nasgraph.transforms import Lora, Prune, Transform


def gnn_joint(
    features: int,
    classes: int,
    layers: int = 2,
    widths: Sequence[int] = (16, 32, 64),
    operators: Sequence[str] = OPERATORS,
    weight_bits: Sequence[int] = WEIGHT_BITS,
    activation_bits: Sequence[int] = ACTIVATION_BITS,
    keeps: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    ranks: Sequence[int] = (0, 1, 2, 4),
) -> SearchSpace:
    """As :func:`gnn_low_precision`; each layer also chooses the share of weights it keeps and a rank.

    ``keep.conv1`` of its weights stay, the largest; they have ``weight_bits.conv1``; and ``rank.conv1`` is that of a
    float correction beside them (:class:`Lora`), so a layer is ``x Q(mask * W) + x A B``. The network is trained from
    scratch, where a correction is no adapter to a task: it is what is left for floats to say when the weight has few
    bits. ``LowRank`` would replace the weight by the two factors instead, and bits and masks would then be those of the
    factors.

    Args:
        keeps: ascending shares in (0, 1]. ranks: ascending, 0: no correction.
        features, classes, layers, widths, operators, weight_bits, activation_bits: as there; what a layer has
            aggregated has 8 bits or is float.

    Shapes: x ``(nodes, features)``, edge_index ``(2, edges)`` -> logits ``(nodes, classes)``.
    Size: 31,178,525,184,000 architectures with the defaults.
    Raises: SpaceError: as there, or a share or rank out of range.
    """

    def compressed(node: str) -> list[Transform]:
        return [
            Prune(keep=Choice(f"keep.{node}", list(keeps), ordered=True)),
            quantize(node, weight_bits, activation_bits, (8, 32)),
            Lora(rank=Choice(f"rank.{node}", list(ranks), ordered=True), alpha=1.0),
        ]

    return graph_network("gnn_joint", features, classes, layers, widths, operators, compressed)
