"""Graph classification tasks: unions of graphs against PyG's, splits, baselines, what is refused."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_geometric.data import Batch as PygBatch
from torch_geometric.data import Data

from nasgraph import registry
from nasgraph.build import build
from nasgraph.catalogue import make_space
from nasgraph.errors import ConfigError, DataError
from nasgraph.tasks import Graphs, GraphTask, Task, tudataset
from nasgraph.tasks.graphs import checked
from nasgraph.training import TrainSettings


def rings_and_paths(n: int = 60) -> list[Data]:
    """Class 0 is a path, class 1 a ring; 3 to 8 nodes, of which some features are random."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    graphs = []
    for i in range(n):
        size = rng.randint(3, 8)
        links = torch.stack([torch.arange(size), (torch.arange(size) + 1) % size])
        links = links if i % 2 else links[:, :-1]
        edges = torch.cat([links, links.flip(0)], dim=1)
        graphs.append(Data(torch.randn(size, 2, generator=generator), edges, y=torch.tensor([i % 2])))
    return graphs


def without_features(n: int = 60) -> list[Data]:
    return [Data(edge_index=graph.edge_index, y=graph.y, num_nodes=graph.num_nodes) for graph in rings_and_paths(n)]


def task(**arguments: Any) -> GraphTask:
    return GraphTask("shapes", made, **{"batch_size": 16, **arguments})


def made() -> Graphs:
    return checked(without_features(), "shapes")


@pytest.mark.parametrize("seed", range(5))
def test_a_union_is_that_of_pyg(seed: int) -> None:
    graphs = rings_and_paths()
    data = checked(graphs, "shapes")
    index = torch.randperm(60, generator=torch.Generator().manual_seed(seed))[: 1 + 7 * seed]
    x, edge_index, graph, sizes = data.union(index)
    expected = PygBatch.from_data_list([graphs[i] for i in index])
    assert torch.equal(x, expected.x)
    assert torch.equal(edge_index, expected.edge_index)
    assert torch.equal(graph, expected.batch)
    assert torch.equal(sizes, expected.ptr.diff())


def test_a_graph_without_edges_has_its_place() -> None:
    graphs = rings_and_paths(20)
    graphs[3] = Data(torch.ones(1, 2), torch.empty(2, 0, dtype=torch.long), y=torch.tensor([1]))
    index = torch.tensor([5, 3, 0])
    x, edge_index, graph, sizes = checked(graphs, "shapes").union(index)
    expected = PygBatch.from_data_list([graphs[i] for i in index])
    assert torch.equal(edge_index, expected.edge_index) and torch.equal(graph, expected.batch)
    assert sizes.tolist()[1] == 1 and torch.equal(x, expected.x)


def test_degrees_stand_for_features() -> None:
    data = made()
    assert data.x.shape[1] == 3  # degrees 0, 1 and 2
    assert torch.equal(data.x.argmax(1), torch.cat([g.edge_index[1].bincount() for g in without_features()]))
    assert (data.x.sum(1) == 1).all()


def test_splits_keep_the_classes_and_share_no_graph() -> None:
    data = made()
    parts = [data.train, data.val, data.test]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(60))
    assert [data.y[part].bincount().tolist() for part in parts] == [[18, 18], [6, 6], [6, 6]]
    again, other = checked(without_features(), "shapes"), checked(without_features(), "shapes", seed=1)
    assert torch.equal(again.test, data.test) and not torch.equal(other.test, data.test)


def test_an_epoch_has_every_training_graph_once() -> None:
    shapes = task()
    batches = shapes.epochs(0)
    first, second = ([batch for batch in batches] for _ in range(2))
    assert [len(batch.target) for batch in first] == [12, 12, 12]
    for epoch in (first, second):
        sizes = torch.cat([batch.inputs[3] for batch in epoch])
        assert sizes.sort().values.equal(shapes.data.nodes[shapes.data.train].sort().values)
        for batch in epoch:
            assert len(batch.inputs[0]) == len(batch.inputs[2]) == int(batch.inputs[3].sum())
    assert not torch.equal(first[0].inputs[3], second[0].inputs[3])
    scored = torch.cat([batch.target for batch in shapes.batches("val")])
    assert torch.equal(scored, shapes.data.y[shapes.data.val])
    assert task().batch(10, 0).target.bincount().tolist() == [5, 5]


def test_is_a_task_and_pickles_small() -> None:
    shapes = task()
    assert isinstance(shapes, Task)
    before, packed = shapes.fingerprint(), pickle.dumps(shapes)
    assert len(packed) < 1000 and pickle.loads(packed).fingerprint() == before
    assert shapes.to("cpu").fingerprint() == before
    assert shapes.sizes == {"features": 3, "classes": 2}
    assert len(shapes.inputs[3]) == 16


def test_rings_are_told_from_paths() -> None:
    """By degrees alone: a path has ends. So the baseline knows it too; the most frequent class does not."""
    shapes = task()
    space = make_space("gnn_graph", {"layers": 1, "widths": [16]}, shapes.sizes)
    arch = {"depth": "1", "conv1": "gin", "width": 16, "norm": "none", "activation": "relu", "readout": "sum"}
    fit = shapes.fit(build(space, {**arch, "dropout": 0.0}), TrainSettings(epochs=40), seed=0)
    assert fit.val == 1.0
    found = shapes.baseline()
    assert found["most frequent class"] == {"val_accuracy": 0.5, "test_accuracy": 0.5}
    assert found["logistic regression"]["val_accuracy"] == 1.0


# ---- the TU collection ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "graphs", "features", "most"),
    [("MUTAG", 188, 7, 125), ("PROTEINS", 1113, 3, 663), ("IMDB-BINARY", 1000, 136, 500)],
)
def test_tu_datasets(
    name: str, graphs: int, features: int, most: int, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers of graphs and of the larger class as the collection states them (Morris et al. 2020)."""
    monkeypatch.setenv("NASGRAPH_CACHE", str(tmp_path))
    found = tudataset(name, root=str(data_root))
    assert len(found.data.y) == graphs and int(found.data.y.bincount().max()) == most
    assert found.sizes == {"features": features, "classes": 2}
    assert abs(len(found.data.test) - 0.2 * graphs) <= 1
    assert (found.data.x.sum(1) == 1).all()  # node labels or degrees, one-hot
    assert tudataset(name, root=str(data_root)).fingerprint() == found.fingerprint()
    assert found.baseline()["most frequent class"]["test_accuracy"] == pytest.approx(most / graphs, abs=0.02)


@pytest.mark.parametrize("name", ["tudataset", "graphs_from_function"])
def test_tasks_are_installed(name: str) -> None:
    assert registry.resolve("tasks", name).__name__ == name


def test_wrong_names_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown TUDataset dataset 'PROTEIN'.*PROTEINS"):
        tudataset("PROTEIN")
    with pytest.raises(DataError, match="no TUDataset dataset MUTAG: there is no folder"):
        _ = tudataset("MUTAG", root=str(tmp_path)).data


def test_your_own_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import torch
from torch_geometric.data import Data

def load():
    edges = torch.tensor([[0, 1], [1, 0]])
    return [Data(torch.full((2, 3), float(i % 2)), edges, y=torch.tensor(i % 2)) for i in range(20)]
"""
    (tmp_path / "my_own_graphs.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    mine = registry.make("tasks", "graphs_from_function", {"function": "my_own_graphs:load"})
    assert mine.sizes == {"features": 3, "classes": 2} and len(mine.data.train) == 12


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": None}, "'shapes': graphs have 2 and no features"),
        ({"x": torch.ones(4, 3)}, "'shapes': graphs have 2 and 3 features"),
        ({"x": torch.ones(4, 2, dtype=torch.long)}, "graph 1: x is torch.int64"),
        ({"x": torch.full((4, 2), torch.nan)}, "graph 1: x holds values that are NaN"),
        ({"edge_index": None}, "graph 1 has no edge_index"),
        ({"edge_index": torch.tensor([[0], [4]])}, "graph 1 has 4 nodes, and edges that reach others"),
        ({"y": torch.tensor([0, 1])}, "graph 1 has no y"),
        ({"y": torch.tensor([-1])}, "classes reach from -1 to 1"),
    ],
)
def test_wrong_graphs_are_named(wrong: dict[str, Any], message: str) -> None:
    graphs = rings_and_paths()
    good = {"x": torch.ones(4, 2), "edge_index": torch.tensor([[0, 1], [1, 0]]), "y": torch.tensor([1])}
    graphs[1] = Data(**{**good, **wrong}, num_nodes=4)
    with pytest.raises(DataError, match=message):
        checked(graphs, "shapes")


def test_too_few_graphs_are_refused() -> None:
    with pytest.raises(DataError, match="'shapes' has no graph"):
        checked([], "shapes")
    with pytest.raises(DataError, match="class 0 has 2 samples, too few"):
        checked(rings_and_paths(4), "shapes")
    with pytest.raises(ConfigError, match="sum below 1"):
        checked(rings_and_paths(), "shapes", val=0.6, test=0.4)
