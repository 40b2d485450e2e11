"""How fast architectures are drawn and named, and how many of them are different networks.

python benchmarks/canonical_key.py nasbench201 gnn_node --samples 10000 > results/benchmarks/canonical_key.md
"""

from __future__ import annotations

import argparse
import inspect
import platform
import random
import statistics
import sys
import time

import torch

from nasgraph import registry
from nasgraph.canonical import KEY_VERSION, key, simplify
from nasgraph.space import SearchSpace

SIZES = {"features": 64, "classes": 10}  # what a task would tell a space


def measure(name: str, samples: int, seed: int) -> str:
    """A row of the table: one space, ``samples`` random architectures, one thread."""
    make = registry.resolve("spaces", name)
    wanted = [p.name for p in inspect.signature(make).parameters.values() if p.default is p.empty]
    space: SearchSpace = make(**{argument: SIZES[argument] for argument in wanted})
    rng = random.Random(seed)
    clock = time.process_time()
    drawn = [space.sample(rng) for _ in range(samples)]
    drawing = time.process_time() - clock
    clock = time.process_time()
    keys = {space.key(arch) for arch in drawn}
    naming = time.process_time() - clock
    graphs = [space.resolve(arch) for arch in drawn[:500]]
    declared = statistics.median(len(graph.steps) for graph in graphs)
    simple = statistics.median(len(simplify(graph).steps) for graph in graphs)
    assert {key(graph) for graph in graphs} <= keys
    return (
        f"| `{name}` | {space.size():.3g} | {declared:.0f} | {simple:.0f} | {samples / drawing:,.0f} "
        f"| {samples / naming:,.0f} | {len(set(drawn)):,} | {len(keys):,} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spaces", nargs="+", help="names of installed spaces, or module:function")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("# Canonical keys: speed, and how many samples are different networks\n")
    print(f"    python benchmarks/canonical_key.py {' '.join(sys.argv[1:])}\n")
    print(
        f"{options.samples:,} random architectures per space, seed {options.seed}, per CPU second of one thread. "
        f"Python {platform.python_version()}, {platform.machine()}. Keys of version {KEY_VERSION}; their time "
        "includes resolving the architecture to its graph. Steps are medians over 500 samples.\n"
    )
    print("| space | size | steps | simplified | samples/s | keys/s | distinct samples | distinct keys |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.spaces:
        print(measure(name, options.samples, options.seed), flush=True)


if __name__ == "__main__":
    main()
