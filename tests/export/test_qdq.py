"""ONNX with integer weights: run by onnxruntime against PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

from nasgraph import testing
from nasgraph.build import build
from nasgraph.export import Exported, Request, export_many
from nasgraph.export.qdq import FILE, tensor_of_codes
from nasgraph.space import Call, Op, SearchSpace
from nasgraph.transforms import Prune, Quantize
from nasgraph.transforms.ranges import freeze_ranges

ALL = [(2, 4, 8)] + [pytest.param((bits,) * 3, marks=pytest.mark.slow) for bits in (2, 4, 8)]


def graphs(bits: Sequence[int]) -> SearchSpace:
    from torch_geometric.nn import GCNConv

    space = SearchSpace("graphs")
    h = space.input("x", torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), {0: "nodes"})
    edges = space.input("edge_index", torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]]), {1: "edges"})
    h = space.add("first", Op(GCNConv, out_channels=16), h, edges, transforms=[Quantize(weight_bits=bits[0])])
    per_channel = [Quantize(weight_bits=bits[1], per="channel")]
    h = space.add("second", Op(GCNConv, out_channels=12), h, edges, transforms=per_channel)
    groups = [Quantize(weight_bits=bits[2], per="group", group_size=4)]
    space.output(space.add("head", Op(nn.Linear, out_features=5), h, transforms=groups))
    return space


def images(bits: Sequence[int]) -> SearchSpace:
    """Convolutions with each way to share a scale, batch norm (which could be folded), products with matrices."""
    space = SearchSpace("images")
    h = space.input("image", torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), {0: "batch"})
    for width, per in zip(bits, ("tensor", "channel", "group"), strict=True):
        transforms = [Quantize(weight_bits=width, per=per, group_size=12)]
        h = space.add(per, Op(nn.Conv2d, out_channels=8, kernel_size=3, padding=1), h, transforms=transforms)
        h = space.add(f"norm_{per}", Op(nn.BatchNorm2d), h)
    h = space.add("rows", Call(torch.flatten, start_dim=2), h)  # (batch, channels, pixels): a product with a matrix
    transforms = [Quantize(weight_bits=bits[0])]
    h = space.add("mix", Op(nn.Linear, in_features=64, out_features=16), h, transforms=transforms)
    h = space.add("flat", Call(torch.flatten, start_dim=1), h)
    transforms = [Quantize(weight_bits=bits[2])]
    space.output(space.add("head", Op(nn.Linear, in_features=128, out_features=10), h, transforms=transforms))
    return space


def odd() -> SearchSpace:
    """What ONNX has no type for; products with more than matrices, whose weights are stored transposed."""
    space = SearchSpace("odd")
    h = space.input("x", torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0)), {0: "batch"})
    settings: dict[str, list[Any]] = {
        "one": [Quantize(weight_bits=1)],
        "three": [Quantize(weight_bits=3)],
        "six": [Quantize(weight_bits=6, per="channel")],
        "sixteen": [Quantize(weight_bits=16)],
        "nested": [Quantize(weight_bits=8, method="nested", per="channel")],
        "masked": [Quantize(weight_bits=4), Prune(keep=0.5)],
        "group": [Quantize(weight_bits=4, per="group", group_size=3)],
    }
    for name, transforms in settings.items():
        h = space.add(name, Op(nn.Linear, out_features=8), h, transforms=transforms)
    space.output(h)
    return space


def activations(bits: int) -> SearchSpace:
    space = SearchSpace(f"activations{bits}")
    h = space.input("x", torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), {0: "batch"})
    transforms = [Quantize(weight_bits=8, activation_bits=bits)]
    h = space.add("first", Op(nn.Linear, out_features=8), h, transforms=transforms)
    h = space.add("act", Call(torch.relu), h)
    space.output(space.add("second", Op(nn.Linear, out_features=4), h, transforms=transforms))
    return space


def export(folder: Path, spaces: Sequence[SearchSpace]) -> dict[str, tuple[Request, Exported]]:
    requests = []
    for space in spaces:
        arch = space.architecture({})
        model = build(space, arch)
        if space.name.startswith("activations"):
            freeze_ranges(model, [tuple(given.example / 2 for given in space.inputs.values())])  # some are clipped
        requests.append(Request(model, folder / space.name, space, arch, ["onnx-qdq"]))
    results = export_many(requests)
    return {request.space.name: (request, result[0]) for request, result in zip(requests, results, strict=True)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Request, Exported]]:
    return export(tmp_path_factory.mktemp("qdq"), [odd(), *map(activations, (4, 5, 8))])


def types(request: Request) -> dict[str, int]:
    graph = onnx.load(request.folder / FILE).graph
    return {tensor.name: tensor.data_type for tensor in graph.initializer if tensor.name.endswith(".codes")}


@pytest.mark.parametrize("bits", ALL, ids=str)
def test_onnxruntime_computes_what_pytorch_does(bits: tuple[int, ...], tmp_path: Path) -> None:
    for request, result in export(tmp_path, [graphs(bits), images(bits)]).values():
        assert result.status == "ok", result.detail
        assert result.max_abs_diff is not None and result.max_abs_diff <= 1e-5 and result.tolerance == 1e-5
        found = types(request)
        assert set(found.values()) == {getattr(TensorProto, f"INT{width}") for width in bits}
        assert len(found) == (3 if request.space.name == "graphs" else 5)
        proto = onnx.load(request.folder / FILE)
        onnx.checker.check_model(proto)
        assert proto.ir_version == (13 if 2 in bits else 10)
        raw = {tensor.name: len(tensor.raw_data) for tensor in proto.graph.initializer}
        assert raw["head.weight.codes"] == request.model.get_parameter("head.weight").numel() * bits[2] // 8
        assert "head.weight" not in raw


def test_what_onnx_cannot_hold_is_said(exported: Any) -> None:
    request, result = exported["odd"]
    assert result.status == "ok" and result.max_abs_diff <= 1e-5, result.detail
    assert types(request) == {
        "one.weight.codes": TensorProto.INT2,
        "three.weight.codes": TensorProto.INT4,
        "six.weight.codes": TensorProto.INT8,
        "sixteen.weight.codes": TensorProto.INT16,
        "nested.weight.codes": TensorProto.INT16,
        "masked.weight.codes": TensorProto.INT4,
        "group.weight.codes": TensorProto.INT4,
    }
    assert "Transpose" not in {node.op_type for node in onnx.load(request.folder / FILE).graph.node}
    for text in ("1 bit stored as int2", "3 bits stored as int4", "6 bits stored as int8", "masks stored as zeros"):
        assert text in result.note
    assert "3 bits stored as int4" in (request.folder / "README.md").read_text()


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_activations_of_a_fixed_range_are_a_pair_of_operators(bits: int, exported: Any) -> None:
    request, result = exported[f"activations{bits}"]
    assert result.status == "ok" and result.max_abs_diff <= 1e-5, result.detail
    operators = [node.op_type for node in onnx.load(request.folder / FILE).graph.node]
    assert operators.count("QuantizeLinear") == 2 and operators.count("DequantizeLinear") == 4
    assert "activations are rounded" in result.note and result.tolerance == 0.05


def test_codes_are_packed_as_onnx_reads_them() -> None:
    from onnx import numpy_helper

    codes = torch.tensor([[-8, 7, 0], [-1, 3, -5]])
    read = numpy_helper.to_array(tensor_of_codes("codes", codes, 4)).astype("int64")
    assert torch.equal(torch.from_numpy(read), codes)


@pytest.mark.slow
class TestQDQ(testing.ExporterExam):
    format = "onnx-qdq"
