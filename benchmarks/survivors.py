"""Which untrained candidates a screen should hand to a study of accuracy and size.

    python benchmarks/survivors.py rows.json > results/benchmarks/survivors.md

160 random networks of ``gnn_node`` (2 layers) on the digits are trained and scored; ``rows.json`` keeps that. Then, 300
times, 80 of them are screened and 12 kept by each rule; what counts is the hypervolume of (validation accuracy, params)
that the 12 dominate once trained, as a share of the box of all 160, with params linear and logarithmic.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nasgraph import registry
from nasgraph.build import build
from nasgraph.errors import NotFinite
from nasgraph.objectives import Evaluator, Scored
from nasgraph.pareto import hypervolume
from nasgraph.screen import ScreenRow, survivors
from nasgraph.space import Architecture
from nasgraph.training import TrainSettings

PROXIES = ("ntk_cond", "naswot", "snip", "jacov")
NETWORKS, SCREENED, KEPT, REPEATS = 160, 80, 12, 300


def rows() -> list[dict[str, float]]:
    """Accuracy, params and proxy scores of random networks."""
    torch.set_num_threads(1)
    task = registry.make("tasks", "digits_knn", {})
    space = registry.make("spaces", "gnn_node", {"layers": 2}, task.sizes)
    evaluate = Evaluator(space, task, ["val_accuracy", "params"], TrainSettings(epochs=40, patience=10))
    batch, rng, found = task.batch(16, 0), random.Random(77), []
    for _ in range(NETWORKS):
        arch = space.sample(rng)
        result = evaluate(arch)
        if not isinstance(result, Scored):
            continue
        row, model = dict(result.values), build(space, arch)
        for name in PROXIES:
            try:
                row[name] = registry.resolve("proxies", name)(model, batch)
            except NotFinite:
                row[name] = -1e9
        found.append(row)
    return found


def share(values: np.ndarray[Any, Any], chosen: list[int]) -> float:
    """Share of the box of all ``values`` (accuracy up, size down) that the chosen ones dominate."""
    worst, best = [values[:, 0].min(), values[:, 1].max()], [values[:, 0].max(), values[:, 1].min()]
    box = (best[0] - worst[0]) * (worst[1] - best[1])
    return hypervolume(values[chosen], ["maximize", "minimize"], worst) / box


def main(path: Path) -> None:
    if not path.exists():
        path.write_text(json.dumps(rows()))
    found = json.loads(path.read_text())
    linear = np.array([[row["val_accuracy"], row["params"]] for row in found])
    logarithmic = np.column_stack([linear[:, 0], np.log(linear[:, 1])])
    table = [ScreenRow(i, str(i), Architecture({}), row, None, None, 0.0) for i, row in enumerate(found)]
    rng, shares = np.random.default_rng(0), {}  # type: ignore[var-annotated]
    for _ in range(REPEATS):
        screened = [table[i] for i in rng.choice(len(table), SCREENED, replace=False)]
        rules = {("none", "12 at random"): screened[:KEPT]}
        for name in PROXIES:
            rules[name, "best scores"] = survivors(screened, [name], ["maximize"], KEPT)
            both = survivors(screened, [name, "params"], ["maximize", "minimize"], KEPT)
            rules[name, "log ranks of score and size"] = both
            rules[name, "fronts of score and size"] = survivors(screened, [name], ["maximize"], KEPT, ["params"])
        for rule, kept in rules.items():
            chosen = [row.index for row in kept]
            shares.setdefault(rule, []).append((share(linear, chosen), share(logarithmic, chosen)))
    print("# Which candidates survive a screen\n")
    print(
        "`python benchmarks/survivors.py rows.json`: "
        + (__doc__ or "").strip().split("\n\n")[-1].replace("\n", " ")
        + "\n"
    )
    print("| proxy | rule | dominated share, params linear | params logarithmic |\n|---|---|---|---|")
    for (name, rule), values in shares.items():
        mean = np.mean(values, axis=0)
        print(f"| {name} | {rule} | {mean[0]:.3f} | {mean[1]:.3f} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
