"""Where learned steps start, and which ranges stay: against the equations, in the training loop and in a supernet."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nasgraph.build import build
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.supernet.steps import learned_steps
from nasgraph.tasks import digits_knn
from nasgraph.tasks.batch import Batch
from nasgraph.tasks.images import digits_images
from nasgraph.training import TrainSettings, train
from nasgraph.training.policies import Uniform
from nasgraph.training.ranges import freeze
from nasgraph.transforms import Quantize, transformed
from nasgraph.transforms.quantizers import ActivationQuantizer
from nasgraph.transforms.ranges import activation_quantizers, is_new, start_new_steps, start_steps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantised(*layers: nn.Module, activations: str = "lsq", bits: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in layers:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    return transformed(nn.Sequential(*layers), [Quantize(activation_bits=bits, activations=activations)])


def step(model: nn.Module, layer: int, bits: int = 4) -> float:
    return float(model.get_parameter(f"{layer}.on_input.quantize.step_{bits}").detach())


def test_a_step_reads_what_the_steps_before_it_give() -> None:
    """Inputs far below the step of a normal distribution: all at once, the second layer would read zeros."""
    model = quantised(nn.Linear(6, 6, bias=False), nn.Linear(6, 3))
    x = normal(9, 6) * 1e-4
    start_steps(model, [(x,)])
    assert step(model, 0) == pytest.approx(2 * float(x.abs().mean()) / math.sqrt(7))
    first = ActivationQuantizer(4, learned=True)
    first.step_4.data.fill_(step(model, 0))
    hidden = first(x) @ model[0].weight.T
    assert step(model, 1) == pytest.approx(2 * float(hidden.detach().abs().mean()) / math.sqrt(7))
    assert float(hidden.detach().abs().mean()) > 0


def test_several_batches_are_averaged_and_inputs_of_zero_start_nothing() -> None:
    model, batches = quantised(nn.Linear(4, 2)), [(normal(5, 4, seed=i),) for i in range(3)]
    start_new_steps(model, [(torch.zeros(5, 4),)])
    assert is_new(4, model.get_parameter("0.on_input.quantize.step_4"))
    start_new_steps(model, batches)
    mean = sum(float(x.abs().mean()) for (x,) in batches) / 3
    assert step(model, 0) == pytest.approx(2 * mean / math.sqrt(7))


def test_new_steps_start_as_training_sees_them_and_nothing_else_moves() -> None:
    """BatchNorm normalises by the batch; its statistics, the modes and the random state stay as they were."""
    model = quantised(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    model[3].eval()
    x, before = normal(64, 4) * 50, copy.deepcopy(model.state_dict())
    torch_state = torch.get_rng_state()
    start_new_steps(model, [(x,)])
    assert torch.equal(torch_state, torch.get_rng_state())
    assert [module.training for module in model] == [True, True, True, False]
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"0.on_input.quantize.step_4", "3.on_input.quantize.step_4"}
    assert 0.3 < step(model, 3) * math.sqrt(7) / 2 < 1.5  # mean magnitude of a normalised batch, .8, not of the raw one


def test_the_loop_starts_new_steps_only() -> None:
    def batches() -> Iterator[Batch]:
        for i in range(6):
            yield Batch((normal(8, 4, seed=i),), torch.arange(8) % 2)

    class Looped:
        def __iter__(self) -> Iterator[Batch]:
            return batches()

    settings = TrainSettings(epochs=1, lr=1e-12, weight_decay=0, optimizer="sgd")
    model = quantised(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    expected = start_steps(copy.deepcopy(model), [batch.inputs for batch in batches()][:4])
    model[0].on_input["quantize"].step_4.data.fill_(0.25)  # trained, or started by the user
    train(model, Looped(), Looped(), settings, seed=0)
    assert step(model, 0) == pytest.approx(0.25)
    expected[0].on_input["quantize"].step_4.data.fill_(0.25)
    assert not is_new(4, model.get_parameter("2.on_input.quantize.step_4"))
    plain = nn.Sequential(nn.Linear(4, 2))
    before = copy.deepcopy(plain.state_dict())
    train(plain, Looped(), Looped(), settings, seed=0)  # nothing to start
    torch.testing.assert_close(plain.state_dict(), before)


def test_ranges_are_frozen_on_training_samples_only_once_on_a_graph() -> None:
    from torch_geometric.nn import GCNConv

    images, graph = digits_images(), digits_knn()
    model = quantised(nn.Flatten(), nn.Linear(64, 10), activations="dynamic")
    assert freeze(model, images, seed=0) == 1
    part = model[1].on_input["quantize"]
    train_pixels = images.normalised(images.data.train_x)
    assert float(part.lowest) >= float(train_pixels.min()) and float(part.highest) <= float(train_pixels.max())
    again = quantised(nn.Flatten(), nn.Linear(64, 10), activations="dynamic")
    freeze(again, images, seed=0)
    assert torch.equal(again[1].on_input["quantize"].highest, part.highest)

    conv = transformed(GCNConv(64, 10), [Quantize(activation_bits=8, aggregation_bits=8)])
    calls = []
    conv.register_forward_hook(lambda *_: calls.append(1))
    assert freeze(conv, graph, seed=0) == 2 and len(calls) == 1
    (x,) = (graph.data.x,)
    assert torch.equal(conv.lin.on_input["quantize"].highest, x.max())
    assert freeze(nn.Linear(2, 2), graph, seed=0) == 0


# ---- in a supernet --------------------------------------------------------------------------------------------------


def space() -> SearchSpace:
    found = SearchSpace("learned")
    h = found.input("image", torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), {0: "batch"})
    h = found.add("flat", Op(nn.Flatten), h)
    low = Quantize(activation_bits=Choice("bits.{name}", [4, 8, 32]), activations="lsq")
    h = found.add("first", Op(nn.Linear, out_features=Choice("width", [8, 16])), h, transforms=[low])
    h = found.add("act", Op(nn.ReLU), h)
    h = found.add("drop", Op(nn.Dropout, p=0.2), h)
    found.output(found.add("head", Op(nn.Linear, out_features=10), h, transforms=[low]))
    return found


ARCH = {"width": 16, "bits.first": 4, "bits.head": 8}


def test_a_supernet_starts_each_width_when_it_is_first_trained() -> None:
    supernet = Supernet(space(), digits_images())
    batch = supernet.task.batch(64, 0)
    before = {key: parameter.clone() for key, parameter in supernet.store.items()}
    supernet.start_steps(ARCH, batch.inputs)
    moved = {key[2] for key, parameter in supernet.store.items() if not torch.equal(parameter, before[key])}
    assert moved == {"on_input.quantize.step_4", "on_input.quantize.step_8"}
    (x,) = batch.inputs
    found = {key: float(p.detach()) for key, p in supernet.store.items() if "step" in key[2]}
    (first,) = [value for key, value in found.items() if key[0] == "first" and key[2].endswith("4")]
    assert first == pytest.approx(2 * float(x.abs().mean()) / math.sqrt(7), rel=1e-5)
    (other,) = [value for key, value in found.items() if key[0] == "head" and key[2].endswith("4")]
    assert is_new(4, torch.tensor([other]))
    after = {key: parameter.clone() for key, parameter in supernet.store.items()}
    supernet.start_steps(ARCH, (x * 100,))
    assert all(torch.equal(parameter, after[key]) for key, parameter in supernet.store.items())
    alone, view = supernet.extract(ARCH).eval(), supernet.subnet(ARCH).eval()
    assert torch.equal(alone(x), view(x))
    form = next(form for form in supernet._structure(supernet.space.architecture(ARCH)).forms if form is not None)
    assert not learned_steps(form)  # Flatten


def test_an_interrupted_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    def fresh() -> Supernet:
        return Supernet(space(), digits_images(), seed=1)

    how = {"settings": TrainSettings(lr=0.01), "samples": 32}
    whole = fresh()
    whole.train(Uniform(whole.space), 8, **how)
    half = fresh()
    half.train(Uniform(half.space), 3, checkpoint=tmp_path, every=3, **how)
    rest = Supernet.load(tmp_path, half.space, digits_images())
    rest.train(Uniform(rest.space), 8, **how)
    assert all(torch.equal(rest.store[key], parameter) for key, parameter in whole.store.items())
    steps = [p for key, p in whole.store.items() if "step" in key[2]]
    assert len(steps) == 4 and any(not is_new(4, p) and not is_new(8, p) for p in steps)


def test_fine_tuning_keeps_the_steps_that_the_supernet_has_trained() -> None:
    supernet = Supernet(space(), digits_images())
    supernet.start_steps(ARCH, supernet.task.batch(64, 0).inputs)
    for key, parameter in supernet.store.items():
        if "step" in key[2]:
            parameter.data.mul_(1.5)
    model = supernet.extract(ARCH)
    before = [float(getattr(part, part.name).detach()) for part in activation_quantizers(model)]
    start_new_steps(model, [supernet.task.batch(64, 1).inputs])
    assert [float(getattr(part, part.name).detach()) for part in activation_quantizers(model)] == before
    assert len(activation_quantizers(build(supernet.space, {**ARCH, "bits.head": 32}))) == 1
