"""Test accuracy on Cora of what a search selects, beside GCN, GAT and an equal-budget random search.

    NASGRAPH_DATA=~/data python benchmarks/cora.py results/cora

Runs ``configs/cora.yaml`` into the folder if it holds no run yet. Finalists (of the search: the exported models; of the
random search: as many, its best on validation) are trained from 5 fresh starts each; the one with the highest mean
validation accuracy is chosen, and its mean test accuracy is what the table shows. GCN, GAT and APPNP are the members of
the same space with the settings of their papers, trained by the same loop from 5 seeds.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch

from nasgraph import search
from nasgraph.build import build
from nasgraph.config import load
from nasgraph.run import Run
from nasgraph.search_spaces.gnn_node import LITERATURE
from nasgraph.training import TrainSettings
from nasgraph.workers import Worker, parts

SEEDS = range(5)
PUBLISHED = {  # network of the literature -> settings of its paper, published mean test accuracy
    "gcn": (TrainSettings(epochs=200, lr=0.01, weight_decay=5e-4, patience=200), "81.5 (Kipf & Welling, 2017)"),
    "gat": (TrainSettings(epochs=300, lr=0.005, weight_decay=5e-4, patience=100), "83.0 (Velickovic et al., 2018)"),
    "appnp": (TrainSettings(epochs=300, lr=0.01, weight_decay=5e-4, patience=100), ""),
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    settings = load(Path(__file__).parents[1] / "configs" / "cora.yaml")
    if not (folder / "manifest.json").exists():
        search.start(settings, folder)
    run = Run.open(folder)
    made, chosen = parts(run.config), {}
    seconds = run.facts["seconds"]
    phases = ", ".join(f"{name} {seconds[name]:.0f} s" for name in ("screen", "search", "random", "final"))
    print("# Cora: test accuracy, public split\n")
    print(f"`python benchmarks/cora.py {folder.name}`, torch {torch.__version__}, workers of 1 thread.")
    print(
        f"Budget: {run.config.search.trials} trained candidates for the search and for the random search. {phases}.\n"
    )
    print("| network | chosen by | params | val, mean | test, mean ± std of 5 seeds | published test mean |")
    print("|---|---|---|---|---|---|")
    finish = Worker(run.config)
    drawn = sorted((r for r in run.records("random") if r.state == "scored"), key=lambda r: -r.values["val_accuracy"])
    for name, finalists in (("search", run.chosen()), ("random search", drawn[: run.config.final.top])):
        found = []
        for record in finalists:
            payload = {"architecture": dict(record.arch), "folder": None, "metadata": {}}
            done = run.finals.get(record.key) or finish(("finish", payload))
            if done.values:
                found.append((done.values["val_accuracy_mean"], record, done.values))
        _, record, values = max(found, key=lambda item: item[0])
        chosen.setdefault(name, record)
        print(
            f"| {name} `{record.key[:11]}` | validation | {record.values['params']:,.0f} "
            f"| {100 * values['val_accuracy_mean']:.1f} "
            f"| {100 * values['test_accuracy_mean']:.2f} ± {100 * values['test_accuracy_std']:.2f} | |"
        )
    for name, (training, published) in PUBLISHED.items():
        arch = made.space.architecture(LITERATURE[name])
        val, test = [], []
        for seed in SEEDS:
            model = build(made.space, arch, seed)
            made.task.fit(model, training, seed)
            val.append(100 * made.task.score(model, "val")["accuracy"])
            test.append(100 * made.task.score(model, "test")["accuracy"])
        count = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"| {name} | paper | {count:,} | {statistics.mean(val):.1f} "
            f"| {statistics.mean(test):.2f} ± {statistics.pstdev(test):.2f} | {published} |"
        )
    print(f"\nThe search's choice: `{chosen['search'].arch.to_json()}`")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
