"""The supernet of a run: made from its config, trained before the study, kept in the run's folder.

``supernet/`` in the folder holds the last checkpoint and ``history.csv``, the loss of each step; ``supernet/split`` its
parts, if it was split. A training that was ended by anything goes on from the checkpoint, to the same bits on one
device and number of threads.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nasgraph import config, manifest, registry
from nasgraph.errors import ConfigError, DamagedFile, NotFinite, SearchStopped
from nasgraph.space import SearchSpace
from nasgraph.supernet import Supernet, checkpoint
from nasgraph.training import TrainSettings
from nasgraph.training.fewshot import FILE as FEW_SHOT
from nasgraph.training.fewshot import FewShot

if TYPE_CHECKING:
    from nasgraph.tasks import Task
    from nasgraph.training.policies import Policy

HISTORY, SPLIT = "history.csv", "split"
WHOLE = 2**31  # samples: more than any task has

Row = tuple[int, float, float]  # step from 1, loss of its first architecture, mean over its architectures; in nats


@dataclass
class Pretraining:
    """A supernet that is trained, or to be trained, as ``settings`` say.

    Attributes:
        parts: what it was split into, if it is to be split and trained that far.
        epoch: steps in one pass over the training set.
        steps: updates before a split.
        history: a row for each step done.
    """

    folder: Path
    settings: config.Supernet
    training: TrainSettings
    seed: int
    supernet: Supernet
    parts: FewShot | None
    policy: Policy
    epoch: int
    steps: int
    history: list[Row]

    @property
    def step(self) -> int:
        """Updates done, those of all parts included."""
        return self.supernet.step + (self.parts.step if self.parts else 0)

    @property
    def total(self) -> int:
        """Updates to do in all."""
        split = self.settings.split
        return self.steps + (split.leaves * self._part_steps(split) if split else 0)

    def _part_steps(self, split: config.Split) -> int:
        return (split.epochs or self.settings.epochs) * self.epoch

    def train(self, on_step: Callable[[str], None]) -> None:
        """Train what is left; write checkpoint and history.

        Args:
            on_step: called after each step with its loss and the rate.

        Raises: SearchStopped: a loss or a gradient is NaN or infinite; the last good checkpoint is kept.
        """
        every, begun, start = self.settings.checkpoint_every * self.epoch, self.step, time.monotonic()

        def told(before: int, length: int, step: int, losses: Sequence[float]) -> None:
            """``before``: steps of earlier stages; a stage has ``length``."""
            number, own = before + step + 1, step % length + 1
            self.history.append((number, losses[0], sum(losses) / len(losses)))
            if own % every == 0 or own == length:  # before the checkpoint: a row more does no harm
                self._write_history()
            rate = (number - begun) / max(1e-9, time.monotonic() - start)
            on_step(f"loss {losses[0]:.3f}, {rate:.1f} steps/s")

        how: dict[str, Any] = {"settings": self.training, "seed": self.seed, "reduction": self.settings.reduction}
        how |= {"clip": self.settings.clip, "samples": self.settings.batch, "every": every}
        split = self.settings.split
        try:
            whole = partial(told, 0, self.steps)
            self.supernet.train(self.policy, self.steps, checkpoint=self.folder, on_step=whole, **how)
            if split is not None:
                if self.parts is None:
                    measure: dict[str, Any] = split.model_dump(include={"repeats", "samples", "balanced"})
                    self.parts = FewShot.split(self.supernet, split.by, split.leaves, seed=self.seed, **measure)
                steps = self._part_steps(split)
                policy, place = self.settings.policy.name, self.folder / SPLIT
                how |= {"arguments": _arguments(self.settings), "on_step": partial(told, self.steps, steps)}
                self.parts.train(policy, steps, checkpoint=place, **how)
        except NotFinite as error:
            kept = f"the last good checkpoint is kept in {self.folder}" if exists(self.folder) else "none was kept yet"
            raise SearchStopped(f"the training of the supernet stopped: {error}; {kept}. Lower supernet.lr") from error

    def facts(self) -> dict[str, Any]:
        """For the manifest: what was trained, and the hash of each file of the checkpoint."""
        splits = [{"choice": split.choice, "groups": split.groups} for split in self.parts.splits] if self.parts else []
        return {
            "policy": self.settings.policy.name,
            "steps": self.step,
            "steps_per_epoch": self.epoch,
            "numbers": (self.parts or self.supernet).numel,
            "splits": splits,
            "loss": self.history[-1][1] if self.history else None,
            "sha256": _hashes(self.folder),
        }

    def _write_history(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with manifest.writing(self.folder / HISTORY) as file:
            writer = csv.writer(file)
            writer.writerow(["step", "loss_of_first", "mean_loss"])
            writer.writerows(self.history)


def begin(settings: config.Config, space: SearchSpace, task: Task, folder: Path) -> Pretraining:
    """The supernet that a config asks for, as far as it is trained in ``folder``. Nothing is trained or written here.

    Raises: ConfigError: an argument of the policy is wrong. SpaceError: operations that do not nest, or a checkpoint of
        another space. DamagedFile: a file of the checkpoint is not what was written.
    """
    wanted = settings.supernet
    if wanted is None:
        raise ConfigError("the config has no section supernet")
    training = TrainSettings(lr=wanted.lr, weight_decay=wanted.weight_decay, optimizer=wanted.optimizer)
    device = task.inputs[0].device
    supernet = Supernet.load(folder, space, task) if exists(folder) else Supernet(space, task, settings.seed)
    supernet.to(device)
    split = (folder / SPLIT / FEW_SHOT).exists()
    parts = FewShot.load(folder / SPLIT, space, task).to(device) if split else None
    epoch = 1
    if wanted.batch is not None:
        epoch = math.ceil(len(task.batch(WHOLE, settings.seed).target) / wanted.batch)
    steps = wanted.epochs * epoch
    offered = {"space": space, "supernet": supernet, "steps": steps}
    policy: Policy = registry.make("policies", wanted.policy.name, _arguments(wanted), offered)
    begun = Pretraining(folder, wanted, training, settings.seed, supernet, parts, policy, epoch, steps, [])
    begun.history = [row for row in read_history(folder) if row[0] <= begun.step]
    return begun


def _arguments(settings: config.Supernet) -> dict[str, Any]:
    """Of the policy."""
    return settings.policy.arguments | ({} if settings.distill is None else {"distill": settings.distill})


def load(settings: config.Config, space: SearchSpace, task: Task, folder: Path) -> Supernet | FewShot:
    """What scores networks: the supernet in ``folder``, or its parts; on the device of ``task``.

    Raises: as :func:`begin`; ConfigError: there is none.
    """
    if settings.supernet is None or settings.supernet.split is None:
        return Supernet.load(folder, space, task).to(task.inputs[0].device)
    return FewShot.load(folder / SPLIT, space, task).to(task.inputs[0].device)


def exists(folder: Path) -> bool:
    """Whether ``folder`` holds a checkpoint."""
    return (folder / checkpoint.FILE).exists()


def check(folder: Path, sha256: dict[str, str]) -> None:
    """Refuse a finished supernet that is not the one that was trained. Raises: DamagedFile."""
    found = _hashes(folder)
    for name, digest in sha256.items():
        if found.get(name) != digest:
            raise DamagedFile(
                f"{folder / name} is not what this run trained: restore it from a copy, or start a new run"
            )


def read_history(folder: Path) -> list[Row]:
    """The rows of ``history.csv``; none if there is no such file. Raises: DamagedFile."""
    path = folder / HISTORY
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [(int(step), float(first), float(mean)) for step, first, mean in list(csv.reader(file))[1:]]
    except (ValueError, UnicodeDecodeError) as error:
        raise DamagedFile(f"{path} is damaged ({error}): delete it; the curve of the loss is lost") from None


def relax(
    settings: config.Differentiable,
    space: SearchSpace,
    task: Task,
    folder: Path,
    seed: int,
    on_step: Callable[..., None],
) -> dict[str, Any]:
    """Differentiable search in a copy of the supernet in ``folder``. Returns: what it found, for the manifest.

    Raises: ConfigError: an argument of the method is wrong. SearchStopped: a loss is NaN or infinite.
    """
    copy = Supernet.load(folder, space, task).to(task.inputs[0].device)
    offered = {"supernet": copy, "steps": settings.steps, "seed": seed, "on_step": on_step}
    start = time.monotonic()
    try:
        found = registry.make("relaxations", settings.method, settings.arguments, offered)
    except ConfigError as error:
        if isinstance(error.__cause__, NotFinite):
            raise SearchStopped(f"the differentiable search stopped: {error}. Lower its learning rate") from error
        raise
    architecture = space.architecture(found.architecture)
    return {
        "method": settings.method,
        "steps": settings.steps,
        "architecture": dict(architecture),
        "probabilities": {choice: dict(labels) for choice, labels in found.probabilities.items()},
        "seconds": round(time.monotonic() - start, 3),
    }


def _hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".json", ".safetensors")]
    return manifest.hashes(folder, files)
