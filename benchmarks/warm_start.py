"""First trials from tables against random ones: accuracy and bits right after rewriting, without training again.

python benchmarks/warm_start.py > results/benchmarks/warm_start.md
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable

import torch
from scipy.stats import ttest_rel
from torch import nn
from torch_geometric.nn import GCNConv

from nasgraph.allocation.starts import first_trials, networks_of, plain_network, reference
from nasgraph.objectives.bits import count_model_bits
from nasgraph.space import Architecture, Choice, Op, SearchSpace
from nasgraph.tasks import digits_knn
from nasgraph.training import TrainSettings
from nasgraph.transforms import LowRank, Quantize

N, SEEDS = 8, 5

HEAD = """# First trials from tables, measured without training again

`python benchmarks/warm_start.py`: digits, three graph convolutions of width 64, bits 2, 3, 4, 8, 32 per channel and
ranks 4, 8, 16, full; {size:,} architectures. The plain network is trained once per seed, then only rewritten. Area
under the front of validation accuracy over model bits (1: all right at no bits), {seeds} seeds, and a paired one-sided
t-test against {n} random architectures of the same trained weights.
A table needs the plain network and 21 rewritten ones, on one batch of 256 training samples; these count as no trial.
"""


def low_precision(features: int, classes: int) -> SearchSpace:
    """Three graph convolutions, each with bits and a rank: 20 options a layer."""
    space = SearchSpace("low_precision")
    h = space.input("x", torch.zeros(4, features), {0: "nodes"})
    edges = space.input("edge_index", torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]]), {1: "edges"})
    for i, width in enumerate((64, 64, classes)):
        bits = Choice(f"bits{i}", [2, 3, 4, 8, 32])
        transforms = [LowRank(rank=Choice(f"rank{i}", [4, 8, 16, None])), Quantize(weight_bits=bits, per="channel")]
        h = space.add(f"conv{i}", Op(GCNConv, out_channels=width), h, edges, transforms=transforms)
        h = space.add(f"relu{i}", Op(nn.ReLU), h) if i < 2 else h
    space.output(h)
    return space


def area(points: Iterable[tuple[float, float]], most: float) -> float:
    """Of accuracy over bits that the front covers, as a share of accuracy 1 over ``most`` bits."""
    found, best, before = 0.0, 0.0, 0.0
    for bits, accuracy in sorted(points):
        if accuracy > best and bits < most:
            found, before, best = found + best * (bits - before), bits, accuracy
    return (found + best * (most - before)) / most


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    task = digits_knn()
    space = low_precision(**task.sizes)
    areas: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        start = reference(space)
        plain = plain_network(space, start, seed)
        task.fit(plain, TrainSettings(epochs=100, patience=30), seed)
        network = networks_of(space, plain, seed)
        batch, rng = task.batch(256, seed), random.Random(seed)
        most = float(count_model_bits(network(start)))

        def cost(architecture: Architecture, network=network) -> float:  # type: ignore[no-untyped-def]
            return float(count_model_bits(network(architecture)))

        sets = {f"{N} random": [space.sample(rng) for _ in range(N)]}
        sets[f"{8 * N} random"] = [space.sample(rng) for _ in range(8 * N)]
        for methods in (["sensitivity"], ["sqnr"], ["stable_rank", "sqnr"]):
            sets[f"{N} by " + ", ".join(methods)] = first_trials(space, network, start, batch, cost, methods, N)
        for name, architectures in sets.items():
            models = [network(architecture) for architecture in architectures]
            points = [(float(count_model_bits(model)), task.score(model, "val")["accuracy"]) for model in models]
            areas.setdefault(name, []).append(area(points, most))
    print(HEAD.format(size=space.size(), seeds=SEEDS, n=N))
    print("| trials | area, mean | standard deviation | p |\n|---|---|---|---|")
    for name, values in areas.items():
        p = ttest_rel(values, areas[f"{N} random"], alternative="greater").pvalue if name != f"{N} random" else None
        shown = "" if p is None else f"{p:.2g}"
        print(f"| {name} | {statistics.mean(values):.3f} | {statistics.stdev(values):.3f} | {shown} |")


if __name__ == "__main__":
    main()
