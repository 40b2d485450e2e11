"""The example of docs/ranking.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "ranking.md"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"STEPS": 5, "EPOCHS": 2, "N": 5}
    exec(code, names)
    assert len(names["report"].truth) == 5 and len((tmp_path / "rank.csv").read_text().splitlines()) == 6
    assert "Best proxy in hindsight" in capsys.readouterr().out


def test_the_options_that_the_page_names_exist() -> None:
    from nasgraph.cli import _parser

    text = PAGE.read_text(encoding="utf-8")
    options = _parser().parse_args(["rank", "folder", "--set", "train.epochs=100", "--truth", "a:b", "--score", "loss"])
    assert options.truth == "a:b" and "--truth" in text and "--score" in text
