"""Costs in bits against counts by hand, the packed file and PyTorch's counter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GCNConv

from nasgraph.objectives import Evaluator, Scored
from nasgraph.objectives.bits import (
    count_activation_bits,
    count_adapter_parameters,
    count_bit_operations,
    count_model_bits,
    count_trainable_parameters,
)
from nasgraph.objectives.cost import count_flops
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.transforms import Lora, LowRank, Prune, Quantize, transformed

N, F, O = 12, 5, 3  # noqa: E741 - nodes, features, outputs


@pytest.fixture
def graph() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, F, generator=generator), torch.randint(0, N, (2, 40), generator=generator)


def linear(*transforms: Any, inputs: int = 32, outputs: int = 10) -> nn.Module:
    return transformed(nn.Sequential(nn.Linear(inputs, outputs)), transforms)


def test_model_bits_by_hand() -> None:
    bias = 32 * 10
    assert count_model_bits(linear()) == 32 * 320 + bias
    assert count_model_bits(linear(Quantize(weight_bits=4))) == 4 * 320 + 32 + bias
    assert count_model_bits(linear(Quantize(weight_bits=1, per="channel"))) == 320 + 32 * 10 + bias
    assert count_model_bits(linear(Quantize(weight_bits=2, per="group", group_size=16))) == 2 * 320 + 32 * 20 + bias
    # What a mask leaves, and a bit for every entry; a mask that leaves nearly all would take more than the whole.
    assert count_model_bits(linear(Prune(keep=0.25))) == 320 + 32 * 80 + bias
    assert count_model_bits(linear(Prune(keep=0.99))) == 32 * 320 + bias
    assert count_model_bits(linear(Prune(keep=0.25), Quantize(weight_bits=8))) == 320 + 8 * 80 + 32 + bias
    # A lone weight of 3 bits fills a byte.
    assert count_model_bits(linear(Quantize(weight_bits=3), inputs=1, outputs=1)) == 8 + 32 + 32


def test_what_training_alone_needs_is_not_counted() -> None:
    """Scores of a learned mask and the float weight are not stored; a step is, as the scale."""
    learned = linear(Prune(keep=0.25, scores="learned"), Quantize(weight_bits=8))
    assert count_model_bits(learned) == count_model_bits(linear(Prune(keep=0.25), Quantize(weight_bits=8)))


def test_adapters_and_steps_of_activations_count_as_floats() -> None:
    rank = 2
    with_adapter = count_model_bits(linear(Quantize(weight_bits=4), Lora("*", rank=rank)))
    scale = 32  # a buffer
    assert with_adapter == count_model_bits(linear(Quantize(weight_bits=4))) + 32 * rank * (32 + 10) + scale
    steps = linear(Quantize(weight_bits=4, activation_bits=8, activations="lsq"))
    assert count_model_bits(steps) == count_model_bits(linear(Quantize(weight_bits=4))) + 32


def test_shared_tensors_count_once() -> None:
    layer = nn.Linear(4, 4)
    assert count_model_bits(nn.Sequential(layer, nn.ReLU(), layer)) == 32 * 20


@pytest.mark.parametrize("kind", ["mlp", "cnn", "gcn", "gat", "attention"])
def test_at_32_bits_bit_operations_are_flops_times_512(kind: str, graph: tuple[Tensor, Tensor]) -> None:
    models: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
        "mlp": (nn.Sequential(nn.Linear(F, 8), nn.ReLU(), nn.Linear(8, O)), graph[:1]),
        "cnn": (
            nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.Conv2d(6, 6, 3, groups=3)),
            (torch.randn(2, 4, 12, 12),),
        ),
        "gcn": (GCNConv(F, O), graph),
        "gat": (GATConv(F, O, heads=2), graph),
        "attention": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (torch.randn(2, 5, 8),)),
    }
    model, inputs = models[kind]
    assert count_bit_operations(model, inputs) == 512 * count_flops(model, inputs) > 0
    lower = transformed(model, [Quantize(weight_bits=4, activation_bits=8)])
    assert count_bit_operations(lower, inputs) < 512 * count_flops(model, inputs)


def test_bit_operations_by_hand(graph: tuple[Tensor, Tensor]) -> None:
    products = N * F * O
    for bits, activation_bits in [(4, 8), (1, None), (None, 8), (16, 4)]:
        layer = transformed(nn.Linear(F, O), [Quantize(weight_bits=bits, activation_bits=activation_bits)])
        assert count_bit_operations(layer, graph[:1]) == products * (bits or 32) * (activation_bits or 32)
    assert count_bit_operations(transformed(GCNConv(F, O), [Quantize(weight_bits=2)]), graph) == products * 2 * 32
    # An adapter's products are of floats, a mask saves none, and the factors of a layer are layers.
    adapted = transformed(nn.Linear(F, O), [Quantize(weight_bits=4), Lora("*", rank=2)])
    assert count_bit_operations(adapted, graph[:1]) == products * 4 * 32 + N * 2 * (F + O) * 32 * 32
    pruned = transformed(nn.Linear(F, O), [Quantize(weight_bits=4), Prune(keep=0.2)])
    assert count_bit_operations(pruned, graph[:1]) == products * 4 * 32
    factors = transformed(nn.Linear(F, O), [LowRank(rank=2), Quantize(weight_bits=4)])
    assert count_bit_operations(factors, graph[:1]) == N * 2 * (F + O) * 4 * 32


def test_activation_bits_by_hand(graph: tuple[Tensor, Tensor]) -> None:
    model = nn.Sequential(nn.Linear(F, 8), nn.ReLU(), nn.Linear(8, O))
    assert count_activation_bits(model, graph[:1]) == (32 * N * (F + 8), 32 * N * 8)
    Quantize("2", activation_bits=4).apply(model)
    assert count_activation_bits(model, graph[:1]) == (N * (32 * F + 4 * 8), N * 32 * F)
    # A convolution reads its input, transforms it and aggregates.
    assert count_activation_bits(GCNConv(F, O), graph)[0] == 32 * N * (F + O)
    both = transformed(GCNConv(F, O), [Quantize(activation_bits=8, aggregation_bits=4)])
    assert count_activation_bits(both, graph)[0] == N * (8 * F + 4 * O)


def test_adapter_and_trainable_parameters() -> None:
    model = linear(Lora("*", rank=2)).requires_grad_(False)
    assert count_adapter_parameters(linear()) == 0
    assert count_adapter_parameters(model) == 2 * (32 + 10)
    assert count_trainable_parameters(model) == 0
    model[0].bias.requires_grad_(True)
    assert count_trainable_parameters(model) == 10


@pytest.mark.parametrize("scores", ["learned", "signed"])
@pytest.mark.parametrize("weights", ["trained", "fixed"])
def test_trainable_parameters_are_those_that_get_a_gradient(scores: str, weights: str) -> None:
    prune = Prune("0", keep=0.5, scores=scores, weights=weights)
    model = transformed(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)), [prune, Quantize("0", weight_bits=4)])
    model(torch.randn(3, 16)).sum().backward()
    learns = sum(p.numel() for p in model.parameters() if p.grad is not None)
    rest = 128 + 8 + 1 + 72  # scores, bias, step, and the second layer
    assert count_trainable_parameters(model) == learns == rest + (128 if weights == "trained" else 0)
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight  # which trains in the second
    transformed(tied, [Prune("0", keep=0.5, scores=scores, weights=weights)])
    assert count_trainable_parameters(tied) == 64 + 64 + 16


def quantised() -> SearchSpace:
    space = SearchSpace("quantised")
    x = space.input("x", torch.randn(12, 5), {0: "nodes"})
    edges = space.input("edge_index", torch.randint(0, 12, (2, 40)), {1: "edges"})
    bits = Quantize(weight_bits=Choice("bits", [2, 8, None]), activation_bits=Choice("activations", [4, None]))
    h = space.add("conv", Op(GCNConv, out_channels=4), x, edges, transforms=[bits])
    space.output(space.add("head", Op(nn.Linear, out_features=2), h))
    return space


def test_as_objectives_of_candidates(graph: tuple[Tensor, Tensor]) -> None:
    class Task:
        inputs = graph

    names = ["model_bits", "activation_bits", "bit_operations", "adapter_params", "trainable_params"]
    evaluate = Evaluator(quantised, Task(), names)  # type: ignore[arg-type]
    space = evaluate.space
    found = {}
    for arch in space.enumerate():
        result = evaluate(arch)
        assert isinstance(result, Scored), result
        found[str(arch["bits"]), str(arch["activations"])] = result
    head = 32 * (4 * 2 + 2)
    assert found["2", "None"].values["model_bits"] == 2 * 20 + 32 + 32 * 4 + head
    assert found["None", "None"].values["model_bits"] == 32 * (20 + 4) + head
    assert found["8", "4"].values["activation_bits"] == N * (4 * F + 32 * 4 + 32 * 4)
    assert found["8", "4"].info["largest_activation_bits"] == N * 32 * 4
    assert found["8", "4"].values["bit_operations"] == N * F * 4 * 8 * 4 + N * 4 * 2 * 1024
    assert found["8", "4"].values["adapter_params"] == 0


def test_a_search_takes_them_by_name(tmp_path: Path) -> None:
    from nasgraph.registry import resolve

    for name in ("model_bits", "activation_bits", "bit_operations", "adapter_params", "trainable_params"):
        assert resolve("objectives", name).name == name
