"""How long GradSign takes on a graph of Cora's size, against plain loops; writes results/benchmarks/proxies_speed.md.

    OMP_NUM_THREADS=1 python benchmarks/proxies_speed.py

Random graph: 2,708 nodes, about 10,900 directed edges, 1,433 binary features (1.3% ones), 140 samples, hidden width 64.
It has no hubs, so real neighbourhoods are larger and cost more.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GCNConv, GINConv
from torch_geometric.utils import coalesce

from nasgraph.predictors import zero_cost
from nasgraph.predictors.zero_cost.gradsign import gradsign, signs_of
from nasgraph.predictors.zero_cost.per_sample import losses, per_sample_gradients
from nasgraph.tasks import Batch

SAMPLES = 140


class TwoLayers(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x, edge_index)), edge_index)


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    gin = nn.Sequential(nn.Linear(1433, 64), nn.ReLU(), nn.Linear(64, 64))
    return {
        "GCN": TwoLayers(GCNConv(1433, 64), GCNConv(64, 7)),
        "GAT, 4 heads": TwoLayers(GATConv(1433, 16, heads=4), GATConv(64, 7)),
        "GIN": TwoLayers(GINConv(gin), GINConv(nn.Linear(64, 7))),
    }


def cora_sized() -> Batch:
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(0, 2708, (2, 5429), generator=generator)
    half = half[:, half[0] != half[1]]
    edges = coalesce(torch.cat([half, half.flip(0)], 1))
    x = (torch.rand(2708, 1433, generator=generator) < 0.0131).float()
    return Batch((x, edges), torch.arange(SAMPLES) % 7, torch.randperm(2708, generator=generator)[:SAMPLES])


def loop(model: nn.Module, batch: Batch) -> Tensor:
    """Forward and backward for each sample, as GradSign is published."""
    parameters, signs = list(model.parameters()), 0
    for i in range(len(batch.target)):
        loss = batch.losses(batch.outputs(model))[i]
        signs = signs + torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).sign()
    return signs


def one_forward(model: nn.Module, batch: Batch) -> Tensor:
    """One forward, then a backward for each sample."""
    return sum(rows.sign().sum(0) for rows in per_sample_gradients(model, batch, losses, fast=False))


def vmapped(model: nn.Module, batch: Batch) -> Tensor:
    """One forward, then backward passes vmapped over 8 samples at a time."""
    parameters, signs = list(model.parameters()), 0
    values = batch.losses(batch.outputs(model))
    for rows in torch.eye(len(values), dtype=values.dtype).split(8):
        grads = torch.autograd.grad(values, parameters, rows, is_grads_batched=True, retain_graph=True)
        signs = signs + torch.cat([g.flatten(1) for g in grads], 1).sign().sum(0)
    return signs


def double(model: nn.Module, batch: Batch) -> float:
    return gradsign(model, batch)


def single(model: nn.Module, batch: Batch) -> float:
    return gradsign(model, batch, dtype=torch.float32)


def seconds(run: Callable[[nn.Module, Batch], object], model: nn.Module, batch: Batch) -> float:
    start = time.process_time()
    run(model, batch)
    return time.process_time() - start


def sign_sums_agree(model: nn.Module, batch: Batch) -> bool:
    model, (x, edges) = model.double(), batch.inputs
    batch = Batch((x.double(), edges), batch.target, batch.index)
    fast, slow = (
        sum(signs_of(rows).sum(0) for rows in per_sample_gradients(model, batch, losses, fast=fast))
        for fast in (True, False)
    )
    model.float()
    return bool(torch.equal(fast, slow))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/proxies_speed.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    batch = cora_sized()
    lines = [
        "# Speed of GradSign on nodes",
        "",
        "    OMP_NUM_THREADS=1 python benchmarks/proxies_speed.py",
        "",
        f"Random graph of Cora's size without hubs, {SAMPLES} samples, two layers, hidden width 64. 1 thread, "
        f"{platform.machine()} CPU, torch {torch.__version__}. CPU seconds (other work ran beside: trust ratios to "
        f"about 20%), median of {args.repeats} interleaved repeats; in brackets, as a multiple of the default "
        "GradSign, which runs in float64. The three loops run in float32.",
        "",
        "| model | GradSign (float64) | GradSign, dtype=float32 | loop: forward + backward | one forward, n backward "
        "| backward under vmap | sign sums equal in float64 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, model in models().items():
        runs = (double, single, loop, one_forward, vmapped)
        double(model, batch)  # warm-up
        times: dict[Callable, list[float]] = {run: [] for run in runs}
        for _ in range(args.repeats):
            for run in runs:
                times[run].append(seconds(run, model, batch))
        median = {run: statistics.median(values) for run, values in times.items()}
        cells = [f"{median[run]:.2f} ({median[run] / median[double]:.1f}x)" for run in runs]
        lines.append(f"| {name} | {' | '.join(cells)} | {'yes' if sign_sums_agree(model, batch) else 'NO'} |")
        print(lines[-1], flush=True)
    lines += ["", "CPU seconds for one score of the GCN with the same samples:", "", "| proxy | seconds |", "|---|---|"]
    model = models()["GCN"]
    for name in zero_cost.PROXIES:
        proxy = getattr(zero_cost, name)
        lines.append(f"| {name} | {statistics.median(seconds(proxy, model, batch) for _ in range(args.repeats)):.3f} |")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
