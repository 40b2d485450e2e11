"""Exams for plug-ins. Inherit one in a test file and pytest asks its questions of your code; needs pytest.

::

    class TestMine(nasgraph.testing.ProxyExam):
        proxy = staticmethod(my_proxy)
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from nasgraph.errors import NotFinite
from nasgraph.tasks.batch import Batch

CONVOLUTIONS = ("gat", "gatv2", "gcn", "gin", "cheb", "sage-mean", "sage-max", "arma", "graph", "gen", "pna", "fc")


class ProxyExam:
    """What every training-free proxy ``proxy(model, batch) -> float`` must do, on small graph and plain networks."""

    proxy: ClassVar[Callable[[nn.Module, Batch], float]]
    needs_labels: ClassVar[bool] = True
    """False: the score may not depend on ``batch.target``."""
    reads_weights: ClassVar[bool] = True
    """False: a count that is the same for any value of the weights."""
    can_be_zero: ClassVar[bool] = False
    """True: 0 is an answer. Otherwise it means that the proxy saw none of the layers."""

    @pytest.mark.parametrize("norm", ["batch", "layer"])
    @pytest.mark.parametrize("conv", CONVOLUTIONS)
    def test_finite_and_not_zero_on_every_convolution(self, conv: str, norm: str) -> None:
        score = self._score(node_model(conv, norm), node_batch())
        assert isinstance(score, float)
        assert math.isfinite(score)
        assert self.can_be_zero or score != 0.0

    def test_scores_a_plain_network_on_rows(self) -> None:
        score = self._score(plain_model(), plain_batch())
        assert math.isfinite(score)
        assert self.can_be_zero or score != 0.0

    @pytest.mark.parametrize("conv", ["gcn", "gat", "gin"])
    def test_leaves_the_model_as_it_was(self, conv: str) -> None:
        model, batch = node_model(conv, "batch"), node_batch()
        model.train()
        before = copy.deepcopy(model)
        inputs, generator = [x.clone() for x in batch.inputs], torch.random.get_rng_state()
        self._score(model, batch)
        assert torch.equal(torch.random.get_rng_state(), generator), "the global random number generator was used"
        assert all(torch.equal(a, b) for a, b in zip(batch.inputs, inputs, strict=True))
        assert all(not x.requires_grad for x in batch.inputs)
        old, new = before.state_dict(), model.state_dict()
        assert old.keys() == new.keys()
        assert [key for key in old if not torch.equal(old[key], new[key])] == []
        for (name, was), (_, now) in zip(before.named_modules(), model.named_modules(), strict=True):
            assert type(was) is type(now), name
            assert was.training == now.training, name
            hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            assert all(len(getattr(was, kind)) == len(getattr(now, kind)) for kind in hooks), name
        for name, parameter in model.named_parameters():
            assert parameter.grad is None, name
            assert parameter.requires_grad, name

    def test_same_model_same_score(self) -> None:
        model, batch = node_model("gat", "batch"), node_batch()
        first = self._score(model, batch)
        torch.rand(3)  # the caller's random numbers go on
        assert self._score(model.train(), batch) == first
        assert self._score(model.eval(), batch) == first
        assert self._score(node_model("gat", "batch"), node_batch()) == first

    def test_a_model_with_nan_weights_has_no_score(self) -> None:
        model, batch = node_model("gcn", "layer"), node_batch()
        score = self._score(model, batch)
        with torch.no_grad():
            next(p for p in model.parameters() if p.dim() >= 2).fill_(math.nan)
        if self.reads_weights:
            with pytest.raises(NotFinite):
                self._score(model, batch)
        else:
            assert self._score(model, batch) == score

    def test_the_order_of_hidden_units_does_not_matter(self) -> None:
        model, batch = plain_model().double(), plain_batch(torch.float64)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
        renamed, weights = copy.deepcopy(model), model.state_dict()
        weights |= {"0.weight": weights["0.weight"][order], "0.bias": weights["0.bias"][order]}
        weights |= {"2.weight": weights["2.weight"][:, order]}
        renamed.load_state_dict(weights)
        assert self._score(renamed, batch) == pytest.approx(self._score(model, batch), rel=1e-6)

    def test_labels_are_read_only_by_a_proxy_that_says_so(self) -> None:
        model, batch = node_model("gcn", "layer"), node_batch()
        other = Batch(batch.inputs, torch.zeros_like(batch.target), batch.index)
        assert (self._score(model, batch) != self._score(model, other)) == self.needs_labels

    def test_can_be_sent_to_a_worker(self) -> None:
        proxy = type(self).proxy
        assert pickle.loads(pickle.dumps(proxy)) is proxy

    def _score(self, model: nn.Module, batch: Batch) -> float:
        return type(self).proxy(model, batch)


def node_batch(dtype: torch.dtype = torch.float32) -> Batch:
    """Half of the 24 nodes of a random symmetric graph: 5 features, 3 classes, every node with a neighbour."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 5, generator=generator).to(dtype)  # the same numbers in any precision
    ring = torch.stack([torch.arange(24), (torch.arange(24) + 1) % 24])
    chords = torch.stack([torch.arange(0, 24, 3), torch.randint(2, 23, (8,), generator=generator)])
    chords[1] = (chords[0] + chords[1]) % 24  # neither loops nor edges of the ring
    half = torch.cat([ring, chords], 1)
    edges = torch.cat([half, half.flip(0)], 1)
    return Batch((x, edges), torch.arange(12) % 3, torch.arange(0, 24, 2))


def plain_batch(dtype: torch.dtype = torch.float32) -> Batch:
    """10 rows of 6 numbers, 3 classes."""
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    return Batch((x,), torch.arange(10) % 3)


def plain_model(seed: int = 0) -> nn.Sequential:
    """Linear 6-12, ReLU, linear 12-3."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def node_model(conv: str, norm: str, seed: int = 0) -> nn.Module:
    """Two layers of a convolution (of ``CONVOLUTIONS``); between them ``batch`` or ``layer`` norm, ReLU and dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _TwoLayers(conv, norm)


class _TwoLayers(nn.Module):
    def __init__(self, conv: str, norm: str) -> None:
        super().__init__()
        self.first, self.second = _convolution(conv, 5, 8), _convolution(conv, 8, 3)
        self.norm = nn.BatchNorm1d(8) if norm == "batch" else nn.LayerNorm(8)
        self.act, self.drop = nn.ReLU(), nn.Dropout(0.5)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.drop(self.act(self.norm(self.first(x, edge_index))))
        out: Tensor = self.second(x, edge_index)
        return out


def _convolution(name: str, width_in: int, width_out: int) -> nn.Module:
    import torch_geometric.nn as pyg

    def two_linear() -> nn.Module:
        return nn.Sequential(nn.Linear(width_in, 16), nn.ReLU(), nn.Linear(16, width_out))

    degrees = torch.tensor([0, 1, 8, 8, 4, 2, 1])
    makers: dict[str, Callable[[], Any]] = {
        "gat": lambda: pyg.GATConv(width_in, width_out, heads=2, concat=False, dropout=0.5),
        "gatv2": lambda: pyg.GATv2Conv(width_in, width_out, heads=2, concat=False, dropout=0.5),
        "gcn": lambda: pyg.GCNConv(width_in, width_out),
        "gin": lambda: pyg.GINConv(two_linear(), train_eps=True),
        "cheb": lambda: pyg.ChebConv(width_in, width_out, K=3),
        "sage-mean": lambda: pyg.SAGEConv(width_in, width_out, aggr="mean"),
        "sage-max": lambda: pyg.SAGEConv(width_in, width_out, aggr="max"),
        "arma": lambda: pyg.ARMAConv(width_in, width_out, num_stacks=2, num_layers=2),
        "graph": lambda: pyg.GraphConv(width_in, width_out),
        "gen": lambda: pyg.GENConv(width_in, width_out),
        "pna": lambda: pyg.PNAConv(
            width_in, width_out, ["mean", "max", "std"], ["identity", "amplification"], deg=degrees
        ),
        "fc": lambda: _NoMessages(width_in, width_out),
    }
    made: nn.Module = makers[name]()
    return made


class _NoMessages(nn.Linear):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)
