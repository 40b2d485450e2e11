"""Are searched LoRA ranks better than one rank everywhere, at equal adapter parameters?

    NASGRAPH_DATA=~/data python benchmarks/lora_ranks.py --problem text --out text.md
    python benchmarks/lora_ranks.py --problem digits --out digits.md

``text``: a decoder that knows the first half of a text learns the second, each letter replaced by the one 13 behind it
(the space ``lora_text``). ``digits``: a transformer that knows the digits 0 to 4 learns 5 to 9 (``lora_digits``). Every
way of choosing ranks that spends the same budget of adapter parameters is a row: one rank everywhere or on some layers,
schedules, gradients at the start, allocators, scores of a supernet of nested ranks (DyLoRA), and searches that train
each candidate alone. What is chosen is trained from starts that no search has seen and compared on the test split.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr, ttest_rel

from nasgraph.allocation.rank_starts import ALLOCATORS, allocated
from nasgraph.allocation.ranks import architecture, linear_schedule
from nasgraph.allocation.starts import effects, front, within
from nasgraph.model_space import ModelSpace
from nasgraph.objectives.bits import count_adapter_parameters
from nasgraph.search_spaces.lora_digits import lora_digits
from nasgraph.search_spaces.lora_text import lora_text
from nasgraph.space import Architecture
from nasgraph.supernet import Supernet
from nasgraph.tasks.adapted_text import adapted_text
from nasgraph.tasks.text import digits_rows
from nasgraph.training.loop import TrainSettings
from nasgraph.training.policies import Uniform

Ranks = dict[str, int]  # by the name of the choice
Row = dict[str, float]
Pairs = list[tuple[float, float, int]]  # loss in the supernet, test loss alone, adapter parameters
FINALISTS = 3  # of a search, trained from further starts
FURTHER = 2  # starts of each of them


@dataclass
class Problem:
    """A space, a task, how a candidate is trained alone, and a budget of adapter parameters."""

    name: str
    ranks: tuple[int, ...]
    alone: TrainSettings
    samples: int  # of a step of the supernet and of the allocators
    steps: int  # of an allocator's training
    about: str
    uniform: int = 2

    @cached_property
    def space(self) -> ModelSpace:
        made = (
            lora_digits(ranks=self.ranks, alpha=12.0, scale="alpha/r_max")
            if self.name == "digits"
            else lora_text(ranks=self.ranks)
        )
        assert isinstance(made, ModelSpace)
        return made

    @cached_property
    def task(self) -> Any:
        return digits_rows(digits=range(5, 10)) if self.name == "digits" else adapted_text(batch_size=16, steps=150)

    @cached_property
    def one(self) -> Ranks:
        """Adapter parameters of rank 1, by choice."""
        zero = dict.fromkeys(self.space.choices, 0)
        return {name: count_adapter_parameters(self.space.model({**zero, name: 1})) for name in zero}

    @property
    def budget(self) -> int:
        return self.uniform * sum(self.one.values())

    def cost(self, ranks: Any) -> int:
        return sum(self.one[name] * int(rank) for name, rank in ranks.items())

    def train(self, ranks: Ranks, seed: int, split: str = "val") -> Row:
        """Trained alone from the start ``seed``."""
        model = self.space.model(ranks, seed)
        self.task.fit(model, self.alone, seed)
        scores = {name: self.task.score(model, name) for name in {"val", split}}
        return {"val": scores["val"]["loss"], "loss": scores[split]["loss"], "accuracy": scores[split]["accuracy"]}

    def filled(self, ranks: Ranks, rng: random.Random, weights: dict[str, float] | None = None) -> Ranks:
        """Raise ranks at random, an option at a time, as long as any fits."""
        ranks = dict(ranks)
        while True:
            fits = []
            for name, rank in ranks.items():
                higher = [option for option in self.ranks if option > rank]
                if higher and self.cost({**ranks, name: higher[0]}) <= self.budget:
                    fits.append((name, higher[0]))
            if not fits:
                return ranks
            name, rank = rng.choices(fits, None if weights is None else [weights[name] for name, _ in fits])[0]
            ranks[name] = rank

    def random(self, rng: random.Random) -> Ranks:
        """An architecture that spends the budget; every other time some layers are likelier than others."""
        weights = {name: rng.expovariate(1) + 0.05 for name in self.one} if rng.random() < 0.5 else None
        return self.filled(dict.fromkeys(self.one, 0), rng, weights)

    def mutated(self, ranks: Ranks, rng: random.Random) -> Ranks:
        """Two ranks are lowered, then the budget is filled again."""
        ranks = dict(ranks)
        above = [name for name, rank in ranks.items() if rank]
        for name in rng.sample(above, min(2, len(above))):
            ranks[name] = rng.choice([option for option in self.ranks if option < ranks[name]])
        return self.filled(ranks, rng)


PROBLEMS = {
    "text": Problem(
        "text",
        (0, 1, 2, 3, 4, 5, 6, 8, 12, 16),
        TrainSettings(epochs=1, lr=0.02, weight_decay=0.0, patience=1, optimizer="adamw"),
        16,
        150,
        "`lora_text`: the 13 linear layers of a decoder of 3 blocks that knows the first half of tinyshakespeare; it"
        " learns the second half, each letter replaced by the one 13 behind it: 150 steps of 16 windows of 32"
        " characters, AdamW, lr 0.02, scale alpha/r_max, alpha 16",
    ),
    "digits": Problem(
        "digits",
        (0, 1, 2, 4, 8),
        TrainSettings(epochs=20, lr=0.003, weight_decay=0.0, patience=20, optimizer="adamw"),
        64,
        180,
        "`lora_digits`: the 12 matrices of a transformer that knows the digits 0 to 4; it learns 5 to 9: 20 epochs,"
        " AdamW, lr 0.003, scale alpha/r_max, alpha 12",
    ),
}


# ---- ways of choosing ranks -----------------------------------------------------------------------------------------


def fixed(problem: Problem) -> dict[str, Ranks]:
    """Ranks that need neither training nor search: the highest of each kind that fits the budget."""
    names = list(problem.one)
    found = {}

    def highest(make: Callable[[int], Ranks]) -> tuple[int, Ranks]:
        every = [(rank, make(rank)) for rank in problem.ranks[1:]]
        return max((each for each in every if problem.cost(each[1]) <= problem.budget), key=lambda each: each[0])

    def only(part: Callable[[str], bool]) -> tuple[int, Ranks]:
        return highest(lambda rank: {name: rank if part(name) else 0 for name in names})

    kinds: dict[str, Callable[[str], bool]] = {
        "everywhere": lambda name: True,
        "on the blocks": lambda name: "blocks." in name,
        "on attention": lambda name: ".attend." in name,
        "on the feed-forward layers": lambda name: name.endswith((".up", ".down")),
        "on the head": lambda name: name.endswith(".head"),
    }
    for kind, part in kinds.items():
        if any(map(part, names)) and (kind == "everywhere" or not all(map(part, names))):
            rank, ranks = only(part)
            found[f"uniform rank {rank} {kind}"] = ranks
    layers = [name.removeprefix("rank.") for name in names]
    for way in ("rising", "falling"):

        def schedule(rank: int, way: str = way) -> Ranks:
            ends = (0, rank) if way == "rising" else (rank, 0)
            return plain(architecture(problem.space, linear_schedule(layers, *ends)))

        found[f"linear schedule, {way}"] = highest(schedule)[1]
    return found


def plain(found: Any) -> Ranks:
    return {name: int(label) for name, label in found.items()}


def by_gradients(problem: Problem, seed: int) -> Ranks:
    """The singular values of the gradient at the start that the budget can hold (nasgraph.transforms.damage)."""
    space, start, batch = problem.space, problem.space.baseline(), problem.task.batch(256, seed)
    table = effects(space, space.model, start, batch, "gradients", lambda each: float(problem.cost(each)))
    return plain({**start, **within(front(table, start), problem.budget).labels})


def by_allocator(problem: Problem, method: str, seed: int) -> Ranks:
    """What is left when one training with gates has come down to the budget."""
    space, lr = problem.space, problem.alone.lr
    batches = [problem.task.batch(problem.samples, 1000 * seed + step) for step in range(problem.steps)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        left = allocated(space, space.model, space.baseline(), batches, method, lr)
    return plain(max((each for each in left if problem.cost(each) <= problem.budget), key=problem.cost))


def evolved(problem: Problem, score: Callable[[Ranks], float], count: int, seed: int) -> list[Ranks]:
    """Regularised evolution (Real et al., AAAI 2019) with ``count`` evaluations; all, the lowest score first."""
    rng = random.Random(seed)
    every: list[tuple[float, Ranks]] = []
    for i in range(count):
        parent = min(rng.sample(every[-20:], 5), key=lambda entry: entry[0])[1] if i >= 20 else None
        ranks = problem.random(rng) if parent is None else problem.mutated(parent, rng)
        every.append((score(ranks), ranks))
    return distinct(ranks for _, ranks in sorted(every, key=lambda entry: entry[0]))


def distinct(every: Iterable[Ranks]) -> list[Ranks]:
    return list({json.dumps(ranks): ranks for ranks in every}.values())


@dataclass
class Trained:
    """Candidates trained alone, each from one start; the best from further ones."""

    problem: Problem
    seed: int
    losses: list[tuple[Ranks, float]] = field(default_factory=list)
    trainings: int = 0

    def add(self, ranks: Ranks) -> None:
        self.losses.append((ranks, self._loss(ranks, 0)))

    def best(self, by_model: bool = False) -> Ranks:
        """Of the ``FINALISTS`` best, the one with the lowest mean loss over all its starts.

        ``by_model``: finalists have the lowest mean of their loss and of what the model expects, since the lowest
        losses of single starts are partly luck.
        """
        weights, _, _ = self._model() if by_model else (np.zeros(len(self.problem.one)), None, 0.0)
        expected = {i: float(self._features(ranks) @ weights) for i, (ranks, _) in enumerate(self.losses)}
        order = sorted(expected, key=lambda i: self.losses[i][1] + expected[i])
        means = [
            (statistics.mean([self.losses[i][1], *(self._loss(self.losses[i][0], 1 + k) for k in range(FURTHER))]), i)
            for i in order[:FINALISTS]
        ]
        return self.losses[min(means)[1]][0]

    def _loss(self, ranks: Ranks, start: int) -> float:
        self.trainings += 1
        return self.problem.train(ranks, 1000 + 10 * self.seed + start)["val"]

    def propose(self, rng: random.Random) -> Ranks:
        """The lowest loss that is expected among new architectures: mutations of the best ones and random ones.

        Expected by a linear model of ``log2(1 + rank)`` of each layer (ridge regression), its coefficients drawn from
        their posterior (Thompson sampling), so that what is little known is tried too.
        """
        weights, precision, spread = self._model()
        noise = np.linalg.solve(np.linalg.cholesky(precision).T, [rng.gauss(0, 1) for _ in weights])
        drawn = weights + spread * noise
        best = [ranks for ranks, _ in sorted(self.losses, key=lambda entry: entry[1])[:5]]
        pool = [self.problem.mutated(rng.choice(best), rng) for _ in range(200)]
        for _ in range(3):  # mutations of the most promising mutations
            pool = sorted(distinct(pool), key=lambda ranks: float(self._features(ranks) @ drawn))[:40]
            pool += [self.problem.mutated(ranks, rng) for ranks in pool for _ in range(4)]
        seen = [ranks for ranks, _ in self.losses]
        return min(
            (ranks for ranks in pool if ranks not in seen), key=lambda ranks: float(self._features(ranks) @ drawn)
        )

    def _model(self) -> tuple[Any, Any, float]:
        """Coefficients of the linear model, their precision in units of the noise, and the noise left."""
        x = np.array([self._features(ranks) for ranks, _ in self.losses])
        y = np.array([loss for _, loss in self.losses])
        x, y = x - x.mean(0), y - y.mean()
        precision = x.T @ x + np.eye(x.shape[1])
        weights = np.linalg.solve(precision, x.T @ y)
        return weights, precision, float(np.std(y - x @ weights))

    def _features(self, ranks: Ranks) -> Any:
        return np.log2(1 + np.array([ranks[name] for name in self.problem.one]))


def one_seed(seed: int, given: argparse.Namespace) -> tuple[dict[str, Row], dict[str, Ranks], Pairs]:
    """Of one seed: what each way of choosing ranks gives, what it chose, and scores beside losses after training."""
    torch.set_num_threads(1)
    problem, begun = PROBLEMS[given.problem], time.process_time()
    chosen = fixed(problem)
    chosen["gradients at the start"] = by_gradients(problem, seed)
    titles = {"adalora": "AdaLoRA", "dynamic_rank": "dynamic rank (DoRA)", "sora": "SoRA"}
    for method in ALLOCATORS:
        chosen[titles[method]] = by_allocator(problem, method, seed)

    supernet, seen = Supernet(problem.space, problem.task, seed), dict[str, float]()
    settings = TrainSettings(lr=problem.alone.lr, weight_decay=0.0, optimizer="adamw")
    supernet.train(Uniform(problem.space), given.steps, settings=settings, seed=seed, samples=problem.samples)

    def score(ranks: Ranks) -> float:
        key = json.dumps(ranks)
        if key not in seen:
            seen[key] = problem.task.score(supernet.subnet(Architecture(ranks)).eval(), "val")["loss"]
        return seen[key]

    ordered = evolved(problem, score, given.count, seed)
    search, few, blind = Trained(problem, seed), Trained(problem, seed), Trained(problem, seed)
    for ranks in distinct(chosen.values()):
        search.add(ranks)
    chosen["supernet (DyLoRA), best score"] = ordered[0]
    for ranks in ordered[: given.few]:
        few.add(ranks)
    chosen[f"supernet, its best {given.few} trained"] = few.best()
    rng = random.Random(seed)
    while search.trainings < given.trainings:
        search.add(search.propose(rng))
    rng = random.Random(seed + 1000)
    for _ in range(given.trainings + len(ALLOCATORS)):  # the search has used a training for each allocator
        blind.add(problem.random(rng))
    chosen["search, each trained"] = search.best(by_model=True)
    chosen["random search, each trained"] = blind.best()

    results = {}
    for name, ranks in chosen.items():
        starts = [problem.train(ranks, 100 + 10 * seed + i, "test") for i in range(given.starts)]
        results[name] = {key: statistics.mean(start[key] for start in starts) for key in starts[0]}
        results[name] |= {"supernet": score(ranks), "params": problem.cost(ranks)}
        if given.confirm and (name in (*SEARCHES, "AdaLoRA") or "everywhere" in name):
            more = (problem.train(ranks, 5000 + 100 * seed + i, "test")["loss"] for i in range(given.confirm))
            results[name]["confirmed"] = statistics.mean(more)
        print(f"seed {seed}, {name}: {results[name]} {list(ranks.values())}", flush=True)
    pairs, rng = [], random.Random(seed)
    for i in range(given.pairs):
        ranks = {name: rng.choice(problem.ranks) for name in problem.one} if i % 2 else problem.random(rng)
        pairs.append((score(ranks), problem.train(ranks, 2000 + i, "test")["loss"], problem.cost(ranks)))
    print(f"seed {seed}: {time.process_time() - begun:.0f} s of processor time", flush=True)
    return results, chosen, pairs


# ---- the page -------------------------------------------------------------------------------------------------------


def report(
    given: argparse.Namespace, results: dict[str, list[Row]], chosen: dict[str, list[Ranks]], pairs: Pairs
) -> str:
    """The section of results."""
    problem = PROBLEMS[given.problem]
    mean = {name: {key: statistics.mean(row[key] for row in rows) for key in rows[0]} for name, rows in results.items()}
    best = min((name for name in results if name.startswith("uniform")), key=lambda name: mean[name]["val"])
    options = " ".join(f"--{name} {getattr(given, name)}" for name in SIZES)
    lines = [
        f"    python benchmarks/lora_ranks.py --problem {problem.name} --out {given.out.name} {options}",
        "",
        f"{problem.about}. Ranks {', '.join(map(str, problem.ranks))}. Budget: {problem.budget:,} adapter parameters,"
        f" those of rank {problem.uniform} everywhere. Mean of {given.seeds} seeds, each with searches of its own and"
        f" {given.starts} new starts of every row's ranks; losses in nats, standard deviation over seeds. A search"
        f" has {given.trainings} trainings, random search {given.trainings + len(ALLOCATORS)}, the {FINALISTS} best of"
        f" each {FURTHER} more starts. Supernet: {given.steps} steps, {given.count} scores.",
        "",
        f"| ranks | adapter params | test loss | test accuracy | loss minus that of {best} | paired t-test, p |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    reference = [row["loss"] for row in results[best]]
    for name, rows in sorted(results.items(), key=lambda entry: mean[entry[0]]["loss"]):
        losses = [row["loss"] for row in rows]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        lines.append(
            f"| {name} | {mean[name]['params']:,.0f} | {mean[name]['loss']:.4f} +- {spread:.4f} |"
            f" {mean[name]['accuracy']:.3f} | {against(losses, reference)} |"
        )
    searched, blind = ([row["loss"] for row in results[name]] for name in SEARCHES)
    lines += ["", f"The search against random search: {against(searched, blind).replace(' | ', ' nats, p ')}.", ""]
    lines += confirmed(given, results)
    columns = [*SEARCHES, "AdaLoRA", "gradients at the start"]
    lines += ["Mean rank of each matrix:", "", f"| matrix | parameters of rank 1 | {' | '.join(columns)} |"]
    lines += ["| --- | ---: |" + " ---: |" * len(columns)]
    for name in problem.one:
        means = [f"{statistics.mean(ranks[name] for ranks in chosen[how]):.1f}" for how in columns]
        lines.append(f"| `{name.removeprefix('rank.')}` | {problem.one[name]} | {' | '.join(means)} |")
    even, odd = (pairs_at(pairs, given.pairs, rest) for rest in (0, 1))
    kinds = {"all": pairs, "at the budget": even, "of any size": odd}
    lines += ["", "DyLoRA's scores (validation loss in a supernet) against the test loss after training alone:", ""]
    lines += ["| architectures | pairs | Spearman | p | Spearman of the number of adapter parameters |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for kind, some in kinds.items():
        rho = spearmanr([a for a, _, _ in some], [b for _, b, _ in some])
        sizes = [c for _, _, c in some]
        cost = "" if max(sizes) < 1.1 * min(sizes) else f"{spearmanr(sizes, [b for _, b, _ in some]).statistic:.2f}"
        lines.append(f"| {kind} | {len(some)} | {rho.statistic:.2f} | {shown(rho.pvalue)} | {cost} |")
    return "\n".join([*lines, ""])


def confirmed(given: argparse.Namespace, results: dict[str, list[Row]]) -> list[str]:
    """The main rows again, from starts that neither the searches nor the table above have seen."""
    losses = {name: [row["confirmed"] for row in rows] for name, rows in results.items() if "confirmed" in rows[0]}
    if not losses:
        return []
    uniform = next(name for name in losses if "everywhere" in name)
    lines = [f"The same ranks from {given.confirm} further starts for each seed:", ""]
    lines += [f"| ranks | test loss | minus that of {uniform} | p | minus that of random search | p |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, own in sorted(losses.items(), key=lambda entry: statistics.mean(entry[1])):
        spread = statistics.stdev(own) if len(own) > 1 else 0.0
        others = f"{against(own, losses[uniform])} | {against(own, losses[SEARCHES[1]])}"
        lines.append(f"| {name} | {statistics.mean(own):.4f} +- {spread:.4f} | {others} |")
    return [*lines, ""]


def pairs_at(pairs: Pairs, each: int, odd: int) -> Pairs:
    return [pair for i, pair in enumerate(pairs) if i % each % 2 == odd]


def against(losses: list[float], reference: list[float]) -> str:
    """Mean difference and p."""
    difference = statistics.mean(a - b for a, b in zip(losses, reference, strict=True))
    return f"{difference:+.4f} | {'' if losses == reference else shown(ttest_rel(losses, reference).pvalue)}"


def shown(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


SEARCHES = ("search, each trained", "random search, each trained")
SIZES = {
    "seeds": (5, "repetitions of everything"),
    "trainings": (24, "candidates of a search that are trained alone"),
    "starts": (2, "of the test of each row"),
    "confirm": (8, "further starts of uniform ranks, AdaLoRA and the two searches"),
    "steps": (600, "of a supernet"),
    "count": (100, "evaluations of the search in a supernet"),
    "few": (4, "of the best in the supernet that are trained alone"),
    "pairs": (4, "of each seed, architectures trained for the correlation"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=list(PROBLEMS), default="text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    for name, (size, about) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=about)
    given = parser.parse_args()
    assert PROBLEMS[given.problem].space is not None  # trains the base, if it is not in the cache
    results: dict[str, list[Row]] = {}
    chosen: dict[str, list[Ranks]] = {}
    pairs: Pairs = []
    with ProcessPoolExecutor(given.workers, get_context("spawn")) as pool:
        for rows, picked, some in pool.map(one_seed, range(given.seeds), [given] * given.seeds):
            for name in rows:
                results.setdefault(name, []).append(rows[name])
                chosen.setdefault(name, []).append(picked[name])
            pairs += some
    text = report(given, results, chosen, pairs)
    given.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
