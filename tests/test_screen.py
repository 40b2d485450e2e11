"""A candidate depends on (seed, index) only; what is there is not computed again; survivors by log ranks."""

from __future__ import annotations

import math
import multiprocessing
import random
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import rankdata

TESTS = Path(__file__).parent
sys.path.append(str(TESTS))  # child processes import the fakes by name

import fake_search as fakes  # noqa: E402

from nasgraph import database  # noqa: E402
from nasgraph.errors import ConfigError, DamagedFile, NasgraphError, SearchStopped  # noqa: E402
from nasgraph.executors import InProcess, Processes  # noqa: E402
from nasgraph.objectives.base import Result, Scored  # noqa: E402
from nasgraph.screen import ScreenRow, ScreenTable, screen, survivors  # noqa: E402
from nasgraph.space import Architecture  # noqa: E402


def found(rows: list[ScreenRow]) -> list[Any]:
    """All of the rows but the wall clock."""
    return [(r.index, r.key, r.arch, r.values, r.reason, r.detail, r.info) for r in rows]


def screened(
    path: Path,
    candidates: int,
    score: Any = fakes.failing_seldom,
    seed: int = 1,
    executor: Any = InProcess,
    **more: Any,
) -> Any:
    with ScreenTable(path) as table, executor(score) as pool:
        return screen(fakes.chain(), table, candidates, seed, pool, **more)


def test_rows_are_what_was_scored(tmp_path: Path) -> None:
    rows = screened(tmp_path / "screen.db", 60)
    space = fakes.chain()
    assert [row.index for row in rows] == list(range(60))
    for row in rows:
        assert row.arch == space.sample(random.Random(database.derive_seed(1, row.index)))
        assert row.key == space.key(row.arch) and row.result == fakes.failing_seldom(row.arch)
    with ScreenTable(tmp_path / "screen.db") as table:
        assert table.rows() == rows


def test_a_candidate_depends_on_seed_and_index_only(tmp_path: Path) -> None:
    many, few = screened(tmp_path / "many.db", 60), screened(tmp_path / "few.db", 20)
    assert found(many)[:20] == found(few)
    parts = [screened(tmp_path / "parts.db", count) for count in (7, 31, 60)]
    assert found(parts[-1]) == found(many)
    spread = screened(tmp_path / "spread.db", 60, executor=partial(Processes, workers=2))
    assert found(spread) == found(many)
    assert found(screened(tmp_path / "other.db", 20, seed=2)) != found(few)


def test_each_network_is_scored_once(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    space = fakes.chain(depth=1)  # 12 architectures

    def score(arch: Mapping[str, Any]) -> Result:
        seen[space.key(arch)] += 1
        return fakes.toy(arch)

    for count in (20, 50):
        with ScreenTable(tmp_path / "screen.db") as table:
            rows = screen(space, table, count, 0, InProcess(score))
    assert set(seen.values()) == {1} and len(rows) == 50
    assert all(row.values == fakes.toy(row.arch).values for row in rows)  # type: ignore[union-attr]


def test_killed_it_resumes_with_what_is_missing(tmp_path: Path) -> None:
    seen: Counter[Architecture] = Counter()

    def score(arch: Mapping[str, Any]) -> Result:
        seen[Architecture(arch)] += 1
        return fakes.failing_seldom(arch)

    child = multiprocessing.get_context("forkserver").Process(target=fakes.screen_and_die, args=(str(tmp_path), 40))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    with ScreenTable(tmp_path / "screen.db") as table:
        before = table.rows()
    assert len({row.key for row in before}) == 39
    rows = screened(tmp_path / "screen.db", 100, score)
    assert rows[: len(before)] == before
    assert not seen.keys() & {row.arch for row in before}
    assert found(rows) == found(screened(tmp_path / "whole.db", 100))


def test_failing_scores_stop_the_screen(tmp_path: Path) -> None:
    with pytest.raises(SearchStopped, match="5 of 5 .*no such luck"):
        screened(tmp_path / "screen.db", 100, fakes.always_failing)


def test_another_space_or_seed_is_refused(tmp_path: Path) -> None:
    screened(tmp_path / "screen.db", 5)
    with pytest.raises(ConfigError, match="screened with seed 1, not 2"):
        screened(tmp_path / "screen.db", 5, seed=2)
    with ScreenTable(tmp_path / "screen.db") as table, pytest.raises(ConfigError, match="another search space"):
        screen(fakes.chain(2), table, 5, 1, InProcess(fakes.toy))


def test_a_changed_row_is_refused_by_number(tmp_path: Path) -> None:
    changes = [("scores", '{"good": 1.0}'), ("reason", "error"), ("seconds", 0.5), ("key", "k"), ("arch", "{")]
    for column, value in changes:
        path = tmp_path / f"{column}.db"
        screened(path, 5)
        connection = sqlite3.connect(path)
        with connection:
            connection.execute(f"UPDATE candidates SET {column} = ? WHERE number = 3", (value,))
        connection.close()
        with ScreenTable(path) as table, pytest.raises(DamagedFile, match=rf"{column}\.db: candidate 3 is not .*rm /"):
            table.rows()


def test_damaged_bytes_never_become_rows(tmp_path: Path) -> None:
    path = tmp_path / "screen.db"
    truth = found(screened(path, 30))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedFile, match=r"screen\.db"), ScreenTable(path) as table:
        table.rows()
    path.write_bytes(b"garbage" * 2000)
    with pytest.raises(DamagedFile, match=r"screen\.db is damaged"):
        ScreenTable(path)
    rng = random.Random(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        for leftover in tmp_path.glob("screen.db*"):
            leftover.unlink()
        path.write_bytes(damaged)
        try:
            with ScreenTable(path) as table:
                assert all(row in truth for row in found(table.rows()))
        except DamagedFile:
            refused += 1
    assert refused > 50


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with ScreenTable(tmp_path / "screen.db") as table:
        screen(fakes.chain(), table, 5, 1, InProcess(fakes.toy))
        pages = table._connection.execute("PRAGMA page_count").fetchone()[0]
        table._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(NasgraphError, match=r"cannot write .*screen\.db: .*full"):
            screen(fakes.chain(), table, 500, 1, InProcess(fakes.toy))
    assert found(screened(tmp_path / "screen.db", 60, fakes.toy)) == found(screened(tmp_path / "b.db", 60, fakes.toy))


def test_the_table_costs_less_than_a_millisecond_a_row(tmp_path: Path) -> None:
    arch = Architecture({"depth": "1"})
    with ScreenTable(tmp_path / "screen.db") as table:
        started = time.process_time()
        for i in range(500):
            table.add(ScreenRow(i, str(i), arch, {"a": 1.0}, None, None, 0.0))
        assert time.process_time() - started < 0.5


# ---- survivors --------------------------------------------------------------------------------------------------


def row(index: int, key: str | None = None, **values: float) -> ScreenRow:
    return ScreenRow(index, key or f"k{index}", Architecture({"i": index}), values, None, None, 0.0)


def test_survivors_by_hand() -> None:
    rows = [row(0, a=1, b=9), row(1, a=2, b=2), row(2, a=3, b=1)]
    # ranks of a: 1 2 3; of b, smaller is better: 1 2 3 -> all log-rank sums favour row 2
    assert [r.index for r in survivors(rows, ["a", "b"], ["maximize", "minimize"], 3)] == [2, 1, 0]
    # of b, larger is better: ranks 3 2 1: sums log 3, log 4, log 3 (minus 2 log 3): the all-rounder wins
    assert [r.index for r in survivors(rows, ["a", "b"], ["maximize", "maximize"], 3)] == [1, 0, 2]


def test_survivors_equal_the_formula_on_random_rows() -> None:
    rng = random.Random(0)
    rows = [row(i, a=rng.randrange(20), b=rng.random()) for i in range(100)]
    ranks_a, ranks_b = rankdata([r.values["a"] for r in rows]), rankdata([-r.values["b"] for r in rows])
    score = [math.log(ranks_a[i] / 100) + math.log(ranks_b[i] / 100) for i in range(100)]
    expected = sorted(range(100), key=lambda i: (-round(score[i], 9), i))[:17]
    assert [r.index for r in survivors(rows, ["a", "b"], ["maximize", "minimize"], 17)] == expected


def test_survivors_are_one_per_network_without_failures_and_stable() -> None:
    failed = ScreenRow(0, "k9", Architecture({}), {}, "error", "x", 0.0)
    rows = [row(3, "same", a=5), failed, row(1, "same", a=5), row(2, a=5), row(4, a=1)]
    assert [r.index for r in survivors(rows, ["a"], ["maximize"], 10)] == [1, 2, 4]
    assert survivors([failed], ["a"], ["maximize"], 3) == []


def test_survivors_name_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="candidate 0 has no column 'gradsing'. Did you mean 'gradsign'"):
        survivors([row(0, gradsign=1.0)], ["gradsing"], ["maximize"], 1)
    with pytest.raises(ConfigError, match="one direction for each"):
        survivors([row(0, a=1.0)], ["a"], [], 1)
    assert isinstance(row(0, a=1.0).result, Scored)


def test_survivors_with_costs_are_the_best_at_every_size() -> None:
    arch = Architecture({})
    points = [(1, 10), (2, 20), (3, 30), (4, 40), (3, 50), (1, 45), (0, 60)]  # (score, params): four fronts
    rows = [ScreenRow(i, str(i), arch, {"s": s, "params": p}, None, None, 0.0) for i, (s, p) in enumerate(points)]

    def kept(keep: int) -> list[int]:
        return [row.index for row in survivors(rows, ["s"], ["maximize"], keep, costs=["params"])]

    assert kept(4) == [3, 2, 1, 0], "the first front, best score first"
    assert kept(2) == [3, 0], "its ends, when there is room for two"
    assert sorted(kept(5)) == [0, 1, 2, 3, 4] or sorted(kept(5)) == [0, 1, 2, 3, 5]
    assert sorted(kept(7)) == list(range(7))
    assert [row.index for row in survivors(rows, ["s"], ["maximize"], 2)] == [3, 2], "without costs: the best scores"
