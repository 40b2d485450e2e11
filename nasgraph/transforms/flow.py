"""What flows from which module of a model to which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

Edges = list[tuple[str, str]]


def flow(model: nn.Module, names: Sequence[str], inputs: tuple[Tensor, ...] | None) -> tuple[Edges, str]:
    """Edges between the modules ``names``: an edge where data goes from one to the other past none of the others.

    Found by ``torch.fx``, else (with ``inputs``) by ``torch.export``; where neither can trace the model the edges only
    follow the order in which the modules stand in it.

    Returns: the edges, and ``"fx"``, ``"export"`` or ``"order"``.
    """
    try:
        graph = _Tracer(names).trace(model)
        return _edges(
            graph, {n: str(n.target) for n in graph.nodes if n.op == "call_module" and n.target in names}
        ), "fx"
    except Exception:  # noqa: BLE001  whatever the model does that cannot be traced
        pass
    if inputs is not None:
        try:
            exported = torch.export.export(model, inputs, strict=False)
            return _edges(exported.graph, _owners(exported.graph, names)), "export"
        except Exception:  # noqa: BLE001
            pass
    order = [name for name, _ in model.named_modules() if name in set(names)]
    return list(zip(order, order[1:], strict=False)), "order"


class _Tracer(fx.Tracer):
    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.names = set(names)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.names or super().is_leaf_module(m, module_qualified_name)


def _owners(graph: fx.Graph, names: Sequence[str]) -> dict[fx.Node, str]:
    """Of each node the module of ``names`` that it is part of."""
    found = {}
    for node in graph.nodes:
        stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
        for path, _ in stack.values():
            name = path.removeprefix("L['self'].").removeprefix("L__self___")
            if name in names:
                found[node] = name
    return found


def _edges(graph: fx.Graph, owner: dict[fx.Node, str]) -> Edges:
    last: dict[fx.Node, set[str]] = {}  # of each node the modules that its value comes from, past no other
    edges: dict[tuple[str, str], None] = {}
    for node in graph.nodes:
        reached = set().union(*(last[source] for source in node.all_input_nodes))
        mine = owner.get(node)
        if mine is None:
            last[node] = reached
            continue
        for before in sorted(reached - {mine}):
            edges[before, mine] = None
        last[node] = {mine}
    return list(edges)
