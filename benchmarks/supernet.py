"""What a supernet's store adds to a training step, and how long a view of it takes to make.

OMP_NUM_THREADS=1 python benchmarks/supernet.py > results/benchmarks/supernet.md
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from nasgraph.build import build
from nasgraph.search_spaces.gnn_node import gnn_node
from nasgraph.search_spaces.nasbench201 import nasbench201
from nasgraph.space import Architecture, Choice, Label, Node, Op, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.tasks import NodeTask
from nasgraph.tasks.batch import Batch
from nasgraph.tasks.node import digits_knn, planetoid
from nasgraph.training.loop import TrainSettings
from nasgraph.training.policies import Uniform


def elastic_cnn() -> SearchSpace:
    """Three stages of elastic kernel (3, 5) and width (16, 32, 64). Shapes: ``(B, 3, 32, 32)`` -> ``(B, 10)``."""
    space = SearchSpace("elastic_cnn")
    h: Node = space.input("image", torch.zeros(2, 3, 32, 32), dynamic={0: "batch"})
    for i in (1, 2, 3):
        kernel = Choice(f"kernel{i}", [3, 5], ordered=True)
        width = Choice(f"width{i}", [16, 32, 64], ordered=True)
        op = Op(nn.Conv2d, out_channels=width, kernel_size=kernel, padding=kernel // 2, stride=1 if i == 1 else 2)
        h = space.add(f"conv{i}", op, h)
        h = space.add(f"norm{i}", Op(nn.BatchNorm2d), h)
        h = space.add(f"act{i}", Op(nn.ReLU), h)
    h = space.add("flat", Op(nn.Flatten), space.add("pool", Op(nn.AdaptiveAvgPool2d, output_size=1), h))
    space.output(space.add("head", Op(nn.Linear, out_features=10), h))
    return space


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def step(model: nn.Module, batch: Batch, parameters: list[nn.Parameter], adam: torch.optim.Optimizer | None) -> None:
    for parameter in parameters:
        parameter.grad = None
    batch.loss(model).backward()
    if adam is not None:
        adam.step()


def overhead(name: str, space: SearchSpace, choices: Mapping[str, Label], batch: Batch, repeats: int) -> str:
    """A row: the same step on a view of the store and on the extracted network, interleaved."""
    supernet = Supernet(space)
    arch = space.architecture(choices)
    view, alone = supernet.subnet(arch).train(), supernet.extract(arch).train()
    stored, own = list(supernet.parameters()), list(alone.parameters())
    cells = []
    for with_adam in (False, True):
        adams = [torch.optim.Adam(p, lr=1e-4, fused=True) if with_adam else None for p in (stored, own)]
        calls = [partial(step, view, batch, stored, adams[0]), partial(step, alone, batch, own, adams[1])]
        times: list[list[float]] = [[], []]
        for i in range(repeats + 3):
            for j in (0, 1) if i % 2 else (1, 0):
                times[j].append(seconds(calls[j]))
        shared, single = (statistics.median(column[3:]) for column in times)
        cells.append(f"{1e3 * shared:.2f} | {1e3 * single:.2f} | {100 * (shared / single - 1):+.1f}%")
    size = supernet.params(arch)
    return f"| {name} | {size:,} | {supernet.numel:,} | {' | '.join(cells)} |"


def making(name: str, space: SearchSpace, n: int) -> str:
    """A row: the store, a view of a new structure, a view of one that is built."""
    store = seconds(lambda: Supernet(space))
    supernet, rng = Supernet(space), random.Random(0)
    archs = list(dict.fromkeys(space.sample(rng) for _ in range(n)))
    fresh = [seconds(partial(supernet.subnet, arch)) for arch in archs]
    known = [seconds(partial(supernet.subnet, arch)) for arch in archs]
    supernet._of.clear()  # the architecture is new, its structure is not
    again = [seconds(partial(supernet.subnet, arch)) for arch in archs]
    cells = [f"{1e3 * statistics.median(times):.3f}" for times in (fresh, again, known)]
    return f"| {name} | {store:.2f} | {supernet.numel:,} | {' | '.join(cells)} |"


def scoring(task: NodeTask, space: SearchSpace, n: int, trained: int) -> str:
    """A row: scores of ``n`` random subnets, together and one by one, against training ``trained`` of them alone."""
    supernet, rng = Supernet(space, task), random.Random(0)
    supernet.train(Uniform(space), 3)
    archs: list[Architecture] = [space.sample(rng) for _ in range(n)]
    few = archs[:200]
    alone = seconds(lambda: [task.score(supernet.calibrated(arch), "val") for arch in few]) / len(few)
    together = seconds(lambda: supernet.evaluate(archs)) / n
    fits = [seconds(partial(task.fit, supernet.extract(arch), TrainSettings(), 0)) for arch in archs[:trained]]
    training = statistics.mean(fits)
    norms = sum(supernet.has_batch_norm(arch) for arch in archs)
    cells = [f"{n:,}", f"{norms:,}", f"{1 / together:.1f}", f"{1 / alone:.1f}", f"{training:.1f}"]
    return f"| {task.name} | {' | '.join(cells)} | {training / together:,.0f} |"


def peak(what: str, arch: Architecture) -> None:
    """Print bytes of the parameters, of Adam's state, and the peak of this process over its start, in MiB."""
    space, batch = gnn_node(64, 10), digits_knn().batch(10_000, 0)
    torch.autograd.backward(torch.zeros(8, 8, requires_grad=True).relu().sum())
    before = _resident()
    supernet = Supernet(space) if what == "store" else None
    model: nn.Module = supernet.subnet(arch) if supernet else build(space, arch)
    parameters = list(supernet.parameters() if supernet else model.parameters())
    adam = torch.optim.Adam(parameters, lr=1e-4, fused=True)
    for _ in range(3):
        step(model.train(), batch, parameters, adam)
    size = sum(p.numel() * p.element_size() for p in parameters)
    state = sum(t.numel() * t.element_size() for s in adam.state.values() for t in s.values())
    top = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{size / 2**20:.2f} | {state / 2**20:.2f} | {(top - before) / 2**20:.0f} | {top / 2**20:.0f}")


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--subnets", type=int, default=200)
    parser.add_argument("--scored", type=int, default=10_000)
    parser.add_argument("--trained", type=int, default=10)
    parser.add_argument("--dataset", default="Cora", help="of planetoid; 'none': digits only")
    parser.add_argument("--peak", choices=("store", "alone"), help=argparse.SUPPRESS)
    parser.add_argument("--architecture", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        peak(options.peak, Architecture.from_json(options.architecture))
        return
    task = digits_knn()
    gnn, cnn = gnn_node(64, 10), elastic_cnn()
    common: dict[str, Label] = {"norm": "layer", "activation": "relu", "input_dropout": 0.0, "dropout": 0.5}
    common |= {"residual": "none", "jump": "last", "propagate": "none", "head": "linear", "depth": "2"}
    generator = torch.Generator().manual_seed(0)
    images = Batch((torch.randn(32, 3, 32, 32, generator=generator),), torch.randint(10, (32,), generator=generator))
    nodes = task.batch(10_000, 0)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg()[:2])

    print("# Supernets: what the store adds to a step, and what a view costs\n")
    print(f"    OMP_NUM_THREADS=1 python benchmarks/supernet.py {' '.join(sys.argv[1:])}".rstrip() + "\n")
    print(
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, one thread, CPU seconds "
        f"of this process. Load of the machine ({os.cpu_count()} cores) at the start: {load} over 1 and 5 minutes, "
        "so other work ran beside where it is above 1.\n"
    )
    print(
        f"One training step of a view of the store against the same step of the extracted network, in ms, medians of "
        f"{options.repeats} interleaved pairs. GNN: `gnn_node` on {task.name} (1,797 nodes); CNN: 32 images of "
        "32 x 32, three elastic stages.\n"
    )
    print(
        "| network | parameters | in the store | forward + backward: view | alone | overhead "
        "| with Adam: view | alone | overhead |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for width in (128, 16):
        for conv in ("gcn", "sage_mean"):
            choices = {**common, "conv1": conv, "conv2": conv, "width": width}
            print(overhead(f"GNN, {conv}, width {width}", gnn, choices, nodes, options.repeats), flush=True)
    for width, kernel in ((64, 5), (32, 3), (16, 3)):
        sizes: dict[str, Label] = {f"{n}{i}": v for i in (1, 2, 3) for n, v in (("width", width), ("kernel", kernel))}
        print(overhead(f"CNN, width {width}, kernel {kernel}", cnn, sizes, images, options.repeats), flush=True)
    print(
        f"\nMaking the store (s) and a view of it (ms, medians over {options.subnets} random architectures): of a "
        "structure that is built for it, of an architecture whose structure is built, of an architecture seen before.\n"
    )
    print("| space | store, s | numbers stored | new structure | new architecture | seen before |")
    print("|---|---|---|---|---|---|")
    for name, space in (("gnn_node", gnn), ("elastic_cnn", cnn), ("nasbench201, 1 cell", nasbench201(cells=1))):
        print(making(name, space, options.subnets), flush=True)
    print(
        "\nSubnets of `gnn_node` with the task's sizes, random, scored on the validation nodes. Together: `evaluate`, "
        "which computes common prefixes once. One by one: `calibrated` and `score`, for 200 of them. Training: `fit` "
        f"with its defaults, mean CPU seconds of {options.trained} of them.\n"
    )
    print("| task | subnets | with BatchNorm | together, per s | one by one, per s | training each, s | ratio |")
    print("|---|---|---|---|---|---|---|")
    tasks = [task] if options.dataset == "none" else [task, planetoid(options.dataset)]
    for one in tasks:
        space = gnn_node(one.sizes["features"], one.sizes["classes"])
        print(scoring(one, space, options.scored, options.trained), flush=True)
    supernet, rng = Supernet(gnn), random.Random(0)
    largest = max((gnn.sample(rng) for _ in range(1000)), key=supernet.params)
    print(
        "\nMemory of a training step with Adam, each in a process of its own, in MiB: the largest of 1,000 random "
        f"architectures of `gnn_node` on {task.name} ({supernet.params(largest):,} parameters) as a view of the store, "
        "and alone. Adam's state is that of the slices' parameters, at their stored sizes.\n"
    )
    print("| | parameters | Adam's state | peak of the step over before | peak of the process |")
    print("|---|---|---|---|---|")
    for what in ("store", "alone"):
        command = [sys.executable, "-W", "ignore", __file__, "--peak", what, "--architecture", largest.to_json()]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        print(f"| {what} | {found} |", flush=True)


if __name__ == "__main__":
    main()
