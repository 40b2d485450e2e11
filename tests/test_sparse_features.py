"""Bags of words as sparse products (a benchmark's helper) against the dense features: outputs and gradients."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nasgraph.search_spaces.nas_bench_graph import OPS, architecture, nas_bench_graph
from nasgraph.supernet import Supernet


@pytest.fixture(scope="module")
def sparse() -> Any:
    path = Path(__file__).parents[1] / "benchmarks" / "sparse_features.py"
    spec = importlib.util.spec_from_file_location("sparse_features", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["sparse_features"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("op", OPS[:-1])
def test_outputs_and_gradients_are_those_of_dense_features(sparse: Any, op: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(30, 20, generator=generator) < 0.1).float()
    edges = torch.randint(0, 30, (2, 90), generator=generator)
    space = nas_bench_graph("cora", features=20, classes=3, width=8)
    supernet = Supernet(space)
    view = supernet.subnet(architecture((0, 0, 1, 2), [op, "skip", op, op])).eval()
    found = []
    with sparse.sparse_propagation():
        for inputs in (x, sparse.Rows(x.to_sparse_csr())):
            for parameter in supernet.parameters():
                parameter.grad = None
            out = view(inputs, edges)
            out.square().sum().backward()
            found.append([out.detach(), *(p.grad for p in supernet.parameters() if p.grad is not None)])
    dense, fast = found
    assert len(dense) == len(fast) > 4
    for one, other in zip(dense, fast, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_dropout_zeroes_entries_and_keeps_the_mean(sparse: Any) -> None:
    x = torch.ones(200, 50)
    dropped = torch.nn.functional.dropout(sparse.Rows(x.to_sparse_csr()), 0.7, True).features.to_dense()
    kept = dropped != 0
    assert torch.allclose(dropped[kept], torch.tensor(1 / 0.3))
    assert float(kept.float().mean()) == pytest.approx(0.3, abs=0.02)  # 10,000 draws: 4 standard deviations
    rows = sparse.Rows(x.to_sparse_csr())
    assert torch.nn.functional.dropout(rows, 0.7, False) is rows


def test_the_layers_are_as_before_afterwards(sparse: Any) -> None:
    with sparse.sparse_propagation():
        inside = [layer.propagate for layer in sparse.AGGREGATE_FIRST]
    after = [layer.propagate for layer in sparse.AGGREGATE_FIRST]
    assert all(one is not other for one, other in zip(inside, after, strict=True))
    with sparse.sparse_propagation():
        pass
    assert [layer.propagate for layer in sparse.AGGREGATE_FIRST] == after
