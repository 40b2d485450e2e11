from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nasgraph.allocation.ranks import (
    AdaLora,
    Allocator,
    DynamicRank,
    Sora,
    allocate,
    architecture,
    cubic,
    gates,
    keep_best,
    linear_schedule,
    norm_shares,
    ranks,
    with_gates,
)
from nasgraph.errors import SpaceError
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.tasks.batch import Batch
from nasgraph.transforms.base import transformed
from nasgraph.transforms.lora import Lora

TRUE = 3  # rank of what layer "0" has to learn; layer "1" has nothing to learn


def gated(gate: float = 0.0, seed: int = 0, rank: int = 6) -> nn.Module:
    """Two frozen layers side by side, adapters with gates."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Sides()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return with_gates(transformed(model, [Lora("*", rank=rank, alpha=4.0)]), gate)


class Sides(nn.Module):
    """The first layer's output is what is learned; the second is only there to be left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 12, bias=False), nn.Linear(16, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x) + 0.02 * self.second(x).tanh()
        return out


class Squared(Batch):
    """A batch of a regression."""

    def loss(self, model: nn.Module) -> Tensor:
        return F.mse_loss(model(*self.inputs), self.target)


def regression(model: nn.Module, steps: int, seed: int = 0) -> list[Batch]:
    """Batches that ask for an update of the first layer of rank 3."""
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.randn(12, TRUE, generator=generator), torch.randn(TRUE, 16, generator=generator)
    x = [torch.randn(64, 16, generator=generator) for _ in range(steps)]
    base = copy.deepcopy(model).eval()
    with torch.no_grad():
        return [Squared((each,), base(each) + each @ (u @ v).T) for each in x]


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_a_gated_adapter_is_b_diag_g_a_and_adds_nothing_at_the_start(gate: float) -> None:
    layer, x = nn.Linear(16, 12), torch.randn(5, 16)
    model = with_gates(transformed(copy.deepcopy(layer), [Lora(rank=4)]), gate)
    (adapter,) = gates(model).values()
    assert torch.equal(model(x), layer(x)) and adapter.adds_nothing()
    assert bool(adapter.B.any()) is (gate == 0) and ranks(model) == {"": 0 if gate == 0 else 4}
    for parameter in adapter.parameters():
        parameter.data.normal_()
    dense = 8.0 * adapter.B @ torch.diag(adapter.g) @ adapter.A
    torch.testing.assert_close(model(x), layer(x) + x @ dense.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter.delta(), dense, rtol=1e-4, atol=1e-4)


def test_without_adapters_there_are_no_gates() -> None:
    with pytest.raises(SpaceError, match="rewrite the model with Lora"):
        with_gates(nn.Linear(2, 2))


def test_the_cubic_schedule() -> None:
    assert [cubic(step, 2, 6, 20, 4) for step in range(8)] == [20, 20, 20, 11, 6, 4, 4, 4]
    assert cubic(4, 2, 6, 20, 4) == round(4 + 16 * 0.5**3)
    assert cubic(5, 5, 5, 20, 4) == 4 and cubic(0, 5, 5, 20, 20) == 20


@given(
    scores=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=4),
    budget=st.integers(-1, 20),
)
@settings(deadline=None)
def test_the_best_of_all_layers_are_kept(scores: list[list[int]], budget: int) -> None:
    masks = keep_best({str(i): torch.tensor(each, dtype=torch.float) for i, each in enumerate(scores)}, budget)
    flat = [(value, i, k) for i, each in enumerate(scores) for k, value in enumerate(each)]
    best = sorted(flat, key=lambda entry: (-entry[0], entry[1], entry[2]))[: max(budget, 0)]
    assert {(i, k) for _, i, k in best} == {
        (int(i), k) for i, m in masks.items() for k in m.nonzero().flatten().tolist()
    }


def test_adalora_scores_by_hand() -> None:
    model = gated(gate=0.0)
    allocator = AdaLora(model, budget=3, steps=10, smooth=(0.8, 0.6))
    generator = torch.Generator().manual_seed(1)
    mean: dict[str, Tensor] = {}
    spread: dict[str, Tensor] = {}
    for _ in range(3):
        for name, adapter in gates(model).items():
            for own in ("g", "A", "B"):
                weight = getattr(adapter, own)
                weight.data = torch.randn(weight.shape, generator=generator)
                weight.grad = torch.randn(weight.shape, generator=generator)
                now = (weight.data * weight.grad).abs()
                key = f"{name}.{own}"
                mean[key] = 0.8 * mean.get(key, 0) + 0.2 * now
                spread[key] = 0.6 * spread.get(key, 0) + 0.4 * (now - mean[key]).abs()
        allocator.observe()
    for name, found in allocator.scores().items():
        for k in range(6):
            s = [mean[f"{name}.{own}"] * spread[f"{name}.{own}"] for own in ("g", "A", "B")]
            torch.testing.assert_close(found[k], s[0][k] + s[1][k].mean() + s[2][:, k].mean())
    allocator.prune(10)
    assert sum(ranks(model).values()) == 3
    every = torch.cat([score for score in allocator.scores().values()])
    kept = torch.cat([adapter.g != 0 for adapter in gates(model).values()])
    assert every[kept].min() >= every[~kept].max()


def test_adalora_with_a_budget_of_everything_or_nothing() -> None:
    for budget in (12, 0):
        model = gated()
        for adapter in gates(model).values():
            adapter.g.data.normal_()
            for parameter in adapter.parameters():
                parameter.grad = torch.ones_like(parameter)
        allocator = AdaLora(model, budget=budget, steps=4)
        allocator.observe()
        allocator.prune(4)
        assert sum(ranks(model).values()) == budget


def test_orthogonality() -> None:
    model = gated()
    for adapter in gates(model).values():
        adapter.A.data, adapter.B.data = torch.eye(6, 16), 2 * torch.eye(12, 6)
    assert float(AdaLora(model, 3, 10, orthogonal=0.5).penalty().detach()) == pytest.approx(0.5 * 6 * 9)


def test_the_soft_threshold_has_no_dead_zone() -> None:
    model = gated(gate=1.0)
    adapter = gates(model)["first"]
    adapter.g.data = torch.tensor([0.15, -0.15, 0.1, -0.05, 0.0, 1.0])
    Sora(model, strength=10.0, lr=0.01).prune(1)
    torch.testing.assert_close(adapter.g.data, torch.tensor([0.05, -0.05, 0.0, 0.0, 0.0, 0.9]))
    assert ranks(model) == {"first": 3, "second": 6}
    before = adapter.g.clone()
    Sora(model, strength=10.0, lr=0.01, warm_up=100).prune(1)  # a hundredth of it
    torch.testing.assert_close(adapter.g[5], before[5] - 0.001)


def test_the_proximal_step_minimises_what_it_should() -> None:
    z, strength = torch.linspace(-1, 1, 41), 0.3
    grid = torch.linspace(-1.5, 1.5, 30001)
    cost = (grid[None] - z[:, None]).square() / 2 + strength * grid.abs()[None]
    torch.testing.assert_close(F.softshrink(z, strength), grid[cost.argmin(1)], rtol=0, atol=1e-3)


def test_norm_shares_are_those_of_the_matrices() -> None:
    adapter = gates(gated())["first"]
    assert not norm_shares(adapter).any()  # as it starts
    for parameter in adapter.parameters():
        parameter.data.normal_()
    parts = [adapter.g[k] * torch.outer(adapter.B[:, k], adapter.A[k]) for k in range(6)]
    expected = torch.stack([part.norm() for part in parts]) / torch.stack(parts).sum(0).norm()
    torch.testing.assert_close(norm_shares(adapter), expected.detach())


def test_components_taken_by_dynamic_rank_stay_away_and_only_when_it_is_time() -> None:
    model = gated()
    allocator = DynamicRank(model, budget=4, steps=100, every=10, smooth=0.0)
    counts = []
    for step in range(1, 101):
        for adapter in gates(model).values():
            adapter.g.data = torch.rand(6) + 0.1  # as an optimizer would bring them back
        allocator.observe()
        allocator.prune(step)
        counts.append(sum(ranks(model).values()))
    assert counts[:19] == [12] * 19  # from step 15 on, at multiples of 10
    assert counts == sorted(counts, reverse=True) and counts[49:] == [4] * 51
    assert counts[19] == cubic(20, 15, 50, 12, 4)
    assert all(a == b for a, b in zip(counts[19:28], counts[20:29], strict=True))


METHODS: dict[str, tuple[float, Callable[[nn.Module], Allocator]]] = {
    "adalora": (0.0, lambda model: AdaLora(model, budget=TRUE, steps=300, orthogonal=0.01)),
    "sora": (1.0, lambda model: Sora(model, strength=0.8, lr=0.01)),
    "dynamic": (0.0, lambda model: DynamicRank(model, budget=TRUE, steps=300, every=10, even=0.0)),
}
LEFT = {"adalora": [(3, 0)], "sora": [(6, k) for k in range(4)], "dynamic": [(2, 1)]}


@pytest.mark.parametrize("method", list(METHODS))
def test_rank_goes_where_there_is_something_to_learn(method: str) -> None:
    """Dynamic rank judges a component within its layer, so by its definition a layer's last one is never the least."""
    gate, make = METHODS[method]
    model = gated(gate)
    batches = regression(model, 300)
    before = float(batches[0].loss(model).detach())
    found = allocate(model, make(model), batches, lr=0.01)
    assert (found["first"], found["second"]) in LEFT[method]
    assert float(batches[0].loss(model).detach()) < 0.6 * before


def test_the_linear_schedule() -> None:
    assert linear_schedule(["a", "b", "c", "d", "e"], 4, 12) == {"a": 4, "b": 6, "c": 8, "d": 10, "e": 12}
    assert linear_schedule(["a", "b", "c"], 8, 3) == {"a": 8, "b": 6, "c": 3}  # 5.5 is rounded up
    assert linear_schedule(["a"], 4, 12) == {"a": 4} and linear_schedule([], 4, 12) == {}


def test_ranks_become_an_architecture() -> None:
    space = SearchSpace("two")
    x = space.input("x", torch.randn(2, 4))
    for name in ("first", "second"):
        lora = Lora(rank=Choice(f"rank.{name}", [0, 2, 8]))
        x = space.add(name, Op(nn.Linear, out_features=4), x, transforms=[lora])
    space.output(space.add("head", Op(nn.Linear, out_features=Choice("out", [2, 3])), x))
    found = architecture(space, {"first": 3, "second": 5})
    assert (found["rank.first"], found["rank.second"]) == (2, 2) and found["out"] in (2, 3)
    assert architecture(space, {"first": 6, "second": 100})["rank.second"] == 8
    with pytest.raises(SpaceError, match=r"no choice 'rank\.third'"):
        architecture(space, {"third": 1})
