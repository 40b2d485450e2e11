"""The examples of docs/low_rank.md run as they stand, and its config is one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from nasgraph.config import Search

PAGE = (Path(__file__).parents[2] / "docs" / "low_rank.md").read_text(encoding="utf-8")


def test_the_examples_run() -> None:
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE):
        names: dict[str, Any] = {}
        exec(code, names)
    assert names["small"][0].rank <= 10


def test_the_config_is_one() -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    search = Search.model_validate(yaml.safe_load(text)["search"])
    assert search.warm_start is not None and search.warm_start.cost == "model_bits"
