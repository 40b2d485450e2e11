"""Each finished trial is recorded once, whatever ends the process; a resumed search equals the uninterrupted one."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.samplers import BaseSampler, RandomSampler

TESTS = Path(__file__).parent
sys.path.append(str(TESTS))  # child processes import the fakes by name

import fake_search as fakes  # noqa: E402

from nasgraph.errors import ConfigError, DamagedFile, NasgraphError, SearchStopped, SpaceError  # noqa: E402
from nasgraph.executors import InProcess, Processes  # noqa: E402
from nasgraph.objectives.base import Failed, Result, Scored  # noqa: E402
from nasgraph.samplers import make_sampler  # noqa: E402
from nasgraph.space import Architecture, Choice, Op, SearchSpace  # noqa: E402
from nasgraph.study import Study, TrialRecord  # noqa: E402


def study(path: Path, sampler: Any = "random", seed: int = 3, name: str = "search", **more: Any) -> Study:
    return Study(path, name, more.pop("space", fakes.chain()), fakes.OBJECTIVES, sampler, seed, **more)


def run(made: Study, trials: int, evaluate: Any = fakes.toy, **more: Any) -> list[TrialRecord]:
    with InProcess(evaluate) as executor:
        return made.run(trials, executor, **more)


def found(records: list[TrialRecord]) -> list[Any]:
    """All of the records but the wall clock."""
    return [(r.number, r.state, r.arch, r.key, r.values, r.info, r.reason, r.detail, r.reused) for r in records]


# ---- what is recorded -------------------------------------------------------------------------------------------


def test_records_are_what_was_measured_and_survive_reopening(tmp_path: Path) -> None:
    records = run(study(tmp_path / "study.db"), 12, fakes.failing_seldom)
    space = fakes.chain()
    assert [r.number for r in records] == list(range(12))
    for r in records:
        measured = fakes.failing_seldom(r.arch)
        assert r.result == measured and r.key == space.key(r.arch)
        assert (r.state == "scored") == isinstance(measured, Scored)
    assert study(tmp_path / "study.db").records == records
    assert run(study(tmp_path / "study.db"), 12, fakes.always_failing) == records  # nothing is left to do


def test_the_file_is_an_ordinary_optuna_study_without_running_trials(tmp_path: Path) -> None:
    records = run(study(tmp_path / "study.db", limits={"size": 40.0}), 15, fakes.failing_seldom)
    loaded = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert len(loaded.trials) == 15
    for trial, record in zip(loaded.trials, records, strict=True):
        assert trial.state.name == ("COMPLETE" if record.state == "scored" else "FAIL")
        assert trial.user_attrs["reason"] == record.reason and trial.user_attrs["architecture"] == dict(record.arch)
        assert trial.params.keys() == record.arch.keys()
        if record.state == "scored":
            assert trial.values == [record.values["good"], record.values["size"]]
            assert trial.constraints == {"size": record.values["size"] - 40.0}
    assert {t.state.name for t in loaded.trials} == {"COMPLETE", "FAIL"}
    assert all(t.constraints["size"] <= 0 for t in loaded.best_trials)


def test_a_trial_is_one_transaction(tmp_path: Path) -> None:
    made = study(tmp_path / "study.db")
    made.run(0, InProcess(fakes.toy))
    commits = Counter[str]()
    engine = made._engine
    sqlalchemy.event.listen(engine, "commit", lambda *arguments: commits.update(["all"]))
    inserts: list[int] = []

    def statement(connection: Any, cursor: Any, text: str, *more: Any) -> None:
        if text.startswith("INSERT"):
            inserts.append(commits["all"])

    sqlalchemy.event.listen(engine, "before_cursor_execute", statement)
    per_trial: list[set[int]] = []

    def recorded(record: TrialRecord) -> None:
        per_trial.append(set(inserts))
        inserts.clear()

    run(made, 5, on_result=recorded)
    assert len(per_trial) == 5 and all(len(between) == 1 for between in per_trial)


def test_the_file_is_in_wal_mode(tmp_path: Path) -> None:
    made = study(tmp_path / "study.db")
    with made._engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(sqlalchemy.text("PRAGMA synchronous")).scalar() == 1
        assert connection.execute(sqlalchemy.text("PRAGMA busy_timeout")).scalar() == 60_000


def test_several_studies_share_a_file(tmp_path: Path) -> None:
    one, other = study(tmp_path / "study.db"), study(tmp_path / "study.db", name="random", seed=4)
    run(one, 4), run(other, 6)
    assert len(study(tmp_path / "study.db").records) == 4
    assert len(study(tmp_path / "study.db", name="random", seed=4).records) == 6


def test_a_study_of_one_objective(tmp_path: Path) -> None:
    made = Study(tmp_path / "study.db", "one", fakes.chain(), [("good", "maximize")], "tpe", 0)
    records = run(made, 30)
    late = [r.values["good"] for r in records[-10:]]
    early = [r.values["good"] for r in records[:10]]
    assert sum(late) > sum(early)  # it learns which way is up
    assert records[0].values.keys() == {"good", "size"}


# ---- networks seen before ---------------------------------------------------------------------------------------


def tiny() -> SearchSpace:
    import torch
    from torch import nn

    space = SearchSpace("tiny")
    x = space.input("x", torch.zeros(2, 4))
    width = Choice("width", [4, 8, 16], ordered=True)
    space.output(space.add("linear", Op(nn.Linear, out_features=width), x))
    return space


class Counting:
    """Counts what it evaluates."""

    def __init__(self, result: Any = None) -> None:
        self.seen: Counter[int] = Counter()

    def __call__(self, arch: Mapping[str, Any]) -> Result:
        self.seen[arch["width"]] += 1
        if arch["width"] == 4:
            return Failed("error", "too narrow")
        return Scored({"good": float(arch["width"]), "size": 1.0})


def test_a_network_is_evaluated_once(tmp_path: Path) -> None:
    count = Counting()
    records = run(study(tmp_path / "study.db", space=tiny()), 20, count)
    assert set(count.seen.values()) == {1}
    assert len(records) == 20
    assert sum(not r.reused for r in records) == len(count.seen)
    assert all(r.values["good"] == r.arch["width"] for r in records if r.state == "scored")
    assert all(r.seconds == 0 for r in records if r.reused)
    run(study(tmp_path / "study.db", space=tiny()), 30, count)
    assert set(count.seen.values()) == {1}


def test_a_failed_network_is_not_proposed_again(tmp_path: Path) -> None:
    records = run(study(tmp_path / "study.db", space=tiny()), 40, Counting())
    assert sum(r.state == "failed" for r in records) == 1


def test_twins_in_flight_wait_for_one_evaluation(tmp_path: Path) -> None:
    """Four slots, three networks: a proposal that is being evaluated already takes the result when it comes."""

    class Slow(InProcess):
        slots = 4

    count = Counting()
    with Slow(count) as executor:
        records = study(tmp_path / "study.db", space=tiny()).run(20, executor)
    assert set(count.seen.values()) == {1}
    assert [r.number for r in records] == list(range(20))


def test_several_workers_lose_and_repeat_nothing(tmp_path: Path) -> None:
    with Processes(fakes.slow_toy, workers=3) as executor:
        records = study(tmp_path / "study.db", "tpe").run(30, executor)
    assert [r.number for r in records] == list(range(30))
    evaluated = [r.key for r in records if not r.reused]
    assert len(evaluated) == len(set(evaluated)) > 15
    assert all(r.result == fakes.toy(r.arch) for r in records)


# ---- constraints, limits, first architectures -------------------------------------------------------------------


def test_proposals_that_violate_a_constraint_are_asked_again(tmp_path: Path) -> None:
    space = fakes.chain()
    space.constrain("narrow_start", lambda arch: arch["width0"] < 16)
    for sampler in ("random", "nsga2", "tpe"):
        records = run(study(tmp_path / f"{sampler}.db", sampler, space=space), 25)
        assert len(records) == 25 and all(r.state == "scored" and r.arch["width0"] < 16 for r in records)
        assert study(tmp_path / f"{sampler}.db", sampler, space=space).records == records


def test_a_constraint_that_no_proposal_meets_is_met_by_drawing(tmp_path: Path) -> None:
    class Stubborn(RandomSampler):
        """Always proposes the widest."""

        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            return (
                distribution.high
                if name.startswith("width")
                else super().sample_independent(study, trial, name, distribution)
            )

    space = fakes.chain()
    space.constrain("narrow_start", lambda arch: arch["width0"] < 16)
    records = run(study(tmp_path / "study.db", lambda seed: Stubborn(seed=seed), space=space), 5)
    assert all(r.arch["width0"] < 16 for r in records)


def test_an_impossible_constraint_ends_in_its_name(tmp_path: Path) -> None:
    space = fakes.chain()
    space.constrain("wishful", lambda arch: False)
    with pytest.raises(SpaceError, match="wishful"):
        run(study(tmp_path / "study.db", space=space), 3)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_samplers_learn_a_limit(sampler: str, tmp_path: Path) -> None:
    def within(limits: dict[str, float]) -> int:
        made = study(tmp_path / f"{len(limits)}.db", sampler, seed=1, limits=limits)
        return sum(r.values["size"] <= 12.0 for r in run(made, 60)[20:])

    objectives = fakes.OBJECTIVES
    try:
        fakes.OBJECTIVES = [("good", "maximize")]  # alone, it pulls to large sizes
        assert within({"size": 12.0}) > within({}) + 5
    finally:
        fakes.OBJECTIVES = objectives


def test_a_limit_on_what_is_not_measured_is_said(tmp_path: Path) -> None:
    with pytest.raises(NasgraphError, match="does not measure 'params', only good, size"):
        run(study(tmp_path / "study.db", limits={"params": 1.0}), 1)


def test_first_architectures_come_first_and_are_told(tmp_path: Path) -> None:
    space = fakes.chain()
    first = [space.sample(random.Random(i)) for i in range(4)]
    whole = run(study(tmp_path / "whole.db", "nsga2"), 25, first=first)
    assert [r.arch for r in whole[:4]] == first
    assert optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'whole.db'}").trials[0].params
    run(study(tmp_path / "parts.db", "nsga2"), 2, first=first)
    parts = run(study(tmp_path / "parts.db", "nsga2"), 25)  # it remembers which come first
    assert found(parts) == found(whole)
    with pytest.raises(ConfigError, match="started with other first architectures"):
        run(study(tmp_path / "parts.db", "nsga2"), 25, first=first[:2])


def test_a_first_architecture_that_violates_a_constraint_is_recorded_not_evaluated(tmp_path: Path) -> None:
    space = fakes.chain()
    space.constrain("narrow_start", lambda arch: arch["width0"] < 16)
    wide = Architecture({"depth": "1", "width0": 32, "act0": "elu"})
    seen: list[Any] = []

    def evaluate(arch: Mapping[str, Any]) -> Result:
        seen.append(dict(arch))
        return fakes.toy(arch)

    records = run(study(tmp_path / "study.db", space=space), 3, evaluate, first=[wide])
    assert (records[0].reason, records[0].detail) == ("constraint", "violates 'narrow_start'")
    assert len(records) == 3 and len(seen) == 2 and dict(wide) not in seen


# ---- what goes wrong --------------------------------------------------------------------------------------------


def test_a_search_whose_candidates_fail_stops_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(SearchStopped, match="5 of 5 evaluated .* 'error': ValueError: no such luck") as stopped:
        run(study(tmp_path / "study.db"), 50, fakes.always_failing)
    assert "\n" not in str(stopped.value)
    assert len(study(tmp_path / "study.db").records) == 5
    assert len(run(study(tmp_path / "study.db"), 20)) == 20  # once the cause is mended it goes on


def test_non_finite_values_never_enter(tmp_path: Path) -> None:
    def evaluate(arch: Mapping[str, Any]) -> Any:
        return {"good": float("inf") if arch["depth"] == "1" else 1.0, "size": 1.0}

    records = run(study(tmp_path / "study.db"), 12, evaluate)
    assert {r.reason for r in records if r.arch["depth"] == "1"} == {"not_finite"}
    assert {r.reason for r in records if r.arch["depth"] != "1"} == {None}


def test_another_process_is_kept_out_until_it_ends(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=fakes.hold, args=(str(tmp_path / "study.db"), theirs))
    child.start()
    try:
        assert ours.poll(60) and ours.recv() == "running"
        made = study(tmp_path / "study.db")  # reading is allowed
        with pytest.raises(ConfigError, match="another process is running this search"):
            run(made, 3)
        run(study(tmp_path / "study.db", name="other"), 2)
    finally:
        child.kill()
        child.join()
    assert len(run(made, 3)) == 3


def test_a_changed_search_is_refused(tmp_path: Path) -> None:
    run(study(tmp_path / "study.db"), 2)
    shallow = fakes.chain(depth=2)
    for changes, message in [
        ({"seed": 4}, "started with seed 3, not 4"),
        ({"sampler": "tpe"}, "started with sampler random, not tpe"),
        ({"sampler": partial(make_sampler, "tpe", n_startup_trials=3)}, "with sampler random, not make_sampler"),
        ({"limits": {"size": 3.0}}, "started with limits"),
        ({"space": shallow}, "started with another search space"),
    ]:
        with pytest.raises(ConfigError, match=message):
            study(tmp_path / "study.db", **changes)


def test_bad_arguments_cost_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="direction 'up'"):
        Study(tmp_path / "study.db", "a", fakes.chain(), [("good", "up")], "random")  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="unknown sampler"):
        study(tmp_path / "study.db", "nsga3000")
    with pytest.raises(ConfigError, match="study name"):
        study(tmp_path / "study.db", name="a/b")
    assert not (tmp_path / "study.db").exists()


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    made = study(path)
    run(made, 8)
    whole = path.read_bytes()
    assert not (tmp_path / "study.db-wal").exists()  # the file alone is the study

    path.write_bytes(b"not a database at all, but long enough to look like one" * 100)
    with pytest.raises(DamagedFile, match=r"study\.db is damaged .*mv .*study\.db"):
        study(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedFile, match=r"study\.db"):
        study(path)
    path.write_bytes(b"")  # an empty file is a new study
    assert study(path).records == []
    path.unlink()

    def with_flipped_bit(place: int, bit: int) -> list[Any]:
        for leftover in tmp_path.glob("study.db*"):
            leftover.unlink()
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        return found(study(path).records)

    rng, truth = random.Random(0), found(made.records)
    for record in made.records:  # inside a trial
        with pytest.raises(DamagedFile, match=r"study\.db: trial \d+ of study 'search' is not what was written"):
            with_flipped_bit(whole.index(record.key.encode()) + rng.randrange(3, 30), rng.randrange(3))
    for _ in range(20):  # anywhere: refused, or it hit free space, or a whole trial is hidden, but none is changed
        with contextlib.suppress(DamagedFile, ConfigError):
            assert all(record in truth for record in with_flipped_bit(rng.randrange(len(whole)), rng.randrange(8)))


def test_a_changed_value_is_noticed(tmp_path: Path) -> None:
    run(study(tmp_path / "study.db"), 4)
    connection = sqlite3.connect(tmp_path / "study.db")
    with connection:
        connection.execute("UPDATE trial_values SET value = value + 1e-9 WHERE trial_id = 3 AND objective = 0")
    connection.close()
    with pytest.raises(DamagedFile, match="trial 2 of study 'search' is not what was written"):
        study(tmp_path / "study.db")


def test_a_full_disk_is_said_and_loses_nothing_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "study.db"
    made = study(path)
    run(made, 3)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # Optuna waits between its attempts to write
    limit = f"PRAGMA max_page_count = {path.stat().st_size // 4096 + 8}"
    sqlalchemy.event.listen(made._engine, "checkout", lambda connection, *more: connection.execute(limit))
    with pytest.raises(NasgraphError, match=r"cannot write .*study\.db: .*full.*make room, then resume"):
        run(made, 400)
    kept = study(path).records
    assert 3 <= len(kept) < 400
    trials = len(kept) + 5
    assert found(run(study(path), trials)) == found(run(study(tmp_path / "whole.db"), trials))


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text(
        f"import signal, sys; sys.path.insert(0, {str(TESTS)!r})\n"
        "import fake_search as fakes\n"
        "from nasgraph.executors import Processes\n"
        "from nasgraph.study import Study\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a script\n"
        "    with Processes(fakes.slow_toy, workers=2) as executor:\n"
        f"        path = {str(tmp_path / 'study.db')!r}\n"
        "        study = Study(path, 'search', fakes.chain(), fakes.OBJECTIVES, 'random', 3)\n"
        "        study.run(10_000, executor, lambda record: print(record.number, flush=True))\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        told = [child.stdout.readline() for _ in range(6)]
        child.send_signal(signal.SIGINT)
        rest, errors = child.communicate(timeout=60)
    assert errors.strip().endswith("KeyboardInterrupt")
    announced = {int(line) for line in [*told, *rest.splitlines()]}
    assert {r.number for r in study(tmp_path / "study.db").records} == announced


# ---- kill -9 ----------------------------------------------------------------------------------------------------

SERVER: Any = multiprocessing.get_context("forkserver")  # children start in a moment: torch is loaded in the server
SERVER.set_forkserver_preload(["nasgraph.study", "torch", "optuna.storages", "sqlalchemy"])


def in_child(*arguments: Any, seconds: float | None = None) -> int:
    """The exit code of a search in a child process, killed after ``seconds``."""
    child = SERVER.Process(target=fakes.search, args=arguments)
    child.start()
    child.join(seconds)
    if child.is_alive():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode


def check_log(log: Path, records: list[TrialRecord]) -> None:
    """Nothing announced is missing; nothing recorded was evaluated again."""
    recorded: set[str] = set()
    announced = []
    for line in log.read_text().splitlines():
        word, *rest = line.split()
        if word == "recorded":
            announced.append((int(rest[0]), rest[1]))
            recorded.add(rest[1])
        else:
            assert rest[0] not in recorded, "a recorded network was evaluated again"
    assert len(announced) == len(set(announced))
    assert set(announced) <= {(r.number, r.key) for r in records}


MOMENTS = [
    ("evaluating", 5),
    ("evaluated", 5),
    ("recorded", 5),
    *[("statement", count) for count in (200, 207, 218, 225)],
    ("commit", 8),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What uninterrupted searches find."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        sampler: found(
            run(study(folder / f"{sampler}.db", sampler, limits={"size": 90.0}), trials, fakes.failing_seldom)
        )
        for sampler, trials in TRIALS.items()
    }


TRIALS = {"random": 20, "tpe": 20, "nsga2": 24, "gp": 13}


@pytest.mark.skipif(sys.platform == "win32", reason="no kill -9")
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: "-".join(map(str, moment)))
def test_killed_at_any_moment_it_resumes_to_the_same_end(
    moment: tuple[str, int], whole: dict[str, list[Any]], tmp_path: Path
) -> None:
    path, log = tmp_path / "study.db", tmp_path / "log"
    arguments = (str(path), "nsga2", TRIALS["nsga2"], str(log))
    assert in_child(*arguments, moment) == -signal.SIGKILL
    shutil.copy(path, tmp_path / "copy.db")
    states = sqlite3.connect(path).execute("SELECT DISTINCT state FROM trials").fetchall()
    assert {state for (state,) in states} <= {"COMPLETE", "FAIL"}
    assert in_child(*arguments) == 0
    records = study(path, "nsga2", limits={"size": 90.0}).records
    assert found(records) == whole["nsga2"]
    check_log(log, records)


def random_kills(sampler: str, rng: random.Random, folder: Path) -> list[TrialRecord]:
    """A search killed at three random times, then left to end."""
    arguments = (str(folder / "study.db"), sampler, TRIALS[sampler], str(folder / "log"))
    for _ in range(3):
        in_child(*arguments, seconds=rng.uniform(0.2, 2.5))
    assert in_child(*arguments) == 0
    records = study(folder / "study.db", sampler, limits={"size": 90.0}).records
    check_log(folder / "log", records)
    return records


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp"])
def test_killed_at_random_it_resumes_to_the_same_end(sampler: str, whole: dict[str, list[Any]], tmp_path: Path) -> None:
    assert found(random_kills(sampler, random.Random(sampler), tmp_path)) == whole[sampler]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_random_twenty_times(seed: int, whole: dict[str, list[Any]], tmp_path: Path) -> None:
    sampler = list(TRIALS)[seed % 4]
    assert found(random_kills(sampler, random.Random(seed), tmp_path)) == whole[sampler]


def test_the_same_search_in_another_process_with_another_hash_seed(tmp_path: Path) -> None:
    found_by: list[str] = []
    for hash_seed in ("1", "2"):
        path = tmp_path / f"{hash_seed}.db"
        code = (
            f"import sys; sys.path.insert(0, {str(TESTS)!r}); import fake_search as f; "
            f"f.search({str(path)!r}, 'nsga2', 20, {str(tmp_path / 'log')!r})"
        )
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})
        found_by.append(json.dumps([dict(r.arch) for r in study(path, "nsga2", limits={"size": 90.0}).records]))
    assert found_by[0] == found_by[1]


def test_a_fresh_sampler_meets_each_trial(tmp_path: Path) -> None:
    made: list[int] = []

    def make(seed: int) -> BaseSampler:
        made.append(seed)
        return RandomSampler(seed=seed)

    records = run(study(tmp_path / "study.db", make), 10)
    assert len(set(made[1:])) == len(made) - 1 >= 10  # one for the check at the start, then one per proposal
    assert len({r.key for r in records}) == 10


class OneObjectiveOnly(RandomSampler):
    def sample_independent(self, *arguments: Any, **more: Any) -> Any:
        raise ValueError("this sampler knows one objective only")


def test_what_a_sampler_cannot_search_is_said_in_one_line(tmp_path: Path) -> None:
    study = Study(tmp_path / "study.db", "s", fakes.chain(), fakes.OBJECTIVES, lambda seed: OneObjectiveOnly(seed))
    said = "OneObjectiveOnly cannot search this: this sampler knows one objective only"
    with InProcess(fakes.toy) as executor, pytest.raises(ConfigError, match=said):
        study.run(3, executor)
