"""Networks of few bits: every format learns, a subnet is its extraction, 32 bits are the plain network."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nasgraph.build import build
from nasgraph.errors import SpaceError
from nasgraph.objectives.bits import count_model_bits
from nasgraph.search_spaces.gnn_low_precision import OPERATORS, gnn_low_precision
from nasgraph.search_spaces.gnn_node import gnn_node
from nasgraph.space import Label, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.tasks.node import NodeData, NodeTask
from nasgraph.testing import SpaceExam, node_batch
from nasgraph.training.differentiable import two_path
from nasgraph.training.differentiable.mixture import Mixture
from nasgraph.training.differentiable.relaxed import one_hot
from nasgraph.transforms.layers import rewritten_layers

FEATURES, CLASSES = 5, 3  # of testing.node_batch
BASE: dict[str, Label] = {"depth": "1", "width": 16, "heads": 4, "activation": "relu", "head": "gcn"}
BASE |= {"input_dropout": 0.0, "dropout": 0.0}


def formats(node: str, weight: int, activation: int = 32, aggregation: int = 32) -> dict[str, Label]:
    bits = {"weight_bits": weight, "activation_bits": activation, "aggregation_bits": aggregation}
    return {f"{kind}.{node}": value for kind, value in bits.items()}


def space_of(**arguments: Any) -> SearchSpace:
    return gnn_low_precision(FEATURES, CLASSES, **arguments)


def small() -> SearchSpace:
    return space_of(widths=(8, 16), operators=("gat", "gcn", "gin"), weight_bits=(1, 2, 4, 32), activation_bits=(8, 32))


class TestGnnLowPrecision(SpaceExam):
    space = staticmethod(space_of)
    classes = CLASSES
    formats = ("code",)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("bits", [1, 4])
def test_each_operator_learns_in_each_format(operator: str, bits: int) -> None:
    space, batch = space_of(), node_batch()
    chosen = {**BASE, "conv1": operator, **formats("conv1", bits, 8, 8), **formats("head", 4, 8, 8)}
    model = build(space, space.architecture(chosen)).eval()  # attention dropout of 24 nodes is mostly noise
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = batch.loss(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters()), "a parameter that nothing reads"
    assert min(losses) < 0.9 * losses[0]
    layers = rewritten_layers(model.conv1).values()
    assert layers and all(len(layer.effective_weight().unique()) <= max(2**bits, 3) for layer in layers)


@pytest.mark.parametrize("operator", OPERATORS)
def test_float_everywhere_is_the_plain_network_bit_for_bit(operator: str) -> None:
    ours, plain = space_of(), gnn_node(FEATURES, CLASSES)
    chosen: dict[str, Label] = {**BASE, "conv1": operator}
    rest: dict[str, Label] = {"norm": "none", "propagate": "none", "attention_dropout": 0.6}
    first = build(ours, ours.architecture({**chosen, **formats("conv1", 32), **formats("head", 32)}))
    second = build(plain, plain.architecture({**chosen, **rest}))
    assert not rewritten_layers(first)
    assert first.state_dict().keys() == second.state_dict().keys()
    batch = node_batch()
    assert torch.equal(first.eval()(*batch.inputs), second.eval()(*batch.inputs))


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    return Supernet(small())


def test_a_subnet_is_its_extraction_bit_for_bit(supernet: Supernet) -> None:
    batch, rng = node_batch(), random.Random(0)
    for _ in range(30):
        architecture = supernet.space.sample(rng)
        alone = supernet.extract(architecture).eval()
        assert torch.equal(alone(*batch.inputs), supernet.subnet(architecture).eval()(*batch.inputs)), architecture


def test_formats_share_the_weight_underneath(supernet: Supernet) -> None:
    weights = [key for key in supernet.store if key[:2] == ("conv1", "gcn") and key[2].endswith("lin.weight")]
    steps = [key for key in supernet.store if key[:2] == ("conv1", "gcn") and "step_" in key[2]]
    assert len(weights) == 1
    assert len(steps) == 2  # of 2 and 4 bits; binary has none


def test_a_layer_that_is_not_reached_asks_for_no_format() -> None:
    space, rng = small(), random.Random(0)
    for _ in range(50):
        architecture = space.sample(rng)
        assert ("weight_bits.conv2" in architecture) == (architecture["depth"] == "2")
        assert {"aggregation_bits.conv1", "activation_bits.head"} <= set(architecture)


def test_documented_size() -> None:
    assert f"{space_of().size():,}" in (gnn_low_precision.__doc__ or "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 0}, "at least one layer"),
        ({"operators": ["gcn", "fc"]}, r"not \['fc'\]"),
        ({"operators": []}, "not none"),
        ({"widths": [12]}, "width 12"),
        ({"weight_bits": [9]}, "weight_bits"),
        ({"activation_bits": [2]}, "activation_bits"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        space_of(**arguments)


# ---- differentiable -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("superpose", [False, True])
def test_one_hot_weights_are_the_subnet(superpose: bool) -> None:
    space = space_of(layers=1, widths=(8, 16), operators=("gcn", "sage_max"), weight_bits=(1, 4, 32))
    supernet, batch, rng = Supernet(space), node_batch(), random.Random(0)
    mixture = Mixture(supernet, superpose=superpose)
    for _ in range(8):
        architecture = space.sample(rng)
        weights = {
            name: one_hot(choice.labels.index(architecture.get(name, choice.labels[0])), len(choice.labels))
            for name, choice in space.choices.items()
        }
        opened = {name: frozenset([label]) for name, label in architecture.items()}
        with torch.no_grad():
            found = mixture(weights, batch.inputs, training=False, labels=opened)
        assert torch.equal(found, supernet.subnet(architecture).eval()(*batch.inputs)), architecture


def test_modules_are_made_only_for_forms_that_are_run() -> None:
    space = space_of(layers=1, widths=(8, 16), operators=("gcn", "sage_max"))
    mixture, architecture = Mixture(Supernet(space), superpose=False), space.sample(random.Random(1))
    opened = {name: frozenset([label]) for name, label in architecture.items()}
    weights = {name: torch.ones(len(choice.labels)) for name, choice in space.choices.items()}
    mixture(weights, node_batch().inputs, training=False, labels=opened)
    forms = mixture.places["conv1"].forms
    assert (len(forms), sum("made" in vars(form) for form in forms)) == (2 * 2 * 6 * 3 * 3, 1)


def test_a_cost_in_bits_decides_how_many_are_chosen() -> None:
    (x, edges), nodes = node_batch().inputs, torch.arange(24)
    data = NodeData(x, edges, nodes % 3, nodes[:12], nodes[12:18], nodes[18:])
    task = NodeTask("rings", lambda: data)
    space = space_of(layers=1, widths=(64,), operators=("gcn",), activation_bits=(32,), aggregation_bits=(32,))
    mean_bits: list[float] = []
    for sign in (1, -1):
        found = two_path(
            Supernet(space, task),
            30,
            cost=lambda architecture, sign=sign: 20_000 + sign * count_model_bits(build(space, architecture)),  # type: ignore[misc]
            reference=20_000.0,
            loss="sum",
            strength=10.0,
            alpha_lr=0.1,
            fixed={"activation": "relu", "input_dropout": 0.0, "dropout": 0.5, "head": "gcn"},
        )
        p = found.probabilities["weight_bits.conv1"]
        mean_bits.append(sum(int(str(bits)) * share for bits, share in p.items()))
    assert mean_bits[0] < 5 < 20 < mean_bits[1]  # 8.3 if all are equally probable


def test_binary_weights_have_one_magnitude() -> None:
    space = space_of()
    chosen = {**BASE, "conv1": "gcn", **formats("conv1", 1), **formats("head", 32)}
    layer = build(space, space.architecture(chosen)).conv1.lin
    assert isinstance(layer, nn.Linear)
    assert torch.allclose(layer.effective_weight().abs(), layer.weight.abs().mean())


def test_the_example_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "low_precision_gnn.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(example, {"STEPS": 2})  # noqa: S102
    assert "32: " in capsys.readouterr().out
