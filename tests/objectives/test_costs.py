"""Costs against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nasgraph.objectives.cost import (
    count_activation_bytes,
    count_flops,
    count_parameters,
    count_traffic,
    count_weight_bytes,
)

N, F, O = 12, 5, 3  # noqa: E741 - nodes, features, outputs


@pytest.fixture
def graph() -> tuple[Tensor, Tensor]:
    """12 nodes, and edges without self-loops."""
    generator = torch.Generator().manual_seed(0)
    edge_index = torch.randint(0, N, (2, 40), generator=generator)
    return torch.randn(N, F, generator=generator), edge_index[:, edge_index[0] != edge_index[1]]


def test_parameters_in_closed_form():
    """The closed forms of NAS-Bench-Graph: gcn I D + D, sage 2 I D + D, gat I D + 3 D."""
    from torch_geometric.nn import GATConv, GCNConv, SAGEConv

    assert count_parameters(GCNConv(F, O)) == F * O + O
    assert count_parameters(SAGEConv(F, O)) == 2 * F * O + O
    assert count_parameters(GATConv(F, O)) == F * O + 3 * O


def test_frozen_parameters_count_and_shared_ones_count_once():
    layer = nn.Linear(4, 4)
    assert count_parameters(nn.Sequential(layer, nn.ReLU(), layer).requires_grad_(False)) == 20


def test_weight_bytes_are_parameters_and_buffers_at_their_width():
    model = nn.Sequential(nn.Linear(F, O), nn.BatchNorm1d(O))
    floats = F * O + O + 2 * O + 2 * O  # weights, scale and shift, running mean and variance
    assert count_weight_bytes(model) == 4 * floats + 8  # and one int64 counter
    assert count_weight_bytes(nn.Linear(F, O).half()) == 2 * (F * O + O)


def test_flops_of_linear_layers(graph):
    from torch_geometric.nn import GCNConv, SAGEConv

    assert count_flops(nn.Linear(F, O), graph[:1]) == 2 * N * F * O
    assert count_flops(GCNConv(F, O), graph) == 2 * N * F * O
    assert count_flops(SAGEConv(F, O), graph) == 2 * 2 * N * F * O


def test_traffic_of_convolutions_by_hand(graph):
    from torch_geometric.nn import GCNConv, GINConv, SAGEConv

    edges = graph[1].shape[1]
    # SAGE gathers the raw features along every edge and scatters them; its mean also scatters a 1 per edge.
    assert count_traffic(SAGEConv(F, O, aggr="max"), graph) == 4 * (2 * edges * F)
    assert count_traffic(SAGEConv(F, O), graph) == 4 * (2 * edges * F + edges)
    assert count_traffic(GINConv(nn.Linear(F, O)), graph) == 4 * (2 * edges * F)
    # GCN transforms first, so it moves O columns; with self-loops; degrees: one scatter and two gathers per edge.
    looped = edges + N
    assert count_traffic(GCNConv(F, O), graph) == 4 * (2 * looped * O + 3 * looped)
    assert count_traffic(GCNConv(F, O, normalize=False), graph) == 4 * (2 * edges * O)


def test_traffic_of_a_sparse_product_is_that_of_gather_and_scatter(graph):
    class Scatter(nn.Module):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]])

    class Product(nn.Module):
        def __init__(self, layout: torch.layout) -> None:
            super().__init__()
            self.layout = layout

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            ones = torch.ones(edge_index.shape[1])
            matrix = torch.sparse_coo_tensor(edge_index.flip(0), ones, (N, N), check_invariants=False)
            return (matrix.coalesce().to_sparse_csr() if self.layout == torch.sparse_csr else matrix) @ x

    x, edge_index = graph
    edge_index = edge_index.unique(dim=1)
    expected = 4 * 2 * edge_index.shape[1] * F
    assert count_traffic(Scatter(), (x, edge_index)) == expected
    for layout in (torch.sparse_coo, torch.sparse_csr):
        assert torch.allclose(Product(layout)(x, edge_index), Scatter()(x, edge_index), atol=1e-6)
        assert count_traffic(Product(layout), (x, edge_index)) == expected


def test_traffic_counts_no_masks_no_whole_numbers_and_no_dense_work(graph):
    class Other(nn.Module):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            kept = edge_index[:, edge_index[0] != 3]
            torch.zeros(N, dtype=torch.long).index_add(0, kept[1], kept[0])
            x[x > 0].sum()
            return x @ x.T

    assert count_traffic(Other(), graph) == 0
    assert count_traffic(nn.Embedding(N, 7), (graph[1][0],)) == 4 * 7 * graph[1].shape[1]


def test_activation_bytes_are_what_backward_needs(graph):
    x = graph[:1]
    # Linear keeps its input (the task's own here), ReLU its result, which is the second layer's input.
    two = nn.Sequential(nn.Linear(F, 16), nn.ReLU(), nn.Linear(16, O))
    assert count_activation_bytes(nn.Linear(F, O), x) == 0
    assert count_activation_bytes(two, x) == 4 * N * 16
    # Dropout keeps a mask besides, on a CPU one of 4-byte numbers; the layer after it keeps the result.
    dropped = nn.Sequential(nn.Linear(F, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, O))
    assert count_activation_bytes(dropped, x) == 3 * 4 * N * 16
    # A wider graph needs more.
    assert count_activation_bytes(two, (x[0].repeat(3, 1),)) == 3 * 4 * N * 16


def test_costs_leave_model_and_generator_as_they_were(graph):
    model = nn.Sequential(nn.Linear(F, O), nn.BatchNorm1d(O), nn.Dropout(0.5)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    for count in (count_flops, count_traffic, count_activation_bytes):
        count(model, graph[:1])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
