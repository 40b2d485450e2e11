"""Are searched LoRA ranks better than one rank everywhere, at equal adapter parameters? On the digits, no download.

    python benchmarks/lora_ranks.py --out results/benchmarks/lora_ranks.md

The space is ``lora_digits``: a transformer that knows the digits 0 to 4 learns 5 to 9. For each seed a supernet of
nested ranks is trained with uniform paths (DyLoRA), it scores architectures that spend the budget, by evolution and,
with as many evaluations, at random; the best of each are trained alone and compared on the test split.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from scipy.stats import spearmanr, ttest_rel

from nasgraph.allocation.ranks import architecture, linear_schedule
from nasgraph.model_space import ModelSpace
from nasgraph.search_spaces.lora_digits import lora_digits
from nasgraph.space import Architecture
from nasgraph.supernet import Supernet
from nasgraph.tasks.text import RowTask, digits_rows
from nasgraph.training.loop import TrainSettings
from nasgraph.training.policies import Uniform
from nasgraph.transforms.lora import adapter_params

RANKS = (0, 1, 2, 4, 8)
Chosen = dict[str, dict[str, int]]
Pairs = list[tuple[float, float, int]]  # loss in the supernet, test loss alone, adapter parameters
ALONE = TrainSettings(epochs=20, lr=0.003, weight_decay=0.0, patience=20, optimizer="adamw")


class Costs:
    """Adapter parameters of an architecture, and moves that keep to a budget."""

    def __init__(self, space: ModelSpace, uniform: int) -> None:
        zero = dict.fromkeys(space.choices, 0)
        self.space = space
        self.one = {name: adapter_params(space.model({**zero, name: 1})) for name in space.choices}
        self.budget = uniform * sum(self.one.values())

    def of(self, ranks: dict[str, int]) -> int:
        return sum(self.one[name] * rank for name, rank in ranks.items())

    def filled(self, ranks: dict[str, int], rng: random.Random) -> dict[str, int]:
        """Raise ranks at random, an option at a time, as long as any fits."""
        ranks = dict(ranks)
        while True:
            fits = []
            for name, rank in ranks.items():
                higher = [option for option in RANKS if option > rank]
                if higher and self.of({**ranks, name: higher[0]}) <= self.budget:
                    fits.append((name, higher[0]))
            if not fits:
                return ranks
            name, rank = rng.choice(fits)
            ranks[name] = rank

    def mutated(self, ranks: dict[str, int], rng: random.Random) -> dict[str, int]:
        """Two ranks are lowered, then the budget is filled again."""
        ranks = dict(ranks)
        for name in rng.sample([name for name, rank in ranks.items() if rank], 2):
            ranks[name] = rng.choice([option for option in RANKS if option < ranks[name]])
        return self.filled(ranks, rng)


def evolved(costs: Costs, score: Callable[[dict[str, int]], float], count: int, seed: int) -> dict[str, int]:
    """Regularised evolution (Real et al., AAAI 2019) with ``count`` evaluations; the lowest score seen."""
    rng, zero = random.Random(seed), dict.fromkeys(costs.space.choices, 0)
    living: list[tuple[float, dict[str, int]]] = []
    best: tuple[float, dict[str, int]] | None = None
    for i in range(count):
        parent = min(rng.sample(living, 5), key=lambda entry: entry[0])[1] if i >= 20 else None
        ranks = costs.filled(zero, rng) if parent is None else costs.mutated(parent, rng)
        living = [*living, (score(ranks), ranks)][-20:]
        best = living[-1] if best is None or living[-1][0] < best[0] else best
    assert best is not None
    return best[1]


def at_random(costs: Costs, score: Callable[[dict[str, int]], float], count: int, seed: int) -> dict[str, int]:
    """The lowest score of ``count`` random architectures that spend the budget."""
    rng, zero = random.Random(seed), dict.fromkeys(costs.space.choices, 0)
    return min((costs.filled(zero, rng) for _ in range(count)), key=score)


def alone(space: ModelSpace, task: RowTask, ranks: dict[str, int], seed: int) -> dict[str, float]:
    """Trained from its start: losses and accuracy."""
    model = space.model(ranks, seed)
    task.fit(model, ALONE, seed)
    test = task.score(model, "test")
    return {"val": task.score(model, "val")["loss"], "loss": test["loss"], "accuracy": test["accuracy"]}


def one_seed(seed: int, given: argparse.Namespace) -> tuple[dict[str, dict[str, float]], Chosen, Pairs]:
    """Of one seed: what each way of choosing ranks gives, what was chosen, and scores beside losses after training."""
    torch.set_num_threads(1)
    task = digits_rows(digits=range(5, 10))
    space = lora_digits(ranks=RANKS, alpha=12.0, scale="alpha/r_max")
    assert isinstance(space, ModelSpace)
    costs, seen = Costs(space, given.uniform), dict[str, float]()
    supernet = Supernet(space, task, seed)
    settings = TrainSettings(lr=0.003, weight_decay=0.0, optimizer="adamw")
    supernet.train(Uniform(space), given.steps, settings=settings, seed=seed, samples=64)

    def score(ranks: dict[str, int]) -> float:
        key = json.dumps(ranks)
        if key not in seen:
            seen[key] = task.score(supernet.subnet(Architecture(ranks)).eval(), "val")["loss"]
        return seen[key]

    chosen = {
        "searched": evolved(costs, score, given.count, seed),
        "random search": at_random(costs, score, given.count, seed + 1000),
    }
    results = {}
    for name, ranks in {**fixed(space, given.uniform), **chosen}.items():
        if costs.of(ranks) <= costs.budget:
            found = alone(space, task, ranks, 100 + seed)
            results[name] = {**found, "supernet": score(ranks), "params": costs.of(ranks)}
            print(f"seed {seed}, {name}: {results[name]}", flush=True)
    pairs, rng = [], random.Random(seed)
    for i in range(given.pairs):
        ranks = {name: rng.choice(RANKS) for name in space.choices}
        ranks = ranks if i % 2 else costs.filled(dict.fromkeys(ranks, 0), rng)
        pairs.append((score(ranks), alone(space, task, ranks, 200 + i)["loss"], costs.of(ranks)))
    return results, chosen, pairs


def fixed(space: ModelSpace, uniform: int) -> dict[str, dict[str, int]]:
    """Ranks that need no search."""
    layers = [name.removeprefix("rank.") for name in space.choices]
    found = {f"uniform rank {rank}": dict.fromkeys(space.choices, rank) for rank in RANKS[1:] if rank <= uniform}
    attention = {name: 2 * uniform if ".attend." in name else 0 for name in space.choices}
    found[f"attention only, rank {2 * uniform}"] = attention
    for name, ends in {"rising": (0, 2 * uniform), "falling": (2 * uniform, 0)}.items():
        made = architecture(space, linear_schedule(layers, *ends))
        found[f"linear schedule, {name}"] = {choice: int(str(label)) for choice, label in made.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600, help="of a supernet")
    parser.add_argument("--count", type=int, default=150, help="evaluations of each search")
    parser.add_argument("--uniform", type=int, default=2, help="the budget: this rank everywhere")
    parser.add_argument("--pairs", type=int, default=4, help="of each seed, architectures trained for the correlation")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    space = lora_digits(ranks=RANKS, alpha=12.0, scale="alpha/r_max")  # trains the base, if it is not in the cache
    assert isinstance(space, ModelSpace)
    results: dict[str, list[dict[str, float]]] = {}
    chosen: dict[str, list[dict[str, int]]] = {"searched": [], "random search": []}
    pairs: Pairs = []
    with ProcessPoolExecutor(given.workers, get_context("spawn")) as pool:
        for rows, picked, some in pool.map(one_seed, range(given.seeds), [given] * given.seeds):
            for name, row in rows.items():
                results.setdefault(name, []).append(row)
            for name, ranks in picked.items():
                chosen[name].append(ranks)
            pairs += some
    text = report(given, results, pairs, chosen, Costs(space, given.uniform))
    given.out.write_text(text, encoding="utf-8")
    print(text)


def report(
    given: argparse.Namespace,
    results: dict[str, list[dict[str, float]]],
    pairs: Pairs,
    chosen: dict[str, list[dict[str, int]]],
    costs: Costs,
) -> str:
    """The page of results."""
    mean = {name: {key: statistics.mean(row[key] for row in rows) for key in rows[0]} for name, rows in results.items()}
    best = min((name for name in results if name.startswith("uniform")), key=lambda name: mean[name]["val"])
    lines = [
        "# LoRA ranks: searched against one rank everywhere",
        "",
        f"    python benchmarks/lora_ranks.py --out results/benchmarks/lora_ranks.md --seeds {given.seeds}"
        f" --steps {given.steps} --count {given.count} --uniform {given.uniform} --pairs {given.pairs}",
        "",
        f"`lora_digits`: 12 matrices, ranks {', '.join(map(str, RANKS))}; a transformer that knows the digits 0 to 4"
        f" learns 5 to 9, scale alpha/r_max, alpha 12. Budget: {costs.budget:,} adapter parameters, those of rank"
        f" {given.uniform} everywhere. Mean of {given.seeds} seeds (a supernet, a search and a start each); losses in"
        " nats, standard deviation over seeds. One thread each.",
        "",
        f"| ranks | adapter params | test loss | test accuracy | loss minus that of {best} | paired t-test, p |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    reference = [row["loss"] for row in results[best]]
    for name, rows in sorted(results.items(), key=lambda entry: mean[entry[0]]["loss"]):
        losses = [row["loss"] for row in rows]
        difference = statistics.mean(a - b for a, b in zip(losses, reference, strict=True))
        p = "" if name == best else f"{ttest_rel(losses, reference).pvalue:.3f}"
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        lines.append(
            f"| {name} | {mean[name]['params']:,.0f} | {mean[name]['loss']:.4f} +- {spread:.4f} |"
            f" {mean[name]['accuracy']:.3f} | {difference:+.4f} | {p} |"
        )
    lines += ["", "Mean rank of each matrix:", "", "| matrix | searched | random search |", "| --- | ---: | ---: |"]
    for name in costs.space.choices:
        means = [statistics.mean(ranks[name] for ranks in chosen[how]) for how in ("searched", "random search")]
        lines.append(f"| `{name.removeprefix('rank.')}` | {means[0]:.1f} | {means[1]:.1f} |")
    rho = spearmanr([a for a, _, _ in pairs], [b for _, b, _ in pairs])
    cost = spearmanr([c for _, _, c in pairs], [b for _, b, _ in pairs])
    lines += [
        "",
        f"DyLoRA's scores (validation loss in a supernet) against the test loss after training alone,"
        f" {len(pairs)} architectures, half of them of any size and half at the budget: Spearman {rho.statistic:.2f}"
        f" (p {rho.pvalue:.3f}). The number of adapter parameters against it: {cost.statistic:.2f}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
