"""The YAML of a search: its keys, their types and defaults. Config dies at the command line: functions take values."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator

from nasgraph import registry
from nasgraph.errors import ConfigError, did_you_mean

FINETUNE = 10  # epochs of search.finetune


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class Plugin(BaseModel):
    """A plug-in by name with its arguments: ``gnn_node`` or ``{name: gnn_node, layers: 4}``."""

    model_config = ConfigDict(extra="allow")
    name: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Train(_Keys):
    """How one candidate is trained."""

    epochs: int = Field(200, ge=1, description="most epochs of one training")
    lr: float = Field(0.01, gt=0, description="learning rate")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty")
    patience: int = Field(50, ge=1, description="epochs without a better validation result before stopping")
    optimizer: str = Field("adam", description="adam, adamw or sgd")
    max_seconds: float | None = Field(None, gt=0, description="stop one training after this long")
    anneal: float = Field(
        0.0, ge=0, le=1, description="masked weights are there at first with this probability, which falls to 0"
    )


class Screen(_Keys):
    """Tier 1: score many untrained candidates, keep the best for the study."""

    candidates: int = Field(200, ge=1, description="how many random candidates are scored")
    proxies: list[str] = Field(
        ["ntk_cond"], min_length=1, description="training-free scores; params and flops always stand beside"
    )
    rank_by: list[str] | None = Field(None, description="proxies whose ranks are summed; default: the first")
    keep: int = Field(16, ge=0, description="how many of the best go to the study first")
    samples: int = Field(32, ge=2, description="labelled training samples that a proxy sees")


class Split(_Keys):
    """Few-shot supernets: the store is split where options pull apart, and each part trains on alone."""

    by: Literal["gradients", "lid"] = Field("gradients", description="how far apart options are")
    leaves: int = Field(2, ge=2, description="parts, a power of 2")
    epochs: int | None = Field(None, ge=1, description="of each part after the split; default: as many as before it")
    repeats: int = Field(20, ge=1, description="random networks that each option is measured in")
    samples: int = Field(128, ge=2, description="training samples that each of them sees")
    balanced: bool = Field(False, description="groups of options differ in size by at most one")

    @field_validator("leaves")
    @classmethod
    def _power(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("a power of 2 is needed: parts are halved")
        return value


class Supernet(_Keys):
    """A weight-sharing supernet: trained once, it scores every candidate without training."""

    policy: Plugin = Field(Plugin(name="sandwich"), description="which architectures a step trains")
    epochs: int = Field(200, ge=1, description="passes over the training set")
    batch: int | None = Field(None, ge=1, description="training samples per step; default: all, one step an epoch")
    lr: float = Field(0.01, gt=0, description="learning rate")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty")
    optimizer: str = Field("adam", description="adam, adamw or sgd")
    distill: Literal["none", "kl", "alpha"] | None = Field(
        None, description="what the other architectures of a step learn from its first; default: what the policy does"
    )
    reduction: Literal["sum", "mean"] = Field("sum", description="how a step's gradients become one update")
    clip: float | None = Field(None, gt=0, description="each entry of an update's gradient is at most this")
    checkpoint_every: int = Field(20, ge=1, description="epochs between two checkpoints")
    samples: int = Field(2048, ge=2, description="training samples for the BatchNorm statistics of a candidate")
    split: Split | None = None


class Differentiable(BaseModel):
    """Differentiable search in the supernet: ``method`` by name, other keys are its arguments."""

    model_config = ConfigDict(extra="allow")
    method: str
    steps: int = Field(300, ge=1, description="updates")

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class WarmStart(_Keys):
    """First trials of a space with transforms: what each of their options breaks and costs, alone, without search."""

    methods: list[
        Literal["sensitivity", "signal", "sqnr", "gradients", "stable_rank", "adalora", "dynamic_rank", "sora"]
    ] = Field(
        ["sensitivity", "gradients"],
        min_length=1,
        description="what tells; a choice is of the first that tells of it. The last three train to allocate ranks",
    )
    cost: str = Field("model_bits", description="the objective that is traded against what breaks")
    n: int = Field(
        8, ge=1, description="trials around each architecture of start, or one that is drawn; as many of each allocator"
    )
    steps: int = Field(200, ge=10, description="of an allocator's training, with train.lr")
    samples: int = Field(256, ge=2, description="labelled training samples that all are measured on; of a step")


class Search(_Keys):
    """Tier 2: the Optuna study."""

    score: Literal["train", "supernet"] = Field("train", description="train each candidate, or ask the supernet")
    finetune: int | None = Field(
        None, ge=0, description=f"score supernet: epochs that a chosen network is trained on (default {FINETUNE})"
    )

    sampler: Plugin = Field(Plugin(name="nsga2"), description="random, tpe, nsga2, gp or module:Class of Optuna's kind")
    start: list[dict[str, str | int | float | bool | None]] = Field(
        [], description="architectures (choice: option) that are tried first, e.g. networks known to be good"
    )
    warm_start: WarmStart | None = None
    trials: int = Field(60, ge=1, description="how many candidates are trained")
    baseline: bool = Field(True, description="also run a random search of equal budget, to stand beside")
    workers: int = Field(1, ge=0, description="child processes; 0: in this process, without time and memory limits")
    ray: bool = Field(False, description="run the workers as Ray actors (local, or the cluster of RAY_ADDRESS)")
    gpus_per_worker: float = Field(0.0, ge=0, description="share of a GPU that Ray gives each worker")
    timeout_s: float | None = Field(600, gt=0, description="longest time for one candidate (child processes, Ray)")
    memory_gb: float | None = Field(None, gt=0, description="most memory of one candidate (child processes)")


class Final(_Keys):
    """What happens to the Pareto front: retrained from fresh seeds, tested once, exported."""

    top: int = Field(5, ge=1, description="most models to export; the best of the first objective is always there")
    seeds: int = Field(3, ge=1, description="trainings per model; the best on validation is exported")


class Config(_Keys):
    """One search."""

    space: Plugin
    task: Plugin
    objectives: list[str] = Field(["val_accuracy", "params"], min_length=1)
    limits: dict[str, FiniteFloat] = Field({}, description="upper bounds of objectives, e.g. {params: 50000}")
    train: Train = Train()  # type: ignore[call-arg]
    seeds: list[int] = Field([0], min_length=1, description="seeds whose validation results are averaged per candidate")
    screen: Screen | None = None
    supernet: Supernet | None = None
    differentiable: Differentiable | None = None
    search: Search = Search()  # type: ignore[call-arg]
    final: Final = Final()  # type: ignore[call-arg]
    export: list[str] = ["code", "safetensors", "torch-export", "onnx"]
    seed: int = Field(0, ge=0, description="seed of the search itself")
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    threads: int = Field(1, ge=1, description="torch threads per worker: more than the cores allow is far slower")
    data_root: str | None = Field(None, description="folder with graphs/; default: NASGRAPH_DATA, else a download")

    @field_validator("objectives", "seeds")
    @classmethod
    def _distinct(cls, value: list[Any]) -> list[Any]:
        if len(set(value)) != len(value):
            raise ValueError("named twice")
        return value

    @model_validator(mode="after")
    def _known_names(self) -> Config:
        for kind, names in (
            ("spaces", [self.space.name]),
            ("tasks", [self.task.name]),
            ("objectives", self.objectives),
            ("samplers", [self.search.sampler.name]),
            ("exporters", self.export),
            ("objectives", [self.search.warm_start.cost] if self.search.warm_start else []),
            ("proxies", self.screen.proxies if self.screen else []),
            ("policies", [self.supernet.policy.name] if self.supernet else []),
            ("relaxations", [self.differentiable.method] if self.differentiable else []),
        ):
            for name in names:
                registry.check(kind, name)
        self._supernet_is_used()
        if self.search.memory_gb is not None and (self.search.ray or not self.search.workers):
            raise ConfigError(
                "search.memory_gb: needs child processes, so search.workers of at least 1 and no search.ray"
            )
        if self.threads > (os.cpu_count() or 1):
            raise ConfigError(f"threads: {self.threads} are more than the {os.cpu_count()} processors of this machine")
        for name in self.limits:
            if name not in self.objectives:
                raise ConfigError(f"limits: '{name}' is not an objective.{did_you_mean(name, self.objectives)}")
        for name in (self.screen and self.screen.rank_by) or []:
            if self.screen and name not in self.screen.proxies:
                raise ConfigError(f"screen.rank_by: '{name}' is not in screen.proxies")
        return self

    def _supernet_is_used(self) -> None:
        if self.search.score == "supernet" and self.supernet is None:
            raise ConfigError("search.score is supernet, but there is no section supernet: add 'supernet: {}'")
        if self.search.score != "supernet":
            if self.supernet is not None:
                raise ConfigError("supernet: nothing asks it: set search.score to supernet, or leave the section out")
            if self.search.finetune is not None:
                raise ConfigError("search.finetune: only networks of a supernet are fine-tuned: leave it out")
            if self.differentiable is not None:
                raise ConfigError("differentiable: it searches in a supernet: add one, and search.score: supernet")

    @property
    def finetune(self) -> int:
        """Epochs that a network extracted from the supernet is trained on."""
        return FINETUNE if self.search.finetune is None else self.search.finetune


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config, apply ``key.sub=value`` overrides, check it.

    ``path`` may also be the name of a config that is installed with nasgraph, e.g. ``quickstart``.

    Raises: ConfigError: the file or a key is wrong; the message names it and the way out.
    """
    shipped = Path(__file__).parent / "configs" / f"{path}.yaml"
    if not path.exists() and len(path.parts) == 1 and shipped.exists():
        path = shipped
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no config {path}.{_nearby(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a mapping of keys is needed (space, task, ...)")
    return parse(override(values, overrides), str(path))


def parse(values: Mapping[str, Any], where: str = "config") -> Config:
    """The config in ``values``. Raises: ConfigError: a wrong key or value, named with its path."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _first(error: ValidationError) -> str:
    """One line for the first thing that is wrong, and how many more there are."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        known = _fields(location[:-1])
        text = f"unknown key '{key}'.{did_you_mean(location[-1], known)} Known: {', '.join(known)}"
    elif first["type"] == "missing":
        text = f"'{key}' is missing"
    else:
        message = first["msg"].removeprefix("Value error, ")
        text = f"'{key}': {message[0].lower() + message[1:]}, got {first['input']!r}"
    more = len(error.errors()) - 1
    return text + (f" (and {more} more)" if more else "")


def _fields(location: Sequence[str]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {
        **{"train": Train, "screen": Screen, "search": Search, "final": Final},
        **{"supernet": Supernet, "differentiable": Differentiable, "split": Split, "warm_start": WarmStart},
    }
    model: type[BaseModel] = Config
    for part in location:
        model = sections.get(part, model)
    return list(model.model_fields)


def override(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``values`` with ``key.sub=value`` overrides applied, each value read as YAML.

    Raises: ConfigError: an override that is not of that form.
    """
    changed = copy.deepcopy(dict(values))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {text}: write key=value, e.g. --set search.trials=100")
        *parents, last = key.split(".")
        inner = changed
        for parent in parents:
            found = inner.get(parent)
            inner[parent] = {"name": found} if isinstance(found, str) else found if isinstance(found, dict) else {}
            inner = inner[parent]
        try:
            inner[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {text}: {value!r} is not valid YAML") from None
    return changed


def _nearby(path: Path) -> str:
    shipped = sorted(found.stem for found in (Path(__file__).parent / "configs").glob("*.yaml"))
    if path.stem in shipped:
        return f" One is installed with nasgraph: give its name, '{path.stem}'"
    folder = path.parent if path.parent.is_dir() else Path("configs")
    known = [str(found) for found in folder.glob("*.yaml")] if folder.is_dir() else []
    if len(path.parts) == 1 or not known:
        known += shipped
    return did_you_mean(str(path), known) or f" There are: {', '.join(sorted(known))}"
