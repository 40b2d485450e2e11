"""The examples of docs/transforms.md run as they stand, and the one of a user's own transform sits the exam."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nasgraph.objectives.bits import count_bit_operations, count_model_bits
from nasgraph.space import Choice
from nasgraph.testing import TransformExam
from nasgraph.transforms import transformed
from nasgraph.transforms.deploy import deploy

PAGE = Path(__file__).parents[2] / "docs" / "transforms.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_a_space_with_transforms(capsys: pytest.CaptureFixture[str]) -> None:
    exec(BLOCKS[0], {})
    assert capsys.readouterr().out.strip() == "72"


def test_a_space_over_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    exec(BLOCKS[1], names)
    first, second = capsys.readouterr().out.strip().splitlines()
    assert first == "['bits', 'rank.layers.0.linear1', 'rank.layers.1.linear1']"
    assert "rank.layers.0.linear1=0" in second and "bits=32" in second
    assert type(names["small"]) is type(names["model"])


_own: dict[str, object] = {"__name__": __name__}
exec(compile(BLOCKS[2], str(PAGE), "exec"), _own)
sys.modules[__name__].__dict__.update({name: _own[name] for name in ("Sign", "Binary")})


def test_what_the_example_costs(tmp_path: Path) -> None:
    """A bit for each weight and one scale; 1 x 32 bits for each product instead of 32 x 32."""
    layer, x = nn.Linear(16, 64, bias=False), torch.randn(4, 16)
    binary = transformed(copy.deepcopy(layer), [_own["Binary"]()])  # type: ignore[operator]
    assert count_model_bits(binary) == 16 * 64 + 32
    assert 32 * count_bit_operations(binary, (x,)) == count_bit_operations(layer, (x,)) == 4 * 16 * 64 * 32 * 32
    weight = deploy(binary).weights[""]
    assert weight.codes is not None and torch.equal(weight.codes, layer.weight.sign().int())


class TestBinary(TransformExam):
    transform = _own["Binary"](on=Choice("on", [False, True]))  # type: ignore[operator]
    formats = (
        "safetensors",
        "packed",
    )  # this file's source is not the page's, so there is nothing to copy into model.py
