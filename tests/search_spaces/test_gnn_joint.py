"""The joint space: masks, bits and corrections on one layer, alone and in a supernet."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from nasgraph.build import build
from nasgraph.errors import SpaceError
from nasgraph.search_spaces.gnn_joint import gnn_joint
from nasgraph.search_spaces.gnn_low_precision import gnn_low_precision
from nasgraph.space import Label, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.testing import SpaceExam, node_batch

FEATURES, CLASSES = 5, 3  # of testing.node_batch
BASE: dict[str, Label] = {"depth": "1", "conv1": "gcn", "width": 16, "activation": "relu", "head": "gcn"}
BASE |= {"input_dropout": 0.0, "dropout": 0.0}
NEUTRAL: dict[str, Label] = {
    f"{kind}.{node}": label
    for node in ("conv1", "head")
    for kind, label in {
        "weight_bits": 32,
        "activation_bits": 32,
        "aggregation_bits": 32,
        "keep": 1.0,
        "rank": 0,
    }.items()
}


def space_of(**arguments: Any) -> SearchSpace:
    return gnn_joint(FEATURES, CLASSES, **arguments)


class TestGnnJoint(SpaceExam):
    space = staticmethod(space_of)
    classes = CLASSES
    exported = 1
    formats = ("code",)


def test_neutral_settings_are_the_plain_network_bit_for_bit() -> None:
    space, plain, batch = space_of(), gnn_low_precision(FEATURES, CLASSES), node_batch()
    first = build(space, space.architecture({**BASE, **NEUTRAL})).eval()
    bits = {name: label for name, label in NEUTRAL.items() if "bits" in name}
    second = build(plain, plain.architecture({**BASE, **bits})).eval()
    assert first.state_dict().keys() == second.state_dict().keys()
    assert torch.equal(first(*batch.inputs), second(*batch.inputs))


def test_a_layer_is_its_masked_quantised_weight_and_a_correction() -> None:
    space, batch = space_of(), node_batch()
    chosen = {**BASE, **NEUTRAL, "keep.conv1": 0.5, "weight_bits.conv1": 4, "rank.conv1": 2}
    layer = build(space, space.architecture(chosen)).conv1.lin
    weight = layer.effective_weight()
    mask = layer.weight.abs() > layer.weight.abs().flatten().kthvalue(layer.weight.numel() // 2).values
    assert int(mask.sum()) == round(0.5 * layer.weight.numel())
    step = layer.on_weight["quantize"].step_4
    assert torch.allclose(weight, (layer.weight * mask / step).clamp(-8, 7).round() * step)
    x = batch.inputs[0]
    with torch.no_grad():
        layer.beside["lora"].B.normal_(generator=torch.Generator().manual_seed(0))
    correction = layer.beside["lora"](x)
    assert torch.linalg.matrix_rank(correction) == 2
    assert torch.allclose(layer(x), x @ weight.T + correction)


def test_a_subnet_is_its_extraction_bit_for_bit() -> None:
    space = space_of(widths=(8, 16), operators=("gat", "gcn"), weight_bits=(2, 4, 32), ranks=(0, 1, 3))
    supernet, batch, rng = Supernet(space), node_batch(), random.Random(0)
    for parameter in supernet.parameters():  # a correction starts at 0
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    for _ in range(30):
        architecture = space.sample(rng)
        alone = supernet.extract(architecture).eval()
        assert torch.equal(alone(*batch.inputs), supernet.subnet(architecture).eval()(*batch.inputs)), architecture


def test_documented_size() -> None:
    assert f"{space_of().size():,}" in (gnn_joint.__doc__ or "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"keeps": [0.0, 1.0]}, "keep"), ({"ranks": [-1, 2]}, "rank"), ({"layers": 0}, "gnn_joint needs")],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        space_of(**arguments)
