"""Every shortcut to per-sample gradients against the plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasgraph.errors import NotFinite
from nasgraph.predictors.zero_cost import per_sample
from nasgraph.predictors.zero_cost.gradsign import gradsign, signs_of
from nasgraph.predictors.zero_cost.per_sample import logit_sums, losses, per_sample_gradients
from nasgraph.predictors.zero_cost.proxy import prepared
from nasgraph.tasks.batch import Batch
from nasgraph.testing import CONVOLUTIONS, node_model, plain_batch, plain_model


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shortcuts whose gradients were computed, in order."""
    taken: list[str] = []
    for name, place, attribute in [("alone", per_sample, "_alone"), ("vmap", per_sample._Rows, "_chunk")]:
        original = getattr(place, attribute)

        def spy(*args: Any, original: Any = original, name: str = name) -> Any:
            result = original(*args)
            if result is not None:
                taken.append(name)
            return result

        monkeypatch.setattr(place, attribute, spy)
    return taken


def sparse_batch(nodes: int = 200, extra: int = 30, directed: bool = False) -> Batch:
    """20 labelled nodes of a ring with some chords, in float64; the nodes' neighbourhoods are small."""
    generator = torch.Generator().manual_seed(0)
    ring = torch.stack([torch.arange(nodes), (torch.arange(nodes) + 1) % nodes])
    start = torch.randperm(nodes, generator=generator)[:extra]
    chords = torch.stack([start, (start + torch.randint(2, nodes // 2, (extra,), generator=generator)) % nodes])
    edges = torch.cat([ring, chords], 1)
    if not directed:
        edges = torch.cat([edges, edges.flip(0)], 1)
    x = torch.randn(nodes, 5, generator=generator, dtype=torch.float64)
    return Batch((x, edges), torch.arange(20) % 3, torch.arange(0, nodes, nodes // 20))


def naive(model: nn.Module, batch: Batch) -> Tensor:
    """One forward and one backward pass for each sample, with nothing shared."""
    rows = []
    for i in range(len(batch.target)):
        model.zero_grad()
        batch.losses(batch.outputs(model))[i].backward()
        rows.append(torch.cat([(p.grad if p.grad is not None else p * 0).flatten() for p in model.parameters()]))
    model.zero_grad()
    return torch.stack(rows).detach()


def both(model: nn.Module, batch: Batch, value: per_sample.Value = losses) -> tuple[Tensor, Tensor]:
    fast = torch.cat(list(per_sample_gradients(model, batch, value)))
    return fast, torch.cat(list(per_sample_gradients(model, batch, value, fast=False)))


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_fields_of_nodes_give_the_sign_sums_of_the_loop(conv: str, norm: str, routes: list[str]) -> None:
    batch = sparse_batch()
    model = prepared(node_model(conv, norm).double(), batch)
    fast, slow = both(model, batch)
    assert routes.count("alone") >= 15  # the shortcut was taken
    oracle = naive(model, batch)
    for rows in (fast, slow):
        assert torch.allclose(rows, oracle, rtol=1e-9, atol=1e-13)
        assert torch.equal(signs_of(rows).sum(0), signs_of(oracle).sum(0))
    assert gradsign(node_model(conv, norm).double(), batch) == float(signs_of(oracle).sum(0).abs().sum())


def test_rows_give_the_sign_sums_of_the_loop(routes: list[str]) -> None:
    batch = plain_batch(torch.float64)
    model = prepared(nn.Sequential(*plain_model()[:2], nn.BatchNorm1d(12), plain_model()[2]).double(), batch)
    fast, slow = both(model, batch)
    assert routes == ["vmap", "vmap"]  # 10 samples, 8 at a time
    assert torch.allclose(fast, slow, rtol=1e-12, atol=1e-15)
    assert torch.equal(signs_of(fast), signs_of(slow))


def test_images_and_frozen_parameters(routes: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
        ).double()
    model[1].requires_grad_(False)
    batch = Batch((torch.randn(9, 3, 6, 6, generator=generator, dtype=torch.float64),), torch.arange(9) % 5)
    model = prepared(model, batch)
    fast, slow = both(model, batch, logit_sums)
    assert fast.shape == (9, 4 * 3 * 9 + 4 + 4 * 5 + 5)
    assert routes == ["vmap", "vmap"]
    assert torch.allclose(fast, slow, rtol=1e-10, atol=1e-14)


def test_what_vmap_cannot_run_goes_one_row_at_a_time(routes: list[str]) -> None:
    class Branches(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.detach().sum()) < 1e9 else x

    batch = plain_batch(torch.float64)
    model = Branches(6, 3).double()
    fast, slow = both(model, batch)
    assert routes == ["alone"] * 10
    assert torch.allclose(fast, slow, rtol=1e-12)


class MixesNodes(nn.Module):
    """A graph network whose nodes all depend on each other through a mean over all nodes."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv, GraphNorm

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.norm, self.b = GCNConv(5, 8), GraphNorm(8), GCNConv(8, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x, edge_index)), edge_index)


def test_a_model_that_mixes_samples_falls_back_to_the_loop(routes: list[str]) -> None:
    batch = sparse_batch()
    fast, slow = both(MixesNodes().double(), batch)
    assert routes == ["alone"]  # tried once, its output differed, given up
    assert torch.equal(fast, slow)

    class Centred(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y - y.mean(0)

    fast, slow = both(Centred(6, 3).double(), plain_batch(torch.float64))
    assert torch.equal(fast, slow)


def test_weighted_edges_directed_edges_and_all_nodes(routes: list[str]) -> None:
    from torch_geometric.nn import GCNConv

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.a, self.b = GCNConv(5, 8), GCNConv(8, 3)

        def forward(self, x: Tensor, edge_index: Tensor, weight: Tensor) -> Tensor:
            return self.b(self.a(x, edge_index, weight).relu(), edge_index, weight)

    some = sparse_batch(directed=True)
    x, edges = some.inputs
    weight = torch.rand(edges.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = torch.arange(len(x)) % 3
    fast, slow = both(Weighted().double(), Batch((x, edges, weight), target))  # index None: all nodes
    assert len(routes) == len(x)
    assert torch.allclose(fast, slow, rtol=1e-9, atol=1e-13)


def test_a_graph_level_task_runs_the_loop(routes: list[str]) -> None:
    from torch_geometric.nn import GCNConv, global_mean_pool

    class OfGraphs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = GCNConv(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, edge_index: Tensor, graph: Tensor) -> Tensor:
            return self.b(global_mean_pool(self.a(x, edge_index).relu(), graph))

    whole = sparse_batch()
    batch = Batch((*whole.inputs, torch.arange(200) // 50), torch.arange(4) % 3)
    fast, slow = both(OfGraphs().double(), batch)
    assert routes == []
    assert torch.equal(fast, slow)


def test_hops_are_those_of_the_longest_path(routes: list[str]) -> None:
    from torch_geometric.nn import GCNConv

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
            return True

    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.a, self.b, self.c, self.d = (GCNConv(5, 3) for _ in range(4))

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return (self.a(x, edge_index) + self.b(x, edge_index)) * (self.c(x, edge_index) + self.d(x, edge_index))

    plain = Parallel().double()
    graph = torch.fx.GraphModule(plain, Leaves().trace(plain))
    batch = sparse_batch()
    for model, hops in ((plain, 4), (graph, 1)):
        with per_sample._Hops(model) as counted:
            model(*batch.inputs)
        assert counted.count() == hops
    fast, slow = both(graph, batch)
    assert routes == ["alone"] * 20
    assert torch.allclose(fast, slow, rtol=1e-9, atol=1e-13)


def test_nan_gradients_are_refused() -> None:
    model = plain_model()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(NotFinite):
        list(per_sample_gradients(model, plain_batch(), losses))
