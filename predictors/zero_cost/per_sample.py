"""Gradients of single samples, by the cheapest route that gives the same gradients.

The definition is a loop: one forward pass of the whole batch, then one backward pass per sample. Most of each
backward pass multiplies zeros, since a sample depends on little of the input. Two routes leave those zeros out:

- samples that are rows of the input (images, plain vectors) run by themselves, a few at a time under ``vmap``;
- a node of a graph runs on the subgraph that it depends on: its neighbourhood of as many hops as the model
  propagates (counted while it runs), and one more for the degrees by which layers such as GCN weight an edge.

Both are exact for models that mix samples in no other way. Whether that holds is checked for each sample: a route whose
outputs differ from those of the whole batch (say, after a GraphNorm over all nodes) is left for the loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nasgraph.errors import NotFinite
from nasgraph.predictors.zero_cost.proxy import trainable
from nasgraph.tasks.batch import Batch

Value = Callable[[Batch, Tensor], Tensor]
"""From a batch and its logits ``(n, ..., classes)`` to one number for each sample, ``(n,)``."""

Route = Callable[[int], "tuple[Tensor, Tensor] | None"]
"""From sample ``i`` to logits ``(c, ..., classes)`` and gradients ``(c, m)`` of samples ``i .. i + c``; None: loop."""

CHUNK = 8


def losses(batch: Batch, outputs: Tensor) -> Tensor:
    """Cross-entropy of each sample."""
    return batch.losses(outputs)


def logit_sums(batch: Batch, outputs: Tensor) -> Tensor:
    """Sum of the logits of each sample."""
    return outputs.flatten(1).sum(1)


def per_sample_gradients(model: nn.Module, batch: Batch, value: Value, *, fast: bool = True) -> Iterator[Tensor]:
    """Gradients of ``value`` of each sample with respect to the trainable parameters, all flattened into one vector.

    Shapes: yields ``(c, m)`` for the next ``c`` samples, in order; the ``c`` add up to ``n``.
    Args: ``model`` in evaluation mode. ``fast=False``: by the definition, with no shortcut.
    Raises: NotFinite: no trainable parameter is reached, or a gradient is NaN or infinite.
    """
    parameters = trainable(model)
    with _Hops(model) as hops:
        everything = model(*batch.inputs)
    outputs = everything if batch.index is None else everything[batch.index]
    values = value(batch, outputs)
    if not values.requires_grad:
        raise NotFinite("no trainable parameter reaches the output, so there is nothing to score")
    tolerance = 1000 * torch.finfo(outputs.dtype).eps * float(outputs.detach().abs().max())
    route = _route(model, batch, value, hops.count(), len(everything)) if fast else None
    i = 0
    while i < len(values):
        quick = route(i) if route else None
        if quick is not None:
            got, rows = quick
            if not (got - outputs[i : i + len(got)]).abs().max() <= tolerance:
                route = quick = None
        if quick is None:
            rows = _flat(torch.autograd.grad(values[i], parameters, retain_graph=True, materialize_grads=True))
        if not rows.isfinite().all():
            raise NotFinite(f"a gradient of sample {i} is NaN or infinite")
        yield rows
        i += len(rows)


def _flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])[None]


def _route(model: nn.Module, batch: Batch, value: Value, hops: int, rows: int) -> Route | None:
    """The route for these inputs, None where the loop is all that is known to be right."""
    edges = [x for x in batch.inputs if x.dtype == torch.long and x.dim() == 2 and len(x) == 2]
    if not edges:
        return _Rows(model, batch, value) if all(x.dim() and len(x) == rows for x in batch.inputs) else None
    a_row_is_a_node = any(x.is_floating_point() and x.dim() == 2 and len(x) == rows for x in batch.inputs)
    unclear = len(edges) > 1 or rows in (2, edges[0].shape[1])  # which input is what cannot be told from its shape
    if not a_row_is_a_node or unclear or (edges[0] >= rows).any():
        return None
    return _Fields(model, batch, value, edges[0], hops, rows)


def _alone(model: nn.Module, small: Batch, value: Value) -> tuple[Tensor, Tensor] | None:
    """Forward and backward of a batch of one sample."""
    try:
        outputs = small.logits(model)
        grads = torch.autograd.grad(value(small, outputs)[0], trainable(model), materialize_grads=True)
    except (RuntimeError, IndexError, ValueError):  # this model cannot run on less than the whole
        return None
    return outputs.detach(), _flat(grads)


class _Rows:
    """Route of samples that are rows of the inputs."""

    def __init__(self, model: nn.Module, batch: Batch, value: Value) -> None:
        self.model, self.value, self.target, self.vmap = model, value, batch.target, True
        self.inputs = batch.inputs if batch.index is None else tuple(x[batch.index] for x in batch.inputs)

    def __call__(self, i: int) -> tuple[Tensor, Tensor] | None:
        if self.vmap:
            try:
                return self._chunk(slice(i, i + CHUNK))
            except (RuntimeError, ValueError):  # vmap does not know an operation, or a layer wants a whole batch
                self.vmap = False
        rows = slice(i, i + 1)
        return _alone(self.model, Batch(tuple(x[rows] for x in self.inputs), self.target[rows]), self.value)

    def _chunk(self, rows: slice) -> tuple[Tensor, Tensor]:
        def scored(weights: dict[str, Tensor], target: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            small = Batch(tuple(x[None] for x in inputs), target[None])
            outputs = torch.func.functional_call(self.model, weights, small.inputs)
            return self.value(small, outputs)[0], outputs[0]

        weights = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        each: Any = torch.func.vmap(torch.func.grad(scored, has_aux=True), in_dims=(None, 0, *(0 for _ in self.inputs)))
        with sdpa_kernel(SDPBackend.MATH):  # vmap would take the fused kernel of CPUs sample by sample
            grads, outputs = each(weights, self.target[rows], *(x[rows] for x in self.inputs))
        return outputs, torch.cat([g.flatten(1) for g in grads.values()], 1)


class _Fields:
    """Route of the nodes of one graph: each on the subgraph that it depends on."""

    def __init__(self, model: nn.Module, batch: Batch, value: Value, edges: Tensor, hops: int, nodes: int) -> None:
        self.model, self.batch, self.value = model, batch, value
        self.edges, self.hops, self.nodes = edges, hops, nodes
        self.index = torch.arange(nodes) if batch.index is None else batch.index

    def __call__(self, i: int) -> tuple[Tensor, Tensor] | None:
        from torch_geometric.utils import k_hop_subgraph

        found: tuple[Tensor, Tensor, Tensor, Tensor] = k_hop_subgraph(
            int(self.index[i]), self.hops + 1, self.edges, relabel_nodes=True, num_nodes=self.nodes
        )
        nodes, edges, place, kept = found
        if 3 * len(nodes) > self.nodes:  # a forward pass costs more here than the zeros it avoids
            return None

        def restrict(x: Tensor) -> Tensor:
            if x is self.edges:
                return edges
            if x.dim() and len(x) == self.nodes:
                return x[nodes]
            return x[kept] if x.dim() and len(x) == len(kept) else x

        small = Batch(tuple(restrict(x) for x in self.batch.inputs), self.batch.target[i : i + 1], place)
        return _alone(self.model, small, self.value)


class _Hops:
    """Counts how many times a model passes messages on, while it runs within the ``with`` block."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: Counter[nn.Module] = Counter()

    def __enter__(self) -> _Hops:
        def called(module: nn.Module, _: object) -> None:
            self.calls[module] += 1

        layers = [m for m in self.model.modules() if hasattr(m, "register_propagate_forward_pre_hook")]
        self.handles = [cast(Any, m).register_propagate_forward_pre_hook(called) for m in layers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def count(self) -> int:
        """Upper bound of the hops: on the longest path of an fx graph, else the sum over all layers."""
        if not isinstance(self.model, fx.GraphModule):
            return sum(self.calls.values())
        depth: dict[fx.Node, int] = {}
        for node in self.model.graph.nodes:
            own = 0
            if node.op == "call_module":
                own = sum(self.calls[m] for m in self.model.get_submodule(str(node.target)).modules())
            depth[node] = own + max((depth[source] for source in node.all_input_nodes), default=0)
        return max(depth.values(), default=0)
