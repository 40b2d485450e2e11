"""Ranks for the layers of one model by a single training run: where to start a search, or what to hold it against.

``with_gates`` gives every adapter more rank than it will keep and a number for each of its components; an allocator
takes components away while :func:`allocate` trains. What is left, ``{layer: rank}``, is an architecture of the space
(:func:`architecture`), to be enqueued or trained from its start; :mod:`nasgraph.allocation.rank_starts` makes several
of one training. :func:`linear_schedule` needs no training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasgraph.errors import SpaceError
from nasgraph.space import Architecture, Choice, Label, SearchSpace
from nasgraph.tasks.batch import Batch
from nasgraph.transforms.adapters import LoraLinear, uniform_
from nasgraph.transforms.layers import rewritten_layers
from nasgraph.transforms.lora import NAME, adapters


class GatedLora(LoraLinear):
    """``scale * B diag(g) A x``: g is the Lambda of AdaLoRA, the gate of SoRA, the c of dynamic-rank DoRA.

    It adds 0 at the start: B is 0 and g is ``gate``, or, where ``gate`` is 0, g is 0 and B is random.
    """

    def __init__(self, layer: nn.Linear, rank: int, scale: float, dropout: float = 0.0, gate: float = 0.0) -> None:
        super().__init__(layer, rank, scale, dropout)
        self.g = self.parameter("g", rank)
        nn.init.constant_(self.g, gate)
        if gate == 0:
            self.zero = "g"
            uniform_(self.B, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(self.dropped(x), self.A) * self.g, self.B) * self.scale

    def delta(self) -> Tensor:
        """``scale * B diag(g) A``."""
        return (self.B * self.g) @ self.A * self.scale


def with_gates(model: nn.Module, gate: float = 0.0) -> nn.Module:
    """Swap the plain adapters of linear layers for new ones with gates, in place. ``gate``: where g starts.

    Raises: SpaceError: there is none.
    """
    plain = {name: adapter for name, adapter in adapters(model).items() if type(adapter) is LoraLinear}
    if not plain:
        raise SpaceError("no plain adapter beside a linear layer: rewrite the model with Lora(...) first")
    for name, old in plain.items():
        layer = rewritten_layers(model)[name]
        assert isinstance(layer, nn.Linear)
        layer.beside[NAME] = GatedLora(layer, old.rank, float(old.scale), old.dropout, gate)
    return model


def gates(model: nn.Module) -> dict[str, GatedLora]:
    """The gated adapters, by the names of their layers."""
    return {name: adapter for name, adapter in adapters(model).items() if isinstance(adapter, GatedLora)}


# ---- what is common -------------------------------------------------------------------------------------------------


class Allocator(Protocol):
    """Takes components away while a model trains; made with the model, whose adapters have gates."""

    def penalty(self) -> Tensor:
        """Added to the loss."""
        ...

    def observe(self) -> None:
        """Called when gradients are there, before the optimizer's step."""
        ...

    def prune(self, step: int) -> None:
        """Called after the optimizer's step number ``step``, from 1."""
        ...


def allocate(
    model: nn.Module,
    allocator: Allocator,
    batches: Iterable[Batch],
    lr: float = 0.01,
    weight_decay: float = 0.0,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Train what ``model`` lets train on ``batches``, one step each, with Adam; then count what is left.

    Dropout draws from torch's global generator. ``on_step`` is called with the number of each step, from 1, when its
    components are taken away. Returns: the rank of each layer.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    model.train()
    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        (batch.loss(model) + allocator.penalty()).backward()  # type: ignore[no-untyped-call]
        allocator.observe()
        optimizer.step()
        allocator.prune(step)
        if on_step is not None:
            on_step(step)
    return ranks(model)


def ranks(model: nn.Module) -> dict[str, int]:
    """How many components of each gated adapter have a gate that is not 0."""
    return {name: int((adapter.g != 0).sum()) for name, adapter in gates(model).items()}


def cubic(step: int, start: int, end: int, first: int, last: int) -> int:
    """A budget that falls from ``first`` (until step ``start``) to ``last`` (from ``end``), fast and then slowly.

    ``last + (first - last) * (1 - (step - start) / (end - start)) ** 3`` (Zhu & Gupta 2017), rounded.
    """
    if step < start:
        return first
    if step >= end:
        return last
    return round(last + (first - last) * (1 - (step - start) / (end - start)) ** 3)


def keep_best(scores: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
    """Which entries are among the ``budget`` largest of all, as masks. All of them, or none, are possible budgets.

    Ties go to the entries that come first.
    """
    every = torch.cat(list(scores.values()))
    mask = torch.zeros(len(every), dtype=torch.bool, device=every.device)
    mask[every.argsort(descending=True, stable=True)[: max(budget, 0)]] = True
    parts = mask.split([len(score) for score in scores.values()])  # type: ignore[no-untyped-call]
    return dict(zip(scores, parts, strict=True))


def architecture(
    space: SearchSpace, ranks: Mapping[str, int], choice: str = "rank.{name}", seed: int = 0
) -> Architecture:
    """The architecture of ``space`` whose choices ``choice`` have the option nearest to ``ranks``, the lower of two.

    Choices that no layer names are drawn from ``seed``. Raises: SpaceError: a layer has no such choice.
    """
    wanted = {}
    for name, rank in ranks.items():
        called = choice.replace("{name}", name)
        if called not in space.choices:
            raise SpaceError(f"space '{space.name}' has no choice '{called}' for the rank of '{name}'")
        wanted[called] = nearest(space.choices[called], rank)
    return space.architecture({**space.sample(random.Random(seed)), **wanted})


def nearest(choice: Choice, rank: float) -> Label:
    """The option nearest to ``rank``, the lower of two."""
    return min(choice.labels, key=lambda label: (abs(float(label or 0) - rank), float(label or 0)))


# ---- the methods ------------------------------------------------------------------------------------------------


class AdaLora:
    """Importance of each component, with its uncertainty (Zhang et al., AdaLoRA, ICLR 2023).

    Of every weight ``I = |w dw|``; ``I_mean`` and ``U = |I - I_mean|`` are moving averages, ``s = I_mean * U_mean``. A
    component's score is ``s(g_k) + mean s(A_k) + mean s(B_k)``. The gates of all but the best ``b(step)`` of the model
    are set to 0; they still learn, so they may come back while the budget falls.

    Args:
        budget: components left in the end, in all layers.
        steps: of the whole run; the budget falls from ``start`` to ``end``, shares of it.
        smooth: of the two averages.
        orthogonal: weight of ``|A A^T - 1|^2 + |B^T B - 1|^2``, mean over layers.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: int,
        steps: int,
        start: float = 0.1,
        end: float = 0.7,
        smooth: tuple[float, float] = (0.85, 0.85),
        orthogonal: float = 0.1,
    ) -> None:
        self.adapters, self.budget, self.smooth, self.orthogonal = gates(model), budget, smooth, orthogonal
        self.first = sum(adapter.rank for adapter in self.adapters.values())
        self.start, self.end = round(start * steps), round(end * steps)
        self.mean: dict[tuple[str, str], Tensor] = {}
        self.spread: dict[tuple[str, str], Tensor] = {}

    def penalty(self) -> Tensor:
        """See the class."""
        parts = []
        for adapter in self.adapters.values():
            one = torch.eye(adapter.rank, device=adapter.A.device, dtype=adapter.A.dtype)
            parts.append((adapter.A @ adapter.A.T - one).square().sum())
            parts.append((adapter.B.T @ adapter.B - one).square().sum())
        return self.orthogonal * torch.stack(parts).sum() / len(self.adapters)

    def observe(self) -> None:
        """Update the averages."""
        for name, adapter in self.adapters.items():
            for own, weight in (("g", adapter.g), ("A", adapter.A), ("B", adapter.B)):
                assert weight.grad is not None
                importance = (weight.detach() * weight.grad).abs()
                zeros = torch.zeros_like(importance)
                mean = self.mean.get((name, own), zeros).lerp(importance, 1 - self.smooth[0])
                spread = self.spread.get((name, own), zeros).lerp((importance - mean).abs(), 1 - self.smooth[1])
                self.mean[name, own], self.spread[name, own] = mean, spread

    def scores(self) -> dict[str, Tensor]:
        """Of each layer's components ``(rank,)``."""
        s = {key: self.mean[key] * self.spread[key] for key in self.mean}
        return {name: s[name, "g"] + s[name, "A"].mean(1) + s[name, "B"].mean(0) for name in self.adapters}

    def prune(self, step: int) -> None:
        """Set gates to 0 until the budget of this step holds."""
        budget = cubic(step, self.start, self.end, self.first, self.budget)
        with torch.no_grad():
            for name, mask in keep_best(self.scores(), budget).items():
                self.adapters[name].g.mul_(mask)


class Sora:
    """A sparse gate by proximal gradient steps (Ding et al., SoRA, EMNLP 2023).

    After each step ``g <- softshrink(g, lr * strength)``, the proximal step of ``strength * |g|_1``. ``strength`` rises
    linearly from 0 over the first ``warm_up`` steps. For gates that start above 0. A step of Adam is at most about
    ``lr``, so with a strength of 1 or more every gate goes to 0.
    """

    def __init__(self, model: nn.Module, strength: float, lr: float, warm_up: int = 0) -> None:
        self.adapters, self.strength, self.lr, self.warm_up = gates(model), strength, lr, warm_up

    def penalty(self) -> Tensor:
        """None: the proximal step is exact."""
        return torch.zeros(())

    def observe(self) -> None:
        """Nothing to see."""

    def prune(self, step: int) -> None:
        """The proximal step."""
        strength = self.strength * min(1.0, step / self.warm_up) if self.warm_up else self.strength
        with torch.no_grad():
            for adapter in self.adapters.values():
                adapter.g.copy_(F.softshrink(adapter.g, self.lr * strength))


class DynamicRank:
    """Components by their share of the update's norm (Mao et al., DoRA: dynamic rank distribution, ACL 2024).

    ``|g_k| |b_k| |a_k| / |sum_k g_k b_k a_k^T|``, smoothed. The least of the model lose their gate for good, every
    ``every`` steps from ``start`` to ``end`` (shares of ``steps``), as many as the cubic budget asks for, so perhaps
    none. Not the weight-decomposed DoRA. The share is of its own layer's update, so the last component of a layer has
    1: layers that learn nothing keep some rank.

    Args:
        budget: components left in the end, in all layers.
        even: weight of the mean variance within rows of A and columns of B.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: int,
        steps: int,
        start: float = 0.15,
        end: float = 0.5,
        every: int = 100,
        smooth: float = 0.9,
        even: float = 0.1,
    ) -> None:
        self.adapters, self.budget, self.every, self.smooth, self.even = gates(model), budget, every, smooth, even
        self.first = sum(adapter.rank for adapter in self.adapters.values())
        self.start, self.end = round(start * steps), round(end * steps)
        self.score = {name: torch.zeros_like(adapter.g.detach()) for name, adapter in self.adapters.items()}
        self.alive = {name: torch.ones_like(adapter.g, dtype=torch.bool) for name, adapter in self.adapters.items()}

    def penalty(self) -> Tensor:
        """See the class."""
        parts = [a.A.var(1).mean() + a.B.var(0).mean() for a in self.adapters.values()]
        return self.even * torch.stack(parts).mean()

    def observe(self) -> None:
        """Update the averages."""
        for name, adapter in self.adapters.items():
            self.score[name] = self.score[name].lerp(norm_shares(adapter), 1 - self.smooth)

    def prune(self, step: int) -> None:
        """Take components away when it is time; those taken away before stay at 0."""
        if self.start <= step and (step % self.every == 0 or step == self.end) and step <= self.end:
            budget = cubic(step, self.start, self.end, self.first, self.budget)
            living = {name: score.masked_fill(~self.alive[name], -1.0) for name, score in self.score.items()}
            kept = keep_best(living, budget)
            self.alive = {name: alive & kept[name] for name, alive in self.alive.items()}
        with torch.no_grad():
            for name, adapter in self.adapters.items():
                adapter.g.mul_(self.alive[name])


def norm_shares(adapter: GatedLora) -> Tensor:
    """``|g_k b_k a_k^T| / |sum_k g_k b_k a_k^T|``, Frobenius norms ``(rank,)``; 0 where the sum is 0.

    Without making the matrices: ``|b a^T| = |b| |a|``, and the sum's norm follows from the products among the b and a.
    """
    a, b, g = adapter.A.detach(), adapter.B.detach(), adapter.g.detach()
    one = g.abs() * b.norm(dim=0) * a.norm(dim=1)
    total = (torch.outer(g, g) * (b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt()
    return one / total if total > 0 else torch.zeros_like(one)


def linear_schedule(layers: Sequence[str], first: float, last: float) -> dict[str, int]:
    """Ranks that change linearly with depth, by two numbers (Benedek & Wolf, PRILoRA, EACL 2024).

    ``layers`` are in the order of depth; layer l of L has ``first + (last - first) * l / (L - 1)``, rounded half up.
    """
    steps = max(len(layers) - 1, 1)
    return {name: int(first + (last - first) * i / steps + 0.5) for i, name in enumerate(layers)}
