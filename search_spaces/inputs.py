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


def graphs_inputs(space: SearchSpace, features: int) -> tuple[Node, Node, Node, Node]:
    """Declare many graphs as one that is not connected.

    ``x`` ``(nodes, features)`` and ``edge_index`` ``(2, edges)`` of all graphs; ``graph`` ``(nodes,)``, the number of
    each node's graph, ascending; ``sizes`` ``(graphs,)``, the number of nodes of each graph. The length of ``sizes``
    says how many graphs there are, which no other input does; so an exported program may take any number of them.

    The example has a ring of 4 nodes and a path of 3.
    """
    generator = torch.Generator().manual_seed(0)
    half = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 0, 5, 6]])
    x = space.input("x", torch.randn(7, features, generator=generator), {0: "nodes"})
    edge_index = space.input("edge_index", torch.cat([half, half.flip(0)], dim=1), {1: "edges"})
    graph = space.input("graph", torch.tensor([0, 0, 0, 0, 1, 1, 1]), {0: "nodes"})
    sizes = space.input("sizes", torch.tensor([4, 3]), {0: "graphs"})
    return x, edge_index, graph, sizes
