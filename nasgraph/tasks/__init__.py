"""Tasks: data, a loss and a metric."""

from nasgraph.tasks.base import Task
from nasgraph.tasks.batch import Batch
from nasgraph.tasks.node import NodeData, NodeTask, amazon, coauthor, digits_knn, from_function, planetoid

__all__ = [
    "Batch",
    "NodeData",
    "NodeTask",
    "Task",
    "amazon",
    "coauthor",
    "digits_knn",
    "from_function",
    "planetoid",
]
