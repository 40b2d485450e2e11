"""Few-shot supernets: where they split, against brute force and networks alone; and that no bit moves at the split."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nasgraph.errors import ConfigError, DamagedFile, NotFinite, SpaceError
from nasgraph.search_spaces.gnn_node import gnn_node
from nasgraph.search_spaces.inputs import graph_inputs
from nasgraph.search_spaces.nasbench201 import nasbench201
from nasgraph.space import Architecture, Choice, Op, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.tasks.batch import Batch
from nasgraph.tasks.node import NodeData, NodeTask
from nasgraph.training.fewshot import FILE, Domain, FewShot, inherited
from nasgraph.training.policies import Uniform
from nasgraph.training.splitting import (
    Split,
    _alike,
    best_split,
    bipartition,
    gradient_distances,
    lid,
    lid_distances,
)

_spec = importlib.util.spec_from_file_location("random_spaces", Path(__file__).parents[1] / "test_space.py")
assert _spec is not None and _spec.loader is not None
_random = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_random)


def data() -> NodeData:
    """90 nodes of 3 classes that their features tell apart, edges within a class."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.nn.functional.one_hot(y, 3).float().repeat(1, 4) + 0.3 * torch.randn(90, 12, generator=generator)
    source = torch.arange(90).repeat(3)
    target = (source + 3 * torch.randint(1, 30, (270,), generator=generator)) % 90
    nodes = torch.randperm(90, generator=generator)
    return NodeData(x, torch.stack([source, target]), y, nodes[:40].sort()[0], nodes[40:65], nodes[65:])


TASK = NodeTask("blocks", data)


def space() -> SearchSpace:
    return gnn_node(12, 3, layers=2, widths=(8, 16)).narrowed(
        {
            "conv1": ["gat", "gcn", "sage_mean", "fc"],
            "conv2": ["gin", "gcn", "skip"],
            "activation": ["relu", "tanh"],
            "norm": ["none", "batch"],
            "propagate": ["none"],
            "head": ["linear"],
        }
    )


def uniform(leaf: Supernet) -> Uniform:
    return Uniform(leaf.space)


def samples(space: SearchSpace, n: int = 25) -> list[Architecture]:
    rng = random.Random(0)
    return [space.sample(rng) for _ in range(n)]


@pytest.fixture(scope="module")
def trained() -> Supernet:
    supernet = Supernet(space(), TASK)
    supernet.train(Uniform(supernet.space), 10)
    return supernet


@pytest.fixture(scope="module")
def few(trained: Supernet) -> FewShot:
    return FewShot.split(trained, leaves=4, repeats=2)


# ---- intrinsic dimension ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [1, 2, 4])
def test_points_on_a_plane_have_its_dimension(dimension: int) -> None:
    """The estimate with ``k`` in place of ``k - 2`` is too large by ``k / (k - 2)`` where the density is constant."""
    generator = torch.Generator().manual_seed(dimension)
    plane = torch.linalg.qr(torch.randn(12, dimension, generator=generator))[0].T
    flat = torch.rand(1500, dimension, generator=generator)
    inner = ((flat > 0.2) & (flat < 0.8)).all(dim=1)  # those at the border have neighbours on one side
    k = 20
    assert float(lid(flat @ plane, k)[inner].mean()) == pytest.approx(dimension * k / (k - 2), rel=0.05)


def test_the_estimate_is_its_formula() -> None:
    points = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i, value in enumerate(lid(points, k=5).tolist()):
        near = sorted(math.dist(points[i].tolist(), other.tolist()) for j, other in enumerate(points) if j != i)[:5]
        assert value == pytest.approx(-5 / sum(math.log(r / near[-1]) for r in near))


def test_copies_are_no_neighbours_and_equal_distances_fill_the_space() -> None:
    assert lid(torch.ones(9, 4)).tolist() == [0.0] * 9  # one point, nine times
    assert lid(torch.eye(5)).tolist() == [5.0] * 5
    points = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(lid(torch.cat([points, points[:1]]), 5)[1:40], lid(torch.cat([points, points[:1]]), 5)[1:40])
    assert torch.isfinite(lid(torch.cat([points, points]), 5)).all()
    assert lid(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), k=20).shape == (3,)


# ---- two groups -------------------------------------------------------------------------------------------------


def symmetric(n: int, seed: int) -> Tensor:
    upper = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).triu(1)
    return upper + upper.T


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_the_groups_are_those_of_brute_force(n: int, balanced: bool) -> None:
    for seed in range(5):
        distances = symmetric(n, seed)

        def within(group: tuple[int, ...], distances: Tensor = distances) -> float:
            return sum(float(distances[i, j]) for i, j in itertools.combinations(group, 2))

        everything = []
        for size in range(1, n):
            for first in itertools.combinations(range(n), size):
                second = tuple(i for i in range(n) if i not in first)
                if 0 in first and (not balanced or abs(len(first) - len(second)) <= 1):
                    everything.append((within(first) + within(second), (first, second)))
        groups, between = bipartition(distances, balanced)
        assert groups == min(everything)[1]
        assert between == pytest.approx(within(tuple(range(n))) - min(everything)[0])


def test_groups_of_any_size_are_found() -> None:
    """One option apart from all others stands alone; the published code puts exactly two into the first group."""
    distances = torch.full((6, 6), 0.01, dtype=torch.float64).fill_diagonal_(0)
    distances[4, :] = distances[:, 4] = 1.0
    assert bipartition(distances)[0] == ((0, 1, 2, 3, 5), (4,))
    for apart in ((1,), (1, 15), (15,), (3, 9, 14)):  # of so many options not all groupings are compared at once
        others = tuple(i for i in range(16) if i not in apart)
        distances = torch.full((16, 16), 0.01, dtype=torch.float64)
        distances[torch.tensor(apart)[:, None], torch.tensor(others)] = 1.0
        assert bipartition(torch.maximum(distances, distances.T).fill_diagonal_(0))[0] == (others, apart)
    with pytest.raises(SpaceError, match="21 options cannot be put into two groups"):
        bipartition(symmetric(21, 0))


# ---- distances --------------------------------------------------------------------------------------------------


def slow_gradient_distances(
    supernet: Supernet, archs: list[Architecture], batch: Batch, node: str
) -> list[list[float]]:
    """From the networks alone, entry by entry; nodes have equal sizes in all of them."""
    found: list[dict[tuple[str, int], float]] = []
    for arch in archs:
        model = supernet.extract(arch).train()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            batch.loss(model).backward()  # type: ignore[no-untyped-call]
        entries = {}
        for name, parameter in model.named_parameters():
            if name.split(".")[0] != node and parameter.grad is not None:
                entries.update({(name, i): value for i, value in enumerate(parameter.grad.flatten().tolist())})
        found.append(entries)

    def product(a: dict[tuple[str, int], float], b: dict[tuple[str, int], float]) -> float:
        return math.fsum(value * b.get(key, 0.0) for key, value in a.items())

    return [[1 - product(a, b) / math.sqrt(product(a, a) * product(b, b)) for b in found] for a in found]


@pytest.mark.parametrize("name", ["conv1", "conv2"])
def test_gradient_distances_are_those_of_the_networks_alone(trained: Supernet, name: str) -> None:
    batch = TASK.batch(20, 0)
    for seed in range(3):
        alike = _alike(trained.space, trained.space.choices[name], random.Random(seed))
        assert [arch[name] for arch in alike] == list(trained.space.choices[name].labels)
        expected = slow_gradient_distances(trained, alike, batch, name)
        before = {key: parameter.grad for key, parameter in trained.store.items()}
        found = gradient_distances(trained, alike, batch, frozenset([name]), 5)
        assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6)
        assert all(parameter.grad is before[key] for key, parameter in trained.store.items())


def test_architectures_that_are_compared_differ_in_one_choice_only(trained: Supernet) -> None:
    for seed in range(10):
        for choice in trained.space.choices.values():
            alike = _alike(trained.space, choice, random.Random(seed))
            for one, other in itertools.combinations(alike, 2):
                assert one[choice.name] != other[choice.name]
                assert all(one[name] == other[name] for name in one if name in other and name != choice.name)


class Scale(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


class Keep(nn.Module):
    """The first ``n`` channels; zero in place of the others."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, : self.n], torch.zeros_like(x[:, self.n :])], dim=1)


def one_choice(options: dict[str, Op]) -> Supernet:
    space = SearchSpace("planted")
    x, _ = graph_inputs(space, 12)
    h = space.add("middle", Choice("planted", options), x)
    h = space.add("act", Choice("harmless", {"a": Op(nn.Identity), "b": Op(Scale, by=1.01)}), h)
    space.output(space.add("head", Op(nn.Linear, out_features=3), h))
    return Supernet(space, TASK)


def test_options_that_pull_apart_are_put_apart() -> None:
    """The gradient of the head is its input times the error, so a negated input turns it round."""
    supernet = one_choice({name: Op(Scale, by=by) for name, by in zip("abcd", (0.1, -0.1, 0.2, -0.2), strict=True)})
    found = best_split(supernet, supernet.space, gradient_distances, repeats=3)
    assert found.choice == "planted" and found.groups == (("a", "c"), ("b", "d"))
    assert 4 < found.scores["planted"] <= 8  # four pairs, each beyond a right angle; the bias does not turn round
    assert found.scores["harmless"] < 0.01


def test_options_of_unlike_dimension_are_put_apart() -> None:
    supernet = one_choice({name: Op(Keep, n=n) for name, n in zip("abcd", (1, 12, 1, 11), strict=True)})
    found = best_split(supernet, supernet.space, lid_distances, repeats=3)
    assert found.choice == "planted" and found.groups == (("a", "c"), ("b", "d"))


def test_an_option_that_cuts_the_gradient_is_far_from_the_others() -> None:
    supernet = one_choice({"a": Op(Scale, by=1.0), "zero": Op(Scale, by=0.0), "b": Op(Scale, by=2.0)})
    head = supernet.store["head", "Linear", "bias"]
    own = frozenset(["middle", "head"])  # nothing is left that has a gradient
    alike = _alike(supernet.space, supernet.space.choices["planted"], random.Random(0))
    assert gradient_distances(supernet, alike, TASK.batch(20, 0), own, 0).tolist() == [[0.0] * 3] * 3
    apart = lid_distances(supernet, alike, TASK.batch(20, 0), own, 0)
    assert apart[0, 1] == apart[1, 2] == 1 and apart[0, 2] < 0.01
    with torch.no_grad():
        head.fill_(torch.nan)
    for measure in (gradient_distances, lid_distances):
        with pytest.raises(NotFinite, match="planted"):
            measure(supernet, alike, TASK.batch(20, 0), frozenset(["middle"]), 0)


# ---- the split --------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(_random.spaces(), st.data())
def test_leaves_are_a_partition(space: SearchSpace, data: st.DataObject) -> None:
    domains = [Domain({})]
    for _ in range(2):
        halves: list[Domain] = []
        for domain in domains:
            open_ = [
                c for c in domain.space(space).choices.values() if len(c.labels) > 1 and c.name not in domain.labels
            ]
            assume(open_)
            choice = data.draw(st.sampled_from(open_))
            size = data.draw(st.integers(1, len(choice.labels) - 1))
            halves += domain.halves(choice.name, (choice.labels[:size], choice.labels[size:]))
        domains = halves
    found = [list(domain.space(space).enumerate()) for domain in domains]
    together = [arch for part in found for arch in part]
    assert len(together) == len(set(together))
    assert set(together) == set(_random.everything(space))
    for domain, part in zip(domains, found, strict=True):
        assert all((arch in domain) == (arch in set(part)) for arch in together)


def test_no_bit_moves_at_the_split(trained: Supernet, few: FewShot) -> None:
    archs = samples(trained.space, 40)
    assert {id(few.leaf(arch)) for arch in archs} == {id(leaf) for _, leaf in few.leaves}
    for arch in archs:
        torch.manual_seed(0)
        one = trained.subnet(arch).train()(*TASK.inputs)
        torch.manual_seed(0)
        assert torch.equal(few.subnet(arch).train()(*TASK.inputs), one)
        assert torch.equal(few.extract(arch).eval()(*TASK.inputs), trained.extract(arch).eval()(*TASK.inputs))
        assert few.params(arch) == trained.params(arch)
    assert few.evaluate(archs) == trained.evaluate(archs)


def test_the_split_is_drawn_from_its_seed_and_leaves_the_supernet_alone(trained: Supernet) -> None:
    before = {key: parameter.detach().clone() for key, parameter in trained.store.items()}
    state = torch.random.get_rng_state()
    one, same, other = (FewShot.split(trained, repeats=2, seed=seed).splits for seed in (0, 0, 1))
    assert one == same and one[0].scores != other[0].scores
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(parameter, before[key]) for key, parameter in trained.store.items())
    assert trained.step == 10


def test_each_leaf_trains_what_it_has(trained: Supernet) -> None:
    few = FewShot.split(trained, by="lid", repeats=1)
    first, second = (leaf for _, leaf in few.leaves)
    archs = samples(second.space, 5)
    before = few.evaluate(archs), [few.extract(arch).state_dict() for arch in archs]
    first.train(Uniform(first.space), 3)
    after = few.evaluate(archs), [few.extract(arch).state_dict() for arch in archs]
    assert before[0] == after[0]
    for one, other in zip(before[1], after[1], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    told: list[int] = []
    assert len(few.train(uniform, 4, on_step=lambda step, losses: told.append(step))) == 1 + 4
    assert told == [3, 4, 5, 6, 7] and few.step == 8 and [leaf.step for _, leaf in few.leaves] == [4, 4]
    assert few.train("nasgraph.training.policies:Uniform", 5)[:0] == [] and few.step == 10


def test_leaves_split_again_after_training(trained: Supernet) -> None:
    few = FewShot.split(trained, repeats=1)
    few.train(uniform, 2)
    again = FewShot.split(few, repeats=1)
    assert len(again.leaves) == 4 and len(again.splits) == 3
    for domain, _ in again.leaves:
        assert len(domain.labels) == 2  # no choice twice
    archs = samples(trained.space)
    assert again.evaluate(archs) == few.evaluate(archs)


def test_a_measure_of_ones_own(trained: Supernet) -> None:
    def by_label(supernet: Supernet, archs: Any, batch: Batch, own: frozenset[str], seed: int) -> Tensor:
        if own != {"conv1"}:
            return torch.zeros(len(archs), len(archs), dtype=torch.float64)
        apart = torch.tensor([0.0 if arch["conv1"] in ("gat", "fc") else 1.0 for arch in archs], dtype=torch.float64)
        return (apart[:, None] - apart[None, :]).abs()

    few = FewShot.split(trained, by=by_label, repeats=1)
    assert few.splits[0].choice == "conv1" and few.splits[0].groups == (("gat", "fc"), ("gcn", "sage_mean"))


def test_it_splits_cells_of_images() -> None:
    space = nasbench201(channels=4, classes=3, cells=1)
    generator = torch.Generator().manual_seed(0)

    class Images:
        def batch(self, n: int, seed: int) -> Batch:
            return Batch((torch.randn(8, 3, 8, 8, generator=generator),), torch.arange(8) % 3)

    for by in ("gradients", "lid"):
        supernet = Supernet(space, Images())  # type: ignore[arg-type]
        few = FewShot.split(supernet, by=by, repeats=1)
        assert sum(len(leaf.space.choices[few.splits[0].choice].labels) for _, leaf in few.leaves) == 5
        assert all(0 <= score < math.inf for score in few.splits[0].scores.values())


# ---- stores of which a leaf needs less -------------------------------------------------------------------------


def kernels(*sizes: int) -> SearchSpace:
    space = SearchSpace("kernels")
    x = space.input("x", torch.zeros(2, 3, 9))
    conv = Op(nn.Conv1d, out_channels=Choice("width", [2, 4]), kernel_size=Choice("kernel", list(sizes)), in_channels=3)
    h = space.add("pool", Op(nn.AdaptiveAvgPool1d, output_size=1), space.add("conv", conv, x))
    space.output(space.add("head", Op(nn.Linear, out_features=3), space.add("flat", Op(nn.Flatten), h)))
    return space


def test_a_leaf_cuts_what_its_parent_cuts(tmp_path: Path) -> None:
    """The middle 3 of the middle 6 of 7 are not the middle 3 of 7: so the leaf, without 7, still stores 7."""
    supernet = Supernet(kernels(3, 6, 7), seed=3)
    domain = Domain({"kernel": (3, 6), "width": (2,)})
    few = FewShot(supernet.space, [(domain, inherited(supernet, domain.space(supernet.space)))])
    x = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    few.save(tmp_path)
    for found in (few, FewShot.load(tmp_path, supernet.space)):
        assert found.leaves[0][1].seed == 3  # of the samples that BatchNorm's statistics are taken on
        assert (
            found.leaves[0][1].store["conv", "Conv1d", "weight"].shape
            == supernet.store["conv", "Conv1d", "weight"].shape
        )
        for arch in found.leaves[0][1].space.enumerate():
            assert torch.equal(found.subnet(arch)(x), supernet.subnet(arch)(x))


# ---- folders ----------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_training_goes_on_to_the_same_bits(trained: Supernet, tmp_path: Path) -> None:
    straight = FewShot.split(trained, repeats=1)
    straight.train(uniform, 5)
    broken = FewShot.split(trained, repeats=1)

    def stop(step: int, losses: Any) -> None:
        if step == 8:
            raise Killed

    with pytest.raises(Killed):
        broken.train(uniform, 5, checkpoint=tmp_path, every=2, on_step=stop)
    again = FewShot.load(tmp_path, space(), TASK)
    assert [leaf.step for _, leaf in again.leaves] == [5, 2] and again.splits == straight.splits
    again.train(uniform, 5, checkpoint=tmp_path, every=2)
    for supernets in zip(straight.leaves, again.leaves, FewShot.load(tmp_path, space(), TASK).leaves, strict=True):
        one, *others = (leaf.store for _, leaf in supernets)
        assert all(torch.equal(one[key], other[key]) for other in others for key in one)
    archs = samples(trained.space)
    assert again.evaluate(archs) == straight.evaluate(archs)


def test_a_folder_that_does_not_fit_is_refused(few: FewShot, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no few-shot supernet in"):
        FewShot.load(tmp_path, space())
    path = few.save(tmp_path)
    again = FewShot.load(tmp_path, space())
    assert [domain for domain, _ in again.leaves] == [domain for domain, _ in few.leaves]
    with pytest.raises(SpaceError, match="with other choices"):
        FewShot.load(tmp_path, space().narrowed({"conv1": ["gcn", "fc"]}))
    about = json.loads(path.read_text())
    about["leaves"][0]["folder"] = about["leaves"][1]["folder"]
    path.write_text(json.dumps(about))
    with pytest.raises(DamagedFile, match=f"{FILE} is not what was written"):
        FewShot.load(tmp_path, space())


# ---- bad input --------------------------------------------------------------------------------------------------


def test_what_cannot_be_split_is_named(trained: Supernet, few: FewShot) -> None:
    for leaves in (0, 1, 3, -2):
        with pytest.raises(ConfigError, match=f"into {leaves}: give a power of 2"):
            FewShot.split(trained, leaves=leaves)
    with pytest.raises(ConfigError, match="Did you mean 'gradients'"):
        FewShot.split(trained, by="gradient")
    with pytest.raises(ConfigError, match="repeats is 0"):
        FewShot.split(trained, repeats=0)
    bare = Supernet(kernels(3, 5), TASK)
    with pytest.raises(SpaceError, match="no choice between operations left to split"):
        FewShot.split(bare)
    with pytest.raises(SpaceError, match="no leaf of 'gnn_node' has"):
        few.leaf({**samples(trained.space)[0], few.splits[0].choice: "nope"})
    with pytest.raises(ConfigError, match="has no task"):
        FewShot.split(Supernet(space()), repeats=1)


def test_a_choice_that_constraints_tie_is_not_measured() -> None:
    supernet = one_choice({"a": Op(Scale, by=1.0), "b": Op(Scale, by=2.0)})
    supernet.space.constrain("tied", lambda arch: (arch["planted"] == "a") == (arch["harmless"] == "a"))
    with pytest.raises(SpaceError, match="no choice between operations left"):
        best_split(supernet, supernet.space, gradient_distances, repeats=1)


def test_a_split_says_what_it_is(few: FewShot) -> None:
    first = few.splits[0]
    assert isinstance(first, Split) and first.scores[first.choice] == max(first.scores.values())
    assert repr(few) == f"FewShot('gnn_node', 4 leaves, {sum(p.numel() for p in few.parameters()):,} numbers)"
