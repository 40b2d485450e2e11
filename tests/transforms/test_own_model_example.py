"""``examples/own_model``: a search over a model that exists, from the command line to the files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model"


@pytest.mark.timeout(600)
def test_it_is_searched_and_leaves_in_every_format(tmp_path: Path) -> None:
    folder = shutil.copytree(EXAMPLE, tmp_path / "own", ignore=shutil.ignore_patterns("__pycache__", "results"))
    model, config = folder / "my_model.py", folder / "search.yaml"
    model.write_text(model.read_text(encoding="utf-8").replace("epochs=15", "epochs=1"), encoding="utf-8")
    text = config.read_text(encoding="utf-8").replace("trials: 16", "trials: 3").replace("top: 3", "top: 1")
    config.write_text(text.replace("epochs: 2", "epochs: 1"), encoding="utf-8")
    command = [sys.executable, "-m", "nasgraph.cli", "search", "search.yaml", "--out", "results"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (exported,) = (folder / "results" / "models").iterdir()
    formats = json.loads((exported / "parity.json").read_text(encoding="utf-8"))["formats"]
    assert [(each["format"], each["status"]) for each in formats] == [
        ("code", "ok"),
        ("packed", "ok"),
        ("onnx-qdq", "ok"),
    ]
    choices = json.loads((exported / "architecture.json").read_text(encoding="utf-8"))["choices"]
    operators = [node.op_type for node in onnx.load(exported / "model_qdq.onnx").graph.node]
    assert operators.count("QuantizeLinear") == (2 if choices["inputs"] == 8 else 0)
    assert "import nasgraph" not in (exported / "model.py").read_text(encoding="utf-8")
