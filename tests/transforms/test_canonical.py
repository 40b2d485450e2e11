"""Settings have one canonical form if and only if they make one network, on a layer that tells all of them apart."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from nasgraph.errors import SpaceError
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.testing import behaviour
from nasgraph.transforms import Lora, LowRank, Prune, Quantize, Transform
from nasgraph.transforms.base import settings, transformed

X = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))


def layer() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(12, 8)


def network_of(transform: Transform) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return behaviour(transformed(layer(), [transform]), X)


def grid(kind: type[Transform], /, **options: list[Any]) -> list[Transform]:
    """Every combination that the transform takes, and that changes something."""
    found = []
    for values in itertools.product(*options.values()):
        try:
            made = kind(**dict(zip(options, values, strict=True)))
        except SpaceError:
            continue
        if not made.neutral():
            found.append(made)
    return found


GRIDS: dict[str, list[Transform]] = {
    "weights": grid(
        Quantize,
        weight_bits=[None, 32, 1, 2, 4, 16],
        activation_bits=[None, 8],
        method=["lsq", "minmax", "nested"],
        per=["tensor", "channel", "group"],
        group_size=[3, 5],
        nested_bits=[4, 8, 16],
    ),
    "activations": grid(
        Quantize,
        weight_bits=[None, 32, 4],
        activation_bits=[None, 32, 4, 8],
        activations=["dynamic", "lsq"],
        group_size=[3, 64],
    ),
    "lora": grid(
        Lora,
        rank=[0, 2, 4],
        alpha=[4.0, 16],
        scale=["alpha/r_max", "alpha/r", "alpha/sqrt(r)"],
        r_max=[None, 8],
        kind=["plain", "vera", "mora", "melora"],
        dropout=[0, 0.5],
        blocks=[2, 4],
    ),
    "prune": grid(
        Prune,
        keep=[None, 0.5, 0.3, 1, 1.0],
        structure=["unstructured", "rows", "2:4", "1:2", "1:4"],
        scores=["magnitude", "random", "learned", "signed"],
        weights=["trained", "fixed"],
        seed=[0, 1],
    ),
    "low rank": grid(LowRank, rank=[None, 1, 2, 0.5, 0.25]),
}


@pytest.mark.parametrize("name", GRIDS)
def test_one_canonical_form_for_one_network(name: str) -> None:
    """``1:2`` and ``2:4`` keep different entries, each rank another, and each seed draws another mask."""
    forms: dict[Transform, str] = {}
    for made in GRIDS[name]:
        form = made.canonical()
        assert form.canonical() == form and not form.neutral()
        network = forms.setdefault(form, network_of(form))
        assert network_of(made) == network, f"{made} and {form} are two networks"
    twins: dict[str, Transform] = {}
    for form, network in forms.items():
        if name == "low rank":  # a share of full rank is a rank, which one is up to the layer
            continue
        assert twins.setdefault(network, form) == form, f"{twins[network]} and {form} are one network"


def test_random_settings_of_lora_keep_their_strength_to_the_bit() -> None:
    for rank in range(1, 40):
        for alpha in (0.1, 0.3, 1.0, 7.0, 16.0, 31.7):
            for scale in ("alpha/r_max", "alpha/r", "alpha/sqrt(r)"):
                given = Lora(rank=rank, alpha=alpha, scale=scale, r_max=40)
                scales = [each.adapter(nn.Linear(2, 2).double()).scale for each in (given, given.canonical())]
                assert torch.equal(*scales)


def test_keys_do_not_see_what_has_no_effect() -> None:
    def space(*transforms: Transform) -> SearchSpace:
        made = SearchSpace("one")
        x = made.input("x", X)
        made.output(made.add("layer", Op(nn.Linear, out_features=8), x, transforms=transforms))
        return made

    bits, size = Choice("bits", [1, 4, 32]), Choice("size", [2, 64])
    per, method = Choice("per", ["tensor", "group"]), Choice("method", ["lsq", "minmax"])
    found = space(Quantize(weight_bits=bits, per=per, group_size=size, method=method))
    assert found.size() == 24
    # 32: one; 1: tensor, group of 2, group of 64; 4: the same with each method
    assert len({found.key(a) for a in found.enumerate()}) == 1 + 3 + 6
    spelled, plain = space(Lora(rank=4, alpha=16, r_max=8, blocks=2)), space(Lora(rank=4))
    assert spelled.key({}) == plain.key({})
    assert settings(Lora(rank=4, alpha=16, r_max=8, blocks=2).canonical()) == {"rank": 4}
