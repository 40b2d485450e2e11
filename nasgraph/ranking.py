"""Is a supernet's ranking right? Its scores against stand-alone training or a table, beside sizes and proxies.

``docs/ranking.md`` shows how to read a report.
"""

from __future__ import annotations

import csv
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nasgraph import registry
from nasgraph.build import build
from nasgraph.errors import ConfigError, NotFinite
from nasgraph.readable import duration
from nasgraph.space import TRIES, Architecture, Label, SearchSpace
from nasgraph.statistics import bootstrap_interval, partial_spearman, spearman
from nasgraph.training.loop import TrainSettings

if TYPE_CHECKING:
    from nasgraph.supernet import Supernet
    from nasgraph.tasks.base import Task
    from nasgraph.training.fewshot import FewShot

Array = NDArray[np.float64]
Truth = Callable[[Architecture], float]
SIZES = ("params", "flops", "live_params")  # always there: what a score has to beat
TOP = (1, 5, 10)
RESAMPLES = 1000


@dataclass(frozen=True)
class Ranked:
    """How one score orders the architectures that it could score.

    Attributes:
        kind: ``supernet``, ``size`` or ``proxy``.
        n: architectures that have this score.
        spearman, kendall: rank correlations with the truth (Kendall's tau-b); NaN: not defined. 95 % bootstrap
            intervals over architectures beside them.
        partial: Spearman's correlation with the number of parameters held fixed.
        top: for each k the share of the k truly best that are among the k best by this score. Where ties make it
            undecided who belongs to the k best, the expectation over a fair draw among the tied. Chance gives k / n.
        pick: truth of the architecture that this score likes best; the mean over those that tie.
        seconds: wall-clock to score the ``n`` architectures.
    """

    name: str
    kind: str
    n: int
    spearman: float
    spearman_interval: tuple[float, float]
    kendall: float
    kendall_interval: tuple[float, float]
    partial: float
    partial_interval: tuple[float, float]
    top: dict[int, float]
    pick: float
    seconds: float


@dataclass(frozen=True)
class RankReport:
    """Scores of ``architectures`` against ``truth``.

    Attributes:
        truth: of each architecture.
        scores: by name, of each architecture; None where a score could not be given.
        rows: the supernet's scores first, then sizes, then proxies.
        truth_seconds: wall-clock of all calls of ``truth``; next to nothing for a table.
        training_seconds: wall-clock of training the supernet; None: not known.
        failed: architectures that were left out because their truth failed, with the reason.
    """

    architectures: tuple[Architecture, ...]
    truth: tuple[float, ...]
    scores: dict[str, tuple[float | None, ...]]
    rows: tuple[Ranked, ...]
    truth_seconds: float
    training_seconds: float | None
    failed: tuple[str, ...] = ()

    def row(self, name: str) -> Ranked:
        """The row of a score. Raises: KeyError: there is none."""
        return {row.name: row for row in self.rows}[name]

    @property
    def best_proxy(self) -> Ranked | None:
        """The proxy with the highest Spearman correlation: the best in hindsight, since the truth chooses it."""
        return max(
            (row for row in self.rows if row.kind == "proxy" and not math.isnan(row.spearman)),
            key=lambda row: row.spearman,
            default=None,
        )

    def trainings(self, name: str) -> int | None:
        """How many of the truths fit into the wall-clock of a score, the supernet's training included.

        None: the time of the supernet's training is not known, or the truth costs nothing.
        """
        spent = self._spent(self.row(name))
        each = self.truth_seconds / len(self.truth) if self.truth else 0.0
        return None if spent is None or each < 1e-3 else int(spent / each)

    def best_of(self, n: int) -> float:
        """Expected best truth among ``n`` different architectures drawn from these: what ``n`` trainings would find."""
        values = sorted(self.truth)
        n = min(n, len(values))
        if n < 1:
            return math.nan
        every = math.comb(len(values), n)
        return sum(value * math.comb(i, n - 1) for i, value in enumerate(values)) / every

    def _spent(self, row: Ranked) -> float | None:
        if row.kind != "supernet":
            return row.seconds
        return None if self.training_seconds is None else row.seconds + self.training_seconds

    def __str__(self) -> str:
        tops = sorted({k for row in self.rows for k in row.top})
        head = ["score", "n", "Spearman", "Kendall", "given params", *(f"top {k}" for k in tops), "its pick", "seconds"]
        table = [head]
        for row in self.rows:
            correlations = [
                _estimate(row.spearman, row.spearman_interval),
                _estimate(row.kendall, row.kendall_interval),
                _estimate(row.partial, row.partial_interval),
            ]
            shares = [f"{row.top[k]:.2f}" if k in row.top else "-" for k in tops]
            cells = [row.name, str(row.n), *correlations, *shares, f"{row.pick:.4f}", f"{row.seconds:.1f}"]
            table.append(cells)
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        return "\n".join([line.rstrip() for line in (*lines, *self._notes())])

    def _notes(self) -> list[str]:
        n = len(self.truth)
        notes = [f"{n} architectures; best truth {max(self.truth):.4f}, mean {sum(self.truth) / n:.4f}."]
        best = self.best_proxy
        if best is not None:
            notes.append(f"Best proxy in hindsight: {best.name}. Without the truth nobody knows which it is.")
        trained = "not known" if self.training_seconds is None else duration(self.training_seconds)
        notes.append(f"Supernet's training: {trained}. Truth: {duration(self.truth_seconds)} for {n}.")
        for row in self.rows:
            if row.kind == "supernet" and (fit := self.trainings(row.name)) is not None:
                notes.append(
                    f"In the wall-clock of {row.name} (training included) {fit} architectures train alone: the best of "
                    f"so many is {self.best_of(fit):.4f} here; its pick is {row.pick:.4f}."
                )
        if self.failed:
            notes.append(f"Left out: {len(self.failed)} without a truth, e.g. {self.failed[0]}.")
        return notes

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write rows and times; what is not defined is ``null``."""
        about = {
            "n": len(self.truth),
            "truth_seconds": self.truth_seconds,
            "training_seconds": self.training_seconds,
            "best_proxy_in_hindsight": self.best_proxy.name if self.best_proxy else None,
            "trainings_in_the_same_time": {row.name: self.trainings(row.name) for row in self.rows},
            "failed": list(self.failed),
            "rows": [asdict(row) for row in self.rows],
        }
        target = Path(path)
        target.write_text(json.dumps(_plain(about), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return target

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write a line per architecture: the truth, every score (empty: none), the architecture as JSON."""
        target = Path(path)
        with target.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["truth", *self.scores, "architecture"])
            for i, architecture in enumerate(self.architectures):
                scores = ["" if (score := column[i]) is None else repr(score) for column in self.scores.values()]
                writer.writerow([repr(self.truth[i]), *scores, architecture.to_json()])
        return target


def rank_report(
    supernet: Supernet | FewShot,
    truth: Truth,
    architectures: Iterable[Mapping[str, Label]] | None = None,
    n: int = 100,
    seed: int = 0,
    *,
    proxies: Sequence[str | Callable[..., float]] = ("ntk_cond",),
    scores: Sequence[str] = ("accuracy",),
    extra: Mapping[str, Callable[[Architecture], float]] | None = None,
    top: Sequence[int] = TOP,
    samples: int = 2048,
    proxy_samples: int = 32,
    training_seconds: float | None = None,
    on_architecture: Callable[[int, int], None] | None = None,
) -> RankReport:
    """Hold a supernet's scores, sizes and training-free proxies against the truth.

    Args:
        truth: e.g. validation accuracy after training alone (:func:`stand_alone`), or the value of a table; larger is
            better. :class:`NotFinite` from it leaves the architecture out.
        architectures: which; default: ``n`` different networks drawn from ``seed``. Of two that are the same network
            the second is left out.
        proxies: names or functions ``(model, batch) -> float``. Sizes always stand beside them.
        scores: of the supernet: ``accuracy`` (:meth:`Supernet.evaluate`), ``loss`` (minus the validation loss, which
            ties less often), ``readout`` (accuracy with the last linear layer refitted, see
            :mod:`nasgraph.supernet.readout`), ``flatness`` (see :mod:`nasgraph.supernet.flatness`).
        extra: further scores by name, each a function of an architecture; counted as the supernet's.
        top: numbers k of the top-k overlaps; those of at least the number of architectures are left out.
        samples: training samples for statistics of BatchNorm.
        proxy_samples: training samples that a proxy sees.
        training_seconds: how long the supernet was trained, if known.
        on_architecture: called after each architecture with how many are done and how many there are.

    Raises: ConfigError: unknown proxy or score, or fewer than 3 architectures that have a truth.
    """
    chosen = distinct(supernet.space, architectures) if architectures is not None else _random(supernet.space, n, seed)
    columns = {
        **{name: ("supernet", _supernet_score(supernet, name, samples)) for name in scores},
        **{name: ("supernet", function) for name, function in (extra or {}).items()},
        **{name: ("size", _proxy_score(supernet, name, proxy_samples, seed)) for name in SIZES},
        **{_name(proxy): ("proxy", _proxy_score(supernet, proxy, proxy_samples, seed)) for proxy in proxies
           if _name(proxy) not in SIZES},
    }  # fmt: skip
    kept: list[Architecture] = []
    true: list[float] = []
    failed: list[str] = []
    found: dict[str, list[float | None]] = {name: [] for name in columns}
    seconds = dict.fromkeys(columns, 0.0)
    truth_seconds = 0.0
    for done, architecture in enumerate(chosen, 1):
        start = time.perf_counter()
        try:
            value = float(truth(architecture))
            if not math.isfinite(value):
                raise NotFinite(f"it is {value}")
        except NotFinite as error:
            failed.append(f"{architecture.to_json()}: {error}")
            continue
        finally:
            truth_seconds += time.perf_counter() - start
        kept.append(architecture)
        true.append(value)
        for name, (_, score) in columns.items():
            start = time.perf_counter()
            found[name].append(_scored(score, architecture))
            seconds[name] += time.perf_counter() - start
        if on_architecture is not None:
            on_architecture(done, len(chosen))
    if len(true) < 3:
        raise ConfigError(f"{len(true)} architectures have a truth: a ranking needs at least 3")
    rows = tuple(
        ranked(name, kind, found[name], true, found["params"], seconds[name], top)
        for name, (kind, _) in columns.items()
    )
    scored = {name: tuple(values) for name, values in found.items()}
    return RankReport(tuple(kept), tuple(true), scored, rows, truth_seconds, training_seconds, tuple(failed))


def ranked(
    name: str,
    kind: str,
    scores: Sequence[float | None],
    truth: Sequence[float],
    params: Sequence[float | None],
    seconds: float = 0.0,
    top: Sequence[int] = TOP,
) -> Ranked:
    """The row of one score: ``scores``, ``truth`` and ``params`` are ``(n,)``, None where there is none."""
    pairs = [(s, t) for s, t in zip(scores, truth, strict=True) if s is not None]
    x, y = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    triples = [(s, t, p) for s, t, p in zip(scores, truth, params, strict=True) if s is not None and p is not None]
    a, b, c = np.array(triples, dtype=np.float64).reshape(-1, 3).T
    sized = name != "params" and len(a) > 3
    none = (math.nan, math.nan)
    return Ranked(
        name=name,
        kind=kind,
        n=len(x),
        spearman=spearman(x, y),
        spearman_interval=bootstrap_interval(x, y, resamples=RESAMPLES),
        kendall=kendall(x, y),
        kendall_interval=_kendall_interval(x, y),
        partial=partial_spearman(a, b, c) if sized else math.nan,
        partial_interval=bootstrap_interval(a, b, c, resamples=RESAMPLES) if sized else none,
        top={k: top_overlap(x, y, k) for k in sorted(set(top)) if 0 < k < len(x)},
        pick=float(y[x == x.max()].mean()) if len(x) else math.nan,
        seconds=seconds,
    )


def kendall(x: ArrayLike, y: ArrayLike) -> float:
    """Kendall's tau-b of ``x`` ``(n,)`` and ``y`` ``(n,)``, NaN where it is not defined."""
    from scipy.stats import kendalltau

    x, y = np.asarray(x), np.asarray(y)
    if len(x) < 3 or len(np.unique(x)) < 2 or len(np.unique(y)) < 2:
        return math.nan
    return float(kendalltau(x, y).statistic)


def top_overlap(scores: ArrayLike, truth: ArrayLike, k: int) -> float:
    """Share of the ``k`` largest by ``truth`` that are among the ``k`` largest by ``scores``, both ``(n,)``.

    Where values tie at the border, the expectation over a fair draw among the tied, made for each side on its own.
    """
    return float((_membership(scores, k) * _membership(truth, k)).sum() / k)


def _membership(values: ArrayLike, k: int) -> Array:
    """How likely each is among the ``k`` largest."""
    column = np.asarray(values, dtype=np.float64)
    border = np.sort(column)[-k]
    above, at = column > border, column == border
    inside: Array = above + at * (k - above.sum()) / at.sum()
    return inside


def _kendall_interval(x: Array, y: Array, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap of Kendall's tau-b, rows drawn together. Memory: three ``(n, n)`` matrices."""
    n = len(x)
    if n < 3:
        return math.nan, math.nan
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)
    in_x, in_y = (np.sign(column[:, None] - column[None, :]) for column in (x, y))

    def pairs(signs: Array) -> Array:
        """Sum over the ordered pairs of rows in each resample, ``(RESAMPLES,)``."""
        total: Array = ((counts @ signs) * counts).sum(axis=1)
        return total

    spread = np.sqrt(pairs(np.abs(in_x)) * pairs(np.abs(in_y)))
    found = (pairs(in_x * in_y) / np.where(spread > 0, spread, 1))[spread > 0]
    if len(found) < RESAMPLES / 2:
        return math.nan, math.nan
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


# ---- truths -----------------------------------------------------------------------------------------------------


def stand_alone(
    space: SearchSpace, task: Task, settings: TrainSettings | None = None, seeds: Sequence[int] = (0,)
) -> Truth:
    """A truth: validation accuracy (a fraction) after training an architecture alone, mean over ``seeds``."""
    chosen = settings or TrainSettings()

    def truth(architecture: Architecture) -> float:
        device = task.inputs[0].device
        fits = [task.fit(build(space, architecture, seed).to(device), chosen, seed) for seed in seeds]
        return sum(fit.val for fit in fits) / len(fits)

    return truth


def distinct(space: SearchSpace, architectures: Iterable[Mapping[str, Label]]) -> list[Architecture]:
    """The first of each network. Raises: SpaceError: one is not of the space."""
    found: dict[str, Architecture] = {}
    for labels in architectures:
        architecture = space.architecture(labels)
        found.setdefault(space.key(architecture), architecture)
    return list(found.values())


def _random(space: SearchSpace, n: int, seed: int) -> list[Architecture]:
    """``n`` different networks, or as many as are found before ``TRIES`` draws in a row bring none."""
    rng, found, idle = random.Random(f"rank/{seed}"), dict[str, Architecture](), 0
    while len(found) < n and idle < TRIES:
        architecture = space.sample(rng)
        idle = idle + 1 if found.setdefault(space.key(architecture), architecture) is not architecture else 0
    return list(found.values())


# ---- scores -----------------------------------------------------------------------------------------------------


def _supernet_score(supernet: Supernet | FewShot, name: str, samples: int) -> Callable[[Architecture], float]:
    if name == "accuracy":
        return lambda architecture: supernet.evaluate([architecture], samples=samples)[0]
    if name == "loss":
        return lambda architecture: -supernet.task.score(supernet.calibrated(architecture, samples), "val")["loss"]
    if name == "flatness":
        from nasgraph.supernet.flatness import subnet_flatness

        return lambda architecture: subnet_flatness(supernet, architecture, samples=samples)
    if name == "readout":
        from nasgraph.supernet.readout import readout_accuracy

        return lambda architecture: readout_accuracy(supernet, architecture, samples)
    raise ConfigError(f"unknown score of a supernet '{name}': accuracy, loss, readout or flatness")


def _proxy_score(
    supernet: Supernet | FewShot, proxy: str | Callable[..., float], samples: int, seed: int
) -> Callable[[Architecture], float]:
    """A proxy sees a new network of the architecture, started from ``seed``: nothing of the supernet."""
    function = registry.resolve("proxies", proxy) if isinstance(proxy, str) else proxy
    batch = supernet.task.batch(samples, seed)

    def score(architecture: Architecture) -> float:
        model = build(supernet.space, architecture, seed).to(supernet.task.inputs[0].device)
        return float(function(model, batch))

    return score


def _scored(score: Callable[[Architecture], float], architecture: Architecture) -> float | None:
    try:
        value = float(score(architecture))
    except ValueError:  # NotFinite is one
        return None
    return value if math.isfinite(value) else None


def _name(proxy: str | Callable[..., float]) -> str:
    return proxy if isinstance(proxy, str) else str(getattr(proxy, "__name__", proxy))


def _estimate(value: float, interval: tuple[float, float]) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:+.2f}" + ("" if math.isnan(interval[0]) else f" [{interval[0]:+.2f}, {interval[1]:+.2f}]")


def _plain(value: Any) -> Any:
    """``value`` with NaN as None and keys as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- a run ------------------------------------------------------------------------------------------------------
