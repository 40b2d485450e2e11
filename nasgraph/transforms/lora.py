"""Low-rank adapters beside frozen or trained layers; the rank, 0 included, is what is searched."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nasgraph.errors import SpaceError
from nasgraph.transforms.adapters import (
    Adapter,
    LoraConv,
    LoraEmbedding,
    LoraLinear,
    MeloraLinear,
    MoraLinear,
    VeraLinear,
)
from nasgraph.transforms.base import Transform, each_option
from nasgraph.transforms.layers import CONVOLUTIONS, extended, plain, rewritten_layers
from nasgraph.transforms.low_rank import full_rank

NAME = "lora"  # in ``layer.beside``
SCALES: dict[str, Callable[[float, int, int], float]] = {  # of (alpha, r, r_max)
    "alpha/r_max": lambda alpha, r, r_max: alpha / r_max,
    "alpha/r": lambda alpha, r, r_max: alpha / r,
    "alpha/sqrt(r)": lambda alpha, r, r_max: alpha / math.sqrt(r),
}
ADAPTERS: dict[str, Callable[..., Adapter]] = {
    "plain": LoraLinear,
    "vera": VeraLinear,
    "mora": MoraLinear,
    "melora": MeloraLinear,
}


@dataclass(frozen=True)
class Lora(Transform):
    """An adapter beside each layer at ``where``. It adds exactly 0 until it is trained.

    The layer's own parameters stay as they are: ``SearchSpace.from_module`` freezes them, in a declared space they
    learn. In a supernet a lower rank is a prefix of a higher one.

    Args:
        rank: numbers spent, in units of a LoRA of rank 1, ``in + out`` (VeRA: rows of its frozen matrix). 0: none.
            Over a model, of ``plain`` at most the smaller side of the layer's matrix: more changes nothing more.
        alpha: strength of ``plain`` and ``melora``; ``vera`` and ``mora`` have none.
        scale: what their output is multiplied by. ``alpha/r_max`` is constant (LoNAS), ``alpha/r`` is that of LoRA and
            DyLoRA, ``alpha/sqrt(r)`` keeps the update's size when ranks vary (rsLoRA, Kalajdzievski 2023).
        r_max: for ``alpha/r_max``; default: the largest option of ``rank``.
        kind: ``plain``, ``vera``, ``mora``, ``melora``: see :mod:`nasgraph.transforms.adapters`. All but ``plain`` are
            for linear layers.
        dropout: of the adapter's input, in training.
        blocks: of ``melora``.

    Raises: SpaceError: a value out of range.
    """

    rank: Any = 8
    alpha: Any = 16.0
    scale: Any = "alpha/sqrt(r)"
    r_max: Any = None
    kind: Any = "plain"
    dropout: Any = 0.0
    blocks: Any = 4

    order: ClassVar[int] = 3
    amounts: ClassVar[Mapping[str, float]] = {"rank": 0}
    freezes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check("rank", lambda rank: _whole(rank, 0), "give a whole number, 0 for no adapter")
        self.check("alpha", lambda alpha: _number(alpha) and alpha > 0, "give a number above 0")
        self.check("scale", lambda scale: scale in SCALES, f"give one of {', '.join(SCALES)}")
        self.check("kind", lambda kind: kind in ADAPTERS, f"give one of {', '.join(ADAPTERS)}")
        self.check("dropout", lambda p: _number(p) and 0 <= p < 1, "give a share from 0 to below 1")
        self.check("blocks", lambda blocks: _whole(blocks, 1), "give a whole number of at least 1")
        ranks = [rank for rank in each_option(self.rank)]
        if "alpha/r_max" in each_option(self.scale):
            if self.r_max is None and ranks:
                object.__setattr__(self, "r_max", max(ranks))  # fixed here, so that each architecture knows it
            least = max(ranks, default=1)
            self.check("r_max", lambda r: _whole(r, least), "give a whole number, at least the largest rank")
        if set(each_option(self.kind)) != {"plain"}:
            object.__setattr__(self, "kinds", (nn.Linear,))

    def neutral(self) -> bool:
        """Rank 0."""
        return bool(self.rank == 0)

    @property
    def apart_by_size(self) -> str:
        """See :class:`Transform`: the side of ``mora``'s matrix depends on both sizes of the layer."""
        adds = set(each_option(self.rank)) != {0} and "mora" in each_option(self.kind)
        return "kind mora has another matrix for each size: take another kind" if adds else ""

    def canonical(self) -> Lora:
        """See :class:`Transform`. One strength has several spellings; for one rank it gets one."""
        every = ("alpha", "scale", "r_max", "kind", "dropout", "blocks")
        if self.neutral():
            unused: tuple[str, ...] = every
        elif self.kind == "melora":
            unused = ()
        else:
            unused = ("blocks",) if self.kind == "plain" else ("alpha", "scale", "r_max", "blocks")
        found: Lora = self.with_defaults(unused)
        return found if "alpha" in unused else replace(found, **self._strength(), dropout=float(self.dropout))

    def _strength(self) -> dict[str, Any]:
        """``alpha``, ``scale`` and ``r_max`` that give exactly the factor of the present ones."""
        root = math.isqrt(self.rank)
        scale, size = ("alpha/sqrt(r)", root) if root * root == self.rank else ("alpha/r", self.rank)
        factor = SCALES[self.scale](self.alpha, self.rank, self.r_max)
        as_given = {"alpha": float(self.alpha), "scale": self.scale}
        if (self.scale == "alpha/sqrt(r)" and scale == "alpha/r") or factor * size / size != factor:
            return as_given if self.scale == "alpha/r_max" else {**as_given, "r_max": None}
        return {"alpha": factor * size, "scale": scale, "r_max": None}

    def tied(self, model: nn.Module, inputs: Sequence[Tensor] | None) -> frozenset[str]:
        """See :class:`Transform`: nothing is tied. Raises: SpaceError: a rank of ``plain`` that no change can have."""
        if "plain" in each_option(self.kind):
            most = max(each_option(self.rank), default=0)
            module = model.get_submodule(self.where)
            for layer in replace(self, where="*").targets(module):
                if most > (full := full_rank(layer)):
                    rows, *columns = layer.weight.shape  # type: ignore[misc]
                    name = next(name for name, each in model.named_modules() if each is layer)
                    raise SpaceError(
                        f"Lora: rank {most} beside '{name}', whose matrix is {rows} x {math.prod(columns)}: "
                        f"give at most {full}, or leave the layer out by `where`"
                    )
        return frozenset()

    def rewrite(self, layer: nn.Module) -> nn.Module:
        """``layer`` with an adapter beside it, in place.

        Raises: SpaceError: it has one, or a form that this kind of adapter does not fit.
        """
        adapter = self.adapter(layer)
        found = extended(layer)
        if NAME in found.beside:
            raise SpaceError(f"Lora: a layer at '{self.where}' has an adapter already: let one pattern name each layer")
        found.beside[NAME] = adapter
        return found

    def adapter(self, layer: nn.Module) -> Adapter:
        """The adapter for ``layer``, which is not changed. Raises: SpaceError: see :meth:`rewrite`."""
        scale = SCALES[self.scale](self.alpha, self.rank, self.r_max)
        if isinstance(layer, CONVOLUTIONS):
            if layer.groups != 1 or layer.padding_mode != "zeros":
                form = f"groups={layer.groups}, padding_mode={layer.padding_mode!r}"
                needs = "it needs 1 group and zeros, so let the pattern not fit it"
                raise SpaceError(f"Lora: '{self.where}' names a convolution with {form}: {needs}")
            return LoraConv(layer, self.rank, scale, self.dropout)
        if isinstance(layer, nn.Embedding):
            return LoraEmbedding(layer, self.rank, scale)
        assert isinstance(layer, nn.Linear)
        if self.kind != "melora":
            return ADAPTERS[self.kind](layer, self.rank, scale, self.dropout)
        try:
            return MeloraLinear(layer, self.rank, scale, self.dropout, self.blocks)
        except ValueError as error:
            raise SpaceError(f"Lora: '{self.where}' names a layer that cannot have a melora adapter: {error}") from None


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Each adapter of ``model``, by the name of the layer that it stands beside."""
    found = {name: layer.beside[NAME] for name, layer in rewritten_layers(model).items() if NAME in layer.beside}
    return {name: adapter for name, adapter in found.items() if isinstance(adapter, Adapter)}


def merge(model: nn.Module) -> nn.Module:
    """Add every adapter to its layer's weight, in place, and take it away. The same function, up to rounding.

    Raises: ValueError: a layer's weight or input is masked or quantised, so an addition would be lost; names it.
    """
    for name in adapters(model):
        layer = rewritten_layers(model)[name]
        if len(layer.on_weight) or len(layer.on_input):
            raise ValueError(f"the adapter beside '{name}' cannot be merged: the layer is masked or quantised")
        adapter = layer.beside[NAME]
        assert isinstance(adapter, Adapter)
        with torch.no_grad():
            layer.weight.add_(adapter.delta())
        del layer.beside[NAME]
        plain(layer)
    return model


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
