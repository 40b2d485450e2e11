"""Tasks: data, a loss and a metric."""

from nasgraph.tasks.base import Task
from nasgraph.tasks.batch import Batch
from nasgraph.tasks.graphs import Graphs, GraphTask, graphs_from_function, tudataset
from nasgraph.tasks.images import ImageData, ImageTask, cifar10, digits_images, images_from_function, mnist
from nasgraph.tasks.node import NodeData, NodeTask, amazon, coauthor, digits_knn, from_function, planetoid
from nasgraph.tasks.text import Rows, RowTask, Text, TextTask, characters, digits_rows

__all__ = [
    "Batch",
    "GraphTask",
    "Graphs",
    "ImageData",
    "ImageTask",
    "NodeData",
    "NodeTask",
    "RowTask",
    "Rows",
    "Task",
    "Text",
    "TextTask",
    "amazon",
    "characters",
    "cifar10",
    "coauthor",
    "digits_images",
    "digits_knn",
    "digits_rows",
    "from_function",
    "graphs_from_function",
    "images_from_function",
    "mnist",
    "planetoid",
    "tudataset",
]
