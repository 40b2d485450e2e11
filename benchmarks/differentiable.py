"""Architectures found by differentiable search, trained alone, beside random ones and an equal-time random search.

OMP_NUM_THREADS=1 python benchmarks/differentiable.py > results/benchmarks/differentiable.md
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from nasgraph.build import build
from nasgraph.search_spaces.gnn_node import gnn_node
from nasgraph.space import Architecture, Label, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.tasks import NodeTask, digits_knn, planetoid
from nasgraph.training.differentiable import Relaxed, coded, distributions, tangle, two_path
from nasgraph.training.loop import TrainSettings

PLAIN: dict[str, Label] = {"conv1": "gcn", "conv2": "gcn", "head": "linear", "norm": "layer", "activation": "relu"}
PLAIN |= {"residual": "none", "jump": "last", "propagate": "none", "input_dropout": 0.0, "dropout": 0.5}
Scores = list[tuple[float, float]]  # validation and test accuracy of each training


def fitted(task: NodeTask, space: SearchSpace, architecture: Architecture, seeds: int) -> Scores:
    """Trained alone from scratch, once for each seed."""
    found = []
    for seed in range(seeds):
        model = build(space, architecture, seed)
        val = task.fit(model, TrainSettings(), seed).val
        found.append((val, task.score(model, "test")["accuracy"]))
    return found


def cell(scores: Scores) -> str:
    parts = []
    for column in zip(*scores, strict=True):
        spread = statistics.stdev(column) if len(column) > 1 else 0.0
        parts.append(f"{100 * statistics.mean(column):.1f} ± {100 * spread:.1f}")
    return " | ".join(parts)


def random_search(
    task: NodeTask, space: SearchSpace, seconds: float, least: int
) -> list[tuple[float, Architecture, float, float]]:
    """CPU seconds spent, architecture, validation and test accuracy of each random architecture, trained once."""
    rng, spent, found = random.Random("random search"), 0.0, list[tuple[float, Architecture, float, float]]()
    while spent < seconds or len(found) < least:
        architecture = space.sample(rng)
        start = time.process_time()
        model = build(space, architecture, len(found))
        val = task.fit(model, TrainSettings(), len(found)).val
        spent += time.process_time() - start
        found.append((spent, architecture, val, task.score(model, "test")["accuracy"]))
        print(f"random {len(found)}: {spent:.0f} s, {val:.3f}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("digits_knn", "Cora"), default="digits_knn")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--searches", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = digits_knn() if options.task == "digits_knn" else planetoid("Cora")
    space = gnn_node(**task.sizes, layers=2, widths=(16, 32, 64))
    steps, warm = options.steps, options.steps // 4
    methods: list[tuple[str, Callable[..., Relaxed], int, dict[str, Any]]] = [
        ("tangle, operations sampled", tangle, steps, {"operations": "sample", "warmup": warm}),
        ("tangle, gdas", tangle, steps, {"sampler": "gdas", "warmup": warm}),
        ("two_path", two_path, steps, {"warmup": warm}),
        ("coded", coded, max(4, steps // 5), {}),
        ("distributions, operations of a plain GCN", distributions, steps, {"fixed": PLAIN}),
    ]
    rows, times, found_lines = [], [], []
    for name, method, n, arguments in methods:
        scores: Scores = []
        spent = []
        for seed in range(options.searches):
            start = time.process_time()
            result = method(Supernet(space, task, seed=seed), n, seed=seed, **arguments)
            spent.append(time.process_time() - start)
            scores += fitted(task, space, result.architecture, options.seeds)
            shown = ", ".join(f"{choice} {label}" for choice, label in result.architecture.items())
            found_lines.append(f"- {name}, search seed {seed}: {shown}")
            print(name, seed, f"{spent[-1]:.0f} s", cell(scores), file=sys.stderr)
        times.append(statistics.mean(spent))
        rows.append((name, n, times[-1], cell(scores)))
    stream = random_search(task, space, max(times), least=12)
    best: dict[int, Scores] = {}
    print(f"# Differentiable search on {task.name}\n")
    print(f"`python {' '.join(['benchmarks/differentiable.py', *sys.argv[1:]])}`, one thread, CPU seconds; torch")
    print(f"{torch.__version__}, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores.\n")
    print(
        f"Space: `gnn_node(layers=2, widths=(16, 32, 64))`. Each found architecture of {options.searches} searches is"
    )
    print(f"trained alone from scratch with {options.seeds} seeds (`TrainSettings()`); accuracies in percent, mean ±")
    print("standard deviation over all these trainings. *Equal time*: random architectures are trained alone, once")
    print("each, for as many CPU seconds as the search took; the one of best validation accuracy is trained again with")
    print("the same seeds.\n")
    print("| method | steps | seconds | found: val | found: test | equal time: trained | val | test |")
    print("|---|---|---|---|---|---|---|---|")
    for name, n, seconds, text in rows:
        within = max(1, sum(spent <= seconds for spent, *_ in stream))
        winner = max(range(within), key=lambda i: stream[i][2])
        if winner not in best:
            best[winner] = fitted(task, space, stream[winner][1], options.seeds)
        print(f"| {name} | {n} | {seconds:.0f} | {text} | {within} | {cell(best[winner])} |")
    everything = [(val, test) for _, _, val, test in stream]
    plain = fitted(task, space, space.architecture({**PLAIN, "width": 64, "depth": "2"}), options.seeds)
    print(f"\n{len(stream)} random architectures, each trained once: val and test {cell(everything)}.")
    print(f"A plain GCN of 2 layers, width 64, for comparison: {cell(plain)}.\n")
    print("Found:\n")
    print("\n".join(found_lines))


if __name__ == "__main__":
    main()
