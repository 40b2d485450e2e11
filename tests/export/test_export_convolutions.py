"""Every convolution of the GNN space leaves in every format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nasgraph.build import build
from nasgraph.export import Request, export_many

CONVOLUTIONS = ("gat", "gatv2", "gcn", "gin", "cheb", "sage_mean", "sage_max", "arma", "graph", "gen", "pna", "fc")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_convolution_in_every_format(tmp_path: Path) -> None:
    from nasgraph.search_spaces.gnn_node import gnn_node

    space = gnn_node(16, 5, degrees=[0, 2, 3, 4, 1])
    assert set(space.choices["conv1"].labels) == set(CONVOLUTIONS)
    generator = torch.Generator().manual_seed(1)
    inputs = (torch.randn(40, 16, generator=generator), torch.randint(0, 40, (2, 130), generator=generator))
    requests = []
    for i, conv in enumerate(CONVOLUTIONS):
        choices = {name: choice.labels[0] for name, choice in space.choices.items()}
        choices |= {"conv1": conv, "conv2": conv, "depth": "2", "width": 16, "residual": "add"}
        choices |= {"jump": ("cat", "max")[i % 2], "norm": ("batch", "layer")[i % 2]}
        choices |= {"head": ("linear", "gcn", "gat", "sage")[i % 4]}
        choices |= {"activation": space.choices["activation"].labels[i % 5], "propagate": ("none", "appnp")[i % 2]}
        arch = space.architecture(choices)
        requests.append(Request(build(space, arch), tmp_path / conv, space, arch, inputs=inputs))
    for request, results in zip(requests, export_many(requests), strict=True):
        assert [result.detail for result in results if result.status != "ok"] == [], request.folder.name
        assert [result.max_abs_diff for result in results[:2]] == [0.0, 0.0]
        assert all(result.max_abs_diff < 1e-5 for result in results)
