"""What subnets are worth after equally many trained paths of each policy, in a space of operations (digits).

OMP_NUM_THREADS=1 python benchmarks/policies.py > results/benchmarks/policies.md
"""

from __future__ import annotations

import random
import statistics
import time

import torch

from nasgraph import registry
from nasgraph.search_spaces.gnn_node import gnn_node
from nasgraph.supernet import Supernet
from nasgraph.tasks import digits_knn
from nasgraph.training import TrainSettings

PATHS = 520
RUNS = [  # policy, its arguments, paths a step
    ("uniform", {}, 1),
    ("fair", {}, 13),
    ("importance", {}, 1),
    ("sandwich", {"distill": "none"}, 4),
    ("sandwich", {"distill": "kl", "hard": 0}, 4),
    ("sandwich", {"distill": "kl", "hard": 1}, 4),
    ("sandwich", {"distill": "alpha", "hard": 1}, 4),
]


def main() -> None:
    torch.set_num_threads(1)
    task = digits_knn()
    space = gnn_node(**task.sizes, layers=2, widths=(16, 32, 64))
    rng = random.Random(1)
    archs = [space.sample(rng) for _ in range(100)]
    print("# Path policies on the digits\n\n    OMP_NUM_THREADS=1 python benchmarks/policies.py\n")
    print(f"torch {torch.__version__}, one thread. Validation accuracy of 100 subnets after {PATHS} paths, seed 0.\n")
    print("| policy | CPU s | median | best |\n|---|---|---|---|")
    for name, arguments, paths in RUNS:
        supernet, steps = Supernet(space, task, seed=0), PATHS // paths
        offered = {"space": space, "supernet": supernet, "steps": steps}
        policy = registry.make("policies", name, arguments, offered=offered)
        start = time.process_time()
        supernet.train(policy, steps, settings=TrainSettings(lr=0.01, weight_decay=5e-4))
        seconds = time.process_time() - start
        scores = supernet.evaluate(archs)
        print(
            f"| {name} {arguments or ''} | {seconds:.0f} | {statistics.median(scores):.2f} | {max(scores):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
