from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nasgraph.allocation.bits import (
    Allocation,
    Budget,
    allocate,
    hessian_sensitivity,
    hessian_traces,
    output_sensitivity,
    rounded,
    weight_costs,
)
from nasgraph.errors import ConfigError
from nasgraph.tasks.batch import Batch
from nasgraph.transforms.quantize import Quantize

numbers = st.floats(0, 1e3, allow_nan=False) | st.sampled_from([1e-7, 2e-7, 1e7])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Any, list[Budget], list[list[str]]]:
    """Up to 5 layers with up to 3 widths, up to 2 budgets, perhaps two layers tied."""
    layers = [f"layer{i}" for i in range(draw(st.integers(1, 5)))]
    widths = [2, 4, 8][: draw(st.integers(1, 3))]
    table = st.fixed_dictionaries({layer: st.fixed_dictionaries(dict.fromkeys(widths, numbers)) for layer in layers})
    budgets = []
    for name in ["size", "time"][: draw(st.integers(1, 2))]:
        costs = draw(table)
        least, most = (sum(pick(row.values()) for row in costs.values()) for pick in (min, max))
        budgets.append(Budget(name, costs, least + (most - least) * draw(st.sampled_from([-0.1, 0.0, 0.3, 0.6, 1.0]))))
    tied = [layers[:2]] if len(layers) > 1 and draw(st.booleans()) else []
    return draw(table), budgets, tied


def brute_force(sensitivity: Any, budgets: list[Budget], tied: list[list[str]]) -> float | None:
    best = None
    for bits in itertools.product(*(row for row in sensitivity.values())):
        chosen = dict(zip(sensitivity, bits, strict=True))
        if any(len({chosen[layer] for layer in group}) > 1 for group in tied):
            continue
        totals = [(sum(budget.costs[layer][b] for layer, b in chosen.items()), budget.limit) for budget in budgets]
        if all(total <= limit + 1e-9 * abs(limit) for total, limit in totals):
            value = sum(sensitivity[layer][b] for layer, b in chosen.items())
            best = value if best is None else min(best, value)
    return best


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_allocation_is_the_best_of_all(problem: tuple[Any, list[Budget], list[list[str]]]) -> None:
    sensitivity, budgets, tied = problem
    best = brute_force(*problem)
    if best is None:
        with pytest.raises(ConfigError, match="smallest"):
            allocate(*problem)
        return
    found = allocate(*problem)
    spread = max(max(row.values()) for row in sensitivity.values())
    assert found.sensitivity <= best + 1e-9 * max(spread, best)
    for budget in budgets:
        cost = sum(budget.costs[layer][bits] for layer, bits in found.bits.items())
        assert cost <= budget.limit * (1 + 1e-9) and cost == pytest.approx(found.costs[budget.name])
    assert all(len({found.bits[layer] for layer in group}) == 1 for group in tied)


TWO = {"a": {4: 1.0, 8: 0.0}, "b": {4: 3.0, 8: 0.0}}
SIZE = {"a": {4: 4.0, 8: 8.0}, "b": {4: 4.0, 8: 8.0}}


def test_an_allocation_by_hand() -> None:
    assert allocate(TWO, [Budget("size", SIZE, 12)]) == Allocation({"a": 4, "b": 8}, 1.0, {"size": 12.0})
    assert allocate(TWO, [Budget("size", SIZE, 12)], tied=[["a", "b"]]).bits == {"a": 4, "b": 4}
    assert allocate(TWO, []).bits == {"a": 8, "b": 8}


def test_a_budget_that_nothing_meets_is_told_with_the_smallest_that_something_does() -> None:
    with pytest.raises(ConfigError, match="budget 'size' is 7: the smallest that an allocation meets is 8"):
        allocate(TWO, [Budget("size", SIZE, 7)])
    other = {layer: {4: 8.0, 8: 4.0} for layer in TWO}  # slower with fewer bits
    with pytest.raises(ConfigError, match="smallest 'size' that an allocation meets is 16, and its budget is 12"):
        allocate(TWO, [Budget("size", SIZE, 12), Budget("time", other, 8)])


def test_tables_that_do_not_fit_together() -> None:
    for change, message in [
        (lambda: allocate(TWO, [Budget("size", {"a": SIZE["a"]}, 9)]), "budget 'size' has no number for layer 'b'"),
        (lambda: allocate({"a": {4: float("nan")}}, []), "layer 'a' at 4 bits is nan"),
        (lambda: allocate(TWO, [], [["a", "bb"]]), "'bb' has no sensitivities. Did you mean 'b'"),
        (lambda: allocate(TWO | {"c": {2: 1.0}}, [], [["a", "c"]]), "have different widths"),
    ]:
        with pytest.raises(ConfigError, match=message):
            change()


# ---- sensitivities --------------------------------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for seed, parameter in enumerate(model.parameters()):
        parameter.data.copy_(0.4 * normal(*parameter.shape, seed=seed))
    return model


BATCHES = [Batch((normal(8, 4, seed=i).double(),), torch.arange(8) % 3) for i in range(2)]


def exact_traces(model: nn.Module) -> list[float]:
    found = []
    for name in ("0.weight", "2.weight"):
        weight = model.get_parameter(name).detach()

        def loss(value: Tensor, name: str = name) -> Tensor:
            losses = []
            for batch in BATCHES:
                state = {**dict(model.named_parameters()), name: value}
                outputs = torch.func.functional_call(model, state, batch.inputs)
                losses.append(nn.functional.cross_entropy(outputs, batch.target))
            return torch.stack(losses).mean()

        hessian = torch.autograd.functional.hessian(loss, weight)
        found.append(float(hessian.reshape(weight.numel(), -1).diagonal().mean()))
    return found


def test_hutchinsons_traces_approach_those_of_the_hessian() -> None:
    model = network()
    estimates = hessian_traces(model, BATCHES, probes=1000)
    assert list(estimates) == ["0", "2"]
    assert list(estimates.values()) == pytest.approx(exact_traces(model), rel=0.1)
    assert hessian_traces(model, BATCHES) == hessian_traces(model, BATCHES) != hessian_traces(model, BATCHES, seed=1)


class Squares(nn.Module):
    """A loss whose Hessian is diagonal: each probe is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Weighed(Batch):
    def loss(self, model: nn.Module) -> Tensor:
        weight: Tensor = model.get_parameter("lin.weight")
        return (weight.square() * torch.arange(6.0).reshape(2, 3)).sum()


def test_hutchinsons_trace_of_a_diagonal_hessian_needs_one_probe() -> None:
    batch = Weighed((normal(1),), torch.zeros(1, dtype=torch.long))
    assert hessian_traces(Squares(), [batch], probes=1) == {"lin": pytest.approx(2 * 15 / 6)}


def test_sensitivities_are_the_trace_times_the_error_and_the_error_of_the_output() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = hessian_sensitivity(model, {"0": 2.0, "2": -1.0}, [2, 4, 8])
    weight = model.get_parameter("0.weight").detach()
    assert table["0"][4] == pytest.approx(2 * float((rounded(weight, 4) - weight).square().sum()))
    assert table["2"] == {2: 0.0, 4: 0.0, 8: 0.0}
    outputs = output_sensitivity(model, BATCHES, [2, 4, 8, 32], Quantize(method="minmax", per="channel"))
    for row in outputs.values():
        assert row[2] > row[4] > row[8] > row[32] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert weight_costs(model, [2, 8]) == {"0": {2: 40.0, 8: 160.0}, "2": {2: 30.0, 8: 120.0}}
    with pytest.raises(ConfigError, match="no layer of Sequential at 'head'"):
        weight_costs(model, [2], "head")


def test_the_published_problems(data_root: Path) -> None:
    file = data_root / "tables" / "hawq_mixed_precision.json"
    if not file.is_file():
        pytest.skip(f"no {file}")
    spec = importlib.util.spec_from_file_location(
        "hawq_tables", Path(__file__).parents[2] / "benchmarks/hawq_tables.py"
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules["hawq_tables"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    different = []
    for problem in module.problems(file):
        found = allocate(problem.sensitivity, [problem.budget], problem.tied)
        assert found.sensitivity == pytest.approx(module.exact(problem), rel=1e-12)
        if found.bits != problem.published:
            different.append((problem.network, problem.kind, problem.level))
            assert found.sensitivity < module.sums(problem, problem.published)[1]
    assert different == [("resnet50", "modelsize", 0.25)]
