"""Compiled subnets: the numbers of the eager ones, and few compilations. No C++ compiler is needed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from nasgraph.ops import add
from nasgraph.search_spaces.gnn_node import gnn_node
from nasgraph.space import Architecture, Call, Choice, Label, Op, SearchSpace
from nasgraph.supernet import Supernet

pytestmark = pytest.mark.slow
WIDTHS = tuple(range(8, 104, 8))


class Counting:
    """A backend that counts what it is given to compile."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


def mlp() -> SearchSpace:
    space = SearchSpace("mlp")
    x = space.input("x", torch.zeros(4, 5), {0: "samples"})
    first = space.add("first", Op(nn.Linear, out_features=Choice("w1", list(WIDTHS), ordered=True)), x)
    h = space.add("norm", Op(nn.LayerNorm), first)
    h = space.add("act", Op(nn.ReLU), h)
    h = space.add("second", Op(nn.Linear, out_features=Choice("w2", [w - 1 for w in WIDTHS], ordered=True)), h)
    h = space.add("again", Op(nn.BatchNorm1d), h)
    h = space.add("twice", Call(add), h, h)
    space.output(space.add("head", Op(nn.Linear, out_features=3), h))
    return space


def cnn() -> SearchSpace:
    space = SearchSpace("cnn")
    x = space.input("image", torch.zeros(2, 3, 8, 8), {0: "batch"})
    width = Choice("width", list(WIDTHS), ordered=True)
    h = space.add("conv", Op(nn.Conv2d, out_channels=width, kernel_size=3), x)
    h = space.add("act", Op(nn.ReLU), space.add("norm", Op(nn.BatchNorm2d), h))
    h = space.add("flat", Op(nn.Flatten), space.add("pool", Op(nn.AdaptiveAvgPool2d, output_size=1), h))
    space.output(space.add("head", Op(nn.Linear, out_features=3), h))
    return space


def gnn() -> SearchSpace:
    return gnn_node(9, 3, layers=2, widths=WIDTHS)


CHOICES: dict[str, Label] = {"depth": "2", "norm": "layer", "activation": "relu", "residual": "add", "jump": "max"}
CHOICES |= {"input_dropout": 0.0, "dropout": 0.0, "heads": 2, "attention_dropout": 0.0}
CHOICES |= {"propagate": "none", "head": "linear"}


@pytest.mark.parametrize("kind", ["mlp", "cnn", "gcn", "sage_mean", "gat"])
@pytest.mark.parametrize("training", [False, True])
def test_twelve_widths_need_at_most_two_recompilations(kind: str, training: bool) -> None:
    space = {"mlp": mlp, "cnn": cnn}.get(kind, gnn)()
    supernet = Supernet(space)
    if kind in ("mlp", "cnn"):
        rng = random.Random(0)
        archs = list(dict.fromkeys(space.sample(rng) for _ in range(100)))[:12]
        inputs: tuple[Tensor, ...] = (torch.randn(6, 5),) if kind == "mlp" else (torch.randn(5, 3, 8, 8),)
    else:
        archs = [space.architecture({**CHOICES, "conv1": kind, "conv2": kind, "width": width}) for width in WIDTHS]
        inputs = torch.randn(17, 9), torch.randint(17, (2, 40))
    assert len(set(archs)) == 12
    backend, compiling = Counting(), 0
    for arch in archs:
        before = backend.graphs
        compiled, eager = supernet.compiled(arch, backend).train(training), supernet.subnet(arch).train(training)
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # instead of running it uncompiled
            out = compiled(*inputs)
        compiling += backend.graphs > before
        expected = eager(*inputs)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert 1 <= compiling <= 3
    if kind in (
        "mlp",
        "cnn",
        "sage_mean",
    ):  # those with self-loops are several graphs
        assert backend.graphs <= 3


def test_gradients_of_compiled_subnets_arrive_in_the_store() -> None:
    supernet = Supernet(mlp())
    arch = Architecture({"w1": 16, "w2": 23})
    gradients = []
    for view in (supernet.compiled(arch, "aot_eager"), supernet.subnet(arch)):
        for parameter in supernet.parameters():
            parameter.grad = None
        generator = torch.Generator().manual_seed(0)
        view.train()(torch.randn(6, 5, generator=generator)).square().sum().backward()
        gradients.append([p.grad for p in supernet.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == 10
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert all(place.blank.is_meta for form in supernet._structure(arch).forms if form for place in form.parameters)
