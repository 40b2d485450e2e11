"""Measurements of a candidate: what is measured, the candidate it is measured on, and a result that is a value.

A failure is a value too: :class:`Evaluator` returns :class:`Failed` and never raises, so one bad candidate costs one
trial.
"""

from __future__ import annotations

import math
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nasgraph import registry
from nasgraph.errors import ConfigError, NotFinite
from nasgraph.pareto import Direction
from nasgraph.space import Label, SearchSpace
from nasgraph.training.loop import Fit, TrainSettings

if TYPE_CHECKING:
    from nasgraph.tasks.base import Task


@dataclass(frozen=True)
class Objective:
    """A named number of a candidate and which way is better.

    Args:
        name: column name in studies and reports.
        direction: ``maximize`` or ``minimize``.
        measure: a function of a :class:`Candidate`; at a module's top level, so that it pickles. It may leave details
            (plain values) in ``candidate.info``.
        unit: for tables, e.g. ``ms``.
        exclusive: the measurement is only right while nothing else runs on the device, see :func:`check_alone`.

    Raises: ConfigError: another direction.
    """

    name: str
    direction: Direction
    measure: Callable[[Candidate], float]
    unit: str = ""
    exclusive: bool = False

    def __post_init__(self) -> None:
        if self.direction not in ("maximize", "minimize"):
            raise ConfigError(f"objective '{self.name}': direction {self.direction!r} must be 'maximize' or 'minimize'")


@dataclass(frozen=True)
class Scored:
    """Values of all objectives and details of plain types.

    Raises: NotFinite: a value is NaN or infinite; names the objectives at fault.
    """

    values: dict[str, float]
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bad = [f"{name} is {value}" for name, value in self.values.items() if not math.isfinite(value)]
        if bad:
            raise NotFinite(", ".join(bad))


@dataclass(frozen=True)
class Failed:
    """Why there are no values. ``reason`` is a slug to count by, ``detail`` one line for a reader.

    Reasons: ``error``, ``not_finite``, ``out_of_memory``, ``exit``; executors add ``crashed`` and ``timeout``.
    """

    reason: str
    detail: str


Result = Scored | Failed


class Candidate:
    """One architecture under measurement. Models are built and trained when a measurement asks, once.

    Attributes:
        info: details that measurements leave; they go into :attr:`Scored.info`.
    """

    def __init__(
        self,
        space: SearchSpace,
        arch: Mapping[str, Label],
        task: Task,
        settings: TrainSettings,
        seeds: tuple[int, ...] = (0,),
    ) -> None:
        self.space, self.arch, self.task, self.settings, self.seeds = space, arch, task, settings, seeds
        self.info: dict[str, Any] = {}

    @cached_property
    def model(self) -> nn.Module:
        """The untrained network, on the task's device, started from the first seed. For costs: leave it unchanged."""
        return self._build(self.seeds[0])

    @cached_property
    def params(self) -> int:
        """Number of parameters, trainable or not, each tensor once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def fits(self) -> list[Fit]:
        """One training run per seed, which sets the first weights and the dropout."""
        return [fit for fit, _ in self._runs]

    @cached_property
    def trained(self) -> nn.Module:
        """The model of the fit with the best validation accuracy, ties by validation loss, then by order of seeds."""
        return max(self._runs, key=lambda run: (run[0].val, -run[0].val_loss))[1]

    @cached_property
    def _runs(self) -> list[tuple[Fit, nn.Module]]:
        models = [self._build(seed) for seed in self.seeds]
        return [
            (self.task.fit(model, self.settings, seed), model) for model, seed in zip(models, self.seeds, strict=True)
        ]

    def _build(self, seed: int) -> nn.Module:
        from nasgraph.build import build

        return build(self.space, self.arch, seed).to(self.task.inputs[0].device)


class Evaluator:
    """Architecture in, :class:`Scored` or :class:`Failed` out. It pickles if its parts do, and travels to workers.

    Args:
        space: the search space, or a function without arguments that makes it (for spaces that do not pickle).
        objectives: objectives, or their names: installed, or ``module:attribute``.
        settings: how candidates are trained, for objectives that train.
        seeds: training is repeated for each.

    Raises: ConfigError: no objective, no seed, an unknown name, two of one name, or a name that is no Objective.
    """

    def __init__(
        self,
        space: SearchSpace | Callable[[], SearchSpace],
        task: Task,
        objectives: Sequence[Objective | str],
        settings: TrainSettings | None = None,
        seeds: Sequence[int] = (0,),
    ) -> None:
        self._make_space, self.task, self.seeds = space, task, tuple(seeds)
        self.objectives = [find_objective(item) for item in objectives]
        self.settings = settings or TrainSettings()
        names = [objective.name for objective in self.objectives]
        if not names or not self.seeds:
            raise ConfigError("an evaluation needs at least one objective and one seed")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"objective '{twice[0]}' is given twice")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "space"}

    @cached_property
    def space(self) -> SearchSpace:
        """The search space; made once per process if a function makes it."""
        return self._make_space if isinstance(self._make_space, SearchSpace) else self._make_space()

    @property
    def exclusive(self) -> bool:
        """Whether an objective must be measured alone on the device."""
        return any(objective.exclusive for objective in self.objectives)

    def candidate(self, arch: Mapping[str, Label]) -> Candidate:
        """What the objectives measure."""
        return Candidate(self.space, arch, self.task, self.settings, self.seeds)

    def __call__(self, arch: Mapping[str, Label]) -> Result:
        """Measure one architecture. Raises nothing but KeyboardInterrupt."""
        start = time.perf_counter()
        try:
            check_alone(self.objectives, slots())
            candidate = self.candidate(self.space.architecture(arch))
            values = {objective.name: _measure(objective, candidate) for objective in self.objectives}
            info = {**_training(candidate), **candidate.info}
            info["device"], info["threads"] = str(self.task.inputs[0].device), torch.get_num_threads()
            info["seconds"] = time.perf_counter() - start
            return Scored(values, info)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return failure(error)


def find_objective(item: Objective | str) -> Objective:
    """An objective by name, or itself. Raises: ConfigError: unknown name, or something else of that name."""
    if isinstance(item, Objective):
        return item
    found = registry.resolve("objectives", item)
    if not isinstance(found, Objective):
        raise ConfigError(f"objective '{item}' is a {type(found).__name__}: make it a nasgraph.objectives.Objective")
    return found


def slots() -> int:
    """How many trials run at once here: ``$NASGRAPH_SLOTS``, set by executors in their workers; 1 without it."""
    return int(os.environ.get("NASGRAPH_SLOTS", "1"))


def check_alone(objectives: Sequence[Objective], slots: int) -> None:
    """Refuse to measure beside other trials what must be measured alone.

    Raises: ConfigError: an objective is exclusive and more than one trial runs at once.
    """
    exclusive = [objective.name for objective in objectives if objective.exclusive]
    if exclusive and slots > 1:
        raise ConfigError(
            f"objective '{exclusive[0]}' must be measured alone on the device, but {slots} trials run at once: "
            "use 1 worker, or leave it out of the search and measure the models of the front"
        )


def failure(error: BaseException) -> Failed:
    """The failure that an exception stands for. ``detail`` is one line: type, message, where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    message = " ".join(str(error).split())
    if isinstance(error, NotFinite):
        return Failed("not_finite", message + where)
    if isinstance(error, SystemExit):
        return Failed("exit", f"SystemExit: {error.code}{where}")
    detail = f"{type(error).__name__}: {message}"[:1000] + where
    return Failed("out_of_memory" if _out_of_memory(error) else "error", detail)


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error).lower()  # PyTorch's CPU allocator raises a plain RuntimeError
    return isinstance(error, RuntimeError | OSError) and ("can't allocate memory" in said or "out of memory" in said)


def _measure(objective: Objective, candidate: Candidate) -> float:
    value = float(objective.measure(candidate))
    if not math.isfinite(value):
        raise NotFinite(f"objective '{objective.name}' is {value}")
    return value


def _training(candidate: Candidate) -> dict[str, Any]:
    """Details of the training runs, a list over seeds each; nothing if no objective trained."""
    if "_runs" not in candidate.__dict__:
        return {}
    fits = candidate.fits
    return {
        "seeds": list(candidate.seeds),
        "val_accuracies": [fit.val for fit in fits],
        "val_losses": [fit.val_loss for fit in fits],
        "best_epochs": [fit.best_epoch for fit in fits],
        "epochs": [fit.epochs for fit in fits],
        "train_seconds": [fit.seconds for fit in fits],
    }
