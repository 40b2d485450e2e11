"""Fronts of accuracy against arithmetic and against kept weights: searched widths and keep ratios beside simple ways.

    export NASGRAPH_DATA=~/data OMP_NUM_THREADS=1
    python benchmarks/pruning.py digits_images results/benchmarks/pruning_digits_images.json   (or mnist, cifar10)
    python benchmarks/pruning.py --report results/benchmarks/pruning_*.json
    python benchmarks/pruning.py --plot results/benchmarks/pruning.svg results/benchmarks/pruning_*.json

Per seed one supernet over widths and keep ratios (sandwich rule) scores candidates for all budgets. NSGA-II and random
search get equally many of its scores; the best few of each within a budget are trained, and the best of them on
validation is the search's network. All networks of the tables are trained alike: without masks first, then with masks
that are annealed. Arithmetic counts multiply-adds of kept weights (a sparse kernel's). Seeds that the file has are not
run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import re
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from scipy.stats import ttest_rel
from torch import nn

from nasgraph import registry
from nasgraph.allocation.pruning import keep_costs, keep_ratios, keep_sensitivity
from nasgraph.allocation.sparse_training import fewer_groups
from nasgraph.allocation.starts import first_trials
from nasgraph.build import build
from nasgraph.samplers.genetic import NSGAIISampler
from nasgraph.search_spaces.prune_cnn import prune_cnn
from nasgraph.space import Architecture, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.tasks.batch import balanced
from nasgraph.tasks.images import ImageTask
from nasgraph.training import TrainSettings
from nasgraph.training.policies import Sandwich
from nasgraph.transforms.structured import groups

BUDGETS = (0.05, 0.1, 0.2, 0.35, 0.5)  # of the dense network's multiply-adds, or of its convolutions' weights
CALIBRATION = 256  # images for a candidate's BatchNorm
WIDTHS, WIDEST = (4, 6, 8, 10, 12, 16), 16
KEEPS = (0.03, 0.06, 0.09, 0.125, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0)
FINE = tuple(float(ratio) for ratio in np.geomspace(0.01, 1, 41))  # what the knapsack chooses from


@dataclass(frozen=True)
class Plan:
    """How much is done on a task.

    Attributes:
        arguments: of the task. layers: blocks. epochs: without masks, with them, of the supernet.
        trials: scores of a search. finalists: networks that are trained to choose one of them.
        weights: budgets of kept weights. tested: test images, drawn with equal shares of the classes; None: all.
    """

    arguments: dict[str, Any]
    layers: int
    epochs: tuple[int, int, int]
    trials: int
    finalists: int
    weights: tuple[float, ...] = BUDGETS
    tested: int | None = None


PLANS = {
    "digits_images": Plan({"batch_size": 64}, 2, (12, 12, 40), 200, 3),
    "mnist": Plan({"train_samples": 1000, "val": 0.05}, 3, (5, 5, 20), 120, 2, BUDGETS[:3], 2500),
    "cifar10": Plan({"train_samples": 1500, "val": 0.1, "flip": True}, 3, (4, 4, 10), 80, 2, (0.05, 0.2)),
}
FIRST, AFTER = (TrainSettings(epochs=1, lr=lr, weight_decay=1e-4) for lr in (0.01, 0.003))
NSGA, RANDOM, GRID = "NSGA-II", "random search", "supernet's ratios"

Found = list[tuple[Architecture, float, float, float]]  # architecture, supernet's accuracy, shares of FLOPs and weights


class Bench:
    """One seed on one task."""

    def __init__(self, name: str, seed: int, plan: Plan) -> None:
        self.plan, self.seed, self.trials, self.finalists = plan, seed, plan.trials, plan.finalists
        self.task: ImageTask = registry.make("tasks", name, plan.arguments)
        if plan.tested is not None:
            data = self.task.data
            shown = balanced(data.test_y, plan.tested, 0)
            self.task.__dict__["data"] = replace(data, test_x=data.test_x[shown], test_y=data.test_y[shown])
        self.layers = range(1, plan.layers + 1)
        self.space = self.made(WIDTHS, KEEPS)
        self.ends = [
            self.network([w] * len(self.layers), [k] * len(self.layers))
            for w, k in ((WIDEST, 1.0), (WIDTHS[0], KEEPS[0]))
        ]
        self.full = self.size(self.ends[0])
        self.dense: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}
        self.kept: dict[tuple[Architecture, str], tuple[float, nn.Module]] = {}
        self.supernet = Supernet(self.space, self.task, seed=seed)

    def made(self, widths: Sequence[int], keeps: Sequence[float], scores: str = "magnitude") -> SearchSpace:
        """The space over other widths and ratios."""
        given = {"layers": len(self.layers), "widths": widths, "keeps": keeps, "scores": scores, "seed": self.seed}
        return prune_cnn(**self.task.sizes, **given)

    def network(self, widths: Iterable[int], keeps: Iterable[float]) -> Architecture:
        """Of any widths and ratios."""
        named = [(f"width{i}", w) for i, w in zip(self.layers, widths, strict=True)]
        return Architecture(dict(named + [(f"keep{i}", k) for i, k in zip(self.layers, keeps, strict=True)]))

    def widths(self, arch: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(arch[f"width{i}"] for i in self.layers)

    def keeps(self, arch: Mapping[str, Any]) -> tuple[float, ...]:
        return tuple(arch[f"keep{i}"] for i in self.layers)

    def untrained(self, arch: Mapping[str, Any], scores: str = "magnitude") -> nn.Module:
        """Also of widths and ratios that are not in the space."""
        keeps = sorted({1.0, *self.keeps(arch)})
        return build(self.made(sorted(set(self.widths(arch))), keeps, scores), arch, self.seed)

    def size(self, arch: Mapping[str, Any]) -> tuple[float, float]:
        """``kept_flops``, and kept weights of the convolutions."""
        inner, pixels, flops, weights = self.task.sizes["image_channels"], self.task.sizes["image_size"], 0, 0
        for width, keep in zip(self.widths(arch), self.keeps(arch), strict=True):
            kept = max(1, round(keep * 9 * inner * width))
            flops, weights, inner = flops + 2 * kept * pixels**2, weights + kept, width
            pixels = pixels // 2 if pixels > 3 else pixels
        return float(flops + 2 * inner * self.task.sizes["classes"]), float(weights)

    def shares(self, arch: Mapping[str, Any]) -> tuple[float, float]:
        """:meth:`size` over the dense network's."""
        flops, weights = self.size(arch)
        return flops / self.full[0], weights / self.full[1]

    # ---- training ---------------------------------------------------------------------------------------------------

    def pretrain(self) -> None:
        """Train the supernet by the sandwich rule, from the dense network to the smallest with the fewest weights."""
        steps, settings = self.plan.epochs[2] * len(self.task.epochs(0)), AFTER
        self.supernet.train(Sandwich(self.space, *self.ends), steps, settings=settings, seed=self.seed, samples=64)

    def fit(self, model: nn.Module, phase: int, anneal: float = 0.0) -> None:
        """Without masks (0) or with them (1)."""
        settings = replace((FIRST, AFTER)[phase], epochs=self.plan.epochs[phase], anneal=anneal)
        self.task.fit(model, settings, self.seed)

    def unpruned(self, widths: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Weights of the network of ``widths`` after training without masks."""
        if widths not in self.dense:
            model = self.untrained(self.network(widths, [1.0] * len(widths)))
            self.fit(model, 0)
            self.dense[widths] = model.state_dict()
        return self.dense[widths]

    def trained(self, arch: Mapping[str, Any], scores: str = "magnitude") -> nn.Module:
        """After training without masks, then with those of ``arch``: annealed, but for ``scores`` "sudden"."""
        model = self.untrained(arch, scores if scores == "random" else "magnitude")
        model.load_state_dict(self.unpruned(self.widths(arch)), strict=False)
        self.fit(model, 1, anneal=0.0 if scores == "sudden" else 0.5)
        return model

    def narrowed(self, arch: Architecture, how: str) -> nn.Module:
        """The dense network cut to the widths of ``arch``: channels of most magnitude, or those of the envelope."""
        full = self.network([WIDEST] * len(self.layers), [1.0] * len(self.layers))
        model, widths = self.untrained(full), {f"conv{i}": arch[f"width{i}"] for i in self.layers}
        if how == "envelope":
            layers = {name: model.get_submodule(name) for name in widths}
            with fewer_groups(layers, widths, self.plan.epochs[0] * len(self.task.epochs(0)) // 2):
                self.fit(model, 0)
        else:
            model.load_state_dict(self.unpruned(self.widths(full)))
        for name, width in widths.items():
            group, weight = groups(model)[name], model.get_submodule(name).weight.detach()
            own = weight.flatten(1).norm(dim=1) if how == "envelope" else group.importance(model)
            group.keep(model, group.best(own, width))
        self.fit(model, 1)
        return model

    def finetuned(self, arch: Architecture, _: str) -> nn.Module:
        """From the supernet, as ``nasgraph search`` exports it."""
        model = self.supernet.calibrated(arch, CALIBRATION)
        self.fit(model, 1)
        return model

    def result(self, arch: Mapping[str, Any], scores: str = "magnitude") -> tuple[float, nn.Module]:
        """Validation accuracy in % and the trained network."""
        key = (Architecture(arch), scores)
        if key not in self.kept:
            ways = {"envelope": self.narrowed, "channels": self.narrowed, "supernet": self.finetuned}
            model = ways.get(scores, self.trained)(key[0], scores)
            self.kept[key] = (100 * self.task.score(model, "val")["accuracy"], model)
        return self.kept[key]

    # ---- the searches -----------------------------------------------------------------------------------------------

    def asked(self, archs: Sequence[Architecture]) -> Found:
        """The supernet's scores."""
        scores = self.supernet.evaluate(archs, CALIBRATION)
        return [(arch, score, *self.shares(arch)) for arch, score in zip(archs, scores, strict=True)]

    def searched(self) -> Found:
        """What NSGA-II asked for, first along the knapsack's front at three widths (``search.warm_start``)."""
        found: Found = []
        batch, count = self.task.batch(512, self.seed), len(self.layers)
        network, first = partial(self.supernet.calibrated, samples=CALIBRATION), []
        for width in (WIDEST, 10, 6):
            start = self.network([width] * count, [1.0] * count)
            first += first_trials(self.space, network, start, batch, lambda a: self.size(a)[0], ["signal"], 4)

        def objective(trial: optuna.Trial) -> tuple[float, float]:
            labels = {name: list(choice.labels) for name, choice in self.space.choices.items()}
            arch = Architecture({n: trial.suggest_categorical(n, options) for n, options in labels.items()})  # type: ignore[arg-type]
            found.extend(self.asked([arch]))
            return found[-1][1], found[-1][2]

        sampler = NSGAIISampler(seed=self.seed, population_size=20)
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        for arch in first:
            study.enqueue_trial(dict(arch))
        study.optimize(objective, n_trials=self.trials)
        return found

    def drawn(self) -> Found:
        """As many at random."""
        rng = random.Random(self.seed)
        return self.asked([self.space.sample(rng) for _ in range(self.trials)])

    def gridded(self) -> Found:
        """Full widths: as many ratios as the space has, or as the budget of scores allows."""
        every = list(itertools.product(KEEPS, repeat=len(self.layers)))
        random.Random(self.seed).shuffle(every)
        return self.asked([self.network([WIDEST] * len(self.layers), keeps) for keeps in every[: self.trials]])

    def best(self, found: Found, budget: float, cost: int) -> list[Architecture]:
        """The highest scores within the budget, of equals those that use more of it."""
        fits = {arch: (score, share[cost]) for arch, score, *share in found if share[cost] <= budget}
        return sorted(fits, key=fits.__getitem__, reverse=True)[: self.finalists]

    # ---- simple ways ------------------------------------------------------------------------------------------------

    def uniform_keep(self, budget: float, cost: int) -> Architecture:
        """Full widths and one ratio for all layers."""
        low, high, full = 0.0, 1.0, [WIDEST] * len(self.layers)
        for _ in range(12):
            middle = (low + high) / 2
            fits = self.shares(self.network(full, [middle] * len(full)))[cost] <= budget
            low, high = (middle, high) if fits else (low, middle)
        return self.network(full, [low] * len(full))

    def uniform_width(self, budget: float, cost: int) -> Architecture:
        """No mask; one width for all layers, and one channel more in as many layers as the budget allows."""
        best, most = None, 0.0
        for width in range(1, WIDEST):
            for more in itertools.product((0, 1), repeat=len(self.layers)):
                arch = self.network([width + m for m in more], [1.0] * len(more))
                share = self.shares(arch)[cost]
                if most < share <= budget:
                    best, most = arch, share
        assert best is not None
        return best

    def threshold(self, budget: float, cost: int) -> Architecture:
        """Full widths, and the ratios that one threshold on all weights of the dense network gives."""
        full = [WIDEST] * len(self.layers)
        dense = self.unpruned(tuple(full))
        weights = [dense[f"conv{i}.weight"].abs().flatten() for i in self.layers]
        every, best = torch.cat(weights).sort(descending=True).values, None
        for share in np.geomspace(0.005, 1, 200):
            least = every[max(0, round(share * len(every)) - 1)]
            arch = self.network(full, [max(1e-3, float((w >= least).float().mean())) for w in weights])
            if self.shares(arch)[cost] > budget:
                break
            best = arch
        assert best is not None
        return best

    def knapsack(self, budget: float, cost: int) -> Architecture:
        """Full widths, and the ratios that the exact knapsack finds on what each spoils alone."""
        full = [WIDEST] * len(self.layers)
        model = self.untrained(self.network(full, [1.0] * len(full)))
        model.load_state_dict(self.unpruned(tuple(full)))
        spoilt = keep_sensitivity(model, self.task.batch(512, self.seed), FINE, where="conv*")
        costs = keep_costs(model, self.task.inputs, FINE, "flops" if cost == 0 else "weights", where="conv*")
        fixed = self.full[cost] - sum(of[FINE[-1]] for of in costs.values())  # of what is not pruned
        ratios = keep_ratios(spoilt, costs, budget * self.full[cost] - fixed)
        return self.network(full, [ratios[f"conv{i}"] for i in self.layers])


def run(name: str, seed: int, plan: Plan) -> dict[str, Any]:
    """One seed. A row: budget's kind and size, method, test and validation accuracy, shares of FLOPs and weights."""
    start, bench = time.process_time(), Bench(name, seed, plan)
    bench.pretrain()
    spent = {"supernet": time.process_time() - start}
    pools, grid = {NSGA: bench.searched(), RANDOM: bench.drawn()}, {GRID: bench.gridded()}
    spent["scores"] = time.process_time() - start - spent["supernet"]
    rows: list[list[Any]] = []

    def row(kind: str, budget: float, method: str, arch: Architecture, scores: str = "magnitude") -> None:
        val, model = bench.result(arch, scores)
        test = 100 * bench.task.score(model, "test")["accuracy"]
        rows.append([kind, budget, method, *(round(x, 4) for x in (test, val, *bench.shares(arch)))])
        rows[-1].append({choice: round(label, 4) for choice, label in arch.items()})
        print(f"{name} seed {seed}: {kind} {budget:g}, {method}: {test:.2f}", file=sys.stderr, flush=True)

    row("dense", 1.0, "all widths, no mask", bench.ends[0])
    for cost, (kind, found) in enumerate({"FLOPs": pools, "weights": grid}.items()):
        for budget in BUDGETS if kind == "FLOPs" else plan.weights:
            for method, scored in found.items():
                best = bench.best(scored, budget, cost)
                if best:
                    chosen = max(best, key=lambda arch: bench.result(arch)[0])
                    row(kind, budget, method, chosen)
                    row(kind, budget, f"{method}, by score alone", best[0])
                    if method == NSGA:
                        row(kind, budget, f"{method}, fine-tuned from the supernet", chosen, "supernet")
                    if method != RANDOM:
                        row(kind, budget, f"{method}, random masks", chosen, "random")
            uniform, narrow = bench.uniform_keep(budget, cost), bench.uniform_width(budget, cost)
            row(kind, budget, "knapsack, magnitude", bench.knapsack(budget, cost))
            row(kind, budget, "one threshold, magnitude", bench.threshold(budget, cost))
            row(kind, budget, "uniform ratio, magnitude", uniform)
            row(kind, budget, "uniform ratio, random masks", uniform, "random")
            row(kind, budget, "uniform width, no mask", narrow)
            if kind == "FLOPs" and name == "digits_images":
                row(kind, budget, "uniform ratio, not annealed", uniform, "sudden")
                row(kind, budget, "uniform width, cut by magnitude", narrow, "channels")
                row(kind, budget, "uniform width, group envelope", narrow, "envelope")
            bench.kept.clear()  # but not what networks without masks learned
    spent["all"] = time.process_time() - start
    return {"rows": rows, "cpu_seconds": {what: round(seconds, 1) for what, seconds in spent.items()}}


# ---- tables and figure ----------------------------------------------------------------------------------------------


def volume(points: Iterable[tuple[float, float]], budgets: Sequence[float]) -> float:
    """Mean over the logarithm of the budget, from the smallest to the largest, of the best accuracy within it.

    ``points``: share and accuracy. The area below the front as steps, in %.
    """
    edges, total = np.log([budgets[0], budgets[-1]]), 0.0
    known = sorted((max(np.log(share), edges[0]), accuracy) for share, accuracy in points)
    marks = [*dict.fromkeys(place for place, _ in known if place < edges[-1]), edges[-1]]
    for left, right in itertools.pairwise(marks):
        total += (right - left) * max(accuracy for place, accuracy in known if place <= left)
    return float(total / (edges[-1] - edges[0]))


def cells(found: Mapping[str, Any], kind: str) -> tuple[list[float], dict[str, np.ndarray]]:
    """The budgets; of each method that is complete, share of ``kind`` and test accuracy ``(seeds, budgets, 2)``."""
    place = 5 if kind == "FLOPs" else 6
    table: dict[str, dict[tuple[str, float], tuple[float, float]]] = {}
    for seed, result in found["seeds"].items():
        for row in result["rows"]:
            if row[0] == kind:
                table.setdefault(row[2], {})[seed, row[1]] = (row[place], row[3])
    budgets = sorted({budget for row in table.values() for _, budget in row})
    keys = [(seed, budget) for seed in found["seeds"] for budget in budgets]
    shape = (len(found["seeds"]), len(budgets), 2)
    whole = {method: row for method, row in table.items() if all(key in row for key in keys)}
    return budgets, {method: np.array([row[key] for key in keys]).reshape(shape) for method, row in whole.items()}


def report(found: Mapping[str, Any]) -> str:
    """Tables of one task, in Markdown. p: one-sided paired t-test over seeds that the first row's mean is higher."""
    name, plan, seeds = found["task"], Plan(**found["plan"]), found["seeds"]
    spent = np.mean([result["cpu_seconds"]["all"] for result in seeds.values()])
    dense = np.array([row[3] for result in seeds.values() for row in result["rows"] if row[0] == "dense"])
    first, after, supernet = plan.epochs
    tested = "" if plan.tested is None else f" Tested on {plan.tested:,} images."
    lines = [
        f"## {name} {plan.arguments}\n\n    python benchmarks/pruning.py {name} pruning_{name}.json\n",
        f"{found['torch']}, one thread, {spent:.0f} s of CPU per seed, {len(seeds)} seeds. {plan.layers} blocks;",
        f"{first} epochs without masks, then {after} with them; supernet {supernet} epochs, {plan.trials} scores a "
        f"search, {plan.finalists} finalists.{tested}\nDense network: {dense.mean():.2f} ± {dense.std(ddof=1):.2f}.",
    ]
    for kind, what in (("FLOPs", "multiply-adds of the dense network"), ("weights", "the convolutions' weights")):
        budgets, table = cells(found, kind)
        heads = " | ".join(f"{budget:g}" for budget in budgets)
        lines.append(f"\nAt most this share of {what}:\n\n| network | {heads} | mean | area | used | p |")
        lines.append("|---|" + "---|" * (len(budgets) + 4))
        lead = next(iter(table.values()))[..., 1].mean(1)
        for method, values in table.items():
            accuracy = values[..., 1]
            same = np.array_equal(lead, accuracy.mean(1))
            chance = 1.0 if same else float(ttest_rel(lead, accuracy.mean(1), alternative="greater").pvalue)
            p = "" if same else "< 0.001" if chance < 0.001 else f"{chance:.3f}"
            area = np.mean([volume(map(tuple, one), budgets) for one in values])
            used = (values[..., 0] / np.array(budgets)).mean()
            both = zip(accuracy.mean(0), accuracy.std(0, ddof=1), strict=True)
            each = " | ".join(f"{mean:.1f} ± {spread:.1f}" for mean, spread in both)
            lines.append(f"| {method} | {each} | {accuracy.mean():.1f} | {area:.1f} | {used:.2f} | {p} |")
        rows = {row[2] for result in seeds.values() for row in result["rows"] if row[0] == kind}
        if rows - set(table):
            lines.append(
                f"\nLeft out, as a seed has no such network at some budget: {', '.join(sorted(rows - set(table)))}."
            )
    return "\n".join(lines) + "\n"


COLOURS = ("#1f5fae", "#b8530b", "#2a7f3f", "#7a3ea0", "#111111", "#999999", "#c2185b")
DRAWN = (NSGA, GRID, RANDOM, "knapsack, magnitude", "one threshold, magnitude", "uniform ratio, magnitude")
DRAWN += ("uniform ratio, random masks", "uniform width, no mask")


def plot(results: Sequence[Mapping[str, Any]]) -> str:
    """An SVG: a row of two panels per task, mean test accuracy over the share, logarithmic."""
    wide, high, parts = 430, 260, []
    for down, found in enumerate(results):
        for right, kind in enumerate(("FLOPs", "weights")):
            budgets, table = cells(found, kind)
            lines = {method: table[method].mean(0)[:, 1] for method in DRAWN if method in table}
            low, top = min(map(min, lines.values())), max(map(max, lines.values()))
            x0, y0, w, h = right * wide + 45, down * high + 30, wide - 70, high - 75

            def x(share: float, x0: int = x0, w: int = w) -> float:
                return x0 + w * float(np.log(share / BUDGETS[0]) / np.log(BUDGETS[-1] / BUDGETS[0]))

            def y(value: float, y0: int = y0, h: int = h, low: float = low, top: float = top) -> float:
                return y0 + h * float((top - value) / max(top - low, 1e-9))

            parts.append(f'<text x="{x0}" y="{y0 - 12}" font-weight="bold">{found["task"]}, by {kind}</text>')
            parts.append(f'<rect x="{x0}" y="{y0}" width="{w}" height="{h}" fill="none" stroke="#ccc"/>')
            for value in np.linspace(low, top, 5):
                parts.append(f'<text x="{x0 - 5}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.0f}</text>')
            for share in budgets:
                parts.append(f'<text x="{x(share):.1f}" y="{y0 + h + 15}" text-anchor="middle">{share:g}</text>')
            for method, values in lines.items():
                colour = COLOURS[max(0, DRAWN.index(method) - 1)]
                dots = [(x(share), y(value)) for share, value in zip(budgets, values, strict=True)]
                path = " ".join(f"{a:.1f},{b:.1f}" for a, b in dots)
                parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
                parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{colour}"/>' for a, b in dots]
    bottom = len(results) * high
    for i, method in enumerate(DRAWN[1:]):
        label = f"{NSGA} (FLOPs), {GRID} (weights)" if i == 0 else method
        place = f'x="{20 + i % 3 * 280}" y="{bottom + 15 + i // 3 * 18}"'
        parts.append(f'<text {place} fill="{COLOURS[i]}">● {label}</text>')
    size = f'width="{2 * wide}" height="{bottom + 65}"'
    style = 'font-family="sans-serif" font-size="11" style="background:#fff"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=list(PLANS))
    parser.add_argument("file", nargs="?", type=Path, help="results; seeds are added")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--plot", type=Path, nargs="+", metavar="FILE", help="the SVG to write, then results")
    given = parser.parse_args()
    for path in given.report or []:
        print(report(json.loads(path.read_text())))
    if given.plot:
        given.plot[0].write_text(plot([json.loads(path.read_text()) for path in given.plot[1:]]))
    if not given.task or given.file is None:
        return
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore")
    known = {"task": given.task, "plan": asdict(PLANS[given.task]), "seeds": {}}
    known |= {"torch": f"torch {torch.__version__}, Python {platform.python_version()}"}
    for seed in given.seeds:
        found = json.loads(given.file.read_text()) if given.file.exists() else known
        if str(seed) not in found["seeds"]:
            found["seeds"][str(seed)] = run(given.task, seed, Plan(**found["plan"]))
            given.file.write_text(dumped(found))


def dumped(found: Mapping[str, Any]) -> str:
    """JSON with a line for each row."""
    return re.sub(r"\n {4}(?=[\]}])", "", re.sub(r"\n {5,}", "", json.dumps(found, indent=1)))


if __name__ == "__main__":
    main()
