"""The examples of docs/few_shot.md run as they stand."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import fx

from nasgraph import config
from nasgraph.supernet import Supernet
from nasgraph.training.fewshot import FewShot
from nasgraph.training.splitting import LARGEST, MEASURES, lid_distances

PAGE = Path(__file__).parents[1] / "docs" / "few_shot.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"STEPS": 8, "REPEATS": 1}
    for code in blocks:
        exec(code, names)
    assert len(blocks) == 2
    assert [leaf.step for _, leaf in names["few"].leaves] == [8, 8]
    assert len(names["scores"]) == 20 and all(0 <= score <= 1 for score in names["scores"])
    assert isinstance(names["model"], fx.GraphModule)
    assert names["small"].choices["norm"].labels == ("layer",)


def test_the_config_is_read() -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = config.Supernet.model_validate(yaml.safe_load(text)["supernet"]).split
    assert found is not None and (found.by, found.leaves, found.epochs) == ("gradients", 2, 100)
    arguments = inspect.signature(FewShot.split).parameters
    for name, field in config.Split.model_fields.items():
        assert name == "epochs" or arguments[name].default == field.default


def test_the_page_says_what_the_code_says() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(f'`"{name}"`' in text for name in MEASURES) and f"up to {LARGEST} options" in text
    defaults = {name: p.default for name, p in inspect.signature(FewShot.split).parameters.items()}
    assert f"the default here is {defaults['repeats']}." in text
    assert f"from the {inspect.signature(lid_distances).parameters['k'].default} nearest" in text
    for name in re.findall(r"`(\w+)`", text.split("has the methods of a `Supernet`:")[1].split(". Its policy")[0]):
        assert hasattr(FewShot, name) and hasattr(Supernet, name)
