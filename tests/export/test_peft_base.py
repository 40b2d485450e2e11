"""The docs' way to put the adapters of a run onto the model that its space came with."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from nasgraph import search
from nasgraph.config import parse
from nasgraph.errors import NasgraphError

pytest.importorskip("peft")
PAGE = Path(__file__).parents[2] / "docs" / "lora.md"
TINY = {
    "space": {"name": "lora_digits", "layers": 1, "width": 8, "epochs": 2, "ranks": [1, 2]},
    "task": {"name": "digits_rows", "digits": [5, 6, 7, 8, 9]},
    "objectives": ["val_accuracy", "adapter_params"],
    "train": {"epochs": 1, "lr": 0.01},
    "search": {"sampler": "random", "trials": 1, "workers": 0, "baseline": False},
    "final": {"top": 1, "seeds": 1},
    "export": ["peft", "code"],
}


def test_a_run_gives_the_base_of_its_adapters_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NASGRAPH_CACHE", str(tmp_path / "cache"))
    assert search.start(parse(TINY), Path("results/lora_ranks"), quiet=True) == 0
    [block] = PAGE.read_text(encoding="utf-8").split("```py\n")[1:]
    scope: dict[str, Any] = {}
    exec(block.partition("```")[0], scope)
    spec = importlib.util.spec_from_file_location("adapted_model", scope["folder"] / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x = torch.randn(5, 8, 8)
    found, plain = scope["model"](x), scope["run"].space.base.copy()(x)
    torch.testing.assert_close(found, module.load()(x), rtol=0, atol=1e-6)
    assert float((found - plain).detach().abs().max()) > 0.01


def test_another_base_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nasgraph.run import Run

    monkeypatch.setenv("NASGRAPH_CACHE", str(tmp_path / "cache"))
    assert search.start(parse({**TINY, "export": ["safetensors"]}), tmp_path / "run", quiet=True) == 0
    text = (tmp_path / "run" / "manifest.json").read_text()
    (tmp_path / "run" / "manifest.json").write_text(text.replace('"epochs": 2', '"epochs": 1'))  # of the base
    with pytest.raises(NasgraphError, match="'lora_digits' is not what it was"):
        _ = Run.open(tmp_path / "run").space
