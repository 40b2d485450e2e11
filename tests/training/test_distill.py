"""Divergences against their definitions and PyTorch's autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nasgraph.errors import ConfigError
from nasgraph.training.distill import adaptive_alpha, alpha_divergence, divergence, kl


def logits(n: int = 7, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, n, classes, dtype=torch.float64, generator=generator)
    return student.requires_grad_(), teacher


def definition(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    p, q = teacher.softmax(1), student.softmax(1)
    if alpha == 1:
        return (p * (p / q).log()).sum(1)
    if alpha == 0:
        return (q * (q / p).log()).sum(1)
    return (q * ((p / q) ** alpha - 1)).sum(1) / (alpha * (alpha - 1))


def gradient(of: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(of.sum(), student)[0]


def test_kl_is_the_divergence_from_the_teacher() -> None:
    student, teacher = logits()
    torch.testing.assert_close(kl(student, teacher), definition(student, teacher, 1).mean())
    kl(student, teacher.requires_grad_()).backward()
    assert teacher.grad is None
    assert float(kl(teacher, teacher).detach()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_alpha_divergence_and_its_gradient(alpha: float) -> None:
    student, teacher = logits()
    ours, theirs = alpha_divergence(student, teacher, alpha), definition(student, teacher, alpha)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient(ours, student), gradient(theirs, student), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_alpha_divergence_tends_to_kl(limit: float) -> None:
    student, teacher = logits()
    exact = definition(student, teacher, limit)
    slope = gradient(exact, student)
    for step in (1e-4, -1e-4):
        near = alpha_divergence(student, teacher, limit + step)
        torch.testing.assert_close(near, exact, rtol=0, atol=1e-3)
        torch.testing.assert_close(gradient(near, student), slope, rtol=0, atol=1e-3)
        assert not torch.equal(near, exact)


@pytest.mark.parametrize("alpha", [-1.0, 0.5, 1.0, 2.0])
def test_the_ratio_is_clipped_in_value_and_gradient(alpha: float) -> None:
    """The oracle: -sum stopgrad(q rho) log q with the clipped power, by autograd."""
    student, teacher = logits()
    q = student.softmax(1)
    power = (teacher.softmax(1) / q.detach()) ** alpha
    assert (power > 1.2).any() and (power < 1.2).any()
    power = power.clamp(0, 1.2)
    slope = power if alpha == 1 else power / alpha
    expected = -(q.detach() * slope * q.log()).sum(1)
    ours = alpha_divergence(student, teacher, alpha, clip=1.2)
    torch.testing.assert_close(gradient(ours, student), gradient(expected, student))
    value = power * power.log() if alpha == 1 else (power - 1) / (alpha * (alpha - 1))
    torch.testing.assert_close(ours, (q * value).sum(1))


def test_adaptive_takes_the_larger_of_each_sample() -> None:
    student, teacher = logits(50)
    below, above = definition(student, teacher, -1), definition(student, teacher, 1)
    larger = below > above
    assert larger.any() and not larger.all()
    expected = torch.where(larger, below, above).mean()
    ours = adaptive_alpha(student, teacher, clip=1e9)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradient(ours, student), gradient(expected, student))


def test_a_far_teacher_gives_finite_gradients() -> None:
    student = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    teacher = torch.tensor([[-200.0, 0.0, 200.0]])
    loss = adaptive_alpha(student, teacher)
    assert loss.isfinite() and gradient(loss, student).isfinite().all()


def test_divergences_by_name() -> None:
    assert (divergence("none"), divergence("kl"), divergence("alpha")) == (None, kl, adaptive_alpha)
    with pytest.raises(ConfigError, match="unknown distillation 'alfa'. Did you mean 'alpha'"):
        divergence("alfa")
