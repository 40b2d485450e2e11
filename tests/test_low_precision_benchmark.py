"""Quantised layers on sparse features (a benchmark's helper) against the dense features."""

from __future__ import annotations

import copy
import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_geometric.nn import SAGEConv

from nasgraph.build import build
from nasgraph.search_spaces.gnn_low_precision import gnn_low_precision

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("low_precision_gnn", FOLDER / "low_precision_gnn.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))


def test_outputs_and_gradients_are_those_of_dense_features(bench: Any) -> None:
    """Also of copies: PyG writes methods into a class when one of its layers is made, and when one is copied."""
    from sparse_features import Rows

    generator, rng = torch.Generator().manual_seed(0), random.Random(0)
    x = torch.rand(30, 20, generator=generator)  # no number lies between two codes, where rounding would decide
    x = x * (torch.rand(30, 20, generator=generator) < 0.1)
    edges = torch.randint(0, 30, (2, 90), generator=generator)
    space = gnn_low_precision(20, 3, layers=1, operators=("gcn", "gat", "sage_mean", "graph"))
    space = space.narrowed({"activation_bits.head": [32], "aggregation_bits.head": [32]})
    seen = set()
    before = space.narrowed({"conv1": ["graph"], "aggregation_bits.conv1": [8]}).sample(rng)
    copy.deepcopy(build(space, before))  # another's copy: GraphConv's quantised class has its methods by now
    with bench.sparse_quantisation():
        for step in range(40):
            architecture = space.sample(rng)
            model = build(space, architecture).eval()
            model = copy.deepcopy(model) if step % 2 else model
            found = []
            for features in (x, Rows(x.to_sparse_csr())):
                model.zero_grad()
                out = model(features, edges)
                out.square().sum().backward()
                found.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
            seen.add((architecture["conv1"], architecture["aggregation_bits.conv1"]))
            assert len(found[0]) == len(found[1]) > 2
            for dense, sparse in zip(*found, strict=True):
                assert torch.allclose(dense, sparse, rtol=1e-4, atol=1e-5), architecture
    assert seen == {(conv, bits) for conv in space.choices["conv1"].labels for bits in (4, 8, 32)}
    out = copy.deepcopy(build(space, before))(x, edges)  # and afterwards PyG is as it was
    assert torch.isfinite(out).all() and SAGEConv.propagate.__module__ != "sparse_features"


def test_uniform_formats_name_every_layer(bench: Any) -> None:
    space = gnn_low_precision(20, 3)
    for network in bench.PLAIN.values():
        for weight, activation in bench.UNIFORM.values():
            found = space.architecture(bench.formatted(network, weight, activation))
            assert {found[f"weight_bits.{node}"] for node in ("conv1", "head")} == {weight}
            assert {found[f"{kind}.head"] for kind in ("activation_bits", "aggregation_bits")} == {activation}
