"""Searched widths and keep ratios against uniform ones, magnitude against random masks: at equal cost.

NASGRAPH_DATA=... OMP_NUM_THREADS=1 python benchmarks/pruning.py digits_images  (or mnist, cifar10)

Per seed one supernet over widths and keep ratios (sandwich rule) scores candidates. NSGA-II and random search get
equally many of its scores. What they pick within a budget, and the uniform networks of the same budget, are then
trained alike: without masks first, then with them. Budgets count multiply-adds of kept weights (a sparse kernel's).
"""

from __future__ import annotations

import itertools
import random
import sys
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import optuna
import torch
from scipy.stats import ttest_rel
from torch import nn

from nasgraph import registry
from nasgraph.build import build
from nasgraph.objectives.sparsity import count_kept_flops, count_kept_parameters
from nasgraph.samplers.genetic import NSGAIISampler
from nasgraph.search_spaces.prune_cnn import prune_cnn
from nasgraph.space import Architecture, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.tasks.images import ImageTask
from nasgraph.training import TrainSettings
from nasgraph.training.policies import Sandwich
from nasgraph.transforms.prune import kept_weights

SEEDS, TRIALS, BUDGETS, SPARSITY = 5, 100, (0.25, 0.1), 0.125
KEEPS = (0.0625, 0.125, 0.25, 0.5, 1.0)
TASKS: dict[str, dict[str, Any]] = {
    "digits_images": {"task": {}, "layers": 2, "widths": (4, 8, 12, 16), "epochs": (10, 10), "supernet": 15},
    "mnist": {"task": {"train_samples": 1000}, "layers": 3, "widths": (4, 8, 12, 16), "epochs": (6, 6), "supernet": 10},
    "cifar10": {
        "task": {"flip": True},
        "layers": 3,
        "widths": (8, 16, 24, 32),
        "epochs": (10, 10),
        "supernet": 10,
    },
}


class Bench:
    """One seed on one task."""

    def __init__(self, name: str, seed: int) -> None:
        self.given, self.seed = TASKS[name], seed
        self.task: ImageTask = registry.make("tasks", name, self.given["task"])
        self.space = self.made(self.given["widths"], KEEPS)
        self.names = [f"{what}{i}" for i in range(1, self.given["layers"] + 1) for what in ("width", "keep")]
        self.ends = [{n: self.space.choices[n].labels[end] for n in self.names} for end in (-1, 0)]
        self.full = self.flops(self.ends[0], self.space)
        self.dense: dict[tuple[Any, ...], dict[str, torch.Tensor]] = {}

    def made(self, widths: tuple[int, ...], keeps: tuple[float, ...], scores: str = "magnitude") -> SearchSpace:
        """The space over other widths and ratios."""
        return prune_cnn(
            **self.task.sizes, layers=self.given["layers"], widths=widths, keeps=keeps, scores=scores, seed=self.seed
        )

    def flops(self, arch: Mapping[str, Any], space: SearchSpace) -> int:
        """Multiply-adds of kept weights, times 2."""
        return count_kept_flops(build(space, arch), self.task.inputs)

    def trained_supernet(self) -> Supernet:
        """By the sandwich rule from the largest network without masks to the smallest with the fewest weights."""
        supernet = Supernet(self.space, self.task, seed=self.seed)
        policy = Sandwich(self.space, *self.ends)
        steps = self.given["supernet"] * len(self.task.epochs(0))
        supernet.train(policy, steps, settings=TrainSettings(lr=0.003, weight_decay=1e-4), seed=self.seed, samples=64)
        return supernet

    def searched(self, supernet: Supernet) -> list[tuple[Architecture, float, int]]:
        """What NSGA-II asked about: architecture, supernet's accuracy, kept FLOPs."""
        found: list[tuple[Architecture, float, int]] = []
        options = {n: list(self.space.choices[n].labels) for n in self.names}

        def objective(trial: optuna.Trial) -> tuple[float, float]:
            arch = Architecture({n: trial.suggest_categorical(n, options[n]) for n in self.names})  # type: ignore[arg-type]
            found.append((arch, supernet.evaluate([arch], 256)[0], self.flops(arch, self.space)))
            return found[-1][1], float(found[-1][2])

        sampler = NSGAIISampler(seed=self.seed, population_size=10)
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        study.optimize(objective, n_trials=TRIALS)
        return found

    def drawn(self, supernet: Supernet) -> list[tuple[Architecture, float, int]]:
        """As many at random."""
        rng = random.Random(self.seed)
        archs = [self.space.sample(rng) for _ in range(TRIALS)]
        scores = supernet.evaluate(archs, 256)
        return [(a, score, self.flops(a, self.space)) for a, score in zip(archs, scores, strict=True)]

    def test(self, arch: Mapping[str, Any], scores: str = "magnitude") -> tuple[float, nn.Module]:
        """Test accuracy in % after training without masks, then with those of ``arch``, of any widths and ratios."""
        values = dict(arch)
        widths = tuple(sorted({int(values[n]) for n in self.names if n.startswith("width")}))
        keeps = tuple(sorted({1.0, *(values[n] for n in self.names if n.startswith("keep"))}))
        space = self.made(widths, keeps, scores)
        before, after = self.given["epochs"]
        open_ = {n: 1.0 if n.startswith("keep") else values[n] for n in self.names}
        key = tuple(open_.values())
        if key not in self.dense:
            model = build(space, open_, self.seed)
            self.task.fit(model, TrainSettings(epochs=before, lr=0.01, weight_decay=1e-4), self.seed)
            self.dense[key] = model.state_dict()
        masked = build(space, values, self.seed)
        masked.load_state_dict(self.dense[key], strict=False)
        self.task.fit(masked, TrainSettings(epochs=after, lr=0.003, weight_decay=1e-4), self.seed)
        return 100 * self.task.score(masked, "test")["accuracy"], masked

    def uniform_keep(self, flops: float) -> dict[str, Any]:
        """Full widths and one ratio for all layers."""
        low, high = 0.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            space = self.made(self.given["widths"][-1:], (middle,))
            arch = {n: middle if n.startswith("keep") else self.given["widths"][-1] for n in self.names}
            low, high = (middle, high) if self.flops(arch, space) <= flops else (low, middle)
        return {n: low if n.startswith("keep") else self.given["widths"][-1] for n in self.names}

    def global_magnitude(self, share: float) -> dict[str, Any]:
        """Full widths, and the ratios that one threshold on all weights of the dense network gives."""
        dense = self.dense[tuple(self.ends[0][n] for n in self.names)]
        weights = [dense[f"conv{i}.weight"].abs().flatten() for i in range(1, self.given["layers"] + 1)]
        least = torch.cat(weights).sort(descending=True).values[round(share * sum(map(len, weights))) - 1]
        ratios = {f"keep{i}": float((w >= least).float().mean()) for i, w in enumerate(weights, 1)}
        return {n: max(1e-3, ratios.get(n, 0)) if n in ratios else self.given["widths"][-1] for n in self.names}

    def uniform_width(self, flops: float) -> dict[str, Any]:
        """One width for all layers and no mask."""
        best: dict[str, Any] = {}
        for width in range(1, self.given["widths"][-1] + 1):
            arch = {n: 1.0 if n.startswith("keep") else width for n in self.names}
            if self.flops(arch, self.made((width,), (1.0,))) <= flops:
                best = arch
        return best


def run(name: str, seed: int) -> dict[tuple[str, str], tuple[float, float, float]]:
    """By (budget, method): test accuracy in %, kept FLOPs over the dense network's, kept parameters."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore")
    start = time.process_time()
    bench = Bench(name, seed)
    supernet = bench.trained_supernet()
    found = {"searched (NSGA-II)": bench.searched(supernet), "searched (random)": bench.drawn(supernet)}
    full, rows = bench.full, {}

    def row(budget: str, method: str, arch: Mapping[str, Any], scores: str = "magnitude") -> None:
        accuracy, model = bench.test(arch, scores)
        share = count_kept_flops(model, bench.task.inputs) / full
        rows[budget, method] = accuracy, share, float(count_kept_parameters(model))
        print(f"{name} seed {seed}: {budget}, {method}: {accuracy:.2f}", file=sys.stderr, flush=True)

    row("dense", "all widths, no mask", bench.ends[0])
    for share in BUDGETS:
        budget = f"FLOPs <= {share:g}"
        for method, scored in found.items():
            fits = [entry for entry in scored if entry[2] <= share * full]
            if fits:
                best = max(fits, key=lambda entry: entry[1])[0]
                row(budget, method, best)
                if method == "searched (NSGA-II)":
                    row(budget, "its widths and ratios, random masks", best, "random")
        uniform = bench.uniform_keep(share * full)
        row(budget, "uniform ratio, magnitude", uniform)
        row(budget, "uniform ratio, random masks", uniform, "random")
        row(budget, "uniform width, no mask", bench.uniform_width(share * full))
    budget, widest = f"kept weights <= {SPARSITY:g}", bench.given["widths"][-1]
    ratios = [n for n in bench.names if n.startswith("keep")]
    candidates, dense = [], sum(layer.weight.numel() for layer in convolutions(build(bench.space, bench.ends[0])))
    for labels in itertools.product(KEEPS, repeat=len(ratios)):
        arch = Architecture({**{n: widest for n in bench.names}, **dict(zip(ratios, labels, strict=True))})
        kept, of = kept_weights(build(bench.space, arch))  # of the layers with masks
        if dense - (of - kept) <= SPARSITY * dense:
            candidates.append(arch)
    best = max(zip(supernet.evaluate(candidates, 256), range(len(candidates)), strict=True))[1]
    picked = candidates[best]
    uniform = {n: SPARSITY if n.startswith("keep") else widest for n in bench.names}
    row(budget, f"best ratios of {len(KEEPS)}^{len(ratios)} by supernet", picked)
    row(budget, "its ratios, random masks", picked, "random")
    row(budget, "one threshold for all layers, magnitude", bench.global_magnitude(SPARSITY))
    row(budget, "uniform ratio, magnitude", uniform)
    row(budget, "uniform ratio, random masks", uniform, "random")
    rows["", "CPU s"] = time.process_time() - start, 0.0, 0.0
    return rows


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    """All of them."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "mnist"
    with ProcessPoolExecutor(2) as pool:
        runs = list(pool.map(run, [name] * SEEDS, range(SEEDS)))
    seconds = [each.pop(("", "CPU s"))[0] for each in runs]
    given = TASKS[name]
    print(f"## {name} {given['task'] or ''}\n\n    OMP_NUM_THREADS=1 python benchmarks/pruning.py {name}\n")
    print(
        f"torch {torch.__version__}, one thread, {np.mean(seconds):.0f} s of CPU per seed, {SEEDS} seeds.\n"
        f"{given['layers']} blocks, widths {given['widths']}, ratios {KEEPS}; {given['epochs'][0]} epochs without\n"
        f"masks, then {given['epochs'][1]} with them; {TRIALS} supernet scores per search. Test accuracy in %, mean\n"
        "and standard deviation over seeds; p: one-sided paired t-test that the first row of the budget is better.\n"
    )
    print("| budget | network | test accuracy | FLOPs of dense | parameters kept | p |\n|---|---|---|---|---|---|")
    first: dict[str, str] = {}
    for key in dict.fromkeys(key for each in runs for key in each):
        have = [each for each in runs if key in each]
        numbers = np.array([each[key] for each in have])
        budget, method = key
        lead = first.setdefault(budget, method)
        p = ""
        if lead != method and len(have) == SEEDS and all((budget, lead) in each for each in runs):
            leads = [each[budget, lead][0] for each in runs]
            p = f"{ttest_rel(leads, numbers[:, 0], alternative='greater').pvalue:.3f}"
        spread = numbers[:, 0].std(ddof=1) if len(have) > 1 else 0.0
        missing = "" if len(have) == SEEDS else f" ({len(have)} of {SEEDS} seeds)"
        print(
            f"| {budget} | {method}{missing} | {numbers[:, 0].mean():.2f} ± {spread:.2f} | {numbers[:, 1].mean():.3f} "
            f"| {numbers[:, 2].mean():.0f} | {p} |"
        )


if __name__ == "__main__":
    main()
