"""Exams for plug-ins. Inherit one in a test file and pytest asks its questions of your code; needs pytest.

::

    class TestMine(nasgraph.testing.ProxyExam):
        proxy = staticmethod(my_proxy)
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import pickle
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nasgraph.build import build, build_graph
from nasgraph.errors import DamagedFile, NotFinite
from nasgraph.executors import InProcess
from nasgraph.export import Exported, Request, export_many, verify
from nasgraph.export.base import grown
from nasgraph.export.packed import contents, unpacked
from nasgraph.objectives.base import Scored
from nasgraph.objectives.bits import count_model_bits
from nasgraph.ops import add
from nasgraph.pareto import Direction
from nasgraph.space import Architecture, Call, Choice, Op, SearchSpace
from nasgraph.study import Study, TrialRecord
from nasgraph.supernet import Supernet
from nasgraph.tasks.batch import Batch
from nasgraph.tasks.node import NodeData, NodeTask
from nasgraph.training import TrainSettings
from nasgraph.training.policies import Policy
from nasgraph.transforms import Transform
from nasgraph.transforms.deploy import deploy

CONVOLUTIONS = ("gat", "gatv2", "gcn", "gin", "cheb", "sage-mean", "sage-max", "arma", "graph", "gen", "pna", "fc")


class ProxyExam:
    """What every training-free proxy ``proxy(model, batch) -> float`` must do, on small graph and plain networks."""

    proxy: ClassVar[Callable[[nn.Module, Batch], float]]
    needs_labels: ClassVar[bool] = True
    """False: the score may not depend on ``batch.target``."""
    reads_weights: ClassVar[bool] = True
    """False: a count that is the same for any value of the weights."""
    can_be_zero: ClassVar[bool] = False
    """True: 0 is an answer. Otherwise it means that the proxy saw none of the layers."""

    @pytest.mark.parametrize("norm", ["batch", "layer"])
    @pytest.mark.parametrize("conv", CONVOLUTIONS)
    def test_finite_and_not_zero_on_every_convolution(self, conv: str, norm: str) -> None:
        score = self._score(node_model(conv, norm), node_batch())
        assert isinstance(score, float)
        assert math.isfinite(score)
        assert self.can_be_zero or score != 0.0

    def test_scores_a_plain_network_on_rows(self) -> None:
        score = self._score(plain_model(), plain_batch())
        assert math.isfinite(score)
        assert self.can_be_zero or score != 0.0

    @pytest.mark.parametrize("conv", ["gcn", "gat", "gin"])
    def test_leaves_the_model_as_it_was(self, conv: str) -> None:
        model, batch = node_model(conv, "batch"), node_batch()
        model.train()
        before = copy.deepcopy(model)
        inputs, generator = [x.clone() for x in batch.inputs], torch.random.get_rng_state()
        self._score(model, batch)
        assert torch.equal(torch.random.get_rng_state(), generator), "the global random number generator was used"
        assert all(torch.equal(a, b) for a, b in zip(batch.inputs, inputs, strict=True))
        assert all(not x.requires_grad for x in batch.inputs)
        old, new = before.state_dict(), model.state_dict()
        assert old.keys() == new.keys()
        assert [key for key in old if not torch.equal(old[key], new[key])] == []
        for (name, was), (_, now) in zip(before.named_modules(), model.named_modules(), strict=True):
            assert type(was) is type(now), name
            assert was.training == now.training, name
            hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            assert all(len(getattr(was, kind)) == len(getattr(now, kind)) for kind in hooks), name
        for name, parameter in model.named_parameters():
            assert parameter.grad is None, name
            assert parameter.requires_grad, name

    def test_same_model_same_score(self) -> None:
        model, batch = node_model("gat", "batch"), node_batch()
        first = self._score(model, batch)
        torch.rand(3)  # the caller's random numbers go on
        assert self._score(model.train(), batch) == first
        assert self._score(model.eval(), batch) == first
        assert self._score(node_model("gat", "batch"), node_batch()) == first

    def test_a_model_with_nan_weights_has_no_score(self) -> None:
        model, batch = node_model("gcn", "layer"), node_batch()
        score = self._score(model, batch)
        with torch.no_grad():
            next(p for p in model.parameters() if p.dim() >= 2).fill_(math.nan)
        if self.reads_weights:
            with pytest.raises(NotFinite):
                self._score(model, batch)
        else:
            assert self._score(model, batch) == score

    def test_the_order_of_hidden_units_does_not_matter(self) -> None:
        model, batch = plain_model().double(), plain_batch(torch.float64)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
        renamed, weights = copy.deepcopy(model), model.state_dict()
        weights |= {"0.weight": weights["0.weight"][order], "0.bias": weights["0.bias"][order]}
        weights |= {"2.weight": weights["2.weight"][:, order]}
        renamed.load_state_dict(weights)
        assert self._score(renamed, batch) == pytest.approx(self._score(model, batch), rel=1e-6)

    def test_labels_are_read_only_by_a_proxy_that_says_so(self) -> None:
        model, batch = node_model("gcn", "layer"), node_batch()
        other = Batch(batch.inputs, torch.zeros_like(batch.target), batch.index)
        assert (self._score(model, batch) != self._score(model, other)) == self.needs_labels

    def test_can_be_sent_to_a_worker(self) -> None:
        proxy = type(self).proxy
        assert pickle.loads(pickle.dumps(proxy)) is proxy

    def _score(self, model: nn.Module, batch: Batch) -> float:
        return type(self).proxy(model, batch)


def node_batch(dtype: torch.dtype = torch.float32) -> Batch:
    """Half of the 24 nodes of a random symmetric graph: 5 features, 3 classes, every node with a neighbour."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 5, generator=generator).to(dtype)  # the same numbers in any precision
    ring = torch.stack([torch.arange(24), (torch.arange(24) + 1) % 24])
    chords = torch.stack([torch.arange(0, 24, 3), torch.randint(2, 23, (8,), generator=generator)])
    chords[1] = (chords[0] + chords[1]) % 24  # neither loops nor edges of the ring
    half = torch.cat([ring, chords], 1)
    edges = torch.cat([half, half.flip(0)], 1)
    return Batch((x, edges), torch.arange(12) % 3, torch.arange(0, 24, 2))


def plain_batch(dtype: torch.dtype = torch.float32) -> Batch:
    """10 rows of 6 numbers, 3 classes."""
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    return Batch((x,), torch.arange(10) % 3)


def plain_model(seed: int = 0) -> nn.Sequential:
    """Linear 6-12, ReLU, linear 12-3."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def node_model(conv: str, norm: str, seed: int = 0) -> nn.Module:
    """Two layers of a convolution (of ``CONVOLUTIONS``); between them ``batch`` or ``layer`` norm, ReLU and dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _TwoLayers(conv, norm)


class _TwoLayers(nn.Module):
    def __init__(self, conv: str, norm: str) -> None:
        super().__init__()
        self.first, self.second = _convolution(conv, 5, 8), _convolution(conv, 8, 3)
        self.norm = nn.BatchNorm1d(8) if norm == "batch" else nn.LayerNorm(8)
        self.act, self.drop = nn.ReLU(), nn.Dropout(0.5)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.drop(self.act(self.norm(self.first(x, edge_index))))
        out: Tensor = self.second(x, edge_index)
        return out


def _convolution(name: str, width_in: int, width_out: int) -> nn.Module:
    import torch_geometric.nn as pyg

    def two_linear() -> nn.Module:
        return nn.Sequential(nn.Linear(width_in, 16), nn.ReLU(), nn.Linear(16, width_out))

    degrees = torch.tensor([0, 1, 8, 8, 4, 2, 1])
    makers: dict[str, Callable[[], Any]] = {
        "gat": lambda: pyg.GATConv(width_in, width_out, heads=2, concat=False, dropout=0.5),
        "gatv2": lambda: pyg.GATv2Conv(width_in, width_out, heads=2, concat=False, dropout=0.5),
        "gcn": lambda: pyg.GCNConv(width_in, width_out),
        "gin": lambda: pyg.GINConv(two_linear(), train_eps=True),
        "cheb": lambda: pyg.ChebConv(width_in, width_out, K=3),
        "sage-mean": lambda: pyg.SAGEConv(width_in, width_out, aggr="mean"),
        "sage-max": lambda: pyg.SAGEConv(width_in, width_out, aggr="max"),
        "arma": lambda: pyg.ARMAConv(width_in, width_out, num_stacks=2, num_layers=2),
        "graph": lambda: pyg.GraphConv(width_in, width_out),
        "gen": lambda: pyg.GENConv(width_in, width_out),
        "pna": lambda: pyg.PNAConv(
            width_in, width_out, ["mean", "max", "std"], ["identity", "amplification"], deg=degrees
        ),
        "fc": lambda: _NoMessages(width_in, width_out),
    }
    made: nn.Module = makers[name]()
    return made


class _NoMessages(nn.Linear):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class SamplerExam:
    """What every strategy must do: search a small conditional space alone, be repeatable, survive failures, resume.

    ``make`` takes a seed and returns an ``optuna.samplers.BaseSampler``; each trial gets a fresh one.
    """

    make: ClassVar[Callable[[int], Any]]
    trials: ClassVar[int] = 25  # enough to leave the sampler's random start behind

    def search(
        self, path: Path, seed: int = 0, trials: int | None = None, fails: bool = False, objectives: int = 2
    ) -> list[TrialRecord]:
        """Run a search, or resume the one in ``path``."""
        directions: list[tuple[str, Direction]] = [("good", "maximize"), ("size", "minimize")]
        study = Study(
            path, "exam", _conditional_space(), directions[:objectives], type(self).make, seed, limits={"size": 80}
        )
        with InProcess(_rate_or_fail if fails else _rate) as executor:
            return study.run(trials or self.trials, executor)

    @pytest.mark.parametrize("objectives", [1, 2])
    def test_proposals_are_architectures_of_the_space(self, objectives: int, tmp_path: Path) -> None:
        records = self.search(tmp_path / "study.db", objectives=objectives)
        space = _conditional_space()
        assert [record.number for record in records] == list(range(self.trials))
        assert all(record.state == "scored" for record in records)
        assert all(space.architecture(record.arch) == record.arch for record in records)

    def test_one_seed_gives_one_search(self, tmp_path: Path) -> None:
        first, again, other = (self.search(tmp_path / f"{i}.db", seed=seed) for i, seed in enumerate((1, 1, 2)))
        assert _what_was_found(first) == _what_was_found(again)
        assert _what_was_found(first) != _what_was_found(other)

    def test_trials_differ(self, tmp_path: Path) -> None:
        records = self.search(tmp_path / "study.db")
        assert len({record.key for record in records}) > self.trials // 2

    @pytest.mark.parametrize("fails", [False, True])
    def test_a_resumed_search_equals_the_uninterrupted_one(self, fails: bool, tmp_path: Path) -> None:
        whole = self.search(tmp_path / "whole.db", fails=fails)
        for stop in (3, self.trials // 2, self.trials - 2, self.trials):
            parts = self.search(tmp_path / "parts.db", trials=stop, fails=fails)
        assert _what_was_found(parts) == _what_was_found(whole)

    def test_failed_trials_are_survived(self, tmp_path: Path) -> None:
        records = self.search(tmp_path / "study.db", fails=True)
        assert len(records) == self.trials
        assert {record.reason for record in records} == {None, "error"}


def _conditional_space() -> SearchSpace:
    """Up to four layers; the choices of a layer are asked when it is reached."""
    space = SearchSpace("exam")
    node = space.input("x", torch.zeros(2, 4), dynamic={0: "batch"})
    ends: dict[str, Any] = {}
    for i in range(4):
        width = Choice(f"width{i}", [4, 8, 16, 32], ordered=True)
        kind = Choice(f"kind{i}", {"relu": Op(nn.ReLU), "elu": Op(nn.ELU), "tanh": Op(nn.Tanh)})
        node = space.add(f"kind{i}", kind, space.add(f"linear{i}", Op(nn.Linear, out_features=width), node))
        ends[str(i + 1)] = node
    space.output(Choice("depth", ends))
    return space


def _rate(arch: Mapping[str, Any]) -> Scored:
    depth = int(arch["depth"])
    size = sum(arch[f"width{i}"] for i in range(depth))
    kinds = sum({"relu": 0.3, "elu": 0.5, "tanh": 0.1}[arch[f"kind{i}"]] for i in range(depth))
    return Scored({"good": (kinds + 0.01 * size) / (1 + 0.3 * depth), "size": size})


def _rate_or_fail(arch: Mapping[str, Any]) -> Scored:
    if arch["kind0"] == "tanh" and arch["width0"] < 16:
        raise ValueError("too narrow for tanh")
    return _rate(arch)


def _what_was_found(records: Sequence[TrialRecord]) -> list[Any]:
    """All of the records but the wall clock."""
    return [(r.number, r.state, r.arch, r.key, r.values, r.reason, r.reused) for r in records]


class PolicyExam:
    """What every path policy must do: draw from (seed, step) alone, stay in the space, teach, go on from a checkpoint.

    ``make(space, supernet, steps)`` returns a policy for a training of ``steps`` updates.
    """

    make: ClassVar[Callable[[SearchSpace, Supernet, int], Policy]]
    steps: ClassVar[int] = 6

    def made(self, steps: int | None = None) -> tuple[Supernet, Policy]:
        """A new supernet of a small conditional space with a constraint, and a policy for it."""
        supernet = Supernet(_elastic_space(), NodeTask("exam", _two_classes))
        return supernet, type(self).make(supernet.space, supernet, steps or self.steps)

    def drawn(self, policy: Policy, step: int, seed: int = 0) -> list[Architecture]:
        """What the policy trains in ``step``."""
        found = policy.sample(step, random.Random(f"paths/{seed}/{step}"))
        return [path if isinstance(path, Architecture) else path.architecture for path in found]

    def test_paths_are_architectures_of_the_space(self) -> None:
        supernet, policy = self.made()
        for step in range(self.steps):
            found = self.drawn(policy, step)
            assert found, "a step trains at least one architecture"
            for arch in found:
                assert supernet.space.architecture(arch) == arch
                assert supernet.space.violated(arch) == []

    def test_paths_depend_on_seed_and_step(self) -> None:
        (_, policy), (_, again), (_, late) = self.made(), self.made(), self.made()
        state, numbers = random.getstate(), torch.random.get_rng_state()
        first = [self.drawn(policy, step) for step in range(self.steps)]
        random.seed(1)
        assert [self.drawn(again, step) for step in range(self.steps)] == first
        assert self.drawn(late, self.steps - 1) == first[-1], "a step must not depend on the draws before it"
        random.setstate(state)
        assert torch.equal(torch.random.get_rng_state(), numbers), "the global random number generator was used"

    def test_the_state_round_trips(self) -> None:
        supernet, policy = self.made()
        supernet.train(policy, self.steps - 1)
        _, other = self.made()
        tensors = {name: value for name, value in policy.state().items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in policy.state().items() if name not in tensors}
        other.load({**json.loads(json.dumps(plain)), **tensors})
        again = other.state()
        assert again.keys() == policy.state().keys()
        assert json.dumps({name: again[name] for name in plain}) == json.dumps(plain)
        assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
        for seed in range(5):
            assert self.drawn(other, self.steps - 1, seed) == self.drawn(policy, self.steps - 1, seed)

    def test_a_resumed_training_has_the_same_bits(self, tmp_path: Path) -> None:
        whole, policy = self.made()
        history = whole.train(policy, self.steps)
        part, policy = self.made()
        first = part.train(policy, self.steps // 2, checkpoint=tmp_path)
        resumed = Supernet.load(tmp_path, _elastic_space(), part.task)
        last = resumed.train(type(self).make(resumed.space, resumed, self.steps), self.steps)
        assert first + last == history
        assert all(torch.equal(whole.store[key], resumed.store[key]) for key in whole.store)

    def test_training_teaches(self) -> None:
        supernet, policy = self.made(60)
        rng = random.Random(0)
        archs = [supernet.space.sample(rng) for _ in range(10)]
        before = sum(supernet.evaluate(archs))
        supernet.train(policy, 60, settings=TrainSettings(lr=0.03), reduction="mean")
        assert sum(supernet.evaluate(archs)) > before


def _elastic_space() -> SearchSpace:
    """Two layers or one, of elastic width, each with a choice of operations; one pair of operations is forbidden."""
    space = SearchSpace("exam")
    node = space.input("x", torch.zeros(4, 6), dynamic={0: "nodes"})
    space.input("edge_index", torch.tensor([[0, 1], [1, 0]]), dynamic={1: "edges"})
    ends: dict[str, Any] = {}
    for i in (1, 2):
        width = Choice(f"width{i}", [4, 8, 16], ordered=True)
        kind = Choice(f"kind{i}", {"relu": Op(nn.ReLU), "prelu": Op(nn.PReLU), "norm": Op(nn.BatchNorm1d)})
        node = space.add(f"kind{i}", kind, space.add(f"linear{i}", Op(nn.Linear, out_features=width), node))
        ends[str(i)] = node
    node = space.add("drop", Op(nn.Dropout, p=Choice("rate", [0.0, 0.2], ordered=True)), Choice("depth", ends))
    space.output(space.add("head", Op(nn.Linear, out_features=2), node))
    space.constrain("not normalised twice", lambda arch: arch["kind1"] != "norm" or arch.get("kind2") != "norm")
    return space


def _two_classes() -> NodeData:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 2
    x = torch.randn(60, 6, generator=generator) + y[:, None]
    nodes = torch.arange(60)
    return NodeData(x, torch.stack([nodes, nodes.roll(1)]), y, nodes[:30], nodes[30:50], nodes[50:])


class SpaceExam:
    """What every search space must do: its networks build, train, export, and are the same wherever they are made.

    ``space`` is a function without arguments that makes the space; its networks return logits ``(n, classes)``, or
    ``(n, length, classes)`` where each position is predicted.
    """

    space: ClassVar[Callable[[], SearchSpace]]
    classes: ClassVar[int]
    samples: ClassVar[int] = 20
    exported: ClassVar[int] = 2  # how many networks leave in each of ``formats`` and are loaded in another process
    formats: ClassVar[tuple[str, ...]] = ("code", "torch-export")

    def drawn(self, count: int) -> tuple[SearchSpace, list[Architecture]]:
        """The space and ``count`` random architectures, the same ones in each test."""
        space, rng = type(self).space(), random.Random(0)
        return space, [space.sample(rng) for _ in range(count)]

    def test_samples_build_run_and_train(self) -> None:
        space, architectures = self.drawn(self.samples)
        inputs = tuple(declared.example for declared in space.inputs.values())
        for architecture in architectures:
            model = build(space, architecture)
            outputs = model(*inputs)
            good = outputs.dim() in (2, 3) and outputs.shape[-1] == self.classes
            assert good, f"{tuple(outputs.shape)}: {architecture}"
            assert outputs.isfinite().all(), architecture
            outputs = outputs.flatten(0, -2)
            loss = nn.functional.cross_entropy(outputs, torch.arange(len(outputs)) % self.classes)
            loss.backward()  # type: ignore[no-untyped-call]
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            assert gradients, f"nothing to train: {architecture}"
            assert all(gradient.isfinite().all() for gradient in gradients), architecture
            assert any(gradient.any() for gradient in gradients), f"no gradient arrives: {architecture}"

    def test_dynamic_axes_may_be_longer(self) -> None:
        space, architectures = self.drawn(self.samples)
        dynamic = tuple(declared.dynamic for declared in space.inputs.values())
        inputs = grown(tuple(declared.example for declared in space.inputs.values()), dynamic)
        for architecture in architectures:
            assert build(space, architecture).eval()(*inputs).isfinite().all(), architecture

    def test_architectures_survive_json(self) -> None:
        space, architectures = self.drawn(self.samples)
        for architecture in architectures:
            again = Architecture.from_json(architecture.to_json())
            assert again == architecture
            assert space.architecture(again) == architecture
            assert space.key(again) == space.key(architecture)

    def test_the_space_is_the_same_each_time_it_is_made(self) -> None:
        (first, drawn), (second, again) = self.drawn(self.samples), self.drawn(self.samples)
        assert first.fingerprint() == second.fingerprint()
        assert drawn == again
        assert [first.key(architecture) for architecture in drawn] == [second.key(a) for a in again]

    def test_a_network_starts_from_its_seed(self) -> None:
        space, architectures = self.drawn(3)
        for architecture in architectures:
            generator = torch.random.get_rng_state()
            first, second = (build(space, architecture, seed=1).state_dict() for _ in range(2))
            assert torch.equal(torch.random.get_rng_state(), generator), "the global random number generator was used"
            assert first.keys() == second.keys()
            assert [name for name in first if not torch.equal(first[name], second[name])] == []

    def test_moves_stay_in_the_space(self) -> None:
        space, architectures = self.drawn(self.samples)
        rng = random.Random(1)
        for first, second in zip(architectures, reversed(architectures), strict=True):
            for child in (space.mutate(first, rng), space.crossover(first, second, rng)):
                assert space.architecture(child) == child
                assert space.violated(child) == []
            assert space.mutate(first, rng) != first

    def test_size_is_not_less_than_what_was_drawn(self) -> None:
        space, architectures = self.drawn(self.samples)
        assert space.size() >= len(set(architectures))

    def test_networks_leave_without_nasgraph(self, tmp_path: Path) -> None:
        from nasgraph.export import Request, export_many

        space, architectures = self.drawn(self.exported)
        requests = [
            Request(build(space, architecture), tmp_path / str(i), space, architecture, self.formats)
            for i, architecture in enumerate(architectures)
        ]
        for architecture, results in zip(architectures, export_many(requests), strict=True):
            for result in results:
                assert result.status == "ok", f"{result.format}: {result.detail}: {architecture}"


class TransformExam:
    """What every transform must do, on a linear layer and on a convolution, whichever it rewrites.

    ``transform`` has a choice in at least one field, and an option that is neutral.
    """

    transform: ClassVar[Transform]
    formats: ClassVar[tuple[str, ...]] = ("code", "torch-export")

    def spaces(self) -> list[tuple[SearchSpace, Tensor]]:
        """A space for each kind of layer that the transform rewrites, and inputs."""
        found = []
        for make, shape in ((nn.Linear, (5, 6)), (nn.Conv2d, (5, 6, 4, 4))):
            if make in self.transform.kinds:
                space = SearchSpace(f"exam_{make.__name__}")
                x = space.input("x", torch.randn(2, *shape[1:], generator=_generator()), {0: "batch"})
                sizes: dict[str, Any] = (
                    {"out_features": 8} if make is nn.Linear else {"out_channels": 8, "kernel_size": 3}
                )
                first = space.add("first", Op(make, **sizes), x, transforms=[self.transform])
                act = space.add("flat", Op(nn.Flatten), space.add("act", Op(nn.ReLU), first))
                space.output(space.add("head", Op(nn.Linear, out_features=3), act))
                found.append((space, torch.randn(shape, generator=_generator())))
        assert found, f"{type(self.transform).__name__} rewrites neither nn.Linear nor nn.Conv2d"
        return found

    def test_a_neutral_option_is_the_plain_network_bit_for_bit(self) -> None:
        for space, x in self.spaces():
            every = list(space.enumerate())
            plain = [a for a in every if type(build(space, a).get_submodule("first")) in (nn.Linear, nn.Conv2d)]
            assert plain, "no option is neutral"
            assert len(plain) < len(every), "every option is neutral"
            first = build(space, plain[0])
            for architecture in plain:
                assert space.key(architecture) == space.key(plain[0])
                assert torch.equal(build(space, architecture)(x), first(x))

    def test_one_key_is_one_network_and_two_keys_are_two(self) -> None:
        for space, x in self.spaces():
            keys: dict[str, str] = {}
            for architecture in space.enumerate():
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    graph = space.resolve(architecture)  # the settings as they were given
                    network = behaviour(build_graph(space, graph), x)
                assert keys.setdefault(space.key(architecture), network) == network, architecture
            assert len(set(keys.values())) == len(keys), "settings without an effect: see Transform.canonical"

    def test_subnets_of_a_supernet_equal_their_extraction(self) -> None:
        for space, x in self.spaces():
            supernet = Supernet(space)
            for architecture in space.enumerate():
                subnet, alone = supernet.subnet(architecture), supernet.extract(architecture)
                for n in (1, 2, 5):
                    assert torch.equal(subnet.eval()(x[:n]), alone.eval()(x[:n])), architecture

    def test_gradients_reach_all_that_is_trained(self) -> None:
        for space, x in self.spaces():
            for architecture in space.enumerate():
                model = build(space, architecture)
                model(x).square().sum().backward()
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad:
                        assert parameter.grad is not None, f"{name} of {architecture} has no gradient"
                        assert parameter.grad.isfinite().all()

    def test_models_copy_and_their_weights_load_elsewhere(self) -> None:
        for space, x in self.spaces():
            for architecture in space.enumerate():
                model = build(space, architecture, seed=1).eval()
                assert torch.equal(copy.deepcopy(model)(x), model(x))
                other = build(space, architecture, seed=2).eval()
                other.load_state_dict(model.state_dict())
                assert torch.equal(other(x), model(x))

    def test_the_same_on_a_model_that_exists_which_stays_as_it_was(self) -> None:
        model = _small_mlp() if nn.Linear in self.transform.kinds else _small_cnn()
        x = torch.randn((5, 6) if nn.Linear in self.transform.kinds else (5, 3, 8, 8), generator=_generator())
        before, outputs = copy.deepcopy(model.state_dict()), model(x)
        space = SearchSpace.from_module(model, [self.transform_at("0")], inputs=x)
        assert torch.equal(space.model(space.baseline())(x), outputs)
        for architecture in space.enumerate():
            assert space.model(architecture)(x).isfinite().all()
        assert torch.equal(model(x), outputs)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_what_it_says_of_its_bits_is_what_is_stored(self, tmp_path: Path) -> None:
        for space, _ in self.spaces():
            for architecture in space.enumerate():
                deployed = deploy(build(space, architecture))
                tensors, about = contents(deployed)
                save_file(tensors, tmp_path / "weights", metadata={"nasgraph": json.dumps(about)})
                assert count_model_bits(build(space, architecture)) == 8 * sum(each.nbytes for each in tensors.values())
                again, state = unpacked(tmp_path / "weights"), deployed.model.state_dict()
                for name, tensor in state.items():
                    assert torch.equal(again[name], tensor), f"(codes + offset) * scale is not forward's {name}"
                weight = state.get("first.weight")
                few = weight is not None and 8 * len(weight.unique()) <= weight.numel()
                assert not few or "first" in deployed.weights, "few levels that count as floats: see deploy.Coded"

    def transform_at(self, where: str) -> Transform:
        """The transform for modules of that name."""
        return replace(self.transform, where=where)

    def test_networks_leave_without_nasgraph(self, tmp_path: Path) -> None:
        requests = []
        for i, (space, _) in enumerate(self.spaces()):
            architecture = next(a for a in space.enumerate() if "first" in _transformed(build(space, a)))
            model = build(space, architecture)
            requests.append(Request(model, tmp_path / str(i), space, architecture, self.formats))
        for exported in export_many(requests):
            failed = [f"{item.format}: {item.detail}" for item in exported if item.status != "ok"]
            assert not failed, "; ".join(failed)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def behaviour(model: nn.Module, x: Tensor) -> str:
    """A digest of what ``model`` is: names and shapes of its parameters, buffers, results and gradients on ``x``.

    Its parameters get numbers that their names decide, so networks are compared at equal weights.
    """
    digest = hashlib.sha256()
    x = x.clone().requires_grad_(x.is_floating_point())
    for name, parameter in sorted(model.named_parameters()):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.requires_grad}".encode())
    for training in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            out = model.train(training)(x)
        wanted = [each for _, each in sorted(model.named_parameters()) if each.requires_grad]
        inputs = [x, *wanted] if x.requires_grad else wanted
        found = torch.autograd.grad(out.square().sum(), inputs, materialize_grads=True, allow_unused=True)
        for tensor in (out, *found, *(buffer for _, buffer in sorted(model.named_buffers()))):
            digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _transformed(model: nn.Module) -> set[str]:
    """Nodes whose operation is not the plain layer."""
    plain = (nn.Linear, nn.Conv2d, nn.ReLU, nn.Flatten)
    return {name for name, child in model.named_children() if type(child) not in plain}


def _small_mlp() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def _small_cnn() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))


class ExporterExam:
    """What every exporter must do: write plain, graph and image networks so that they load without nasgraph.

    ``format`` is the exporter's name, or ``module:function``.
    """

    format: ClassVar[str]

    @pytest.fixture(scope="class")
    @classmethod
    def exported(cls, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Request, Exported]]:
        """The result for each kind of network; all are loaded in one process."""
        folder = tmp_path_factory.mktemp("exam")
        requests = {}
        for space in (_plain_network(), _graph_network(), _image_network()):
            arch = space.architecture({})
            model = build(space, arch).train()
            requests[space.name] = Request(model, folder / space.name, space, arch, formats=[cls.format])
        results = export_many(list(requests.values()))
        return {name: (request, result[0]) for (name, request), result in zip(requests.items(), results, strict=True)}

    @pytest.mark.parametrize("kind", ["plain", "graph", "image"])
    def test_the_file_reproduces_the_model(self, kind: str, exported: dict[str, tuple[Request, Exported]]) -> None:
        _, result = exported[kind]
        assert (result.format, result.status) == (self.format, "ok"), result.detail
        assert result.path is not None and result.path.is_file()
        assert result.max_abs_diff is not None and result.max_abs_diff <= 1e-4

    @pytest.mark.parametrize("kind", ["plain", "graph", "image"])
    def test_leaves_the_model_as_it_was(self, kind: str, exported: dict[str, tuple[Request, Exported]]) -> None:
        request, _ = exported[kind]
        fresh = build(request.space, request.architecture).state_dict()
        assert request.model.training
        assert all(torch.equal(tensor, fresh[name]) for name, tensor in request.model.state_dict().items())

    def test_damage_is_found(self, exported: dict[str, tuple[Request, Exported]]) -> None:
        request, result = exported["plain"]
        verify(request.folder)
        assert result.path is not None
        content = result.path.read_bytes()
        try:
            result.path.write_bytes(content + b" ")
            with pytest.raises(DamagedFile, match=result.path.name):
                verify(request.folder)
        finally:
            result.path.write_bytes(content)


def _plain_network() -> SearchSpace:
    space = SearchSpace("plain")
    node = space.input("x", torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), {0: "batch"})
    node = space.add("norm", Op(nn.BatchNorm1d), space.add("first", Op(nn.Linear, out_features=8), node))
    space.output(space.add("head", Op(nn.Linear, out_features=3), space.add("drop", Op(nn.Dropout), node)))
    return space


def _graph_network() -> SearchSpace:
    from torch_geometric.nn import GATConv, GCNConv

    space = SearchSpace("graph")
    x, edges = node_batch().inputs
    node = space.input("x", x, {0: "nodes"})
    edge_index = space.input("edge_index", edges, {1: "edges"})
    first = space.add("act", Call(torch.relu), space.add("first", Op(GCNConv, out_channels=8), node, edge_index))
    second = space.add("second", Op(GATConv, out_channels=4, heads=2), first, edge_index)
    space.output(space.add("sum", Call(add), first, second))
    return space


def _image_network() -> SearchSpace:
    space = SearchSpace("image")
    node = space.input("image", torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), {0: "batch"})
    node = space.add("norm", Op(nn.BatchNorm2d), space.add("conv", Op(nn.Conv2d, out_channels=4, kernel_size=3), node))
    node = space.add("flat", Op(nn.Flatten), space.add("pool", Op(nn.AdaptiveAvgPool2d, output_size=1), node))
    space.output(space.add("head", Op(nn.Linear, out_features=10), node))
    return space
