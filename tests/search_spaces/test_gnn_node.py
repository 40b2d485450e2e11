"""The space of graph neural networks: every operator learns, counts by hand agree, literature is inside."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from torch import nn
from torch_geometric.nn import APPNP, GATConv, GCNConv

from nasgraph.build import build
from nasgraph.errors import SpaceError
from nasgraph.export import Request, export_many
from nasgraph.search_spaces.gnn_node import LITERATURE, PNA, gnn_node
from nasgraph.space import Label, SearchSpace
from nasgraph.testing import SpaceExam, node_batch

FEATURES, CLASSES = 5, 3  # of testing.node_batch
BASE: dict[str, Label] = {
    "depth": "2", "width": 16, "norm": "none", "activation": "relu", "residual": "none", "jump": "last",
    "input_dropout": 0.0, "dropout": 0.0, "attention_dropout": 0.0, "heads": 2, "steps": 2, "teleport": 0.1,
    "conv1": "gcn", "conv2": "gcn", "head": "linear", "propagate": "none",
}  # fmt: skip


def small() -> SearchSpace:
    return gnn_node(FEATURES, CLASSES)


class TestGnnNode(SpaceExam):
    space = staticmethod(small)
    classes = CLASSES


def options(name: str) -> list[Label]:
    return list(small().choices[name].labels)


ONE_BY_ONE = [
    (name, label)
    for name in ("conv1", "conv2", "head", "norm", "activation", "residual", "jump", "propagate", "heads")
    for label in options(name)
]


@pytest.mark.parametrize(("name", "label"), ONE_BY_ONE)
def test_each_option_learns(name: str, label: Label) -> None:
    heads = {"conv1": "gat"} if name == "heads" else {}
    space, batch = small(), node_batch()
    model = build(space, space.architecture({**BASE, **heads, name: label}))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = batch.loss(model)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters()), "a parameter that nothing reads"
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("layers", [1, 2])
def test_size_counts_what_is_asked(layers: int) -> None:
    # Per layer 10 convolutions without attention and 2 with. Of the heads one has attention. Attention asks its
    # dropout (3), attention in a layer also the number of heads (4).
    total = 0
    for depth in range(1, layers + 1):
        convs = [["plain"] * 10 + ["attention"] * 2] + [["plain"] * 11 + ["attention"] * 2] * (depth - 1)
        for kinds in itertools.product(*convs):
            for head in ["plain"] * 3 + ["attention"]:
                asked = (4 if "attention" in kinds else 1) * (3 if "attention" in (*kinds, head) else 1)
                # width, norm, activation, two dropouts; residual and jump from the second layer on; propagation
                total += asked * 4 * 3 * 5 * 5 * 5 * (1 if depth == 1 else 2 * 3) * (1 + 3 * 2)
    assert gnn_node(FEATURES, CLASSES, layers).size() == total


def test_documented_size() -> None:
    assert small().size() == 3_113_334_000
    assert "3,113,334,000" in (gnn_node.__doc__ or "")


def test_gcn_of_the_literature() -> None:
    space, batch = gnn_node(FEATURES, CLASSES), node_batch()
    model = build(space, space.architecture(LITERATURE["gcn"])).eval()
    first, second = GCNConv(FEATURES, 16), GCNConv(16, CLASSES)
    first.load_state_dict(model.conv1.state_dict())
    second.load_state_dict(model.head.state_dict())
    x, edges = batch.inputs
    assert torch.equal(model(x, edges), second(first(x, edges).relu(), edges))
    dropouts = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert dropouts == [0.5, 0.5]
    assert sum(p.numel() for p in build_on_cora("gcn").parameters()) == 23_063  # as published with the code of GCN


def test_gat_and_appnp_of_the_literature() -> None:
    gat = build_on_cora("gat")
    assert sum(p.numel() for p in gat.parameters()) == 1433 * 64 + 3 * 64 + 64 * 7 + 3 * 7
    attention = [m for m in gat.modules() if isinstance(m, GATConv)]
    assert [(m.heads, m.out_channels, m.dropout) for m in attention] == [(8, 8, 0.6), (1, 7, 0.6)]
    appnp = build_on_cora("appnp")
    assert [(m.K, m.alpha) for m in appnp.modules() if isinstance(m, APPNP)] == [(10, 0.1)]
    assert sum(p.numel() for p in appnp.parameters()) == 1433 * 64 + 64 + 64 * 7 + 7


def build_on_cora(name: str) -> nn.Module:
    space = gnn_node(1433, 7)
    return build(space, space.architecture(LITERATURE[name]))


def test_the_head_reads_what_depth_and_jump_say() -> None:
    space, batch = small(), node_batch()
    for depth, jump in itertools.product((1, 2, 3), ("last", "cat", "max")):
        choices = {**BASE, "conv3": "fc", "depth": str(depth), "jump": jump, "residual": "add"}
        architecture = space.architecture(choices)
        assert ("jump" in architecture) == (depth > 1)
        model = build(space, architecture).eval()
        h, hidden = batch.inputs[0], []
        for i in range(1, depth + 1):
            conv = getattr(model, f"conv{i}")
            out = conv(h) if i == 3 else conv(h, batch.inputs[1])
            h = out.relu() + (h if i > 1 else 0)
            hidden.append(h)
        joined = {"last": h, "cat": torch.cat(hidden[::-1], 1), "max": torch.stack(hidden).amax(0)}[jump]
        torch.testing.assert_close(model(*batch.inputs), model.head(joined))


def test_pna_scales_by_degree() -> None:
    x, edges = node_batch().inputs
    torch.manual_seed(0)
    few = PNA(FEATURES, 16, [0, 0, 1])
    many = PNA(FEATURES, 16, [0] * 20 + [1])
    many.load_state_dict(few.state_dict() | {k: v for k, v in many.state_dict().items() if "avg_deg" in k})
    assert not torch.allclose(few(x, edges), many(x, edges))
    same_means = PNA(FEATURES, 16, [0, 0, 7])
    same_means.load_state_dict(few.state_dict())
    assert torch.equal(few(x, edges), same_means(x, edges))


def test_degrees_reach_the_convolution() -> None:
    space = gnn_node(FEATURES, CLASSES, degrees=[0, 4, 2])
    model = build(space, space.architecture({**BASE, "conv1": "pna"}))
    assert model.conv1.conv.aggr_module.avg_deg_lin.item() == pytest.approx((4 + 2 * 2) / 6)
    assert space.fingerprint() != small().fingerprint()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 0}, "at least one layer"),
        ({"widths": [12]}, "width 12"),
        ({"widths": [32, 16]}, "ascending"),
        ({"degrees": []}, "degrees"),
        ({"degrees": [3, -1]}, "degrees"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, list[int]], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        gnn_node(FEATURES, CLASSES, **arguments)


@pytest.mark.parametrize("form", ["code", pytest.param("torch-export", marks=pytest.mark.slow)])
def test_every_operator_leaves_without_nasgraph(form: str, tmp_path: Path) -> None:
    space = small()
    firsts, seconds = options("conv1"), options("conv2")[::-1]
    architectures = [
        space.architecture({**BASE, "conv1": first, "conv2": second, "head": head, "propagate": "appnp"})
        for first, second, head in zip(firsts, seconds, itertools.cycle(options("head")), strict=False)
    ]
    requests = [Request(build(space, a), tmp_path / str(i), space, a, (form,)) for i, a in enumerate(architectures)]
    for architecture, results in zip(architectures, export_many(requests), strict=True):
        for result in results:
            assert result.status == "ok", f"{result.format}: {result.detail}: {architecture}"


def test_random_samples_reach_every_option() -> None:
    space, rng = small(), random.Random(0)
    seen = {item for _ in range(400) for item in space.sample(rng).items()}
    assert {(name, label) for name, choice in space.choices.items() for label in choice.labels} == seen
