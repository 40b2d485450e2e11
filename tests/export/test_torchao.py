"""torchao takes our bits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nasgraph.build import build
from nasgraph.errors import ExportError
from nasgraph.export import export_model
from nasgraph.export.torchao_config import FILE, torchao_config
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.transforms import Quantize
from nasgraph.transforms.deploy import Deployed, deploy


def network() -> Deployed:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    Quantize("0", weight_bits=8, per="channel").apply(model)
    Quantize("2", weight_bits=4, per="group", group_size=16).apply(model)
    return deploy(model)


def test_torchao_quantises_the_layers_that_we_did() -> None:
    from torchao.quantization import quantize_

    deployed = network()
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    expected = deployed.model(x)
    config = torchao_config(deployed)
    assert list(config.fqn_to_config) == ["0", "2"]
    quantize_(deployed.model, config, filter_fn=None)
    kinds = [type(layer.weight).__name__ for layer in deployed.model if isinstance(layer, nn.Linear)]
    assert kinds == ["IntxUnpackedToInt8Tensor", "IntxUnpackedToInt8Tensor", "Parameter"]
    assert [deployed.model[n].weight.target_dtype for n in (0, 2)] == [torch.int8, torch.int4]
    torch.testing.assert_close(deployed.model(x), expected, atol=0.1, rtol=0.1)  # its scales are its own


def test_nothing_to_quantise() -> None:
    with pytest.raises(ExportError, match="no nn.Linear"):
        torchao_config(deploy(nn.Sequential(nn.Linear(4, 4))))


def test_a_search_space_leaves_with_its_configuration(tmp_path: Path) -> None:
    """Another process loads the packed model and quantises it by the file."""
    space = SearchSpace("linear")
    x = space.input("x", torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), dynamic={0: "rows"})
    bits = Quantize(weight_bits=Choice("bits", [4, 8, 32]), per="channel")
    space.output(space.add("head", Op(nn.Linear, out_features=5), x, transforms=[bits]))
    found = {}
    for label in (4, 8, 32):
        arch = space.architecture({"bits": label})
        folder, model = tmp_path / str(label), build(space, arch)
        [found[label]] = export_model(model, folder, space=space, architecture=arch, formats=["torchao"])
    for label in (4, 8):
        assert (found[label].status, found[label].max_abs_diff) == ("ok", 0.0), found[label].detail
        config = json.loads((tmp_path / str(label) / FILE).read_text())
        assert f"int{label}" in json.dumps(config) and config["_type"] == "FqnToConfig"
    assert found[32].status == "failed" and "no nn.Linear has a weight of 1 to 8 bits" in found[32].detail


def test_without_torchao_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ExportError, match=r"nasgraph\[quant\]"):
        torchao_config(network())
