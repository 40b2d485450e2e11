"""Training: one plain loop."""

from nasgraph.training.loop import Fit, TrainSettings, evaluate, train

__all__ = ["Fit", "TrainSettings", "evaluate", "train"]
