"""The examples of docs/pruning.md run as they stand, and print what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "pruning.md"


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    masks, smaller, ratios, channels = re.findall(
        r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    exec(masks, {})
    assert "(40, 160)" in capsys.readouterr().out
    names: dict[str, Any] = {}
    exec(smaller, names)
    printed = capsys.readouterr().out
    assert "0 8 ['0', '1', '3']\n3 4 ['3', '5']\n" in printed
    assert "torch.Size([4, 1, 3, 3]) torch.Size([10, 16])" in printed
    names = {}
    exec(ratios, names)
    layers = [names["model"].get_submodule(name) for name in ("1", "3")]
    assert names["kept"].keys() == {"1", "3"} and all(ratio < 1.0 for ratio in names["kept"].values())
    assert sum(int(layer.effective_weight().count_nonzero()) for layer in layers) <= 0.1 * (64 * 32 + 32 * 10)
    exec(channels, names)
    assert "torch.Size([8, 64])" in capsys.readouterr().out
