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

__all__ = [
    "Candidate",
    "Evaluator",
    "Failed",
    "Objective",
    "Result",
    "Scored",
    "check_alone",
    "failure",
    "find_objective",
    "slots",
]
