"""Wall time of the quickstart by phase, and of the answers that must be quick.

python benchmarks/quickstart.py 3
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
NASGRAPH = [sys.executable, "-m", "nasgraph.cli"]


def seconds(command: list[str], code: int) -> float:
    """Wall time of a command that has to end with ``code``."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    spent = time.perf_counter() - start
    assert done.returncode == code, done.stderr
    return spent


def main(repeats: int) -> None:
    print("# Quickstart\n")
    print(f"`python benchmarks/quickstart.py {repeats}`: median (minimum to maximum) of {repeats} runs, 2 workers.\n")
    phases: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(repeats):
            run = Path(folder) / str(i)
            command = [*NASGRAPH, "search", "configs/quickstart.yaml", "--out", str(run), "--quiet"]
            phases.setdefault("whole command", []).append(seconds(command, 0))
            for name, spent in json.loads((run / "manifest.json").read_text())["seconds"].items():
                phases.setdefault(name, []).append(spent)
        bad = Path(folder) / "bad.yaml"
        bad.write_text("space: gnn_nod\ntask: digits_knn\n")
        answers = {
            "`nasgraph --help`": ([*NASGRAPH, "--help"], 0),
            "a config error": ([*NASGRAPH, "search", str(bad)], 2),
        }
        for name, (command, code) in answers.items():
            phases[name] = [seconds(command, code) for _ in range(5)]
    print("| phase | seconds |\n|---|---|")
    for name, spent in phases.items():
        print(f"| {name} | {statistics.median(spent):.2f} ({min(spent):.2f} to {max(spent):.2f}) |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
