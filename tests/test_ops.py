"""Modules that spaces need beside torch's."""

from __future__ import annotations

import torch
from torch import nn

from nasgraph.ops import SparseDropout


def features(share: float) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(200, 100) * (torch.rand(200, 100) < share) + 0.0


def test_sparse_dropout_keeps_or_drops_each_entry_with_the_probability_of_dropout() -> None:
    x, module = features(0.1), SparseDropout(0.3).train()
    kept = torch.zeros_like(x)
    for _ in range(200):
        out = module(x)
        expected = torch.where(out == 0, out, x / (1 - 0.3))
        torch.testing.assert_close(out, expected)
        kept += out != 0
    share = kept[x != 0] / 200  # of n = about 2,000 entries, each of 200 draws
    n = share.numel()
    assert abs(float(share.mean()) - 0.7) < 5 * (0.3 * 0.7 / (200 * n)) ** 0.5
    # Independent draws: the variance of the shares is that of a binomial (its own spread is about sqrt(2 / n)).
    assert abs(float(share.var()) / (0.3 * 0.7 / 200) - 1) < 5 * (2 / n) ** 0.5


def test_sparse_dropout_is_dropout_where_a_gradient_is_asked() -> None:
    gradients = []
    for make in (SparseDropout, nn.Dropout):
        x = features(0.1).requires_grad_()
        torch.manual_seed(1)
        make(0.5).train()(x).sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert bool((gradients[0][features(0.1) == 0] != 0).any())  # entries that are zero have one too


def test_sparse_dropout_is_dropout_on_dense_features_and_the_identity_in_evaluation() -> None:
    x = features(0.9)
    torch.manual_seed(1)
    ours = SparseDropout(0.4).train()(x)
    torch.manual_seed(1)
    assert torch.equal(ours, nn.Dropout(0.4).train()(x))
    assert SparseDropout(0.4).eval()(features(0.1)).equal(features(0.1))
