"""torchao takes our bits."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from nasgraph.errors import ExportError
from nasgraph.export.torchao_config import torchao_config
from nasgraph.transforms import Quantize
from nasgraph.transforms.deploy import Deployed, deploy

INSTALLED = importlib.util.find_spec("torchao") is not None


def network() -> Deployed:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    Quantize("0", weight_bits=8, per="channel").apply(model)
    Quantize("2", weight_bits=4, per="group", group_size=16).apply(model)
    return deploy(model)


@pytest.mark.skipif(not INSTALLED, reason="torchao is not installed: pip install 'nasgraph[quant]'")
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


@pytest.mark.skipif(not INSTALLED, reason="torchao is not installed: pip install 'nasgraph[quant]'")
def test_nothing_to_quantise() -> None:
    with pytest.raises(ExportError, match="no nn.Linear"):
        torchao_config(deploy(nn.Sequential(nn.Linear(4, 4))))


@pytest.mark.skipif(INSTALLED, reason="torchao is installed")
def test_without_torchao_says_how_to_get_it() -> None:
    with pytest.raises(ExportError, match=r"nasgraph\[quant\]"):
        torchao_config(network())
