"""The main job, end to end: screen, study, random baseline, final training, export, report.

A run is a folder. What it needs to go on after a kill is on disk at every moment: ``manifest.json`` (what is run),
``screen.db`` and ``study.db`` (a row per finished candidate), ``final.json`` (a record per finished model).
"""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from nasgraph import __version__, config, manifest, registry
from nasgraph.config import Config
from nasgraph.console import Display
from nasgraph.errors import ConfigError, DamagedFile, NasgraphError
from nasgraph.executors import Executor, InProcess, Processes, RayActors
from nasgraph.objectives import Objective, Result, Scored
from nasgraph.pareto import Direction, hypervolume, pareto_front, reference_point
from nasgraph.samplers import make_sampler
from nasgraph.screen import ScreenRow, ScreenTable, screen, survivors
from nasgraph.space import Architecture, SearchSpace
from nasgraph.study import Study, TrialRecord
from nasgraph.workers import Parts, Worker, parts, rank_by

MANIFEST, STUDY, SCREEN, FINAL, PARETO, REPORT = (
    "manifest.json", "study.db", "screen.db", "final.json", "pareto.csv", "report.html",
)  # fmt: skip
# What may be changed when a run goes on: how long and with what, never what is searched.
RESUMABLE = ("search.trials", "search.workers", "search.ray", "search.timeout_s", "search.memory_gb", "data_root")


def start(settings: Config, folder: Path, quiet: bool = False) -> int:
    """Run a search in a new folder. Returns the exit code.

    Raises: NasgraphError: the folder is taken or cannot be written, the config cannot be met, or the search gave up.
    """
    if (folder / MANIFEST).exists():
        raise ConfigError(f"{folder} holds a run: continue it with 'nasgraph resume {folder}', or choose another --out")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: choose another --out")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: choose another --out")
    display = Display(quiet)
    with _timed(display, "load"):
        made = parts(settings)
        made.space.sample(random.Random(settings.seed))  # a constraint that nothing meets costs no training
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {folder}: {error.strerror}; choose another --out") from None
    facts = {
        "nasgraph": __version__,
        "status": "running",
        "started": manifest.now(),
        "config": settings.model_dump(mode="json"),
        "environment": manifest.environment(settings.threads, str(made.device)),
        "space": {"name": made.space.name, "fingerprint": made.space.fingerprint()},
        "task": {"name": made.task.name, "fingerprint": made.task.fingerprint(), "sizes": made.task.sizes},
        "seconds": {},
        "artifacts": {},
    }
    manifest.write(folder / MANIFEST, facts)
    return Run(folder, settings, facts, made, display).go()


def resume(folder: Path, overrides: Sequence[str] = (), quiet: bool = False) -> int:
    """Continue a run where it stopped; what is finished is not done again. Returns the exit code.

    Raises: NasgraphError: there is no run, a file of it is damaged, or space or data are no longer the same.
    """
    facts = manifest.read(folder / MANIFEST)
    for text in overrides:
        if text.partition("=")[0] not in RESUMABLE:
            raise ConfigError(f"{text.partition('=')[0]} cannot change when a run goes on: start a new one with it")
    settings = config.parse(config.override(facts["config"], overrides), f"{folder / MANIFEST}: config")
    display = Display(quiet)
    with _timed(display, "load"):
        made = parts(settings)
    for what, now in (("space", made.space.fingerprint()), ("task", made.task.fingerprint())):
        if facts[what]["fingerprint"] != now:
            raise NasgraphError(
                f"the {what} '{facts[what]['name']}' is not what it was when {folder} began: "
                f"restore it, or start a new run"
            )
    facts |= {"status": "running", "config": settings.model_dump(mode="json")}
    facts["resumed"] = [*facts.get("resumed", []), manifest.now()]
    manifest.write(folder / MANIFEST, facts)
    return Run(folder, settings, facts, made, display).go()


def report(folder: Path) -> Path:
    """Write ``report.html`` of a run anew from its files; neither data nor workers are needed."""
    return Run.open(folder).write_report()


def export(folder: Path, key: str, formats: Sequence[str] | None, out: Path | None) -> int:
    """Train one architecture of a run as the final phase does, and export it. Returns the exit code."""
    run = Run.open(folder)
    record, settings = run.find(key), run.config
    chosen = settings.model_copy(update={"export": list(formats or settings.export)})
    target = out or folder / "models" / record.key
    run.display.say(f"training {record.key} from {settings.final.seeds} seeds, then exporting it")
    result = Worker(chosen)(("finish", _finish_payload(record, target)))
    if not isinstance(result, Scored):
        raise NasgraphError(f"{record.key} could not be exported: {result.reason}: {result.detail}")
    bad = 0
    for item in result.info["exports"]:
        good = item["status"] == "ok"
        bad += not good
        diff = f", differs by at most {item['max_abs_diff']:.1e}" if item["max_abs_diff"] is not None else ""
        run.display.say(f"{item['format']}: {item['path'] if good else 'failed: ' + item['detail']}{diff}")
    return 1 if bad else 0


def score(settings: Config, out: Path, quiet: bool = False) -> int:
    """Score random architectures with proxies and write them as CSV. Returns the exit code."""
    if not out.parent.is_dir():
        raise ConfigError(f"there is no folder {out.parent}: make it, or choose another --out")
    display = Display(quiet)
    made = parts(settings)
    database = out.with_name(out.name + ".db")
    with _executor(settings) as executor:
        rows = _screen(settings, made, ScreenTable(database), executor, display)
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    with _file(out) as file:
        writer = csv.writer(file)
        writer.writerow(["index", "key", *names, "failure", "architecture"])
        for row in rows:
            failed = f"{row.reason}: {row.detail}" if row.reason else ""
            values = [row.values.get(name, "") for name in names]
            writer.writerow([row.index, row.key, *values, failed, row.arch.to_json()])
    for leftover in (database, database.with_name(database.name + ".lock")):
        leftover.unlink(missing_ok=True)
    display.say(f"{len(rows)} architectures ({len({row.key for row in rows})} distinct networks) in {out}")
    return 0


@dataclass(frozen=True)
class _Final:
    """A finished model: what :class:`~nasgraph.workers.Worker` measured, or why it failed."""

    values: dict[str, float]
    info: dict[str, Any]
    failure: str = ""


class Run:
    """One run folder and what is done in it."""

    def __init__(
        self, folder: Path, settings: Config, facts: dict[str, Any], made: Parts | None, display: Display
    ) -> None:
        self.folder, self.config, self.facts, self.made, self.display = folder, settings, facts, made, display

    @classmethod
    def open(cls, folder: Path) -> Run:
        """The run in ``folder``, for reading. Raises: NasgraphError: there is none, or its manifest is damaged."""
        facts = manifest.read(folder / MANIFEST)
        return cls(folder, config.parse(facts["config"], f"{folder / MANIFEST}: config"), facts, None, Display())

    @cached_property
    def space(self) -> SearchSpace:
        """The space; without the data its sizes come from the manifest."""
        if self.made is not None:
            return self.made.space
        plugin = self.config.space
        space: SearchSpace = registry.make("spaces", plugin.name, plugin.arguments, self.facts["task"]["sizes"])
        return space

    @cached_property
    def objectives(self) -> list[tuple[str, Direction]]:
        found: list[Objective] = [registry.resolve("objectives", name) for name in self.config.objectives]
        return [(objective.name, objective.direction) for objective in found]

    # ---- the phases -----------------------------------------------------------------------------------------------

    def go(self) -> int:
        try:
            with _executor(self.config) as executor:
                first = self._screen(executor)
                self._study("search", executor, first)
                if self.config.search.baseline:
                    self._study("random", executor)
                self._finish(executor)
            self._references()
        except NasgraphError as error:
            self._close("stopped", str(error))
            raise
        except KeyboardInterrupt:
            self._close("interrupted")
            raise
        self._write_pareto()
        with _timed(self.display, "report"):
            path = self.write_report()
        self._close("finished")
        self._print(path)
        return 0

    def _close(self, status: str, reason: str = "") -> None:
        """Write down how the run ended, its seconds and the hash of everything it leaves."""
        kept = [self.folder / PARETO, self.folder / REPORT, *(self.folder / "models").glob("*/*")]
        seconds = self.facts["seconds"]
        for phase, spent in self.display.seconds.items():
            seconds[phase] = round(seconds.get(phase, 0.0) + spent, 3)
        self.facts |= {"status": status, "reason": reason, "finished": manifest.now()}
        self.facts["artifacts"] = manifest.hashes(self.folder, [path for path in kept if path.is_file()])
        manifest.write(self.folder / MANIFEST, self.facts)

    def _screen(self, executor: Executor) -> list[Architecture]:
        tier = self.config.screen
        if tier is None:
            return []
        assert self.made is not None
        rows = _screen(self.config, self.made, ScreenTable(self.folder / SCREEN), executor, self.display)
        columns = rank_by(self.config)
        kept = survivors(rows, columns, ["maximize"] * len(columns), min(tier.keep, self.config.search.trials))
        return [row.arch for row in kept]

    def _study(self, name: str, executor: Executor, first: Sequence[Architecture] = ()) -> None:
        study = self._open(name)
        trials = self.config.search.trials
        done = len(study.records)
        best: list[float] = []
        sign = 1 if self.objectives[0][1] == "maximize" else -1

        with self.display.phase(name, trials, done) as phase:

            def on_result(record: TrialRecord) -> None:
                if record.state == "scored":
                    best.append(sign * record.values[self.objectives[0][0]])
                failed = f" {record.reason}" if record.state == "failed" else ""
                phase.advance(f"best {self.objectives[0][0]} {_human(sign * max(best))}{failed}" if best else failed)

            study.run(trials, _Role("evaluate", executor), on_result=on_result, first=first)

    def _open(self, name: str) -> Study:
        sampler = self.config.search.sampler if name == "search" else config.Plugin(name="random")
        return Study(
            self.folder / STUDY,
            name,
            self.space,
            self.objectives,
            functools.partial(make_sampler, sampler.name, **sampler.arguments),
            seed=self.config.seed,
            limits=self.config.limits,
        )

    def _finish(self, executor: Executor) -> None:
        """Train, test and export the chosen members of the front, and the random search's best for comparison."""
        chosen = self._chosen()
        best = self._best("random")
        work: dict[str, tuple[TrialRecord, Path | None]] = {
            record.key: (record, self.folder / "models" / record.key) for record in chosen
        }
        todo = {key: item for key, item in work.items() if key not in self.finals}
        if best is not None and best.key not in self.finals and best.key not in todo:
            todo[best.key] = (best, None)
        waiting = dict(enumerate(todo))
        for ticket, key in waiting.items():
            executor.submit(ticket, ("finish", _finish_payload(*todo[key])))
        with self.display.phase("final", len(work) + (best is not None), len(self.finals)) as phase:
            while waiting:
                for ticket, result in executor.wait():
                    key = waiting.pop(ticket)
                    self._keep(key, result)
                    phase.advance(key[:12])

    def _keep(self, key: str, result: Result) -> None:
        """Add a finished model to ``final.json``, in one step."""
        if isinstance(result, Scored):
            for item in result.info["exports"]:
                item["path"] = os.path.relpath(item["path"], self.folder)
            self.finals[key] = _Final(result.values, result.info)
        else:
            self.finals[key] = _Final({}, {"exports": []}, f"{result.reason}: {result.detail}")
        manifest.write(self.folder / FINAL, {key: vars(final) for key, final in self.finals.items()})

    @cached_property
    def finals(self) -> dict[str, _Final]:
        """Finished models by key, as ``final.json`` holds them."""
        path = self.folder / FINAL
        if not path.exists():
            return {}
        try:
            return {key: _Final(**values) for key, values in json.loads(path.read_text(encoding="utf-8")).items()}
        except (ValueError, TypeError) as error:
            raise DamagedFile(
                f"{path} is damaged ({error}): delete it, 'nasgraph resume' finishes the models anew"
            ) from None

    def _references(self) -> None:
        """What the task's simple baselines reach, measured once."""
        if "references" not in self.facts and self.made is not None:
            measure = getattr(self.made.task, "baseline", None)
            with _timed(self.display, "references"):
                self.facts["references"] = {"logistic regression": measure()} if measure else {}

    # ---- what came out --------------------------------------------------------------------------------------------

    def scored(self, name: str) -> list[TrialRecord]:
        """Distinct scored networks of a study that keep within the limits."""
        found = {r.key: r for r in reversed(self.records(name)) if r.state == "scored" and self._within(r)}
        return list(reversed(found.values()))

    def records(self, name: str) -> list[TrialRecord]:
        """All finished trials of a study."""
        if name == "random" and not self.config.search.baseline:
            return []
        return list(self._open(name).records) if (self.folder / STUDY).exists() else []

    def _within(self, record: TrialRecord) -> bool:
        return all(record.values[name] <= limit for name, limit in self.config.limits.items())

    def front(self) -> list[TrialRecord]:
        """The Pareto front of the search, best in the first objective first."""
        return self._front(self.scored("search"))

    def _front(self, records: list[TrialRecord]) -> list[TrialRecord]:
        if not records:
            return []
        kept = pareto_front(self._values(records), [direction for _, direction in self.objectives])
        return self._ranked([record for record, keep in zip(records, kept, strict=True) if keep])

    def _values(self, records: Iterable[TrialRecord]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array([[record.values[name] for name, _ in self.objectives] for record in records], dtype=float)

    def _ranked(self, records: list[TrialRecord]) -> list[TrialRecord]:
        """Best in the first objective first; ties by the next ones."""
        sign = [-1 if direction == "maximize" else 1 for _, direction in self.objectives]
        return sorted(
            records, key=lambda r: [s * r.values[name] for s, (name, _) in zip(sign, self.objectives, strict=True)]
        )

    def _chosen(self) -> list[TrialRecord]:
        """Members of the front to finish: the best in the first objective, then evenly along the front."""
        front, top = self.front(), self.config.final.top
        if len(front) <= top:
            return front
        places = {round(i * (len(front) - 1) / max(1, top - 1)) for i in range(top)}
        return [front[place] for place in sorted(places)]

    def _best(self, name: str) -> TrialRecord | None:
        records = self._ranked(self.scored(name))
        return records[0] if records else None

    def find(self, key: str) -> TrialRecord:
        """The record whose key begins with ``key``. Raises: ConfigError: there is none, or more than one."""
        found = {r.key: r for name in ("search", "random") for r in self.records(name) if r.key.startswith(key)}
        if len(found) != 1:
            why = "no architecture" if not found else f"{len(found)} architectures"
            known = ", ".join(record.key for record in self.front()[:5])
            raise ConfigError(f"{why} of {self.folder} has a key that begins with '{key}'. On the front: {known}")
        return next(iter(found.values()))

    def hypervolumes(self) -> dict[str, float]:
        """Hypervolume of the search and of the random baseline, from one reference point."""
        runs = {name: self.scored(name) for name in ("search", "random")}
        values = {name: self._values(records) for name, records in runs.items() if records}
        if not values:
            return {}
        directions = [direction for _, direction in self.objectives]
        reference = reference_point(np.concatenate(list(values.values())), directions)
        return {name: hypervolume(found, directions, reference) for name, found in values.items()}

    def _write_pareto(self) -> None:
        names = [name for name, _ in self.objectives]
        finals = list(dict.fromkeys(name for final in self.finals.values() for name in final.values))
        with _file(self.folder / PARETO) as file:
            writer = csv.writer(file)
            writer.writerow(["key", *names, *(f"final_{name}" for name in finals), "folder", "architecture"])
            for record in self.front():
                final = self.finals.get(record.key)
                folder = f"models/{record.key}" if final and final.info["exports"] else ""
                measured = [final.values.get(name, "") if final else "" for name in finals]
                row = [record.key, *(record.values[name] for name in names), *measured, folder, record.arch.to_json()]
                writer.writerow(row)

    def write_report(self) -> Path:
        """Write ``report.html``."""
        from nasgraph.draw import draw_architecture
        from nasgraph.report import FrontRow, write_report

        rows = []
        for record in self.front():
            final = self.finals.get(record.key, _Final({}, {"exports": []}))
            drawing = draw_architecture(self.space, record.arch)
            rows.append(FrontRow(record.key, record.arch, record.values, final.values, drawing, final.info["exports"]))
        best = self._best("random")
        references = dict(self.facts.get("references", {}))
        if best is not None and best.key in self.finals:
            references["random search, its best on validation"] = self.finals[best.key].values
        return write_report(
            self.folder / REPORT,
            title=f"{self.space.name} on {self.facts['task']['name']}",
            trials=self.records("search"),
            baseline=self.records("random"),
            objectives=self.objectives,
            screen=self.screened(),
            front=rows,
            references=references,
            manifest=self.facts,
        )

    def screened(self) -> list[ScreenRow]:
        if not (self.folder / SCREEN).exists():
            return []
        with ScreenTable(self.folder / SCREEN) as table:
            return table.rows()

    def _print(self, report: Path) -> None:
        """The Pareto table, what stands beside it, and where everything is."""
        names = [name for name, _ in self.objectives]
        table = Table("", *names, "val", "test", "test, mean of seeds", title=f"Pareto front ({self.folder})")

        def row(label: str, values: Mapping[str, float], final: Mapping[str, float]) -> None:
            spread = ""
            if "test_accuracy_mean" in final:
                spread = f"{100 * final['test_accuracy_mean']:.1f} ± {100 * final['test_accuracy_std']:.1f} %"
            shown = [_human(values[name]) if name in values else "" for name in names]
            table.add_row(label, *shown, _percent(final, "val_accuracy"), _percent(final, "test_accuracy"), spread)

        for record in self._chosen():
            final = self.finals.get(record.key)
            row(record.key, record.values, final.values if final else {})
        table.add_section()
        best = self._best("random")
        if best is not None:
            final = self.finals.get(best.key)
            row(f"random search of {self.config.search.trials}", best.values, final.values if final else {})
        for name, values in self.facts.get("references", {}).items():
            row(name, {}, values)
        console = self.display.console
        console.print(table)
        volumes = self.hypervolumes()
        if len(volumes) == 2:
            console.print(
                f"hypervolume: search {volumes['search']:.6g}, random {volumes['random']:.6g}", highlight=False
            )
        failed = [f"{key}: {final.failure}" for key, final in self.finals.items() if final.failure]
        failed += [
            f"{key}: {item['format']}: {item['detail']}"
            for key, final in self.finals.items()
            for item in final.info["exports"]
            if item["status"] != "ok"
        ]
        for line in failed:
            console.print(f"not exported: {line}", style="yellow", highlight=False)
        spent = self.facts["seconds"]
        console.print("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in spent.items()), highlight=False)
        console.print(f"models:  {self.folder / 'models'}\nreport:  {report}", highlight=False, soft_wrap=True)


class _Role:
    """An executor whose payloads are all of one role of :class:`~nasgraph.workers.Worker`."""

    def __init__(self, role: str, executor: Executor) -> None:
        self.role, self.executor, self.slots = role, executor, executor.slots

    def submit(self, ticket: int, payload: Any) -> None:
        self.executor.submit(ticket, (self.role, payload))

    def wait(self, timeout: float | None = None) -> list[tuple[int, Result]]:
        return self.executor.wait(timeout)

    def __enter__(self) -> _Role:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _executor(settings: Config) -> Executor:
    worker, tier = Worker(settings), settings.search
    if tier.ray:
        return RayActors(worker, max(1, tier.workers), num_gpus=tier.gpus_per_worker, timeout_s=tier.timeout_s)
    if tier.workers:
        preload = ("nasgraph.workers", "torch_geometric.nn")
        return Processes(worker, tier.workers, tier.timeout_s, tier.memory_gb, preload)
    return InProcess(worker)


def _screen(settings: Config, made: Parts, table: ScreenTable, executor: Executor, display: Display) -> list[ScreenRow]:
    tier = settings.screen
    assert tier is not None
    role = _Role("score", executor)
    with table, display.phase("screen", tier.candidates, len(table.rows())) as phase:
        return screen(
            made.space,
            Worker(settings),
            table,
            tier.candidates,
            settings.seed,
            executor=lambda score: role,
            on_row=lambda row: phase.advance(row.reason or ""),
        )


def _finish_payload(record: TrialRecord, target: Path | None) -> dict[str, Any]:
    notes = {"found by": f"trial {record.number}", "canonical key": record.key}
    metadata = {"values": record.values, "notes": notes}
    return {
        "architecture": dict(record.arch),
        "folder": None if target is None else str(target.resolve()),
        "metadata": metadata,
    }


@contextmanager
def _timed(display: Display, name: str) -> Iterator[None]:
    with display.phase(name, 1) as phase:
        yield
        phase.advance()


@contextmanager
def _file(path: Path) -> Iterator[io.StringIO]:
    """A text file that appears whole or not at all."""
    text = io.StringIO(newline="")
    yield text
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
        os.replace(temporary, path)
    except OSError as error:
        raise NasgraphError(f"cannot write {path}: {error.strerror}; free the disk or choose --out") from None


def _percent(values: Mapping[str, float], name: str) -> str:
    return f"{100 * values[name]:.1f} %" if name in values else ""


def _human(value: float) -> str:
    """``12.3k`` for counts, three significant digits for the rest."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.4g}"
