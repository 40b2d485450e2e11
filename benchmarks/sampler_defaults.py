"""Which settings of the samplers should be the default; writes results/benchmarks/sampler_defaults.md.

    OMP_NUM_THREADS=1 python benchmarks/sampler_defaults.py

Random two-objective problems over 10 choices of 4 options: a quadratic form to maximise, an additive cost to minimise.
One problem per seed, the same for all samplers; larger hypervolume is better.
"""

from __future__ import annotations

import argparse
import platform
import warnings
from collections.abc import Callable
from pathlib import Path

import moocore
import numpy as np
import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler

OUT = Path(__file__).parents[1] / "results" / "benchmarks" / "sampler_defaults.md"
BUDGETS = (50, 100, 200)
SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "random": lambda seed: RandomSampler(seed=seed),
    "NSGA-II, population 10": lambda seed: NSGAIISampler(seed=seed, population_size=10),
    "NSGA-II, population 20": lambda seed: NSGAIISampler(seed=seed, population_size=20),
    "NSGA-II, population 50 (Optuna's default)": lambda seed: NSGAIISampler(seed=seed, population_size=50),
    "TPE, one choice at a time": lambda seed: TPESampler(seed=seed, multivariate=False),
    "TPE, multivariate and grouped": lambda seed: TPESampler(seed=seed, multivariate=True, group=True),
}


def problem(seed: int) -> Callable[[optuna.Trial], tuple[float, float]]:
    rng = np.random.default_rng(seed)
    single, pairs, cost = rng.normal(size=(10, 4)), 0.5 * rng.normal(size=(10, 10, 4, 4)), rng.random((10, 4))

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        x = [trial.suggest_categorical(f"c{i}", [0, 1, 2, 3]) for i in range(10)]
        good = sum(single[i, x[i]] for i in range(10))
        good += sum(pairs[i, j, x[i], x[j]] for i in range(10) for j in range(i))
        return -float(good), float(sum(cost[i, x[i]] for i in range(10)))

    return objective


def hypervolumes(make: Callable[[int], BaseSampler], seed: int) -> list[float]:
    """Of the first 50, 100 and 200 trials, against the reference point (20, 10)."""
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=make(seed))
    study.optimize(problem(seed), n_trials=max(BUDGETS))
    values = np.array([trial.values for trial in study.trials])
    return [float(moocore.hypervolume(values[:budget], ref=[20, 10])) for budget in BUDGETS]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, default=30)
    options.add_argument("--out", type=Path, default=OUT)
    arguments = options.parse_args()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found = {
        name: np.array([hypervolumes(make, seed) for seed in range(arguments.seeds)]) for name, make in SAMPLERS.items()
    }
    rows = [
        "# Settings of the samplers",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/sampler_defaults.py --seeds {arguments.seeds}`",
        "",
        f"optuna {optuna.__version__}, Python {platform.python_version()}. Hypervolume gained over random search with "
        f"the same seed and budget (mean over {arguments.seeds} random problems, with its standard error); random "
        "search reaches " + ", ".join(f"{found['random'][:, i].mean():.0f}" for i in range(len(BUDGETS))) + ".",
        "",
        "| sampler | " + " | ".join(f"{budget} trials" for budget in BUDGETS) + " |",
        "|---" * (len(BUDGETS) + 1) + "|",
    ]
    for name, volumes in found.items():
        gain = volumes - found["random"]
        cells = [f"{g.mean():+.1f} ± {g.std(ddof=1) / len(g) ** 0.5:.1f}" for g in gain.T]
        if name != "random":
            rows.append(f"| {name} | {' | '.join(cells)} |")
    arguments.out.write_text("\n".join(rows) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
