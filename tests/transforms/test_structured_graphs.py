"""Channels of graph networks: the smaller model equals the full one whose readers see zeros for what was removed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import BatchNorm, GATConv, GCNConv, GINConv, GraphConv, SAGEConv

from nasgraph.build import build
from nasgraph.errors import SpaceError
from nasgraph.space import Choice, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.transforms import Prune, Quantize
from nasgraph.transforms.layers import plain_linears
from nasgraph.transforms.structured import groups

EDGES = torch.tensor([[0, 1, 2, 3, 4, 1], [1, 2, 3, 4, 0, 3]])
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
STACKS: dict[str, Any] = {
    "gcn": lambda i, o: GCNConv(i, o),
    "gcn without bias": lambda i, o: GCNConv(i, o, bias=False),
    "sage": lambda i, o: SAGEConv(i, o),
    "sage of neighbours": lambda i, o: SAGEConv(i, o, aggr="max", root_weight=False),
    "graph": lambda i, o: GraphConv(i, o),
}


class Net(nn.Module):
    def __init__(self, make: Any, residual: bool = False) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = make(6, 10), BatchNorm(10), make(10, 10)
        self.head, self.residual = nn.Linear(10, 3), residual

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = F.dropout(F.relu(self.norm(self.conv1(x, edge_index))), p=0.5, training=self.training)
        out = F.relu(self.conv2(h, edge_index))
        result: Tensor = self.head(out + h if self.residual else out)
        return result


def a_net(make: Any, **options: Any) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net(make, **options)
        for name, tensor in net.state_dict().items():  # biases and statistics that are not zeros and ones
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape) if "var" in name else 0.1 * torch.randn(tensor.shape))
    return net.eval()


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("residual", [False, True])
def test_the_smaller_model_is_the_masked_one(stack: str, residual: bool) -> None:
    full = plain_linears(a_net(STACKS[stack], residual=residual))
    found = groups(full, (X, EDGES))
    first = next(name for name, _ in full.conv1.named_children() if name.startswith("lin"))
    assert all(group.exact for group in found.values())
    assert (found[f"conv1.{first}"] == found[f"conv2.{first}"]) == residual  # a sum ties them
    for conv in ("conv1", "conv2"):
        kept = [0, 3, 4, 9]
        gone = [i for i in range(10) if i not in kept]
        group = found[f"{conv}.{first}"]
        masked = plain_linears(a_net(STACKS[stack], residual=residual))
        small = plain_linears(a_net(STACKS[stack], residual=residual))
        for cut in group.cuts:
            if cut.end == "in" and cut.module not in ("conv1", "conv2"):
                masked.get_submodule(cut.module).weight.data[:, gone] = 0
        group.keep(small, kept)
        expected = masked(X, EDGES)
        assert not torch.equal(expected, full(X, EDGES))
        torch.testing.assert_close(small(X, EDGES), expected)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in full.parameters())
    assert str(small.conv2).partition("Conv")[2].startswith(f"({4 if residual else 10}, 4")


@pytest.mark.parametrize("stack", ["gcn", "sage"])
def test_channels_of_a_graph_network_are_a_choice(stack: str) -> None:
    net, before = a_net(STACKS[stack]), a_net(STACKS[stack]).state_dict()
    rules = [
        Prune("conv1.*", structure="channels", keep=Choice("keep", [0.3, 0.5, 1.0])),
        Quantize("conv2.*", weight_bits=Choice("bits", [4, 32])),
    ]
    space = SearchSpace.from_module(net, rules, inputs={"x": X, "edge_index": EDGES})
    assert torch.equal(space.model(space.baseline())(X, EDGES), net(X, EDGES))
    small: Any = space.model({"keep": 0.3, "bits": 32})
    assert small.norm.module.num_features == 3 and small.conv1.out_channels == 3
    assert len({space.key(a) for a in space.enumerate()}) == 6
    supernet, rng = Supernet(space), random.Random(0)
    for _ in range(4):
        chosen = space.sample(rng)
        alone = supernet.extract(chosen).eval()
        assert torch.equal(supernet.subnet(chosen).eval()(X, EDGES), alone(X, EDGES))
        assert torch.equal(alone(X, EDGES), build(space, chosen).eval()(X, EDGES))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize(
    ("make", "where", "says"),
    [
        (
            lambda i, o: GATConv(i, o),
            "conv1.lin",
            r"fixed: 'conv1' is a GATConv; channels are followed through GCNConv",
        ),
        (lambda i, o: GINConv(nn.Linear(i, o)), "conv1.nn", r"'conv1' is a GINConv.*use a mask there"),
        (lambda i, o: SAGEConv(i, o, normalize=True), "conv1.lin_l", "'conv1' normalises over its channels"),
        (lambda i, o: SAGEConv(i, o, project=True), "conv1.lin_l", "'conv1' projects or aggregates by mean"),
    ],
)
def test_what_is_not_followed_is_refused_by_name(make: Any, where: str, says: str) -> None:
    with pytest.raises(SpaceError, match=says) as caught:
        SearchSpace.from_module(a_net(make), [Prune(where, structure="channels", keep=0.5)])
    assert "\n" not in str(caught.value)


def test_sources_and_targets_of_two_kinds_are_not_followed() -> None:
    class Two(Net):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.head(self.conv2((self.conv1(x, edge_index), x), edge_index))

    net = Two(lambda i, o: SAGEConv(i, o))
    with pytest.raises(SpaceError, match="'conv2' reads more than one tensor of nodes"):
        SearchSpace.from_module(net, [Prune("conv1.*", structure="channels", keep=0.5)])


def test_tied_layers_of_one_convolution_share_their_choice() -> None:
    rule = Prune("conv1.*", structure="channels", keep=Choice("keep.{name}", [0.5, 1.0]))
    with pytest.raises(SpaceError, match="'conv1.lin_l' and 'conv1.lin_r' are tied"):
        SearchSpace.from_module(a_net(STACKS["sage"]), [rule])
    with pytest.raises(SpaceError, match="'head' are fixed: the model returns it"):
        SearchSpace.from_module(a_net(STACKS["gcn"]), [Prune("head", structure="channels", keep=0.5)])


def test_a_model_that_cannot_be_traced_says_what_to_do() -> None:
    class Branching(Net):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            if x.sum() > 1e9:
                x = x * 0
            return super().forward(x, edge_index)

    with pytest.raises(
        SpaceError, match="in a GCNConv are fixed, as torch.fx cannot trace the forward of Branching.*: use a mask"
    ) as caught:
        SearchSpace.from_module(Branching(STACKS["gcn"]), [Prune("conv1.lin", structure="channels", keep=0.5)])
    assert "\n" not in str(caught.value)
