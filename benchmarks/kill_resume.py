"""Kill searches with kill -9 at random moments, resume them, count what is lost.

Writes results/benchmarks/kill_resume.md.

    OMP_NUM_THREADS=1 python benchmarks/kill_resume.py

A search announces each trial once it is recorded. *Lost*: announced, but not in the file after the kill. *Repeated*: a
network evaluated again although its trial was announced. *Equal*: with one worker, the trials after the last resume are
those of a search that was never interrupted, to the last bit.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import platform
import random
import signal
import sqlite3
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
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.study import Study, TrialRecord

OUT = Path(__file__).parents[1] / "results" / "benchmarks" / "kill_resume.md"
OBJECTIVES: list[tuple[str, Any]] = [("good", "maximize"), ("size", "minimize")]
TRIALS = 40
WORTH = {"relu": 0.3, "elu": 0.5, "tanh": 0.1}


def chain() -> SearchSpace:
    """Up to four layers; the choices of a layer are asked when it is reached."""
    space = SearchSpace("chain")
    node = space.input("x", torch.zeros(2, 4))
    ends: dict[str, Any] = {}
    for i in range(4):
        width = Choice(f"width{i}", [4, 8, 16, 32], ordered=True)
        kind = Choice(f"kind{i}", {"relu": Op(nn.ReLU), "elu": Op(nn.ELU), "tanh": Op(nn.Tanh)})
        node = space.add(f"kind{i}", kind, space.add(f"linear{i}", Op(nn.Linear, out_features=width), node))
        ends[str(i + 1)] = node
    space.output(Choice("depth", ends))
    return space


def evaluate(log: str, arch: Mapping[str, Any]) -> Scored:
    """A trade-off that takes 10 ms; writes down that it was evaluated."""
    write(log, "evaluated", chain().key(arch))
    time.sleep(0.01)
    depth = int(arch["depth"])
    size = float(sum(arch[f"width{i}"] for i in range(depth)))
    return Scored({"good": sum(WORTH[arch[f"kind{i}"]] for i in range(depth)) + 0.01 * size, "size": size})


def write(log: str, *words: object) -> None:
    with open(log, "a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def open_study(folder: str, sampler: str) -> Study:
    return Study(f"{folder}/study.db", "search", chain(), OBJECTIVES, sampler, seed=0)


def search(folder: str, sampler: str, workers: int) -> None:
    torch.set_num_threads(1)
    log = f"{folder}/log"
    rate = functools.partial(evaluate, log)
    with Processes(rate, workers) if workers > 1 else InProcess(rate) as executor:
        study = open_study(folder, sampler)
        write(log, "started", len(study.records))
        study.run(TRIALS, executor, lambda record: write(log, "recorded", record.number, record.key))


def found(records: list[TrialRecord]) -> list[Any]:
    return [(r.number, r.state, r.arch, r.key, r.values, r.reused) for r in records]


def one_round(sampler: str, workers: int, kills: int, rng: random.Random, whole: list[Any]) -> tuple[int, ...]:
    """Returns: kills that hit a running search, trials announced before them, lost, repeated, unfinished, unequal."""
    hits = announced_before = lost = 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nasgraph.study", "torch", "optuna.storages", "sqlalchemy"])
    with tempfile.TemporaryDirectory() as folder:
        for kill in range(kills + 1):
            child = context.Process(target=search, args=(folder, sampler, workers))
            child.start()
            if kill < kills:
                wait_for(folder, len(lines(folder)) + rng.randrange(20), child)
                child.join(rng.uniform(0.0, 0.1))
            else:
                child.join()
            if child.is_alive():
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
                hits += 1
            child.join()
            if kill == kills or not Path(folder, "study.db").exists():
                continue
            connection = sqlite3.connect(f"{folder}/study.db")
            try:
                kept = {
                    number
                    for (number,) in connection.execute(
                        "SELECT value_json + 0 FROM trial_user_attributes WHERE key = 'ask'"
                    )
                }
            except sqlite3.OperationalError:  # killed before the tables were made
                kept = set()
            connection.close()
            told = {int(line.split()[1]) for line in lines(folder) if line.startswith("recorded")}
            announced_before += len(told)
            lost += len(told - kept)
        recorded: set[str] = set()
        repeated = 0
        for line in lines(folder):
            word, *rest = line.split()
            if word == "recorded":
                recorded.add(rest[1])
            elif word == "evaluated":
                repeated += rest[0] in recorded
        records = open_study(folder, sampler).records
    unequal = int(workers == 1 and found(records) != whole)
    return hits, announced_before, lost, repeated, int([r.number for r in records] != list(range(TRIALS))), unequal


def wait_for(folder: str, count: int, child: Any) -> None:
    """Until the log has ``count`` lines."""
    while len(lines(folder)) < count and child.is_alive():
        time.sleep(0.002)


def lines(folder: str) -> list[str]:
    log = Path(folder, "log")
    return log.read_text().splitlines() if log.exists() else []


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--kills", type=int, default=3)
    options.add_argument("--out", type=Path, default=OUT)
    arguments = options.parse_args()
    rows = [
        "# Searches killed with kill -9 and resumed",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/kill_resume.py --rounds {arguments.rounds} --kills {arguments.kills}`",
        "",
        f"{platform.machine()}, Python {platform.python_version()}, optuna {optuna.__version__}. Searches of {TRIALS} "
        f"trials, {arguments.kills} kills each at random moments, then resumed to their end. Lost: announced as "
        "recorded before a kill and not in the file after it. Repeated: evaluated again although recorded. Equal: the "
        "same trials as a search that was never interrupted, to the last bit (promised for one worker).",
        "",
        "| sampler | workers | searches | kills that hit | trials announced before a kill | lost | repeated "
        "| with a gap | equal |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for sampler, workers in (("random", 1), ("tpe", 1), ("nsga2", 1), ("nsga2", 2)):
        with tempfile.TemporaryDirectory() as folder:
            search(folder, sampler, 1)
            whole = found(open_study(folder, sampler).records)
        rng = random.Random(f"{sampler}{workers}")
        rounds = [one_round(sampler, workers, arguments.kills, rng, whole) for _ in range(arguments.rounds)]
        hits, announced, lost, repeated, gaps, unequal = map(sum, zip(*rounds, strict=True))
        equal = f"{arguments.rounds - unequal} of {arguments.rounds}" if workers == 1 else "not promised"
        cells = [sampler, workers, arguments.rounds, hits, announced, lost, repeated, gaps, equal]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
        print(rows[-1], flush=True)
    arguments.out.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
