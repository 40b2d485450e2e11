"""The main job, end to end: supernet, screen, study, random baseline, final training, export, report.

What a run needs to go on after a kill is on disk at every moment: ``manifest.json`` (what is run), ``screen.db`` and
``study.db`` (a row per finished candidate), ``final.json`` (a record per finished model), ``supernet/`` (a checkpoint).

A supernet is trained in this process: it is one long job whose state is its checkpoint, so a worker would add a copy of
the data and a pipe, and take the progress and Ctrl-C away.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nasgraph import __version__, config, database, manifest, pretraining, registry, warm_start
from nasgraph.build import build
from nasgraph.config import Config
from nasgraph.console import Display
from nasgraph.errors import ConfigError, NasgraphError, SearchStopped
from nasgraph.executors import Executor, InProcess, Processes, RayActors
from nasgraph.export.fits import check_formats
from nasgraph.objectives import Result, Scored
from nasgraph.pretraining import Pretraining
from nasgraph.readable import number
from nasgraph.run import MANIFEST, MODELS, PARETO, REPORT, SCREEN, SUPERNET, Run
from nasgraph.samplers import make_sampler
from nasgraph.screen import ScreenRow, ScreenTable, candidate, screen, survivors
from nasgraph.space import Architecture
from nasgraph.study import TrialRecord
from nasgraph.tryout import check_space
from nasgraph.workers import BASELINE_PROXIES, Parts, Worker, parts, rank_by

# What may be changed when a run goes on: how long and with what, never what is searched.
RESUMABLE = (
    *("search.trials", "search.workers", "search.ray", "search.timeout_s", "search.memory_gb", "data_root"),
    *("final.top", "export", "supernet.checkpoint_every"),
)
CANDIDATES = 5  # of the screen that are asked for whether the proxies can judge them
EXPORT_S = 300.0  # added to the time limit of a final training, for the export


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
        _check_plugins(settings)
        made = parts(settings)
        made.space.sample(random.Random(settings.seed))  # a constraint that nothing meets costs no training
        check_space(made.space)
        _known(settings, made)
        warm_start.check(settings.search.warm_start, made)
        check_formats(settings.export, made.space)
        _check_ranking(settings, made)
        learner = _learner(settings, made, folder)
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
    with _alone(folder):
        manifest.write(folder / MANIFEST, facts)
        return _go(Run(folder, settings, facts, made.space), made, learner, display)


def resume(folder: Path, overrides: Sequence[str] = (), quiet: bool = False) -> int:
    """Continue a run where it stopped; what is finished is not done again. Returns the exit code.

    Raises: NasgraphError: there is no run, a file of it is damaged, or space or data are no longer the same.
    """
    manifest.read(folder / MANIFEST)  # there is a run
    with _alone(folder):
        return _resume(folder, overrides, Display(quiet))


def _resume(folder: Path, overrides: Sequence[str], display: Display) -> int:
    facts = manifest.read(folder / MANIFEST)
    for text in overrides:
        if text.partition("=")[0] not in RESUMABLE:
            raise ConfigError(f"{text.partition('=')[0]} cannot change when a run goes on: start a new one with it")
    settings = config.parse(config.override(facts["config"], overrides), f"{folder / MANIFEST}: config")
    with _timed(display, "load"):
        _check_plugins(settings)
        made = parts(settings)
    run = Run(folder, settings, facts, made.space)
    run.check("space", made.space.fingerprint())
    run.check("task", made.task.fingerprint())
    if "supernet" in facts:
        pretraining.check(folder / SUPERNET, facts["supernet"]["sha256"])
    check_formats(settings.export, made.space)
    with _timed(display, "load"):
        learner = _learner(settings, made, folder)
    done = len(run.records("search"))
    if settings.search.trials < done:
        raise ConfigError(f"{folder} holds {done} trials already: --trials counts them too, give at least as many")
    facts |= {"status": "running", "config": settings.model_dump(mode="json")}
    facts["resumed"] = [*facts.get("resumed", []), manifest.now()]
    manifest.write(folder / MANIFEST, facts)
    return _go(run, made, learner, display)


def export(folder: Path, key: str, formats: Sequence[str] | None, out: Path | None) -> int:
    """Train or fine-tune one architecture of a run as the final phase does, and export it. Returns the exit code."""
    run, display = Run.open(folder), Display()
    if run.config.supernet is not None:
        if "supernet" not in run.facts:
            raise ConfigError(f"the supernet of {folder} is not trained yet: nasgraph resume {folder}")
        pretraining.check(folder / SUPERNET, run.facts["supernet"]["sha256"])
    record = run.find(key)
    settings = run.config.model_copy(update={"export": list(formats or run.config.export)})
    check_formats(settings.export, run.space)
    display.say(f"training {record.key} from {settings.final.seeds} seeds, then exporting it")
    result = _worker(settings, folder)(("finish", _finish_payload(record, out or folder / MODELS / record.key)))
    if not isinstance(result, Scored):
        raise NasgraphError(f"{record.key} could not be exported: {result.reason}: {result.detail}")
    for name in ("val_accuracy", "test_accuracy"):
        display.say(f"{name}: {number(name, result.values[name])}")
    for item in result.info["exports"]:
        good = item["status"] == "ok"
        diff = f", differs by at most {item['max_abs_diff']:.1e}" if item["max_abs_diff"] is not None else ""
        display.say(f"{item['format']}: {item['path'] if good else 'failed: ' + item['detail']}{diff}")
    return 0 if all(item["status"] == "ok" for item in result.info["exports"]) else 1


def score(settings: Config, out: Path, quiet: bool = False) -> int:
    """Score random architectures with proxies and write them as CSV. Returns the exit code."""
    if not out.parent.is_dir():
        raise ConfigError(f"there is no folder {out.parent}: make it, or choose another --out")
    if out.is_dir():
        raise ConfigError(f"{out} is a folder: name a file with --out")
    display = Display(quiet)
    _check_plugins(settings)
    made = parts(settings)
    table = out.with_name(out.name + ".db")
    table.unlink(missing_ok=True)  # of a scoring that was stopped, perhaps with other proxies
    with _executor(settings, out.parent) as executor:
        rows = _screen(settings, made, table, executor, display)
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    with manifest.writing(out) as file:
        writer = csv.writer(file)
        writer.writerow(["index", "key", *names, "failure", "architecture"])
        for row in rows:
            failed = f"{row.reason}: {row.detail}" if row.reason else ""
            values = [row.values.get(name, "") for name in names]
            writer.writerow([row.index, row.key, *values, failed, row.arch.to_json()])
    for leftover in (table, table.with_name(table.name + ".lock")):
        leftover.unlink(missing_ok=True)
    display.say(f"{len(rows)} architectures ({len({row.key for row in rows})} distinct networks) in {out}")
    return 0


# ---- the phases -------------------------------------------------------------------------------------------------


def _go(run: Run, made: Parts, learner: Pretraining | None, display: Display) -> int:
    try:
        if learner is not None:
            _pretrain(run, learner, display)
            _relax(run, made, display)
            learner = None  # its memory is the workers' now
        with _executor(run.config, run.folder) as executor:
            first = _first(run, made, executor, display)
            _study(run, "search", executor, display, first)
            if run.config.search.baseline:
                _study(run, "random", executor, display)
            _finish(run, executor, display)
        _references(run, made, display)
        run.write_pareto()
        with _timed(display, "report"):
            run.write_report()
    except BaseException as error:
        with suppress(NasgraphError):  # the first error is the one to tell
            _note(run, display, "stopped" if isinstance(error, NasgraphError) else "interrupted", str(error))
        raise
    _note(run, display, "finished")
    run.show(display.console)
    exports = [item for record in run.chosen() for item in run.finals[record.key].exports]
    return 0 if any(item["status"] == "ok" for item in exports) else 1


def _note(run: Run, display: Display, status: str = "running", reason: str = "") -> None:
    """Write down how far the run is, the seconds of its phases and the hash of everything it leaves."""
    kept = [run.folder / PARETO, run.folder / REPORT, *(run.folder / MODELS).glob("*/*")]
    kept.append(run.folder / SUPERNET / pretraining.HISTORY)
    for phase in list(display.seconds):
        spent = run.facts["seconds"].get(phase, 0.0) + display.seconds.pop(phase)
        run.facts["seconds"][phase] = round(spent, 3)
    run.facts |= {"status": status, "reason": reason, "ended" if status != "running" else "seen": manifest.now()}
    run.facts["artifacts"] = manifest.hashes(run.folder, [path for path in kept if path.is_file()])
    manifest.write(run.folder / MANIFEST, run.facts)


def _learner(settings: Config, made: Parts, folder: Path) -> Pretraining | None:
    """The supernet that the config asks for, as far as ``folder`` holds it."""
    if settings.supernet is None:
        return None
    return pretraining.begin(settings, made.space, made.task, folder / SUPERNET)


def _pretrain(run: Run, learner: Pretraining, display: Display) -> None:
    """Train the run's supernet."""
    if learner.step < learner.total:
        with _threads(run.config.threads), display.phase("supernet", learner.total, learner.step) as phase:
            learner.train(phase.advance)
    run.facts.setdefault("supernet", learner.facts())
    _note(run, display)


def _relax(run: Run, made: Parts, display: Display) -> None:
    """Differentiable search in a copy of the supernet; what it finds is in the manifest, so it is done once."""
    wanted = run.config.differentiable
    if wanted is None or "differentiable" in run.facts:
        return
    with _threads(run.config.threads), display.phase(wanted.method, wanted.steps) as phase:
        place, seed = run.folder / SUPERNET, run.config.seed
        found = pretraining.relax(wanted, made.space, made.task, place, seed, lambda *_: phase.advance())
    run.facts["differentiable"] = found
    _note(run, display)


@contextmanager
def _threads(n: int) -> Iterator[None]:
    """Torch with ``n`` threads: the bits depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _first(run: Run, made: Parts, executor: Executor, display: Display) -> list[Architecture]:
    """What the study evaluates first: the architectures that the config names, and the survivors of tier 1."""
    tier, columns = run.config.screen, rank_by(run.config)
    known = _known(run.config, made)
    if "differentiable" in run.facts:
        known.append(made.space.architecture(run.facts["differentiable"]["architecture"]))
    known += _warm(run, made, known, display)
    if tier is None:
        return known
    rows = _screen(run.config, made, run.folder / SCREEN, executor, display)
    _note(run, display)
    if tier.keep and all(row.reason for row in rows):
        raise SearchStopped(
            f"the screen has nothing to keep, each of its {len(rows)} candidates failed: {rows[0].reason}: "
            f"{rows[0].detail}. Start anew with another proxy in screen.rank_by, or without a screen"
        )
    costs = [name for name in BASELINE_PROXIES if name in run.config.objectives]  # the screen knows these exactly
    kept = survivors(rows, columns, ["maximize"] * len(columns), tier.keep, costs) if tier.keep else []
    return [*known, *(row.arch for row in kept)]


def _warm(run: Run, made: Parts, known: Sequence[Architecture], display: Display) -> list[Architecture]:
    """What ``search.warm_start`` proposes; it is in the manifest, so it is found once."""
    wanted = run.config.search.warm_start
    if wanted is None:
        return []
    if "warm_start" not in run.facts:
        with _threads(run.config.threads), _timed(display, "warm start"):
            network = None
            if run.config.supernet is not None:
                learned = _worker(run.config, run.folder).supernet
                network = partial(learned.calibrated, samples=run.config.supernet.samples)
            found = warm_start.warm_start(wanted, made, known, network, run.config.seed)
            run.facts["warm_start"] = [dict(architecture) for architecture in found]
        _note(run, display)
    return [made.space.architecture(choices) for choices in run.facts["warm_start"]]


def _known(settings: Config, made: Parts) -> list[Architecture]:
    """The architectures of ``search.start``. Raises: SpaceError: one that the space does not have."""
    return [made.space.architecture(choices) for choices in settings.search.start]


def _screen(settings: Config, made: Parts, path: Path, executor: Executor, display: Display) -> list[ScreenRow]:
    assert settings.screen is not None
    total, role = settings.screen.candidates, _Role("score", executor)
    with ScreenTable(path) as table, display.phase("screen", total, len(table.rows())) as phase:
        return screen(
            made.space,
            table,
            total,
            settings.seed,
            role,
            on_row=lambda row: phase.advance(row.reason or ""),
        )


def _study(run: Run, name: str, executor: Executor, display: Display, first: Sequence[Architecture] = ()) -> None:
    """Tier 2: train or score candidates until the study holds its trials."""
    study, trials = run.study(name), run.config.search.trials
    objective, direction = run.objectives[0]
    better = max if direction == "maximize" else min
    best = [record.values[objective] for record in study.records if record.state == "scored"]
    with display.phase(name, trials, len(study.records)) as phase:

        def on_result(record: TrialRecord) -> None:
            if record.state == "scored":
                best[:] = [better([*best, record.values[objective]])]
            found = f"best {objective} {number(objective, best[0])}" if best else ""
            phase.advance(f"{found} {record.reason or ''}")

        best[:] = [better(best)] if best else []
        study.run(trials, _Role("evaluate", executor), on_result=on_result, first=first)
    run.remember(name, study.records)
    _note(run, display)


def _finish(run: Run, executor: Executor, display: Display) -> None:
    """Train, test and export the chosen members of the front; train and test the random search's best beside them."""
    wanted: dict[str, tuple[TrialRecord, Path | None]] = {}
    for record in run.chosen():
        wanted[record.key] = (record, run.folder / MODELS / record.key)
    best = run.best("random")
    if best is not None:
        wanted.setdefault(best.key, (best, None))
    todo = {key: item for key, item in wanted.items() if not _finished(run, key, item[1])}
    if executor.timeout_s is not None:
        executor.timeout_s = executor.timeout_s * run.config.final.seeds + EXPORT_S
    waiting = dict(enumerate(todo))
    for ticket, key in waiting.items():
        executor.submit(ticket, ("finish", _finish_payload(*todo[key])))
    with display.phase("final", len(wanted), len(wanted) - len(todo)) as phase:
        while waiting:
            for ticket, result in executor.wait():
                key = waiting.pop(ticket)
                run.keep(key, result)
                phase.advance(key[:11])
    _note(run, display)


def _finished(run: Run, key: str, target: Path | None) -> bool:
    """Whether a model needs no more work. Failed ones, and such as were tested but not exported, are done anew."""
    final = run.finals.get(key)
    return final is not None and not final.failure and (target is None or bool(final.exports))


def _references(run: Run, made: Parts, display: Display) -> None:
    """What the task's simple baselines reach, measured once."""
    measure = getattr(made.task, "baseline", None)
    if "references" not in run.facts and measure is not None:
        with _timed(display, "references"):
            found = measure()
            named = found if all(isinstance(of, Mapping) for of in found.values()) else {"logistic regression": found}
            run.facts["references"] = {
                label: {name: value for name, value in of.items() if name.endswith("accuracy")}
                for label, of in named.items()
            }


def _finish_payload(record: TrialRecord, target: Path | None) -> dict[str, Any]:
    return {
        "architecture": dict(record.arch),
        "folder": None if target is None else str(target.resolve()),
        "metadata": {
            "values": record.values,
            "notes": {"found by": f"trial {record.number}", "canonical key": record.key},
        },
    }


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the run. Raises: ConfigError: another process is working in it."""
    with database.lock(folder / "run.lock", f"another process is running {folder}: wait for it or stop it"):
        yield


def _check_plugins(settings: Config) -> None:
    """Make or import what the config names and only a later phase would touch. Raises: ConfigError."""
    make_sampler(settings.search.sampler.name, 0, **settings.search.sampler.arguments)
    if settings.supernet is not None:
        registry.resolve("policies", settings.supernet.policy.name)
    if settings.differentiable is not None:
        registry.resolve("relaxations", settings.differentiable.method)
    for name in settings.screen.proxies if settings.screen else []:
        registry.resolve("proxies", name)
    for name in settings.export:
        registry.resolve("exporters", name)


def _check_ranking(settings: Config, made: Parts) -> None:
    """Ask each proxy that ranks the screen if it can judge networks: by its attribute ``check``, if it has one.

    Raises: ConfigError: one of the first candidates is refused; with the reason.
    """
    for name in rank_by(settings):
        check = getattr(registry.resolve("proxies", name), "check", None)
        if check is None:
            continue
        for index in range(CANDIDATES):
            try:
                check(build(made.space, candidate(made.space, settings.seed, index), settings.seeds[0]))
            except ValueError as error:
                raise ConfigError(f"screen: {error}") from None


class _Role:
    """An executor whose payloads are all of one role of :class:`~nasgraph.workers.Worker`."""

    def __init__(self, role: str, executor: Executor) -> None:
        self.role, self.executor, self.slots, self.timeout_s = role, executor, executor.slots, executor.timeout_s

    def submit(self, ticket: int, payload: Any) -> None:
        self.executor.submit(ticket, (self.role, payload))

    def wait(self, timeout: float | None = None) -> list[tuple[int, Result]]:
        return self.executor.wait(timeout)

    def __enter__(self) -> _Role:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _worker(settings: Config, folder: Path) -> Worker:
    return Worker(settings, None if settings.supernet is None else (folder / SUPERNET).resolve())


def _executor(settings: Config, folder: Path) -> Executor:
    worker, tier = _worker(settings, folder), settings.search
    if tier.ray:
        return RayActors(worker, max(1, tier.workers), num_gpus=tier.gpus_per_worker, timeout_s=tier.timeout_s)
    if tier.workers:
        preload = ("nasgraph.workers", "torch_geometric.nn")
        return Processes(worker, tier.workers, tier.timeout_s, tier.memory_gb, preload)
    return InProcess(worker)


@contextmanager
def _timed(display: Display, name: str) -> Iterator[None]:
    with display.phase(name, 1) as phase:
        yield
        phase.advance()
