"""First trials for ranks of adapters: one training with gates gives architectures of several sizes.

    rank_trials(space, network, reference, batches, "adalora", cost, n=4)

It begins with every adapter at its largest rank; the allocator takes components away until none is left, and what is
left after each step is an architecture of the space. ``n`` of these, at equal distances in cost, are trials to begin a
search with. They are starts, not results: the search trains them like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from torch import nn

from nasgraph.allocation.ranks import AdaLora, Allocator, DynamicRank, Sora, allocate, nearest, ranks, with_gates
from nasgraph.allocation.starts import Cost, Network, transform_ops
from nasgraph.errors import ConfigError, SpaceError, did_you_mean
from nasgraph.space import Architecture, Choice, Label, SearchSpace
from nasgraph.tasks.batch import Batch
from nasgraph.transforms.lora import Lora, adapters


@dataclass(frozen=True)
class Method:
    """An allocator that leaves nothing after ``steps``: where its gates start, and ``make(model, steps, lr)``."""

    gate: float
    make: Callable[[nn.Module, int, float], Allocator]


def _sora(model: nn.Module, steps: int, lr: float) -> Allocator:
    """With a strength that rises to twice what takes gates of 1 away, if every step of Adam moves them up by ``lr``."""
    return Sora(model, 4.0 + 4.0 / (lr * steps), lr, warm_up=steps)


ALLOCATORS: dict[str, Method] = {
    "adalora": Method(0.0, lambda model, steps, lr: AdaLora(model, 0, steps, end=1.0)),
    "dynamic_rank": Method(0.0, lambda model, steps, lr: DynamicRank(model, 0, steps, end=1.0, every=1)),
    "sora": Method(1.0, _sora),
}


def rank_choices(space: SearchSpace) -> list[str]:
    """Names of the choices that are ranks of :class:`~nasgraph.transforms.Lora`."""
    given = [op.kwargs.get("rank") for op in transform_ops(space) if issubclass(_class(op.make), Lora)]
    return list(dict.fromkeys(rank.name for rank in given if isinstance(rank, Choice)))


def rank_trials(
    space: SearchSpace,
    network: Network,
    architecture: Architecture,
    batches: Sequence[Batch],
    method: str,
    cost: Cost,
    n: int = 4,
    lr: float = 0.01,
) -> list[Architecture]:
    """``n`` of :func:`allocated`, or fewer, at equal distances in ``cost`` from the cheapest to the dearest.

    The ends themselves, no adapter and all at their largest, are left out.
    """
    return _spread(allocated(space, network, architecture, batches, method, lr), cost, n)


def allocated(
    space: SearchSpace,
    network: Network,
    architecture: Architecture,
    batches: Sequence[Batch],
    method: str,
    lr: float = 0.01,
) -> list[Architecture]:
    """What ``method`` leaves from step to step, from the largest ranks on; each architecture once.

    Every choice but the ranks is as in ``architecture``. A choice that several layers share has the option nearest to
    the mean of their ranks. Those that break a constraint of the space are left out.

    Args:
        network: makes the network of an architecture, on whose weights the gates are trained.
        batches: a step each.
        method: a name in :data:`ALLOCATORS`.
        lr: of Adam.

    Raises: ConfigError: an unknown method. SpaceError: no rank in ``architecture`` is a choice, or it is of an adapter
        that has no gates.
    """
    if method not in ALLOCATORS:
        raise ConfigError(
            f"unknown allocator {method!r}.{did_you_mean(method, ALLOCATORS)} Known: {', '.join(ALLOCATORS)}."
        )
    choices = [name for name in rank_choices(space) if name in architecture]
    if not choices:
        raise SpaceError(
            f"space '{space.name}' has no choice of a rank of Lora in this architecture: nothing to allocate"
        )
    full = space.architecture({**architecture, **{name: _options(space, name)[-1] for name in choices}})
    model = network(full)
    layers = _layers(space, network, full, model, choices)
    found = ALLOCATORS[method]
    allocator = found.make(with_gates(model, found.gate), len(batches), lr)
    left: dict[Architecture, None] = {full: None}

    def note(step: int) -> None:
        own = ranks(model)
        nearby = {name: nearest(space.choices[name], mean(own[each] for each in layers[name])) for name in choices}
        left.setdefault(space.architecture({**architecture, **nearby}))

    allocate(model, allocator, batches, lr, on_step=note)
    return [each for each in left if not space.violated(each)]


def _layers(
    space: SearchSpace, network: Network, full: Architecture, model: nn.Module, choices: Iterable[str]
) -> dict[str, list[str]]:
    """By choice, the layers whose rank it decides: those whose adapter differs when it does."""
    sizes = {name: adapter.rank for name, adapter in adapters(model).items()}
    found: dict[str, list[str]] = {}
    for name in choices:
        lower = adapters(network(space.architecture({**full, name: _options(space, name)[0]})))
        found[name] = [each for each, rank in sizes.items() if each not in lower or lower[each].rank != rank]
        kinds = {type(adapters(model)[each]).__name__ for each in found[name]}
        if kinds != {"LoraLinear"}:
            what = ", ".join(sorted(kinds)) or "none"
            raise SpaceError(f"'{name}' cannot be allocated: gates are for plain adapters of linear layers, not {what}")
    return found


def _spread(found: Sequence[Architecture], cost: Cost, n: int) -> list[Architecture]:
    """The ``n`` nearest to equal distances between the least and the greatest cost, these two left out."""
    costs = {each: cost(each) for each in found}
    if not costs:
        return []
    least, most = min(costs.values()), max(costs.values())
    inner = {each: own for each, own in costs.items() if least < own < most}
    wanted = [least + (most - least) * i / (n + 1) for i in range(1, n + 1)]
    chosen = [min(inner, key=lambda each: abs(inner[each] - target)) for target in wanted if inner]
    return list(dict.fromkeys(chosen))


def _options(space: SearchSpace, choice: str) -> list[Label]:
    """Labels in the order of rank."""
    return sorted(space.choices[choice].labels, key=lambda label: float(label or 0))


def _class(make: Any) -> type:
    return make if isinstance(make, type) else object
