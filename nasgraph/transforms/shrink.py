"""Layers made smaller together: which entries of which parameter belong to one channel, and keeping some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nasgraph.errors import SpaceError
from nasgraph.transforms.layers import CONVOLUTIONS, is_message_passing

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.RMSNorm)
VECTORS = ("bias", "running_mean", "running_var")  # one entry for each output
STATISTIC = "input_mean_square"  # one entry for each input: what low_rank.record_inputs has seen


@dataclass(frozen=True)
class Cut:
    """One end of a layer that follows a group.

    Args:
        module: the layer's full name.
        end: ``"out"``, ``"in"``, or ``"both"`` for a layer that treats each channel alone (norms, depthwise).
        inner, outer: channel i has the entries ``(o * size + i) * inner + j`` for all ``o < outer``, ``j < inner``:
            a pixel each after flattening, a head's width, queries, keys and values in one matrix.
    """

    module: str
    end: str
    inner: int = 1
    outer: int = 1

    def entries(self, channels: Tensor, size: int) -> Tensor:
        """Their places on the layer's axis, ascending for ascending ``channels`` int64 of ``size``."""
        outer = torch.arange(self.outer).view(-1, 1, 1) * size
        places = (outer + channels.view(1, -1, 1)) * self.inner + torch.arange(self.inner)
        return places.flatten()


@dataclass(frozen=True)
class Group:
    """Layers that must be cut together: one set of channels, or heads, that goes through all of them.

    Args:
        size: how many channels there are.
        cuts: the layers, and which end of each.
        exact: the smaller model equals the full one whose readers see zeros for what was removed. Not so past a
            LayerNorm, which then takes its mean over fewer channels.
        counts: (module, attribute, factor) of numbers that modules keep of the size: how many heads there are.
    """

    size: int
    cuts: tuple[Cut, ...]
    exact: bool = True
    counts: tuple[tuple[str, str, int], ...] = ()

    def importance(self, model: nn.Module, how: str = "magnitude", seed: int = 0) -> Tensor:
        """A score of each channel, float64 ``(size,)``; larger is more important.

        Args:
            how: ``"magnitude"``: L2 norm of all its weights in linear layers, convolutions and embeddings, those that
                read it among them. ``"taylor"``: ``|sum of w dL/dw|`` over the same weights, from their ``grad``
                (Molchanov et al., CVPR 2019). ``"random"``: by ``seed``. ``"first"``: the first channel is the most
                important.

        Raises: ValueError: another ``how``, or no gradient for taylor.
        """
        if how == "first":
            return torch.arange(self.size, 0, -1, dtype=torch.float64)
        if how == "random":
            return torch.rand(self.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        if how not in ("magnitude", "taylor"):
            raise ValueError(f"importance '{how}': give magnitude, taylor, random or first")
        scores = torch.zeros(self.size, dtype=torch.float64)
        for cut in self.cuts:
            layer = model.get_submodule(cut.module)
            if isinstance(layer, (*NORMS, nn.PReLU)) or is_message_passing(layer):
                continue
            weight: Tensor = layer.weight  # type: ignore[assignment]
            if how == "taylor" and weight.grad is None:
                raise ValueError(f"'{cut.module}' has no gradient: call backward() on a loss first")
            values = weight.detach().square() if how == "magnitude" else weight.detach() * weight.grad  # type: ignore[operator]
            by_entry = values.movedim(_axis(layer, cut.end), 0).flatten(1).sum(dim=1, dtype=torch.float64).cpu()
            scores += by_entry.view(cut.outer, self.size, cut.inner).sum(dim=(0, 2))
        return scores.sqrt() if how == "magnitude" else scores.abs()

    def best(self, importance: Tensor, count: int) -> Tensor:
        """The ``count`` most important channels in ascending order, of equals the first; int64 ``(count,)``."""
        return importance.argsort(descending=True, stable=True)[:count].sort().values

    def keep(self, model: nn.Module, channels: Sequence[int] | Tensor) -> None:
        """Shrink the group's layers in ``model``, in place, to ``channels``, given in ascending order.

        Weights, biases, the buffers of BatchNorm and the sizes that layers know become smaller; parameters become new
        ones. Each layer tells by ``kept_entries`` which entries of its full parameters it still has: by the parameter's
        name, for each axis their places, or None for all.

        Raises: ValueError: channels that are not in ascending order, or not below ``size``.
        """
        chosen = torch.as_tensor(channels, dtype=torch.int64)
        ordered = bool((chosen[1:] > chosen[:-1]).all())
        if len(chosen) == 0 or not ordered or int(chosen[0]) < 0 or int(chosen[-1]) >= self.size:
            raise ValueError(f"channels must ascend from 0 to at most {self.size - 1}, one at least")
        for cut in self.cuts:
            layer = model.get_submodule(cut.module)
            deep = not is_message_passing(layer)  # its linear layers are cut too
            own = {name for name, _ in [*layer.named_parameters(recurse=deep), *layer.named_buffers(recurse=deep)]}
            extra = sorted(own - {"weight", "num_batches_tracked", STATISTIC, *VECTORS})
            if extra:
                raise SpaceError(f"'{cut.module}' also has '{extra[0]}', which cannot follow: shrink it before")
            _shrink(layer, cut, cut.entries(chosen, self.size))
        for name, attribute, factor in self.counts:
            setattr(model.get_submodule(name), attribute, factor * len(chosen))


def full_size(layer: nn.Module, name: str, axis: int) -> int:
    """How long ``axis`` of the layer's parameter ``name`` was before anything was cut."""
    full: dict[str, tuple[int, ...]] = getattr(layer, "full_shapes", {})
    return full.get(name, tuple(layer.get_parameter(name).shape))[axis]


def _axis(layer: nn.Module, end: str) -> int:
    """The axis of ``weight`` that ``end`` of the layer is."""
    if isinstance(layer, nn.Embedding):
        return 1
    return 1 if end == "in" else 0


def _shrink(layer: nn.Module, cut: Cut, entries: Tensor) -> None:
    tensors = {"weight": _axis(layer, cut.end)} | ({} if cut.end == "in" else dict.fromkeys(VECTORS, 0))
    tensors |= {} if cut.end == "out" else {STATISTIC: 0}
    for name, axis in tensors.items():
        old = getattr(layer, name, None)
        if not isinstance(old, Tensor):
            continue
        new = old.detach().index_select(axis, entries.to(old.device))
        if isinstance(old, nn.Parameter):
            _remember(layer, name, axis, entries, tuple(old.shape))
            setattr(layer, name, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            setattr(layer, name, new)
    _resize(layer, cut.end, len(entries))


def _remember(layer: nn.Module, name: str, axis: int, entries: Tensor, shape: tuple[int, ...]) -> None:
    known: dict[str, tuple[Tensor | None, ...]] = layer.__dict__.setdefault("kept_entries", {})
    layer.__dict__.setdefault("full_shapes", {}).setdefault(name, shape)
    axes = list(known.get(name, (None,) * len(shape)))
    before = axes[axis]
    axes[axis] = entries if before is None else before[entries]
    known[name] = tuple(axes)


def _resize(layer: nn.Module, end: str, size: int) -> None:
    """The numbers by which a layer knows its own size."""
    names: tuple[str, ...]
    if isinstance(layer, nn.Linear):
        names = ("out_features",) if end == "out" else ("in_features",)
    elif isinstance(layer, CONVOLUTIONS):
        names = {"out": ("out_channels",), "in": ("in_channels",), "both": ("in_channels", "out_channels", "groups")}[
            end
        ]
    elif isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        layer.normalized_shape = (size,)
        return
    elif end == "in":
        names = ("in_channels",)
    else:
        known = ("num_features", "embedding_dim", "num_parameters", "out_channels")
        names = tuple(name for name in known if hasattr(layer, name))
    for name in names:
        setattr(layer, name, size)
