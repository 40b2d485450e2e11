"""Inputs that spaces share."""

from __future__ import annotations

import torch

from nasgraph.space import Node, SearchSpace


def graph_inputs(space: SearchSpace, features: int) -> tuple[Node, Node]:
    """Declare one graph: ``x`` ``(nodes, features)`` and ``edge_index`` ``(2, edges)``, both of any size.

    The example is a ring of 4 nodes with edges both ways.
    """
    generator = torch.Generator().manual_seed(0)
    ring = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    x = space.input("x", torch.randn(4, features, generator=generator), {0: "nodes"})
    edge_index = space.input("edge_index", torch.cat([ring, ring.flip(0)], dim=1), {1: "edges"})
    return x, edge_index
