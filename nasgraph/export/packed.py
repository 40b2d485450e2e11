"""Weights at the bits they were quantised to, one code right after the other, and the code that unpacks them.

What is not quantised lies in the file as it is. A pruned weight is written as a bitmap of what the mask kept and the
kept entries alone, where that is smaller.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import nasgraph
from nasgraph.build import Made
from nasgraph.errors import ExportError
from nasgraph.export import code, placed
from nasgraph.export.base import Outgoing, Written
from nasgraph.export.weights import shared_tensors
from nasgraph.transforms.deploy import Deployed, StoredWeight, deploy

FILE = "packed.safetensors"
CODE = "packed_model.py"
# The result names the file of the weights; what loads it is the code beside it.
RELOAD = code.RELOAD.replace("(path):\n", f"(path):\n    path = path[: -len({FILE!r})] + {CODE!r}\n", 1)
USAGE_WEIGHTS = f'''from packed_model import unpacked  # with this folder on sys.path

weights = unpacked("{FILE}")'''
RELOAD_WEIGHTS = RELOAD.replace("module.load()", f"module.unpacked(path[: -len({CODE!r})] + {FILE!r})")


def export(outgoing: Outgoing, folder: Path) -> Written:
    """Write ``packed.safetensors``, and ``packed_model.py`` whose ``load()`` unpacks it: bit for bit the live model.

    For a quantised weight ``conv.weight`` the file holds ``conv.weight.codes`` (uint8, see :func:`pack`) and
    ``conv.weight.scale`` (float32, ``(rows, groups)``); for one of which a bitmap is smaller ``conv.weight.kept``
    (uint8, a bit for each entry). The header's entry ``nasgraph`` is JSON: as that of ``model.safetensors``, and
    ``packed``: for each such weight its ``shape``, ``bits``, ``group`` (how many neighbours of a row share a scale) and
    ``offset`` (added to every code).

    Where no code can make the model (one that a space was put over without ``make``), the file beside has only
    ``unpacked()``, which gives the state of ``deploy(model).model``.
    """
    from safetensors.torch import save_file

    deployed = deploy(outgoing.model)
    model = deployed.model
    assert isinstance(model, fx.GraphModule)
    model.meta = {**model.meta, "calls": placed.calls(model.meta.get("calls", {}), model)}
    tensors, about = contents(deployed)
    about |= {
        "space": outgoing.space.name,
        "key": outgoing.key,
        "architecture": dict(outgoing.architecture),
        "version": nasgraph.__version__,
    }
    reload, usage, detail, expected = RELOAD, "", _detail(deployed), None
    try:
        text = code.source(replace(outgoing, model=model), FILE, _loading(deployed, model.meta["calls"]), (unpacked,))
    except ExportError as error:
        text = code.functions(f"``unpacked({FILE!r})``: the weights of the model, by their names.", (unpacked,))
        reload, usage, expected = RELOAD_WEIGHTS, USAGE_WEIGHTS, model
        detail = f"{detail}; the weights alone, not the code of the model: {error}"
    save_file(tensors, folder / FILE, metadata={"nasgraph": json.dumps(about, sort_keys=True)})
    code.write_example(outgoing, folder)
    (folder / CODE).write_text(text, encoding="utf-8")
    return Written(folder / FILE, reload, 0.0, (CODE,), detail, expected, usage)


def contents(deployed: Deployed) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the file, and what its header says of them: ``packed`` and ``shared``.

    Raises: ExportError: the model's state holds something that is not a tensor.
    """
    state = deployed.model.state_dict()
    shared = shared_tensors(state)
    tensors: dict[str, Tensor] = {}
    packed = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ExportError(f"the model's state '{name}' is a {type(value).__name__}: safetensors holds tensors only")
        if name in shared:
            continue
        weight = stored_as(deployed, name)
        if weight is None:
            tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
            continue
        bits, sparse = layout(weight)
        entries = (value.detach() if weight.codes is None else weight.codes).flatten()
        if sparse and weight.kept is not None:
            tensors[f"{name}.kept"] = pack(weight.kept.flatten(), 1)
            entries = entries[weight.kept.flatten()]
        packed[name] = {"shape": list(value.shape), "bits": bits}
        if weight.codes is None or weight.scale is None:
            tensors[f"{name}.codes"] = entries.clone()
        else:
            lowest = -1 if bits == 1 else -(2 ** (bits - 1))
            tensors[f"{name}.codes"] = pack((entries - lowest) // (2 if bits == 1 else 1), bits)
            tensors[f"{name}.scale"] = weight.scale.clone()
            packed[name] |= {"group": weight.group, "offset": weight.offset}
    return tensors, {"packed": packed, "shared": shared}


def stored_as(deployed: Deployed, name: str) -> StoredWeight | None:
    """How the tensor ``name`` of the model's state is packed; None: not at all."""
    layer, _, attribute = name.rpartition(".")
    weight = deployed.weights.get(layer) if attribute == "weight" else None
    return weight if weight is not None and (weight.codes is not None or layout(weight)[1]) else None


def layout(weight: StoredWeight) -> tuple[int, bool]:
    """Bits of an entry in the file, and whether only those that the mask kept are there, after a bitmap.

    A binary weight in which a mask left zeros takes 2 bits without a bitmap.
    """
    dense = weight.bits
    if weight.bits == 1 and weight.codes is not None and bool((weight.codes == 0).any()):
        dense = 2
    if weight.kept is None:
        return dense, False
    sparse = stored_bytes(weight, weight.bits, True) < stored_bytes(weight, dense, False)
    return (weight.bits, True) if sparse else (dense, False)


def stored_bytes(weight: StoredWeight, bits: int, sparse: bool) -> int:
    """Bytes of all that the file holds of ``weight`` in this :func:`layout`."""
    whole = weight.kept if weight.codes is None else weight.codes
    assert whole is not None
    entries = int(weight.kept.sum()) if sparse and weight.kept is not None else whole.numel()
    scales = 0 if weight.scale is None else weight.scale.nbytes
    return scales + whole_bytes(entries * bits) + (whole_bytes(whole.numel()) if sparse else 0)


def whole_bytes(bits: int) -> int:
    """Bytes that hold ``bits``."""
    return math.ceil(bits / 8)


def pack(values: Tensor, bits: int) -> Tensor:
    """Whole numbers in ``[0, 2 ** bits)`` one right after the other, lowest bits first; the last byte ends in zeros.

    Bit ``k`` of number ``i`` is bit ``j % 8`` of byte ``j // 8``, ``j = i * bits + k``.

    Shapes: ``(n,)`` -> uint8 ``(ceil(n * bits / 8),)``.
    Raises: ValueError: a number does not fit, or ``bits`` is not 1 to 16.
    """
    values = values.to(torch.int32)
    if not 1 <= bits <= 16:
        raise ValueError(f"{bits} bits: codes have 1 to 16")
    if values.numel() and not (values.min() >= 0 and values.max() < 2**bits):
        raise ValueError(f"{bits} bits hold 0 to {2**bits - 1}, not {int(values.min())} to {int(values.max())}")
    stream = ((values[:, None] >> torch.arange(bits, dtype=torch.int32)) & 1).to(torch.uint8).flatten()
    stream = nn.functional.pad(stream, (0, -len(stream) % 8)).reshape(-1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The ``count`` whole numbers of ``bits`` bits in ``packed``, each lowest bit first. Shapes: uint8 -> int32."""
    stream = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    numbers = stream.flatten()[: count * bits].reshape(count, bits).to(torch.int32)
    return (numbers << torch.arange(bits, dtype=torch.int32)).sum(1, dtype=torch.int32)


def unpacked(file: str | Path) -> dict[str, Tensor]:
    """The weights in ``file``: codes times their scales, zeros where a mask left nothing."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["nasgraph"])
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dict
    for name, how in about["packed"].items():
        codes, scale, kept = (weights.pop(f"{name}.{part}", None) for part in ("codes", "scale", "kept"))
        count = math.prod(how["shape"])
        if kept is not None:
            kept = unpack(kept, 1, count).bool()
        if scale is not None:
            codes = unpack(codes, how["bits"], count if kept is None else int(kept.sum()))
            codes = 2 * codes - 1 if how["bits"] == 1 else codes - 2 ** (how["bits"] - 1)
            codes = codes.to(scale.dtype)
        if kept is not None:
            codes = torch.zeros(count, dtype=codes.dtype).masked_scatter(kept, codes)
        if scale is not None:
            rows = codes.reshape(len(scale), -1)
            codes = (rows + how["offset"]) * scale.repeat_interleave(how["group"], 1)[:, : rows.shape[1]]
        weights[name] = codes.reshape(how["shape"])
    return {**weights, **{name: weights[kept] for name, kept in about["shared"].items()}}


def _loading(deployed: Deployed, made_by: Mapping[str, Made]) -> list[str]:
    """The lines that give a model its weights. Layers made by transforms have steps that the file makes needless."""
    made = [name for name in deployed.weights if "transforms" in made_by[name.partition(".")[0]].kwargs]
    drop = [
        f"for name in {made}:",
        "    model.get_submodule(name).on_weight.clear()  # the file holds what masks and quantisers gave",
    ]
    return [*(drop if made else []), "model.load_state_dict(unpacked(file))"]


def _detail(deployed: Deployed) -> str:
    """``4 bits: 2 weights; 32 bits, a bitmap and what it keeps: 1 weight; the rest as it is``."""
    counts: dict[str, int] = {}
    for weight in deployed.weights.values():
        bits, sparse = layout(weight)
        if sparse or weight.codes is not None:
            how = f"{plural(bits, 'bit')}{', a bitmap and what it keeps' if sparse else ''}"
            counts[how] = counts.get(how, 0) + 1
    packed = [f"{how}: {plural(count, 'weight')}" for how, count in sorted(counts.items())]
    return "; ".join([*packed, "the rest as it is"]) if packed else "no weight is quantised"


def plural(count: int, noun: str) -> str:
    """``1 bit``, ``2 bits``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
