"""Weights as safetensors: a file that cannot run code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

import nasgraph
from nasgraph.errors import ExportError
from nasgraph.export.base import Outgoing, Written

FILE = "model.safetensors"

RELOAD = """
def load(path):
    import json
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}
        shared = json.loads(file.metadata()["nasgraph"])["shared"]
    return {**weights, **{name: weights[kept] for name, kept in shared.items()}}
"""


def export(outgoing: Outgoing, folder: Path) -> Written:
    """Write ``model.safetensors``: parameters and buffers.

    The header's entry ``nasgraph`` is JSON: ``space``, ``key``, ``architecture``, ``version``, and ``shared``: a tensor
    that the model has under two names is written once, this maps the other name to the one written.

    Raises: ExportError: the model's state holds something that is not a tensor.
    """
    from safetensors.torch import save_file

    state = outgoing.model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ExportError(f"the model's state '{name}' is a {type(value).__name__}: safetensors holds tensors only")
    shared = shared_tensors(state)
    about = {
        "space": outgoing.space.name,
        "key": outgoing.key,
        "architecture": dict(outgoing.architecture),
        "version": nasgraph.__version__,
        "shared": shared,
    }
    # One entry: safetensors writes several in an order that differs from run to run.
    metadata = {"nasgraph": json.dumps(about, sort_keys=True)}
    tensors = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in state.items() if n not in shared}
    save_file(tensors, folder / FILE, metadata=metadata)
    return Written(folder / FILE, RELOAD, tolerance=0.0)


def shared_tensors(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names that stand for a tensor written before under another name: ``{"decoder.weight": "encoder.weight"}``."""
    kept: dict[tuple[object, ...], str] = {}
    shared = {}
    for name, tensor in state.items():
        if tensor.numel() == 0:
            continue
        place = (tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if kept.setdefault(place, name) != name:
            shared[name] = kept[place]
    return shared
