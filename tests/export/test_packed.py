"""Packed weights: exact, no larger than the bits say, and loaded without nasgraph."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nasgraph import testing
from nasgraph.build import build
from nasgraph.export import Exported, Request, export_many, export_model
from nasgraph.export.packed import CODE, FILE, contents, pack, stored_bytes, unpack, unpacked
from nasgraph.objectives.bits import count_model_bits
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.transforms import LowRank, Prune, Quantize
from nasgraph.transforms.deploy import StoredWeight, deploy
from nasgraph.transforms.lora import Lora

LAYERS: dict[str, list[Any]] = {
    "eight": [Quantize(weight_bits=8, per="channel")],
    "five": [Quantize(weight_bits=5, method="minmax")],
    "groups": [Quantize(weight_bits=3, per="group", group_size=7)],
    "ternary": [Quantize(weight_bits=2, per="channel")],
    "binary": [Quantize(weight_bits=1)],
    "nested": [Quantize(weight_bits=4, method="nested")],
    "sixteen": [Quantize(weight_bits=16)],
    "masked": [Prune(keep=0.25)],
    "half_masked": [Prune(keep=0.99)],
    "masked_bits": [Quantize(weight_bits=8), Prune(keep=0.25)],
    "activations": [Quantize(weight_bits=4, activation_bits=8, activations="lsq")],
    "adapter": [Quantize(weight_bits=4), Lora("*", rank=2)],
    "factors": [LowRank("*", rank=4), Quantize(weight_bits=4)],
    "plain": [],
}


def layers() -> SearchSpace:
    """A linear layer for each way of storing a weight, one after the other, behind convolutions."""
    from torch_geometric.nn import GATConv, GCNConv

    space = SearchSpace("layers")
    h = space.input("x", torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), {0: "nodes"})
    edges = space.input("edge_index", torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]]), {1: "edges"})
    gcn = [Quantize(weight_bits=4, aggregation_bits=8)]
    h = space.add("gcn", Op(GCNConv, out_channels=12), h, edges, transforms=gcn)
    h = space.add("gat", Op(GATConv, out_channels=10), h, edges, transforms=[Quantize(weight_bits=2), Prune(keep=0.5)])
    for name, transforms in LAYERS.items():
        h = space.add(name, Op(nn.Linear, out_features=20), h, **({"transforms": transforms} if transforms else {}))
    space.output(h)
    return space


def convolutions() -> SearchSpace:
    space = SearchSpace("convolutions")
    h = space.input("image", torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), {0: "batch"})
    for name, bits, per in [("first", 8, "channel"), ("second", 3, "group"), ("third", 1, "tensor")]:
        transforms = [Quantize(weight_bits=bits, per=per, group_size=10)]
        h = space.add(name, Op(nn.Conv2d, out_channels=8, kernel_size=3), h, transforms=transforms)
    space.output(h)
    return space


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Request, Exported]]:
    folder = tmp_path_factory.mktemp("packed")
    requests = []
    for space in (layers(), convolutions()):
        arch = space.architecture({})
        model = build(space, arch)
        with torch.no_grad():  # adapters start at 0
            for name, parameter in model.named_parameters():
                parameter.add_(0.01 if "beside" in name else 0.0)
        requests.append(Request(model, folder / space.name, space, arch, ["packed"]))
    results = export_many(requests)
    return {request.space.name: (request, result[0]) for request, result in zip(requests, results, strict=True)}


@pytest.mark.parametrize("name", ["layers", "convolutions"])
def test_the_file_gives_the_model_bit_for_bit(name: str, exported: Any) -> None:
    request, result = exported[name]
    assert (result.status, result.max_abs_diff) == ("ok", 0.0), result.detail
    assert result.path == request.folder / FILE and (request.folder / CODE).is_file()
    if name == "layers":
        assert "1 bit: 1 weight" in result.note and "a bitmap and what it keeps" in result.note


def test_the_code_beside_it_is_plain_where_it_can_be(exported: Any) -> None:
    text = (exported["layers"][0].folder / CODE).read_text()
    assert "import nasgraph" not in text and "from nasgraph" not in text
    for name in ("ternary", "binary", "masked", "nested"):
        assert f"self.{name} = nn.Linear(" in text
    assert "self.gat = GATConv(" in text
    assert "self.activations = placed(" in text and "class ActivationQuantizer" in text
    assert "class Transform:" not in text and "class Quantize(" not in text


@pytest.mark.parametrize("name", ["layers", "convolutions"])
def test_model_bits_are_the_bytes_of_the_tensors(name: str, exported: Any) -> None:
    request, _ = exported[name]
    data = (request.folder / FILE).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    assert count_model_bits(request.model) == 8 * (len(data) - header)


def test_the_header_describes_each_packed_weight(exported: Any) -> None:
    from safetensors import safe_open

    with safe_open(exported["layers"][0].folder / FILE, "pt") as file:
        packed = json.loads(file.metadata()["nasgraph"])["packed"]
        assert packed["groups.weight"] == {"shape": [20, 20], "bits": 3, "group": 7, "offset": 0.0}
        assert packed["ternary.weight"] == {"shape": [20, 20], "bits": 2, "group": 20, "offset": 0.0}
        assert packed["masked.weight"] == {"shape": [20, 20], "bits": 32}
        assert file.get_slice("binary.weight.codes").get_shape() == [50]
        assert file.get_slice("masked.weight.kept").get_shape() == [50]
        assert file.get_slice("masked.weight.codes").get_shape() == [100]
        assert "half_masked.weight" not in packed  # a bitmap would make it larger


def test_the_file_is_as_large_as_the_bits_say(tmp_path: Path) -> None:
    """A million weights of 4 bits: analytic bits against bytes on disk, header included."""
    from safetensors.torch import save_file

    model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    Quantize(weight_bits=4, per="channel").apply(model)
    tensors, about = contents(deploy(model))
    save_file(tensors, tmp_path / FILE, metadata={"nasgraph": json.dumps(about)})
    analytic = (4 * 1024 * 1024 + 32 * 1024) / 8
    assert (tmp_path / FILE).stat().st_size == pytest.approx(analytic, rel=0.05)
    assert count_model_bits(model) == 8 * analytic
    assert torch.equal(unpacked(tmp_path / FILE)["0.weight"], model[0].effective_weight())


def test_a_binary_weight_with_zeros_of_a_mask() -> None:
    """One bit for what is kept, or two for all of it: the smaller."""
    codes = torch.tensor([[1, -1, 0, 0, 1, 0, 0, 0]], dtype=torch.int32)
    weight = StoredWeight(codes, torch.ones(1, 1), 1, 8, kept=codes != 0)
    assert stored_bytes(weight, 1, True) == 4 + 1 + 1
    assert stored_bytes(weight, 2, False) == 4 + 2


@given(st.integers(1, 16), st.lists(st.integers(0, 2**16 - 1), max_size=70))
@settings(deadline=None, max_examples=200)
def test_unpacked_is_what_was_packed(bits: int, numbers: list[int]) -> None:
    values = torch.tensor([number % 2**bits for number in numbers], dtype=torch.int32)
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-len(numbers) * bits // 8)
    assert torch.equal(unpack(packed, bits, len(numbers)), values)
    stream = sum(int(value) << (i * bits) for i, value in enumerate(values))  # lowest bits first
    assert bytes(packed.tolist()) == stream.to_bytes(len(packed), "little")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="2 bits hold 0 to 3, not 0 to 4"):
        pack(torch.tensor([0, 4]), 2)
    with pytest.raises(ValueError, match="17 bits"):
        pack(torch.tensor([0]), 17)


def own_model(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.mark.parametrize("made", [True, False])
def test_a_model_that_existed_before_its_space(made: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``make`` it leaves as code; without, as weights that are compared with those of the deployed model."""
    space = SearchSpace.from_module(
        own_model(),
        [Quantize("(0|2)", weight_bits=Choice("bits.{name}", [4, 8]))],
        inputs=torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),
        make=Op(own_model, width=8) if made else None,
    )
    arch = space.architecture({"bits.0": 4, "bits.2": 8})
    model = build(space, arch)
    [result] = export_model(model, tmp_path / "x", space=space, architecture=arch, formats=["packed"])
    assert (result.status, result.max_abs_diff) == ("ok", 0.0), result.detail
    assert "4 bits: 1 weight; 8 bits: 1 weight" in result.note
    assert ("weights alone" in result.note) != made
    text = (tmp_path / "x" / CODE).read_text()
    assert ("class Model" in text) == made and "class Quantize" not in text
    [block] = (tmp_path / "x" / "README.md").read_text().split("```python\n")[1:]
    x = torch.randn(4, 6)
    scope = {next(iter(space.inputs)): x}
    monkeypatch.chdir(tmp_path / "x")
    monkeypatch.syspath_prepend(tmp_path / "x")
    monkeypatch.delitem(sys.modules, "packed_model", raising=False)
    exec(block.partition("```")[0], scope)  # what the card says loads it
    monkeypatch.delitem(sys.modules, "packed_model")
    if made:
        assert torch.equal(scope["output"], model(x))
    else:
        expected = deploy(model).model.state_dict()
        assert all(torch.equal(scope["weights"][name], value) for name, value in expected.items())


@pytest.mark.slow
class TestPacked(testing.ExporterExam):
    format = "packed"
