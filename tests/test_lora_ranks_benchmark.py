"""The searches of the benchmark on LoRA ranks, on a problem whose answer is known."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from nasgraph.training.loop import TrainSettings

FILE = Path(__file__).parents[1] / "benchmarks" / "lora_ranks.py"
NAMES = [f"rank.blocks.{i}.{part}" for i in range(2) for part in ("attend.enter", "attend.leave", "up", "down")]
ONE = dict(zip(NAMES, (4, 2, 5, 5, 4, 2, 5, 5), strict=True))
WORTH = dict(zip(NAMES, (0.0, 0.3, 0.0, 0.5, 0.1, 0.8, 0.0, 0.2), strict=True))


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("lora_ranks", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lora_ranks"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["lora_ranks"]


def problem(bench: Any, noise: float) -> Any:
    """Each layer's rank lowers the loss by its worth times log2(1 + rank), but for the noise of a start."""

    class Known(bench.Problem):  # type: ignore[misc,name-defined]
        one = ONE

        def train(self, ranks: dict[str, int], seed: int, split: str = "val") -> dict[str, float]:
            luck = random.Random(f"{sorted(ranks.items())} {seed}").gauss(0, noise)
            loss = 10 - sum(WORTH[name] * float(np.log2(1 + rank)) for name, rank in ranks.items()) + luck
            return {"val": loss, "loss": loss, "accuracy": 0.0}

    return Known("known", (0, 1, 2, 4), TrainSettings(), 8, 8, "")


def test_architectures_spend_the_budget(bench: Any) -> None:
    known, rng = problem(bench, 0.0), random.Random(0)
    assert known.budget == 2 * sum(ONE.values())
    for _ in range(20):
        ranks = known.random(rng)
        for each in (ranks, known.mutated(ranks, rng)):
            left = known.budget - known.cost(each)
            steps = [(option, rank) for name, rank in each.items() for option in known.ranks if option > rank]
            assert left >= 0 and steps
            raised = [
                known.cost({**each, name: next(option for option in known.ranks if option > rank)})
                for name, rank in each.items()
                if rank < 4
            ]
            assert all(cost > known.budget for cost in raised)


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_search_beats_as_many_random_trainings(bench: Any, noise: float) -> None:
    known = problem(bench, noise)

    def true(ranks: dict[str, int]) -> float:
        return float(problem(bench, 0.0).train(ranks, 0)["val"])

    every = np.array(list(itertools.product((0, 1, 2, 4), repeat=8)))
    every = every[every @ list(ONE.values()) <= known.budget]
    optimum = 10 - float((np.log2(1 + every) @ list(WORTH.values())).max())
    gaps: dict[str, list[float]] = {"search": [], "random": []}
    for seed in range(4):
        search, blind, rng = bench.Trained(known, seed), bench.Trained(known, seed), random.Random(seed)
        for _ in range(24):
            blind.add(known.random(rng))
        for _ in range(8):
            search.add(known.random(rng))
        for _ in range(16):
            search.add(search.propose(rng))
        assert len(bench.distinct(ranks for ranks, _ in search.losses[8:])) == 16
        gaps["search"].append(true(search.best(by_model=True)) - optimum)
        gaps["random"].append(true(blind.best()) - optimum)
        assert search.trainings == blind.trainings == 24 + bench.FINALISTS * bench.FURTHER
    assert np.mean(gaps["search"]) < 0.5 * np.mean(gaps["random"]) and np.mean(gaps["search"]) < 0.35


def test_the_page_compares_with_the_best_uniform_rank(bench: Any) -> None:
    given = argparse.Namespace(problem="known", out=Path("known.md"), **{k: v for k, (v, _) in bench.SIZES.items()})
    bench.PROBLEMS["known"] = problem(bench, 0.0)
    given.seeds, given.pairs = 3, 4
    losses = {"uniform rank 2 everywhere": 1.0, "uniform rank 4 on attention": 0.9, "AdaLoRA": 0.8}
    losses |= {"gradients at the start": 0.95, bench.SEARCHES[0]: 0.7, bench.SEARCHES[1]: 0.85}
    rng = random.Random(0)
    rows = {
        name: [{"val": loss, "loss": loss + rng.uniform(0, 0.02), "accuracy": 0.5, "params": 64} for _ in range(3)]
        for name, loss in losses.items()
    }
    for name in (bench.SEARCHES[0], bench.SEARCHES[1], "uniform rank 2 everywhere"):
        for row in rows[name]:
            row["confirmed"] = row["loss"] + rng.uniform(0, 0.02)
    chosen = {name: [dict.fromkeys(NAMES, 2)] * 3 for name in losses}
    pairs = [(float(i), float(i * i), 60 + (i % 2) * 10 * i) for i in range(12)]
    text = bench.report(given, rows, chosen, pairs)
    assert "loss minus that of uniform rank 4 on attention" in text
    searched, blind, reference = (
        [row["loss"] for row in rows[name]] for name in (*bench.SEARCHES, "uniform rank 4 on attention")
    )
    for line, other in ((f"| {bench.SEARCHES[0]} | 64 | ", reference), ("The search against random search: ", blind)):
        difference, p = np.mean(searched) - np.mean(other), ttest_rel(searched, other).pvalue
        (found,) = (each for each in text.splitlines() if each.startswith(line))
        assert f"{difference:+.4f}" in found and bench.shown(p) in found
    further = np.mean([row["confirmed"] for row in rows[bench.SEARCHES[0]]])
    assert f"| {bench.SEARCHES[0]} | {further:.4f} +- " in text and text.count("| AdaLoRA |") == 2
    assert "| at the budget | 6 | 1.00 | < 0.001 |  |" in text and "| all | 12 | 1.00 |" in text
