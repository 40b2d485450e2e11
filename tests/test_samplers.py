"""Built-in samplers pass the exam that is shipped for plug-ins; names and arguments are checked."""

from __future__ import annotations

import math

import pytest

from nasgraph.errors import ConfigError
from nasgraph.samplers import gp, make_sampler, nsga2, random, tpe
from nasgraph.testing import SamplerExam


class TestRandom(SamplerExam):
    make = staticmethod(random)


class TestTpe(SamplerExam):
    make = staticmethod(tpe)


class TestNsga2(SamplerExam):
    make = staticmethod(nsga2)


class TestGp(SamplerExam):
    make = staticmethod(gp)
    trials = 16


class TestFromAModule(SamplerExam):
    make = staticmethod(lambda seed: make_sampler("optuna.samplers:NSGAIIISampler", seed, population_size=8))


def test_every_installed_name_makes_a_sampler() -> None:
    from optuna.samplers import BaseSampler

    from nasgraph import registry

    assert {"gp", "nsga2", "random", "tpe"} <= set(registry.names("samplers"))
    for name in registry.names("samplers"):
        assert isinstance(make_sampler(name, 0), BaseSampler)


def test_a_class_without_a_seed_is_made_without_one() -> None:
    made = make_sampler("optuna.samplers:GridSampler", 3, search_space={"a": [1, 2]})
    assert type(made).__name__ == "GridSampler"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("tpee", {}, "unknown sampler 'tpee'. Did you mean 'tpe'"),
        (
            "nsga2",
            {"populaton_size": 5},
            "has no argument 'populaton_size'. Did you mean 'population_size'",
        ),
        ("random", {"x": 1}, "sampler 'random' has no argument 'x'. Arguments: none"),
        (
            "optuna.samplers:NSGAIISampler",
            {"population_size": 1},
            "must be greater than or equal to 2",
        ),
        ("optuna.samplers:GridSampler", {}, "search_space"),
        ("collections:Counter", {}, "makes a Counter, not an optuna.samplers.BaseSampler"),
        ("builtins:dict", {}, "is not a class or function whose arguments can be read"),
    ],
)
def test_mistakes_cost_one_line(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_sampler(name, 0, **arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_default_is_what_its_text_says() -> None:
    assert make_sampler("nsga2", 0).population_size == 10  # type: ignore[attr-defined]
    assert math.isclose(make_sampler("nsga2", 0, population_size=6).population_size, 6)  # type: ignore[attr-defined]
