"""Flatness against closed forms: quadratic losses, whose expected increase under Gaussian noise is known."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor, nn

from nasgraph.errors import NotFinite
from nasgraph.supernet import Supernet
from nasgraph.supernet.flatness import EPS, SIGMAS, flatness, losses_around, subnet_flatness
from nasgraph.tasks import NodeTask, digits_knn
from nasgraph.training.policies import Uniform


class Point(nn.Module):
    """Weights alone."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def quadratic(diagonal: Tensor, slope: float = 0.0) -> object:
    def loss(model: nn.Module) -> float:
        w = model.weight.detach()
        return float(0.5 * (diagonal * w * w).sum() + slope * w.sum())

    return loss


def test_the_increase_of_a_quadratic_loss_is_half_sigma_squared_times_the_trace() -> None:
    """E[L(theta + sigma eps)] - L(theta) = sigma^2 trace(H) / 2, whatever the slope at theta."""
    diagonal = torch.linspace(0.5, 2.0, 400, dtype=torch.float64)
    model = Point(*[0.3] * 400)
    at, *around = losses_around(model, quadratic(diagonal, slope=7.0), (0.1, 0.2, 0.4), draws=200)
    assert at == pytest.approx(quadratic(diagonal, slope=7.0)(model))
    spread = math.sqrt(2 * float((diagonal**2).sum()) / 200) / float(diagonal.sum())  # of the mean, relative
    assert spread < 0.01
    for sigma, loss in zip((0.1, 0.2, 0.4), around, strict=True):
        assert loss - at == pytest.approx(sigma**2 * float(diagonal.sum()) / 2, rel=4 * spread)


def test_a_linear_model_with_squared_loss() -> None:
    """The Hessian of mean squared error in the weights of a linear layer is 2 X^T X / n, for each output."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 20, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64)
    model = nn.Linear(20, 5, bias=False, dtype=torch.float64)

    def loss(network: nn.Module) -> float:
        return float((network(x) - y).detach().square().sum(dim=1).mean())

    at, around = losses_around(model, loss, (0.05,), draws=400)
    gram = 2 * x.T @ x / 30
    expected = 0.05**2 / 2 * 5 * float(gram.trace())
    spread = math.sqrt(2 * 5 * float((gram @ gram).trace()) / 400) / (5 * float(gram.trace()))
    assert around - at == pytest.approx(expected, rel=4 * spread)


def test_flatness_is_the_formula_of_the_expected_losses() -> None:
    """One weight, curvature h, one direction e: L_i - L_0 = h (sigma_i e)^2 / 2, so the slopes telescope by hand."""
    h, eps = 3.0, float(torch.randn(1, generator=torch.Generator().manual_seed(5)))
    rises = [h * (sigma * eps) ** 2 / 2 for sigma in (0.0, *SIGMAS)]
    slopes = [(b - a) / (t - s) for a, b, s, t in zip(rises, rises[1:], (0.0, *SIGMAS), SIGMAS, strict=False)]
    found = flatness(Point(0.0), quadratic(torch.tensor([h])), draws=1, seed=5)
    assert found == pytest.approx(1 / (sum(slopes) + EPS), rel=1e-6)


def test_a_constant_loss_is_as_flat_as_it_gets_whatever_its_height() -> None:
    """The height of the loss is no slope: without L(0) subtracted, a loss of 9 would count as a slope of 9,000."""
    assert flatness(Point(1.0, 2.0), lambda _: 9.0) == pytest.approx(1 / EPS)


def test_sharper_is_smaller_and_the_model_is_left_alone() -> None:
    model = Point(0.2, -0.1)
    before = model.weight.detach().clone()
    scores = [flatness(model, quadratic(torch.tensor([h, h]))) for h in (1.0, 4.0, 16.0)]
    assert scores == sorted(scores, reverse=True) and scores[0] > 2 * scores[2]
    assert torch.equal(model.weight.detach(), before)
    assert flatness(model, quadratic(torch.ones(2))) == scores[0]  # the same seed, the same noise
    assert flatness(model, quadratic(torch.ones(2)), seed=1) != scores[0]


def test_scales_and_shifts_of_normalisation_are_not_perturbed_and_tied_weights_move_together() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
    model[3].weight = model[0].weight
    seen = []

    def loss(network: nn.Module) -> float:
        assert network[3].weight is network[0].weight
        for norm in (network[1], network[2]):
            assert torch.equal(norm.weight.detach(), torch.ones(4)) and torch.equal(norm.bias.detach(), torch.zeros(4))
        seen.append(network[0].weight.detach().clone())
        return 0.0

    losses_around(model, loss, (0.1,), draws=1)
    assert torch.equal(seen[0], model[0].weight.detach()) and len(seen) == 3
    assert torch.allclose(seen[1] + seen[2], 2 * seen[0], atol=1e-6) and not torch.equal(seen[1], seen[0])


@pytest.fixture(scope="module")
def task() -> NodeTask:
    return digits_knn()


def test_of_a_subnet(task: NodeTask) -> None:
    from nasgraph.search_spaces.gnn_node import gnn_node

    space = gnn_node(**task.sizes, layers=2, widths=(8, 16))
    supernet = Supernet(space, task)
    supernet.train(Uniform(space), 3)
    stored = {key: value.detach().clone() for key, value in supernet.store.items()}
    rng = random.Random(0)
    architecture = next(a for a in (space.sample(rng) for _ in range(50)) if supernet.has_batch_norm(a))
    found = subnet_flatness(supernet, architecture, draws=1)
    model = supernet.calibrated(architecture)
    assert found == flatness(model, lambda network: task.score(network, "val")["loss"], draws=1)
    assert 0 < found < 1 / EPS
    assert all(torch.equal(value.detach(), stored[key]) for key, value in supernet.store.items())


def test_bad_input() -> None:
    def fine(_: nn.Module) -> float:
        return 1.0

    for sigmas in ((), (0.0, 1.0), (0.2, 0.1), (-1.0,)):
        with pytest.raises(ValueError, match="that grow"):
            flatness(Point(1.0), fine, sigmas)
    with pytest.raises(ValueError, match="at least 1"):
        flatness(Point(1.0), fine, draws=0)
    with pytest.raises(ValueError, match="no parameter to perturb"):
        flatness(nn.BatchNorm1d(3), fine)
    with pytest.raises(NotFinite, match="noise 0.001 is nan"):
        flatness(Point(1.0), lambda model: math.nan if float(model.weight.detach()) != 1.0 else 1.0)
