"""Does a supernet order the designs of NAS-Bench-Graph as their authors' trainings do?

One supernet for each path policy, with the benchmark's sizes, dropout, graph and split; then random rows of its table:
validation accuracy and loss of the shared weights against ``valid_perf``, beside parameters and ``ntk_cond``. Neither
training nor scores see a test label. Features are bags of words as they are (0 and 1): divided by their row sums, as
``planetoid`` gives them, networks with the benchmark's settings do not train (``--check`` shows it), so the benchmark
cannot have done that.

    OMP_NUM_THREADS=1 python benchmarks/supernet_ranking.py cora --policy uniform --out runs
    OMP_NUM_THREADS=1 python benchmarks/supernet_ranking.py --table runs
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sparse_features import Rows, sparse_propagation
from torch import Tensor, nn

from nasgraph import registry
from nasgraph.build import build
from nasgraph.predictors.nas_bench_graph import Table
from nasgraph.predictors.zero_cost import ntk_cond
from nasgraph.ranking import Ranked, ranked
from nasgraph.search_spaces.nas_bench_graph import OPS, architecture, nas_bench_graph, preset
from nasgraph.space import Architecture
from nasgraph.supernet import Supernet
from nasgraph.supernet.readout import ridge
from nasgraph.tasks import NodeTask, datasets
from nasgraph.tasks.node import NodeData, checked
from nasgraph.training import TrainSettings

GRAPHS = {"cora": ("Planetoid", "Cora"), "citeseer": ("Planetoid", "CiteSeer"), "computers": ("Amazon", "Computers")}
POLICIES = (
    "untrained",
    "uniform",
    "fair",
    "sandwich-kl",
    "sandwich-alpha",
    "progressive",
    "nested",
    "bins",
    "importance",
)
SCORES = ("accuracy", "loss", "readout", "cell")
PATHS = {"fair": 9, "sandwich-kl": 4, "sandwich-alpha": 4, "progressive": 2, "nested": 2}  # architectures a step


def graph(dataset: str, split: int) -> NodeData:
    """The graph as it is stored. Cora, CiteSeer: the public split; Computers: largest component, split drawn."""
    data = datasets.load(*GRAPHS[dataset])
    if dataset == "computers":
        from torch_geometric.transforms import LargestConnectedComponents

        data = LargestConnectedComponents()(data)
    return checked(data, dataset, split)


class SparseTask(NodeTask):
    """The same task; its features go in as products of sparse matrices."""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        if "rows" not in self.__dict__:
            self.rows = Rows(self.data.x.to_sparse_csr())
        return self.rows, self.data.edge_index


def score(supernet: Supernet, chosen: Architecture) -> dict[str, float]:
    """Scores on the validation nodes, BatchNorm with the statistics of the whole graph; larger is better.

    ``accuracy`` and ``loss`` (its negative) of the shared weights; ``readout``: accuracy with the last layer refitted
    on the training nodes (:mod:`nasgraph.supernet.readout`); ``cell``: accuracy of such a readout of the cell's output,
    so that only the cell's weights are shared ones.

    One forward pass: what ``Supernet.calibrated`` computes first and then runs again, but for the factor n / (n - 1) of
    the running variance.
    """
    task, model = supernet.task, supernet.extract(chosen).eval()
    for module in model.modules():
        module.train(isinstance(module, nn.BatchNorm1d))
    seen: dict[str, Tensor] = {}
    for name, layer in model.named_children():
        column = "readout" if name == "head" else "cell" if name.startswith("post") else None
        if column is not None:
            layer.register_forward_pre_hook(lambda m, x, c=column: seen.update({c: x[0]}))
    with torch.no_grad():
        train, val = task.split("train"), task.split("val")
        outputs = val.outputs(model)
        found = {"accuracy": _accuracy(outputs, val.target), "loss": -float(val.losses(outputs).mean())}
        for column, h in seen.items():
            x, y = h[train.index].double(), F.one_hot(train.target).double()
            spread = x.std(dim=0, correction=0)
            scale = torch.where(spread > 1e-9 * spread.max(), 1 / spread.clamp(min=1e-300), 0.0)
            weights, _ = ridge((x - x.mean(dim=0)) * scale, y - y.mean(dim=0))
            found[column] = _accuracy((h[val.index].double() - x.mean(dim=0)) * scale @ weights, val.target)
    return found


def _accuracy(outputs: Tensor, target: Tensor) -> float:
    return float((outputs.argmax(dim=1) == target).float().mean())


def rows_of(table: Table, n: int, seed: int) -> list[Architecture]:
    """``n`` random rows of the table."""
    return random.Random(f"rows/{seed}").sample(table.architectures(), n)


def train(supernet: Supernet, policy: str, paths: int, options: argparse.Namespace, seed: int) -> list[float]:
    """Train ``paths`` architectures in all, so every policy gets the same budget; the rate falls as a cosine."""
    name, _, distill = policy.partition("-")
    steps = paths // PATHS.get(policy, 1)
    arguments: dict[str, Any] = {"distill": distill} if distill else {}
    made = registry.make("policies", name, arguments, {"space": supernet.space, "supernet": supernet, "steps": steps})
    settings = TrainSettings(lr=options.lr, weight_decay=options.weight_decay, optimizer=options.optimizer)

    def slower(step: int, _: Any) -> None:
        if supernet.optimizer is not None:
            for group in supernet.optimizer.param_groups:
                group["lr"] = options.lr * (0.01 + 0.495 * (1 + math.cos(math.pi * (step + 1) / steps)))

    reduction: dict[str, Any] = {"reduction": "mean"}
    return supernet.train(made, steps, settings=settings, seed=seed, on_step=slower, **reduction)


def measure(dataset: str, policy: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one supernet, score the rows."""
    kind = NodeTask if dataset == "computers" else SparseTask
    task = kind(dataset, partial(graph, dataset, options.split))
    task.data  # noqa: B018  loading is not timed
    dropout = {} if options.dropout is None else {"dropout": options.dropout}
    space = nas_bench_graph(dataset, apart=options.apart, **dropout)
    table = Table(dataset)
    chosen = rows_of(table, options.n, options.rows_seed)
    with contextlib.nullcontext() if dataset == "computers" else sparse_propagation():
        wall, cpu = time.perf_counter(), time.process_time()
        supernet = Supernet(space, task, seed)
        losses = [] if policy == "untrained" else train(supernet, policy, options.paths, options, seed)
        trained, trained_cpu = time.perf_counter() - wall, time.process_time() - cpu
        wall, cpu = time.perf_counter(), time.process_time()
        scores = [score(supernet, each) for each in chosen]
        scored, scored_cpu = time.perf_counter() - wall, time.process_time() - cpu
    tail = losses[-max(1, len(losses) // 10) :]
    return {
        **{
            "dataset": dataset,
            "policy": policy,
            "seed": seed,
            "paths": len(losses) * PATHS.get(policy, 1),
            "n": options.n,
        },
        "settings": {k: getattr(options, k) for k in ("lr", "weight_decay", "optimizer", "dropout", "split", "apart")},
        **{"train_s": trained, "train_cpu_s": trained_cpu, "score_s": scored, "score_cpu_s": scored_cpu},
        **{"last_loss": sum(tail) / len(tail) if tail else None, "hash": [table.index(each) for each in chosen]},
        **{name: [each[name] for each in scores] for name in SCORES},
        "load": os.getloadavg(),
    }


def proxy(dataset: str, options: argparse.Namespace) -> dict[str, Any]:
    """``ntk_cond`` of the first rows, on 32 training nodes and one start."""
    task = NodeTask(dataset, partial(graph, dataset, options.split))
    space, table = nas_bench_graph(dataset), Table(dataset)
    chosen = rows_of(table, options.n, options.rows_seed)[: options.proxies]
    batch, start = task.batch(32, 0), time.perf_counter()
    scores = [ntk_cond(build(space, each, 0), batch) for each in chosen]
    found = {
        "dataset": dataset,
        "policy": "ntk_cond",
        "seed": 0,
        "n": len(chosen),
        "score_s": time.perf_counter() - start,
    }
    return {**found, "hash": [table.index(each) for each in chosen], "accuracy": scores, "load": os.getloadavg()}


# ---- what is read -----------------------------------------------------------------------------------------------


def row(found: dict[str, Any], column: str, table: Table) -> Ranked:
    """A column of a run against ``valid_perf``."""
    truth = [float(table.valid_perf[i]) for i in found["hash"]]
    params = [float(table.para[i]) for i in found["hash"]]
    return ranked(column, "supernet", found[column], truth, params, top=[max(1, found["n"] // 10)])


def markdown(folder: Path) -> str:
    """The tables of what is in ``folder``."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    lines: list[str] = []
    for dataset in GRAPHS:
        mine = [run for run in runs if run["dataset"] == dataset]
        if not mine:
            continue
        table = Table(dataset)
        index = max(mine, key=lambda run: int(run["n"]))["hash"]
        truth, params = ([float(column[i]) for i in index] for column in (table.valid_perf, table.para))
        beside = []
        for name in ("para", "latency", "perf"):
            found = ranked(name, "size", [float(getattr(table, name)[i]) for i in index], truth, params, top=[])
            beside.append(f"{name} {_with(found.spearman, found.spearman_interval)}")
        lines += [f"### {dataset}", "", f"Columns of the table, {len(index)} rows: {', '.join(beside)}.", ""]
        lines.append(
            "| policy | seed | paths | n | score | Spearman | Kendall | given params | top 10 % | mean accuracy "
            "| train, s | score, s |"
        )
        lines.append("|---|---|---|---|---|---|---|---|---|---|---|---|")
        for run in sorted(mine, key=lambda run: ((*POLICIES, "ntk_cond").index(run["policy"]), run["seed"])):
            names = ("accuracy",) if run["policy"] == "ntk_cond" else SCORES
            for name in names:
                if run["policy"] == "untrained" and name in ("accuracy", "loss"):
                    continue  # of a head that was never trained
                found = row(run, name, table)
                cells = [run["policy"], str(run["seed"]), f"{run.get('paths', 0):,}", str(run["n"]), name]
                cells += [_with(found.spearman, found.spearman_interval), f"{found.kendall:+.2f}"]
                cells += [f"{found.partial:+.2f}", f"{next(iter(found.top.values())):.2f}"]
                cells.append(f"{sum(run[name]) / run['n']:.3f}" if name != "loss" else "")
                cells += [f"{run.get('train_s', 0):.0f}", f"{run['score_s']:.0f}"]
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def added(folder: Path, dataset: str, columns: Sequence[str]) -> float:
    """Spearman's correlation of a sum of ranks; ``columns`` are ``policy:score``, seed 0."""
    from scipy.stats import rankdata, spearmanr

    runs = {p: json.loads((folder / f"{dataset}-{p}-0.json").read_text()) for p in {c.split(":")[0] for c in columns}}
    (rows,) = {tuple(run["hash"]) for run in runs.values()}  # of the same designs
    total = sum(rankdata(runs[column.split(":")[0]][column.split(":")[1]]) for column in columns)
    return float(spearmanr(total, [Table(dataset).valid_perf[i] for i in rows]).statistic)


def _with(value: float, interval: tuple[float, float]) -> str:
    return f"{value:+.2f} [{interval[0]:+.2f}, {interval[1]:+.2f}]"


# ---- checks -----------------------------------------------------------------------------------------------------


def check(dataset: str, epochs: int) -> None:
    """Sparse against dense features; then networks trained alone with the benchmark's settings against its table."""
    dense = NodeTask(dataset, partial(graph, dataset, 0))
    sparse = SparseTask(dataset, partial(graph, dataset, 0))
    space, table, fixed = nas_bench_graph(dataset), Table(dataset), preset(dataset)
    supernet = Supernet(space, dense)
    worst = 0.0
    for op in OPS[:-1]:
        model = supernet.subnet(architecture((0, 0, 1, 3), [op] * 4)).eval()
        with sparse_propagation(), torch.no_grad():
            plain = model(*dense.inputs)
            worst = max(worst, float((model(*sparse.inputs) - plain).abs().max() / plain.abs().max()))
    print(f"sparse against dense features: largest relative difference of outputs {worst:.1e}")
    print("| design | valid_perf of the table | trained here: bags of words | divided by row sums |\n|---|---|---|---|")
    designs = [((0, 0, 0, 0), ["fc"] * 4), ((0, 1, 2, 3), ["gcn"] * 4), ((0, 0, 1, 1), ["sage", "cheb", "gat", "fc"])]
    for link, ops in designs:
        chosen, found = architecture(link, ops), []
        sums = dense.data.x.sum(dim=1, keepdim=True).clamp(min=1)
        for x in (dense.data.x, dense.data.x / sums):
            with sparse_propagation():
                found.append(alone(build(space, chosen, 0), Rows(x.to_sparse_csr()), dense.data, fixed.lr, epochs))
        name = "".join(map(str, link)) + " " + " ".join(ops)
        print(f"| {name} | {table.lookup(chosen)['valid_perf']:.3f} | {found[0]:.3f} | {found[1]:.3f} |", flush=True)


def alone(model: nn.Module, x: Tensor, data: NodeData, lr: float, epochs: int) -> float:
    """Best validation accuracy of ``model`` over ``epochs`` of plain SGD (no momentum), looked at every tenth."""
    optimizer, best = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=5e-4), 0.0
    torch.manual_seed(0)
    for epoch in range(1, epochs + 1):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x, data.edge_index)[data.train], data.y[data.train]).backward()
        optimizer.step()
        if epoch % 10 == 0:
            with torch.no_grad():
                guess = model.eval()(x, data.edge_index)[data.val].argmax(dim=1)
            best = max(best, float((guess == data.y[data.val]).float().mean()))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("datasets", nargs="*", choices=[*GRAPHS, []])
    parser.add_argument("--policy", nargs="+", default=["uniform"], choices=[*POLICIES, "ntk_cond"])
    parser.add_argument("--paths", type=int, default=3000, help="architectures trained in all")
    parser.add_argument("-n", type=int, default=500, help="rows scored")
    parser.add_argument("--proxies", type=int, default=100, help="rows that ntk_cond scores")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--rows-seed", type=int, default=0)
    parser.add_argument("--split", type=int, default=0, help="seed of the split of Computers")
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--dropout", type=float, help="in place of the benchmark's")
    parser.add_argument("--apart", action="store_true", help="weights of their own for what reads the raw input")
    parser.add_argument("--out", type=Path, default=Path("results/supernet_ranking"), help="a JSON file per supernet")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="print what lies there")
    parser.add_argument("--added", nargs="+", metavar="POLICY:SCORE", help="with --table: the sum of these ranks")
    parser.add_argument("--check", type=int, metavar="EPOCHS", help="compare features and trainings with the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.table:
        for dataset in options.datasets if options.added else ():
            print(dataset, " + ".join(options.added), f"{added(options.table, dataset, options.added):+.3f}")
        if not options.added:
            print(markdown(options.table))
        return
    print(
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, one thread", flush=True
    )
    for dataset in options.datasets:
        if options.check:
            check(dataset, options.check)
            continue
        for seed in options.seed:
            for policy in options.policy:
                path = options.out / f"{dataset}-{policy}-{seed}.json"
                if path.exists():
                    print(f"{path} is there already", file=sys.stderr)
                    continue
                found = proxy(dataset, options) if policy == "ntk_cond" else measure(dataset, policy, seed, options)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(found) + "\n", encoding="utf-8")
                names = ["accuracy"] if policy == "ntk_cond" else SCORES
                said = ", ".join(f"{name} {row(found, name, Table(dataset)).spearman:+.3f}" for name in names)
                print(f"{dataset} {policy} {seed}: {said}", flush=True)


if __name__ == "__main__":
    main()
