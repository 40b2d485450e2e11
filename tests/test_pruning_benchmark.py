"""The pruning benchmark's own arithmetic: costs, budgets, the area of a front, its tables and figure."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from nasgraph.objectives.sparsity import count_kept_flops
from nasgraph.space import Architecture

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("pruning_benchmark", ROOT / "benchmarks" / "pruning.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench(script: Any) -> Any:
    return script.Bench("digits_images", 0, script.Plan({"batch_size": 64}, 2, (1, 1, 1), 6, 2, (0.1, 0.5), 50))


def test_sizes_are_the_counted_ones(bench: Any) -> None:
    rng = random.Random(0)
    for _ in range(8):
        arch = bench.space.sample(rng)
        model = bench.untrained(arch)
        assert bench.size(arch)[0] == count_kept_flops(model, bench.task.inputs)
    assert bench.shares(bench.ends[0]) == (1.0, 1.0)
    assert len(bench.task.data.test_y) == 50 and set(bench.task.data.test_y.bincount().tolist()) == {5}


@pytest.mark.parametrize(("cost", "budget"), [(0, 0.05), (0, 0.35), (1, 0.1)])
def test_simple_ways_stay_within_their_budget_and_use_it(bench: Any, cost: int, budget: float) -> None:
    ways = (bench.uniform_keep, bench.uniform_width, bench.threshold, bench.knapsack)
    shares = [bench.shares(way(budget, cost))[cost] for way in ways]
    assert all(0.5 * budget < share <= budget for share in shares), shares
    assert bench.widths(bench.uniform_keep(budget, cost)) == (16, 16)
    assert bench.keeps(bench.uniform_width(budget, cost)) == (1.0, 1.0)


def test_finalists_are_the_best_scores_within_the_budget(bench: Any) -> None:
    names = [Architecture({"a": i}) for i in range(4)]
    found = [(names[0], 0.9, 0.6, 0.1), (names[1], 0.5, 0.1, 0.1), (names[2], 0.7, 0.2, 0.1), (names[3], 0.7, 0.3, 0.1)]
    assert bench.best(found, 0.5, 0) == [names[3], names[2]]
    assert bench.best(found, 0.05, 0) == []


def test_the_area_of_a_front(script: Any) -> None:
    assert script.volume([(0.04, 50.0)], (0.05, 0.5)) == pytest.approx(50)
    middle = float(np.sqrt(0.05 * 0.5))  # half way, in the logarithm
    assert script.volume([(0.05, 50.0), (middle, 90.0), (0.4, 70.0)], (0.05, 0.5)) == pytest.approx(70)


def test_a_seed_gives_tables_and_a_figure(script: Any, bench: Any) -> None:
    plan = bench.plan
    found = {"task": "digits_images", "torch": "torch", "plan": script.asdict(plan), "seeds": {}}
    rows = []
    for kind, budgets in (("FLOPs", (0.1, 0.5)), ("weights", plan.weights)):
        for budget in budgets:
            rows += [[kind, budget, method, 90.0, 90.0, budget, budget, {}] for method in script.DRAWN[:2]]
    for seed in ("0", "1"):
        changed = [[*row[:3], row[3] + int(seed) * (row[2] == script.DRAWN[0]) + row[1], *row[4:]] for row in rows]
        dense = ["dense", 1.0, "all widths, no mask", 95.0 + int(seed), 95.0, 1.0, 1.0, {}]
        found["seeds"][seed] = {"rows": [dense, *changed], "cpu_seconds": {"all": 1.0}}
    assert json.loads(script.dumped(found)) == json.loads(json.dumps(found))
    text = script.report(found)
    assert "Dense network: 95.50 ± 0.71" in text and "| NSGA-II | 90.6 ± 0.7 | 91.0 ± 0.7 | 90.8 |" in text
    assert ElementTree.fromstring(script.plot([found])).tag.endswith("svg")


def test_the_stored_results_make_the_tables(script: Any) -> None:
    files = sorted((ROOT / "results" / "benchmarks").glob("pruning_*.json"))
    assert files
    page = (ROOT / "results" / "benchmarks" / "pruning.md").read_text()
    for path in files:
        table = script.report(json.loads(path.read_text()))
        assert table.strip() in page, path.name


@pytest.mark.slow
def test_one_small_seed_runs(script: Any) -> None:
    result = script.run("digits_images", 0, script.Plan({"batch_size": 64}, 2, (1, 1, 1), 16, 1, (0.1,), 50))
    kinds = {(row[0], row[2]) for row in result["rows"]}
    assert ("FLOPs", script.NSGA) in kinds and ("FLOPs", "uniform width, group envelope") in kinds
    assert all(row[5] <= row[1] for row in result["rows"] if row[0] == "FLOPs")
    assert all(row[6] <= row[1] for row in result["rows"] if row[0] == "weights")
