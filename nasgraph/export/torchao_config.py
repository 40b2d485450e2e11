"""Bits of a deployed network as a configuration of torchao, which then quantises the network its own way."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from nasgraph.errors import ExportError
from nasgraph.transforms.deploy import Deployed, StoredWeight


def torchao_config(deployed: Deployed) -> Any:
    """``FqnToConfig`` for ``torchao.quantization.quantize_(deployed.model, config, filter_fn=None)``.

    One ``IntxWeightOnlyConfig`` for each ``nn.Linear`` with a weight of 1 to 8 bits (binary as 2), a scale for each
    channel or group; a scale for all of a tensor becomes one for each channel. torchao finds scales of its own for the
    weights as they are, so its numbers are near ours, not equal. Other layers stay as they are.

    Raises: ExportError: torchao is not installed, or no layer is of these.
    """
    try:
        from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig
    except ImportError as error:
        raise ExportError(f"torchao cannot be imported ({error}): pip install 'nasgraph[quant]'") from None
    configs: OrderedDict[str, Any] = OrderedDict()
    for name, weight in deployed.weights.items():
        layer = deployed.model.get_submodule(name)
        if isinstance(layer, nn.Linear) and weight.codes is not None and weight.bits <= 8:
            dtype = getattr(torch, f"int{max(weight.bits, 2)}")
            configs[name] = IntxWeightOnlyConfig(weight_dtype=dtype, granularity=_granularity(weight))
    if not configs:
        raise ExportError("no nn.Linear has a weight of 1 to 8 bits: torchao would change nothing")
    return FqnToConfig(configs)


def _granularity(weight: StoredWeight) -> Any:
    from torchao.quantization import PerAxis, PerGroup

    assert weight.codes is not None
    inputs = weight.codes.shape[1]
    whole = weight.group >= inputs or inputs % weight.group
    return PerAxis(0) if whole else PerGroup(weight.group)
