"""One plain training loop: full batch or mini-batches, early stopping on validation, best weights restored."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from nasgraph.errors import ConfigError, NotFinite, did_you_mean
from nasgraph.transforms.ranges import start_new_steps

if TYPE_CHECKING:  # tasks import this module
    from nasgraph.tasks.batch import Batch

OPTIMIZERS = ("adam", "adamw", "sgd")
STARTING = 4  # training batches from which learned steps of activations start

Epoch = tuple[float, float, float]  # training loss, validation loss, validation accuracy


@dataclass(frozen=True)
class TrainSettings:
    """How a model is trained. The defaults are those of GCN on citation graphs (Kipf & Welling, ICLR 2017).

    Args:
        epochs: passes over the training batches, at most.
        lr: learning rate.
        weight_decay: L2 penalty on every parameter (decoupled for ``adamw``).
        patience: stop after this many epochs without a better validation result.
        optimizer: ``adam``, ``adamw`` or ``sgd`` (momentum 0.9).
        max_seconds: stop after the epoch that exceeds it. The result then depends on the machine's speed.
        anneal: for masks of ``Prune``: what they leave out is there at first with this probability, drawn each step,
            which falls to 0 over the first 5/6 of the steps; see
            :func:`~nasgraph.allocation.sparse_training.annealed_masks`. 0: masks are what they are from the start.

    Raises: ConfigError: a value that is out of range, or an unknown optimizer.
    """

    epochs: int = 200
    lr: float = 0.01
    weight_decay: float = 5e-4
    patience: int = 50
    optimizer: str = "adam"
    max_seconds: float | None = None
    anneal: float = 0.0

    def __post_init__(self) -> None:
        for name in ("epochs", "patience"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}: give a whole number of at least 1")
        if not _number(self.lr) or self.lr <= 0:
            raise ConfigError(f"lr is {self.lr!r}: give a number above 0")
        if not _number(self.weight_decay) or self.weight_decay < 0:
            raise ConfigError(f"weight_decay is {self.weight_decay!r}: give 0 or a number above")
        if self.max_seconds is not None and (not _number(self.max_seconds) or self.max_seconds <= 0):
            raise ConfigError(f"max_seconds is {self.max_seconds!r}: give a number above 0, or leave it out")
        if not _number(self.anneal) or not 0 <= self.anneal <= 1:
            raise ConfigError(f"anneal is {self.anneal!r}: give a probability, 0 for none")
        if self.optimizer not in OPTIMIZERS:
            near = did_you_mean(str(self.optimizer), OPTIMIZERS)
            raise ConfigError(f"unknown optimizer {self.optimizer!r}.{near} Known: {', '.join(OPTIMIZERS)}.")


@dataclass(frozen=True)
class Fit:
    """What one training run gave. Accuracies are fractions, losses mean cross-entropy in nats.

    Attributes:
        val: validation accuracy of the weights that the model is left with, those of ``best_epoch``. It is a maximum
            over epochs, so a little optimistic; the test split is for judging.
        val_loss: validation loss of the same weights.
        best_epoch: counted from 1; 0: there was nothing to train.
        epochs: epochs run.
        seconds: wall-clock time.
        history: per epoch the training loss, validation loss and validation accuracy.
    """

    val: float
    val_loss: float
    best_epoch: int
    epochs: int
    seconds: float
    history: list[Epoch] = field(default_factory=list, repr=False)


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    val: Iterable[Batch],
    settings: TrainSettings,
    seed: int,
    on_epoch: Callable[[int, Epoch], None] | None = None,
) -> Fit:
    """Train ``model`` in place; leave it in evaluation mode with the weights of its best epoch.

    Best is the highest validation accuracy, ties by the lower validation loss. Accuracy, because that is the number
    that a search maximises, so the weights kept are those that the score speaks of; the loss breaks ties because an
    accuracy over a few hundred samples moves in coarse steps and the first epoch to touch one is rarely the best.

    A model whose parameters are all frozen is scored as it is, after 0 epochs. Learned steps of quantised activations
    that nothing has started or trained yet start from the first four training batches.

    Randomness (dropout, shuffling) is drawn from ``seed`` in a forked generator: equal seeds give equal bits on one
    device and thread count, and the caller's generator is left as it was.

    Args:
        batches: training batches; iterated once per epoch, so a list or a loader, not a generator.
        val: validation batches, likewise.
        on_epoch: called after every epoch with its number, from 1, and its losses and accuracy.

    Raises: NotFinite: a loss became NaN or infinite; the message holds the epoch.
    """
    parameters = list(model.parameters())
    start = time.perf_counter()
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        accuracy, val_loss = evaluate(model, val)
        model.eval()
        return Fit(accuracy, _finite(val_loss, "validation", 0), 0, 0, time.perf_counter() - start)
    optimizer = _optimizer(parameters, settings)
    best = (-1.0, -math.inf)  # accuracy, minus loss
    best_epoch = 0
    kept: dict[str, torch.Tensor] = {}
    history: list[Epoch] = []
    cuda = sorted({p.device.index for p in parameters if p.is_cuda})
    with torch.random.fork_rng(devices=cuda), _masks(model, batches, settings, seed):
        torch.manual_seed(seed)
        start_new_steps(model, (batch.inputs for batch in itertools.islice(batches, STARTING)))
        for epoch in range(1, settings.epochs + 1):
            loss = _finite(_one_epoch(model, batches, optimizer), "training", epoch)
            accuracy, val_loss = evaluate(model, val)
            _finite(val_loss, "validation", epoch)
            history.append((loss, val_loss, accuracy))
            if on_epoch is not None:
                on_epoch(epoch, history[-1])
            if (accuracy, -val_loss) > best:
                best, best_epoch = (accuracy, -val_loss), epoch
                _keep(model, kept)
            elif epoch - best_epoch >= settings.patience:
                break
            if settings.max_seconds is not None and time.perf_counter() - start > settings.max_seconds:
                break
    model.load_state_dict(kept)
    model.eval()
    return Fit(best[0], -best[1], best_epoch, len(history), time.perf_counter() - start, history)


def evaluate(model: nn.Module, batches: Iterable[Batch]) -> tuple[float, float]:
    """Accuracy (a fraction) and mean loss over all samples, in evaluation mode; the model's mode is put back.

    A NaN among the outputs gives a NaN loss, never a silent accuracy.
    """
    training = model.training
    model.eval()
    correct, loss, n = 0.0, 0.0, 0
    with torch.no_grad():
        for batch in batches:
            outputs = batch.outputs(model)
            loss += float(batch.losses(outputs).sum())
            correct += float(batch.correct(outputs).sum())
            n += len(batch.target)
    model.train(training)
    return correct / n, loss / n


def _one_epoch(model: nn.Module, batches: Iterable[Batch], optimizer: torch.optim.Optimizer) -> float:
    model.train()
    total, n = 0.0, 0
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        loss = batch.loss(model)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += float(loss.detach()) * len(batch.target)
        n += len(batch.target)
    return total / n


def _masks(
    model: nn.Module, batches: Iterable[Batch], settings: TrainSettings, seed: int
) -> AbstractContextManager[None]:
    """What ``settings.anneal`` asks for; nothing for a model without masks."""
    from nasgraph.allocation.sparse_training import annealed_masks, masks_of

    if not settings.anneal or not masks_of(model):
        return nullcontext()
    if not isinstance(batches, Sized):
        raise ConfigError(
            "anneal: this task's batches have no len(), which tells how many steps there are: set it to 0"
        )
    return annealed_masks(model, max(1, settings.epochs * len(batches) * 5 // 6), seed, settings.anneal)


def _optimizer(parameters: list[nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if not parameters:
        raise ValueError("the model has no parameter to train")
    lr, decay = settings.lr, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=decay)
    make = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return make(parameters, lr=lr, weight_decay=decay, fused=True)


def _keep(model: nn.Module, kept: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        if name in kept:
            kept[name].copy_(tensor)
        else:
            kept[name] = tensor.detach().clone()


def _finite(loss: float, what: str, epoch: int) -> float:
    if not math.isfinite(loss):
        raise NotFinite(f"{what} loss is {loss} in epoch {epoch}")
    return loss


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
