"""Low rank: a layer becomes two thinner ones, whose product starts as the best approximation of its weight.

Ranks nest: the factors of a smaller rank are the leading rows and columns of those of a larger one. So the ranks of a
supernet share one pair of factors, and each of them starts as the truncated singular value decomposition.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nasgraph.errors import SpaceError
from nasgraph.transforms.base import Transform, each_option, matches
from nasgraph.transforms.layers import CONVOLUTIONS, Transformed
from nasgraph.transforms.shrink import STATISTIC

KEEP = 2**26  # numbers of kept decompositions
KEPT: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()
RECORD = ": call record_inputs(model, batches) on a trained model first, or take method 'svd'"
SIZES_ONLY: ContextVar[bool] = ContextVar("sizes_only", default=False)


@dataclass(frozen=True)
class LowRank(Transform):
    """Linear and convolution layers as two layers of rank ``rank``: ``U sqrt(S)`` after ``sqrt(S) V^T``.

    The matrix of a convolution is out channels x (in channels * kernel): the first layer is the same convolution with
    ``rank`` channels, the second is pointwise and has the bias. With groups, each group has a matrix of ``rank``.

    Args:
        where: see :class:`~nasgraph.transforms.base.Transform`.
        rank: ``None``: the layer as it is. A whole number: that rank, or the layer's full rank if it has less. A
            fraction between 0 and 1: that share of the layer's full rank, rounded, at least 1. Full rank is the
            smaller side of the matrix; two factors are smaller than the layer below ``in * out / (in + out)``.
        method: ``"svd"``: nearest to the weight, ``min ||W - LR||`` (Eckart & Young, 1936). ``"activation"``: nearest
            in what the layer puts out, ``min ||(W - LR) D||`` with ``D = diag(sqrt(E[x^2]))`` (Li et al., LoRAP, ICML
            2024), for layers whose inputs :func:`record_inputs` has seen.

    Raises: SpaceError: a rank or a method that there is not; ``"activation"`` for a layer without statistics.
    """

    rank: Any = None
    method: Any = "svd"
    order: ClassVar[int] = 0
    amounts: ClassVar[Mapping[str, float]] = {"rank": math.inf}
    structural: ClassVar[bool] = True
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, *CONVOLUTIONS)

    def __post_init__(self) -> None:
        self.check("rank", _is_rank, "give None, a whole number from 1, or a fraction between 0 and 1")
        self.check("method", lambda method: method in ("svd", "activation"), "give 'svd' or 'activation'")

    def neutral(self) -> bool:
        """See :class:`~nasgraph.transforms.base.Transform`."""
        return self.rank is None

    def check_declared(self, node: str) -> None:
        """See the base. Raises: SpaceError: nobody has seen the inputs of a layer that is yet to be made."""
        if self._weighs_inputs:
            raise SpaceError(f"node '{node}': {_unseen('a layer that is yet to be made')}: take method 'svd'")

    def tied(self, model: nn.Module, inputs: Sequence[Tensor] | None) -> frozenset[str]:
        """See the base: nothing is tied. Raises: SpaceError: nobody has seen the inputs that are to be weighed."""
        if self._weighs_inputs:
            module = model.get_submodule(self.where)
            layers = replace(self, where="*").targets(module)
            for name, layer in module.named_modules():
                if layer in layers and getattr(layer, STATISTIC, None) is None:
                    where = f"{self.where}.{name}" if name else self.where
                    raise SpaceError(_unseen(f"'{where}'") + RECORD)
        return frozenset()

    @property
    def _weighs_inputs(self) -> bool:
        ranks = [rank for rank in each_option(self.rank) if rank is not None]
        return bool(ranks) and "activation" in each_option(self.method)

    def rewrite(self, layer: nn.Module) -> nn.Module:
        """See :class:`~nasgraph.transforms.base.Transform`."""
        assert isinstance(layer, (nn.Linear, *CONVOLUTIONS))
        if isinstance(layer, Transformed):
            raise SpaceError("LowRank: the layer is masked, quantised or adapted already; factors come before these")
        scale = None
        if self.method == "activation":
            scale = getattr(layer, STATISTIC, None)
            if scale is None:
                raise SpaceError(_unseen(f"'{self.where}'") + RECORD)
        return factorised(layer, self.rank, scale)


def _unseen(what: str) -> str:
    return f"LowRank: method 'activation' weighs the inputs of {what}, and nobody has seen them"


class Factorised(nn.Module):
    """``second(first(x))`` in place of one layer: two plain layers, which later transforms may rewrite."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        first.own_slices = True  # type: ignore[assignment]  # its rows are ranks, whatever those of the layer were

    def forward(self, x: Tensor) -> Tensor:
        """As the layer did."""
        out: Tensor = self.second(self.first(x))
        return out

    @property
    def rank(self) -> int:
        """Of the weight, or of each group's."""
        return int(effective(self.first).shape[0]) // self.groups

    @property
    def groups(self) -> int:
        """Of a convolution; 1 for a linear layer."""
        return int(getattr(self.first, "groups", 1))

    @property
    def weight(self) -> Tensor:
        """What one layer of the same function would have as its weight: masked and quantised, without adapters."""
        first, second = effective(self.first), effective(self.second)
        rows = first.reshape(self.groups, first.shape[0] // self.groups, -1)
        columns = second.reshape(self.groups, -1, rows.shape[1])
        product: Tensor = columns @ rows
        return product.reshape(second.shape[0], *first.shape[1:])

    @property
    def bias(self) -> Tensor | None:
        """Of the second layer."""
        return self.second.bias  # type: ignore[return-value]


def effective(layer: nn.Module) -> Tensor:
    """The weight that a layer works with, rewritten or not."""
    weight = layer.effective_weight() if isinstance(layer, Transformed) else layer.weight
    assert isinstance(weight, Tensor)
    return weight


def factorised(
    layer: nn.Linear | nn.modules.conv._ConvNd, rank: float | int, scale: Tensor | None = None
) -> Factorised:
    """``layer`` as two, with numbers of their own; frozen if its weight is.

    Args:
        rank: as :class:`LowRank` says.
        scale: mean square of each input feature or channel, ``(in,)``; ``None``: plain singular values.
    """
    weight = layer.weight.detach()
    bias = layer.bias is not None
    first: nn.Module
    second: nn.Module
    if isinstance(layer, nn.Linear):
        groups = 1
        r = rank_of(rank, full_rank(layer))
        first = nn.Linear(layer.in_features, r, bias=False, device="meta")
        second = nn.Linear(r, layer.out_features, bias=bias, device="meta")
    else:
        groups = layer.groups
        r = rank_of(rank, full_rank(layer))
        kind = type(layer)
        shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, groups)
        first = kind(layer.in_channels, r * groups, *shape, False, layer.padding_mode, device="meta")  # type: ignore[call-arg, arg-type]
        second = kind(r * groups, layer.out_channels, 1, groups=groups, bias=bias, device="meta")  # type: ignore[call-arg, arg-type]
    matrices = weight.reshape(groups, weight.shape[0] // groups, -1)
    d = None
    if scale is not None:
        d = scale.reshape(groups, -1).repeat_interleave(matrices.shape[2] * groups // len(scale), dim=1).sqrt()
    left, right = factors(matrices, r, d)
    trained = layer.weight.requires_grad
    first.weight = nn.Parameter(right.reshape(first.weight.shape).to(weight.dtype), trained)
    second.weight = nn.Parameter(left.reshape(second.weight.shape).to(weight.dtype), trained)
    if layer.bias is not None:
        second.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
    _keep_entries(layer, first, second)
    return Factorised(first, second).train(layer.training)


def _keep_entries(layer: nn.Module, first: nn.Module, second: nn.Module) -> None:
    """Factors of a layer that was pruned have the same of its inputs and outputs: a supernet cuts theirs by that.

    With groups only a depthwise layer can have been pruned: its rank is 1, and a channel is row and group of both.
    """
    known: dict[str, tuple[Tensor | None, ...]] = getattr(layer, "kept_entries", {})
    if not known:
        return
    rows, columns, *_ = known["weight"]
    rest = (None,) * (first.weight.dim() - 2)  # type: ignore[operator]
    across = rows if getattr(layer, "groups", 1) > 1 else None  # ranks, else
    first.kept_entries = {"weight": (across, columns, *rest)}  # type: ignore[assignment]
    second.kept_entries = {"weight": (rows, None, *rest), "bias": (rows,)}  # type: ignore[assignment]


def factors(matrices: Tensor, rank: int, d: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``L = U sqrt(S)`` and ``R = sqrt(S) V^T D^-1`` of ``W D = U S V^T``, cut to ``rank``.

    Shapes: ``(..., out, in)``, ``d`` ``(..., in)`` -> ``(..., out, rank)``, ``(..., rank, in)``, float32 or better.
    """
    matrices = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    if SIZES_ONLY.get():
        *outer, rows, columns = matrices.shape
        return matrices.new_zeros(*outer, rows, rank), matrices.new_zeros(*outer, rank, columns)
    if d is None:
        u, s, v = decomposed(matrices, rank)
    else:
        d = d.to(matrices.dtype)
        d = d.clamp_min(1e-6 * d.amax(-1, keepdim=True)).clamp_min(1e-12)  # a feature that is never there
        u, s, v = decomposed(matrices * d.unsqueeze(-2), rank)
        v = v / d.unsqueeze(-2)
    root = s.sqrt()
    return (u * root.unsqueeze(-2)).contiguous(), (root.unsqueeze(-1) * v).contiguous()


def decomposed(matrices: Tensor, rank: int) -> tuple[Tensor, ...]:
    """The leading ``rank`` terms of the singular value decomposition.

    Of the last matrices the terms of the largest rank so far are kept, as a space asks for every rank of one weight.

    Shapes: ``(..., out, in)`` -> ``(..., out, rank)``, ``(..., rank)``, ``(..., rank, in)``.
    """
    key = hashlib.sha256(matrices.cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()
    key += f"/{tuple(matrices.shape)}/{matrices.dtype}/{matrices.device}"
    if key not in KEPT or KEPT[key][1].shape[-1] < rank:
        u, s, v = torch.linalg.svd(matrices, full_matrices=False)
        KEPT[key] = u[..., :rank].clone(), s[..., :rank].clone(), v[..., :rank, :].clone()
    KEPT.move_to_end(key)
    while len(KEPT) > 1 and sum(part.numel() for parts in KEPT.values() for part in parts) > KEEP:
        KEPT.popitem(last=False)
    u, s, v = KEPT[key]
    return u[..., :rank], s[..., :rank], v[..., :rank, :]


@contextmanager
def sizes_only() -> Iterator[None]:
    """Meanwhile factors are zeros: for networks that get their numbers from elsewhere, such as those of a supernet."""
    token = SIZES_ONLY.set(True)
    try:
        yield
    finally:
        SIZES_ONLY.reset(token)


def full_rank(layer: nn.Module) -> int:
    """The smaller side of the layer's matrix; with groups, of one group's."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return min(weight.shape[0] // getattr(layer, "groups", 1), math.prod(weight.shape[1:]))


def rank_of(rank: float | int, full: int) -> int:
    """The number behind a rank or a share of ``full``: see :class:`LowRank`."""
    return min(rank, full) if isinstance(rank, int) else max(1, round(rank * full))


def _is_rank(rank: Any) -> bool:
    if isinstance(rank, bool):
        return False
    return rank is None or (isinstance(rank, int) and rank >= 1) or (isinstance(rank, float) and 0.0 < rank < 1.0)


def record_inputs(model: nn.Module, batches: Iterable[tuple[Any, ...]], where: str = "*") -> dict[str, Tensor]:
    """Note the mean square of every input feature of the layers at ``where``, for method ``"activation"``.

    Each layer gets it as the buffer ``input_mean_square`` ``(in,)``, which is no part of the ``state_dict`` and is
    copied with the layer. The model runs in evaluation mode without gradients; parameters are not touched.

    Args:
        batches: inputs of the model, each a tuple of positional arguments.

    Returns: the statistics by name of the layer; a layer that no batch reached has none.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook(name: str, layer: nn.Module) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            axis = x.dim() - 1 if isinstance(layer, nn.Linear) else x.dim() - layer.weight.dim() + 1  # type: ignore[operator]
            rows = x.movedim(axis, -1).flatten(0, -2).double()
            sums[name] = sums.get(name, 0.0) + rows.square().sum(0)
            counts[name] = counts.get(name, 0) + len(rows)

        return layer.register_forward_pre_hook(add)

    chosen = LowRank(where)
    layers = {n: each for n, each in model.named_modules() if matches(where, n) and chosen.can_rewrite(each)}
    handles = [hook(name, layer) for name, layer in layers.items()]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for inputs in batches:
                model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    found = {name: (sums[name] / counts[name]).float() for name in layers if name in sums}
    for name, mean_square in found.items():
        layers[name].register_buffer(STATISTIC, mean_square, persistent=False)
    return found
