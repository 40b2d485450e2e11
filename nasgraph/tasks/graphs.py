"""Graph classification: many small graphs, each with a class, in mini-batches that are one disconnected graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nasgraph import registry
from nasgraph.errors import DataError
from nasgraph.tasks import datasets
from nasgraph.tasks.batch import Batch, balanced
from nasgraph.tasks.loaded import SPLITS, LoadedTask, Shuffled, stratified
from nasgraph.tasks.text import logistic_regression

SCORED = 256  # graphs of a batch that is only scored
LARGEST_DEGREE = 500  # that a one-hot code is made for


@dataclass(frozen=True)
class Graphs:
    """Graphs one behind the other, with a class each and three disjoint sets of them.

    Shapes: ``x`` ``(nodes, features)`` float32 and ``edge_index`` ``(2, edges)`` int64 of all graphs; an edge holds the
    numbers of its nodes within their graph. ``nodes`` and ``edges`` ``(graphs,)``: how many of them each graph has.
    ``y`` ``(graphs,)`` int64; ``train``, ``val``, ``test``: graph numbers, ascending.
    """

    x: Tensor
    edge_index: Tensor
    nodes: Tensor
    edges: Tensor
    y: Tensor
    train: Tensor
    val: Tensor
    test: Tensor

    def union(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The graphs ``index`` ``(n,)`` as one, in their order.

        Returns: x ``(nodes, features)``, edge_index ``(2, edges)``, the graph ``(nodes,)`` of each node, ascending, and
        the number of nodes ``(n,)`` of each graph.
        """
        sizes, links = self.nodes[index], self.edges[index]
        rows = _ranges((self.nodes.cumsum(0) - self.nodes)[index], sizes)
        places = _ranges((self.edges.cumsum(0) - self.edges)[index], links)
        shift = (sizes.cumsum(0) - sizes).repeat_interleave(links)
        graph = torch.arange(len(index), device=index.device).repeat_interleave(sizes)
        return self.x[rows], self.edge_index[:, places] + shift, graph, sizes


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """``starts[i], starts[i] + 1, ...``, ``lengths[i]`` numbers, for each i, one range behind the other."""
    offset = (starts - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
    return offset + torch.arange(len(offset), device=starts.device)


class GraphTask(LoadedTask[Graphs]):
    """Graph classification. Models are called with the four tensors of :meth:`Graphs.union`."""

    @cached_property
    def sizes(self) -> dict[str, int]:
        """``features`` of a node and ``classes``."""
        return {"features": self.data.x.shape[1], "classes": int(self.data.y.max()) + 1}

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The first ``batch_size`` training graphs: costs and latency are those of one mini-batch."""
        return self.data.union(self.data.train[: self.batch_size])

    def batch(self, n: int, seed: int) -> Batch:
        """``n`` training graphs, or all; the classes' counts differ by at most one where graphs suffice."""
        chosen = balanced(self.data.y[self.data.train], n, seed)
        return self._of(self.data.train[chosen.to(self.device)])

    def epochs(self, seed: int) -> Iterable[Batch]:
        """All training graphs each time it is iterated, in another order."""
        return Shuffled(self._of, self.data.train, self.batch_size, seed)

    def baseline(self) -> dict[str, dict[str, float]]:
        """What needs no network: the most frequent class, and a logistic regression that sees no edge.

        It reads of each graph the mean of its nodes' features and the logarithms of its numbers of nodes and edges.

        Returns: by name ``val_accuracy`` and ``test_accuracy``, fractions.
        """
        y = {split: self.data.y[getattr(self.data, split)].cpu() for split in SPLITS}
        most = int(y["train"].bincount().argmax())
        found = {f"{split}_accuracy": float((y[split] == most).float().mean()) for split in ("val", "test")}
        x = {}
        for split in SPLITS:
            index = getattr(self.data, split)
            nodes, _, graph, sizes = self.data.union(index)
            means = nodes.new_zeros(len(index), nodes.shape[1]).index_add(0, graph, nodes) / sizes[:, None]
            counts = torch.stack([sizes, self.data.edges[index] + 1], dim=1)
            x[split] = torch.cat([means, counts.log()], dim=1).cpu()
        return {"most frequent class": found, "logistic regression": logistic_regression(x, y)}

    def _of_split(self, split: str) -> Iterator[Batch]:
        for part in getattr(self.data, split).split(SCORED):
            yield self._of(part)

    def _of(self, index: Tensor) -> Batch:
        return Batch(self.data.union(index), self.data.y[index])


def tudataset(
    dataset: str = "PROTEINS",
    root: str | None = None,
    batch_size: int = 64,
    val: float = 0.2,
    test: float = 0.2,
    seed: int = 0,
) -> GraphTask:
    """Graphs of the TU Dortmund collection (Morris et al. 2020): ``MUTAG``, ``PROTEINS``, ``IMDB-BINARY`` and others.

    The split keeps the classes' shares and is drawn from ``seed``. Where nodes have no features, their degree as a
    one-hot code is taken (Xu et al., ICLR 2019). ``root``: see :func:`nasgraph.tasks.datasets.dataset`.

    Raises: ConfigError: unknown dataset, or shares that leave nothing for the training.
    """
    datasets.check_name("TUDataset", dataset)
    return GraphTask(dataset, partial(_tudataset, dataset, root, val, test, seed), batch_size)


def graphs_from_function(
    function: str, batch_size: int = 64, val: float = 0.2, test: float = 0.2, seed: int = 0
) -> GraphTask:
    """Your own graphs: ``module:function`` names a function that returns a list of ``torch_geometric.data.Data``.

    Each needs ``edge_index`` and one class ``y``; ``x`` of all or of none, then degrees are taken. Loading raises
    DataError naming what is missing or wrong.
    """
    return GraphTask(function, partial(_from_function, function, val, test, seed), batch_size)


def _tudataset(dataset: str, root: str | None, val: float, test: float, seed: int) -> Graphs:
    return checked(datasets.dataset("TUDataset", dataset, root), dataset, val, test, seed)


def _from_function(function: str, val: float, test: float, seed: int) -> Graphs:
    return checked(registry.make("tasks", function, {}), function, val, test, seed)


def checked(items: Sequence[Any], name: str, val: float = 0.2, test: float = 0.2, seed: int = 0) -> Graphs:
    """A list of ``torch_geometric.data.Data`` as :class:`Graphs`.

    Raises: DataError: something is missing or has the wrong type, shape or range; the message names the graph.
    """
    if not isinstance(items, Sequence) and not hasattr(items, "__getitem__"):
        raise DataError(f"'{name}' is a {type(items).__name__}: a list of torch_geometric.data.Data is needed")
    if len(items) == 0:
        raise DataError(f"'{name}' has no graph")
    graphs = [_checked(items[i], f"'{name}': graph {i}") for i in range(len(items))]
    widths = {None if x is None else x.shape[1] for x, *_ in graphs}
    if len(widths) > 1:
        raise DataError(f"'{name}': graphs have {_listed(widths)} features; all need the same number, or none any")
    nodes = torch.tensor([count for _, _, count, _ in graphs])
    edges = torch.tensor([edge_index.shape[1] for _, edge_index, _, _ in graphs])
    if widths == {None}:
        x = _degrees([(edge_index, count) for _, edge_index, count, _ in graphs], name)
    else:
        x = torch.cat([x for x, *_ in graphs if x is not None])
    y = torch.tensor([label for *_, label in graphs])
    if int(y.max()) < 1 or int(y.min()) < 0:
        raise DataError(f"'{name}': classes reach from {int(y.min())} to {int(y.max())}; at least 0 and 1 are needed")
    every = torch.cat([edge_index for _, edge_index, _, _ in graphs], dim=1)
    return Graphs(x, every, nodes, edges, y, *stratified(y, val, test, seed, name))


def _checked(data: Any, what: str) -> tuple[Tensor | None, Tensor, int, int]:
    """Features, edges, number of nodes and class of one graph."""
    edge_index, y, x = (getattr(data, field, None) for field in ("edge_index", "y", "x"))
    if not isinstance(edge_index, Tensor) or edge_index.dtype != torch.long or edge_index.dim() != 2:
        raise DataError(f"{what} has no edge_index, int64 of shape (2, edges)")
    if not isinstance(y, Tensor) or y.numel() != 1 or y.is_floating_point():
        raise DataError(f"{what} has no y, a tensor with the number of its class")
    if x is not None and (x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] == 0):
        raise DataError(
            f"{what}: x is {x.dtype} of shape {tuple(x.shape)}, it must be float32 of shape (nodes, features)"
        )
    if x is not None and not bool(x.isfinite().all()):
        raise DataError(f"{what}: x holds values that are NaN or infinite")
    count = int(data.num_nodes)
    if count < 1 or edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < count:
        raise DataError(f"{what} has {count} nodes, and edges that reach others")
    return x, edge_index, count, int(y)


def _degrees(graphs: Sequence[tuple[Tensor, int]], name: str) -> Tensor:
    """One-hot codes of the nodes' in-degrees, ``(nodes, largest degree + 1)``."""
    degrees = torch.cat([edge_index[1].bincount(minlength=count) for edge_index, count in graphs])
    largest = int(degrees.max())
    if largest > LARGEST_DEGREE:
        raise DataError(
            f"'{name}' has no node features, and degrees up to {largest}: too many for a one-hot code. Give features x."
        )
    return F.one_hot(degrees, largest + 1).float()


def _listed(widths: set[int | None]) -> str:
    return " and ".join(sorted("no" if width is None else str(width) for width in widths))
