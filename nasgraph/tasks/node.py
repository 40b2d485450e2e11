"""Node classification on one graph: a few labelled nodes to learn from, the rest to classify."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from nasgraph import registry
from nasgraph.errors import ConfigError, DataError
from nasgraph.tasks import datasets
from nasgraph.tasks.batch import Batch, balanced
from nasgraph.training.loop import Fit, TrainSettings, evaluate, train

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class NodeData:
    """A graph with a class per node and three disjoint sets of nodes.

    Shapes: ``x`` ``(nodes, features)`` float32; ``edge_index`` ``(2, edges)`` int64, sources above targets;
    ``y`` ``(nodes,)`` int64, at least 0 for every node of a split; ``train``, ``val``, ``test``: node numbers,
    ascending.
    """

    x: Tensor
    edge_index: Tensor
    y: Tensor
    train: Tensor
    val: Tensor
    test: Tensor

    def to(self, device: str | torch.device) -> NodeData:
        """A copy on ``device``."""
        return NodeData(*(tensor.to(device) for tensor in self.__dict__.values()))


class NodeTask:
    """Node classification, transductive: training sees the whole graph and the labels of the training nodes.

    Nothing in training or in a search reads the test labels; ``score(model, "test")`` is for once, after the search.

    Args:
        name: for reports and manifests.
        load: gives the data; called at first use, in each process. Must pickle: a module's function or a ``partial``.
        device: where the tensors live.
    """

    def __init__(self, name: str, load: Callable[[], NodeData], device: str | torch.device = "cpu") -> None:
        self.name, self.load, self.device = name, load, torch.device(device)

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "load": self.load, "device": self.device}

    def __repr__(self) -> str:
        return f"NodeTask({self.name!r}, device={str(self.device)!r})"

    @cached_property
    def data(self) -> NodeData:
        """The graph, on the task's device. Raises: DataError: it is missing or has the wrong form."""
        return self.load().to(self.device)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """``features`` of a node and ``classes``."""
        return {"features": self.data.x.shape[1], "classes": int(self.data.y.max()) + 1}

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """``x`` and ``edge_index`` of the whole graph."""
        return self.data.x, self.data.edge_index

    def split(self, name: str) -> Batch:
        """All nodes of ``"train"``, ``"val"`` or ``"test"`` with their labels."""
        if name not in SPLITS:
            raise ValueError(f"no split {name!r}: there are {', '.join(SPLITS)}")
        index: Tensor = getattr(self.data, name)
        return Batch(self.inputs, self.data.y[index], index)

    def batch(self, n: int, seed: int) -> Batch:
        """``n`` training nodes, or all; the classes' counts differ by at most one where nodes suffice."""
        chosen = balanced(self.data.y[self.data.train], n, seed)
        index = self.data.train[chosen.to(self.device)]
        return Batch(self.inputs, self.data.y[index], index)

    def fit(self, model: nn.Module, settings: TrainSettings, seed: int) -> Fit:
        """Train ``model`` in place on the training nodes; see :func:`nasgraph.training.train`."""
        return train(model, [self.split("train")], [self.split("val")], settings, seed)

    def score(self, model: nn.Module, split: str) -> dict[str, float]:
        """Accuracy (a fraction) and mean cross-entropy (nats) on one split, in evaluation mode."""
        accuracy, loss = evaluate(model, [self.split(split)])
        return {"accuracy": accuracy, "loss": loss}

    def fingerprint(self) -> str:
        """SHA-256 over names, types, shapes and bytes of all tensors; the same on every device."""
        digest = hashlib.sha256()
        for name, tensor in self.data.__dict__.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().cpu().numpy().data)
        return digest.hexdigest()

    def to(self, device: str | torch.device) -> NodeTask:
        """The same task on ``device``; data already loaded is copied, not read again."""
        moved = NodeTask(self.name, self.load, device)
        if "data" in self.__dict__:
            moved.__dict__["data"] = self.data.to(device)
        return moved

    def baseline(self) -> dict[str, float]:
        """What a logistic regression reaches that sees the features and no edge: the least a network has to beat.

        Its inverse penalty ``C`` is chosen among powers of ten by validation accuracy, as a search chooses its models.

        Returns: ``val_accuracy`` and ``test_accuracy`` (fractions) and ``C``.
        """
        from sklearn.linear_model import LogisticRegression

        data = self.data.to("cpu")
        x, y = data.x.numpy(), data.y.numpy()
        best: dict[str, float] = {"val_accuracy": -1.0}
        for exponent in range(-2, 5):
            model = LogisticRegression(C=10.0**exponent, max_iter=5000).fit(x[data.train], y[data.train])
            val = float(model.score(x[data.val], y[data.val]))
            if val > best["val_accuracy"]:
                test = float(model.score(x[data.test], y[data.test]))
                best = {"val_accuracy": val, "test_accuracy": test, "C": 10.0**exponent}
        return best


def digits_knn(k: int = 8, labels_per_class: int = 20, seed: int = 0) -> NodeTask:
    """scikit-learn's 1,797 digits, each joined to its ``k`` nearest images: real data that needs no download.

    Nodes: images, 64 pixels scaled to [0, 1]. Edges: Euclidean neighbours, both ways if either has the other.
    Split, drawn from ``seed``: ``labels_per_class`` training nodes of each of the 10 digits, 500 validation nodes of
    any class, the rest for the test (1,097 by default).

    Raises: ConfigError: ``k`` is not in 1..1796, or ``labels_per_class`` not in 1..100.
    """
    for name, value, most in (("k", k, 1796), ("labels_per_class", labels_per_class, 100)):
        if not 1 <= value <= most:
            raise ConfigError(f"digits_knn: {name} is {value}, it must be 1 to {most}")
    return NodeTask("digits_knn", partial(_digits, k, labels_per_class, seed))


def planetoid(dataset: str = "Cora", root: str | None = None) -> NodeTask:
    """Citation graphs ``Cora``, ``CiteSeer``, ``PubMed`` with their public split (Yang et al., ICML 2016).

    20 training nodes per class, 500 validation, 1,000 test; features divided by their row sums.
    ``root``: see :func:`nasgraph.tasks.datasets.load`.

    Raises: ConfigError: unknown dataset.
    """
    datasets.check_name("Planetoid", dataset)
    return NodeTask(dataset, partial(_planetoid, dataset, root))


def amazon(dataset: str = "Computers", root: str | None = None, seed: int = 0) -> NodeTask:
    """Co-purchase graphs ``Computers`` and ``Photo`` (Shchur et al. 2018), split as there.

    The largest connected component (Computers: 13,381 nodes); 20 training and 30 validation nodes per class drawn from
    ``seed``, the rest for the test; features divided by their row sums.

    Raises: ConfigError: unknown dataset.
    """
    datasets.check_name("Amazon", dataset)
    return NodeTask(dataset, partial(_connected, "Amazon", dataset, root, seed))


def coauthor(dataset: str = "Physics", root: str | None = None, seed: int = 0) -> NodeTask:
    """Co-author graphs ``CS`` and ``Physics`` (Shchur et al. 2018); component, split and features as in :func:`amazon`.

    Raises: ConfigError: unknown dataset.
    """
    datasets.check_name("Coauthor", dataset)
    return NodeTask(dataset, partial(_connected, "Coauthor", dataset, root, seed))


def from_function(function: str, seed: int = 0) -> NodeTask:
    """Your own graph: ``module:function`` names a function that returns a ``torch_geometric.data.Data``.

    It needs ``x``, ``edge_index`` and ``y``. Give all of ``train_mask``, ``val_mask``, ``test_mask``, or none of them:
    then 20 training and 30 validation nodes per class are drawn from ``seed`` and the rest is for the test. Nodes
    without a label have ``y`` below 0. Loading raises DataError naming what is missing or wrong.
    """
    return NodeTask(function, partial(_from_function, function, seed))


def _digits(k: int, labels_per_class: int, seed: int) -> NodeData:
    from sklearn.datasets import load_digits

    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    x, y = (pixels / 16.0).float(), labels.long()
    near = _nearest(pixels, k)
    edge_index = (near | near.T).nonzero().T.contiguous()
    generator = torch.Generator().manual_seed(seed)
    chosen, rest = _per_class(y, torch.arange(len(y)), labels_per_class, generator, "digits_knn")
    return NodeData(x, edge_index, y, chosen, rest[:500].sort().values, rest[500:].sort().values)


def _nearest(points: Tensor, k: int) -> Tensor:
    """Whether j is one of the k nearest others of i, ``(n, n)``; of equally near ones the first.

    Exact for integer coordinates, so ties do not depend on the number of threads, as they do in a k-d tree or a BLAS
    that adds in another order.
    """
    squares = points.square().sum(dim=1)
    distances = squares[:, None] + squares[None, :] - 2 * points @ points.T
    distances.fill_diagonal_(torch.inf)
    nearest = distances.sort(dim=1, stable=True).indices[:, :k]
    return torch.zeros(len(points), len(points), dtype=torch.bool).scatter_(1, nearest, True)


def _planetoid(dataset: str, root: str | None) -> NodeData:
    return checked(_normalised(datasets.load("Planetoid", dataset, root)), dataset)


def _connected(family: str, dataset: str, root: str | None, seed: int) -> NodeData:
    from torch_geometric.transforms import LargestConnectedComponents

    data = LargestConnectedComponents()(datasets.load(family, dataset, root))
    return checked(_normalised(data), dataset, seed)


def _from_function(function: str, seed: int) -> NodeData:
    return checked(registry.make("tasks", function, {}), function, seed)


def _normalised(data: Any) -> Any:
    from torch_geometric.transforms import NormalizeFeatures

    return NormalizeFeatures()(data)


def checked(data: Any, name: str, seed: int = 0) -> NodeData:
    """``data`` (a ``torch_geometric.data.Data``) as :class:`NodeData`; its split is drawn from ``seed`` without masks.

    Raises: DataError: something is missing or has the wrong type, shape or range; the message names it.
    """
    for field in ("x", "edge_index", "y"):
        if not isinstance(getattr(data, field, None), Tensor):
            raise DataError(f"'{name}' has no tensor {field}: a node task needs x, edge_index and y")
    x, edge_index, y = data.x, data.edge_index, data.y
    if x.dtype != torch.float32 or x.dim() != 2 or x.numel() == 0:
        raise DataError(f"'{name}': x is {_form(x)}, it must be float32 of shape (nodes, features)")
    if not bool(x.isfinite().all()):
        raise DataError(f"'{name}': x holds {int((~x.isfinite()).sum())} values that are NaN or infinite")
    nodes = x.shape[0]
    if edge_index.dtype != torch.long or edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise DataError(f"'{name}': edge_index is {_form(edge_index)}, it must be int64 of shape (2, edges)")
    if edge_index.numel() and (int(edge_index.min()) < 0 or int(edge_index.max()) >= nodes):
        low, high = int(edge_index.min()), int(edge_index.max())
        raise DataError(f"'{name}': edge_index reaches from {low} to {high}, but the nodes are 0 to {nodes - 1}")
    if y.dtype != torch.long or tuple(y.shape) != (nodes,):
        raise DataError(f"'{name}': y is {_form(y)}, it must be int64 of shape ({nodes},)")
    if int(y.max()) < 1:
        raise DataError(f"'{name}': y has fewer than 2 classes")
    train, val, test = _splits(data, y, name, seed)
    return NodeData(x.contiguous(), edge_index.contiguous(), y, train, val, test)


def _splits(data: Any, y: Tensor, name: str, seed: int) -> list[Tensor]:
    masks: dict[str, Any] = {split: getattr(data, f"{split}_mask", None) for split in SPLITS}
    missing = [f"{split}_mask" for split, mask in masks.items() if mask is None]
    if len(missing) == len(SPLITS):
        generator = torch.Generator().manual_seed(seed)
        what = f"'{name}' has no masks: a random split"
        train, rest = _per_class(y, (y >= 0).nonzero().flatten(), 20, generator, what)
        val, test = _per_class(y, rest, 30, generator, what)
        parts = [train, val, test.sort().values]
    elif missing:
        raise DataError(f"'{name}' has no {' and no '.join(missing)}: give all three masks or none")
    else:
        for split, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != y.shape:
                form = _form(mask) if isinstance(mask, Tensor) else type(mask).__name__
                raise DataError(f"'{name}': {split}_mask is {form}, it must be bool of shape ({len(y)},)")
        parts = [masks[split].nonzero().flatten() for split in SPLITS]
    for split, part in zip(SPLITS, parts, strict=True):
        if len(part) == 0:
            raise DataError(f"'{name}': the {split} split is empty")
        if int(y[part].min()) < 0:
            raise DataError(f"'{name}': the {split} split has nodes with a label below 0")
    if int(torch.cat(parts).bincount().max()) > 1:
        raise DataError(f"'{name}': a node is in two of train_mask, val_mask and test_mask")
    return parts


def _per_class(y: Tensor, nodes: Tensor, n: int, generator: torch.Generator, what: str) -> tuple[Tensor, Tensor]:
    """``n`` random nodes of each class, ascending, and the others, shuffled."""
    order = nodes[torch.randperm(len(nodes), generator=generator)]
    taken = torch.zeros(len(y), dtype=torch.bool)
    for label in range(int(y.max()) + 1):
        mine = order[y[order] == label]
        if len(mine) <= n:
            raise DataError(
                f"{what} takes {n} nodes of each class, but class {label} has {len(mine)}: give masks of your own"
            )
        taken[mine[:n]] = True
    return taken.nonzero().flatten(), order[~taken[order]]


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
