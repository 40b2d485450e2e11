"""Policies against their definitions."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
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
from nasgraph.training.policies import Fair, Path, Policy, Sandwich, Uniform, extremes


def drawn(policy: Policy, step: int, seed: int = 0) -> list[Architecture]:
    found = policy.sample(step, random.Random(f"{seed}/{step}"))
    return [path.architecture if isinstance(path, Path) else path for path in found]


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
