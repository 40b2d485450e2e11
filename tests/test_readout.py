"""The refitted readout against scikit-learn's ridge and against leaving samples out one by one."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from torch import nn

from nasgraph.search_spaces.gnn_node import gnn_node
from nasgraph.supernet import Supernet
from nasgraph.supernet.readout import PENALTIES, readout_accuracy, refit, ridge
from nasgraph.tasks import digits_knn
from nasgraph.tasks.batch import Batch


def samples(n: int = 40, features: int = 12, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=generator)
    y = (x[:, :classes] + 0.3 * torch.randn(n, classes, generator=generator)).argmax(dim=1)
    return x, y


def test_ridge_is_scikit_learns_and_its_error_is_that_of_leaving_one_out() -> None:
    x, labels = (each.double() for each in samples())
    y = F.one_hot(labels.long(), 3).double()
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    weights, error = ridge(x, y)
    size = float((x @ x.T).diagonal().mean())
    errors = []
    for penalty in PENALTIES:
        slow = []
        for i in range(len(x)):
            rest = [j for j in range(len(x)) if j != i]
            fit = Ridge(alpha=penalty * size, fit_intercept=False).fit(x[rest].numpy(), y[rest].numpy())
            slow.append(((fit.predict(x[i : i + 1].numpy())[0] - y[i].numpy()) ** 2).mean())
        errors.append(sum(slow) / len(slow))
    assert error == pytest.approx(min(errors), rel=1e-8)
    best = PENALTIES[errors.index(min(errors))]
    plain = Ridge(alpha=best * size, fit_intercept=False).fit(x.numpy(), y.numpy())
    assert torch.allclose(weights.T, torch.from_numpy(plain.coef_), atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_predicts_the_regression_whatever_the_features_scale(bias: bool) -> None:
    x, y = samples(n=200, features=6)
    x = x * torch.tensor([1.0, 100.0, 1e-3, 1.0, 1.0, 1.0]) + 5
    x[:, 5] = 2.0  # constant: no information, and no division by zero
    model = nn.Sequential(nn.Identity(), nn.Linear(6, 3, bias=bias))
    refit(model, Batch((x,), y))
    z = x[:, :5].double()
    z = (z - z.mean(dim=0)) / z.std(dim=0, correction=0)
    weights, _ = ridge(z, F.one_hot(y, 3).double() - F.one_hot(y, 3).double().mean(dim=0))
    expected = z @ weights + F.one_hot(y, 3).double().mean(dim=0)
    assert torch.allclose(model(x).double(), expected, atol=1e-3)
    assert float((model(x).argmax(dim=1) == y).float().mean()) > 0.8
    assert float(model[1].weight.detach()[:, 5].abs().max()) == 0.0


def test_of_a_subnet_the_store_is_left_alone_and_the_readout_is_better_than_an_untrained_head() -> None:
    task = digits_knn()
    space = gnn_node(**task.sizes, layers=2, widths=(16, 32))
    supernet = Supernet(space, task)
    stored = {key: value.detach().clone() for key, value in supernet.store.items()}
    rng = random.Random(0)
    chosen = [space.sample(rng) for _ in range(12)]
    linear = [each for each in chosen if str(each["head"]) == "linear"]
    assert linear
    for architecture in linear:
        assert readout_accuracy(supernet, architecture) > supernet.evaluate([architecture])[0]
    other = next(each for each in (space.sample(rng) for _ in range(100)) if str(each["head"]) != "linear")
    with pytest.raises(ValueError, match="does not end in a linear layer"):
        readout_accuracy(supernet, other)
    assert all(torch.equal(value.detach(), stored[key]) for key, value in supernet.store.items())


def test_bad_input() -> None:
    x, y = samples()
    with pytest.raises(ValueError, match="does not end in a linear layer"):
        refit(nn.Sequential(nn.Linear(12, 3), nn.ReLU()), Batch((x,), y))
    with pytest.raises(ValueError, match="40 inputs for 39 samples"):
        refit(nn.Linear(12, 3), Batch((x,), y[1:]))
