"""How much memory does a supernet of adapters take over a frozen model?

Bytes of all distinct tensors of model, store, and the networks that are kept built; and the resident memory of the
process before and after, in a fresh process for each size.

    OMP_NUM_THREADS=1 python benchmarks/lora_memory.py > results/benchmarks/lora_memory.md
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import random
import resource
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor, nn

from nasgraph.space import Choice, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.transforms import Lora

RANKS = [0, 2, 4, 8, 16]
SIZES = ((256, 4), (512, 8), (1024, 8))  # width, layers
SUBNETS = 32


class Block(nn.Module):
    """A transformer block's linear layers, without attention itself: its memory is what is asked here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.out(torch.tanh(self.query(h)) * self.value(h))
        return x + self.down(torch.relu(self.up(self.norm(x))))


def bytes_of(*things: Any) -> int:
    """Of all distinct storages of modules and tensors."""
    found = {}
    for thing in things:
        tensors = [thing] if isinstance(thing, Tensor) else [*thing.parameters(), *thing.buffers()]
        for tensor in tensors:
            if tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def resident() -> int:
    """Resident memory of this process in bytes."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measure(width: int, layers: int) -> None:
    """One row."""
    torch.manual_seed(0)
    empty = resident()
    model = nn.Sequential(*(Block(width) for _ in range(layers)))
    x = torch.randn(8, width)
    model(x).sum().backward()  # once, so that libraries have loaded what they need
    model.zero_grad(set_to_none=True)
    base, before = bytes_of(model), resident()
    rules = [Lora("*.(query|value)", rank=Choice("rank.{name}", RANKS))]
    space = SearchSpace.from_module(model, rules, inputs=x, dynamic={"x": {0: "batch"}})
    supernet = Supernet(space)
    adapters = sum(p.numel() * p.element_size() for p in supernet.parameters() if p.requires_grad)
    rng = random.Random(0)
    peak = 0
    for _ in range(SUBNETS):
        subnet = supernet.subnet(space.sample(rng))
        subnet(x).sum().backward()
        peak = max(peak, resident())
    forms = [form.module for form in supernet._forms.values()]
    total = bytes_of(model, *supernet.parameters(), *forms)
    print(
        f"| {width} x {layers} | {base / 2**20:.1f} | {adapters / 2**20:.2f} | {total / 2**20:.1f} "
        f"| {total / (base + adapters):.3f} | {(before - empty) / 2**20:.0f} | {(peak - empty) / 2**20:.0f} "
        f"| {(peak - empty) / (before - empty + 2 * adapters):.3f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", type=int, nargs=2, metavar=("WIDTH", "LAYERS"), help="print one row")
    options = parser.parse_args()
    if options.one:
        measure(*options.one)
        return
    print(
        f"""# Memory of a LoRA supernet over frozen weights

    OMP_NUM_THREADS=1 python benchmarks/lora_memory.py > results/benchmarks/lora_memory.md

{platform.machine()}, torch {torch.__version__}, one thread. A model of linear layers; `Lora` with ranks {RANKS} on
query and value of each block; {SUBNETS} random subnets run forward and backward on 8 rows and stay built. MiB. Goal: at
most 1.1 times the base model plus the adapters.

`tensors`: all distinct storages of the model, the store and the built networks. `resident`: memory of the process above
what it had without a model, before the space was made and at its highest after; its ratio counts the adapters twice,
for their gradients. What it has beside tensors are Python's objects for {SUBNETS} built networks, some
10 to 30 MiB: they count where the model is small.

| width x layers | base | adapters | tensors | ratio | resident before | resident after | ratio |
|---|---|---|---|---|---|---|---|""",
        flush=True,
    )
    for width, layers in SIZES:
        subprocess.run([sys.executable, __file__, "--one", str(width), str(layers)], check=True, env=dict(os.environ))


if __name__ == "__main__":
    main()
