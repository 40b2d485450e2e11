"""Tier 1: score thousands of candidates cheaply, keep the best few for the study.

A pure map over indices: candidate *i* depends on (seed, *i*) only. Results lie in a plain SQLite table, one row per
candidate with its own checksum, so an interrupted screen computes what is missing and nothing twice.
"""

from __future__ import annotations

import json
import random
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from nasgraph import database
from nasgraph.errors import ConfigError, DamagedFile, did_you_mean
from nasgraph.executors import Executor, FailureWatch
from nasgraph.objectives.base import Failed, Result, Scored
from nasgraph.pareto import Direction, pareto_front
from nasgraph.space import Architecture, SearchSpace

_COLUMNS = "number, key, arch, scores, reason, detail, seconds, info, checksum"


@dataclass(frozen=True)
class ScreenRow:
    """One candidate. ``values`` is empty and ``reason`` set when scoring it failed; ``seconds`` is wall clock."""

    index: int
    key: str
    arch: Architecture
    values: dict[str, float]
    reason: str | None
    detail: str | None
    seconds: float
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def result(self) -> Result:
        return Scored(self.values, self.info) if self.reason is None else Failed(self.reason, self.detail or "")


class ScreenTable:
    """The rows of a screen in a SQLite file. Use it as a context manager, or call :meth:`close`.

    Raises: DamagedFile: the file is not what was written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        database.check(self.path, self._remedy)
        with database.writing(self.path):
            self._connection = database.connect(self.path)
            self._connection.execute("CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT)")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS candidates (number INTEGER PRIMARY KEY, key TEXT, arch TEXT, scores TEXT, "
                "reason TEXT, detail TEXT, seconds REAL, info TEXT, checksum TEXT)"
            )
            self._connection.commit()

    @property
    def _remedy(self) -> str:
        return f"Restore it from a copy, or delete it to screen anew (rm {self.path})"

    def __enter__(self) -> ScreenTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def bind(self, space: SearchSpace, seed: int) -> None:
        """Tie the table to what its rows depend on. Raises: ConfigError: it is tied to another space or seed."""
        for name, value in (("space", space.fingerprint()), ("seed", str(seed))):
            with database.writing(self.path), self._connection:
                self._connection.execute("INSERT OR IGNORE INTO settings VALUES (?, ?)", (name, value))
            found = self._connection.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()[0]
            if found != value:
                what = "another search space" if name == "space" else f"seed {found}, not {value}"
                raise ConfigError(f"{self.path} was screened with {what}. Start a new run for this, or delete the file")

    def add(self, row: ScreenRow) -> None:
        """Record a candidate: one commit. Raises: NasgraphError: the file cannot be written."""
        plain = _plain(row)
        with database.writing(self.path), self._connection:
            self._connection.execute(
                f"INSERT INTO candidates ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*plain, database.digest(plain)),
            )

    def rows(self) -> list[ScreenRow]:
        """All rows by index. Raises: DamagedFile: names the row whose checksum is wrong."""
        try:
            found = self._connection.execute(f"SELECT {_COLUMNS} FROM candidates ORDER BY number").fetchall()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise DamagedFile(f"{self.path} is damaged ({error}). {self._remedy}") from error
        return [self._row(*columns) for columns in found]

    def _row(self, *columns: Any) -> ScreenRow:
        *plain, checksum = columns
        try:
            if database.digest(plain) != checksum:
                raise ValueError("checksum")
            index, key, arch, scores, reason, detail, seconds, info = plain
            values, extra = json.loads(scores), json.loads(info)
            return ScreenRow(index, key, Architecture.from_json(arch), values, reason, detail, seconds, extra)
        except (ValueError, TypeError) as error:
            raise DamagedFile(f"{self.path}: candidate {columns[0]} is not what was written. {self._remedy}") from error


def _plain(row: ScreenRow) -> list[Any]:
    """The row's columns, without the checksum."""
    scores, info = json.dumps(row.values, sort_keys=True), json.dumps(row.info, sort_keys=True, default=str)
    return [row.index, row.key, row.arch.to_json(), scores, row.reason, row.detail, row.seconds, info]


def candidate(space: SearchSpace, seed: int, index: int) -> Architecture:
    """Candidate ``index``: ``space.sample`` with a generator seeded by (``seed``, ``index``)."""
    return space.sample(random.Random(database.derive_seed(seed, index)))


def screen(
    space: SearchSpace,
    table: ScreenTable,
    candidates: int,
    seed: int,
    executor: Executor,
    on_row: Callable[[ScreenRow], None] | None = None,
) -> list[ScreenRow]:
    """Score candidates ``0 .. candidates - 1``; only those that the table lacks are computed.

    Args:
        space: what candidates are drawn from, see :func:`candidate`.
        table: where rows are kept. A network that was scored before takes its row's values.
        candidates: how many in all.
        seed: of the candidates.
        executor: where architectures (mappings of choice to label) are scored, to ``Scored``, ``Failed`` or a dict of
            finite floats; an entered context manager.
        on_row: called with each new row once it is recorded.

    Returns: all rows of the table, by index.

    Raises:
        SearchStopped: more than half of at least 5 scored candidates failed.
        ConfigError: the table belongs to another space or seed, or another process is filling it.
        DamagedFile: the table is not what was written.
    """
    held = f"another process is screening into {table.path}: wait for it or stop it"
    with database.lock(table.path.with_name(table.path.name + ".lock"), held):
        table.bind(space, seed)
        rows = table.rows()
        known = {row.key: row.result for row in reversed(rows)}
        present = {row.index for row in rows}
        todo = deque(index for index in range(candidates) if index not in present)
        flying: dict[int, tuple[str, Architecture, float]] = {}
        same: dict[str, list[tuple[int, Architecture]]] = {}  # candidates that wait for the score of their network
        watch = FailureWatch()

        def record(index: int, key: str, arch: Architecture, result: Result, seconds: float) -> None:
            if isinstance(result, Scored):
                values = {name: float(value) for name, value in result.values.items()}
                row = ScreenRow(index, key, arch, values, None, None, seconds, dict(result.info))
            else:
                row = ScreenRow(index, key, arch, {}, result.reason, result.detail, seconds)
            table.add(row)
            rows.append(row)
            if on_row:
                on_row(row)

        def arrived(results: Iterable[tuple[int, Result]]) -> None:
            results = list(results)
            for index, result in results:
                key, arch, started = flying.pop(index)
                known[key] = result
                record(index, key, arch, result, time.monotonic() - started)
                for twin, its_arch in same.pop(key):
                    record(twin, key, its_arch, result, 0.0)
            for _, result in results:
                watch.add(result)

        try:
            while todo or flying:
                while todo and len(flying) < executor.slots:
                    index = todo.popleft()
                    arch = candidate(space, seed, index)
                    key = space.key(arch)
                    if key in known:
                        record(index, key, arch, known[key], 0.0)
                    elif key in same:
                        same[key].append((index, arch))
                    else:
                        flying[index], same[key] = (key, arch, time.monotonic()), []
                        executor.submit(index, dict(arch))
                if flying:
                    arrived(executor.wait())
        except KeyboardInterrupt:
            arrived(pair for pair in executor.wait(timeout=0) if pair[0] in flying)
            raise
        return sorted(rows, key=lambda row: row.index)


def survivors(
    rows: Sequence[ScreenRow],
    rank_by: Sequence[str],
    directions: Sequence[Direction],
    keep: int,
    costs: Sequence[str] = (),
) -> list[ScreenRow]:
    """The ``keep`` best rows by the sum of log ranks, best first, one per network.

    ``costs`` are columns that the screen measured exactly and that the study minimises too. With them, the survivors
    are the first Pareto fronts of (sum of log ranks, costs), each spread evenly if not all of it fits: the best score
    at every size, not the best scores alone, which are large networks (``results/benchmarks/survivors.md``).

    For n networks and each column, the worst has rank 1, the best rank n, equal values share their mean rank; the score
    is the sum over the columns of log(rank / n) (AZ-NAS, Lee & Ham, CVPR 2024). It asks a survivor to be bad in
    no column. Ties go to the lower index. Rows that failed do not take part.

    Raises: ConfigError: nothing to rank by, or a column that a row does not have.
    """
    if not rank_by or len(rank_by) != len(directions):
        raise ConfigError("rank_by needs at least one column, and one direction for each")
    networks: dict[str, ScreenRow] = {}
    for row in sorted(rows, key=lambda row: row.index):
        if row.reason is None:
            networks.setdefault(row.key, row)
    found = list(networks.values())
    total = np.zeros(len(found))
    for name, direction in zip(rank_by, directions, strict=True):
        if direction not in ("maximize", "minimize"):
            raise ConfigError(f"rank_by {name}: direction '{direction}' is not maximize or minimize")
        for row in found:
            if name not in row.values:
                raise ConfigError(
                    f"candidate {row.index} has no column '{name}'.{did_you_mean(name, row.values)} "
                    f"Columns: {', '.join(row.values)}"
                )
        column = np.array([row.values[name] for row in found])
        total += np.log(_ranks(column if direction == "maximize" else -column) / max(len(found), 1))
    order = [int(position) for position in np.argsort(-total, kind="stable")]
    if costs:
        order = _by_front(
            order, np.column_stack([total, *([row.values[name] for row in found] for name in costs)]), keep
        )
    return [found[position] for position in order[:keep]]


def _by_front(order: list[int], values: np.ndarray[Any, np.dtype[np.float64]], keep: int) -> list[int]:
    """``keep`` positions, front after front: column 0 of ``values`` is maximised, the others are minimised."""
    directions: list[Direction] = ["maximize"]
    directions += ["minimize" for _ in range(values.shape[1] - 1)]
    kept: list[int] = []
    while order and len(kept) < keep:
        front = {order[i] for i in np.flatnonzero(pareto_front(values[order], directions))}
        members = [position for position in order if position in front]
        room = min(keep - len(kept), len(members))
        kept += [members[round(i * (len(members) - 1) / max(1, room - 1))] for i in range(room)]
        order = [position for position in order if position not in front]
    return kept


def _ranks(column: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Ranks from 1 for the smallest; equal values share their mean rank."""
    ordered = np.sort(column)
    below = np.searchsorted(ordered, column, side="left")
    up_to = np.searchsorted(ordered, column, side="right")
    return (below + up_to + 1) / 2
