"""What runs in a worker process: evaluate, score or finish one architecture.

A worker travels as its config. Data, space and models are made in the process that uses them, once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, pstdev
from typing import TYPE_CHECKING, Any

import torch

from nasgraph import pretraining, registry
from nasgraph.build import build
from nasgraph.catalogue import make_space
from nasgraph.config import Config
from nasgraph.errors import ConfigError, NotFinite
from nasgraph.objectives import (
    Evaluator,
    Failed,
    Objective,
    Result,
    Scored,
    SharedEvaluator,
    check_alone,
    failure,
    find_objective,
)
from nasgraph.space import Architecture, SearchSpace
from nasgraph.tasks import Task
from nasgraph.training import TrainSettings
from nasgraph.training.ranges import SAMPLES, freeze
from nasgraph.transforms.ranges import activation_quantizers

if TYPE_CHECKING:
    from nasgraph.supernet import Supernet
    from nasgraph.tasks.batch import Batch
    from nasgraph.training.fewshot import FewShot

# Beside every proxy stand the two counts that it has to beat.
BASELINE_PROXIES = ("params", "flops")


@dataclass(frozen=True)
class Parts:
    """What a config names, made."""

    space: SearchSpace
    task: Task
    objectives: list[Objective]
    settings: TrainSettings
    device: torch.device


def parts(config: Config) -> Parts:
    """Make what ``config`` names; data are loaded, since a space's sizes come from them.

    Raises: ConfigError: a plug-in's argument is wrong. DataError: the dataset is missing or has the wrong form.
    """
    if config.data_root is not None:
        os.environ["NASGRAPH_DATA"] = config.data_root
    settings = TrainSettings(**config.train.model_dump())
    objectives = [find_objective(name) for name in config.objectives]
    for objective in objectives:
        if objective.direction == "maximize" and objective.name in config.limits:
            raise ConfigError(f"limits: '{objective.name}' is maximised, and a limit is an upper bound: leave it out")
    check_alone(objectives, max(1, config.search.workers))
    device = _device(config.device)
    task: Task = registry.make("tasks", config.task.name, config.task.arguments)
    task = task.to(device)
    space = make_space(config.space.name, config.space.arguments, task.sizes)
    return Parts(space, task, objectives, settings, device)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is asked for, but torch finds no CUDA device here; use cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


class Worker:
    """Does one piece of work: ``worker((role, payload)) -> Scored | Failed``. Roles:

    ``evaluate``: measure the objectives of an architecture, which is trained, or scored by the run's supernet (payload:
    the architecture).
    ``score``: the screen's proxies, params and FLOPs of an untrained architecture (payload: the architecture).
    ``finish``: train a chosen architecture from several seeds, or fine-tune its extraction from the supernet with
    several seeds; freeze the ranges of its quantised activations; test it, export the training that is best on
    validation (payload: ``{"architecture": {...}, "folder": path or None, "metadata": {...}}``; without a folder no
    export). Only this looks at the test split.

    One worker serves all phases of a run, so a process imports torch and loads data and supernet once.

    Args:
        store: the folder of the run's supernet, if candidates are scored by one.
    """

    def __init__(self, config: Config, store: Path | None = None) -> None:
        self.config, self.store = config, store

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "store": self.store}

    def __call__(self, work: tuple[str, Any]) -> Result:
        role, payload = work
        try:
            return {"evaluate": self._evaluate, "score": self._score, "finish": self._finish}[role](payload)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a candidate does is a result
            return failure(error)

    @cached_property
    def parts(self) -> Parts:
        """What the config names, made in this process at first use."""
        torch.set_num_threads(self.config.threads)
        return parts(self.config)

    @cached_property
    def _evaluator(self) -> Evaluator:
        made = self.parts
        if self.config.search.score == "supernet":
            return SharedEvaluator(made.space, made.task, made.objectives, self.supernet, self._samples)
        return Evaluator(made.space, made.task, made.objectives, made.settings, tuple(self.config.seeds))

    @cached_property
    def supernet(self) -> Supernet | FewShot:
        """The run's supernet, read in this process at first use. Raises: ConfigError: the run has none."""
        if self.store is None:
            raise ConfigError("candidates are scored by a supernet, and none was named")
        return pretraining.load(self.config, self.parts.space, self.parts.task, self.store)

    @property
    def _samples(self) -> int:
        return self.config.supernet.samples if self.config.supernet else 0

    @cached_property
    def _proxies(self) -> dict[str, Callable[[torch.nn.Module, Batch], float]]:
        names = self.config.screen.proxies if self.config.screen else []
        return {name: registry.resolve("proxies", name) for name in dict.fromkeys([*names, *BASELINE_PROXIES])}

    @cached_property
    def _batch(self) -> Batch:
        samples = self.config.screen.samples if self.config.screen else 32
        return self.parts.task.batch(samples, self.config.seed)

    def _evaluate(self, architecture: Mapping[str, Any]) -> Result:
        return self._evaluator(architecture)

    def _score(self, architecture: Mapping[str, Any]) -> Result:
        model = build(self.parts.space, architecture, self.config.seeds[0]).to(self.parts.device)
        values, missing = {}, {}
        for name, proxy in self._proxies.items():
            try:
                values[name] = float(proxy(model, self._batch))
            except (NotFinite, ValueError) as error:
                missing[name] = str(error)
        needed = [name for name in rank_by(self.config) if name in missing]
        if needed:
            return Failed("not_finite", f"{needed[0]}: {missing[needed[0]]}")
        return Scored(values, {"missing": missing} if missing else {})

    def _finish(self, payload: Mapping[str, Any]) -> Result:
        made, architecture, folder = self.parts, Architecture(payload["architecture"]), payload["folder"]
        shared = self.config.search.score == "supernet"
        runs = []
        for seed in range(self.config.seeds[0], self.config.seeds[0] + self.config.final.seeds):
            model, how = (self._finetuned if shared else self._trained)(architecture, seed)
            val, test = made.task.score(model, "val"), made.task.score(model, "test")
            runs.append((val["accuracy"], -val["loss"], test["accuracy"], seed, model, how))
            if shared and not self.config.finetune:
                break  # no seed changes anything
        val_accuracy, _, test_accuracy, seed, model, how = max(runs, key=lambda run: run[:2])
        tests = [run[2] for run in runs]
        values = {
            "val_accuracy": val_accuracy,
            "test_accuracy": test_accuracy,
            "val_accuracy_mean": mean(run[0] for run in runs),
            "test_accuracy_mean": mean(tests),
            "test_accuracy_std": pstdev(tests),
        }
        info: dict[str, Any] = {"seed": seed, "seeds": len(runs), "kept": how, "exports": []}
        if shared:
            extracted = self.supernet.calibrated(architecture, self._samples)
            values["extracted_val_accuracy"] = made.task.score(extracted, "val")["accuracy"]
        if folder is not None:
            metadata = payload["metadata"]
            info["exports"] = export_to(Path(folder), self.config, made, architecture, model, values, metadata)
        return Scored(values, info)

    def _trained(self, architecture: Architecture, seed: int) -> tuple[torch.nn.Module, str]:
        made = self.parts
        model = build(made.space, architecture, seed).to(made.device)
        made.task.fit(model, made.settings, seed)
        freeze(model, made.task, self.config.seed)
        return model, "trained"

    def _finetuned(self, architecture: Architecture, seed: int) -> tuple[torch.nn.Module, str]:
        """The extraction trained on; as it was, if that is not better on validation."""
        made, epochs = self.parts, self.config.finetune
        extracted = self.supernet.calibrated(architecture, self._samples)
        freeze(extracted, made.task, self.config.seed)
        if not epochs:
            return extracted, "as extracted"
        model = self.supernet.calibrated(architecture, self._samples)
        made.task.fit(model, replace(made.settings, epochs=epochs), seed)
        freeze(model, made.task, self.config.seed)
        before, after = made.task.score(extracted, "val"), made.task.score(model, "val")
        better = (after["accuracy"], -after["loss"]) > (before["accuracy"], -before["loss"])
        return (model, "fine-tuned") if better else (extracted, "as extracted")


def export_to(
    folder: Path,
    config: Config,
    made: Parts,
    architecture: Architecture,
    model: torch.nn.Module,
    metrics: Mapping[str, float],
    metadata: Mapping[str, Any],
    formats: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Export a trained model into ``folder``; one plain record per format, failed ones with their reason."""
    from nasgraph.export import export_model

    ranges = {"activations": f"ranges frozen on {SAMPLES} training samples"} if activation_quantizers(model) else {}
    measured = {key: value for key, value in metadata.get("values", {}).items() if key not in metrics}
    written = export_model(
        model,  # type: ignore[arg-type]
        folder,
        space=made.space,
        architecture=architecture,
        formats=formats or config.export,
        inputs=tuple(tensor.cpu() for tensor in made.task.inputs),
        metrics={**metrics, **measured},
        metadata={
            "task": made.task.name,
            **getattr(made.task, "notes", {}),
            "training": _how(config, made),
            **ranges,
            **metadata.get("notes", {}),
        },
    )
    return [
        {
            "format": item.format,
            "path": str(item.path) if item.path else "",
            "status": item.status,
            "max_abs_diff": item.max_abs_diff,
            "detail": item.detail,
            "sha256": item.sha256,
        }
        for item in written
    ]


def _how(config: Config, made: Parts) -> str:
    """How an exported model came to its weights."""
    if config.supernet is None:
        return str(made.settings)
    tuning = replace(made.settings, epochs=config.finetune) if config.finetune else "not fine-tuned"
    trained = f"policy {config.supernet.policy.name}, {config.supernet.epochs} epochs"
    return f"extracted from a supernet ({trained}); {tuning}"


def rank_by(config: Config) -> list[str]:
    """The proxies whose ranks choose the survivors of the screen."""
    if config.screen is None or config.screen.keep == 0:
        return []
    return config.screen.rank_by or config.screen.proxies[:1]
