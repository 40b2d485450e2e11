"""In a frozen model BatchNorm normalises by the statistics that it has, in training too."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasgraph.build import build
from nasgraph.held import Held, hold, kind
from nasgraph.model_space import ModelSpace
from nasgraph.space import Choice, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.transforms import Lora, Quantize

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def cnn() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        norms = nn.BatchNorm2d(4), nn.BatchNorm2d(5), nn.InstanceNorm2d(5, track_running_stats=True)
        layers = [nn.Conv2d(3, 4, 3), norms[0], nn.ReLU(), nn.Conv2d(4, 5, 3), norms[1], norms[2]]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(80, 3))
        model(3 * X + 1)  # so that the statistics are not those of a new layer
        return model.eval()


def space_of(train: tuple[str, ...] = ()) -> ModelSpace:
    return SearchSpace.from_module(cnn(), [Lora("(0|3)", rank=Choice("r.{name}", [0, 2]))], inputs=X, train=train)


@pytest.mark.parametrize(("train", "moving"), [((), set()), (("4",), {"4"}), (("7",), set())])
def test_statistics_move_in_trained_layers_only(train: tuple[str, ...], moving: set[str]) -> None:
    space, model = space_of(train), cnn()
    network: Any = space.model({"r.0": 2, "r.3": 2})
    network.train()
    network(X)
    for name in ("1", "4", "5"):
        same = torch.equal(network.get_buffer(f"{name}.running_mean"), model.get_buffer(f"{name}.running_mean"))
        assert same is (name not in moving), name
    with torch.no_grad():  # the adapters add 0 at the start: but for what is trained it is the model, in training too
        assert torch.equal(network(X), model(X)) is (not moving)
    assert all(p.grad is not None for n, p in _trained(network).items()), "gradients pass"


def _trained(network: nn.Module) -> dict[str, Tensor]:
    network(X).square().mean().backward()
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def test_without_a_rule_that_freezes_statistics_move() -> None:
    space = SearchSpace.from_module(cnn(), [Quantize("(0|3)", weight_bits=4)], inputs=X)
    network = build(space, {}).train()
    network(X)
    assert not torch.equal(network.get_buffer("model.1.running_mean"), cnn().get_buffer("1.running_mean"))


@pytest.mark.parametrize("train", [(), ("4",)])
def test_a_supernet_equals_what_is_extracted(train: tuple[str, ...]) -> None:
    space = space_of(train)
    supernet = Supernet(space)
    with torch.no_grad():
        for stored in supernet.store.values():
            if stored.requires_grad:
                stored.add_(0.1 * torch.randn(stored.shape, generator=torch.Generator().manual_seed(1)))
    for ranks in ({"r.0": 2, "r.3": 2}, {"r.0": 0, "r.3": 2}):
        for mode in (True, False):
            subnet, extracted = supernet.subnet(ranks).train(mode), supernet.extract(ranks).train(mode)
            with torch.no_grad():
                assert torch.equal(subnet(X), extracted(X)), (ranks, mode)
        assert extracted.get_buffer("model.1.running_mean").equal(cnn().get_buffer("1.running_mean"))


def test_a_held_layer_is_of_its_class_and_can_be_copied() -> None:
    layer = nn.BatchNorm1d(3)
    hold(layer)
    hold(layer)
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(each, Held) and isinstance(each, nn.BatchNorm1d) and kind(each) is nn.BatchNorm1d
        assert not nn.Sequential(each).train()[0].training
        assert repr(each) == repr(nn.BatchNorm1d(3))
        assert each.state_dict().keys() == nn.BatchNorm1d(3).state_dict().keys()
        x = torch.randn(5, 3)
        program = torch.export.export(each, (x,))
        assert torch.equal(program.module()(x), nn.BatchNorm1d(3).eval()(x))
