"""ONNX with integer weights: each quantised weight as its codes and a ``DequantizeLinear`` that gives it back.

``torch.onnx`` would fold the rounding into float constants, so the float model is exported as it is for use
(:func:`nasgraph.transforms.deploy.deploy`) and then its weights are exchanged by their names.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from nasgraph.errors import ExportError
from nasgraph.export import onnx as plain_onnx
from nasgraph.export.base import Outgoing, Written
from nasgraph.export.packed import pack, plural
from nasgraph.transforms.deploy import Deployed, StoredWeight, deploy
from nasgraph.transforms.layers import swapped
from nasgraph.transforms.quantizers import ActivationQuantizer

FILE = "model_qdq.onnx"
WIDTHS = (2, 4, 8, 16)  # of ONNX's signed integers
OPSETS = {2: 25, 4: 21, 8: 21, 16: 21}  # from which DequantizeLinear reads them; from 21 on by blocks
IR_VERSIONS = {21: 10, 25: 13}  # onnx may write a newer one than onnxruntime reads
TOLERANCE = 1e-5
ACTIVATION_TOLERANCE = 0.05

# Products of quantised weights in floats; by default onnxruntime rounds their other factor to 8 bits (an error of 1%).
FLOATS = 'options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")'
# With quantised activations, products of floats too; its integer kernels round biases to integers.
NO_INTEGERS = 'options.add_session_config_entry("session.disable_quant_qdq", "1")'


def export(outgoing: Outgoing, folder: Path) -> Written:
    """Write ``model_qdq.onnx``. Codes of 2, 4, 8 and 16 bits are stored at their width, others at the next larger.

    A scale for each tensor, channel or group of a channel, as the layer has it. Activations of a fixed range
    (:func:`nasgraph.transforms.ranges.freeze_ranges`) become ``QuantizeLinear`` and ``DequantizeLinear``, the others
    stay the arithmetic that they are. Masks are zeros among the codes.

    Must equal the model to 1e-5. With quantised activations to 0.05: a number at the border of two codes may go to the
    other one by the order in which a sum is added up, and moves the output by a step.

    Raises: what ``torch.onnx`` raises for operations that ONNX does not have; ExportError: more than a file can hold.
    """
    deployed = deploy(outgoing.model)
    widths = {name: width(weight) for name, weight in deployed.weights.items() if weight.codes is not None}
    opset = max((OPSETS[bits] for bits in widths.values()), default=OPSETS[8])
    rounded = [part for part in deployed.model.modules() if isinstance(part, ActivationQuantizer)]
    model = with_fixed_activations(deployed.model)
    assert isinstance(model, fx.GraphModule)
    proto = plain_onnx.made(replace(outgoing, model=model), opset_version=opset, optimize=False).model_proto
    proto.ir_version = IR_VERSIONS[opset]
    exchanged = exchange(proto.graph, deployed, widths)
    try:
        data = proto.SerializeToString()
    except Exception as error:  # protobuf has several
        raise ExportError(f"ONNX holds 2 GB in one file, and external weights are not written here: {error}") from None
    (folder / FILE).write_bytes(data)
    options = f"    {FLOATS}\n" + (f"    {NO_INTEGERS}\n" if rounded else "")
    reload = plain_onnx.RELOAD.replace("    session =", f"{options}    session =")
    reload = reload.replace("INPUTS", repr(list(outgoing.names)))
    tolerance = ACTIVATION_TOLERANCE if rounded else TOLERANCE
    return Written(folder / FILE, reload, tolerance, detail=_detail(deployed, widths, exchanged, rounded))


def width(weight: StoredWeight) -> int:
    """Bits of the ONNX integers that hold the codes of ``weight``.

    Nested codes, which stand for ``(c + 1/2) * scale``, are stored as ``2 c + 1`` with half the scale: a bit more.
    Binary codes are -1 and 1, of 2 bits.
    """
    needed = max(weight.bits, 2) + (1 if weight.offset else 0)
    return next(bits for bits in WIDTHS if bits >= needed)


def exchange(graph: Any, deployed: Deployed, widths: dict[str, int]) -> list[str]:
    """In ``graph``, put codes, scale and ``DequantizeLinear`` in place of each weight. ``widths``: bits by layer.

    A matrix that is only read transposed is stored transposed.

    Returns: the layers whose weight is in the graph under its name.
    """
    from onnx import helper

    floats = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[Any] = []
    there = [layer for layer in widths if f"{layer}.weight" in floats]
    for layer in there:
        name, bits = f"{layer}.weight", widths[layer]
        graph.initializer.remove(floats[name])
        codes, scale, axis, block = axes(deployed.weights[layer])
        shape = tuple(deployed.model.get_parameter(name).shape)
        flat = codes.shape != shape
        readers = [node for node in graph.node if name in node.input]
        turned = len(shape) == 2 and len(readers) > 0 and all(node.op_type == "Transpose" for node in readers)
        if turned:  # stored as the product reads it, which onnxruntime can do in one operator
            codes, axis = codes.T.contiguous(), 1 - axis
            scale = scale.T.contiguous() if block else scale
        graph.initializer.append(tensor_of_codes(f"{name}.codes", codes, bits))
        graph.initializer.append(helper.make_tensor(f"{name}.scale", 1, scale.shape, scale.numpy().tobytes(), raw=True))
        made = f"{name}.flat" if flat else name
        settings: dict[str, int] = {"axis": axis} | ({"block_size": block} if block else {})
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}.codes", f"{name}.scale"], [made], **settings))
        if flat:
            graph.initializer.append(helper.make_tensor(f"{name}.shape", 7, [len(shape)], shape))
            nodes.append(helper.make_node("Reshape", [made, f"{name}.shape"], [name]))
        for node in readers if turned else ():
            replace_input(graph, node.output[0], name)
            graph.node.remove(node)
    for node in graph.node:
        node.ClearField("metadata_props")  # what torch had there: names of its own, most of a small file
    for node in reversed(nodes):
        graph.node.insert(0, node)
    return there


def replace_input(graph: Any, old: str, new: str) -> None:
    """Whatever reads ``old`` reads ``new``."""
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new


def axes(weight: StoredWeight) -> tuple[Tensor, Tensor, int, int]:
    """Codes, scale, axis and block size as ``DequantizeLinear`` takes them; block size 0: one scale along the axis.

    Groups of a channel are blocks of a matrix ``(out, the rest)``.
    """
    assert weight.codes is not None and weight.scale is not None
    codes, scale = weight.codes, weight.scale
    if weight.offset:
        codes, scale = 2 * codes + round(2 * weight.offset), scale / 2
    if scale.numel() == 1:
        return codes, scale.reshape(()), 0, 0
    if scale.shape[1] == 1:
        return codes, scale.flatten(), 0, 0
    return codes.flatten(1), scale, 1, weight.group


def tensor_of_codes(name: str, codes: Tensor, bits: int) -> Any:
    """Signed integers of ``bits`` bits, two's complement, packed lowest bits first."""
    from onnx import TensorProto, helper

    kind = getattr(TensorProto, f"INT{bits}", None)
    if kind is None:
        raise ExportError(f"the installed onnx has no {bits}-bit integers: update onnx to 1.20 or later")
    if bits == 16:
        raw = codes.to(torch.int16).numpy().tobytes()
    else:
        raw = pack(codes.flatten() % 2**bits, bits).numpy().tobytes()
    return helper.make_tensor(name, kind, codes.shape, raw, raw=True)


class QuantizeDequantize(nn.Module):
    """A quantiser of activations with a fixed range as ONNX's own pair of operators; can only be exported."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        low, high, scale = (number.detach() for number in quantizer.grid(torch.zeros(1)))
        self.lowest, self.highest, self.signed = float(low * scale), float(high * scale), bool(low < 0)
        self.clip = quantizer.bits != 8  # codes are of 8 bits
        self.scale = nn.Buffer(scale.reshape(()))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` rounded to the scale, clipped to the codes."""
        if self.clip:
            x = x.clamp(self.lowest, self.highest)
        kind = torch.int8 if self.signed else torch.uint8
        zero = torch.zeros((), dtype=kind)
        symbolic = torch.onnx.ops.symbolic
        codes = symbolic("QuantizeLinear", [x, self.scale, zero], dtype=kind, shape=x.shape)
        return symbolic("DequantizeLinear", [codes, self.scale, zero], dtype=x.dtype, shape=x.shape)


def with_fixed_activations(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with :class:`QuantizeDequantize` where the range of activations is fixed."""
    model = copy.deepcopy(model)
    for part in list(model.modules()):
        if isinstance(part, ActivationQuantizer) and "lowest" in part._buffers and part.bits <= 8:
            model = swapped(model, part, QuantizeDequantize(part))
    return model


def _detail(deployed: Deployed, widths: dict[str, int], exchanged: Sequence[str], rounded: Sequence[nn.Module]) -> str:
    counts: dict[str, int] = {}
    for name in exchanged:
        weight, bits = deployed.weights[name], widths[name]
        nested = "nested " if weight.offset else ""
        held = "" if bits == weight.bits and not nested else f"{nested}{plural(weight.bits, 'bit')} stored as "
        counts[f"{held}int{bits}"] = counts.get(f"{held}int{bits}", 0) + 1
    parts = [f"{how}: {plural(count, 'weight')}" for how, count in sorted(counts.items())]
    if len(exchanged) < len(widths):
        parts.append(f"{plural(len(widths) - len(exchanged), 'weight')} not read, or under another name and as floats")
    if any(weight.kept is not None for weight in deployed.weights.values()):
        parts.append("masks stored as zeros")
    if rounded:
        parts.append(
            "checked with onnxruntime's session.disable_quant_qdq=1; activations are rounded, so a sum in another "
            "order, or a bias that its integer kernels round, may move an output by a step"
        )
    return "; ".join(parts) or "no weight is quantised"
