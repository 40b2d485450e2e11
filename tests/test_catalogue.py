"""``nasgraph spaces NAME`` describes every space that the docs name so."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from nasgraph.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "spaces.md"
ROWS = re.findall(
    r"^\|.*\| ([\d,]+)[^|]*\| `nasgraph (spaces [^`]+)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
)
TEXT = Path(os.environ.get("NASGRAPH_DATA", "none")) / "text" / "tinyshakespeare.txt"
SLOW = ("lora_digits", "lora_text")  # train the model that they are put over, once


@pytest.mark.parametrize(
    ("size", "command"),
    [pytest.param(*row, marks=pytest.mark.slow if row[1].endswith(SLOW) else ()) for row in ROWS],
)
def test_the_table_of_the_docs(size: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "lora_text" in command and not TEXT.exists():
        pytest.skip("needs the text")
    picture = tmp_path / "space.svg"
    assert main([*command.split(), "--draw", str(picture)]) == 0
    assert f"\n{size} architectures" in capsys.readouterr().out
    assert picture.read_text(encoding="utf-8").startswith("<svg")


def test_the_table_has_rows() -> None:
    assert len(ROWS) >= 13


def test_a_space_keeps_its_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not told of the classes of a task that is not there."""
    monkeypatch.setenv("NASGRAPH_CACHE", str(tmp_path))
    smaller = ["--set", "layers=1", "--set", "width=8", "--set", "epochs=1"]
    assert main(["spaces", "lora_digits", *smaller, "--draw", str(tmp_path / "space.svg")]) == 0
    assert "625 architectures" in capsys.readouterr().out
    assert "rank.blocks.0.up: 0 | 1 | 2" in (tmp_path / "space.svg").read_text(encoding="utf-8")


def test_other_digits_than_the_model_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["score", "lora_digits", "--task", "digits_rows", "--proxy", "params", "--out", str(tmp_path / "s.csv")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "5 digits, the task 10 classes: give the task as many, such as task.digits=[5,6,7,8,9]" in said
