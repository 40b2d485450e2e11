"""Some samples with their labels: what training, evaluation and a training-free proxy see of a task."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """``n`` labelled samples.

    A sample has one class, or one at each of its positions: ``target`` is ``(n,)``, or ``(n, length)`` for sequences
    whose every position is predicted; class numbers. The model returns logits of shape ``(*target.shape, classes)``.

    Shapes: ``inputs`` go to the model by position. ``index`` ``(n,)`` holds the rows of the model's output that are the
    samples (``None``: all rows are). So a node task passes its whole graph as inputs, and an image task only the images
    of the batch.
    """

    inputs: tuple[Tensor, ...]
    target: Tensor
    index: Tensor | None = None

    def logits(self, model: nn.Module) -> Tensor:
        """The model's output for each sample, ``(n, classes)`` or ``(n, length, classes)``."""
        outputs: Tensor = model(*self.inputs)
        return outputs if self.index is None else outputs[self.index]

    def outputs(self, model: nn.Module) -> Tensor:
        """Logits of all predictions in one list: ``(n, classes)``, of sequences ``(n * length, classes)``."""
        logits = self.logits(model)
        return logits if self.target.dim() == 1 else logits.flatten(0, -2)

    def losses(self, outputs: Tensor) -> Tensor:
        """Cross-entropy of each sample in nats, ``(n,)``; of a sequence the mean over its positions.

        Shapes: ``outputs`` as :meth:`outputs` or :meth:`logits` returns them.
        """
        if self.target.dim() == 1:
            return F.cross_entropy(outputs, self.target, reduction="none")
        every = F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), self.target.flatten(), reduction="none")
        return every.view(len(self.target), -1).mean(dim=1)

    def correct(self, outputs: Tensor) -> Tensor:
        """Of each sample the share of its predictions that are right, ``(n,)``: 0 or 1 where there is only one.

        Shapes: as :meth:`losses`.
        """
        right = (outputs.argmax(dim=-1).view(self.target.shape) == self.target).float()
        return right if right.dim() == 1 else right.mean(dim=1)

    def loss(self, model: nn.Module) -> Tensor:
        """Mean cross-entropy of the samples, a scalar."""
        return self.losses(self.outputs(model)).mean()


def balanced(labels: Tensor, n: int, seed: int) -> Tensor:
    """Positions of ``n`` of ``labels`` ``(m,)``, or of all; the classes' counts differ by at most one where they last.

    Drawn from ``seed``, on the CPU.

    Raises: ValueError: ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"a batch of {n} samples: ask for at least 1")
    labels = labels.cpu()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    turn = torch.zeros(len(labels), dtype=torch.long)  # of a sample among those of its class
    for label in range(int(labels.max()) + 1):
        mine = order[labels[order] == label]
        turn[mine] = torch.arange(len(mine))
    return order[turn[order].argsort(stable=True)][:n]
