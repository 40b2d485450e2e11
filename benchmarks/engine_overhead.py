"""What the engine adds to each candidate; writes results/benchmarks/engine_overhead.md.

    OMP_NUM_THREADS=1 python benchmarks/engine_overhead.py

The evaluation returns at once, so all that is measured is asking, the canonical key, telling and recording.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import nn

from nasgraph.executors import InProcess, Processes
from nasgraph.objectives.base import Scored
from nasgraph.screen import ScreenTable, screen
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.study import Study

OUT = Path(__file__).parents[1] / "results" / "benchmarks" / "engine_overhead.md"
OBJECTIVES: list[tuple[str, Any]] = [("good", "maximize"), ("size", "minimize")]


def ten_choices() -> SearchSpace:
    """Five layers of chosen width and activation: 10 choices, all of them asked for every architecture."""
    space = SearchSpace("ten")
    node = space.input("x", torch.zeros(2, 4))
    for i in range(5):
        width = Choice(f"width{i}", [4, 8, 16, 32], ordered=True)
        kind = Choice(f"kind{i}", {"relu": Op(nn.ReLU), "elu": Op(nn.ELU), "tanh": Op(nn.Tanh)})
        node = space.add(f"kind{i}", kind, space.add(f"linear{i}", Op(nn.Linear, out_features=width), node))
    space.output(node)
    return space


def rate(arch: Mapping[str, Any]) -> Scored:
    size = float(sum(arch[f"width{i}"] for i in range(5)))
    good = sum({"relu": 3.0, "elu": 5.0, "tanh": 1.0}[arch[f"kind{i}"]] for i in range(5))
    return Scored({"good": good - size, "size": size})


def study_ms(folder: Path, sampler: str, trials: int) -> tuple[float, float, float]:
    """Milliseconds of wall clock per trial over all, the last quarter's median, and the CPU time per trial."""
    study = Study(folder / "study.db", sampler, ten_choices(), OBJECTIVES, sampler, seed=0)
    stamps = [time.perf_counter()]
    cpu = time.process_time()
    with InProcess(rate) as executor:
        study.run(trials, executor, lambda record: stamps.append(time.perf_counter()))
    cpu = time.process_time() - cpu
    steps = [1e3 * (b - a) for a, b in zip(stamps, stamps[1:], strict=False)]
    return statistics.mean(steps), statistics.median(steps[-len(steps) // 4 :]), 1e3 * cpu / trials


def optuna_ms(folder: Path, trials: int) -> float:
    """The same random search with Optuna alone on its default SQLite storage: milliseconds of wall clock per trial."""
    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'plain.db'}",
        directions=[direction for _, direction in OBJECTIVES],
        sampler=optuna.samplers.RandomSampler(seed=0),
    )

    def objective(trial: optuna.Trial) -> tuple[float, ...]:
        def pick(choice: Choice) -> Any:
            if choice.ordered:
                return choice.labels[trial.suggest_int(choice.name, 0, len(choice.labels) - 1)]
            return trial.suggest_categorical(choice.name, choice.labels)

        return tuple(rate(space.decide(pick)).values.values())

    space = ten_choices()
    started = time.perf_counter()
    study.optimize(objective, n_trials=trials)
    return 1e3 * (time.perf_counter() - started) / trials


def screen_ms(folder: Path, candidates: int, workers: int) -> tuple[float, float]:
    """Milliseconds of wall clock, and of this process's CPU time, per candidate."""
    executor = Processes(rate, workers=workers) if workers else InProcess(rate)
    with ScreenTable(folder / f"screen{workers}.db") as table, executor as pool:
        screen(ten_choices(), table, 20, 0, pool)  # the start of the processes is not a candidate's cost
        started, cpu = time.perf_counter(), time.process_time()
        screen(ten_choices(), table, candidates + 20, 0, pool)
        spent = time.perf_counter() - started, time.process_time() - cpu
    return 1e3 * spent[0] / candidates, 1e3 * spent[1] / candidates


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--trials", type=int, default=200)
    options.add_argument("--candidates", type=int, default=5000)
    options.add_argument("--out", type=Path, default=OUT)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    lines = [
        "# What the engine adds to each candidate",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/engine_overhead.py --trials {arguments.trials} "
        f"--candidates {arguments.candidates}`",
        "",
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, optuna "
        f"{optuna.__version__}, one thread. A space of 10 choices, two objectives, an evaluation that takes no time. "
        "Wall clock includes the disk; other programs ran on the machine.",
        "",
        f"Study, {arguments.trials} trials:",
        "",
        "| sampler | ms/trial, mean | ms/trial, median of the last quarter | CPU ms/trial |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for sampler in ("random", "tpe", "nsga2"):
            mean, late, cpu = study_ms(folder, sampler, arguments.trials)
            lines.append(f"| {sampler} | {mean:.1f} | {late:.1f} | {cpu:.1f} |")
        plain = optuna_ms(folder, arguments.trials)
        lines += [
            f"| (random, Optuna alone on its default SQLite storage) | {plain:.1f} | | |",
            "",
            f"Screen, {arguments.candidates} candidates:",
            "",
            "| executor | ms/candidate | CPU ms/candidate of the parent |",
            "|---|---|---|",
        ]
        for workers in (0, 2):
            wall, cpu = screen_ms(folder, arguments.candidates, workers)
            lines.append(f"| {f'{workers} processes' if workers else 'in process'} | {wall:.2f} | {cpu:.2f} |")
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
