from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from nasgraph.allocation.rank_starts import ALLOCATORS, _spread, allocated, rank_choices, rank_trials
from nasgraph.build import build
from nasgraph.errors import ConfigError, SpaceError
from nasgraph.model_space import ModelSpace
from nasgraph.objectives.bits import count_adapter_parameters
from nasgraph.space import Architecture, Choice, Op, SearchSpace
from nasgraph.tasks.batch import Batch
from nasgraph.transforms import Lora, Quantize

RANKS = [0, 1, 2, 4]


class Two(nn.Module):
    """The first layer is what the target changes; the second hardly counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 10), nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.first(x) + 0.01 * self.second(x))
        return out


def space_of(rank: Choice) -> ModelSpace:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        space = SearchSpace.from_module(Two(), [Lora("(first|second)", rank=rank)], inputs=torch.randn(2, 12))
    assert isinstance(space, ModelSpace)
    return space


def batches(n: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    turn = torch.randn(12, 3, generator=generator)
    x = [torch.randn(64, 12, generator=generator) for _ in range(n)]
    return [Batch((each,), (each @ turn).argmax(1)) for each in x]


@pytest.mark.parametrize("method", list(ALLOCATORS))
def test_one_training_gives_architectures_of_all_sizes(method: str) -> None:
    space = space_of(Choice("rank.{name}", RANKS))

    def cost(each: Architecture) -> float:
        return float(count_adapter_parameters(space.model(each)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        left = allocated(space, space.model, space.baseline(), batches(80), method, lr=0.02)
    assert dict(left[0]) == {"rank.first": 4, "rank.second": 4}
    assert dict(left[-1]) == {"rank.first": 0, "rank.second": 0} and len(set(left)) == len(left)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trials = rank_trials(space, space.model, space.baseline(), batches(80), method, cost, n=3, lr=0.02)
    assert trials == _spread(left, cost, 3) and set(trials) < set(left)
    if method == "adalora":  # the others compare within a layer, or by steps of Adam, which have one size everywhere
        sums = [sum(int(each[name] or 0) for each in trials) for name in ("rank.first", "rank.second")]
        assert sums[0] > sums[1]


def test_a_choice_that_layers_share_has_the_mean_of_their_ranks() -> None:
    space = space_of(Choice("rank", RANKS))
    left = allocated(space, space.model, space.baseline(), batches(60), "adalora", lr=0.02)
    assert [each["rank"] for each in left] == [4, 2, 1, 0]


def test_other_choices_and_constraints_hold() -> None:
    space = SearchSpace("declared")
    x = space.input("x", torch.randn(2, 12), {0: "batch"})
    rank, width = Choice("rank", RANKS), Choice("width", [8, 16])
    transforms = [Quantize(weight_bits=Choice("bits", [4, None])), Lora(rank=rank)]
    h = space.add("first", Op(nn.Linear, out_features=width), x, transforms=transforms)
    space.output(space.add("head", Op(nn.Linear, out_features=3), h))
    space.constrain("not one", lambda arch: arch["rank"] != 1)
    assert rank_choices(space) == ["rank"]
    start = Architecture({"rank": 0, "width": 16, "bits": None})
    left = allocated(space, lambda each: build(space, each), start, batches(40), "adalora", lr=0.02)
    assert [(each["rank"], each["width"], each["bits"]) for each in left] == [
        (4, 16, None),
        (2, 16, None),
        (0, 16, None),
    ]


def test_trials_are_the_nearest_to_equal_distances_in_cost() -> None:
    found = [Architecture({"rank": rank}) for rank in (0, 1, 2, 7, 8)]

    def cost(each: Architecture) -> float:
        return float(each["rank"])  # type: ignore[arg-type]

    assert [each["rank"] for each in _spread(found, cost, 3)] == [2, 7]  # 2, 4 and 6 are wanted
    assert _spread(found[:1], cost, 3) == [] == _spread([], cost, 3)


def test_what_cannot_be_allocated_is_refused() -> None:
    space, start = space_of(Choice("rank.{name}", RANKS)), Architecture({"rank.first": 0, "rank.second": 0})
    with pytest.raises(ConfigError, match="unknown allocator 'adalor'.*adalora"):
        allocated(space, space.model, start, batches(2), "adalor")
    fixed = SearchSpace.from_module(Two(), [Quantize("first", weight_bits=Choice("bits", [2, None]))])
    assert rank_choices(fixed) == []
    with pytest.raises(SpaceError, match="no choice of a rank of Lora"):
        allocated(fixed, lambda each: build(fixed, each), fixed.sample(random.Random(0)), batches(2), "sora")
    vera = SearchSpace.from_module(Two(), [Lora("first", rank=Choice("rank", [0, 2]), kind="vera")])
    with pytest.raises(SpaceError, match="'rank' cannot be allocated: gates are for plain adapters .* not VeraLinear"):
        allocated(vera, lambda each: build(vera, each), Architecture({"rank": 0}), batches(2), "sora")
