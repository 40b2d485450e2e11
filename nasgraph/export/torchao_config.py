"""Bits of a deployed network as a configuration of torchao, which then quantises the network its own way."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nasgraph.declare import ops_in, ways
from nasgraph.errors import ExportError
from nasgraph.export import packed
from nasgraph.export.base import Outgoing, Written
from nasgraph.model_space import ModelSpace
from nasgraph.space import Op, SearchSpace
from nasgraph.transforms.base import Transform, transformed
from nasgraph.transforms.deploy import Deployed, StoredWeight, deploy
from nasgraph.transforms.layers import KINDS, is_pyg_linear
from nasgraph.transforms.lora import Lora
from nasgraph.transforms.low_rank import LowRank
from nasgraph.transforms.prune import Prune
from nasgraph.transforms.quantize import Quantize

FILE = "torchao.json"
NO_CODE = "torchao.json needs a model to quantise, and no code can make this one: give the space make="
NOTHING = "no nn.Linear has a weight of 1 to 8 bits: torchao would change nothing"
NOT_LINEAR = set(KINDS) - {nn.Linear}
OTHERS = (Lora, LowRank, Prune)  # transforms that leave weights floats
RELOAD = f"""{packed.RELOAD.replace("def load(path)", "def plain(path)")}
def load(path):
    import json

    from torchao.core.config import config_from_dict
    from torchao.quantization import quantize_

    model = plain(path[: -len({FILE!r})] + {packed.FILE!r})
    with open(path, encoding="utf-8") as file:
        quantize_(model, config_from_dict(json.load(file)), filter_fn=None)
    return model
"""


def export(outgoing: Outgoing, folder: Path) -> Written:
    """Write ``torchao.json``, to be read by ``torchao.core.config.config_from_dict``, and the files of ``packed``.

    The model that ``packed_model.load()`` gives, quantised by it, is what the file is compared with, not the live one.

    Raises: ExportError: as :func:`torchao_config`; or no code can make the model.
    """
    deployed = deploy(outgoing.model)
    config = torchao_config(deployed)
    from torchao.core.config import config_to_dict
    from torchao.quantization import quantize_

    beside = packed.export(outgoing, folder)
    if beside.expected is not None:
        raise ExportError(NO_CODE)
    (folder / FILE).write_text(json.dumps(config_to_dict(config), indent=1), encoding="utf-8")
    quantize_(deployed.model, config, filter_fn=None)
    detail = f"for the model of {packed.CODE}; torchao finds scales of its own"
    return Written(folder / FILE, RELOAD, tolerance=0.0, detail=detail, expected=deployed.model)


def check(space: SearchSpace) -> None:
    """Raises: ExportError: no code makes the networks of ``space``, or none has a linear layer of few bits."""
    if isinstance(space, ModelSpace) and space.base.made is None:
        raise ExportError(NO_CODE)
    if not any(_may_quantise(each) for each in _of_linears(space)):
        raise ExportError(NOTHING)


export.check = check  # type: ignore[attr-defined]  # export.fits asks it before a search


def _of_linears(space: SearchSpace) -> Iterator[Op]:
    """The transforms of what is, or may hold, a linear layer."""
    for node in space._ops.values():
        ops = list(ops_in(node))
        rules = [op for op in ops if isinstance(op.make, type) and issubclass(op.make, Transform)]
        if isinstance(space, ModelSpace):
            for rule in rules:
                layers = space.base.model.get_submodule(rule.kwargs["where"]).modules()
                if any(isinstance(layer, nn.Linear) or is_pyg_linear(layer) for layer in layers):
                    yield rule
        elif {op.make for op in ops} - {rule.make for rule in rules} - {transformed} - NOT_LINEAR:
            yield from rules


def _may_quantise(rule: Op) -> bool:
    """Whether some options of a transform give a weight of 1 to 8 bits; of one's own nobody knows."""
    if rule.make is not Quantize:
        return rule.make not in OTHERS
    return any((each.kwargs.get("weight_bits") or 32) <= 8 for _, each in ways(rule, {}))


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
        raise ExportError(NOTHING)
    return FqnToConfig(configs)


def _granularity(weight: StoredWeight) -> Any:
    from torchao.quantization import PerAxis, PerGroup

    assert weight.codes is not None
    inputs = weight.codes.shape[1]
    whole = weight.group >= inputs or inputs % weight.group
    return PerAxis(0) if whole else PerGroup(weight.group)
