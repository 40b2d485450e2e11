"""LPGNAS on citation graphs: accuracy against model bits, beside uniform formats, float searches and random search.

    NASGRAPH_DATA=~/data OMP_NUM_THREADS=1 python benchmarks/low_precision_gnn.py Cora results.json
    python benchmarks/low_precision_gnn.py --report Cora.json CiteSeer.json > results/benchmarks/low_precision_gnn.md

The features are sparse matrices (``sparse_features.py``), which changes no number but for rounding: a zero is quantised
to zero. ``--check`` compares with dense features.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sparse_features import Rows, sparse_propagation
from torch import Tensor

from nasgraph.build import build
from nasgraph.executors import InProcess
from nasgraph.objectives.bits import count_model_bits
from nasgraph.ops import SparseDropout
from nasgraph.pareto import pareto_front
from nasgraph.search_spaces.gnn_low_precision import gnn_low_precision
from nasgraph.space import Architecture, Label, SearchSpace
from nasgraph.study import Study
from nasgraph.supernet import Supernet
from nasgraph.tasks import NodeTask, planetoid
from nasgraph.training import TrainSettings
from nasgraph.training.differentiable import two_path
from nasgraph.transforms.quantizers import ActivationQuantizer

JOINT, RANDOM = "NSGA-II, architecture and bits", "random, architecture and bits"
FLOAT, GATED = "NSGA-II, architecture in float", "two_path, architecture and bits"
PARTS = {"joint": JOINT, "float": FLOAT, "random": RANDOM, "differentiable": GATED}
KINDS = ("weight_bits", "activation_bits", "aggregation_bits")
UNIFORM = {"float": (32, 32), "W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4)}
SETTINGS = TrainSettings(epochs=100, patience=30)
PLAIN: dict[str, dict[str, Label]] = {  # the settings of their papers, as gnn_node.LITERATURE has them
    "gcn": {"depth": "1", "conv1": "gcn", "head": "gcn", "width": 16, "activation": "relu"}
    | {"input_dropout": 0.5, "dropout": 0.5},
    "gat": {"depth": "1", "conv1": "gat", "head": "gat", "width": 64, "heads": 8, "activation": "elu"}
    | {"input_dropout": 0.6, "dropout": 0.6},
}


# ---- sparse features ----------------------------------------------------------------------------------------------


class SparseTask(NodeTask):
    """The same task; its features go in as sparse rows."""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        if "rows" not in self.__dict__:
            self.rows = Rows(self.data.x.to_sparse_csr())
        return self.rows, self.data.edge_index


def on_values(change: Any, x: Rows) -> Rows:
    """``change``, which keeps 0, on the entries that are not 0; it sees one 0 too, as there are zeros."""
    old = x.features
    if x.operator is not None:  # in COO: MKL's product of two CSR matrices loses its memory at every call
        old = torch.sparse.mm(x.operator.to_sparse_coo(), old.to_sparse_coo()).to_sparse_csr()
    values = change(F.pad(old.values(), (0, 1)))[:-1]
    return Rows(
        torch.sparse_csr_tensor(old.crow_indices(), old.col_indices(), values, old.shape, check_invariants=False)
    )


@contextlib.contextmanager
def sparse_quantisation() -> Iterator[None]:
    """Quantisers and input dropout read :class:`Rows` too, and so do layers that aggregate before their weight."""
    with sparse_propagation():
        plain = {kind: kind.forward for kind in (ActivationQuantizer, SparseDropout)}

        def quantised(self: ActivationQuantizer, x: Tensor) -> Tensor:
            forward = plain[ActivationQuantizer]
            return on_values(lambda values: forward(self, values), x) if isinstance(x, Rows) else forward(self, x)

        def dropped(self: SparseDropout, x: Tensor) -> Tensor:
            if not isinstance(x, Rows):
                return plain[SparseDropout](self, x)
            return x.dropped(self.p) if self.training and self.p else x

        ActivationQuantizer.forward, SparseDropout.forward = quantised, dropped
        try:
            yield
        finally:
            for kind, method in plain.items():
                kind.forward = method


def check(task: NodeTask, space: SearchSpace, count: int = 20) -> float:
    """The largest difference of an output between sparse and dense features, relative to the largest output.

    Rounding may differ by one code where a number lies between two, so quantised networks differ by more than floats.
    """
    import random

    rng, worst, sparse = random.Random(0), 0.0, SparseTask(task.name, task.load)
    for _ in range(count):
        model = build(space, space.sample(rng)).eval()
        with torch.no_grad():
            dense = model(*task.inputs)
            found = model(*sparse.inputs)
        worst = max(worst, float((dense - found).abs().max() / dense.abs().max()))
    return worst


# ---- the searches -------------------------------------------------------------------------------------------------


def formatted(network: Mapping[str, Label], weight: int, activation: int) -> dict[str, Label]:
    """``network`` with one format for everything."""
    bits = (weight, activation, activation)
    plain = {name: label for name, label in network.items() if name.partition(".")[0] not in KINDS}
    return plain | {f"{kind}.{n}": b for n in ("conv1", "conv2", "head") for kind, b in zip(KINDS, bits, strict=True)}


class Bench:
    """One dataset: what is searched in, and everything that was trained."""

    def __init__(self, dataset: str, seeds: int) -> None:
        self.task = SparseTask(dataset, planetoid(dataset).load)
        operators = ("gcn", "gat", "sage_mean", "graph")
        self.space = gnn_low_precision(**self.task.sizes, operators=operators)
        self.seeds = seeds

    def bits(self, network: Mapping[str, Label]) -> float:
        return float(count_model_bits(build(self.space, self.space.architecture(network))))

    def trained(self, network: Mapping[str, Label], seed: int) -> tuple[float, float]:
        """Validation and test accuracy of one training."""
        model = build(self.space, self.space.architecture(network), seed)
        val = self.task.fit(model, SETTINGS, seed).val
        return val, self.task.score(model, "test")["accuracy"]

    def judged(self, network: Mapping[str, Label]) -> dict[str, Any]:
        """Trained from fresh seeds; the searches use seed 0."""
        val, test = zip(*(self.trained(network, seed) for seed in range(1, 1 + self.seeds)), strict=True)
        found = self.space.architecture(network)
        return {"arch": dict(found), "bits": self.bits(network), "val": val, "test": test}

    def uniform(self, network: Mapping[str, Label]) -> dict[str, dict[str, Any]]:
        """Its architecture with one format for everything."""
        return {name: self.judged(formatted(network, *bits)) for name, bits in UNIFORM.items()}

    def searched(self, sampler: str, space: SearchSpace, trials: int, start: str) -> list[dict[str, Any]]:
        """All that a study of ``trials`` trainings saw; it begins with GCN and GAT in the format ``start``."""
        first = [formatted(network, *UNIFORM[start]) for network in PLAIN.values()]
        objectives = [("val", "maximize"), ("bits", "minimize")]

        def evaluate(network: Mapping[str, Label]) -> dict[str, float]:
            return {"val": self.trained(network, 0)[0], "bits": self.bits(network)}

        with tempfile.TemporaryDirectory() as folder, InProcess(evaluate) as executor:
            study = Study(Path(folder) / "study.db", "search", space, objectives, sampler, seed=0)
            records = study.run(trials, executor, first=first)
        return [{"arch": dict(r.arch), **r.values} for r in records if r.state == "scored"]

    def finalists(self, rows: Sequence[dict[str, Any]], top: int) -> list[dict[str, Any]]:
        """Front after front of those that lose at most 2 points to the best, at most ``top``. Retrained.

        A score is one training, which another seed moves by a point: the second front may be as good as the first.
        """
        best = max(row["val"] for row in rows)
        left, near = [row for row in rows if row["val"] >= best - 0.02], list[dict[str, Any]]()
        while left and len(near) < top:
            front = front_of(left)
            near += front[: top - len(near)]
            left = [row for row in left if row["arch"] not in [taken["arch"] for taken in front]]
        return [self.judged(row["arch"]) for row in near]

    def weights(self, network: Mapping[str, Label]) -> float:
        """Bits of the linear maps of a network with one hidden layer: quick, and nearly all of :meth:`bits`."""
        width, maps = int(str(network["width"])), {"gcn": 1, "gat": 1}
        sizes = {"conv1": self.task.sizes["features"] * width, "head": width * self.task.sizes["classes"]}
        bits = {node: int(str(network[f"weight_bits.{node}"])) for node in sizes}
        return float(sum(size * maps.get(str(network[n]), 2) * bits[n] for n, size in sizes.items()))

    def differentiable(self, steps: int, strength: float, aim: float) -> Architecture:
        """ProxylessNAS's gates over a supernet; the size aimed at is 1/``aim`` of GCN's in float."""
        fixed: dict[str, Label] = {"input_dropout": 0.5, "dropout": 0.5, "activation": "relu", "depth": "1"}
        supernet = Supernet(self.space, self.task)
        found = two_path(
            supernet,
            steps,
            cost=self.weights,
            reference=self.bits(formatted(PLAIN["gcn"], 32, 32)) / aim,
            loss="sum",
            strength=strength,
            alpha_lr=0.1,
            warmup=steps // 4,
            settings=SETTINGS,
            fixed=fixed,
        )
        return found.architecture


def front_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The Pareto front of validation accuracy and bits, the most accurate first."""
    rows = list({json.dumps(row["arch"], sort_keys=True): row for row in rows}.values())
    keep = pareto_front([[row["val"], row["bits"]] for row in rows], ["maximize", "minimize"])
    return sorted((row for row, kept in zip(rows, keep, strict=True) if kept), key=lambda r: (-r["val"], r["bits"]))


def chosen(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By the mean validation accuracy of the retrained, then by size."""
    return max(rows, key=lambda row: (statistics.mean(row["val"]), -row["bits"]))


def measure(dataset: str, parts: Sequence[str], options: argparse.Namespace) -> None:
    """``parts`` of one dataset. The file is written after each part and what it holds already is not done again."""
    trials, seeds, top, out = options.trials, options.seeds, options.top, options.out
    bench = Bench(dataset, seeds)
    float_space = bench.space.narrowed({name: [32] for name in bench.space.choices if name.partition(".")[0] in KINDS})
    asked = {"dataset": dataset, "trials": trials, "seeds": seeds, "top": top}
    if GATED in parts:
        asked |= {"steps": options.steps, "strength": options.strength, "aim": options.aim}
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {**asked, "seconds": {}}
    if {name: found.get(name) for name in asked} != asked:
        sys.exit(f"{out} was made with other settings: name another file")

    def once(name: str, part: Callable[[], Any]) -> Any:
        if name not in found:
            wall, cpu = time.perf_counter(), time.process_time()
            found[name] = part()
            found["seconds"][name] = (time.perf_counter() - wall, time.process_time() - cpu)
            out.write_text(json.dumps(found))
            print(dataset, name, "done", file=sys.stderr, flush=True)
        return found[name]

    for name, sampler, space, start in (
        (JOINT, "nsga2", bench.space, "W4A8"),
        (FLOAT, "nsga2", float_space, "float"),
        (RANDOM, "random", bench.space, "W4A8"),
    ):
        if name not in parts:
            continue
        rows = once(name, lambda a=(sampler, space, trials, start): bench.searched(*a))  # type: ignore[misc]
        finals = once(f"{name}: retrained", lambda rows=rows: bench.finalists(rows, top))  # type: ignore[misc]
        if name == JOINT:
            best = chosen(finals)
            once("uniform", lambda a=best["arch"]: bench.uniform(a))  # type: ignore[misc]
            twins = [formatted(row["arch"], 32, 32) for row in finals]
            once("finalists in float", lambda twins=twins: [bench.judged(twin) for twin in twins])  # type: ignore[misc]
        if name == FLOAT:
            best = chosen(finals)
            once("uniform of float", lambda a=best["arch"]: bench.uniform(a))  # type: ignore[misc]
    if GATED in parts:
        gated = once(GATED, lambda: dict(bench.differentiable(options.steps, options.strength, options.aim)))
        once(f"{GATED}: retrained", lambda: [bench.judged(gated), bench.judged(formatted(gated, 32, 32))])


# ---- the report ---------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}"


def row_of(name: str, row: dict[str, Any]) -> str:
    cells = (name, f"{row['bits'] / 8192:,.1f}", spread(row["val"]), spread(row["test"]), f"`{described(row['arch'])}`")
    return f"| {' | '.join(cells)} |"


def report(found: dict[str, Any]) -> None:
    finals = {name: found[f"{name}: retrained"] for name in (JOINT, RANDOM, FLOAT) if f"{name}: retrained" in found}
    winners, uniform = {name: chosen(rows) for name, rows in finals.items()}, found.get("uniform", {})
    gated = found.get(f"{GATED}: retrained")
    print(f"\n## {found['dataset']}\n")
    print(f"{found['trials']} trainings a search, {found['seeds']} fresh trainings a row. KiB are packed model bits.\n")
    print("| | KiB | val, % | test, % | architecture |\n|---|---|---|---|---|")
    for name, row in winners.items():
        print(row_of(name, row))
    for name, row in uniform.items():
        print(row_of(f"the first row's architecture, {name}", row))
    for name, row in found.get("uniform of float", {}).items():
        if name != "float":
            print(row_of(f"the best float architecture, {name}", row))
    if gated:
        print(row_of(GATED, gated[0]))
        print(row_of("its architecture, float", gated[1]))
    joint = winners[JOINT]
    print()
    if uniform:
        compare("Against its architecture in float", joint, uniform["float"])
    for name in (FLOAT, RANDOM):
        if name in winners:
            compare(f"Against the best of: {name}", joint, winners[name])
    others = {f"its architecture, {name}": row for name, row in uniform.items()}
    others |= {f"the best float architecture, {n}": row for n, row in found.get("uniform of float", {}).items()}
    beaten = [name for name, row in others.items() if any(dominates(each, row) for each in finals[JOINT])]
    print(f"- Dominated by a finalist of the joint search on validation and size: {', '.join(beaten) or 'none'};")
    print(f"  not: {', '.join(name for name in others if name not in beaten) or 'none'}.")
    twins = found.get("finalists in float", [])
    if twins:
        print("\nFinalists of the joint search against the same networks in float:\n")
        print("| architecture | bits of float | val, % | val in float, % | test, % | test in float, % |")
        print("|---|---|---|---|---|---|")
    for row, twin in zip(finals[JOINT], twins, strict=False):
        columns = (f"`{described(row['arch'])}`", f"1/{twin['bits'] / row['bits']:.1f}")
        scores = (spread(each[split]) for split in ("val", "test") for each in (row, twin))
        print(f"| {' | '.join((*columns, *scores))} |")
    print("\nAll finalists (chosen is the best mean on validation):\n")
    print("| search | KiB | val, % | test, % | architecture |\n|---|---|---|---|---|")
    for name, rows in finals.items():
        for row in {described(row["arch"]): row for row in rows}.values():
            print(row_of(name, row))
    print(
        "\nSeconds (wall, CPU): " + "; ".join(f"{n} {w:.0f}, {c:.0f}" for n, (w, c) in found["seconds"].items()) + "."
    )


def dominates(ours: dict[str, Any], other: dict[str, Any]) -> bool:
    """No larger, no less accurate, and better in one."""
    mine, its = (statistics.mean(row["val"]) for row in (ours, other))
    return bool(ours["bits"] <= other["bits"] and mine >= its and (ours["bits"], -mine) != (other["bits"], -its))


def compare(title: str, ours: dict[str, Any], other: dict[str, Any]) -> None:
    gains = [100 * (statistics.mean(ours[split]) - statistics.mean(other[split])) for split in ("val", "test")]
    ratio = other["bits"] / ours["bits"]
    print(f"- {title}: {ratio:.1f} times smaller, validation {gains[0]:+.1f}, test {gains[1]:+.1f} points.")


def described(network: Mapping[str, Label]) -> str:
    """``gcn-64 W2A8G32, gcn W4A8G8``: operator, width and the three formats of each layer."""
    parts = []
    for node in ("conv1", "conv2", "head"):
        if node in network and (node != "conv2" or network["depth"] == "2"):
            width = f"-{network['width']}" if node != "head" else ""
            w, a, g = (network[f"{kind}.{node}"] for kind in KINDS)
            parts.append(f"{network[node]}{width} W{w}A{a}G{g}")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", nargs="?", choices=("Cora", "CiteSeer"))
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--trials", type=int, default=100, help="trainings of each search")
    parser.add_argument("--steps", type=int, default=150, help="of the differentiable search")
    parser.add_argument("--strength", type=float, default=0.1, help="of its size term")
    parser.add_argument("--aim", type=float, default=8.0, help="its size term is 0 at GCN's float bits over this")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--top", type=int, default=10, help="finalists of each search, trained anew")
    parser.add_argument(
        "--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="to run apart, in parallel"
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--report", nargs="+", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.report:
        print("# Low precision graph networks: accuracy against bits\n")
        print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread.")
        merged: dict[str, dict[str, Any]] = {}
        for path in options.report:
            found = json.loads(path.read_text())
            before = merged.setdefault(found["dataset"], found)
            merged[found["dataset"]] = {**before, **found, "seconds": {**before["seconds"], **found["seconds"]}}
        for found in merged.values():
            report(found)
        return
    with sparse_quantisation():
        if options.check:
            bench = Bench(options.dataset, 1)
            print(f"{options.dataset}: {check(planetoid(options.dataset), bench.space):.1e}")
            return
        parts = [PARTS[part] for part in options.parts]
        measure(options.dataset, parts, options)


if __name__ == "__main__":
    main()
