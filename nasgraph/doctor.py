"""``nasgraph doctor``: can this machine run searches, and with what."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rich.console import Console

from nasgraph import manifest, registry


def check() -> int:
    """Print one line per check; returns 0 if all that a search needs is there, else 1."""
    console = Console()
    failures = 0
    for name, needed, run in (
        ("packages", True, _packages),
        ("plug-ins", True, _plugins),
        ("threads", False, _threads),
        ("device", False, _device),
        ("build, train, export", True, _round_trip),
        ("data", False, _data),
        ("disk", True, _disk),
        ("browser", False, _browser),
    ):
        try:
            line, good = run(), True
        except Exception as error:  # a doctor names whatever is wrong
            line, good = f"{type(error).__name__}: {error}", False
        failures += needed and not good
        mark = "[green]ok  [/green]" if good else "[red]fail[/red]" if needed else "[yellow]note[/yellow]"
        console.print(f"{mark} {name}: ", end="")
        console.print(line, markup=False, highlight=False)
    return 1 if failures else 0


def _packages() -> str:
    found = {name: manifest._version(name) for name in manifest.PACKAGES}
    missing = [name for name, version in found.items() if version is None]
    if missing:
        raise RuntimeError(f"not installed: {', '.join(missing)}")
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _plugins() -> str:
    broken = []
    for kind in registry.KINDS:
        for name in registry.names(kind):
            try:
                registry.resolve(kind, name)
            except Exception as error:
                broken.append(f"{kind} {name} ({error})")
    if broken:
        raise RuntimeError("cannot be imported: " + "; ".join(broken))
    return ", ".join(f"{len(registry.names(kind))} {kind}" for kind in registry.KINDS)


def _threads() -> str:
    import torch

    return f"{os.cpu_count()} processors; torch would use {torch.get_num_threads()} threads, a search uses 1 per worker"


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu (no CUDA device)"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _round_trip() -> str:
    import random
    import tempfile
    import time

    from nasgraph.build import build
    from nasgraph.export import export_model

    space = registry.make("spaces", "gnn_node", {}, {"features": 8, "classes": 3})
    start = time.monotonic()
    architecture = space.sample(random.Random(0))
    model = build(space, architecture)
    model(*(i.example for i in space.inputs.values())).sum().backward()
    with tempfile.TemporaryDirectory() as folder:
        written = export_model(
            model, Path(folder) / "model", space=space, architecture=architecture, formats=("code", "safetensors")
        )
        bad = [f"{item.format}: {item.detail}" for item in written if item.status != "ok"]
    if bad:
        raise RuntimeError("; ".join(bad))
    return f"a model was built, differentiated, exported and compared in {time.monotonic() - start:.1f} s"


def _data() -> str:
    root = os.environ.get("NASGRAPH_DATA")
    if root is None:
        return "NASGRAPH_DATA is not set: datasets are downloaded to the user's cache; digits_knn needs none"
    if not (Path(root) / "graphs").is_dir():
        raise RuntimeError(f"NASGRAPH_DATA={root} has no folder graphs/")
    return f"{root}: " + ", ".join(sorted(path.name for path in (Path(root) / "graphs").iterdir()))


def _disk() -> str:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    if free < 1:
        raise RuntimeError(f"only {free:.1f} GB free in {Path.cwd()}")
    return f"{free:.0f} GB free in {Path.cwd()}"


def _browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        raise RuntimeError("no Chromium: the test of the report's look is skipped; searches do not need it")
    return found
