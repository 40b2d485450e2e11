"""Bags of words as products of sparse matrices: the same numbers as of dense features, several times faster.

The rows of Cora and CiteSeer are 99 % zeros. Until the first weight matrix all that happens to them is linear: dropout,
neighbourhood sums, a matrix product. So a :class:`Rows` stands for ``operator @ features``, both sparse, and becomes
dense where it meets a weight. Used by ``supernet_ranking.py``, whose ``--check`` compares it with the dense tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.nn import ChebConv, GINConv, GraphConv, MessagePassing, SAGEConv

AGGREGATE_FIRST = (GINConv, ChebConv, SAGEConv, GraphConv)


class Rows(torch.Tensor):
    """``operator @ features`` ``(m, f)``; ``operator`` None: the features themselves."""

    features: Tensor
    operator: Tensor | None

    @staticmethod
    def __new__(cls, features: Tensor, operator: Tensor | None = None) -> Rows:
        m = features.shape[0] if operator is None else operator.shape[0]
        made: Rows = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, (m, features.shape[1]), dtype=features.dtype, device=features.device
        )
        made.features, made.operator = features, operator
        return made

    def times(self, weight: Tensor) -> Tensor:
        """``self @ weight``, dense; the gradient goes to ``weight``."""
        out = _Product.apply(self.features, weight)
        return out if self.operator is None else torch.mm(self.operator, out)

    def matrix(self) -> Tensor:
        n = self.features.shape[0]
        return self.operator if self.operator is not None else torch.eye(n).to_sparse_csr()

    def dropped(self, p: float) -> Rows:
        """Each entry of the features zeroed with probability ``p``, the others divided by ``1 - p``."""
        old = self.features
        values = F.dropout(old.values(), p)
        return Rows(
            torch.sparse_csr_tensor(old.crow_indices(), old.col_indices(), values, old.shape, check_invariants=True)
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            training = kwargs.get("training", args[2] if len(args) > 2 else True)
            return args[0].dropped(p) if training and p else args[0]
        if func is F.linear:
            x, weight, *bias = args
            out = x.times(weight.t())
            return out if not bias or bias[0] is None else out + bias[0]
        if func is torch.Tensor.unsqueeze:
            return args[0]  # ARMA's stacks: the product below has them all
        if func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            return torch.stack([args[0].times(weight) for weight in args[1]])
        if func in (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__):
            x, factor = args if isinstance(args[0], Rows) else args[::-1]
            return Rows(x.features, x.matrix() * float(factor))
        if func in (torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__):
            assert args[0].features is args[1].features
            return Rows(args[0].features, args[0].matrix() + args[1].matrix())
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of sparse rows")


class _Product(torch.autograd.Function):
    """Sparse ``(n, f)`` times dense ``(f, o)``."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor) -> Tensor:
        ctx.features = features
        return torch.mm(features, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, torch.mm(ctx.features.t().to_sparse_csr(), gradients[0])


@contextlib.contextmanager
def sparse_propagation() -> Iterator[None]:
    """The layers that aggregate before their weight matrix aggregate :class:`Rows` too, quantised ones included.

    PyG writes a ``propagate`` for each class when its first instance is made or copied. So those of subclasses are
    replaced as well, and while this lasts none is written for a subclass, which inherits its layer's.
    """
    with torch.random.fork_rng(devices=[]):
        GINConv(torch.nn.Identity()), ChebConv(1, 1, K=2), SAGEConv(1, 1), GraphConv(1, 1)
    plain = {kind: kind.__dict__["propagate"] for kind in _writers(AGGREGATE_FIRST)}
    write = MessagePassing._set_jittable_templates

    def aware(run: Callable[..., Any]) -> Callable[..., Any]:
        def propagate(self: Any, edge_index: Tensor, size: Any = None, **data: Any) -> Any:
            x = data["x"][0] if isinstance(data["x"], tuple) else data["x"]
            if not isinstance(x, Rows):
                return run(self, edge_index, size=size, **data)
            out = Rows(x.features, _adjacency(self, edge_index, x, data))
            return self.on_aggregate(out) if hasattr(self, "on_aggregate") else out

        return propagate

    def written(self: MessagePassing, *args: Any) -> None:
        if not isinstance(self, AGGREGATE_FIRST):
            write(self, *args)

    for kind, method in plain.items():
        kind.propagate = aware(method)
    MessagePassing._set_jittable_templates = written
    try:
        yield
    finally:
        MessagePassing._set_jittable_templates = write
        for kind, method in plain.items():
            kind.propagate = method


def _writers(kinds: Sequence[type]) -> Iterator[type]:
    """``kinds`` and their subclasses that have a ``propagate`` of their own."""
    for kind in kinds:
        if "propagate" in kind.__dict__:
            yield kind
        yield from _writers(kind.__subclasses__())


def _adjacency(layer: Any, edge_index: Tensor, x: Rows, data: Mapping[str, Any]) -> Tensor:
    source, target = edge_index
    n = x.shape[0]
    weight = data.get("norm") if data.get("norm") is not None else data.get("edge_weight")
    values = torch.ones(len(source)) if weight is None else weight
    if layer.aggr == "mean":
        values = values / torch.bincount(target, minlength=n).clamp(min=1)[target]
    elif layer.aggr not in ("sum", "add"):
        raise NotImplementedError(f"aggregation {layer.aggr!r}")
    return (
        torch.sparse_coo_tensor(torch.stack([target, source]), values, (n, n), check_invariants=True)
        .coalesce()
        .to_sparse_csr()
    )
