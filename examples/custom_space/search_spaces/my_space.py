"""A space of one's own: hops of neighbour averages, joined by one of two operations, then a small network."""

import torch
from torch import Tensor, nn
from torch_geometric.nn import SGConv

from nasgraph.ops import add, concat
from nasgraph.space import Call, Choice, Op, SearchSpace


class Gate(nn.Module):
    """Scale each channel of each node by a number between 0 and 1 that the node itself decides."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.gate = nn.Linear(in_channels, in_channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gate(x))


def my_space(features: int, classes: int) -> SearchSpace:
    """Near and far neighbours, side by side. Size: 216 architectures."""
    space = SearchSpace("my_space")
    x = space.input("x", torch.ones(4, features), dynamic={0: "nodes"})
    edges = space.input("edge_index", torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]]), dynamic={1: "edges"})
    width = Choice("width", [16, 32, 64], ordered=True)
    near = space.add("near", Op(SGConv, out_channels=width, K=1), x, edges)
    far = space.add("far", Op(SGConv, out_channels=width, K=Choice("hops", [2, 3, 4], ordered=True)), x, edges)
    h = space.add("join", Choice("join", [Call(add), Call(concat)]), near, far)
    h = space.add("act", Choice("act", {"relu": Op(nn.ReLU), "tanh": Op(nn.Tanh), "gate": Op(Gate)}), h)
    h = space.add("drop", Op(nn.Dropout, p=Choice("dropout", [0.2, 0.5])), h)
    deep = space.add("deep", Op(nn.Linear, out_features=width), h)
    space.output(space.add("head", Op(nn.Linear, out_features=classes), Choice("read", {"joined": h, "deep": deep})))
    return space
