"""Objectives: what is measured on a candidate."""

from nasgraph.objectives.base import (
    Candidate,
    Evaluator,
    Failed,
    Objective,
    Result,
    Scored,
    check_alone,
    failure,
    find_objective,
    slots,
)
from nasgraph.objectives.shared import SharedCandidate, SharedEvaluator

__all__ = [
    "Candidate",
    "Evaluator",
    "Failed",
    "Objective",
    "Result",
    "Scored",
    "SharedCandidate",
    "SharedEvaluator",
    "check_alone",
    "failure",
    "find_objective",
    "slots",
]
