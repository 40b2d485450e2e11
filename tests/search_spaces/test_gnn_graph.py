"""Graph classifiers: readouts by equation, order of nodes and of graphs, sizes, exports with any number of graphs."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nasgraph.build import build
from nasgraph.errors import SpaceError
from nasgraph.export.folder import Request, export_many
from nasgraph.predictors.zero_cost import gradsign, naswot, ntk_cond, params
from nasgraph.search_spaces.gnn_graph import READOUTS, Readout, gnn_graph
from nasgraph.space import Architecture, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.tasks import Batch
from nasgraph.testing import SpaceExam

PLAIN: dict[str, Any] = {"depth": "1", "width": 16, "heads": 2, "attention_dropout": 0.0, "dropout": 0.0}
PLAIN |= {"norm": "none", "activation": "relu", "readout": "sum"}


def small() -> SearchSpace:
    return gnn_graph(5, 3, layers=2, widths=(8, 16))


class TestSpace(SpaceExam):
    space = staticmethod(small)
    classes = 3
    exported = 1


def unions(graphs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``graphs`` random graphs of 2 to 6 nodes, as one."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    sizes = torch.tensor([rng.randint(2, 6) for _ in range(graphs)])
    starts = sizes.cumsum(0) - sizes
    pairs = [
        (int(start) + a, int(start) + b)
        for start, size in zip(starts, sizes, strict=True)
        for a, b in itertools.combinations(range(int(size)), 2)
        if b == a + 1 or rng.random() < 0.4
    ]
    half = torch.tensor(pairs).T
    x = torch.randn(int(sizes.sum()), 5, generator=generator)
    return x, torch.cat([half, half.flip(0)], 1), torch.arange(graphs).repeat_interleave(sizes), sizes


def samples(space: SearchSpace, n: int) -> list[Architecture]:
    rng = random.Random(0)
    return [space.sample(rng) for _ in range(n)]


# ---- readout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", READOUTS)
def test_readout_by_a_plain_loop(how: str) -> None:
    x, _, graph, sizes = unions(7)
    x = x - 3  # a maximum of negative numbers is not 0
    found = Readout(how)(x, graph, sizes)
    for i, part in enumerate(x.split(sizes.tolist())):
        expected = {"sum": part.sum(0), "mean": part.mean(0), "max": part.amax(0)}[how]
        torch.testing.assert_close(found[i], expected)


def test_a_graph_without_nodes_reads_as_zeros() -> None:
    for how in ("sum", "max"):
        found = Readout(how)(torch.ones(2, 3), torch.tensor([0, 2]), torch.tensor([1, 0, 1]))
        assert torch.equal(found, torch.tensor([[1.0] * 3, [0.0] * 3, [1.0] * 3]))


def test_unknown_readouts_are_refused() -> None:
    with pytest.raises(SpaceError, match="no readout 'median'"):
        Readout("median")


# ---- networks -------------------------------------------------------------------------------------------------------


def test_a_graph_is_classified_alone_as_among_others() -> None:
    """In evaluation mode, so BatchNorm mixes nothing. And graphs may come in any order."""
    space, (x, edges, graph, sizes) = small(), unions(6)
    for arch in samples(space, 25):
        model = build(space, arch).double().eval()
        together = model(x.double(), edges, graph, sizes)
        for i in range(len(sizes)):
            mine, start = graph == i, int(sizes[:i].sum())
            inside = mine[edges[0]]
            alone = model(x.double()[mine], edges[:, inside] - start, torch.zeros_like(graph[mine]), sizes[i : i + 1])
            torch.testing.assert_close(alone[0], together[i], msg=str(arch))


def test_the_order_of_nodes_does_not_matter() -> None:
    space, (x, edges, graph, sizes) = small(), unions(5)
    starts = (sizes.cumsum(0) - sizes).tolist()
    order = torch.cat([start + torch.randperm(int(size)) for start, size in zip(starts, sizes, strict=True)])
    place = order.argsort()
    for arch in samples(space, 25):
        model = build(space, arch).double().eval()
        before = model(x.double(), edges, graph, sizes)
        torch.testing.assert_close(model(x.double()[order], place[edges], graph, sizes), before, msg=str(arch))


def test_edges_matter() -> None:
    space, (x, edges, graph, sizes) = small(), unions(5)
    for conv in space.choices["conv1"].labels:
        model = build(space, space.architecture({**PLAIN, "conv1": conv})).eval()
        same = torch.allclose(model(x, edges, graph, sizes), model(x, edges[:, :4], graph, sizes))
        assert same == (conv == "fc"), conv


def test_parameters_by_equation() -> None:
    """A GIN (Xu et al. 2019) of two layers: two linear layers each; the readout has none; a head of two layers."""
    space = gnn_graph(5, 3, layers=2)
    for jump, width in itertools.product(("last", "cat"), (16, 32)):
        choices = {**PLAIN, "depth": "2", "conv1": "gin", "conv2": "gin", "residual": "none"}
        model = build(space, space.architecture({**choices, "jump": jump, "width": width}))
        read = width * (2 if jump == "cat" else 1)
        gin = (5 * width + width) + 3 * (width * width + width)
        assert params(model, Batch((), torch.zeros(1))) == gin + (read * width + width) + (width * 3 + 3)


def test_size_by_equation() -> None:
    """For each depth the convolutions; heads and their dropout where one has attention; shared choices."""
    shared = 2 * 3 * 5 * 3 * 3  # widths, norms, activations, dropout, readouts

    def layers(depth: int) -> int:
        plain = 10**depth
        return plain + (12**depth - plain) * 4 * 2  # heads, attention dropout

    assert small().size() == shared * (layers(1) + layers(2) * 2 * 3)  # residual, jump
    assert gnn_graph(3, 2).size() == 3 * shared // 2 * (layers(1) + (layers(2) + layers(3)) * 2 * 3)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(SpaceError, match="at least one layer"):
        gnn_graph(5, 3, layers=0)
    with pytest.raises(SpaceError, match="12 is not a multiple of 8"):
        gnn_graph(5, 3, widths=(12,))
    with pytest.raises(SpaceError, match="at least one node"):
        gnn_graph(5, 3, degrees=[0, 0])


@pytest.mark.parametrize("graphs", [1, 2, 3])
def test_a_subnet_is_its_slice(graphs: int) -> None:
    supernet, inputs = Supernet(small()), unions(graphs)
    for arch in samples(supernet.space, 25):
        alone, shared = supernet.extract(arch).eval(), supernet.subnet(arch).eval()
        assert torch.equal(alone(*inputs), shared(*inputs)), arch


def test_proxies_score_graph_classifiers() -> None:
    space, batch = small(), Batch(unions(8), torch.arange(8) % 3)
    for arch in samples(space, 5):
        for proxy in (gradsign, naswot, ntk_cond):
            assert math.isfinite(proxy(build(space, arch), batch)), (proxy, arch)


@pytest.mark.slow
def test_every_convolution_and_readout_exports_with_any_number_of_graphs(tmp_path: Path) -> None:
    space = small()
    requests = []
    for i, conv in enumerate(space.choices["conv1"].labels):
        arch = {**PLAIN, "depth": "2", "conv1": conv, "conv2": conv, "norm": "batch", "residual": "add", "jump": "max"}
        arch |= {"readout": READOUTS[i % 3], "activation": "elu"}
        found = space.architecture(arch)
        requests.append(
            Request(build(space, found), tmp_path / str(i), space, found, ("torch-export", "onnx"), unions(9))
        )
    for request, results in zip(requests, export_many(requests), strict=True):
        for result in results:
            assert result.status == "ok", f"{result.format}: {result.detail}: {request.architecture}"
            assert len(result.sizes) == 2  # 9 graphs, and 3
