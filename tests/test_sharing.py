"""Which stored parameters are one, and that their gradients add."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

from nasgraph.errors import ConfigError
from nasgraph.search_spaces.gnn_node import gnn_node
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.supernet import Supernet

GRAPH = (torch.randn(9, 8, generator=torch.Generator().manual_seed(0)), torch.randint(9, (2, 20)))


def layers(apart: bool = False) -> SearchSpace:
    """Two equal layers with their activations; one decision, or one each."""
    space = SearchSpace("layers")
    h = space.input("x", torch.zeros(4, 8), {0: "nodes"})
    activation = {"relu": Op(nn.ReLU), "tanh": Op(nn.Tanh)}
    both = Choice("activation", activation)
    operation = Choice(
        "operation", {"plain": Op(nn.Linear, out_features=8), "free": Op(nn.Linear, out_features=8, bias=False)}
    )
    for i in (1, 2):
        h = space.add(f"layer{i}", operation, h)
        h = space.add(f"norm{i}", Op(nn.LayerNorm), h)
        h = space.add(f"act{i}", Choice(f"activation{i}", activation) if apart else both, h)
    space.output(space.add("head", Op(nn.Linear, out_features=3), h))
    return space


def aliases(supernet: Supernet) -> set[frozenset[tuple[str, str, str]]]:
    groups: dict[int, set[tuple[str, str, str]]] = {}
    for key, parameter in supernet.store.items():
        groups.setdefault(id(parameter), set()).add(key)
    return {frozenset(group) for group in groups.values() if len(group) > 1}


def test_by_default_nothing_is_shared() -> None:
    supernet = Supernet(layers())
    assert aliases(supernet) == set() and len(list(supernet.parameters())) == len(supernet.store)


def test_options_of_a_node_share_what_has_one_name_and_shape() -> None:
    supernet = Supernet(layers(), share="options")
    expected = {frozenset({(f"layer{i}", "plain", "weight"), (f"layer{i}", "free", "weight")}) for i in (1, 2)}
    assert aliases(supernet) == expected
    assert supernet.numel == Supernet(layers()).numel - 2 * 64


@pytest.mark.parametrize("apart", [False, True])
def test_homogeneous_layers_are_one(apart: bool) -> None:
    """Not norms; and not layers whose activations are decided apart."""
    supernet = Supernet(layers(apart), share="homogeneous")
    names = [("plain", "weight"), ("plain", "bias"), ("free", "weight")]
    expected = {frozenset({(f"layer{i}", *name) for i in (1, 2)}) for name in names}
    assert aliases(supernet) == (set() if apart else expected)


def test_the_graph_space_shares_inner_layers_only() -> None:
    """Layer 1 reads the features, so its shapes are others; GEN has a norm inside."""
    supernet = Supernet(gnn_node(9, 3, layers=3, widths=(8, 16)), share="homogeneous")
    groups = aliases(supernet)
    assert groups and all({key[0] for key in group} <= {"conv2", "conv3"} for group in groups)
    assert all(len({key[1:] for key in group}) == 1 for group in groups)
    shared = {next(iter(group))[1] for group in groups}
    assert {"gcn", "gat", "gatv2", "sage_mean"} <= shared and "gen" not in shared


@pytest.mark.parametrize("share", ["options", "homogeneous"])
def test_subnets_are_their_slices_and_gradients_add(share: str) -> None:
    for space, inputs in ((layers(), GRAPH[:1]), (gnn_node(8, 3, layers=3, widths=(8, 16)), GRAPH)):
        supernet, rng = Supernet(space, share=share), random.Random(0)
        for _ in range(8):
            arch = space.sample(rng)
            alone, view = supernet.extract(arch).eval(), supernet.subnet(arch).eval()
            assert torch.equal(alone(*inputs), view(*inputs))
            for parameter in supernet.parameters():
                parameter.grad = None
            alone(*inputs).square().sum().backward()
            view(*inputs).square().sum().backward()
            total: dict[int, Any] = {}
            own = dict(alone.named_parameters())
            for piece in supernet._structure(arch).pieces:
                gradient, stored = own[piece.name].grad, supernet.store[piece.key]
                if gradient is not None:
                    places = torch.arange(stored.numel()).reshape(stored.shape)
                    places = places if piece.cut is None else piece.cut(places)
                    full = total.setdefault(id(stored), torch.zeros(stored.numel()))
                    full[places.flatten()] += gradient.flatten()
            for parameter in supernet.parameters():
                if id(parameter) in total:
                    assert parameter.grad is not None
                    torch.testing.assert_close(parameter.grad.flatten(), total[id(parameter)], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", ["options", "homogeneous"])
def test_shared_stores_are_saved_once(share: str, tmp_path: Any) -> None:
    supernet = Supernet(layers(), share=share, seed=3)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.mul_(0.5)
    supernet.save(tmp_path)
    again = Supernet.load(tmp_path, layers())
    assert again.share == share and aliases(again) == aliases(supernet)
    assert all(torch.equal(parameter, again.store[key]) for key, parameter in supernet.store.items())


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown share 'option'. Did you mean 'options'"):
        Supernet(layers(), share="option")
