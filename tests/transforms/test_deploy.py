"""A network for use: the same output with weights in the place of masks and quantisers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from nasgraph.errors import ExportError
from nasgraph.objectives.bits import input_bits
from nasgraph.transforms import Prune, Quantize, transformed
from nasgraph.transforms.deploy import deploy
from nasgraph.transforms.layers import extended, rewritten_layers
from nasgraph.transforms.lora import Lora
from nasgraph.transforms.ranges import freeze_ranges
from tests.transforms.toys import Adapt

TRANSFORMS: dict[str, list[Any]] = {
    "quantised": [Quantize(weight_bits=4)],
    "binary": [Quantize(weight_bits=1, per="channel")],
    "groups": [Quantize(weight_bits=3, per="group", group_size=5, method="minmax")],
    "nested": [Quantize(weight_bits=2, method="nested", per="channel")],
    "masked": [Prune(keep=0.4)],
    "supermask": [Prune(scores="signed", weights="fixed")],
    "both": [Quantize(weight_bits=4, activation_bits=8), Prune(keep=0.4, scores="learned")],
    "all": [Quantize(weight_bits=2), Prune(keep=0.4, structure="rows"), Lora("*", rank=2)],
}


def network(transforms: list[Any]) -> nn.Module:
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)]
    model = transformed(nn.Sequential(*layers), transforms)
    with torch.no_grad():  # adapters start at 0, which would hide them
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_output_is_the_same_bit_for_bit(name: str, images: torch.Tensor) -> None:
    model = network(TRANSFORMS[name])
    before = copy.deepcopy(model.state_dict())
    deployed = deploy(model)
    assert torch.equal(deployed.model(images), model.eval()(images))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not deployed.model.training
    kinds = {type(layer).__name__ for layer in deployed.model.modules()}
    if name in ("both", "all"):  # an activation quantiser or an adapter stays
        assert all(not len(layer.on_weight) for layer in rewritten_layers(deployed.model).values())
    else:
        assert not any(kind.startswith("Transformed") for kind in kinds)
        assert set(deployed.model.state_dict()) == {"0.weight", "0.bias", "4.weight", "4.bias"}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_table_says_what_the_weights_are_made_of(name: str) -> None:
    model = network(TRANSFORMS[name])
    deployed = deploy(model)
    for layer, stored in deployed.weights.items():
        weight = deployed.model.get_submodule(layer).weight
        if stored.kept is not None:
            assert torch.equal(weight * stored.kept, weight)
            assert stored.density == stored.kept.float().mean()
        if stored.codes is not None and stored.scale is not None:
            rows = stored.codes.reshape(len(stored.scale), -1)
            spread = stored.scale.repeat_interleave(stored.group, 1)[:, : rows.shape[1]]
            assert torch.equal(((rows + stored.offset) * spread).reshape(weight.shape), weight)
    assert set(deployed.weights) == {"0", "4"}
    expected = {"quantised": (4, 1.0), "masked": (32, 0.4), "both": (4, 0.4), "all": (2, 0.4)}
    if name in expected:
        bits, density = expected[name]
        assert {stored.bits for stored in deployed.weights.values()} == {bits}
        assert all(stored.density == pytest.approx(density, abs=0.02) for stored in deployed.weights.values())


def test_merged_adapters_leave_plain_layers(images: torch.Tensor) -> None:
    model = network([Lora("*", rank=2), Prune(keep=0.5)]).eval()
    merged = deploy(model, merge_adapters=True)
    torch.testing.assert_close(merged.model(images), model(images), atol=1e-5, rtol=1e-5)
    assert not rewritten_layers(merged.model) and not merged.weights
    assert not torch.equal(merged.model[4].weight, model[4].effective_weight())


def test_an_adapter_that_cannot_be_merged_is_named() -> None:
    model = transformed(nn.Sequential(nn.Linear(4, 4)), [Adapt(rank=2)])
    with pytest.raises(ExportError, match="layer '0': Beside has no delta"):
        deploy(model, merge_adapters=True)


def test_a_binary_weight_has_no_zero_so_its_mask_is_undone() -> None:
    """The quantiser reads the masked weight and gives -1 or 1 for 0 too: nothing to keep a bitmap of."""
    model = network([Quantize(weight_bits=1), Prune(keep=0.5)])
    stored = deploy(model).weights["4"]
    zeros = int((model[4].effective_weight() == 0).sum())
    assert (stored.kept is None) == (zeros == 0)


def test_activation_quantisers_stay_with_their_ranges(images: torch.Tensor) -> None:
    model = freeze_ranges(network([Quantize(weight_bits=8, activation_bits=8)]), [(images,)])
    deployed = deploy(model)
    assert torch.equal(deployed.model(images * 3), model.eval()(images * 3))
    assert "0.on_input.quantize.lowest" in deployed.model.state_dict()


class Halves(nn.Module):
    """Two scales in a row, as a module of one's own says it: the codes times them, plus a half."""

    bits, offset, group_size = 3, 0.5, 8

    def codes(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = weight.detach().reshape(len(weight), 2, 8).abs().amax(-1) / 4
        return (weight.detach() / scale.repeat_interleave(8, 1)).floor().clamp(-4, 3).to(torch.int32), scale

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        codes, scale = self.codes(weight)
        return (codes + self.offset) * scale.repeat_interleave(8, 1) + (weight - weight.detach())


def test_a_module_of_ones_own_says_its_codes() -> None:
    layer = extended(nn.Linear(16, 5, bias=False))
    layer.on_weight["halves"] = Halves()
    stored = deploy(layer).weights[""]
    assert stored.codes is not None and stored.scale is not None
    assert (stored.bits, stored.group, stored.offset) == (3, 8, 0.5) and stored.scale.shape == (5, 2)
    weight = (stored.codes + stored.offset) * stored.scale.repeat_interleave(8, 1)
    assert torch.equal(weight, deploy(layer).model.weight)


def test_bits_of_an_input_of_ones_own_count() -> None:
    layer = extended(nn.Linear(16, 5, bias=False))
    layer.on_input["sign"] = Halves()
    assert input_bits(layer) == 3 and input_bits(nn.Linear(2, 2)) == 32
