"""Quantised layers on sparse features (a benchmark's helper) against the dense features."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

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
    """In a process of its own, as the benchmark is: its helper writes into classes of PyG, and so may other tests."""
    if "NASGRAPH_TEST_ALONE" not in os.environ:
        me = f"{Path(__file__).name}::test_outputs_and_gradients_are_those_of_dense_features"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", me]
        environment = {**os.environ, "NASGRAPH_TEST_ALONE": "1"}
        done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        return
    from sparse_features import Rows

    generator, rng = torch.Generator().manual_seed(0), random.Random(0)
    x = torch.rand(30, 20, generator=generator)  # no number lies between two codes, where rounding would decide
    x = x * (torch.rand(30, 20, generator=generator) < 0.1)
    edges = torch.randint(0, 30, (2, 90), generator=generator)
    space = gnn_low_precision(20, 3, layers=1, operators=("gcn", "gat", "sage_mean", "graph"))
    space = space.narrowed({"activation_bits.head": [32], "aggregation_bits.head": [32]})
    seen = set()
    with bench.sparse_quantisation():
        for _ in range(25):
            architecture = space.sample(rng)
            model = build(space, architecture).eval()
            found = []
            for features in (x, Rows(x.to_sparse_csr())):
                model.zero_grad()
                out = model(features, edges)
                out.square().sum().backward()
                found.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
            seen.add((architecture["conv1"], architecture["activation_bits.conv1"]))
            assert len(found[0]) == len(found[1]) > 2
            for dense, sparse in zip(*found, strict=True):
                assert torch.allclose(dense, sparse, rtol=1e-4, atol=1e-5), architecture
    assert len(seen) > 8


def test_uniform_formats_name_every_layer(bench: Any) -> None:
    space = gnn_low_precision(20, 3)
    for network in bench.PLAIN.values():
        for weight, activation in bench.UNIFORM.values():
            found = space.architecture(bench.formatted(network, weight, activation))
            assert {found[f"weight_bits.{node}"] for node in ("conv1", "head")} == {weight}
            assert {found[f"{kind}.head"] for kind in ("activation_bits", "aggregation_bits")} == {activation}
