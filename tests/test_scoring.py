"""What is scored is what is handed out. The oracle is the extracted network with recalibrated statistics."""

from __future__ import annotations

import importlib.util
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasgraph.search_spaces.gnn_node import gnn_node
from nasgraph.space import Architecture, Choice, Label, Op, SearchSpace, Step
from nasgraph.supernet import Supernet, recalibrate
from nasgraph.supernet.scoring import Scorer
from nasgraph.tasks.batch import Batch
from nasgraph.tasks.node import NodeData, NodeTask
from nasgraph.training.loop import Fit, TrainSettings, evaluate
from nasgraph.training.policies import Uniform

_spec = importlib.util.spec_from_file_location("supernet_spaces", Path(__file__).with_name("supernet_spaces.py"))
assert _spec is not None and _spec.loader is not None
_spaces = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_spaces)
small_cnn = _spaces.small_cnn


def small_graph(nodes: int = 40) -> NodeData:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(nodes, 9, generator=generator)
    edges = torch.randint(nodes, (2, 3 * nodes), generator=generator)
    y, order = torch.arange(nodes) % 3, torch.randperm(nodes, generator=generator)
    return NodeData(x, edges, y, order[:12], order[12:26], order[26:])


class Pictures:
    """64 labelled images, given out in batches; counts how often."""

    name, sizes, inputs = "pictures", {"classes": 3}, (torch.zeros(2, 3, 8, 8),)

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 + 1

    def batch(self, n: int, seed: int) -> Batch:
        self.asked.append((n, seed))
        chosen = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:n]
        return Batch((self.x[chosen],), chosen % 3)

    def score(self, model: nn.Module, split: str) -> dict[str, float]:
        accuracy, loss = evaluate(model, [Batch((self.x,), torch.arange(64) % 3)])
        return {"accuracy": accuracy, "loss": loss}

    def fit(self, model: nn.Module, settings: TrainSettings, seed: int) -> Fit:
        raise NotImplementedError

    def fingerprint(self) -> str:
        return "pictures"

    def to(self, device: str | torch.device) -> Pictures:
        return self


def samples(space: SearchSpace, n: int, seed: int = 0) -> list[Architecture]:
    rng = random.Random(seed)
    return [space.sample(rng) for _ in range(n)]


def with_norm(space: SearchSpace) -> Architecture:
    rng = random.Random(0)
    return next(a for a in iter(lambda: space.sample(rng), None) if "batch" in a.values())


@pytest.fixture(scope="module")
def on_graph() -> Supernet:
    task = NodeTask("small", small_graph)
    supernet = Supernet(gnn_node(9, 3, layers=2, widths=(8, 16)), task)
    supernet.train(Uniform(supernet.space), 3)
    return supernet


def test_scores_on_one_graph_are_those_of_the_networks_alone(on_graph: Supernet) -> None:
    archs = samples(on_graph.space, 60)
    norms = [on_graph.has_batch_norm(arch) for arch in archs]
    assert any(norms) and not all(norms)
    scores = on_graph.evaluate(archs)
    assert len(set(scores)) > 3
    for arch, score in zip(archs, scores, strict=True):
        model = recalibrate(on_graph.extract(arch), [on_graph.task.batch(1, 0)])
        assert on_graph.task.score(model, "val")["accuracy"] == score


@pytest.mark.parametrize("limit", [0, 20_000, 2**28])
def test_shared_results_are_the_same_bits(on_graph: Supernet, limit: int) -> None:
    """With what is kept at most: nothing, little, all."""
    scorer = Scorer(on_graph.store, on_graph.task.inputs, limit)
    archs = samples(on_graph.space, 30, seed=1)
    for arch in sorted(archs, key=lambda a: scorer.order(on_graph._structure(a))):
        alone = on_graph.calibrated(arch)
        with torch.no_grad():
            expected = alone(*on_graph.task.inputs)
        assert torch.equal(scorer.output(on_graph._structure(arch)), expected), arch
    assert scorer.bytes <= limit


def test_what_is_alike_is_computed_once(on_graph: Supernet, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    from nasgraph.supernet import scoring, structure

    original = structure.ran

    def counted(step: Step, *rest: Any) -> Tensor:
        ran.append(step.name)
        return original(step, *rest)

    monkeypatch.setattr(scoring, "ran", counted)
    scorer = Scorer(on_graph.store, on_graph.task.inputs)
    choices: dict[str, Label] = {"depth": "1", "conv1": "gcn", "width": 8, "norm": "batch", "activation": "relu"}
    choices |= {"input_dropout": 0.3, "dropout": 0.5, "head": "linear", "propagate": "none"}
    scorer.output(on_graph._structure(on_graph.space.architecture(choices)))
    assert ran == ["conv1", "norm1", "norm1", "act1", "head"]  # the statistics first; dropout is nothing
    ran.clear()
    other: dict[str, Label] = {**choices, "activation": "tanh", "input_dropout": 0.8}
    scorer.output(on_graph._structure(on_graph.space.architecture(other)))
    assert ran == ["act1", "head"]


def test_scores_follow_the_store() -> None:
    supernet = Supernet(gnn_node(9, 3, layers=1, widths=(8,)), NodeTask("small", small_graph))
    archs = samples(supernet.space, 20)
    arch = with_norm(supernet.space)
    before = supernet.calibrated(arch)(*supernet.task.inputs)
    supernet.evaluate(archs)
    supernet.train(Uniform(supernet.space), 5)  # the fused optimizer changes no version counter
    assert not torch.equal(supernet.calibrated(arch)(*supernet.task.inputs), before)
    again = Supernet(supernet.space, supernet.task)
    again.train(Uniform(supernet.space), 5)
    assert supernet.evaluate(archs) == again.evaluate(archs)


class Careless(nn.Module):
    """Writes into what it reads, and has no attribute that says so."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu_()


def test_operations_that_write_into_their_source() -> None:
    space = SearchSpace("careless")
    x = space.input("x", torch.zeros(4, 9), {0: "nodes"})
    space.input("edge_index", torch.zeros(2, 4, dtype=torch.long), {1: "edges"})
    h = space.add("first", Op(nn.Linear, out_features=8), x)
    act = Choice("act", {"careless": Op(Careless), "relu": Op(nn.ReLU, inplace=True), "tanh": Op(nn.Tanh)})
    space.output(space.add("head", Op(nn.Linear, out_features=3), space.add("act", act, h)))
    supernet = Supernet(space, NodeTask("small", small_graph))
    scorer = Scorer(supernet.store, supernet.task.inputs)
    for label in ("tanh", "careless", "tanh", "relu", "tanh"):
        expected = supernet.extract({"act": label}).eval()(*supernet.task.inputs)
        assert torch.equal(scorer.output(supernet._structure(Architecture({"act": label}))), expected)


# ---- mini-batches ---------------------------------------------------------------------------------------------------


def test_statistics_come_from_64_seeded_batches_of_32() -> None:
    task = Pictures()
    supernet = Supernet(small_cnn(), task, seed=3)
    arch = with_norm(supernet.space)
    model = supernet.calibrated(arch)
    asked = [seed for n, seed in task.asked if n == 32]
    assert len(asked) == len(set(asked)) == 64 and not model.training
    batches = [task.batch(32, seed) for seed in asked]
    expected = dict(recalibrate(supernet.extract(arch), batches).named_buffers())
    assert all(torch.equal(buffer, expected[name]) for name, buffer in model.named_buffers())
    assert int(model.get_buffer("norm1.num_batches_tracked")) == 64
    with torch.no_grad():
        pooled = [model.get_submodule("conv1")(*batch.inputs).transpose(0, 1).flatten(1) for batch in batches]
    mean = torch.stack([batch.mean(1) for batch in pooled]).mean(0)  # mean of the batches' means
    variance = torch.stack([batch.var(1) for batch in pooled]).mean(0)
    torch.testing.assert_close(model.get_buffer("norm1.running_mean"), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.get_buffer("norm1.running_var"), variance, rtol=1e-4, atol=1e-5)
    again = Supernet(small_cnn(), Pictures(), seed=3).calibrated(arch)
    assert all(torch.equal(buffer, expected[name]) for name, buffer in again.named_buffers())


def test_statistics_are_kept_until_the_store_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from nasgraph.supernet.structure import Structure

    counted: list[Structure] = []
    original = Structure.measured

    def measured(self: Structure, *rest: Any) -> dict[str, Tensor]:
        counted.append(self)
        return original(self, *rest)

    monkeypatch.setattr(Structure, "measured", measured)
    supernet = Supernet(small_cnn(), Pictures())
    arch = with_norm(supernet.space)
    first = supernet.calibrated(arch)
    assert supernet.evaluate([arch, arch]) == [supernet.task.score(first, "val")["accuracy"]] * 2
    assert len(counted) == 1
    supernet.train(Uniform(supernet.space), 1, samples=8)
    supernet.calibrated(arch)
    supernet.calibrated(arch, samples=64)
    assert len(counted) == 3


def test_scores_on_batches_are_those_of_the_networks_alone() -> None:
    supernet = Supernet(small_cnn(), Pictures())
    supernet.train(Uniform(supernet.space), 20, samples=32)
    archs = samples(supernet.space, 20)
    scores = supernet.evaluate(archs, samples=64)
    expected = [supernet.task.score(supernet.calibrated(a, samples=64), "val")["accuracy"] for a in archs]
    assert scores == expected and len(set(scores)) > 2


def test_more_batches_come_nearer_to_the_truth() -> None:
    """Errors of cumulative statistics shrink with the batches, those of a moving average from 0 and 1 stay large."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(64 * 32, 4, generator=generator) + 2
    batches = [Batch((part,), torch.zeros(32)) for part in data.chunk(64)]

    def errors(n: int, moving: bool) -> float:
        layer = nn.BatchNorm1d(4)
        if moving:
            with torch.no_grad():
                for batch in batches[:n]:
                    layer.train()(*batch.inputs)
        else:
            recalibrate(layer, batches[:n])
        assert layer.running_mean is not None
        return float((layer.running_mean - data.mean(0)).norm() / data.mean(0).norm())

    cumulative = [errors(n, False) for n in (5, 20, 64)]
    assert cumulative[0] > cumulative[2] and cumulative[2] < 1e-5 and max(cumulative) < 0.1
    assert errors(5, True) > 0.5 > 0.13 > errors(20, True) > cumulative[1]  # 0.9^5, 0.9^20


def test_a_task_travels_to_the_scorer_once() -> None:
    supernet = Supernet(gnn_node(9, 3, layers=1, widths=(8,)), NodeTask("small", partial(small_graph, 30)))
    supernet.evaluate(samples(supernet.space, 3))
    kept = supernet._kept
    supernet.evaluate(samples(supernet.space, 3))
    assert kept is not None and supernet._kept is kept
