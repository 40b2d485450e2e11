"""Strategies: each is an Optuna sampler, made anew for every trial from its own seed.

A sampler of your own is named ``module:Class``; it gets ``seed`` if its constructor takes one, and the keyword
arguments of the config. It has to read what it knows from the study's trials, since each trial meets a fresh one.
"""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

from nasgraph import registry
from nasgraph.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

__all__ = ["gp", "make_sampler", "nsga2", "random", "tpe"]


def random(seed: int) -> BaseSampler:
    """Each choice uniform over its options: the baseline that every search is held against."""
    from optuna.samplers import RandomSampler

    return RandomSampler(seed=seed)


def tpe(seed: int, *, n_startup_trials: int = 10, n_ei_candidates: int = 24) -> BaseSampler:
    """Tree-structured Parzen estimator (Bergstra et al. 2011; multi-objective: Ozaki et al. 2022).

    Multivariate (Falkner et al. 2018), choices grouped by the trials that ask them together: choices that are only
    asked under some option of another are modelled too. One joint model is also faster than one per choice.
    """
    from optuna.samplers import TPESampler

    return TPESampler(
        seed=seed, n_startup_trials=n_startup_trials, n_ei_candidates=n_ei_candidates, multivariate=True, group=True
    )


def nsga2(
    seed: int, *, population_size: int = 10, mutation_prob: float | None = None, crossover_prob: float = 0.9
) -> BaseSampler:
    """Non-dominated sorting genetic algorithm II (Deb et al. 2002).

    ``population_size`` is 10, not Optuna's 50: searches of 50 to 200 trials end better so (docs/study.md).
    ``mutation_prob`` is per choice; None: one over the number of choices.
    """
    from nasgraph.samplers.genetic import NSGAIISampler

    return NSGAIISampler(
        seed=seed, population_size=population_size, mutation_prob=mutation_prob, crossover_prob=crossover_prob
    )


def gp(seed: int, *, n_startup_trials: int = 10) -> BaseSampler:
    """Gaussian process with (hypervolume) expected improvement. About a second per trial: for expensive evaluations."""
    from optuna.samplers import GPSampler

    return GPSampler(seed=seed, n_startup_trials=n_startup_trials)


def make_sampler(name: str, seed: int, **arguments: Any) -> BaseSampler:
    """The sampler called ``name``: ``random``, ``tpe``, ``nsga2``, ``gp``, an installed plug-in or ``module:Class``.

    Raises: ConfigError: unknown name, an argument that the sampler does not take, or not an Optuna sampler.
    """
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import BaseSampler

    make = registry.resolve("samplers", name)
    try:
        known = dict(inspect.signature(make).parameters)
    except (TypeError, ValueError):
        raise ConfigError(f"sampler '{name}' is not a class or function whose arguments can be read") from None
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for key in arguments:
        if key not in known and not takes_any:
            options = [known_key for known_key in known if known_key != "seed"]
            raise ConfigError(
                f"sampler '{name}' has no argument '{key}'.{did_you_mean(key, options)} "
                f"Arguments: {', '.join(options) or 'none'}; the seed is the search's own"
            )
    if "seed" in known or takes_any:
        arguments["seed"] = seed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            made = make(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"sampler '{name}': {error}") from error
    if not isinstance(made, BaseSampler):
        raise ConfigError(f"sampler '{name}' makes a {type(made).__name__}, not an optuna.samplers.BaseSampler")
    return made
