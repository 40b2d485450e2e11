"""Does a few-shot split order architectures better than one supernet of as many training steps?

NASGRAPH_DATA=data OMP_NUM_THREADS=1 python benchmarks/few_shot.py > results/benchmarks/few_shot.md
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nasgraph.build import build
from nasgraph.predictors.nas_bench_graph import Table
from nasgraph.search_spaces.nas_bench_graph import nas_bench_graph
from nasgraph.space import Architecture, SearchSpace
from nasgraph.statistics import spearman
from nasgraph.supernet import Supernet
from nasgraph.tasks import NodeTask, planetoid
from nasgraph.tasks.batch import Batch
from nasgraph.tasks.node import NodeData
from nasgraph.training import TrainSettings
from nasgraph.training.fewshot import FewShot
from nasgraph.training.policies import Uniform
from nasgraph.training.splitting import Measure

FEATURES, WIDTH, DROPOUT = 64, 32, 0.5


def small_cora() -> NodeData:
    """Cora with its features on their first 64 singular vectors: a step takes 15 ms and not 120."""
    data: NodeData = planetoid("Cora").data
    u, s, _ = torch.linalg.svd(data.x, full_matrices=False)
    x = u[:, :FEATURES] * s[:FEATURES]
    return replace(data, x=(x / x.std()).contiguous())


def by_chance(seed: int) -> Measure:
    """Distances drawn at random: what a split is worth that measures nothing."""

    def draw(net: Supernet, archs: Sequence[Architecture], batch: Batch, own: frozenset[str], step: int) -> Tensor:
        generator = torch.Generator().manual_seed(hash((seed, step, len(archs))) % 2**31)
        upper = torch.rand(len(archs), len(archs), generator=generator, dtype=torch.float64).triu(1)
        return upper + upper.T

    return draw


def alone(task: NodeTask, space: SearchSpace, archs: Sequence[Architecture], seeds: Sequence[int]) -> np.ndarray:
    """Validation accuracy of each architecture trained alone, ``(seeds, n)``."""
    table = [[task.fit(build(space, a, s), TrainSettings(), s).val for a in archs] for s in seeds]
    return np.array(table)


def trained(task: NodeTask, space: SearchSpace, steps: int, seed: int) -> Supernet:
    supernet = Supernet(space, task, seed)
    supernet.train(Uniform(space), steps, seed=seed)
    return supernet


def interval(truth: np.ndarray, scores: np.ndarray, against: np.ndarray, resamples: int = 500) -> tuple[float, float]:
    """95% bootstrap interval over architectures of the gain in Spearman, the mean over rows of ``scores``."""
    rng, gains = np.random.default_rng(0), []
    for _ in range(resamples):
        rows = rng.integers(len(truth), size=len(truth))
        pairs = zip(scores, against, strict=True)
        gains.append(np.mean([spearman(a[rows], truth[rows]) - spearman(b[rows], truth[rows]) for a, b in pairs]))
    low, high = np.quantile(gains, [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200, help="updates of each method, over all its stores")
    parser.add_argument("--architectures", type=int, default=20, help="that are trained alone")
    parser.add_argument("--designs", type=int, default=300, help="that are looked up in the benchmark's table")
    parser.add_argument("--seeds", type=int, default=3, help="of the supernets")
    parser.add_argument("--repeats", type=int, default=5, help="networks that each option is measured in")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = NodeTask("small_cora", small_cora)
    space = nas_bench_graph("cora", features=FEATURES, width=WIDTH, dropout=DROPOUT)
    rng = random.Random(0)
    many = list(dict.fromkeys(space.sample(rng) for _ in range(options.designs)))
    ours = many[: options.architectures]
    table = Table("cora")
    published = np.array([table.lookup(arch)["valid_perf"] for arch in many])

    start = time.perf_counter()
    own = alone(task, space, ours, (0, 1))
    truth, alone_s = own.mean(axis=0), time.perf_counter() - start
    half, total = options.steps // 2, options.steps
    scores: dict[str, list[list[float]]] = {}
    seconds: dict[str, list[float]] = {}
    splits: dict[str, list[str]] = {}
    for seed in range(options.seeds):
        begun = time.perf_counter()
        parent = trained(task, space, half, seed)
        first_half = time.perf_counter() - begun
        plans: list[tuple[str, str | Measure, int]] = [
            ("split in 2 by chance", by_chance(seed), 2),
            ("split in 2 by gradients", "gradients", 2),
            ("split in 2 by lid", "lid", 2),
            ("split in 4 by gradients", "gradients", 4),
        ]
        for name, by, leaves in plans:
            begun = time.perf_counter()
            few = FewShot.split(parent, by, leaves, repeats=options.repeats, seed=seed)
            few.train(lambda leaf: Uniform(leaf.space), (total - half) // leaves, seed=seed)
            seconds.setdefault(name, []).append(first_half + time.perf_counter() - begun)
            scores.setdefault(name, []).append(few.evaluate(many))
            groups = "; ".join(f"{s.choice}: {' '.join(map(str, s.groups[1]))}" for s in few.splits)
            splits.setdefault(name, []).append(groups)
        scores.setdefault("one supernet, half the steps", []).append(parent.evaluate(many))
        seconds.setdefault("one supernet, half the steps", []).append(first_half)
        begun = time.perf_counter()
        parent.train(Uniform(space), total, seed=seed)
        scores.setdefault("one supernet", []).append(parent.evaluate(many))
        seconds.setdefault("one supernet", []).append(first_half + time.perf_counter() - begun)
        print(f"seed {seed} done after {time.perf_counter() - start:.0f} s", file=sys.stderr)

    print("# Few-shot supernets: is the order better after a split?\n")
    print(
        f"    NASGRAPH_DATA=data OMP_NUM_THREADS=1 python benchmarks/few_shot.py {' '.join(sys.argv[1:])}".rstrip()
        + "\n"
    )
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg()[:2])
    print(
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, one thread; load of the "
        f"machine ({os.cpu_count()} cores) at the end: {load} over 1 and 5 minutes.\n"
    )
    print(
        f"`nas_bench_graph` of width {WIDTH} on Cora, its features on {FEATURES} singular vectors, dropout {DROPOUT}. "
        f"Truths: (a) validation accuracy of {len(truth)} random designs, each trained alone here from 2 seeds "
        f"({truth.min():.3f} to {truth.max():.3f}, {alone_s:.0f} s); (b) the benchmark's `valid_perf` of {len(many)} "
        "(width 256, all features). Spearman between the two seeds of (a): "
        f"{spearman(own[0], own[1]):.2f}; between (a) and (b): {spearman(truth, published[: len(truth)]):.2f}.\n"
    )
    print(
        f"Every method but the first takes {total} updates of uniform paths (Adam, the default settings), the split "
        f"ones\n{half} before the split and the rest divided among the leaves. Each option is measured in "
        f"{options.repeats} random networks.\nMeans of {options.seeds} seeds; gains over one supernet with 95% "
        "intervals over designs.\n"
    )
    print("| method | Spearman, (a) | gain | Spearman, (b) | gain | (b) by seed | mean score | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    base = np.array(scores["one supernet"])
    for name in ["one supernet, half the steps", "one supernet", *splits]:
        found, cells = np.array(scores[name]), []
        for right in (truth, published):
            n = len(right)
            each, usual = ([spearman(row[:n], right) for row in rows] for rows in (found, base))
            low, high = interval(right, found[:, :n], base[:, :n])
            gain = f"{np.mean(each) - np.mean(usual):+.2f} ({low:+.2f} to {high:+.2f})"
            cells += [f"{np.mean(each):.2f}", "" if name == "one supernet" else gain]
        cells += [" ".join(f"{value:.2f}" for value in each), f"{found.mean():.3f}"]
        print(f"| {name} | {' | '.join(cells)} | {statistics.mean(seconds[name]):.0f} |")
    print("\nWhat was put into the second group:\n")
    for name, found_splits in splits.items():
        for seed, text in enumerate(found_splits):
            print(f"- {name}, seed {seed}: {text}")


if __name__ == "__main__":
    main()
