"""The first trials of a run whose space has transforms: what ``search.warm_start`` of a config asks for."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch

from nasgraph.allocation.rank_starts import ALLOCATORS, rank_choices, rank_trials
from nasgraph.allocation.starts import (
    Network,
    first_trials,
    networks_of,
    plain_network,
    reference,
    says_something,
    transform_choices,
)
from nasgraph.build import build
from nasgraph.config import WarmStart
from nasgraph.errors import ConfigError
from nasgraph.model_space import ModelSpace
from nasgraph.objectives.base import Candidate, find_objective
from nasgraph.space import Architecture, Label
from nasgraph.workers import Parts

# What the methods measure that say nothing of other transforms.
MEASURES = {
    "stable_rank": "ranks of LowRank",
    "gradients": "ranks of Lora",
    "sqnr": "bits, masks and ranks of LowRank",
}


def check(wanted: WarmStart | None, made: Parts) -> None:
    """Refuse what cannot be measured, before anything is. Raises: ConfigError."""
    if wanted is None:
        return
    if not transform_choices(made.space):
        raise ConfigError(f"search.warm_start: space '{made.space.name}' has no transform with a choice: leave it out")
    allocators = [name for name in wanted.methods if name in ALLOCATORS]
    if allocators and not rank_choices(made.space):
        raise ConfigError(
            f"search.warm_start.methods: '{allocators[0]}' allocates ranks of Lora, and space '{made.space.name}' has "
            "no choice of one: leave it out"
        )
    silent = [name for name in wanted.methods if name not in ALLOCATORS and not says_something(name, made.space)]
    if "stable_rank" in silent or len(silent) == len(wanted.methods):
        name = "stable_rank" if "stable_rank" in silent else silent[0]
        raise ConfigError(
            f"search.warm_start.methods: '{name}' measures {MEASURES[name]}, and space '{made.space.name}' has no "
            "choice of one: take another method, or leave it out"
        )
    if find_objective(wanted.cost).direction != "minimize":
        raise ConfigError(f"search.warm_start.cost: '{wanted.cost}' is no cost: choose one that is minimised")


def warm_start(
    wanted: WarmStart,
    made: Parts,
    known: Sequence[Mapping[str, Label]],
    network: Network | None,
    seed: int,
) -> list[Architecture]:
    """``wanted.n`` architectures around each of ``known``, or around one that is drawn; as many of each allocator.

    Args:
        network: makes networks with trained weights; None: those of a space over a model have them, and in a declared
            space the plain network of each of ``known`` is trained first.
    """
    batch = made.task.batch(wanted.samples, seed)
    objective = find_objective(wanted.cost)

    @functools.cache
    def cost(architecture: Architecture) -> float:
        return float(objective.measure(Candidate(made.space, architecture, made.task, made.settings, (seed,))))

    tables = [name for name in wanted.methods if name not in ALLOCATORS]
    found: dict[Architecture, None] = {}
    for start in {reference(made.space, given): None for given in known or [None]}:  # type: ignore[list-item]
        makes = network or _trained(made, start, seed)
        if tables:
            found.update(dict.fromkeys(first_trials(made.space, makes, start, batch, cost, tables, wanted.n)))
        for method in wanted.methods:
            if method in ALLOCATORS:
                batches = [made.task.batch(wanted.samples, seed + step) for step in range(wanted.steps)]
                lr, n = made.settings.lr, wanted.n
                with torch.random.fork_rng():
                    torch.manual_seed(seed)
                    trials = rank_trials(made.space, makes, start, batches, method, cost, n, lr)
                found.update(dict.fromkeys(trials))
    return list(found)


def _trained(made: Parts, architecture: Architecture, seed: int) -> Network:
    """Networks on trained weights, without a supernet."""
    space, device = made.space, made.device
    if isinstance(space, ModelSpace):
        return lambda each: build(space, each, seed).to(device)
    plain = plain_network(space, architecture, seed).to(device)
    made.task.fit(plain, made.settings, seed)
    return networks_of(space, plain, seed)
