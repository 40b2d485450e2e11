"""The exam fails spaces that are wrong, each in the test that is meant for it."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.testing import SpaceExam


def space_of(*options: Op, name: str = "bad") -> SearchSpace:
    space = SearchSpace(name)
    x = space.input("x", torch.ones(4, 3), dynamic={0: "rows"})
    first = space.add("first", Op(nn.Linear, out_features=Choice("width", [4, 8])), x)
    space.output(space.add("last", Choice("last", list(options)), first))
    return space


class Root(nn.Linear):
    """NaN for negative inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) - 100).sqrt()


class Blind(nn.Linear):
    """Nothing to learn: the output does not depend on a parameter through a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sign()


class Rigid(nn.Linear):
    """Takes four rows, no more."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.scale = nn.Parameter(torch.ones(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Drawn(nn.Linear):
    """Its first weights come from a generator of its own, not from the seed."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        generator = torch.Generator()
        generator.seed()
        with torch.no_grad():
            self.weight.copy_(torch.randn(self.weight.shape, generator=generator))


def good() -> SearchSpace:
    return space_of(Op(nn.Linear, out_features=2))


def wide() -> SearchSpace:
    return space_of(Op(nn.Linear, out_features=3))


def unequal() -> SearchSpace:
    return space_of(Op(nn.Linear, out_features=2), name=f"bad{random.SystemRandom().random()}")


def of(made: type[nn.Module]) -> Callable[[], SearchSpace]:
    return lambda: space_of(Op(made, out_features=2))


def exam(space: Callable[[], SearchSpace]) -> SpaceExam:
    class Exam(SpaceExam):
        classes = 2
        samples = 4

    Exam.space = staticmethod(space)
    return Exam()


TESTS = [name for name in vars(SpaceExam) if name.startswith("test_") and "leave" not in name]


@pytest.mark.parametrize("name", TESTS)
def test_a_good_space_passes(name: str) -> None:
    getattr(exam(good), name)()


@pytest.mark.parametrize(
    ("space", "name"),
    [
        (wide, "test_samples_build_run_and_train"),
        (of(Root), "test_samples_build_run_and_train"),
        (of(Blind), "test_samples_build_run_and_train"),
        (of(Rigid), "test_dynamic_axes_may_be_longer"),
        (of(Drawn), "test_a_network_starts_from_its_seed"),
        (unequal, "test_the_space_is_the_same_each_time_it_is_made"),
    ],
)
def test_a_wrong_space_fails(space: Callable[[], SearchSpace], name: str) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        getattr(exam(space), name)()
