"""A PEFT adapter folder: ``PeftModel.from_pretrained(model, "peft")`` puts the adapters on the user's own model."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nasgraph.declare import ways
from nasgraph.errors import ExportError
from nasgraph.export.base import Outgoing, Written
from nasgraph.model_space import NODE, ModelSpace
from nasgraph.space import Op, SearchSpace
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
    for name in MODULES:
        above, _, last = name.rpartition(".")
        layer = Parts()
        if name in ADAPTED:
            kind, sizes = ADAPTED[name]
            layer = getattr(nn, kind)(*sizes, **({} if kind == "Embedding" else {"bias": False}))
            nn.init.zeros_(layer.weight)
        root.get_submodule(above).add_module(last, layer)
    for name, (shape, dtype) in SAVED.items():
        above, _, last = name.rpartition(".")
        root.get_submodule(above).register_buffer(last, torch.zeros(shape, dtype=getattr(torch, dtype)))
    merged = PeftModel.from_pretrained(root, str(Path(path).parent)).merge_and_unload()
    return {name.replace(".", "/"): tensor for name, tensor in merged.state_dict().items()}
"""


def export(outgoing: Outgoing, folder: Path) -> Written:
    """Write ``peft/adapter_config.json`` and ``peft/adapter_model.safetensors``.

    Ranks differ, so each adapter has its entry in ``rank_pattern``, and in ``alpha_pattern`` ``scale * rank``: PEFT
    divides by the rank again. Layers of rank 0 are left out. Modules of the model that were trained are in
    ``modules_to_save``. Names are those in the model that the space was put over, matched from end to end, but for
    ``modules_to_save``: PEFT takes every module whose name ends so, and each of them is saved.

    The check is PEFT's own loading, in another process: what it adds to each weight, within 1e-6.

    Raises: ExportError: the space is not over a model of the user's, nothing was adapted, or what PEFT cannot hold.
        A buffer of the model that training changed is among that: the user's own model does not have it.
    """
    from safetensors.torch import save_file

    if importlib.util.find_spec("peft") is None:
        raise ExportError("the format peft is checked with the package peft: pip install 'nasgraph[peft]'")
    found, trained = _adapters(outgoing), _trained(_space(outgoing.space))
    saved = _saved(outgoing, found, trained)
    _check_buffers(outgoing, saved)
    config = _config(found, trained)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in (_tensors(found) | saved).items()}
    place = folder / FOLDER
    place.mkdir()
    save_file({name: t.detach().clone().contiguous() for name, t in tensors.items()}, place / WEIGHTS, {"format": "pt"})
    (place / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    expected = _Tensors({f"{name}.weight": adapter.delta() for name, adapter in found.items()} | saved)
    skeleton = {
        "MODULES": [name for name in _names(outgoing) if name],
        "ADAPTED": {name: _layer(adapter) for name, adapter in found.items()},
        "SAVED": {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in saved.items()},
    }
    reload = "".join(f"{name} = {value!r}\n" for name, value in skeleton.items()) + RELOAD
    count = f"{len(found)} adapter{'' if len(found) == 1 else 's'}"
    detail = f"{count} for {type(_space(outgoing.space).base.model).__name__}, which is not in the folder"
    return Written(place / WEIGHTS, reload, 1e-6, beside=(CONFIG,), detail=detail, expected=expected)


def check(space: SearchSpace) -> None:
    """Raises: ExportError: no network of ``space`` can leave as adapters for PEFT."""
    op: Any = _space(space)._ops[NODE]
    rules: list[Op] = op.kwargs["transforms"]
    added = [each for each in rules if each.make is Lora]
    others = [each for each in rules if each.make is not Lora and not _may(each, lambda made: bool(made.neutral()))]
    if others:
        raise ExportError(f"the model is always changed by {others[0].label} too, and PEFT holds adapters only")
    if not any(_may(each, lambda made: not made.neutral()) for each in added):
        raise ExportError("no rule gives a layer an adapter (Lora)")
    if not any(_may(each, _is_plain) for each in added):
        raise ExportError("no adapter is of kind='plain', and PEFT holds no other as it is here")


export.check = check  # type: ignore[attr-defined]  # export.fits asks it before a search


def _may(rule: Op, holds: Callable[[Any], bool]) -> bool:
    """Whether ``holds`` is true of the transform with some of its options."""
    return any(holds(each.make(**each.kwargs)) for _, each in ways(rule, {}))


def _is_plain(made: Lora) -> bool:
    return made.kind == "plain" and not made.neutral()


def _space(space: SearchSpace) -> ModelSpace:
    if not isinstance(space, ModelSpace):
        raise ExportError(
            "adapters go onto a model of yours, and the space is not put over one (SearchSpace.from_module): take the "
            "formats code or safetensors"
        )
    return space


def _adapters(outgoing: Outgoing) -> dict[str, Adapter]:
    """By the names of their layers in the user's model."""
    space = _space(outgoing.space)
    transforms = space.resolve(outgoing.architecture).steps[0].op.kwargs["transforms"]
    others = sorted({each.make.__name__ for each in active(transforms) if each.make is not Lora})
    if others:
        raise ExportError(f"the model is also changed by {', '.join(others)}, and PEFT holds adapters only")
    prefix = _prefix(space)
    found = {name.removeprefix(prefix): adapter for name, adapter in adapters(outgoing.model).items()}
    if not found:
        raise ExportError("no layer has an adapter, every rank is 0: the model is the one that you have")
    for name, adapter in found.items():
        if not isinstance(adapter, PLAIN):
            raise ExportError(f"the adapter of '{name}' is a {type(adapter).__name__}: only kind='plain' fits")
        if isinstance(adapter, LoraConv) and any(step != 1 for step in adapter.dilation):
            raise ExportError(f"the convolution '{name}' is dilated, and PEFT's adapters are not")
    return found


def _trained(space: ModelSpace) -> list[str]:
    """Modules of the user's model that were trained, none inside another."""
    base = space.base
    trained: dict[str, None] = {}
    for name, _ in base.model.named_parameters():
        if name not in base.frozen:
            module = name.rpartition(".")[0]
            if not module:
                raise ExportError(f"the parameter '{name}' was trained, and PEFT saves whole modules only")
            trained[module] = None
    return [name for name in trained if not any(name.startswith(f"{other}.") for other in trained)]


def _names(outgoing: Outgoing) -> list[str]:
    return [name for name, _ in _space(outgoing.space).base.model.named_modules(remove_duplicate=False)]


def _saved(outgoing: Outgoing, found: dict[str, Adapter], trained: list[str]) -> dict[str, Tensor]:
    """What PEFT loads for ``modules_to_save``: the state of each module whose name ends as one that was trained."""
    prefix = _prefix(_space(outgoing.space))
    meant = {name: other for name in _names(outgoing) for other in trained if name.endswith(other)}
    saved: dict[str, Tensor] = {}
    for name, other in meant.items():
        what = f"'{name}' is trained itself" if name in trained else f"'{name}' ends as '{other}', which is trained,"
        for inside in (each for each in found if f"{each}.".startswith(f"{name}.")):
            where = "has an adapter" if inside == name else f"there is an adapter in it, on '{inside}'"
            raise ExportError(f"{what} and {where}; PEFT does only one of these: {_way_out(name, trained)}")
        for outer in (each for each in meant if name.startswith(f"{each}.")):
            raise ExportError(f"{what} and is inside '{outer}', which PEFT saves too: rename one of them")
        state = outgoing.model.get_submodule(prefix + name).state_dict()
        saved |= {f"{name}.{entry}": tensor for entry, tensor in state.items()}
    return saved


def _way_out(name: str, trained: list[str]) -> str:
    return "leave one out" if name in trained else "rename one of them in your model"


def _check_buffers(outgoing: Outgoing, saved: dict[str, Tensor]) -> None:
    """The user's model has the buffers of this one, but for what is saved."""
    space = _space(outgoing.space)
    own = {name: buffer.cpu() for name, buffer in space.base.model.named_buffers() if buffer.is_floating_point()}
    for name, buffer in own.items():
        if name not in saved and not torch.equal(outgoing.model.get_buffer(_prefix(space) + name), buffer):
            layer, _, last = name.rpartition(".")
            raise ExportError(
                f"'{last}' of the layer '{layer}' is not that of your model, and PEFT holds adapters only: name "
                "the layer in from_module(train=[...]), or take the format safetensors"
            )


def _prefix(space: ModelSpace) -> str:
    return f"{NODE}." if space.base.output is None else f"{NODE}.model."


def _config(found: dict[str, Adapter], trained: list[str]) -> dict[str, Any]:
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
        "modules_to_save": trained or None,
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
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "/"), tensor.detach().clone().contiguous())
