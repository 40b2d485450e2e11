"""First trials from tables, as a config asks for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch_geometric.nn import GCNConv

from nasgraph import manifest, search
from nasgraph.config import Config, parse
from nasgraph.errors import ConfigError
from nasgraph.run import Run
from nasgraph.space import Architecture, Choice, Op, SearchSpace
from nasgraph.transforms import Lora, LowRank, Quantize, Transform
from nasgraph.warm_start import check
from nasgraph.workers import parts

BASE = {
    "space": f"{__name__}:low_precision",
    "task": "digits_knn",
    "objectives": ["val_accuracy", "model_bits"],
    "train": {"epochs": 3, "patience": 3},
    "final": {"top": 1, "seeds": 1},
    "export": ["safetensors"],
}


def low_precision(features: int, classes: int) -> SearchSpace:
    """Two graph convolutions with bits and a rank."""
    space = SearchSpace("low_precision")
    x = space.input("x", torch.zeros(4, features), {0: "nodes"})
    edges = space.input("edge_index", torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]]), {1: "edges"})
    width = Choice("width", [8, 16])
    first = [Quantize(weight_bits=Choice("bits1", [2, 4, None])), LowRank(rank=Choice("rank", [2, 4, None]))]
    h = space.add("first", Op(GCNConv, out_channels=width), x, edges, transforms=first)
    h = space.add("relu", Op(nn.ReLU), h)
    second = [Quantize(weight_bits=Choice("bits2", [2, 4, None]))]
    space.output(space.add("second", Op(GCNConv, out_channels=classes), h, edges, transforms=second))
    return space


def settings(tier: dict[str, object], **changes: object) -> Config:
    return parse({**BASE, "search": {"trials": 6, "workers": 0, "baseline": False, **tier}, **changes})


PLAIN = {"width": 16, "bits1": None, "bits2": None, "rank": None}


def first_trials(folder: Path) -> list[Architecture]:
    facts = manifest.read(folder / "manifest.json")
    found = [Architecture(choices) for choices in facts["warm_start"]]
    records = Run.open(folder).records("search")
    assert facts["seconds"]["warm start"] > 0
    started = 1 if facts["config"]["search"]["start"] else 0
    assert [record.arch for record in records][started : started + len(found)] == found[: len(records) - started]
    return found


def test_a_run_begins_with_the_front_of_its_tables(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = settings({"start": [PLAIN], "warm_start": {"n": 4, "samples": 32}})
    assert search.start(config, folder, quiet=True) == 0
    found = first_trials(folder)
    assert 2 <= len(found) <= 4 and all(arch["width"] == 16 for arch in found)
    assert found[0] != found[-1]
    records = {record.arch: record.values for record in Run.open(folder).records("search")}
    bits = [records[arch]["model_bits"] for arch in found]
    assert bits == sorted(bits) and bits[0] < records[Architecture(PLAIN)]["model_bits"] / 3
    assert search.resume(folder, ["search.trials=7"], quiet=True) == 0
    assert first_trials(folder) == found


@pytest.mark.slow
def test_with_a_supernet_its_weights_are_measured(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tier = {"score": "supernet", "finetune": 1, "warm_start": {"methods": ["sqnr"], "n": 3, "cost": "params"}}
    supernet = {"policy": "ordered_dropout", "epochs": 3}
    config = settings(tier, supernet=supernet, objectives=["val_accuracy", "params"])
    assert search.start(config, folder, quiet=True) == 0
    found = first_trials(folder)
    assert found and {arch["width"] for arch in found} <= {8, 16}
    assert found[-1]["bits1"] is None  # bits cost no parameters, so the least noise is best


def test_what_cannot_be_measured_is_refused_before_the_run(tmp_path: Path) -> None:
    plain = settings({"warm_start": {}}, space={"name": "gnn_node", "layers": 1})
    with pytest.raises(ConfigError, match=r"search.warm_start: space .* has no transform with a choice"):
        search.start(plain, tmp_path / "run", quiet=True)
    gain = settings({"warm_start": {"cost": "val_accuracy"}})
    with pytest.raises(ConfigError, match="'val_accuracy' is no cost"):
        search.start(gain, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="unknown objective 'model_bit'"):
        settings({"warm_start": {"cost": "model_bit"}})
    with pytest.raises(ConfigError, match="search.warm_start.methods.0"):
        settings({"warm_start": {"methods": ["sensitive"]}})
    with pytest.raises(ConfigError, match=r"unknown key 'search.warm_start.sample'.*samples"):
        settings({"warm_start": {"sample": 3}})


def adapted(features: int, classes: int) -> SearchSpace:
    """A layer whose adapter's rank is a choice, and bits."""
    space = SearchSpace("adapted")
    x = space.input("x", torch.zeros(4, features), {0: "nodes"})
    edges = space.input("edge_index", torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]]), {1: "edges"})
    h = space.add("first", Op(GCNConv, out_channels=8), x, edges)
    transforms = [Quantize(weight_bits=Choice("bits", [4, None])), Lora(rank=Choice("rank", [0, 1, 2, 4, 8]))]
    space.output(space.add("head", Op(nn.Linear, out_features=classes), h, transforms=transforms))
    return space


def test_allocators_of_ranks_add_trials_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tier = {"methods": ["sensitivity", "adalora"], "n": 2, "samples": 32, "steps": 20, "cost": "adapter_params"}
    config = settings({"warm_start": tier, "trials": 4}, space=f"{__name__}:adapted")
    assert search.start(config, folder, quiet=True) == 0
    found = first_trials(folder)
    ranks = [arch["rank"] for arch in found if arch["bits"] is None and arch["rank"]]
    assert len(ranks) == 2 and ranks == sorted(ranks) and 0 < ranks[0] < ranks[1] < 8


def test_an_allocator_needs_ranks_of_adapters(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'sora' allocates ranks of Lora, and space 'low_precision' has no choice"):
        search.start(settings({"warm_start": {"methods": ["sqnr", "sora"]}}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def bits_alone(features: int, classes: int) -> SearchSpace:
    """A layer with bits."""
    return one_layer(features, classes, Quantize(weight_bits=Choice("bits", [4, None])))


def ranks_alone(features: int, classes: int) -> SearchSpace:
    """A layer with an adapter."""
    return one_layer(features, classes, Lora(rank=Choice("rank", [0, 2])))


def one_layer(features: int, classes: int, transform: Transform) -> SearchSpace:
    space = SearchSpace("one_layer")
    x = space.input("x", torch.zeros(4, features), {0: "nodes"})
    edges = space.input("edge_index", torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]]), {1: "edges"})
    space.output(space.add("layer", Op(GCNConv, out_channels=classes), x, edges, transforms=[transform]))
    return space


@pytest.mark.parametrize(
    ("space", "methods", "measures"),
    [
        ("bits_alone", ["stable_rank"], "'stable_rank' measures ranks of LowRank"),
        ("bits_alone", ["sensitivity", "stable_rank"], "'stable_rank' measures ranks of LowRank"),
        ("bits_alone", ["gradients"], "'gradients' measures ranks of Lora"),
        ("ranks_alone", ["sqnr"], "'sqnr' measures bits, masks and ranks of LowRank"),
    ],
)
def test_a_method_that_says_nothing_of_the_space_is_refused(
    space: str, methods: list[str], measures: str, tmp_path: Path
) -> None:
    config = settings({"warm_start": {"methods": methods}}, space=f"{__name__}:{space}")
    with pytest.raises(
        ConfigError, match=f"search.warm_start.methods: {measures}, and space 'one_layer' has no choice"
    ):
        search.start(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_methods_that_say_something_pass() -> None:
    for space in ("bits_alone", "ranks_alone"):
        config = settings({"warm_start": {}}, space=f"{__name__}:{space}")  # sensitivity and gradients
        check(config.search.warm_start, parts(config))
    config = settings({"warm_start": {"methods": ["stable_rank"]}})
    check(config.search.warm_start, parts(config))
