"""The table of NAS-Bench-Graph: what each of its designs reached when its authors trained it."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from nasgraph.errors import ConfigError, DamagedFile, DataError, NasgraphError, did_you_mean
from nasgraph.objectives import Failed, Result, Scored
from nasgraph.search_spaces.nas_bench_graph import LINKS, OPS, architecture, row
from nasgraph.space import Architecture, Label


class Table:
    """The measurements of NAS-Bench-Graph on one dataset, means over 3 seeds.

    Args:
        dataset: cora, citeseer, pubmed, computers or physics.
        path: ``nas_bench_graph_light.npz``, or a folder that holds it (itself or in ``nas_bench_graph/``); default:
            the folder that the environment variable ``NASGRAPH_DATA`` names.

    Attributes, arrays with one entry per row: ``hash``; ``perf`` and ``valid_perf``, test and validation accuracy
    (0 to 1); ``latency`` in seconds; ``para``, parameters in millions. Select by ``valid_perf`` and report ``perf``.

    Raises: DataError: no such file or dataset. DamagedFile: not a table of this benchmark.
    """

    COLUMNS = ("valid_perf", "perf", "latency", "para")

    def __init__(self, dataset: str = "cora", path: str | os.PathLike[str] | None = None) -> None:
        file = _table_file(path)
        self.dataset = dataset
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as table:
                known = sorted({name.partition("/")[0] for name in table.files if "/" in name})
                if dataset not in known:
                    hint = did_you_mean(dataset, known)
                    raise DataError(f"{file} has no dataset '{dataset}'.{hint} It has: {', '.join(known)}")
                self.hash = table["hash"].astype(np.int64)
                self._columns = {name: table[f"{dataset}/{name}"].astype(np.float64) for name in self.COLUMNS}
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, BadZipFile, zlib.error) as error:
            raise DamagedFile(f"{file} is not a table of NAS-Bench-Graph: {error}") from error
        self.valid_perf, self.perf, self.latency, self.para = self._columns.values()
        self._index = {int(number): i for i, number in enumerate(self.hash)}

    def __len__(self) -> int:
        return len(self.hash)

    def index(self, architecture: Mapping[str, Label]) -> int:
        """Where the row of an architecture stands. Raises: DataError: it has none."""
        number = row(architecture)
        if number not in self._index:
            raise DataError(f"no row {number} for {dict(architecture)} on {self.dataset}")
        return self._index[number]

    def lookup(self, architecture: Mapping[str, Label]) -> dict[str, float]:
        """``valid_perf``, ``perf``, ``latency`` (s) and ``para`` (millions). Raises: DataError: it has no row."""
        index = self.index(architecture)
        return {name: float(column[index]) for name, column in self._columns.items()}

    def architectures(self) -> list[Architecture]:
        """The architecture of each row, in the order of the rows."""
        found = []
        for number in self.hash:
            digits = f"{int(number):05}"
            found.append(architecture(LINKS[int(digits[0])], [OPS[int(digit)] for digit in digits[1:]]))
        return found


class TableEvaluator:
    """Scores architectures by looking them up: a search that costs no training.

    Args:
        dataset, path: of the :class:`Table`; it is read at first use, in each process.
        objectives: which of ``valid_perf`` (maximize), ``latency`` and ``para`` (minimize).

    ``info["perf"]`` of a result is the test accuracy: for the report, never for the search.
    """

    def __init__(
        self,
        dataset: str = "cora",
        path: str | os.PathLike[str] | None = None,
        objectives: Sequence[str] = ("valid_perf",),
    ) -> None:
        for name in objectives:
            if name not in Table.COLUMNS or name == "perf":
                raise ConfigError(f"objective '{name}' is not one of valid_perf, latency, para")
        self.dataset, self.path, self.objectives = dataset, path, tuple(objectives)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "table"}

    @cached_property
    def table(self) -> Table:
        """The table that is looked up."""
        return Table(self.dataset, self.path)

    def __call__(self, architecture: Mapping[str, Label]) -> Result:
        """The measurements of an architecture, or why there are none."""
        try:
            found = self.table.lookup(architecture)
        except NasgraphError as error:
            return Failed("error", str(error))
        return Scored({name: found[name] for name in self.objectives}, {"perf": found["perf"]})


def _table_file(path: str | os.PathLike[str] | None) -> Path:
    name = "nas_bench_graph_light.npz"
    if path is None and "NASGRAPH_DATA" not in os.environ:
        raise DataError(f"say where {name} lies, or set NASGRAPH_DATA to its folder")
    root = Path(os.environ["NASGRAPH_DATA"] if path is None else path)
    for file in (root, root / name, root / "nas_bench_graph" / name):
        if file.is_file():
            return file
    raise DataError(f"no {name} in {root}")
