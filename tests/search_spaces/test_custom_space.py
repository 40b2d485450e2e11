"""A user's project with a ``search_spaces`` folder of its own works outside this repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "custom_space"
NASGRAPH = "import sys; from nasgraph.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("user") / "my_project"))


def run(project: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_search_finds_the_users_space(project: Path) -> None:
    small = [
        "search.trials=3",
        "search.baseline=false",
        "train.epochs=3",
        "final.top=1",
        "final.seeds=1",
        "export=[code]",
    ]
    overrides = [word for text in small for word in ("--set", text)]
    run(project, "-c", NASGRAPH, "search", "search.yaml", "--out", "results", "--quiet", *overrides)
    manifest = json.loads((project / "results" / "manifest.json").read_text())
    assert manifest["space"]["name"] == "my_space"
    (model,) = (project / "results" / "models").iterdir()
    code = (model / "model.py").read_text()
    assert "import nasgraph" not in code and "from nasgraph" not in code and "search_spaces" not in code
    # the model runs where neither nasgraph nor the project can be imported from the working directory
    shutil.copytree(model, project / "alone")
    run(project / "alone", "-I", "model.py")


def test_it_is_listed(project: Path) -> None:
    shown = run(project, "-c", NASGRAPH, "spaces", "search_spaces.my_space:my_space")
    assert "216 architectures" in shown
    assert (project / "my_space.svg").read_text().startswith("<svg")


def test_it_passes_the_exam(project: Path) -> None:
    shown = run(project, "-m", "pytest", "-q", "test_my_space.py")
    assert "8 passed" in shown


@pytest.mark.parametrize("name", ["search_spaces/my_space.py", "search.yaml", "test_my_space.py"])
def test_the_page_shows_the_files(name: str) -> None:
    page = (ROOT / "docs" / "custom_space.md").read_text(encoding="utf-8")
    assert (EXAMPLE / name).read_text(encoding="utf-8") in page
