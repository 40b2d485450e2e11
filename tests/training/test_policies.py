"""Policies against their definitions."""

from __future__ import annotations

import importlib.util
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import nn

from nasgraph import registry
from nasgraph.errors import ConfigError, SpaceError
from nasgraph.search_spaces.gnn_node import gnn_node
from nasgraph.search_spaces.nasbench201 import cell_space
from nasgraph.space import Architecture, Choice, Op, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.testing import PolicyExam
from nasgraph.training import policies
from nasgraph.training.distill import adaptive_alpha, kl
from nasgraph.training.policies import (
    Bins,
    Fair,
    Importance,
    Nested,
    Policy,
    Progressive,
    Sandwich,
    Uniform,
    by_size,
    extremes,
)
from nasgraph.training.policies.sizes import by_amount
from nasgraph.transforms import Lora, LowRank, Prune, Quantize

_spec = importlib.util.spec_from_file_location("supernet_spaces", Path(__file__).parents[1] / "supernet_spaces.py")
assert _spec is not None and _spec.loader is not None
_spaces = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_spaces)
small_cnn: Callable[..., SearchSpace] = _spaces.small_cnn


def drawn(policy: Policy, step: int, seed: int = 0) -> list[Architecture]:
    found = policy.sample(step, random.Random(f"{seed}/{step}"))
    return [path.architecture if isinstance(path, policies.Path) else path for path in found]


def steps(policy: Policy, n: int, seed: int = 0) -> Iterator[list[Architecture]]:
    for step in range(n):
        yield drawn(policy, step, seed)


def test_uniform_is_uniform() -> None:
    space = cell_space(4)
    archs = [found for (found,) in steps(Uniform(space), 3000)]
    for name, choice in space.choices.items():
        counts = Counter(arch[name] for arch in archs)
        expected = len(archs) / len(choice.labels)
        statistic = sum((counts[label] - expected) ** 2 / expected for label in choice.labels)
        assert statistic < chi2.isf(1e-4, len(choice.labels) - 1)


@pytest.mark.parametrize("make", [Uniform, Fair])
def test_a_path_depends_on_seed_and_step(make: type[Uniform]) -> None:
    policy, again = make(gnn_node(9, 3)), make(gnn_node(9, 3))
    assert list(steps(policy, 5)) == list(steps(again, 5)) != list(steps(again, 5, seed=1))
    assert drawn(policy, 3) == list(steps(again, 4))[3]


def test_fair_trains_each_option_once_a_round() -> None:
    space = cell_space(4)
    for found in steps(Fair(space), 50):
        for name, choice in space.choices.items():
            assert Counter(arch[name] for arch in found) == dict.fromkeys(choice.labels, 1)


def test_fair_is_balanced_where_choices_are_conditional() -> None:
    space = gnn_node(9, 3)
    for found in steps(Fair(space), 30):
        assert len(found) == 13  # the second layer's operations
        for name, choice in space.choices.items():
            counts = Counter(arch[name] for arch in found if name in arch)
            dealt = [counts[label] for label in choice.labels]
            assert max(dealt) - min(dealt) <= 1


def test_fair_rounds_are_fair_over_time() -> None:
    """A choice of 4 in rounds of 13: one option more in each round, another one each time."""
    space = gnn_node(9, 3)
    counts = Counter(arch["width"] for found in steps(Fair(space), 400) for arch in found)
    assert sum(counts.values()) == 400 * 13
    assert all(abs(count - 1300) < 60 for count in counts.values())


def test_fair_keeps_constraints() -> None:
    space = cell_space(4)
    space.constrain("no none before skip", lambda a: not (a["edge_0_1"] == "none" and a["edge_0_2"] == "skip_connect"))
    for found in steps(Fair(space), 100):
        assert len(found) == 5
        assert not [arch for arch in found if space.violated(arch)]


def widths() -> SearchSpace:
    """Two elastic layers, an activation, and a second layer of either size that need not be there."""
    space = SearchSpace("widths")
    x = space.input("x", torch.zeros(4, 5), {0: "nodes"})
    first = space.add("first", Op(nn.Linear, out_features=Choice("first", [4, 8, 16], ordered=True)), x)
    act = space.add("act", Choice("act", [Op(nn.ReLU), Op(nn.Tanh)]), first)
    drop = space.add("drop", Op(nn.Dropout, p=Choice("rate", [0.0, 0.5], ordered=True)), act)
    second = space.add("second", Op(nn.Linear, out_features=Choice("second", [4, 8], ordered=True)), drop)
    space.output(space.add("head", Op(nn.Linear, out_features=3), Choice("depth", {"1": drop, "2": second})))
    return space


def test_extremes_are_the_largest_and_the_smallest() -> None:
    """The oracle: all 48 architectures."""
    space = widths()
    size = Supernet(space).params
    largest, smallest = extremes(space, size)
    sizes = [size(arch) for arch in space.enumerate()]
    labels = {"act": "ReLU", "rate": 0.0}
    assert set(largest) == set(smallest) == {"first", "second", "depth"}
    assert size(space.architecture({**largest, **labels})) == max(sizes)
    assert size(space.architecture({**smallest, **labels})) == min(sizes)


def test_the_sandwich_has_both_ends() -> None:
    space = widths()
    size = Supernet(space).params
    policy = Sandwich(space, *extremes(space, size), n=3)
    sizes = [size(arch) for arch in space.enumerate()]
    rates = set()
    for found in steps(policy, 30):
        assert len(found) == 5
        assert (size(found[0]), size(found[1])) == (max(sizes), min(sizes))
        rates.add(found[0]["rate"])
    assert rates == {0.0, 0.5}  # has no size, so it is drawn


def test_a_sandwich_of_unknown_labels_is_refused() -> None:
    with pytest.raises(SpaceError, match="no choice 'width'"):
        Sandwich(widths(), {"width": 3}, {})
    with pytest.raises(SpaceError, match="no option 3"):
        Sandwich(widths(), {}, {"first": 3})


# ---- the exam of each ----------------------------------------------------------------------------------------------


def exam(name: str, **arguments: Any) -> type[PolicyExam]:
    def make(space: SearchSpace, supernet: Supernet, steps: int) -> Policy:
        offered = {"space": space, "supernet": supernet, "steps": steps}
        made: Policy = registry.make("policies", name, arguments, offered)
        return made

    return type("Test", (PolicyExam,), {"make": staticmethod(make)})


class TestUniform(exam("uniform")): ...  # type: ignore[misc]


class TestFair(exam("fair")): ...  # type: ignore[misc]


class TestSandwich(exam("sandwich")): ...  # type: ignore[misc]


class TestSandwichAlpha(exam("sandwich", distill="alpha", n=1)): ...  # type: ignore[misc]


class TestProgressive(exam("progressive")): ...  # type: ignore[misc]


class TestNested(exam("nested")): ...  # type: ignore[misc]


class TestBins(exam("bins", every=2, pool=60, bins=4)): ...  # type: ignore[misc]


class TestImportance(exam("importance", reweight=True)): ...  # type: ignore[misc]


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_sizes_are_in_order() -> None:
    """``groups`` makes a network smaller, and exists in one of two operations only."""
    space = SearchSpace("groups")
    x = space.input("x", torch.zeros(2, 4, 3, 3), {0: "batch"})
    groups = Choice("groups", [1, 2, 4], ordered=True)
    conv = Choice("conv", {"full": Op(nn.Conv2d, out_channels=4, kernel_size=1), "grouped": grouped(groups)})
    space.output(space.add("conv", conv, x))
    size = Supernet(space).params
    assert by_size(space, size) == {"groups": (4, 2, 1)}
    assert extremes(space, size) == ({"groups": 1}, {"groups": 4})


def grouped(groups: Choice) -> Op:
    return Op(nn.Conv2d, out_channels=4, kernel_size=1, groups=groups)


def transformed_space() -> SearchSpace:
    """A model with every kind of amount, in no order, and settings that are no amounts."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    bits = Choice("bits.{name}", [4, 32, 2, 8])
    rules = [
        Quantize("*", weight_bits=bits, activation_bits=Choice("inputs", [None, 4, 8]), activations="lsq"),
        Prune("0", keep=Choice("keep", [0.5, 1.0, 0.25]), scores=Choice("scores", ["magnitude", "learned"])),
        LowRank("2", rank=Choice("rank", [2, None, 4])),
        Lora("4", rank=Choice("adapter", [2, 0, 3])),
    ]
    return SearchSpace.from_module(model, rules, inputs=torch.zeros(2, 6))


def test_amounts_of_transforms_are_in_the_order_of_their_numbers() -> None:
    space = transformed_space()
    bits = (2, 4, 8, 32)
    expected = {"bits.0": bits, "bits.2": bits, "bits.4": bits, "inputs": (4, 8, None), "keep": (0.25, 0.5, 1.0)}
    assert by_amount(space) == expected | {"rank": (2, 4, None), "adapter": (0, 2, 3)}
    sizes = by_size(space, Supernet(space).params)
    assert {name: sizes[name] for name in by_amount(space)} == by_amount(space)  # a learned step is a parameter more
    narrow = space.narrowed({"bits.0": [32, 8], "keep": [0.5]})
    assert by_amount(narrow)["bits.0"] == (8, 32) and "keep" not in by_amount(narrow)
    rank = LowRank("0", rank=Choice("rank", [None, 4, 0.25]))
    assert not by_amount(SearchSpace.from_module(nn.Sequential(nn.Linear(8, 8)), [rank]))  # which is more, 4 or 1/4?


def test_the_ends_of_a_sandwich_are_those_of_transforms_too() -> None:
    space = transformed_space()
    policy = Sandwich(space, supernet=Supernet(space))
    bits = dict.fromkeys(["bits.0", "bits.2", "bits.4"])
    most = dict.fromkeys(bits, 32) | {"inputs": None, "keep": 1.0, "rank": None, "adapter": 3}
    least = dict.fromkeys(bits, 2) | {"inputs": 4, "keep": 0.25, "rank": 2, "adapter": 0}
    assert {name: policy.largest[name] for name in most} == most
    assert {name: policy.smallest[name] for name in least} == least
    for found in steps(policy, 5):
        assert all(found[0][name] == label for name, label in most.items())
        assert all(found[1][name] == label for name, label in least.items())
    nested = Nested(space, Supernet(space))
    rng = random.Random(0)
    assert all(nested.at(nested.levels - 1, {}, rng)[name] == label for name, label in most.items())


def test_ends_of_amounts_keep_constraints_and_sizes() -> None:
    """Beside a width, and where the end itself is forbidden."""
    space = SearchSpace("both")
    x = space.input("x", torch.zeros(4, 5), {0: "nodes"})
    low = [Quantize(weight_bits=Choice("bits", [8, 4, 32]))]
    first = space.add("first", Op(nn.Linear, out_features=Choice("width", [8, 4, 16])), x, transforms=low)
    space.output(space.add("head", Op(nn.Linear, out_features=3), first))
    size = Supernet(space).params
    assert extremes(space, size) == ({"width": 16, "bits": 32}, {"width": 4, "bits": 4})
    space.constrain("small", lambda arch: arch["bits"] * arch["width"] <= 128)
    largest, smallest = extremes(space, size)
    assert largest["bits"] * largest["width"] == 128 and smallest == {"width": 4, "bits": 4}  # at the edge


def test_extremes_keep_constraints() -> None:
    space = widths()
    space.constrain("small", lambda arch: arch["first"] != 16)
    largest, _ = extremes(space, Supernet(space).params)
    assert largest["first"] == 8


def test_a_sandwich_needs_sizes() -> None:
    with pytest.raises(ConfigError, match="sandwich needs the supernet, or both largest and smallest"):
        Sandwich(widths(), largest={"first": 16})


def test_a_sandwich_distils_as_asked() -> None:
    space = widths()
    supernet, rng = Supernet(space), random.Random(0)
    for name, divergence in (("kl", kl), ("alpha", adaptive_alpha)):
        first, *others = Sandwich(space, supernet=supernet, distill=name).sample(0, rng)
        assert (first.hard, first.soft) == (1, 0)  # the activation is drawn: nobody is the largest, so labels for all
        assert {(path.hard, path.soft, path.teacher, path.divergence) for path in others} == {(1, 1, 0, divergence)}
        published = Sandwich(space, supernet=supernet, distill=name, hard=0).sample(0, rng)
        assert [path.hard for path in published] == [1, 0, 0, 0]
    ends = extremes(space, supernet.params)
    fixed = [{**labels, "act": "ReLU"} for labels in ends]
    assert [path.hard for path in Sandwich(space, *fixed).sample(0, rng)] == [1, 0, 0, 0]
    with pytest.raises(ConfigError, match="hard is -1"):
        Sandwich(space, *fixed, hard=-1)
    hard = Sandwich(space, supernet=supernet, distill="none").sample(0, rng)
    assert len(hard) == 4 and {(path.hard, path.soft) for path in hard} == {(1, 0)}
    with pytest.raises(ConfigError, match="unknown distillation 'alfa'"):
        Sandwich(space, supernet=supernet, distill="alfa")


# ---- progressive ----------------------------------------------------------------------------------------------------


def test_stages_open_what_changes_least_first() -> None:
    """``second`` is inside ``depth``; the oracle of the order are the sizes of the networks themselves."""
    space = widths()
    supernet = Supernet(space)
    policy = Progressive(space, supernet, steps=40)
    largest = {"first": 16, "second": 8, "depth": "2", "act": "ReLU", "rate": 0.0}
    size = {
        name: supernet.params(space.architecture({**largest, name: least}))
        for name, least in {"first": 4, "second": 4, "depth": "1"}.items()
    }
    opened = [
        {name for name in after if len(after[name]) > len(before[name])}
        for before, after in zip(policy.allowed, policy.allowed[1:], strict=False)
    ]
    assert opened == [{name} for name in sorted(size, key=size.__getitem__, reverse=True)]
    assert policy.starts == [10, 20, 30] and [policy.stage(step) for step in (0, 9, 10, 39)] == [0, 0, 1, 3]
    assert all(len(policy.allowed[-1][name]) == len(space.choices[name].labels) for name in size)


def test_stages_by_hand() -> None:
    space = small_cnn()
    stages = [["kernel*"], {"depth": ["2"]}, {"depth": ["1"], "width?": [4]}]
    policy = Progressive(space, Supernet(space), steps=100, stages=stages, starts=[5, 50, 60], kd_ratio=0)
    names = {0: set(), 1: {"kernel"}, 2: {"kernel", "depth"}, 3: {"kernel", "depth", "width"}}
    seen: dict[int, set[str]] = {stage: set() for stage in names}
    for step in range(100):
        for arch in drawn(policy, step):
            stage = policy.stage(step)
            assert stage > 1 or arch["depth"] == "3"
            assert stage != 2 or arch["depth"] in "23"
            seen[stage] |= {name.rstrip("123") for name, label in arch.items() if label != LARGEST.get(name, label)}
    assert seen == names  # the norms are free: no size, and in no stage


LARGEST = {**{f"kernel{i}": 5 for i in (1, 2, 3)}, **{f"width{i}": 8 for i in (1, 2, 3)}, "depth": "3"}


def test_the_first_stage_trains_the_largest() -> None:
    space = small_cnn()
    supernet = Supernet(space)
    norms = {f"norm{i}": "group" for i in (1, 2, 3)}  # as many parameters as "batch"
    most = supernet.params(space.architecture({**norms, **LARGEST}))
    for (arch,) in steps(Progressive(space, supernet, steps=400), 50):
        assert supernet.params(arch) == most


def test_the_teacher_is_frozen_as_the_first_stage_ends() -> None:
    exam_ = TestProgressive()
    supernet, policy = exam_.made(8)
    assert isinstance(policy, Progressive)
    first = policy.starts[0]
    supernet.train(policy, first)
    (largest, _), batch = extremes(supernet.space, supernet.params), supernet.task.batch(100, 0)
    archs = [arch for arch in map(Architecture, supernet.space.enumerate()) if largest.items() <= arch.items()]
    expected = {arch: batch.outputs(supernet.calibrated(arch)).detach() for arch in archs}
    supernet.train(policy, 8)
    paths = policy.sample(7, random.Random(0))
    assert len(paths) == 2 and {(path.hard, path.soft) for path in paths} == {(1, 1)}
    teacher, state = paths[0].teacher, policy.state()
    assert isinstance(teacher, nn.Module) and not teacher.training and paths[1].teacher is teacher
    assert torch.equal(batch.outputs(teacher), expected[Architecture(state["teacher"])])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": [["kernal1"]]}, "a stage names 'kernal1'.*Did you mean 'kernel1'"),
        ({"stages": ["kernel1"]}, "stage 'kernel1' is a text"),
        ({"stages": [["norm1"]]}, "no option of 'norm1' makes a network larger"),
        ({"stages": [{"kernel1": [7]}]}, "no option 7"),
        ({"starts": [3]}, "give 3 steps that ascend"),
        ({"kd_ratio": -1.0}, "kd_ratio is -1.0"),
    ],
)
def test_bad_stages_are_refused(arguments: dict[str, Any], message: str) -> None:
    space = small_cnn()
    with pytest.raises((ConfigError, SpaceError), match=message):
        Progressive(space, Supernet(space), steps=10, **arguments)


def test_stages_that_no_architecture_meets_are_refused() -> None:
    """Once-for-All's own search loops for ever on constraints that cannot be met."""
    space = widths()
    space.constrain("not both", lambda arch: arch["first"] == 4)
    policy = Progressive(space, Supernet(space), 10, stages=[["second"], {"first": [16]}])
    assert policy.allowed[0]["first"] == (4,)  # the largest that there is
    policy.allowed[0]["first"] = (16,)
    with pytest.raises(SpaceError, match="no architecture of stage 1 met the constraints"):
        policy.sample(0, random.Random(0))


# ---- nested ---------------------------------------------------------------------------------------------------------


def test_nested_subnets_are_nested() -> None:
    """Each stored entry that a smaller subnet of a step reads, a larger one reads too."""
    space = small_cnn(channels=(2, 4, 6, 8))
    supernet = Supernet(space)
    policy = Nested(space, supernet, n=3)
    assert policy.levels == 4
    for found in steps(policy, 20):
        entries = [read(supernet, arch) for arch in sorted(found, key=supernet.params)]
        assert len(found) == 3 and [len(each) for each in entries] == sorted({len(each) for each in entries})
        assert entries[0] < entries[1] < entries[2]


def read(supernet: Supernet, arch: Architecture) -> set[tuple[Any, int]]:
    """The entries of the store that get a gradient."""
    found: set[tuple[Any, int]] = set()
    for parameter in supernet.parameters():
        parameter.grad = None
    sum(slice_.sum() for slice_ in supernet.subnet(arch).slices().values()).backward()  # type: ignore[union-attr]
    for key, parameter in supernet.store.items():
        if parameter.grad is not None:
            found |= {(key, i) for i in parameter.grad.flatten().nonzero().flatten().tolist()}
    return found


def test_nested_levels_are_ratios_and_equally_likely() -> None:
    space = widths()  # 3, 2 and 2 labels
    policy = Nested(space, Supernet(space), n=1, levels=3)
    found = Counter((arch["first"], arch["depth"]) for (arch,) in steps(policy, 900))
    assert set(found) == {(4, "1"), (8, "2"), (16, "2")}  # half way of two labels is the larger
    assert sum((count - 300) ** 2 / 300 for count in found.values()) < chi2.isf(1e-4, 2)
    (largest,) = drawn(Nested(space, Supernet(space), levels=1), 0)
    assert (largest["first"], largest["second"], largest["depth"]) == (16, 8, "2")


def test_nested_needs_an_order_of_labels() -> None:
    with pytest.raises(ConfigError, match="nested needs the supernet"):
        Nested(widths())
    with pytest.raises(SpaceError, match="no option 5"):
        Nested(widths(), order={"first": [5, 8]})


# ---- bins -----------------------------------------------------------------------------------------------------------


def dice() -> SearchSpace:
    """Eight equal layers of which each may be wide: under uniform choices the costs are binomial."""
    space = SearchSpace("dice")
    node = space.input("x", torch.zeros(2, 1), {0: "batch"})
    for i in range(8):
        hidden = Choice(f"hidden{i}", [1, 2, 3], ordered=True)
        node = space.add(f"wide{i}", Op(nn.Linear, out_features=hidden), node)
        node = space.add(f"back{i}", Op(nn.Linear, out_features=1), node)
    space.output(node)
    return space


def test_bins_flatten_the_costs() -> None:
    space = dice()
    supernet = Supernet(space)
    policy = Bins(space, supernet, bins=5, log=False, pool=400, every=0)
    edges = [min(map(supernet.params, policy.members[0])), max(map(supernet.params, policy.members[-1]))]
    assert edges == [8 * 4, 8 * 10]  # both ends of the space

    def histogram(of: Policy) -> list[int]:
        counts = [0] * 5
        for (arch,) in steps(of, 1000):
            counts[min(4, int(5 * (supernet.params(arch) - edges[0]) / (edges[1] - edges[0])))] += 1
        return counts

    def statistic(counts: list[int]) -> float:
        return sum((count - 200) ** 2 / 200 for count in counts)

    assert statistic(histogram(policy)) < chi2.isf(1e-4, 4)
    assert statistic(histogram(Uniform(space))) > 10 * chi2.isf(1e-4, 4)


def test_bins_that_lag_are_drawn_more() -> None:
    space = dice()
    policy = Bins(space, Supernet(space), bins=4, pool=200, shift=0.5)
    assert policy.probabilities() == [0.25] * 4
    policy.load({"losses": [1.0, 2.0]})
    assert policy.losses == [None] * 4  # of a training with other bins
    policy.load({"losses": [1.0, 0.5, 0.5, None]})
    assert policy.probabilities() == [0.25] * 4  # not measured yet
    policy.losses = [1.5, 1.0, 0.5, 0.5]  # gaps 1, 0.5, 0, 0
    assert policy.probabilities() == pytest.approx([0.125 + 1 / 3, 0.125 + 1 / 6, 0.125, 0.125])
    counts = Counter(sum(label for label in arch.values()) for (arch,) in steps(policy, 2000))  # type: ignore[misc]
    edges = [max(sum(arch.values()) for arch in members) for members in policy.members]  # type: ignore[arg-type]
    small = sum(count for total, count in counts.items() if total <= edges[0])
    assert abs(small / 2000 - policy.probabilities()[0]) < 0.05


def test_bins_measure_the_validation_loss() -> None:
    supernet, _ = TestBins().made()
    policy = Bins(supernet.space, supernet, bins=3, pool=60, every=2, decay=0.25)
    expected: list[float] = []

    def measured(step: int) -> list[float]:
        rng = random.Random(f"bins/0/{step}")
        picked = [rng.choice(members) for members in policy.members]
        return [supernet.task.score(supernet.calibrated(arch), "val")["loss"] for arch in picked]

    supernet.train(policy, 1)
    assert policy.losses == [None] * 3
    supernet.train(policy, 2)
    assert policy.losses == (expected := measured(1))
    supernet.train(policy, 4)
    assert policy.losses == pytest.approx([0.25 * a + 0.75 * b for a, b in zip(expected, measured(3), strict=True)])


def test_bins_of_ratios() -> None:
    space = widths()
    supernet = Supernet(space)
    cost = {4: 1.0, 8: 4.0, 16: 10.0}
    for log, expected in ((False, [{4, 8}, {16}]), (True, [{4}, {8, 16}])):
        policy = Bins(space, supernet, cost=lambda arch: cost[arch["first"]], bins=2, log=log, least=1, every=0)  # type: ignore[index]
        assert [{arch["first"] for arch in members} for members in policy.members] == expected
    cost = {4: 1.0, 8: 2.0, 16: 100.0}
    policy = Bins(space, supernet, cost=lambda arch: cost[arch["first"]], bins=9, log=False, least=1, every=0)  # type: ignore[index]
    assert [{arch["first"] for arch in members} for members in policy.members] == [{4, 8}, {16}]  # none is empty
    for least in (5, 15):
        found = Bins(space, supernet, bins=9, least=least, every=0).members
        assert sum(map(len, found)) == 36 and min(map(len, found)) >= least
    with pytest.raises(ConfigError, match="costs above 0"):
        Bins(space, supernet, cost=lambda arch: 0.0, log=True)


# ---- importance -----------------------------------------------------------------------------------------------------


def test_importance_is_the_mix_of_scores_and_uniform() -> None:
    space = cell_space(4)
    name = "edge_0_1"
    choice = space.choices[name]
    policy = Importance(space, steps=100, floor=0.2)
    k = len(choice.labels)
    assert policy.probabilities(choice, 100) == [1 / k] * k
    scores = [0.0, 0.0, 1.0, 4.0, 0.0]
    policy.scores = {(name, label): score for label, score in zip(choice.labels, scores, strict=True)}
    assert policy.probabilities(choice, 0) == pytest.approx([1 / k] * k)
    for step, tau in ((50, 0.5), (100, 1.0), (1000, 1.0)):
        expected = [0.2 / k + 0.8 * (tau * score / 5 + (1 - tau) / k) for score in scores]
        assert policy.probabilities(choice, step) == pytest.approx(expected)
        assert min(policy.probabilities(choice, step)) >= 0.2 / k > 0
    counts = Counter(arch[name] for (arch,) in (drawn(policy, 100, seed) for seed in range(3000)))
    expected = [3000 * p for p in policy.probabilities(choice, 100)]
    statistic = sum((counts[label] - e) ** 2 / e for label, e in zip(choice.labels, expected, strict=True))
    assert statistic < chi2.isf(1e-4, k - 1)
    del policy.scores[name, choice.labels[0]]  # not drawn yet: as the mean of the others
    p = policy.probabilities(choice, 100)
    assert p[0] == pytest.approx(0.2 / k + 0.8 * 1.25 / 6.25)


def test_a_score_is_the_gradient_norm_of_the_operation() -> None:
    """The oracle: the network extracted, and the norms of its own gradients."""
    exam_supernet, _ = TestImportance().made()
    space = exam_supernet.space.narrowed({"rate": [0.0]})
    supernet = Supernet(space, exam_supernet.task)
    policy = Importance(space, steps=10, reweight=True, decay=0.25)
    policy.scores = {("kind1", "prelu"): 3.0, ("kind1", "relu"): 1.0, ("kind1", "norm"): 1.0}
    batch, seen = supernet.task.batch(100, 0), set()
    for step in range(12):
        before = dict(policy.scores)
        (path,) = policy.sample(step, random.Random(f"paths/0/{step}"))
        alone = supernet.extract(path.architecture).train()
        batch.losses(batch.outputs(alone)).mean().backward()  # type: ignore[no-untyped-call]
        supernet.train(policy, step + 1)
        for name in {"kind1", "kind2"} & path.architecture.keys():
            label = path.architecture[name]
            norm = sum(float(p.grad.norm()) for p in getattr(alone, name).parameters() if p.grad is not None)
            old = before.get((name, label), norm)
            assert policy.scores[name, label] == pytest.approx(0.25 * old + 0.75 * norm, rel=1e-4)
            assert norm > 0 or label == "relu"
            seen.add(label)
        assert {name for name, _ in policy.scores} <= {"kind1", "kind2"}
    assert seen == {"relu", "prelu", "norm"}


def test_reweighting_makes_the_expectation_uniform() -> None:
    """Over all architectures: sum of p(a) w(a) f(a) is the mean under uniform choices, for any f."""
    space = small_ops()
    policy = Importance(space, steps=10, floor=0.1, reweight=True)
    policy.scores = {("a", "x"): 1.0, ("a", "y"): 5.0, ("a", "z"): 0.0, ("b", "x"): 2.0, ("b", "y"): 0.5}
    archs = list(space.enumerate())
    value = {arch: random.Random(arch.to_json()).random() for arch in archs}
    uniform = weighted = 0.0
    for arch in archs:
        p = q = 1.0
        for name, label in arch.items():
            choice = space.choices[name]
            p *= policy.probabilities(choice, 7)[choice.labels.index(label)]
            q /= len(choice.labels)
        uniform += q * value[arch]
        weighted += p * policy.weight(arch, 7) * value[arch]
    assert weighted == pytest.approx(uniform, rel=1e-12)
    (path,) = policy.sample(7, random.Random(0))
    assert path.weight == policy.weight(path.architecture, 7) != 1


def small_ops() -> SearchSpace:
    """A choice of three operations, and one of two that is asked in one of them only."""
    space = SearchSpace("ops")
    x = space.input("x", torch.zeros(2, 3), {0: "batch"})
    ops = {"x": Op(nn.ReLU), "y": Op(nn.PReLU), "z": Op(nn.Identity)}
    first = space.add("first", Op(nn.Linear, out_features=3), x)
    second = space.add("second", Choice("b", {"x": Op(nn.Linear, out_features=3), "y": Op(nn.ReLU)}), first)
    a = space.add("a", Choice("a", ops), Choice("skip", {"1": first, "2": second}))
    space.output(a)
    return space


@pytest.mark.parametrize("name", ["floor", "decay"])
def test_shares_are_checked(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 1.5: give a number from 0 to 1"):
        Importance(small_ops(), 10, **{name: 1.5})  # type: ignore[arg-type]


# ---- the exam finds what is wrong -----------------------------------------------------------------------------------


class Global(Uniform):
    """Draws from the global generator."""

    def sample(self, step: int, rng: random.Random) -> list[Architecture]:
        return [self.space.sample(random.Random(random.random()))]


class Unlawful(Uniform):
    """Looks at no constraint."""

    def sample(self, step: int, rng: random.Random) -> list[Architecture]:
        return [self.space.architecture({"depth": "2", "kind1": "norm", "kind2": "norm", **WIDTHS})]


WIDTHS = {"width1": 4, "width2": 4, "rate": 0.0}


class Forgetful(Uniform):
    """Repeats what it drew, and does not keep it."""

    last: Architecture | None = None

    def sample(self, step: int, rng: random.Random) -> list[Architecture]:
        return [self.last or self.space.sample(rng)]

    def observe(self, step: policies.Step) -> None:
        (self.last,) = step.architectures


@pytest.mark.parametrize(
    ("policy", "question"),
    [
        (Global, "test_paths_depend_on_seed_and_step"),
        (Unlawful, "test_paths_are_architectures_of_the_space"),
        (Forgetful, "test_the_state_round_trips"),
        (Forgetful, "test_a_resumed_training_has_the_same_bits"),
    ],
)
def test_a_bad_policy_fails(policy: type[Uniform], question: str, tmp_path: Path) -> None:
    class Exam(PolicyExam):
        make = staticmethod(lambda space, supernet, steps: policy(space))

    asked = getattr(Exam(), question)
    with pytest.raises(AssertionError):
        asked(tmp_path) if "bits" in question else asked()
