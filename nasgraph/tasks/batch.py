"""Some samples with their labels: what a training-free proxy sees of a task."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """``n`` labelled samples.

    Shapes: ``inputs`` go to the model by position. ``index`` ``(n,)`` holds the rows of the model's output that are the
    samples (``None``: all rows are). ``target`` ``(n,)`` holds class numbers.
    So a node task passes its whole graph as inputs, and an image task only the images of the batch.
    """

    inputs: tuple[Tensor, ...]
    target: Tensor
    index: Tensor | None = None

    def outputs(self, model: nn.Module) -> Tensor:
        """Logits of the samples, ``(n, classes)``."""
        outputs: Tensor = model(*self.inputs)
        return outputs if self.index is None else outputs[self.index]

    def losses(self, outputs: Tensor) -> Tensor:
        """Cross-entropy of each sample, ``(n,)``, from ``outputs`` ``(n, classes)``."""
        return F.cross_entropy(outputs, self.target, reduction="none")

    def loss(self, model: nn.Module) -> Tensor:
        """Mean cross-entropy of the samples, a scalar."""
        return self.losses(self.outputs(model)).mean()
