"""Node tasks: their splits, what pickles, what a user's own graph must have, and what training reaches."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nasgraph.errors import ConfigError, DataError
from nasgraph.tasks import Batch, NodeTask, Task, amazon, coauthor, datasets, digits_knn, from_function, planetoid
from nasgraph.training import TrainSettings


class GCN(nn.Module):
    """Two graph convolutions with dropout (Kipf & Welling, ICLR 2017)."""

    def __init__(self, features: int, classes: int, width: int = 16, seed: int = 0) -> None:
        from torch_geometric.nn import GCNConv

        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second = GCNConv(features, width), GCNConv(width, classes)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = self.first(nn.functional.dropout(x, 0.5, self.training), edge_index).relu()
        return self.second(nn.functional.dropout(h, 0.5, self.training), edge_index)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NASGRAPH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NASGRAPH_DATA", raising=False)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def digits() -> NodeTask:
    return digits_knn()


def split_is_a_partition(task: NodeTask, everything: bool) -> None:
    nodes = torch.cat([task.data.train, task.data.val, task.data.test])
    assert len(nodes) == len(set(nodes.tolist()))
    if everything:
        assert len(nodes) == len(task.data.y)


# ---- digits ----------------------------------------------------------------------------------------------------------


def test_digits_are_split_20_per_class_500_and_the_rest(digits):
    data = digits.data
    assert isinstance(digits, Task)
    assert digits.sizes == {"features": 64, "classes": 10}
    assert data.y[data.train].bincount().tolist() == [20] * 10
    assert (len(data.val), len(data.test)) == (500, 1097)
    split_is_a_partition(digits, everything=True)
    assert (float(data.x.min()), float(data.x.max())) == (0.0, 1.0)


def test_digits_edges_are_the_nearest_images_of_a_plain_search_made_symmetric(digits):
    pixels = (digits.data.x.double().numpy() * 16).round()  # whole numbers: the distances below are exact
    norms = (pixels**2).sum(1)
    distances = norms[:, None] + norms[None, :] - 2 * pixels @ pixels.T
    np.fill_diagonal(distances, np.inf)
    have = np.zeros_like(distances, dtype=bool)
    have[tuple(digits.data.edge_index.numpy())] = True
    assert have.sum() == digits.data.edge_index.shape[1]  # no edge twice
    assert (have == have.T).all()
    eighth = np.sort(distances, axis=1)[:, 7]
    nearer, tied = distances < eighth[:, None], distances <= eighth[:, None]
    assert not (nearer & ~have).any()  # all that are nearer than the 8th neighbour are joined
    assert not (have & ~(tied | tied.T)).any()  # and nothing farther, seen from either end


def test_a_seed_draws_the_split_and_nothing_else(digits):
    again, other = digits_knn(), digits_knn(seed=1)
    assert again.fingerprint() == digits.fingerprint() != other.fingerprint()
    assert torch.equal(other.data.edge_index, digits.data.edge_index)
    assert not torch.equal(other.data.train, digits.data.train)


def test_a_task_pickles_small_and_comes_back_the_same(digits):
    digits.data, digits.sizes  # noqa: B018 - load
    text = pickle.dumps(digits)
    assert len(text) < 1000
    assert pickle.loads(text).fingerprint() == digits.fingerprint()


def test_the_fingerprint_sees_every_tensor(digits):
    seen = {digits.fingerprint()}
    for name in ("x", "edge_index", "y", "train", "val", "test"):
        changed = digits_knn()
        getattr(changed.data, name).view(-1)[-1] += 1
        seen.add(changed.fingerprint())
    assert len(seen) == 7


def test_a_batch_is_balanced_drawn_from_the_training_nodes_and_repeatable(digits):
    train = set(digits.data.train.tolist())
    for n in (7, 30, 64, 200, 999):
        batch = digits.batch(n, seed=4)
        counts = batch.target.bincount(minlength=10)
        assert isinstance(batch, Batch)
        assert len(batch.index) == len(set(batch.index.tolist())) == len(batch.target) == min(n, 200)
        assert set(batch.index.tolist()) <= train
        assert int(counts.max() - counts.min()) <= 1
        assert torch.equal(batch.target, digits.data.y[batch.index])
    assert torch.equal(digits.batch(30, 4).index, digits.batch(30, 4).index)
    assert not torch.equal(digits.batch(30, 4).index, digits.batch(30, 5).index)
    with pytest.raises(ValueError, match="at least 1"):
        digits.batch(0, 0)


def test_a_gcn_beats_the_features_alone_on_digits(digits):
    """The neighbours of an image mostly show the same digit, so a graph network must beat logistic regression."""
    baseline = digits.baseline()
    model = GCN(64, 10, width=32)
    fit = digits.fit(model, TrainSettings(epochs=60), seed=0)
    test = digits.score(model, "test")
    assert 0.85 < baseline["test_accuracy"] < test["accuracy"]
    assert digits.score(model, "val") == {"accuracy": fit.val, "loss": fit.val_loss}


def test_two_fits_give_the_same_bits(digits):
    models = [GCN(64, 10), GCN(64, 10)]
    fits = [digits.fit(model, TrainSettings(epochs=8), seed=2) for model in models]
    assert fits[0].history == fits[1].history
    assert all(torch.equal(a, b) for a, b in zip(*(model.state_dict().values() for model in models), strict=True))


def test_nothing_but_the_test_score_depends_on_test_labels(digits):
    honest, other = digits_knn(), digits_knn()
    other.data.y[other.data.test] = (other.data.y[other.data.test] + 1) % 10
    models = [GCN(64, 10), GCN(64, 10)]
    fits = [task.fit(model, TrainSettings(epochs=8), 0) for task, model in zip((honest, other), models, strict=True)]
    assert fits[0].history == fits[1].history
    assert honest.score(models[0], "val") == other.score(models[1], "val")
    assert honest.baseline()["C"] == other.baseline()["C"]
    assert honest.score(models[0], "test") != other.score(models[1], "test")


def test_scores_leave_the_model_as_it_was_and_name_wrong_splits(digits):
    model = GCN(64, 10).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score = digits.score(model, "test")
    with torch.no_grad():
        outputs = model.eval()(*digits.inputs)[digits.data.test]
    target = digits.data.y[digits.data.test]
    assert score["accuracy"] == pytest.approx((outputs.argmax(1) == target).double().mean().item())
    assert score["loss"] == pytest.approx(nn.functional.cross_entropy(outputs, target).item(), rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="train, val, test"):
        digits.score(model, "tset")


def test_moving_a_task_moves_its_data_and_not_its_fingerprint(digits):
    moved = digits.to("meta")
    assert {tensor.device.type for tensor in moved.inputs} == {"meta"}
    assert digits.inputs[0].device.type == "cpu"
    assert digits.to("cpu").fingerprint() == digits.fingerprint()


@pytest.mark.parametrize("arguments", [{"k": 0}, {"k": 1797}, {"labels_per_class": 0}, {"labels_per_class": 101}])
def test_digits_arguments_out_of_range_are_named(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        digits_knn(**arguments)


# ---- PyG's datasets --------------------------------------------------------------------------------------------------


def test_cora_is_the_public_split(data_root, cache):
    task = planetoid("Cora", root=str(data_root))
    data = task.data
    assert task.sizes == {"features": 1433, "classes": 7}
    assert (data.x.shape[0], data.edge_index.shape[1]) == (2708, 10556)
    assert data.train.tolist() == list(range(140))  # Yang et al.: the first 140, the next 500, the last 1,000
    assert data.val.tolist() == list(range(140, 640))
    assert data.test.tolist() == list(range(1708, 2708))
    assert data.y[data.train].bincount().tolist() == [20] * 7
    sums = data.x.sum(1)
    assert bool(((sums - 1).abs() < 1e-5).logical_or(sums == 0).all())


def test_loading_writes_into_the_cache_only_and_once(data_root, cache, monkeypatch):
    before = sorted(path for path in data_root.rglob("*") if "Planetoid" in path.parts)
    monkeypatch.setenv("NASGRAPH_DATA", str(data_root))
    first = planetoid("Cora").fingerprint()
    processed = list(cache.rglob("data.pt"))
    assert len(processed) == 1
    stamp = processed[0].stat().st_mtime_ns
    assert planetoid("Cora").fingerprint() == first
    assert processed[0].stat().st_mtime_ns == stamp
    assert not list(cache.rglob("new-*"))
    assert sorted(path for path in data_root.rglob("*") if "Planetoid" in path.parts) == before


def test_computers_is_the_largest_component_split_20_30_per_class(data_root, cache):
    task = amazon("Computers", root=str(data_root))
    data = task.data
    assert (data.x.shape, task.sizes["classes"]) == ((13381, 767), 10)
    assert data.y[data.train].bincount().tolist() == [20] * 10
    assert data.y[data.val].bincount().tolist() == [30] * 10
    split_is_a_partition(task, everything=True)
    other = amazon("Computers", root=str(data_root), seed=1)
    assert not torch.equal(other.data.train, data.train)
    assert torch.equal(other.data.edge_index, data.edge_index)


@pytest.mark.slow
def test_physics_is_one_component(data_root, cache):
    task = coauthor("Physics", root=str(data_root))
    assert (tuple(task.data.x.shape), task.sizes["classes"]) == ((34493, 8415), 5)
    assert task.data.y[task.data.train].bincount().tolist() == [20] * 5
    split_is_a_partition(task, everything=True)


@pytest.mark.slow
def test_a_gcn_reaches_its_published_accuracy_on_cora(data_root, cache):
    """Kipf & Welling, ICLR 2017, table 2: 81.5 on the public split."""
    task = planetoid("Cora", root=str(data_root))
    tests = []
    for seed in range(3):
        model = GCN(1433, 7, seed=seed)
        task.fit(model, TrainSettings(), seed=seed)
        tests.append(task.score(model, "test")["accuracy"])
    assert 0.80 < sum(tests) / len(tests) < 0.83
    assert all(0.78 < test < 0.84 for test in tests)


@pytest.mark.parametrize(("make", "name", "near"), [(planetoid, "cora", "Cora"), (amazon, "computer", "Computers")])
def test_an_unknown_dataset_is_named_before_anything_is_loaded(make, name, near):
    with pytest.raises(ConfigError, match=f"Did you mean '{near}'"):
        make(name)


def test_a_folder_without_the_dataset_is_named(tmp_path, cache):
    with pytest.raises(DataError) as error:
        planetoid("PubMed", root=str(tmp_path)).data  # noqa: B018
    assert str(tmp_path / "Planetoid" / "PubMed" / "raw") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_raw_file_is_named_and_not_downloaded(graphs, tmp_path, cache):
    raw = tmp_path / "Planetoid" / "Cora" / "raw"
    shutil.copytree(graphs / "Planetoid" / "Cora" / "raw", raw)
    (raw / "ind.cora.graph").unlink()
    with pytest.raises(DataError, match="ind.cora.graph") as error:
        planetoid("Cora", root=str(tmp_path)).data  # noqa: B018
    assert str(raw) in str(error.value)
    assert not list(cache.rglob("data.pt"))


def test_a_damaged_raw_file_is_refused(graphs, tmp_path, cache):
    raw = tmp_path / "Planetoid" / "Cora" / "raw"
    shutil.copytree(graphs / "Planetoid" / "Cora" / "raw", raw)
    (raw / "ind.cora.allx").write_bytes((raw / "ind.cora.allx").read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be read"):
        planetoid("Cora", root=str(tmp_path)).data  # noqa: B018
    assert not list(cache.rglob("data.pt"))


def test_changed_raw_files_are_not_answered_from_the_cache(graphs, tmp_path, cache):
    raw = tmp_path / "Planetoid" / "Cora" / "raw"
    shutil.copytree(graphs / "Planetoid" / "Cora" / "raw", raw)
    before = planetoid("Cora", root=str(tmp_path)).fingerprint()
    lines = (raw / "ind.cora.test.index").read_text().split()
    (raw / "ind.cora.test.index").write_text("\n".join(lines[::-1]) + "\n")
    assert planetoid("Cora", root=str(tmp_path)).fingerprint() != before


def test_a_download_that_fails_says_what_to_do(cache, monkeypatch):
    import torch_geometric.datasets

    def unreachable(self) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch_geometric.datasets.Planetoid, "download", unreachable)
    with pytest.raises(DataError, match="NASGRAPH_DATA=<folder>") as error:
        planetoid("CiteSeer").data  # noqa: B018
    assert "no route to host" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cache_that_cannot_be_written_is_named(data_root, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NASGRAPH_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="NASGRAPH_CACHE"):
        planetoid("Cora", root=str(data_root)).data  # noqa: B018


def test_losing_the_race_to_process_a_dataset_is_no_error(data_root, cache, monkeypatch):
    """Another process puts its copy in place after this one has begun."""
    real = datasets._process

    def second(family: str, name: str, raw: Path | None, folder: Path) -> None:
        real(family, name, raw, folder)
        real(family, name, raw, folder)

    monkeypatch.setattr(datasets, "_process", second)
    assert len(planetoid("Cora", root=str(data_root)).data.y) == 2708
    assert len(list(cache.rglob("data.pt"))) == 1


# ---- a user's own graph ----------------------------------------------------------------------------------------------

OWN = """
import torch
from torch_geometric.data import Data

def whole(n=240, classes=2, **changes):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=generator)
    edges = torch.randint(0, n, (2, 3 * n), generator=generator)
    parts = {"x": x, "edge_index": edges, "y": torch.arange(n) % classes, **changes}
    return Data(**{name: value for name, value in parts.items() if value is not None})

def mask(start, stop, n=240):
    return (torch.arange(n) >= start) & (torch.arange(n) < stop)

def masked(train=(0, 100), val=(100, 150), test=(150, 240)):
    return whole(train_mask=mask(*train), val_mask=mask(*val), test_mask=mask(*test))

def no_x(): return whole(x=None)
def no_y(): return whole(y=None)
def long_x(): return whole(x=torch.ones(240, 5, dtype=torch.long))
def nan_x():
    data = whole()
    data.x[3, 2] = float("nan")
    return data
def edges_out(): return whole(edge_index=torch.tensor([[0, 1], [1, 240]]))
def edges_float(): return whole(edge_index=torch.zeros(2, 3))
def y_short(): return whole(y=torch.zeros(7, dtype=torch.long))
def one_class(): return whole(classes=1)
def few(): return whole(n=60)
def one_mask(): return whole(train_mask=mask(0, 100))
def mask_numbers(): return whole(train_mask=mask(0, 9).long(), val_mask=mask(9, 20), test_mask=mask(20, 30))
def overlap(): return masked(test=(140, 240))
def empty(): return masked(val=(0, 0))
def unlabelled():
    data = masked()
    data.y[5] = -1
    return data
def partly():
    data = whole()
    data.y[:20] = -1
    return data
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> str:
    name = f"own_graphs_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_users_graph_with_masks_is_taken_as_it_is(own):
    data = from_function(f"{own}:masked").data
    assert data.train.tolist() == list(range(100))
    assert data.val.tolist() == list(range(100, 150))
    assert data.test.tolist() == list(range(150, 240))


def test_a_users_graph_without_masks_is_split_and_unlabelled_nodes_are_left_out(own):
    task = from_function(f"{own}:partly")
    assert task.data.y[task.data.train].tolist().count(1) == 20 == len(task.data.train) // 2
    assert len(task.data.val) == 60
    split_is_a_partition(task, everything=False)
    nodes = torch.cat([task.data.train, task.data.val, task.data.test])
    assert sorted(nodes.tolist()) == list(range(20, 240))
    assert pickle.loads(pickle.dumps(task)).fingerprint() == task.fingerprint()


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("no_x", "has no tensor x"),
        ("no_y", "has no tensor y"),
        ("long_x", "x is int64 of shape (240, 5), it must be float32"),
        ("nan_x", "x holds 1 values that are NaN"),
        ("edges_out", "edge_index reaches from 0 to 240, but the nodes are 0 to 239"),
        ("edges_float", "edge_index is float32 of shape (2, 3)"),
        ("y_short", "y is int64 of shape (7,), it must be int64 of shape (240,)"),
        ("one_class", "fewer than 2 classes"),
        ("few", "takes 30 nodes of each class, but class 0 has 10"),
        ("one_mask", "no val_mask and no test_mask"),
        ("mask_numbers", "train_mask is int64"),
        ("overlap", "in two of train_mask, val_mask and test_mask"),
        ("empty", "the val split is empty"),
        ("unlabelled", "the train split has nodes with a label below 0"),
    ],
)
def test_what_a_users_graph_lacks_is_named(own, function, says):
    with pytest.raises(DataError) as error:
        from_function(f"{own}:{function}").data  # noqa: B018
    assert says in str(error.value)
    assert function in str(error.value)
    assert "\n" not in str(error.value)
