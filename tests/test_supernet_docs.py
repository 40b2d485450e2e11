"""The example of docs/supernet.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import fx

PAGE = Path(__file__).parents[1] / "docs" / "supernet.md"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"STEPS": 30}
    exec(code, names)
    assert len(names["scores"]) == 20 and all(0 <= score <= 1 for score in names["scores"])
    assert names["supernet"].step == 30
    assert isinstance(names["model"], fx.GraphModule) and names["model"].meta["calls"]


def test_what_the_page_names_exists() -> None:
    from nasgraph import supernet
    from nasgraph.training import policies

    for name in ("Uniform", "Fair", "Sandwich", "Policy", "extremes"):
        assert hasattr(policies, name)
    assert hasattr(supernet, "recalibrate")
