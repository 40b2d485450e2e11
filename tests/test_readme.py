"""Every command and code block of the README runs, searches with a smaller budget."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nasgraph.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = {
    "search": ["--set", "screen.candidates=4", "--set", "train.epochs=2", "--set", "final={top: 1, seeds: 1}"]
    + ["--set", "search.trials=4", "--quiet"],
    "supernet": ["--set", "supernet.epochs=2", "--set", "search.finetune=1"],
    "resume": ["--quiet"],
    "score": ["-n", "3", "--quiet"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    return [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines() if line.strip()]


def test_make_targets_of_the_readme_exist() -> None:
    made = [command[1] for command in commands() if command[0] == "make"]
    assert made == ["search", "test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in made)


def test_commands_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, as they stand; what SMALL adds makes searches short."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    run = [command[1:] for command in commands() if command[0] == "nasgraph"]
    assert len(run) >= 6
    for command in run:
        shared = SMALL["supernet"] if any("supernet" in word for word in command) else []
        assert main([*command, *SMALL.get(command[0], []), *shared]) == 0, command
    assert (tmp_path / "results/mine/report.html").exists()
    assert (tmp_path / "gnn_node.svg").exists()
    assert (tmp_path / "scores.csv").exists()


@pytest.mark.parametrize("code", blocks("python"))
def test_python_of_the_readme_runs(code: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in code.splitlines():
        printed = re.search(r"^print\(.*\)\s+# (.+)$", line)
        if printed:
            assert printed[1] in done.stdout, line


def test_files_that_the_readme_names_exist() -> None:
    for target in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / target).exists(), target
