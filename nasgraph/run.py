"""A run is a folder: what was run, what was measured, what came out. Reading it needs neither data nor workers."""

from __future__ import annotations

import csv
import functools
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nasgraph import config, manifest
from nasgraph.catalogue import make_space
from nasgraph.compare import Comparison, distinct
from nasgraph.config import Config
from nasgraph.errors import ConfigError, DamagedFile, NasgraphError
from nasgraph.objectives import Result, Scored, find_objective
from nasgraph.pareto import Direction, pareto_front
from nasgraph.readable import duration, number
from nasgraph.samplers import make_sampler
from nasgraph.screen import ScreenRow, ScreenTable
from nasgraph.space import SearchSpace
from nasgraph.study import Study, TrialRecord

MANIFEST, STUDY, SCREEN, FINAL, PARETO, REPORT, MODELS, SUPERNET = (
    "manifest.json", "study.db", "screen.db", "final.json", "pareto.csv", "report.html", "models", "supernet",
)  # fmt: skip


@dataclass(frozen=True)
class Final:
    """A chosen architecture after its final training: what was measured and exported, or why it failed."""

    values: dict[str, float]
    info: dict[str, Any]
    failure: str = ""

    @property
    def exports(self) -> list[dict[str, Any]]:
        """One record per exported format, paths relative to the run's folder."""
        return list(self.info.get("exports", []))


class Run:
    """One run folder.

    Args:
        folder: holds ``manifest.json``; the other files may not be there yet.
        settings: the config in the manifest.
        facts: the manifest.
        space: the space, if it is made already; otherwise it is made from the sizes in the manifest.
    """

    def __init__(self, folder: Path, settings: Config, facts: dict[str, Any], space: SearchSpace | None = None) -> None:
        self.folder, self.config, self.facts = folder, settings, facts
        self._records: dict[str, list[TrialRecord]] = {}
        if space is not None:
            self.space = space

    @classmethod
    def open(cls, folder: Path) -> Run:
        """The run in ``folder``. Raises: NasgraphError: there is none, or its manifest is damaged."""
        facts = manifest.read(folder / MANIFEST)
        return cls(folder, config.parse(facts["config"], f"{folder / MANIFEST}: config"), facts)

    @cached_property
    def space(self) -> SearchSpace:
        """The search space. Raises: NasgraphError: it is no longer what it was when the run began."""
        plugin = self.config.space
        space = make_space(plugin.name, plugin.arguments, self.facts["task"]["sizes"])
        self.check("space", space.fingerprint())
        return space

    @cached_property
    def objectives(self) -> list[tuple[str, Direction]]:
        """Name and direction of what the study optimises."""
        return [(found.name, found.direction) for found in map(find_objective, self.config.objectives)]

    def check(self, what: str, fingerprint: str) -> None:
        """Compare a fingerprint with the one in the manifest. Raises: NasgraphError: they differ."""
        if self.facts[what]["fingerprint"] != fingerprint:
            name = self.facts[what]["name"]
            raise NasgraphError(
                f"the {what} '{name}' is not what it was when {self.folder} began: restore it, or start a new run"
            )

    # ---- what was measured ----------------------------------------------------------------------------------------

    def study(self, name: str) -> Study:
        """The study called ``search``, or its baseline called ``random``."""
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

    def records(self, name: str) -> list[TrialRecord]:
        """All finished trials of a study; one that is above a limit counts as failed."""
        if not (self.folder / STUDY).exists() or (name == "random" and not self.config.search.baseline):
            return []
        if name not in self._records:
            self.remember(name, self.study(name).records)
        return list(self._records[name])

    def remember(self, name: str, records: Iterable[TrialRecord]) -> None:
        """Keep what a study has found so far: reading thousands of trials from its file takes seconds."""
        self._records[name] = [self._judged(record) for record in records]

    def _judged(self, record: TrialRecord) -> TrialRecord:
        for name, limit in self.config.limits.items():
            if record.state == "scored" and record.values[name] > limit:
                detail = f"{name} is {number(name, record.values[name])}, the limit {number(name, limit)}"
                return replace(record, state="failed", reason="limit", detail=detail)
        return record

    def screened(self) -> list[ScreenRow]:
        """All rows of the screen."""
        if not (self.folder / SCREEN).exists():
            return []
        with ScreenTable(self.folder / SCREEN) as table:
            return table.rows()

    # ---- what came out --------------------------------------------------------------------------------------------

    def front(self) -> list[TrialRecord]:
        """The Pareto front of the search, the best in the first objective first."""
        records = distinct(self.records("search"))
        if not records:
            return []
        values = [[record.values[name] for name, _ in self.objectives] for record in records]
        kept = pareto_front(values, [direction for _, direction in self.objectives])
        return self._ranked([record for record, keep in zip(records, kept, strict=True) if keep])

    def chosen(self) -> list[TrialRecord]:
        """Members of the front to finish: the best in the first objective, and others evenly along the front."""
        front, top = self.front(), self.config.final.top
        if len(front) <= top:
            return front
        return [front[place] for place in sorted({round(i * (len(front) - 1) / max(1, top - 1)) for i in range(top)})]

    def best(self, name: str) -> TrialRecord | None:
        """The best of a study in the first objective; ties by the next ones."""
        return next(iter(self._ranked(distinct(self.records(name)))), None)

    def _ranked(self, records: list[TrialRecord]) -> list[TrialRecord]:
        signs = [(name, -1 if direction == "maximize" else 1) for name, direction in self.objectives]
        return sorted(records, key=lambda record: [sign * record.values[name] for name, sign in signs])

    def find(self, key: str) -> TrialRecord:
        """The record whose key begins with ``key``. Raises: ConfigError: there is none, or more than one."""
        found = {r.key: r for name in ("search", "random") for r in self.records(name) if r.key.startswith(key)}
        if len(found) != 1:
            known = ", ".join(record.key for record in self.front()[:5]) or "nothing yet"
            raise ConfigError(f"{len(found)} keys of {self.folder} begin with '{key}', not one. On the front: {known}")
        return next(iter(found.values()))

    @cached_property
    def finals(self) -> dict[str, Final]:
        """Finished models by key, as ``final.json`` holds them. Raises: DamagedFile."""
        path = self.folder / FINAL
        if not path.exists():
            return {}
        try:
            found = {key: Final(**values) for key, values in json.loads(path.read_text(encoding="utf-8")).items()}
            if not all(isinstance(final.values, dict) and isinstance(final.info, dict) for final in found.values()):
                raise ValueError("not the records of models")
            return found
        except (ValueError, TypeError, AttributeError) as error:
            raise DamagedFile(f"{path} is damaged ({error}): delete it, and resume: models are finished anew") from None

    def keep(self, key: str, result: Result) -> None:
        """Add a finished model to ``final.json``, in one step. Raises: NasgraphError: it cannot be written."""
        if isinstance(result, Scored):
            for item in result.info["exports"]:
                item["path"] = os.path.relpath(item["path"], self.folder) if item["path"] else ""
            self.finals[key] = Final(result.values, result.info)
        else:
            self.finals[key] = Final({}, {}, f"{result.reason}: {result.detail}")
        manifest.write(self.folder / FINAL, {key: asdict(final) for key, final in self.finals.items()})

    def write_pareto(self) -> Path:
        """Write the front as ``pareto.csv``."""
        names = [name for name, _ in self.objectives]
        measured = list(dict.fromkeys(name for final in self.finals.values() for name in final.values))
        with manifest.writing(self.folder / PARETO) as file:
            writer = csv.writer(file)
            writer.writerow(["key", *names, *(f"final_{name}" for name in measured), "folder", "architecture"])
            for record in self.front():
                final = self.finals.get(record.key, Final({}, {}))
                folder = f"{MODELS}/{record.key}" if final.exports else ""
                row = [*(record.values[name] for name in names), *(final.values.get(name, "") for name in measured)]
                writer.writerow([record.key, *row, folder, record.arch.to_json()])
        return self.folder / PARETO

    def write_report(self) -> Path:
        """Write ``report.html``."""
        from nasgraph.draw import draw_architecture
        from nasgraph.pretraining import read_history
        from nasgraph.report import FrontRow, write_report

        rows = []
        for record in self.front():
            final = self.finals.get(record.key, Final({}, {}))
            drawing = draw_architecture(self.space, record.arch)
            rows.append(FrontRow(record.key, record.arch, record.values, final.values, drawing, final.exports))
        return write_report(
            self.folder / REPORT,
            title=f"{self.space.name} on {self.facts['task']['name']}",
            trials=self.records("search"),
            baseline=self.records("random"),
            objectives=self.objectives,
            screen=self.screened(),
            front=rows,
            references=self._references(),
            manifest=self.facts,
            losses=read_history(self.folder / SUPERNET),
        )

    def _references(self) -> dict[str, Mapping[str, float]]:
        best = self.best("random")
        found: dict[str, Mapping[str, float]] = dict(self.facts.get("references", {}))
        if best is not None and best.key in self.finals:
            found["random search, its best on validation"] = self.finals[best.key].values
        return found

    def trouble(self) -> str:
        """Why the search has no front: how many trials failed, and the commonest reason."""
        failed = [record for record in self.records("search") if record.state == "failed"]
        if not failed:
            return "no trial was made"
        reason, count = Counter(record.reason for record in failed).most_common(1)[0]
        detail = next(record.detail for record in failed if record.reason == reason)
        return f"all of {len(failed)} trials failed, {count} of them with '{reason}', e.g. {detail}"

    def show(self, console: Console) -> None:
        """Print the Pareto table, what stands beside it, and where everything is."""
        names = [name for name, _ in self.objectives]
        shared = "supernet" in self.facts
        heads = [*names, *(["val, fine-tuned"] if shared else []), "test", "test, mean of seeds"]
        table = Table("", *heads, title=f"Pareto front, {self.folder}")

        def row(label: str, values: Mapping[str, float], final: Mapping[str, float]) -> None:
            mean = ""
            if "test_accuracy_mean" in final:
                mean = f"{100 * final['test_accuracy_mean']:.1f} ± {100 * final['test_accuracy_std']:.1f} %"
            measured = ["val_accuracy", "test_accuracy"] if shared else ["test_accuracy"]
            cells = [number(name, values[name]) if name in values else "" for name in names]
            cells += [number(name, final[name]) if name in final else "" for name in measured]
            table.add_row(label, *cells, mean)

        chosen = self.chosen()
        for record in chosen:
            row(record.key[:11], record.values, self.finals.get(record.key, Final({}, {})).values)
        table.add_section()
        best = self.best("random")
        if best is not None:
            values = self.finals.get(best.key, Final({}, {})).values
            row(f"random search, {len(self.records('random'))} trials", best.values, values)
        for label, values in self.facts.get("references", {}).items():
            row(label, values, values)
        console.print(table)
        if shared:
            console.print("an accuracy of the search is the supernet's estimate; val and test are of what is exported")
        if not chosen:
            console.print(f"nothing to export: {self.trouble()}", style="yellow")
        against = Comparison(self.records("search"), self.records("random"), self.objectives)
        if against.random_volume and against.search_volume:
            volumes = f"search {against.search_volume[-1]:.3f}, random {against.random_volume[-1]:.3f}"
            console.print(f"dominated volume (share of the box of all results): {volumes}", highlight=False)
        for key, final in self.finals.items():
            lines = [final.failure] if final.failure else []
            lines += [f"{item['format']}: {item['detail']}" for item in final.exports if item["status"] != "ok"]
            for line in lines:
                console.print(f"not exported: {key}: {line}", style="yellow", highlight=False)
        spent = ", ".join(f"{name} {duration(seconds)}" for name, seconds in self.facts["seconds"].items())
        console.print(f"time:    {spent}", highlight=False)
        console.print(f"models:  {self.folder / MODELS}", highlight=False, soft_wrap=True)
        console.print(f"report:  {self.folder / REPORT}", highlight=False, soft_wrap=True)
