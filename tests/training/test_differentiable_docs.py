"""The example of docs/differentiable.md runs as it stands, and its table has every method."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nasgraph import registry
from nasgraph.space import Architecture

PAGE = Path(__file__).parents[2] / "docs" / "differentiable.md"


def test_the_example_runs() -> None:
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {"STEPS": 3}
    exec(code, names)
    found = names["found"]
    assert isinstance(found.architecture, Architecture) and len(found.history) == 3
    assert set(found.probabilities) == set(names["space"].choices)
    assert set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)) == set(registry.names("relaxations"))
