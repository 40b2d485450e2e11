"""Does a small supernet of NAS-Bench-201 order its cells as their authors' 200 epochs on CIFAR-10 do?

A reduced skeleton (8 channels, one cell a stage, images of 16 x 16) learns from 4,000 images; random cells are scored
on 1,000 others by the shared weights, against the published accuracy (NAS-Bench-201, ICLR 2020;
``nb201_accuracy.csv.gz`` in the data folder) beside sizes and proxies. A search may select by the published validation
accuracy only; the field reports the test accuracy; both are printed. ``tests/test_ranking.py`` has a slow test of it.

    OMP_NUM_THREADS=1 NASGRAPH_DATA=~/data python benchmarks/nasbench201_ranking.py --paths 12000 -n 500
"""

from __future__ import annotations

import argparse
import csv
import gzip
import math
import os
import platform
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nasgraph import registry
from nasgraph.ranking import RankReport, rank_report, ranked
from nasgraph.search_spaces.nasbench201 import from_string, nasbench201
from nasgraph.space import Architecture
from nasgraph.supernet import Supernet
from nasgraph.tasks.batch import Batch
from nasgraph.tasks.images import ImageData, ImageTask, cifar10, shifted
from nasgraph.training import TrainSettings

FILE = "cifar10_jpegpack_5000_1000.npz"
PATHS = {"fair": 5, "sandwich": 4, "progressive": 2, "nested": 2}  # architectures a step


class Augmented(ImageTask):
    """Training batches are shifted by up to 2 pixels and mirrored; statistics and scores see the images as they are."""

    augment = False

    def batch(self, n: int, seed: int) -> Batch:
        plain = super().batch(n, seed)
        if not self.augment:
            return plain
        generator = torch.Generator().manual_seed(seed)
        images = shifted(plain.inputs[0], 2, generator)
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        return Batch((torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images),), plain.target)


def small_cifar(size: int = 16) -> ImageData:
    """The subset of CIFAR-10, averaged down to ``size`` x ``size``; 4,000 training, 1,000 validation images."""
    data = cifar10(file=FILE).data
    parts = {f"{split}_x": getattr(data, f"{split}_x") for split in ("train", "val", "test")}
    return replace(data, **{name: F.adaptive_avg_pool2d(images.float(), size) for name, images in parts.items()})


def published(root: Path) -> dict[str, dict[str, float]]:
    """Columns of the table in percent, by the cell's string."""
    with gzip.open(root / "nasbench201" / "nb201_accuracy.csv.gz", "rt", encoding="utf-8", newline="") as file:
        return {
            line.pop("arch_str"): {name: float(value) for name, value in line.items()} for line in csv.DictReader(file)
        }


def trained(space: Any, task: Augmented, policy: str, paths: int, lr: float, seed: int) -> Supernet:
    """A supernet after ``paths`` trained architectures in all; the rate falls as a cosine."""
    supernet, steps = Supernet(space, task, seed), paths // PATHS.get(policy, 1)
    made = registry.make("policies", policy, {}, {"space": space, "supernet": supernet, "steps": steps})

    def slower(step: int, _: Any) -> None:
        if supernet.optimizer is not None:
            for group in supernet.optimizer.param_groups:
                group["lr"] = lr * (0.01 + 0.495 * (1 + math.cos(math.pi * (step + 1) / steps)))

    settings = TrainSettings(lr=lr, weight_decay=5e-4, optimizer="sgd")
    task.augment = True
    supernet.train(made, steps, settings=settings, seed=seed, samples=64, reduction="mean", on_step=slower)
    task.augment = False
    return supernet


def report(
    data: Path,
    paths: int,
    n: int,
    policy: str = "uniform",
    channels: int = 8,
    lr: float = 0.05,
    seed: int = 0,
    samples: int = 512,
    proxies: tuple[str, ...] = ("naswot",),
    size: int = 16,
    scores: tuple[str, ...] = ("accuracy", "loss"),
) -> tuple[RankReport, list[float]]:
    """The report against the published validation accuracy, and the published test accuracy of its cells."""
    table = published(data)
    cells = random.Random(f"cells/{seed}").sample(sorted(table), n)
    of = {from_string(cell): cell for cell in cells}
    task = Augmented("cifar10, small", lambda: small_cifar(size))
    task.data  # noqa: B018  loading is not timed
    space = nasbench201(channels=channels, cells=1)
    start = time.perf_counter()
    supernet = trained(space, task, policy, paths, lr, seed)
    seconds = time.perf_counter() - start

    def truth(architecture: Architecture) -> float:
        return table[of[architecture]]["c10_valid_200ep"] / 100

    found = rank_report(
        supernet, truth, of, proxies=proxies, samples=samples, training_seconds=seconds, scores=scores, top=(1, 10, 30)
    )
    return found, [table[of[each]]["c10_test_200ep"] / 100 for each in found.architectures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data-root", type=Path, default=os.environ.get("NASGRAPH_DATA"), help="default: NASGRAPH_DATA"
    )
    parser.add_argument("--paths", type=int, default=6000, help="architectures trained, each on 64 images")
    parser.add_argument("-n", type=int, default=300, help="cells scored")
    parser.add_argument("--policy", default="uniform", choices=("uniform", "fair", "sandwich", "importance"))
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--size", type=int, default=16, help="pixels of an image's side")
    parser.add_argument("--samples", type=int, default=512, help="images for the statistics of BatchNorm")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the report as CSV and JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cpu = time.process_time()
    found, test = report(
        options.data_root, options.paths, options.n, options.policy, options.channels, options.lr, options.seed,
        options.samples, size=options.size,
    )  # fmt: skip
    minutes = (time.process_time() - cpu) / 60
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, one thread; ", end="")
    print(f"{minutes:.1f} CPU minutes in all; load at the end {os.getloadavg()[0]:.1f}\n")
    print(found)
    print("\nAgainst the published test accuracy:\n")
    print("| score | Kendall | Spearman |\n|---|---|---|")
    for row in found.rows:
        other = ranked(row.name, row.kind, found.scores[row.name], test, found.scores["params"])
        low, high = other.kendall_interval
        print(f"| {row.name} | {other.kendall:+.3f} [{low:+.2f}, {high:+.2f}] | {other.spearman:+.3f} |")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        name = f"nasbench201-{options.policy}-{options.seed}"
        found.to_csv(options.out / f"{name}.csv")
        found.to_json(options.out / f"{name}.json")


if __name__ == "__main__":
    main()
