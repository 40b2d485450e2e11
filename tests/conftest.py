"""Fixtures for all tests: where the real data lies, one thread for repeatable bits."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The read-only folder of real data named by NASGRAPH_DATA; tests that need it are skipped without it."""
    folder = Path(os.environ.get("NASGRAPH_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}: set NASGRAPH_DATA to one")
    return folder.resolve()


@pytest.fixture(scope="session")
def graphs(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A writable copy of the real graphs: PyG writes ``processed/`` beside ``raw/``."""
    return Path(shutil.copytree(data_root / "graphs", tmp_path_factory.mktemp("data") / "graphs"))
