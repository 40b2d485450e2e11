"""How a rank is found by training: Maestro's penalty, Cuttlefish's stable ranks, trained rank pruning.

Each is a few functions for a training loop of one's own. What they find goes into ``LowRank(rank=...)``, or cuts a
factorised layer. The ordered dropout of Maestro is a path policy:
:class:`nasgraph.training.policies.OrderedDropout`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nasgraph.errors import SpaceError
from nasgraph.transforms.layers import Transformed
from nasgraph.transforms.low_rank import Factorised, full_rank

# ---- Maestro (Horvath et al., ICML 2024) ------------------------------------------------------------------------


def tails(layer: Factorised, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """``||U[:, j:]||`` and ``||V[:, j:]||`` for each j from 0, where the layer's matrix is ``U V^T``.

    ``eps`` is added below the root, whose gradient at 0 is not a number.

    Shapes: ``(groups, rank)`` each; a linear layer has one group.
    """
    rank, groups = layer.rank, layer.groups
    u = layer.second.weight.reshape(groups, -1, rank).square().sum(1)  # type: ignore[operator]
    v = layer.first.weight.reshape(groups, rank, -1).square().sum(2)  # type: ignore[operator]
    return (_from(u) + eps).sqrt(), (_from(v) + eps).sqrt()


def _from(squares: Tensor) -> Tensor:
    """Sums over the last axis from each entry to the end."""
    return squares.flip(-1).cumsum(-1).flip(-1)


def group_lasso(model: nn.Module, eps: float = 1e-12) -> Tensor:
    """Hierarchical group lasso: ``sum_j ||U[:, j:]|| + ||V[:, j:]||`` over all factorised layers of ``model``.

    Add it to the loss, times a weight: the last ranks of each layer go to zero first.

    Raises: SpaceError: no layer is factorised.
    """
    found = [sum(tail.sum() for tail in tails(layer, eps)) for layer in factorised_layers(model).values()]
    if not found:
        raise SpaceError("no layer of the model is factorised: rewrite some with LowRank first")
    return torch.stack(found).sum()  # type: ignore[arg-type]


def factorised_layers(model: nn.Module) -> dict[str, Factorised]:
    """By their names, the layers that :class:`~nasgraph.transforms.low_rank.LowRank` has rewritten."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Factorised)}


def needed_rank(layer: Factorised, eps: float) -> int:
    """The leading ranks that are not negligible: j is, with all behind it, if ``||U[:, j:]|| ||V[:, j:]|| < eps``.

    At least 1. What is left out changes the layer's matrix (each group's) by less than ``eps`` in the Frobenius norm.
    """
    u, v = tails(layer)
    return max(1, int((u * v >= eps).any(dim=0).sum()))


def shrink(layer: Factorised, rank: int) -> Factorised:
    """``layer`` cut in place to its leading ``rank`` ranks. Its parameters are new ones: so must the optimizer be.

    Raises: SpaceError: it has fewer ranks; or masks, quantisers or adapters, which have the size of the old factors.
    """
    if not 1 <= rank <= layer.rank:
        raise SpaceError(f"a layer of rank {layer.rank} cannot be cut to rank {rank}: give 1 to {layer.rank}")
    if isinstance(layer.first, Transformed) or isinstance(layer.second, Transformed):
        raise SpaceError("the factors are masked, quantised or adapted already: cut the layer before that")
    groups, first, second = layer.groups, layer.first, layer.second
    assert isinstance(first.weight, Tensor) and isinstance(second.weight, Tensor)
    rows = first.weight.detach().reshape(groups, layer.rank, *first.weight.shape[1:])[:, :rank]
    columns = second.weight.detach()[:, :rank]
    first.weight = nn.Parameter(rows.flatten(0, 1).clone(), first.weight.requires_grad)
    second.weight = nn.Parameter(columns.clone(), second.weight.requires_grad)
    if isinstance(first, nn.Linear):
        first.out_features = second.in_features = rank  # type: ignore[assignment]
    else:
        first.out_channels = second.in_channels = groups * rank  # type: ignore[assignment]
    return layer


# ---- Cuttlefish (Wang et al., MLSys 2023) -----------------------------------------------------------------------


def stable_rank(weight: Tensor, tolerance: float = 1e-6, steps: int = 1000) -> float:
    """``sum_i s_i^2 / s_max^2`` of the matrix ``(out, the rest)``: 1 for a single direction, full rank if all equal.

    The sum is the squared Frobenius norm; ``s_max`` is found by power iteration, until it moves by less than the share
    ``tolerance`` or after ``steps``. A matrix of zeros has stable rank 0.
    """
    matrix = weight.detach().flatten(1).double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    x = torch.randn(len(gram), generator=torch.Generator().manual_seed(0), dtype=gram.dtype).to(gram.device)
    largest = 0.0  # s_max^2
    for _ in range(steps):
        x = gram @ x
        before, largest = largest, float(x.norm())
        if largest == 0.0:
            return 0.0
        x = x / largest
        if abs(largest - before) <= tolerance * largest:
            break
    return float(matrix.square().sum()) / largest


class StableRanks:
    """When to factorise which layers, and to what rank: watch a model while it is trained at full rank.

    A layer's rank is its stable rank, times the factor that would have given full rank at the start:
    ``r = full * stable / stable at the start``. A layer is settled when its stable rank hardly moves any more.

    Args:
        layers: by name, before training: layers with a ``weight``.
        window: epochs over which the change per epoch is averaged.
        threshold: a layer is settled when that change is at most this.

    Raises: ValueError: a weight is all zero, so that nothing can be a share of it.
    """

    def __init__(self, layers: Mapping[str, nn.Module], window: int = 5, threshold: float = 0.1) -> None:
        self.layers, self.window, self.threshold = dict(layers), window, threshold
        self.history = {name: [stable_rank(layer.weight)] for name, layer in layers.items()}  # type: ignore[arg-type]
        for name, (start,) in self.history.items():
            if start == 0.0:
                raise ValueError(f"the weight of '{name}' is all zero: leave this layer out")

    def observe(self) -> None:
        """To be called after each epoch."""
        for name, layer in self.layers.items():
            self.history[name].append(stable_rank(layer.weight))  # type: ignore[arg-type]

    def settled(self, name: str) -> bool:
        """Whether the stable rank of layer ``name`` has come to rest."""
        past = self.history[name]
        return len(past) > self.window and abs(past[-1] - past[-1 - self.window]) / self.window <= self.threshold

    def rank(self, name: str) -> int:
        """The rank for layer ``name`` now, for ``LowRank(name, rank=...)``."""
        full, past = full_rank(self.layers[name]), self.history[name]
        return min(full, max(1, round(full * past[-1] / past[0])))


def expected_stable_rank(rows: int, columns: int) -> float:
    """Of a large matrix of independent entries: ``mn / (sqrt(m) + sqrt(n))^2`` (Marchenko & Pastur, 1967).

    In place of the stable rank at the start, for a model whose start nobody has kept.
    """
    return rows * columns / (math.sqrt(rows) + math.sqrt(columns)) ** 2


# ---- Trained rank pruning (Xu et al., IJCAI 2020) ---------------------------------------------------------------


def energy_rank(singular_values: Tensor, energy: float) -> int:
    """The fewest leading singular values whose squares hold the share ``energy`` of all; at least 1."""
    squares = singular_values.double().square()
    held = squares.cumsum(0) / squares.sum().clamp_min(1e-300)
    return min(len(squares), 1 + int((held < energy - 1e-12).sum()))


class TrainedRankPruning:
    """Weights that stay near low rank while they are trained at full size.

    Between ``loss.backward()`` and ``optimizer.step()`` call :meth:`add_gradient`, after the step :meth:`after_step`::

        gradient += nuclear * U V^T                                  each step: the nuclear norm's sub-gradient
        W <- its first singular values that hold ``energy``          every ``every`` steps

    At the end :meth:`rank` is the rank for ``LowRank``, which then loses nothing.

    Args:
        layers: by name, linear layers and convolutions of one group; matrices are ``(out, the rest)``.
        energy: share of the squared singular values that is kept.
        every: steps between two truncations.
        nuclear: weight of the nuclear norm.
    """

    def __init__(self, layers: Mapping[str, nn.Module], every: int, energy: float = 0.9, nuclear: float = 3e-4) -> None:
        if not (0.0 < energy <= 1.0 and every >= 1 and nuclear >= 0.0):
            raise ValueError(f"energy {energy} in (0, 1], every {every} of at least 1, nuclear {nuclear} of at least 0")
        self.weights: dict[str, nn.Parameter] = {name: layer.weight for name, layer in layers.items()}  # type: ignore[misc]
        self.every, self.energy, self.nuclear, self.steps = every, energy, nuclear, 0

    def add_gradient(self) -> None:
        """Add the sub-gradient of ``nuclear * sum of singular values`` to each gradient."""
        for weight in self.weights.values():
            if weight.grad is not None and self.nuclear:
                weight.grad += self.nuclear * nuclear_subgradient(weight.detach())

    def after_step(self) -> None:
        """Truncate, if it is time."""
        self.steps += 1
        if self.steps % self.every == 0:
            self.truncate()

    def truncate(self) -> None:
        """Put in place of each weight the nearest matrix of :meth:`rank`."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
                r = self.rank(name)
                weight.copy_((u[:, :r] * s[:r] @ v[:r]).view_as(weight))

    def rank(self, name: str) -> int:
        """How many singular values of layer ``name`` hold ``energy`` now."""
        return energy_rank(torch.linalg.svdvals(self.weights[name].detach().flatten(1)), self.energy)


def nuclear_subgradient(weight: Tensor) -> Tensor:
    """``U V^T`` over the singular values that are not zero: a sub-gradient of their sum. Shape as ``weight``."""
    u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    there = s > s[:1] * max(weight.flatten(1).shape) * torch.finfo(s.dtype).eps
    product: Tensor = (u * there) @ v
    return product.view_as(weight)
