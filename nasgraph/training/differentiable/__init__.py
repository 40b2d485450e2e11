"""Differentiable search in a supernet's store: the choices become weights, and gradients move them."""

from nasgraph.training.differentiable.coded import coded
from nasgraph.training.differentiable.distributions import distributions
from nasgraph.training.differentiable.relaxed import Relaxed
from nasgraph.training.differentiable.tangle import tangle
from nasgraph.training.differentiable.two_path import two_path

__all__ = ["Relaxed", "coded", "distributions", "tangle", "two_path"]
