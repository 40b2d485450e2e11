"""What tasks have in common that learn from mini-batches: loading, pickling, training, scoring, a fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from nasgraph.errors import ConfigError, DataError
from nasgraph.tasks.batch import Batch
from nasgraph.training.loop import Fit, TrainSettings, evaluate, train

SPLITS = ("train", "val", "test")
Data = TypeVar("Data")
Self = TypeVar("Self", bound="LoadedTask[Any]")


class LoadedTask(ABC, Generic[Data]):
    """A task whose data, a dataclass of tensors, are loaded at first use, in each process.

    Nothing in training or in a search reads the test split; ``score(model, "test")`` is for once, after the search.

    Args:
        name: for reports and manifests.
        load: gives the data. Must pickle: a module's function or a ``partial`` of one.
        batch_size: samples of a training step.
        device: where the tensors live.
    """

    def __init__(
        self, name: str, load: Callable[[], Data], batch_size: int, device: str | torch.device = "cpu"
    ) -> None:
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ConfigError(f"task '{name}': batch_size is {batch_size!r}, give a whole number of at least 1")
        self.name, self.load, self.batch_size, self.device = name, load, batch_size, torch.device(device)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("data", "_scored")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, device={str(self.device)!r})"

    @cached_property
    def data(self) -> Data:
        """The data, on the task's device. Raises: DataError: they are missing or have the wrong form."""
        return moved(self.load(), self.device)

    @cached_property
    def _scored(self) -> dict[str, list[Batch]]:
        return {}

    @abstractmethod
    def epochs(self, seed: int) -> Iterable[Batch]:
        """Training batches, drawn from ``seed``: each time it is iterated, those of one more epoch."""

    @abstractmethod
    def _of_split(self, split: str) -> Iterator[Batch]:
        """A split in batches, for scoring."""

    def batches(self, split: str) -> Iterable[Batch]:
        """``"train"``, ``"val"`` or ``"test"`` in batches, as it is scored; made once."""
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}: there are {', '.join(SPLITS)}")
        if split not in self._scored:
            self._scored[split] = list(self._of_split(split))
        return self._scored[split]

    def fit(self, model: nn.Module, settings: TrainSettings, seed: int) -> Fit:
        """Train ``model`` in place in mini-batches; see :func:`nasgraph.training.train`."""
        return train(model, self.epochs(seed), self.batches("val"), settings, seed)

    def score(self, model: nn.Module, split: str) -> dict[str, float]:
        """Accuracy (a fraction) and mean cross-entropy (nats) on one split, in evaluation mode."""
        accuracy, loss = evaluate(model, self.batches(split))
        return {"accuracy": accuracy, "loss": loss}

    def fingerprint(self) -> str:
        """SHA-256 over names, types, shapes and contents of the data; the same on every device."""
        digest = hashlib.sha256()
        for field in dataclasses.fields(self.data):  # type: ignore[arg-type]
            value = getattr(self.data, field.name)
            if isinstance(value, Tensor):
                digest.update(f"{field.name} {value.dtype} {tuple(value.shape)}\n".encode())
                digest.update(value.contiguous().cpu().numpy().data)
            else:
                digest.update(f"{field.name} {value!r}\n".encode())
        return digest.hexdigest()

    def to(self: Self, device: str | torch.device) -> Self:
        """The same task on ``device``; data already loaded are copied, not read again."""
        other: Self = type(self).__new__(type(self))
        other.__setstate__({**self.__getstate__(), "device": torch.device(device)})
        if "data" in self.__dict__:
            other.__dict__["data"] = moved(self.data, device)
        return other


def moved(data: Data, device: str | torch.device) -> Data:
    """A dataclass with its tensors on ``device``."""
    tensors = {name: value.to(device) for name, value in vars(data).items() if isinstance(value, Tensor)}
    changed: Data = dataclasses.replace(data, **tensors)  # type: ignore[type-var]
    return changed


class Shuffled:
    """Mini-batches of the samples ``index``; each time it is iterated in another order, drawn from ``seed``.

    They are equally large, up to one sample and at most ``size``: a last batch of one would be hard on BatchNorm.
    """

    def __init__(self, make: Callable[[Tensor], Batch], index: Tensor, size: int, seed: int) -> None:
        self.make, self.index, self.size = make, index, size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.index) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.index), generator=self.generator).to(self.index.device)
        for part in self.index[order].tensor_split(len(self)):
            yield self.make(part)


def stratified(y: Tensor, val: float, test: float, seed: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of ``y`` ``(n,)`` in three disjoint parts, each with the classes' shares of all; numbers ascending.

    Args: ``val`` and ``test`` are the shares of all samples, rounded within each class.

    Raises: ConfigError: the shares leave nothing for the training. DataError: a class is too small to be in each part.
    """
    if not (val > 0 and test > 0 and val + test < 1):
        raise ConfigError(f"task '{name}': val is {val} and test is {test}: both above 0, their sum below 1")
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for label in range(int(y.max()) + 1):
        mine = (y == label).nonzero().flatten()
        mine = mine[torch.randperm(len(mine), generator=generator)]
        tested, checked = round(test * len(mine)), round(val * len(mine))
        if min(tested, checked, len(mine) - tested - checked) < 1:
            raise DataError(f"'{name}': class {label} has {len(mine)} samples, too few to be split into three parts")
        cut = mine.split([len(mine) - tested - checked, checked, tested])  # type: ignore[no-untyped-call]
        for part, piece in zip(parts, cut, strict=True):
            part.append(piece)
    train, checked_, tested_ = (torch.cat(part).sort().values for part in parts)
    return train, checked_, tested_
