"""Objectives that need training."""

from __future__ import annotations

from nasgraph.objectives.base import Candidate, Objective


def mean_validation_accuracy(candidate: Candidate) -> float:
    """Mean over the seeds of the best validation accuracy of a training run, a fraction.

    The single values stand in the result's details as ``val_accuracies``.
    """
    return sum(fit.val for fit in candidate.fits) / len(candidate.fits)


val_accuracy = Objective("val_accuracy", "maximize", mean_validation_accuracy)
