"""Where a supernet is split: how far apart the options of a choice are, and the two groups that keep most apart.

Far apart are options that pull the parameters that they share in different directions (Hu et al., Generalizing
Few-Shot NAS with Gradient Matching, ICLR 2022), or whose feature maps differ in local intrinsic dimension (He et al.,
NAS-LID, AAAI 2023).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from nasgraph.declare import choices_in
from nasgraph.errors import NotFinite, SpaceError
from nasgraph.space import TRIES, Architecture, Choice, Label, Op, SearchSpace
from nasgraph.supernet import Supernet, recalibrate

if TYPE_CHECKING:
    from nasgraph.tasks.batch import Batch

LARGEST = 20  # options of a choice whose groupings are all tried
ROWS = 256  # points whose intrinsic dimension is measured, at most

Measure = Callable[[Supernet, Sequence[Architecture], "Batch", frozenset[str], int], Tensor]
"""``(supernet, architectures, batch, own, seed)`` -> distances ``(n, n)`` of ``n`` architectures that differ in one
choice; ``own`` are the nodes that this choice decides."""


# ---- how far apart options are ----------------------------------------------------------------------------------


def gradient_distances(
    supernet: Supernet, architectures: Sequence[Architecture], batch: Batch, own: frozenset[str], seed: int
) -> Tensor:
    """``1 - cos`` of the loss gradients of the shared parameters, those of all nodes but ``own`` (GM-NAS).

    All see the same batch, in training mode, and dropout drawn from the same ``seed``. A parameter that an architecture
    does not have has gradient zero there.

    Shapes: ``n`` architectures -> ``(n, n)``, float64.
    Raises: NotFinite: a loss or a gradient is NaN or infinite; names the architecture.
    """
    shared = list({id(p): p for key, p in supernet.store.items() if key[0] not in own}.values())
    found = []
    for architecture in architectures:
        cuda = [supernet.device.index or 0] if supernet.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)
            loss = batch.loss(supernet.subnet(architecture).train())
        without = (None,) * len(shared)  # nothing before the loss has a parameter, or it shares none
        some = bool(shared) and loss.requires_grad
        found.append(torch.autograd.grad(loss, shared, allow_unused=True) if some else without)
    products = torch.zeros(len(found), len(found), dtype=torch.float64)
    for column, parameter in zip(zip(*found, strict=True), shared, strict=True):
        if any(gradient is not None for gradient in column):
            rows = torch.stack([torch.zeros_like(parameter) if g is None else g for g in column]).flatten(1).double()
            products += (rows @ rows.T).cpu()
    return _cosine_distances(products, architectures)


def lid_distances(
    supernet: Supernet, architectures: Sequence[Architecture], batch: Batch, own: frozenset[str], seed: int, k: int = 20
) -> Tensor:
    """``1 - cos`` of the profiles of local intrinsic dimension: its mean over samples, of each layer (NAS-LID).

    Layers are the modules that all architectures have, and the output. They run as in evaluation, with the batch's
    statistics in BatchNorm. Samples are those of the batch; of a tensor with other rows (nodes of several graphs) its
    first 256 rows.

    Args:
        k: neighbours, see :func:`lid`; fewer if there are not so many samples.

    Shapes: ``n`` architectures -> ``(n, n)``, float64.
    Raises: NotFinite: a feature is NaN or infinite; names the architecture.
    """
    profiles = [_profile(supernet, architecture, batch, k) for architecture in architectures]
    layers = [name for name in profiles[0] if all(name in profile for profile in profiles)]
    rows = torch.tensor([[profile[name] for name in layers] for profile in profiles], dtype=torch.float64)
    return _cosine_distances(rows @ rows.T, architectures)


MEASURES: dict[str, Measure] = {"gradients": gradient_distances, "lid": lid_distances}


def lid(points: Tensor, k: int = 20) -> Tensor:
    """Local intrinsic dimension at each point: ``-k / sum_i log(r_i / r_k)`` over its ``k`` nearest neighbours.

    ``r_i`` is the distance to the i-th of them (the maximum-likelihood estimate of Levina & Bickel 2004, with the ``k``
    of Amsaleg et al. 2015 in place of their ``k - 1``). Copies of a point are no neighbours of it: at distance zero the
    logarithm has no value. A point without two others has dimension 0; one whose neighbours are all equally far has
    that of the space around it.

    Shapes: ``(n, d)`` -> ``(n,)``, float64.
    """
    points = points.double()
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    near = distances.masked_fill(distances == 0, torch.inf).sort(dim=1).values[:, :k]
    count = near.isfinite().sum(dim=1, keepdim=True)
    farthest = near.gather(1, (count - 1).clamp(min=0))
    logs = torch.where(near.isfinite(), (near / farthest).log(), 0.0).sum(dim=1)
    values = torch.where(logs < 0, -count.squeeze(1) / logs, float(points.shape[1]))
    return torch.where(count.squeeze(1) >= 2, values, 0.0)


class _Recorder(fx.Interpreter):
    """Runs a network and keeps what its modules return."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.seen: dict[str, Tensor] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.seen[target] = super().call_module(target, args, kwargs)
        return self.seen[target]


def _profile(supernet: Supernet, architecture: Architecture, batch: Batch, k: int) -> dict[str, float]:
    recorder = _Recorder(recalibrate(supernet.extract(architecture), [batch]))  # type: ignore[arg-type]
    with torch.no_grad():
        recorder.seen["<output>"] = recorder.run(*batch.inputs)
    profile = {}
    for name, tensor in recorder.seen.items():
        samples = batch.index is not None and tensor.shape[0] == batch.inputs[0].shape[0]
        rows = (tensor[batch.index] if samples else tensor)[:ROWS]
        if not bool(rows.isfinite().all()):
            raise NotFinite(f"the output of '{name}' in {architecture.to_json()} is not finite")
        profile[name] = float(lid(rows.reshape(len(rows), -1), k).mean())
    return profile


def _cosine_distances(products: Tensor, architectures: Sequence[Architecture]) -> Tensor:
    """From inner products. A zero vector is at distance 1 from the others, at 0 from another zero."""
    for architecture, square in zip(architectures, products.diagonal(), strict=True):
        if not bool(square.isfinite()):
            raise NotFinite(f"the gradient of {architecture.to_json()} is not finite")
    norms = products.diagonal().sqrt()
    scale = norms[:, None] * norms[None, :]
    distances = torch.where(scale > 0, 1 - products / scale, 1.0)
    distances[(norms == 0)[:, None] & (norms == 0)[None, :]] = 0.0
    return distances.clamp(0.0, 2.0).fill_diagonal_(0.0)


# ---- where to split ---------------------------------------------------------------------------------------------


def bipartition(distances: Tensor, balanced: bool = False) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], float]:
    """Two groups with the smallest sum of distances within them; all are tried.

    Args:
        balanced: the groups' sizes differ by at most one.

    Shapes: distances ``(n, n)``, symmetric, ``n`` from 2 to 20.
    Returns: the groups, that of number 0 first, and the sum of the distances between them.
    Raises: SpaceError: too many options to try all.
    """
    n = len(distances)
    if not 2 <= n <= LARGEST:
        raise SpaceError(f"{n} options cannot be put into two groups: 2 to {LARGEST} can")
    best, between = 0, -1.0
    for start in range(1, 2 ** (n - 1), 2**14):
        codes = torch.arange(start, min(start + 2**14, 2 ** (n - 1)))
        other = ((codes[:, None] << 1) >> torch.arange(n)) & 1  # number 0 is never in the second group
        if balanced:
            codes, other = (tensor[(2 * other.sum(dim=1) - n).abs() <= 1] for tensor in (codes, other))
        if len(codes):
            second = other.to(distances.dtype)
            sums = ((1 - second) @ distances * second).sum(dim=1)
            if float(sums.max()) > between:
                best, between = int(codes[sums.argmax()]), float(sums.max())
    groups = [tuple(i for i in range(n) if (2 * best >> i) & 1 == side) for side in (0, 1)]
    return (groups[0], groups[1]), between


@dataclass(frozen=True)
class Split:
    """One split, for reports.

    Attributes:
        choice: its options were put into groups.
        groups: their labels.
        scores: of each choice that could have been split, the sum of the distances between its two best groups. That
            of ``choice`` is the largest. More options have more distances between them.
    """

    choice: str
    groups: tuple[tuple[Label, ...], tuple[Label, ...]]
    scores: dict[str, float]


def best_split(
    supernet: Supernet,
    space: SearchSpace,
    measure: Measure,
    done: Iterable[str] = (),
    repeats: int = 20,
    samples: int = 128,
    balanced: bool = False,
    seed: int = 0,
) -> Split:
    """The choice between operations of ``space`` (part of the supernet's) whose two groups are farthest apart.

    For each choice, ``repeats`` times: everything else is drawn at random, a batch of ``samples`` is drawn, each option
    is taken in turn, and their distances are measured; the mean counts. The groups are those of :func:`bipartition`.

    Args:
        done: choices that are not to be split (again).

    Raises: SpaceError: there is no choice left, or one has more than 20 options.
    """
    scores: dict[str, float] = {}
    groups: dict[str, tuple[tuple[Label, ...], tuple[Label, ...]]] = {}
    for choice in space.choices.values():
        own = frozenset(node for node, op in space._ops.items() if choice in choices_in(op))
        between_ops = len(choice.labels) > 1 and all(isinstance(option, Op) for option in choice.options)
        if not between_ops or choice.name in done or not any(key[0] not in own for key in supernet.store):
            continue
        total = torch.zeros(len(choice.labels), len(choice.labels), dtype=torch.float64)
        for i in range(repeats):
            alike = _alike(space, choice, random.Random(f"split/{seed}/{i}/{choice.name}"))
            if not alike:
                break
            step = random.Random(f"split/{seed}/{i}").getrandbits(31)
            total += measure(supernet, alike, supernet.task.batch(samples, step), own, step).cpu()
        else:
            (first, second), scores[choice.name] = bipartition(total / repeats, balanced)
            labels = choice.labels
            groups[choice.name] = tuple(labels[i] for i in first), tuple(labels[i] for i in second)
    if not scores:
        raise SpaceError(f"space '{space.name}' has no choice between operations left to split")
    best = max(scores, key=scores.__getitem__)
    return Split(best, groups[best], scores)


def _alike(space: SearchSpace, choice: Choice, rng: random.Random) -> list[Architecture]:
    """One architecture for each option of ``choice``, all else alike; none if constraints or the graph exclude that."""
    for _ in range(TRIES):
        labels = {other.name: rng.choice(other.labels) for other in space.choices.values()}
        found = [space.architecture({**labels, choice.name: label}) for label in choice.labels]
        if choice.name in found[0] and not any(space.violated(architecture) for architecture in found):
            return found
    return []
