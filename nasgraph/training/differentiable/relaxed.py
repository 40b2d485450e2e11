"""What all methods share: architecture parameters, the two batches, the update that stops at NaN, the decision."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nasgraph.errors import NotFinite, SpaceError
from nasgraph.space import TRIES, Architecture, Choice, Label, Node, Op, SearchSpace
from nasgraph.training.differentiable.mixture import index_of
from nasgraph.training.loop import TrainSettings, _optimizer
from nasgraph.training.shared import ALL, _all_finite, _seed

if TYPE_CHECKING:
    from nasgraph.supernet import Supernet
    from nasgraph.tasks.base import Task
    from nasgraph.tasks.batch import Batch

Fixed = Mapping[str, Label]
OnStep = Callable[[int, Sequence[float]], None]
Losses = tuple[float, float]

SAME = 1e-5  # of the largest: gradients that differ less say nothing


@dataclass(frozen=True)
class Relaxed:
    """What a differentiable search found.

    Attributes:
        architecture: the most probable one that meets the space's constraints, choice by choice.
        probabilities: of each choice of the space, also of those that the architecture does not ask. A choice that the
            method does not learn, or that no gradient reached, has equal ones; then its first option was taken.
        history: per step the training loss and the validation loss of what that step ran, in nats; NaN for what it did
            not run: the weights of a method that trains none, the alphas during ``warmup``.
    """

    architecture: Architecture
    probabilities: dict[str, dict[Label, float]]
    history: list[Losses] = field(default_factory=list, repr=False)


class Parameters:
    """One vector of architecture parameters for each choice with more than one label that is searched, in float64.

    Raises: SpaceError: ``fixed`` names a choice or label that the space does not have.
    """

    def __init__(self, supernet: Supernet, fixed: Fixed, searched: Callable[[Choice], bool] = lambda _: True) -> None:
        space, device = supernet.space, supernet.device
        self.fixed = {name: index_of(space, name, label) for name, label in fixed.items()}
        self.labels = {name: choice.labels for name, choice in space.choices.items()}
        self.of = {
            name: torch.zeros(len(choice.labels), dtype=torch.float64, device=device, requires_grad=True)
            for name, choice in space.choices.items()
            if name not in fixed and len(choice.labels) > 1 and searched(choice)
        }

        self.start = {name: values.detach().clone() for name, values in self.of.items()}

    def scatter(self, size: float, seed: int) -> Parameters:
        """Begin with normal numbers of this standard deviation; returns itself."""
        generator = torch.Generator().manual_seed(seed)
        for values in self.of.values():
            values.data = size * torch.randn(len(values), generator=generator, dtype=values.dtype).to(values.device)
        self.start = {name: values.detach().clone() for name, values in self.of.items()}
        return self

    def complete(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``weights`` of the searched choices, one-hot of the fixed ones, uniform of the rest."""
        found: dict[str, Tensor] = {}
        device = next((values.device for values in self.of.values()), None)
        for name, labels in self.labels.items():
            if name in weights:
                found[name] = weights[name]
            elif name in self.fixed:
                found[name] = one_hot(self.fixed[name], len(labels), device)
            else:
                found[name] = torch.full((len(labels),), 1 / len(labels), dtype=torch.float64, device=device)
        return found

    def relaxed(self, space: SearchSpace, weights: Mapping[str, Tensor], history: list[Losses]) -> Relaxed:
        """The result, with the probabilities ``weights`` of the searched choices; uniform where nothing moved."""
        moved = {name: w.detach() for name, w in weights.items() if not torch.equal(self.of[name], self.start[name])}
        probabilities = {
            name: dict(zip(self.labels[name], values.tolist(), strict=True))
            for name, values in self.complete(moved).items()
        }
        return Relaxed(most_probable(space, probabilities), probabilities, history)


def one_hot(index: int, size: int, device: torch.device | None = None) -> Tensor:
    """``(size,)`` zeros with a 1, float64."""
    found = torch.zeros(size, dtype=torch.float64, device=device)
    found[index] = 1
    return found


def softmaxed(alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The softmax of each."""
    return {name: F.softmax(values, dim=0) for name, values in alphas.items()}


def ranked(space: SearchSpace, probabilities: Mapping[str, Mapping[Label, float]]) -> Iterator[Architecture]:
    """Architectures, the most probable first: by the product over the active choices of p(label) / max p.

    Constraints are not looked at. Of equally probable labels the one that is declared first comes first.
    """
    order = {
        name: sorted(range(len(choice.labels)), key=lambda i, p=probabilities[name], c=choice: -p[c.labels[i]])  # type: ignore[misc]
        for name, choice in space.choices.items()
    }

    def cost(name: str, rank: int) -> float:
        p = [probabilities[name][space.choices[name].labels[i]] for i in (order[name][0], order[name][rank])]
        return math.log(max(p[0], 1e-300)) - math.log(max(p[1], 1e-300))

    heap: list[tuple[float, int, tuple[tuple[str, int], ...]]] = [(0.0, 0, ())]  # what is not of rank 0
    seen: set[tuple[tuple[str, int], ...]] = {()}
    told: set[Architecture] = set()
    count = 0
    while heap:
        spent, _, ranks = heapq.heappop(heap)
        now = dict(ranks)
        found = space.decide(lambda c, now=now: c.labels[order[c.name][now.get(c.name, 0)]])  # type: ignore[misc]
        if found not in told:
            told.add(found)
            yield found
        for name in found:
            rank = now.get(name, 0)
            if rank + 1 < len(order[name]):
                after = tuple(sorted({**now, name: rank + 1}.items()))
                if after not in seen:
                    seen.add(after)
                    count += 1
                    heapq.heappush(heap, (spent + cost(name, rank + 1) - cost(name, rank), count, after))


def most_probable(space: SearchSpace, probabilities: Mapping[str, Mapping[Label, float]]) -> Architecture:
    """The first of :func:`ranked` that meets the constraints, among the first 1,000; else the best of 1,000 drawn.

    Raises: SpaceError: none does.
    """
    for found, _ in zip(ranked(space, probabilities), range(TRIES), strict=False):
        if not space.violated(found):
            return found
    rng = random.Random("most probable")

    def draw(choice: Choice) -> Label:
        return rng.choices(choice.labels, [probabilities[choice.name][label] for label in choice.labels])[0]

    drawn = (space.decide(draw) for _ in range(TRIES))
    allowed = [found for found in drawn if not space.violated(found)]
    if not allowed:
        raise SpaceError(
            f"none of the {TRIES:,} most probable architectures of '{space.name}' meets its constraints, and none of "
            f"{TRIES:,} drawn: loosen them"
        )
    return max(allowed, key=lambda a: sum(math.log(max(probabilities[c][label], 1e-300)) for c, label in a.items()))


# ---- the two batches ----------------------------------------------------------------------------------------------


class Batches:
    """The training batch and the validation batch of each step.

    The validation batch is ``task.split("val")`` where the task has ``split``; else, in turn, one of
    ``task.batches("val")`` where it has those. A task with neither gives another draw of training samples, which may
    have samples in common with those that the weights see; with ``samples=None`` it is the same batch.

    Args:
        samples: of training, per step; default: all of them at once.
    """

    def __init__(self, task: Task, samples: int | None, seed: int) -> None:
        self.task, self.samples, self.seed = task, samples, seed
        self._whole: dict[str, Batch] = {}
        self._parts: list[Batch] = []

    def train(self, step: int) -> Batch:
        """What the weights learn from."""
        if self.samples is None:
            return self._once("train", lambda: self.task.batch(ALL, self.seed))
        return self.task.batch(self.samples, _seed(self.seed, step))

    def val(self, step: int) -> Batch:
        """What the architecture parameters learn from."""
        split, batches = (getattr(self.task, name, None) for name in ("split", "batches"))
        if split is not None:
            return self._once("val", lambda: split("val"))
        if batches is not None:
            self._parts = self._parts or list(batches("val"))
            return self._parts[step % len(self._parts)]
        return self.train(step) if self.samples is None else self.task.batch(self.samples, _seed(self.seed, -1 - step))

    def _once(self, name: str, make: Callable[[], Batch]) -> Batch:
        if name not in self._whole:
            self._whole[name] = make()
        return self._whole[name]


# ---- updates ------------------------------------------------------------------------------------------------------


def gradients(loss: Tensor, tensors: Mapping[str, Tensor], step: int, what: str) -> dict[str, Tensor]:
    """Of ``loss`` with respect to each tensor that it depends on. Raises: NotFinite: names the step."""
    if not math.isfinite(float(loss.detach())):
        raise NotFinite(f"step {step}: the {what} loss is {float(loss.detach())}; the step was not taken")
    live = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    if not live or not loss.requires_grad:
        return {}
    found = torch.autograd.grad(loss, list(live.values()), allow_unused=True)
    kept = {name: grad for name, grad in zip(live, found, strict=True) if grad is not None}
    if not _all_finite(list(kept.values())):
        raise NotFinite(f"step {step}: a gradient of the {what} loss is not finite; the step was not taken")
    return kept


def preferences(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of weights that prefer one label of a choice to another.

    Labels that make the same network (dropout rates, when dropout is off) have equal gradients up to rounding, and an
    optimizer that scales gradients would turn the rounding into steps.
    """
    return {
        name: grad
        for name, grad in grads.items()
        if float((grad - grad.mean()).abs().max()) > SAME * float(grad.abs().max())
    }


def backward_through(weights: Mapping[str, Tensor], grads: Mapping[str, Tensor], alphas: Mapping[str, Tensor]) -> None:
    """Put the gradients of ``weights`` into ``.grad`` of the architecture parameters that they were made of."""
    for values in alphas.values():
        values.grad = None
    for name, grad in preferences(grads).items():
        if name in alphas and weights[name].requires_grad:
            (alphas[name].grad,) = torch.autograd.grad(weights[name], [alphas[name]], grad, retain_graph=True)


class WeightSteps:
    """Updates of the store by an optimizer of its own."""

    def __init__(self, supernet: Supernet, settings: TrainSettings | None) -> None:
        self.store = {str(i): parameter for i, parameter in enumerate(supernet.parameters())}
        self.optimizer = _optimizer(list(self.store.values()), settings or TrainSettings())

    def take(self, loss: Tensor, step: int) -> float:
        """One update; none if something is not finite. Returns: the loss."""
        grads = gradients(loss, self.store, step, "training")
        for name, parameter in self.store.items():
            parameter.grad = grads.get(name)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


@contextmanager
def drawn_from(supernet: Supernet, seed: int) -> Iterator[None]:
    """Random numbers from ``seed``; the caller's generators are left as they were."""
    cuda = [supernet.device.index or 0] if supernet.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield


# ---- sampling -----------------------------------------------------------------------------------------------------


def gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel noise of the shape of ``like``, from the default generator."""
    return -torch.log(-torch.log(torch.rand_like(like).clamp(1e-20, 1 - 1e-12)))


def pair(logits: Tensor) -> Tensor:
    """Two different places, drawn one after the other without replacement by the softmax (the Gumbel top-2)."""
    return (logits.detach() + gumbel(logits)).topk(2).indices


def active(space: SearchSpace, labels: Mapping[str, Label]) -> Architecture:
    """The architecture that ``labels`` of all choices make."""
    return space.decide(lambda choice: labels[choice.name])


def surrogate_cost(
    space: SearchSpace,
    cost: Callable[[Architecture], float],
    path: Mapping[str, Label],
    shares: Mapping[str, Mapping[Label, Tensor]],
) -> Tensor:
    """A cost whose value is that of ``path`` and whose gradient is that of ``sum_i share_i cost_i``, choice by choice.

    ``cost_i`` is the cost of the path with label ``i`` in place of its own, so any function of an architecture will do.
    Over paths drawn by the shares, the gradient's mean is that of the expected cost. A label that breaks a constraint
    has the cost of the path: it may have none of its own.

    Args:
        shares: of each choice the differentiable probabilities of the labels that are open.
    """
    found = active(space, path)
    total = torch.tensor(float(cost(found)), dtype=torch.float64)
    for name in found:
        for label, share in shares.get(name, {}).items():
            other = active(space, {**path, name: label})
            price = float(cost(found if space.violated(other) else other))
            total = total.to(share.device) + (share - share.detach()) * price
    return total


def temperature(ends: tuple[float, float], step: int, steps: int) -> float:
    """Linear from the first to the last."""
    first, last = ends
    return first + (last - first) * step / max(1, steps - 1)


def chooses_parts(choice: Choice) -> bool:
    """Whether it chooses between operations or nodes, not between values."""
    return any(isinstance(option, Op | Node | Choice) for option in choice.options)


def alpha_optimizer(alphas: Parameters, lr: float, decay: float) -> torch.optim.Optimizer:
    """Adam as in DARTS."""
    values = list(alphas.of.values()) or [torch.zeros(1, requires_grad=True)]
    return torch.optim.Adam(values, lr=lr, betas=(0.5, 0.999), weight_decay=decay)
