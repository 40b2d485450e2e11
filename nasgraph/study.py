"""Tier 2: ask a sampler for architectures, evaluate them, record each result once, when it is there.

Samplers see an Optuna study in memory. The file ``study.db`` receives a trial when it has finished, in one
transaction, so it holds no trial that is half there or for ever running; to resume is to load the finished trials into
a fresh study in memory. Every trial meets a fresh sampler, seeded by (seed, ask index, attempt).
"""

from __future__ import annotations

import copy
import functools
import json
import random
import re
import signal
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nasgraph import database
from nasgraph.errors import ConfigError, DamagedFile, NasgraphError, SpaceError
from nasgraph.executors import Executor, FailureWatch
from nasgraph.objectives.base import Failed, Result, Scored
from nasgraph.pareto import Direction
from nasgraph.samplers import make_sampler
from nasgraph.space import Architecture, Choice, Label, SearchSpace

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

ATTEMPTS = 10  # times a sampler is asked again before the architecture is drawn at random


@dataclass(frozen=True)
class TrialRecord:
    """One trial. ``number`` is its ask index: 0, 1, 2, ... in the order in which the sampler was asked.

    ``values`` holds every measured value, ``seconds`` the wall clock of the evaluation; a ``reused`` one took the
    result of an earlier architecture that is the same network.
    """

    number: int
    state: Literal["scored", "failed"]
    arch: Architecture
    key: str
    values: dict[str, float]
    info: dict[str, Any]
    reason: str | None
    detail: str | None
    seconds: float
    reused: bool

    @property
    def result(self) -> Result:
        if self.state == "scored":
            return Scored(self.values, self.info)
        return Failed(self.reason or "error", self.detail or "")


@dataclass
class _Asked:
    """A trial that the sampler proposed and that is not told yet."""

    index: int
    trial: Trial
    sampler: BaseSampler
    arch: Architecture
    key: str
    rejected: int  # proposals for this trial that were turned down
    started: float = 0.0


class Study:
    """A search that is recorded in a SQLite file and can be resumed after any kind of end.

    Args:
        path: the file; several studies may share it.
        name: of this study in the file.
        space: where architectures come from.
        objectives: (name, ``"maximize"`` or ``"minimize"``) of the values that the sampler optimises.
        sampler: a name that ``make_sampler`` knows, or a function of a seed that makes an Optuna sampler.
        seed: with one worker, the same seed gives the same search to the last bit.
        limits: upper bounds of measured values, e.g. ``{"params": 50_000}``; a trial above one is recorded with its
            values and told to the sampler as infeasible.

    Raises:
        ConfigError: the file holds a study of this name with other settings.
        DamagedFile: the file is not what was written.
    """

    def __init__(
        self,
        path: str | Path,
        name: str,
        space: SearchSpace,
        objectives: Sequence[tuple[str, Direction]],
        sampler: str | Callable[[int], BaseSampler],
        seed: int = 0,
        *,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        if not re.fullmatch(r"[\w.-]+", name):
            raise ConfigError(f"study name '{name}': use letters, digits, '.', '-' and '_' only")
        if not objectives:
            raise ConfigError("a study needs at least one objective")
        for objective, direction in objectives:
            if direction not in ("maximize", "minimize"):
                raise ConfigError(f"objective '{objective}': direction '{direction}' is not maximize or minimize")
        self.path, self.name, self.space, self.seed = Path(path), name, space, seed
        self.objectives = [(objective, direction) for objective, direction in objectives]
        self.limits = dict(limits or {})
        self._make_sampler = functools.partial(make_sampler, sampler) if isinstance(sampler, str) else sampler
        self._make_sampler(0)  # a wrong argument is said now, not after the screen
        self._settings = {
            "space": space.fingerprint(),
            "objectives": [list(objective) for objective in self.objectives],
            "limits": self.limits,
            "sampler": _describe(sampler),
            "seed": seed,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _quiet_optuna(), database.lock(self.path.parent, None):
            self._stored = self._open()
        self._load()
        self._engine.dispose()  # the last connection that closes folds the write-ahead log into the file

    # ---- the file -----------------------------------------------------------------------------------------------

    def _open(self) -> optuna.Study:
        import optuna
        import sqlalchemy.exc

        database.check(self.path, _remedy(self.path))
        directions = [direction for _, direction in self.objectives]
        with self._writing():
            try:
                storage = optuna.storages.RDBStorage(
                    "sqlite:///study.db", engine_kwargs={"creator": functools.partial(database.connect, self.path)}
                )
                self._engine = storage.engine
                study = optuna.create_study(
                    storage=storage, study_name=self.name, directions=directions, load_if_exists=True
                )
            except (sqlalchemy.exc.DatabaseError, RuntimeError) as error:
                if isinstance(error, sqlalchemy.exc.OperationalError) and _cannot_write(error):
                    raise
                raise DamagedFile(f"{self.path} is no study file ({_line(error)}). {_remedy(self.path)}") from error
            stored = study.user_attrs.get("settings")
            if stored is None and not study.get_trials(deepcopy=False):
                study.set_user_attr("settings", self._settings)
                stored = self._settings
        if not isinstance(stored, dict):
            raise DamagedFile(f"{self.path}: study '{self.name}' has no settings. {_remedy(self.path)}")
        for key, value in self._settings.items():
            if stored.get(key) != value:
                shown = "another search space" if key == "space" else f"{key} {stored.get(key)}, not {value}"
                raise ConfigError(f"{self.path}: study '{self.name}' was started with {shown}. Start a new run for it")
        return study

    @contextmanager
    def _writing(self) -> Iterator[None]:
        import optuna
        import sqlalchemy.exc

        try:
            with database.writing(self.path):
                yield
        except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.OperationalError) as error:
            cause = error.__cause__ or error
            with database.writing(self.path):
                raise sqlite3.OperationalError(_line(cause)) from error

    def _load(self) -> None:
        """Read the finished trials and put them into a fresh study in memory, in the order in which they were asked."""
        import optuna

        self._records: dict[int, TrialRecord] = {}
        self._results: dict[str, Result] = {}
        directions = [direction for _, direction in self.objectives]
        with _quiet_optuna():
            self._storage = optuna.storages.InMemoryStorage()
            self._memory = optuna.create_study(
                storage=self._storage, study_name=self.name, directions=directions, pruner=optuna.pruners.NopPruner()
            )
        try:
            trials = self._stored.get_trials(deepcopy=False)
        except Exception as error:  # json, enum and SQL errors: whatever a damaged page leads to
            raise DamagedFile(f"{self.path} is damaged ({_line(error)}). {_remedy(self.path)}") from error
        found = sorted(((self._decode(trial), trial) for trial in trials), key=lambda pair: pair[0].number)
        for record, trial in found:
            if record.number in self._records:
                raise DamagedFile(f"{self.path}: trial {record.number} is there twice. {_remedy(self.path)}")
            self._remember(record)
            for _ in range(trial.user_attrs["rejected"]):
                self._memory.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL))
            params, distributions = self._parameters(record.arch)  # in the order of asking, which SQL does not keep
            trial = copy.deepcopy(trial)
            trial.params, trial.distributions, trial.user_attrs = params, distributions, {}
            self._memory.add_trial(trial)

    def _decode(self, trial: FrozenTrial) -> TrialRecord:
        attrs = trial.user_attrs
        try:
            sound = attrs["checksum"] == _checksum(trial)
            record = TrialRecord(
                number=attrs["ask"],
                state="scored" if trial.state.name == "COMPLETE" else "failed",
                arch=Architecture(attrs["architecture"]),
                **{name: attrs[name] for name in ("key", "values", "info", "reason", "detail", "seconds", "reused")},
            )
        except (KeyError, TypeError, ValueError, SpaceError):
            sound = False
        if not sound:
            raise DamagedFile(
                f"{self.path}: trial {trial.number} of study '{self.name}' is not what was written. "
                f"{_remedy(self.path)}"
            )
        return record

    # ---- ask and tell -------------------------------------------------------------------------------------------

    def _ask(self, index: int, first: Sequence[Architecture], flying: set[str]) -> _Asked:
        import optuna

        if index < len(first):
            return self._fixed(index, first[index], 0)
        for attempt in range(ATTEMPTS):
            sampler = self._sampler(index, attempt)
            with self._sampling():
                trial = self._memory.ask()
                arch = self.space.decide(functools.partial(_suggest, trial))
            if not self.space.violated(arch):
                key = self.space.key(arch)
                if key not in flying and not isinstance(self._results.get(key), Failed):
                    return _Asked(index, trial, sampler, arch, key, attempt)
            self._memory.tell(trial, state=optuna.trial.TrialState.FAIL)
        drawn = self.space.sample(random.Random(database.derive_seed(self.seed, index, "random")))
        return self._fixed(index, drawn, ATTEMPTS)

    def _fixed(self, index: int, arch: Architecture, attempt: int) -> _Asked:
        """A trial whose architecture is given."""
        sampler = self._sampler(index, attempt)
        self._memory.enqueue_trial(self._parameters(arch)[0])
        trial = self._memory.ask()
        self.space.decide(functools.partial(_suggest, trial))
        return _Asked(index, trial, sampler, arch, self.space.key(arch), attempt)

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """What a sampler cannot do (several objectives, conditional choices, ...) is said in one line."""
        try:
            yield
        except (ValueError, TypeError, RuntimeError, NotImplementedError, ImportError) as error:
            kind = type(self._memory.sampler).__name__
            raise ConfigError(f"sampler {kind} cannot search this: {_line(error)}. Choose another sampler") from error

    def _sampler(self, index: int, attempt: int) -> BaseSampler:
        """A fresh sampler, put in charge of the study in memory. All that it can know is in the trials."""
        study = self._storage.get_study_id_from_name(self.name)
        for key in self._storage.get_study_system_attrs(study):
            if ":parent:" in key:  # genetic samplers read their parents back in another order than they chose them
                self._storage.set_study_system_attr(study, key, None)
        self._memory.sampler = self._make_sampler(database.derive_seed(self.seed, index, attempt))
        return self._memory.sampler

    def _parameters(self, arch: Mapping[str, Label]) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
        """Optuna's form of an architecture."""
        params: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}

        def pick(choice: Choice) -> Label:
            label = arch[choice.name]
            params[choice.name] = choice.labels.index(label) if choice.ordered else label
            distributions[choice.name] = _distribution(choice)
            return label

        self.space.decide(pick)
        return params, distributions

    def _tell(self, asked: _Asked, result: Result, reused: bool) -> TrialRecord:
        """Tell the sampler and record the trial in one transaction."""
        from optuna.trial import TrialState

        seconds = 0.0 if reused or not asked.started else time.monotonic() - asked.started
        scored = isinstance(result, Scored)
        values = {name: float(value) for name, value in result.values.items()} if isinstance(result, Scored) else {}
        if scored:
            for name in [*(name for name, _ in self.objectives), *self.limits]:
                if name not in values:
                    measured = ", ".join(values) or "nothing"
                    raise NasgraphError(f"the evaluation does not measure '{name}', only {measured}")
        record = TrialRecord(
            number=asked.index,
            state="scored" if scored else "failed",
            arch=asked.arch,
            key=asked.key,
            values=values,
            info=json.loads(json.dumps(result.info, default=str)) if isinstance(result, Scored) else {},
            reason=result.reason if isinstance(result, Failed) else None,
            detail=result.detail if isinstance(result, Failed) else None,
            seconds=seconds,
            reused=reused,
        )
        with _uninterrupted():
            self._memory.sampler = asked.sampler
            if scored:
                for name, limit in self.limits.items():
                    asked.trial.set_constraint(name, values[name] - limit)
                with self._sampling():
                    self._memory.tell(asked.trial, [values[name] for name, _ in self.objectives])
            else:
                self._memory.tell(asked.trial, state=TrialState.FAIL)
            told = copy.deepcopy(self._memory.get_trials(deepcopy=False)[asked.trial.number])
            told.user_attrs = {
                "ask": record.number,
                "architecture": dict(record.arch),
                **{name: getattr(record, name) for name in ("key", "values", "info", "reason", "detail")},
                "seconds": record.seconds,
                "reused": record.reused,
                "rejected": asked.rejected,
            }
            told.user_attrs["checksum"] = _checksum(told)
            with self._writing():
                self._stored.add_trial(told)
            self._remember(record)
        return record

    def _remember(self, record: TrialRecord) -> None:
        self._records[record.number] = record
        if record.reason != "constraint":
            self._results.setdefault(record.key, record.result)

    # ---- the search ---------------------------------------------------------------------------------------------

    @property
    def records(self) -> list[TrialRecord]:
        """What is recorded, by number."""
        return [self._records[number] for number in sorted(self._records)]

    def run(
        self,
        trials: int,
        executor: Executor,
        on_result: Callable[[TrialRecord], None] | None = None,
        first: Sequence[Mapping[str, Label]] = (),
    ) -> list[TrialRecord]:
        """Search until the study holds ``trials`` trials, those of earlier runs counted; called again, it resumes.

        Args:
            trials: how many in all. One that reuses the result of the same network counts, one that fails counts too.
            executor: where architectures are evaluated; an entered context manager.
            on_result: called with each trial once it is recorded.
            first: architectures (survivors of the screen) evaluated before the sampler is asked.

        Raises:
            SearchStopped: more than half of at least 5 evaluated architectures failed.
            SpaceError: no architecture meets a constraint of the space.
            ConfigError: another process is running this search; or ``first`` is not what the study was started with.
            NasgraphError: the file cannot be written.
        """
        held = f"another process is running this search ({self.path}, study '{self.name}'): wait for it or stop it"
        with database.lock(self.path.with_name(f"{self.path.name}.{self.name}.lock"), held):
            try:
                self._load()
                return self._run(trials, executor, on_result or (lambda record: None), self._settled(first))
            finally:
                self._engine.dispose()

    def _settled(self, first: Sequence[Mapping[str, Label]]) -> list[Architecture]:
        """``first``, the same at every run of the study."""
        given = [dict(self.space.architecture(arch)) for arch in first]
        stored = self._stored.user_attrs.get("first")
        if stored is None:
            if given and self._records:
                raise ConfigError(f"{self.path}: study '{self.name}' was started without first architectures")
            with self._writing():
                self._stored.set_user_attr("first", given)
            stored = given
        if given and given != stored:
            raise ConfigError(f"{self.path}: study '{self.name}' was started with other first architectures")
        return [self.space.architecture(arch) for arch in stored]

    def _run(
        self,
        trials: int,
        executor: Executor,
        on_result: Callable[[TrialRecord], None],
        first: Sequence[Architecture],
    ) -> list[TrialRecord]:
        watch = FailureWatch()
        todo = deque(index for index in range(trials) if index not in self._records)
        flying: dict[int, _Asked] = {}
        same: dict[str, list[_Asked]] = {}  # trials that wait for an evaluation of their network

        def arrived(results: Sequence[tuple[int, Result]]) -> None:
            for ticket, result in results:
                asked = flying.pop(ticket)
                on_result(self._tell(asked, result, reused=False))
                for twin in same.pop(asked.key):
                    on_result(self._tell(twin, result, reused=True))
            for _, result in results:
                watch.add(result)

        try:
            while todo or flying:
                while todo and len(flying) < executor.slots:
                    asked = self._ask(todo.popleft(), first, set(same))
                    violated = self.space.violated(asked.arch)
                    if violated:  # only one of ``first`` can
                        asked.trial.set_constraint(violated[0], 1.0)
                        on_result(self._tell(asked, Failed("constraint", f"violates '{violated[0]}'"), reused=False))
                    elif asked.key in self._results:
                        on_result(self._tell(asked, self._results[asked.key], reused=True))
                    elif asked.key in same:
                        same[asked.key].append(asked)
                    else:
                        flying[asked.index], same[asked.key] = asked, []
                        asked.started = time.monotonic()
                        executor.submit(asked.index, dict(asked.arch))
                if flying:
                    arrived(executor.wait())
        except KeyboardInterrupt:
            arrived([pair for pair in executor.wait(timeout=0) if pair[0] in flying])
            raise
        return self.records


# ---- Optuna's forms ---------------------------------------------------------------------------------------------


def _distribution(choice: Choice) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if choice.ordered:
        return IntDistribution(0, len(choice.labels) - 1)
    return CategoricalDistribution(choice.labels)


def _suggest(trial: Trial, choice: Choice) -> Label:
    if choice.ordered:
        return choice.labels[trial.suggest_int(choice.name, 0, len(choice.labels) - 1)]
    label: Label = trial.suggest_categorical(choice.name, choice.labels)
    return label


def _checksum(trial: FrozenTrial) -> str:
    attrs = {key: value for key, value in trial.user_attrs.items() if key != "checksum"}
    return database.digest([trial.state.name, trial.values, trial.params, trial.system_attrs, attrs])


def _describe(sampler: Any) -> str:
    if isinstance(sampler, functools.partial):
        return f"{_describe(sampler.func)} {json.dumps([sampler.args, sampler.keywords], sort_keys=True, default=str)}"
    return str(sampler if isinstance(sampler, str) else getattr(sampler, "__qualname__", type(sampler).__name__))


def _remedy(path: Path) -> str:
    return f"Restore it from a copy, or move it away (mv {path} {path}.damaged) to start this search anew"


def _cannot_write(error: BaseException) -> bool:
    return any(word in str(error) for word in ("full", "readonly", "unable to open", "I/O", "locked"))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Without the notice of each study made."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the block has ended: a result is either told and recorded, or neither."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[tuple[Any, ...]] = []
    before = signal.signal(signal.SIGINT, lambda *arguments: caught.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught and callable(before):
        before(*caught[0])
