"""A PEFT adapter folder: ``PeftModel.from_pretrained(model, "peft")`` puts the adapters on the user's own model."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nasgraph.errors import ExportError
from nasgraph.export.base import Outgoing, Written
from nasgraph.model_space import NODE, ModelSpace
from nasgraph.transforms.adapters import Adapter, LoraConv, LoraEmbedding, LoraLinear
from nasgraph.transforms.base import active
from nasgraph.transforms.lora import Lora, adapters

FOLDER, CONFIG, WEIGHTS = "peft", "adapter_config.json", "adapter_model.safetensors"
PLAIN = (LoraLinear, LoraConv, LoraEmbedding)

# PEFT puts the adapters on layers of zeros and merges them, so what is left is what they add to each weight.
RELOAD = """
def load(path):
    from pathlib import Path

    import torch
    from peft import PeftModel
    from torch import nn

    class Parts(nn.Module):
        pass

    root = Parts()
    for name, (kind, sizes) in LAYERS.items():
        above = root
        *parents, last = name.split(".")
        for parent in parents:
            if not hasattr(above, parent):
                above.add_module(parent, Parts())
            above = getattr(above, parent)
        if kind is None:
            layer = Parts()
            for own, shape in sizes.items():
                setattr(layer, own, nn.Parameter(torch.zeros(shape)))
        else:
            layer = getattr(nn, kind)(*sizes, **({} if kind == "Embedding" else {"bias": False}))
            nn.init.zeros_(layer.weight)
        above.add_module(last, layer)
    merged = PeftModel.from_pretrained(root, str(Path(path).parent)).merge_and_unload()
    return {name.replace(".", "/"): tensor for name, tensor in merged.state_dict().items()}
"""


def export(outgoing: Outgoing, folder: Path) -> Written:
    """Write ``peft/adapter_config.json`` and ``peft/adapter_model.safetensors``.

    Ranks differ, so each adapter has its entry in ``rank_pattern``, and in ``alpha_pattern`` ``scale * rank``: PEFT
    divides by the rank again. Layers of rank 0 are left out. Modules of the model that were trained are in
    ``modules_to_save``. Names are those in the model that the space was put over, matched from end to end.

    The check is PEFT's own loading, in another process: what it adds to each weight, within 1e-6.

    Raises: ExportError: the space is not over a model of the user's, nothing was adapted, or what PEFT cannot hold.
    """
    from safetensors.torch import save_file

    if importlib.util.find_spec("peft") is None:
        raise ExportError("the format peft is checked with the package peft: pip install 'nasgraph[peft]'")
    found, trained = _adapters(outgoing), _trained(outgoing)
    inside = [name for name in found if any(f"{name}.".startswith(f"{module}.") for module in trained)]
    if inside:
        raise ExportError(f"peft: '{inside[0]}' is trained itself and has an adapter; PEFT does only one of these")
    config = _config(found, trained)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in _tensors(found).items()}
    for module, own in trained.items():
        tensors |= {f"base_model.model.{module}.{name}": tensor for name, tensor in own.items()}
    place = folder / FOLDER
    place.mkdir()
    save_file({name: t.detach().clone().contiguous() for name, t in tensors.items()}, place / WEIGHTS, {"format": "pt"})
    (place / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    layers: dict[str, tuple[str | None, Any]] = {name: _layer(adapter) for name, adapter in found.items()}
    layers |= {module: (None, {name: tuple(t.shape) for name, t in own.items()}) for module, own in trained.items()}
    expected = _Tensors({f"{name}.weight": adapter.delta() for name, adapter in found.items()})
    for module, own in trained.items():
        expected.add({f"{module}.{name}": tensor for name, tensor in own.items()})
    reload = RELOAD.replace("LAYERS", repr(layers))
    detail = f"{len(found)} adapters for {type(_space(outgoing).base.model).__name__}, which is not in the folder"
    return Written(place / WEIGHTS, reload, 1e-6, beside=(CONFIG,), detail=detail, expected=expected)


def _space(outgoing: Outgoing) -> ModelSpace:
    if not isinstance(outgoing.space, ModelSpace):
        raise ExportError(
            f"peft: adapters go onto a model of yours, and space '{outgoing.space.name}' is not put over one "
            "(SearchSpace.from_module): take the formats code or safetensors"
        )
    return outgoing.space


def _adapters(outgoing: Outgoing) -> dict[str, Adapter]:
    """By the names of their layers in the user's model."""
    space = _space(outgoing)
    transforms = space.resolve(outgoing.architecture).steps[0].op.kwargs["transforms"]
    others = sorted({each.make.__name__ for each in active(transforms) if each.make is not Lora})
    if others:
        raise ExportError(f"peft: the model is also changed by {', '.join(others)}, and PEFT holds adapters only")
    prefix = _prefix(space)
    found = {name.removeprefix(prefix): adapter for name, adapter in adapters(outgoing.model).items()}
    if not found:
        raise ExportError("peft: no layer has an adapter, every rank is 0: the model is the one that you have")
    for name, adapter in found.items():
        if not isinstance(adapter, PLAIN):
            raise ExportError(f"peft: the adapter of '{name}' is a {type(adapter).__name__}: only kind='plain' fits")
        if isinstance(adapter, LoraConv) and any(step != 1 for step in adapter.dilation):
            raise ExportError(f"peft: the convolution '{name}' is dilated, and PEFT's adapters are not")
    return found


def _trained(outgoing: Outgoing) -> dict[str, dict[str, Tensor]]:
    """Modules of the user's model that were trained: their parameters."""
    space = _space(outgoing)
    prefix = _prefix(space)
    own: dict[str, dict[str, Tensor]] = {}
    for name, _ in space.base.model.named_parameters():
        if name not in space.base.frozen:
            module, _, last = name.rpartition(".")
            if not module:
                raise ExportError(f"peft: the parameter '{name}' was trained, and PEFT saves whole modules only")
            own.setdefault(module, {})[last] = outgoing.model.get_parameter(prefix + name)
    return own


def _prefix(space: ModelSpace) -> str:
    return f"{NODE}." if space.base.output is None else f"{NODE}.model."


def _config(found: dict[str, Adapter], trained: dict[str, Any]) -> dict[str, Any]:
    first = next(iter(found.values()))
    dropouts = {adapter.dropout for adapter in found.values()}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": float(first.scale) * first.rank,
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "target_modules": "|".join(re.escape(name) for name in found),  # a text is matched from end to end
        "rank_pattern": {_exactly(name): adapter.rank for name, adapter in found.items()},
        "alpha_pattern": {_exactly(name): float(adapter.scale) * adapter.rank for name, adapter in found.items()},
        "modules_to_save": list(trained) or None,
    }


def _exactly(name: str) -> str:
    """A key of PEFT's patterns, which otherwise fit every name that ends so."""
    return f"^{re.escape(name)}"


def _tensors(found: dict[str, Adapter]) -> dict[str, Tensor]:
    """What PEFT calls the numbers of each adapter."""
    tensors: dict[str, Tensor] = {}
    for name, adapter in found.items():
        a: Tensor = adapter.get_parameter("A")
        b: Tensor = adapter.get_parameter("B")
        if isinstance(adapter, LoraEmbedding):
            tensors |= {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
        else:
            b = b.reshape(*b.shape, *[1] * (a.dim() - 2))
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    return tensors


def _layer(adapter: Adapter) -> tuple[str, tuple[Any, ...]]:
    """A layer that the adapter fits, as PEFT needs it to see."""
    a, b = adapter.get_parameter("A"), adapter.get_parameter("B")
    if isinstance(adapter, LoraEmbedding):
        return "Embedding", (a.shape[1], b.shape[0])
    if isinstance(adapter, LoraConv):
        return f"Conv{a.dim() - 2}d", (a.shape[1], b.shape[0], tuple(a.shape[2:]))
    return "Linear", (a.shape[1], b.shape[0])


class _Tensors(nn.Module):
    """Tensors by name, as a state."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.add(tensors)

    def add(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "/"), tensor.detach().clone().contiguous())
