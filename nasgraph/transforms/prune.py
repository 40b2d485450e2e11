"""Pruning as a choice: a mask on a layer's weight, computed anew from the weight or from scores whenever it is used.

So a supernet's slice and the network extracted from it have the same mask, and the masks of smaller ratios lie within
those of larger ones. A mask changes no size: it saves memory where zeros are not stored, and time only where a kernel
skips them. What makes a layer physically smaller is in :mod:`nasgraph.transforms.structured`.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nasgraph.errors import SpaceError
from nasgraph.transforms.base import Transform, each_option
from nasgraph.transforms.layers import Transformed, extended, rewritten_layers
from nasgraph.transforms.structured import group_of, heads_of, layers_that_stay, prune_to, remove_layers

MASKS = ("unstructured", "rows")  # and n:m
SMALLER = ("channels", "heads", "layers")
SCORES = ("magnitude", "random", "learned", "signed", "first")
THRESHOLD = 0.4  # of |tanh(score)|, Koster et al., ICLR 2022


@dataclass(frozen=True)
class Prune(Transform):
    """Keeps a part of each weight. Any field but ``where`` and ``follow`` may be a choice.

    Args:
        where: see :class:`~nasgraph.transforms.base.Transform`.
        keep: share of entries that stay, in (0, 1]; 1.0 leaves the layer as it is. ``round(keep * n)`` of ``n`` stay,
            at least one. None: what ``structure`` says (n:m), or what the threshold says (``signed``).
        structure: among which entries. ``"unstructured"``: all of the layer. ``"rows"``: those of each output, so each
            keeps equally many (DRESS, Qu et al. 2022). ``"2:4"`` or any n:m: n of each m neighbours along the
            input axis. ``"channels"``, ``"heads"``, ``"layers"``: whole ones, for models that already exist; in a
            declared space those are choices of widths, heads and depths.
        scores: what is kept. ``"magnitude"``: the largest of the weight as it is at the moment. ``"random"``: drawn
            once from ``seed``, the baseline of equal sparsity. ``"learned"``: the largest of scores that are trained
            through the mask (edge-popup, Ramanujan et al., CVPR 2020). ``"signed"``: scores give the sign too, over
            weights of constant magnitude: ``sign(s) 1[|tanh s| > 0.4]`` (Koster et al., ICLR 2022), with the largest
            ``|s|`` instead of the threshold if ``keep`` is given. Whole channels, heads and layers are compared by
            the L2 norm of all their weights, drawn by ``"random"``, or the ``"first"`` are kept.
        weights: ``"trained"``, or ``"fixed"``: they stay as they started and only the scores learn (a supermask).
        seed: of ``"random"``; layers at another ``where`` or of another shape are drawn apart.
        follow: for ``"channels"`` of a model that cannot be traced: name of the layer that reads this one's output.

    Raises: SpaceError: a setting out of range, or settings that contradict each other.
    """

    keep: Any = None
    structure: Any = "unstructured"
    scores: Any = "magnitude"
    weights: Any = "trained"
    seed: Any = 0
    follow: str | None = None

    order: ClassVar[int] = 1
    amounts: ClassVar[Mapping[str, float]] = {"keep": 0}

    def __post_init__(self) -> None:
        self.check("keep", _is_ratio, "give a ratio above 0, at most 1")
        self.check("structure", _is_structure, f"give one of {', '.join(MASKS + SMALLER)}, or n:m with 0 < n < m")
        self.check("scores", lambda scores: scores in SCORES, f"give one of {', '.join(SCORES)}")
        self.check("weights", lambda weights: weights in ("trained", "fixed"), "give trained or fixed")
        self.check("seed", lambda seed: type(seed) is int, "give a whole number")
        if not isinstance(self.structure, str) or not isinstance(self.scores, str):
            return  # looked at when they are decided
        if ":" in self.structure:
            n, m = _n_of_m(self.structure)
            self.check("keep", lambda keep: keep in (None, 1.0, n / m), f"{self.structure} keeps {n / m}, or give 1.0")
            if self.scores == "signed":
                raise SpaceError(f"Prune: signed scores have no {self.structure}: use unstructured or rows")
        elif self.scores != "signed":
            self.check("keep", lambda keep: keep is not None, "give a ratio")
        if self.structure in SMALLER and self.scores in ("learned", "signed"):
            raise SpaceError(f"Prune: {self.structure} are chosen by magnitude, random or first, not {self.scores}")
        if self.structure not in SMALLER and self.scores == "first":
            raise SpaceError(f"Prune: the first are kept of {', '.join(SMALLER)}, not by a mask ({self.structure})")
        if self.weights == "fixed" and self.scores not in ("learned", "signed"):
            raise SpaceError(
                f"Prune: nothing learns with fixed weights and {self.scores} scores: use learned or signed"
            )

    def neutral(self) -> bool:
        """Everything is kept, and trained as ever."""
        return bool(self.keep == 1.0 and self.scores != "signed" and self.weights == "trained")

    def canonical(self) -> Prune:
        """See the base."""
        keep = None if self.keep is None else float(self.keep)
        unused = ["seed"] if self.scores != "random" else []
        if self.neutral():
            unused = ["structure", "scores", "weights", "seed", "follow"]
        elif self.structure != "channels":
            unused += ["follow"]
        if self.structure not in SMALLER:
            if ":" in self.structure and keep != 1.0:
                keep = None  # it says itself how many
            elif keep is None or keep == 1.0:
                unused += ["structure"]  # the threshold, or all
        found: Prune = self.with_defaults(unused)
        return replace(found, keep=keep)

    def apply(self, module: nn.Module) -> nn.Module:
        """See the base. Raises: SpaceError: ``structure`` is for models that already exist."""
        if self.structure in SMALLER:
            raise SpaceError(_declared(self.structure))
        return super().apply(module)

    @property
    def sizes_only(self) -> bool:
        """See the base: whole channels, heads and layers."""
        return any(each in SMALLER for each in each_option(self.structure))

    def check_declared(self, node: str) -> None:
        """See the base. Raises: SpaceError: a declared space has choices of widths, heads and depths for this."""
        for each in each_option(self.structure):
            if each in SMALLER:
                raise SpaceError(f"node '{node}': {_declared(each)}")

    @property
    def removes(self) -> bool:
        """See the base: whole layers, whatever is chosen."""
        return all(each == "layers" for each in each_option(self.structure))

    def removed(self, model: nn.Module) -> frozenset[str]:
        """See the base."""
        if not self.removes or self.neutral():
            return frozenset()
        stays = layers_that_stay(model, self.where, self.keep, self.scores, self.seed)
        layers = model.get_submodule(self.where).named_children()
        return frozenset(f"{self.where}.{name}" for name, _ in layers if name not in stays)

    def tied(self, model: nn.Module, inputs: Sequence[Tensor] | None) -> frozenset[str]:
        """See the base: the layers that make the same channels."""
        if "channels" not in each_option(self.structure):
            return frozenset()
        group = group_of(model, self.where, self.follow, inputs)
        return frozenset(cut.module for cut in group.cuts if cut.end != "in")

    def apply_to_model(self, model: nn.Module, name: str) -> nn.Module:
        """See the base; channels, heads and layers are removed from the model, and what depends on them follows."""
        if self.structure not in SMALLER:
            return super().apply_to_model(model, name)
        if self.structure == "layers":
            remove_layers(model, name, self.keep, self.scores, self.seed)
            return model
        # a space has looked at the group, with inputs, when it was declared
        group = heads_of(model, name) if self.structure == "heads" else group_of(model, name, self.follow, checked=True)
        prune_to(model, group, name, self.keep, self.scores, self.seed)
        return model

    def fits(self, module: nn.Module) -> bool:
        """See the base."""
        return self.structure not in ("heads", "layers") and super().fits(module)

    def targets(self, module: nn.Module) -> list[nn.Module]:
        """See the base; heads and layers are of other modules than single layers."""
        return [module] if self.structure in ("heads", "layers") else super().targets(module)

    def rewrite(self, layer: nn.Module) -> nn.Module:
        """See the base. Raises: SpaceError: the layer is pruned already, or n:m does not divide its inputs."""
        found = extended(layer)
        if "prune" in found.on_weight:
            raise SpaceError(f"Prune: {type(layer).__name__} is pruned already: give each layer one Prune")
        try:
            _rows(found.weight, self.structure)
        except ValueError as error:
            raise SpaceError(f"Prune: {error}; leave the layer out by `where`") from None
        fixed = self.weights == "fixed"
        if self.scores == "magnitude":
            mask: nn.Module = MagnitudeMask(self.keep, self.structure)
        elif self.scores == "random":
            seed = zlib.crc32(f"{self.seed}/{self.where}/{tuple(found.weight.shape)}".encode())
            mask = RandomMask(found.weight, self.keep, self.structure, seed)
        elif self.scores == "learned":
            mask = LearnedMask(found.weight, self.keep, self.structure, fixed)
        else:
            mask = SignedMask(found.weight, self.keep, self.structure, fixed)
        found.on_weight["prune"] = mask
        return found


class MagnitudeMask(nn.Module):
    """Keeps the largest entries of the weight that comes in, whatever it is by then."""

    def __init__(self, keep: float | None, structure: str) -> None:
        super().__init__()
        self.keep, self.structure = keep, structure

    def forward(self, weight: Tensor) -> Tensor:
        return weight * kept(weight.detach().abs(), self.keep, self.structure)


class RandomMask(nn.Module):
    """Keeps entries that ``seed`` and the weight's shape decide."""

    mask: Tensor

    def __init__(self, weight: Tensor, keep: float | None, structure: str, seed: int) -> None:
        super().__init__()
        scores = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed), device="cpu")
        self.register_buffer("mask", kept(scores, keep, structure).to(weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class LearnedMask(nn.Module):
    """Edge-popup: keeps the largest scores ``|s|``; the gradient of the mask goes to the scores as it is.

    Ramanujan et al., "What's Hidden in a Randomly Weighted Neural Network?", CVPR 2020.
    """

    def __init__(self, weight: Tensor, keep: float | None, structure: str, fixed: bool) -> None:
        super().__init__()
        self.keep, self.structure, self.fixed = keep, structure, fixed
        self.scores = nn.Parameter(torch.empty_like(weight, memory_format=torch.contiguous_format))
        nn.init.kaiming_uniform_(self.scores, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        weight = weight.detach() if self.fixed else weight
        scores = self.scores.abs()
        mask = kept(scores.detach(), self.keep, self.structure).to(weight.dtype)
        masked: Tensor = weight * (mask + (scores - scores.detach()))  # what is added is 0, and has the gradient 1
        return masked


class SignedMask(nn.Module):
    """A mask of -1, 0 and 1 over weights of one magnitude, ``sign(w) sqrt(2 / fan_in)``.

    Koster et al., "Signing the Supermask", ICLR 2022; the magnitude is He's for ReLU.
    """

    def __init__(self, weight: Tensor, keep: float | None, structure: str, fixed: bool) -> None:
        super().__init__()
        self.keep, self.structure, self.fixed = keep, structure, fixed
        self.signed_scores = nn.Parameter(torch.empty_like(weight, memory_format=torch.contiguous_format))
        nn.init.xavier_uniform_(self.signed_scores)

    def forward(self, weight: Tensor) -> Tensor:
        fan_in = weight[0].numel()
        constant = math.sqrt(2 / fan_in) * torch.where(weight.detach() < 0, -1.0, 1.0).to(weight.dtype)
        if not self.fixed:
            constant = constant + (weight - weight.detach())
        scores = self.signed_scores
        size = scores.detach().abs()
        mask = size.tanh() > THRESHOLD if self.keep is None else kept(size, self.keep, self.structure)
        signs = torch.where(scores.detach() < 0, -1.0, 1.0).to(weight.dtype) * mask
        return constant * (signs + (scores - scores.detach()))


def kept(scores: Tensor, keep: float | None, structure: str) -> Tensor:
    """Which entries stay: the largest ``round(keep * n)``, at least one, of each ``n`` that ``structure`` compares.

    Of equal scores the first stays, so a smaller ``keep`` keeps a subset of what a larger one does.

    Shapes: scores ``(out, in, ...)`` -> bool of the same shape.
    Raises: ValueError: n:m does not divide the input axis.
    """
    rows = _rows(scores, structure)
    if ":" in structure:
        count = rows.shape[-1] if keep == 1.0 else _n_of_m(structure)[0]
    else:
        count = max(1, round((1.0 if keep is None else keep) * rows.shape[-1]))
    mask = largest(rows, count)
    if ":" in structure:
        return mask.reshape(scores.movedim(1, -1).shape).movedim(-1, 1)
    return mask.reshape(scores.shape)


def largest(scores: Tensor, count: int) -> Tensor:
    """The ``count`` largest of the last axis, of equals the first. Shapes: ``(..., n)`` -> bool ``(..., n)``."""
    least = scores.kthvalue(scores.shape[-1] - count + 1, dim=-1, keepdim=True).values
    above, equal = scores > least, scores == least
    left = count - above.sum(dim=-1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=-1) <= left))


def recycle(model: nn.Module, rate: float) -> int:
    """Iterative weight recycling: where scores are lowest, weights take the values of where they are highest.

    In each layer with learned scores, ``k = round(rate * n)`` of ``n`` weights; the scores stay (Gorbett & Whitley,
    "Randomly Initialized Subnetworks with Iterative Weight Recycling", 2023). To be called every few epochs.

    Returns: how many weights were overwritten.
    Raises: ValueError: ``rate`` is not in [0, 0.5], so the two groups would overlap.
    """
    if not 0 <= rate <= 0.5:
        raise ValueError(f"rate is {rate}: lowest and highest must not overlap, so give at most 0.5")
    changed = 0
    for layer in rewritten_layers(model).values():
        for mask in layer.on_weight.values():
            if not isinstance(mask, LearnedMask):
                continue
            order = mask.scores.detach().abs().flatten().argsort(stable=True)
            count = round(rate * len(order))
            with torch.no_grad():
                values = layer.weight.detach().flatten()
                values[order[:count]] = values[order.flip(0)[:count]]
                layer.weight.copy_(values.view_as(layer.weight))
            changed += count
    return changed


def kept_weights(model: nn.Module) -> tuple[int, int]:
    """Of the layers that are pruned, how many entries of their weights the masks keep, and how many there are."""
    layers = [layer for layer in rewritten_layers(model).values() if "prune" in layer.on_weight]
    return sum(kept_entries(layer) for layer in layers), sum(layer.weight.numel() for layer in layers)


def kept_entries(layer: Transformed) -> int:
    """How many entries of a pruned layer's weight the mask keeps now, zeros among them."""
    with torch.no_grad():
        probe = torch.ones_like(layer.weight)  # of equals a mask keeps as many as of others
        return int(layer.on_weight["prune"](probe).count_nonzero())


def _rows(scores: Tensor, structure: str) -> Tensor:
    """``scores`` with the entries that are compared with each other in the last axis."""
    if structure == "unstructured":
        return scores.reshape(1, -1)
    if structure == "rows":
        return scores.flatten(1)
    m = _n_of_m(structure)[1]
    if scores.shape[1] % m:
        raise ValueError(
            f"{structure} needs inputs in groups of {m}, and a weight of {tuple(scores.shape)} has {scores.shape[1]}"
        )
    return scores.movedim(1, -1).reshape(-1, m)


def _n_of_m(structure: str) -> tuple[int, int]:
    n, m = structure.split(":")
    return int(n), int(m)


def _is_ratio(keep: Any) -> bool:
    return keep is None or (isinstance(keep, int | float) and not isinstance(keep, bool) and 0 < keep <= 1)


def _is_structure(structure: Any) -> bool:
    if structure in MASKS + SMALLER:
        return True
    if not isinstance(structure, str) or not re.fullmatch(r"\d+:\d+", structure):
        return False
    n, m = _n_of_m(structure)
    return 0 < n < m


def _declared(structure: str) -> str:
    return (
        f"Prune: structure '{structure}' makes layers of an existing model smaller (SearchSpace.from_module); in a "
        f"declared space offer {'depths' if structure == 'layers' else 'heads or widths'} as a choice instead"
    )
