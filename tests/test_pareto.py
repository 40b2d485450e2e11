from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from nasgraph.pareto import Direction, hypervolume, hypervolume_history, pareto_front, reference_point
from nasgraph.statistics import _correlation, _partial, bootstrap_interval, partial_spearman, spearman


def slow_front(values: np.ndarray, directions: list[Direction]) -> list[bool]:
    """The definition, pair by pair."""
    sign = [1 if direction == "maximize" else -1 for direction in directions]

    def dominates(a: np.ndarray, b: np.ndarray) -> bool:
        pairs = [(s * u, s * v) for s, u, v in zip(sign, a, b, strict=True)]
        return all(u >= v for u, v in pairs) and any(u > v for u, v in pairs)

    return [not any(dominates(other, row) for other in values) for row in values]


def sum_of_boxes(values: np.ndarray, directions: list[Direction], reference: np.ndarray) -> float:
    """Hypervolume by inclusion and exclusion: the union of boxes is what the boxes and their meets add up to."""
    sign = np.array([1 if direction == "maximize" else -1 for direction in directions])
    sides = np.maximum((values - reference) * sign, 0)
    total = 0.0
    for size in range(1, len(sides) + 1):
        for some in itertools.combinations(sides, size):
            total += (-1) ** (size + 1) * float(np.prod(np.min(some, axis=0)))
    return total


@st.composite
def tables(draw: st.DrawFn, max_rows: int = 12) -> tuple[np.ndarray, list[Direction]]:
    objectives = draw(st.integers(1, 4))
    # few distinct values, so that ties and equal rows are common
    numbers = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6))
    values = draw(arrays(np.float64, (draw(st.integers(0, max_rows)), objectives), elements=numbers))
    return values, draw(st.lists(st.sampled_from(["maximize", "minimize"]), min_size=objectives, max_size=objectives))


@settings(deadline=None)
@given(tables())
def test_front_is_its_definition(table: tuple[np.ndarray, list[Direction]]) -> None:
    values, directions = table
    assert pareto_front(values, directions).tolist() == slow_front(values, directions)


@settings(deadline=None)
@given(tables(), st.randoms(use_true_random=False))
def test_front_does_not_depend_on_the_order_of_rows(table: tuple[np.ndarray, list[Direction]], rng: object) -> None:
    values, directions = table
    order = list(range(len(values)))
    rng.shuffle(order)  # type: ignore[attr-defined]
    assert (pareto_front(values[order], directions) == pareto_front(values, directions)[order]).all()


def test_ties_are_all_kept() -> None:
    values = [[0.9, 10.0], [0.9, 10.0], [0.8, 10.0], [0.7, 5.0], [0.9, -0.0], [0.9, 0.0]]
    assert pareto_front(values, ["maximize", "minimize"]).tolist() == [False, False, False, False, True, True]


def test_front_of_many_rows() -> None:
    values = np.random.default_rng(0).integers(0, 40, size=(400, 3)).astype(float)
    directions: list[Direction] = ["maximize", "minimize", "minimize"]
    assert pareto_front(values, directions).tolist() == slow_front(values, directions)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_cannot_be_ordered_is_refused(bad: float) -> None:
    values, directions = [[1.0, 2.0], [3.0, bad]], ["maximize", "minimize"]
    for call in (
        lambda: pareto_front(values, directions),
        lambda: hypervolume(values, directions, [0.0, 9.0]),
        lambda: hypervolume_history(values, directions, [0.0, 9.0]),
        lambda: reference_point(values, directions),
    ):
        with pytest.raises(ValueError, match=r"values\[1, 1\]"):
            call()
    with pytest.raises(ValueError, match="reference"):
        hypervolume([[1.0, 2.0]], directions, [0.0, bad])


def test_shapes_and_directions_are_checked() -> None:
    with pytest.raises(ValueError, match=r"\(n, 2\)"):
        pareto_front([[1.0], [2.0]], ["maximize", "minimize"])
    with pytest.raises(ValueError, match="'up'"):
        pareto_front([[1.0]], ["up"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="at least one row"):
        reference_point([], ["maximize"])


def test_hypervolume_in_closed_form() -> None:
    # two rectangles against (0, 10): 0.5 x 8 and 0.9 x 2 share 0.5 x 2; the others are dominated or outside
    values = [[0.5, 2.0], [0.9, 8.0], [0.4, 9.0], [2.0, 11.0]]
    assert hypervolume(values, ["maximize", "minimize"], [0.0, 10.0]) == pytest.approx(4.0 + 1.8 - 1.0)
    # three boxes of volume 4; each two share a volume of 2, all three a unit cube
    slabs = [[2.0, 2.0, 1.0], [2.0, 1.0, 2.0], [1.0, 2.0, 2.0]]
    assert hypervolume(slabs, ["maximize"] * 3, [0.0] * 3) == pytest.approx(3 * 4 - 3 * 2 + 1)
    assert hypervolume([], ["maximize", "minimize"], [0.0, 10.0]) == 0.0
    assert hypervolume([[3.0]], ["minimize"], [10.0]) == 7.0


@settings(deadline=None)
@given(
    st.integers(1, 3).flatmap(
        lambda m: st.tuples(
            st.lists(st.lists(st.integers(-2, 6), min_size=m, max_size=m), min_size=1, max_size=6),
            st.lists(st.sampled_from(["maximize", "minimize"]), min_size=m, max_size=m),
        )
    )
)
def test_hypervolume_is_the_sum_of_boxes(table: tuple[list[list[int]], list[Direction]]) -> None:
    values, directions = np.array(table[0], dtype=float), table[1]
    reference = np.array([0.0 if direction == "maximize" else 5.0 for direction in directions])
    assert hypervolume(values, directions, reference) == pytest.approx(sum_of_boxes(values, directions, reference))
    history = hypervolume_history(values, directions, reference)
    alone = [hypervolume(values[: n + 1], directions, reference) for n in range(len(values))]
    assert history == pytest.approx(alone)
    assert (np.diff(history) >= 0).all()


def test_reference_lies_a_tenth_beyond_the_worst() -> None:
    values = [[0.5, 100.0, 0.0, 7.0], [0.9, 300.0, 0.0, 7.0]]
    found = reference_point(values, ["maximize", "minimize", "minimize", "maximize"])
    assert found == pytest.approx([0.5 - 0.04, 300 + 20, 0.1, 7 - 0.7])


@settings(deadline=None)
@given(tables())
def test_every_row_counts_against_the_reference(table: tuple[np.ndarray, list[Direction]]) -> None:
    values, directions = table
    if len(values):
        reference = reference_point(values, directions)
        sign = np.array([1 if direction == "maximize" else -1 for direction in directions])
        assert ((values - reference) * sign > 0).all()


# ---- rank correlations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 5, 40])
def test_spearman_is_that_of_scipy(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(20):
        x, y = rng.permutation(n) // 2, rng.normal(size=n) + rng.permutation(n)  # x has ties
        if len(set(x)) > 1:
            assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_partial_spearman_is_the_correlation_of_residuals() -> None:
    """The oracle: regress the ranks of x and of y on the ranks of z, correlate what is left."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        z = rng.integers(0, 10, size=30)
        x, y = z + rng.normal(size=30), 2 * z + rng.normal(size=30)
        rx, ry, rz = (stats.rankdata(column) for column in (x, y, z))
        basis = np.stack([np.ones(30), rz], axis=1)
        left = [column - basis @ np.linalg.lstsq(basis, column, rcond=None)[0] for column in (rx, ry)]
        assert partial_spearman(x, y, z) == pytest.approx(stats.pearsonr(*left).statistic, abs=1e-10)


def test_correlations_that_are_not_defined() -> None:
    assert np.isnan(spearman([1, 2], [1, 2]))
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert np.isnan(partial_spearman([1, 2, 3, 4], [4, 2, 3, 1], [10, 20, 30, 40]))  # x orders as z does
    assert np.isnan(bootstrap_interval([1, 2], [1, 2])).all()
    with pytest.raises(ValueError, match="one length"):
        spearman([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="NaN"):
        spearman([1, 2, float("nan")], [1, 2, 3])


def test_a_resample_is_ranked_like_its_rows() -> None:
    """Counting how often a row was drawn gives what writing the rows out gives."""
    rng = np.random.default_rng(1)
    x, y, z = rng.integers(0, 6, size=(3, 15)).astype(float)
    drawn = rng.integers(0, 15, size=(50, 15))
    counts = np.stack([np.bincount(rows, minlength=15) for rows in drawn]).astype(float)
    assert _correlation(x, y, counts=counts) == pytest.approx([spearman(x[r], y[r]) for r in drawn], nan_ok=True)
    slow = [partial_spearman(x[r], y[r], z[r]) for r in drawn]
    assert _partial(x, y, z, counts=counts) == pytest.approx(slow, nan_ok=True)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    # for a bivariate normal with correlation r, Spearman's is 6/pi asin(r/2) (Pearson 1907)
    rng, r, hits = np.random.default_rng(2), 0.6, 0
    for trial in range(200):
        x, noise = rng.normal(size=(2, 60))
        low, high = bootstrap_interval(x, r * x + np.sqrt(1 - r * r) * noise, seed=trial, resamples=400)
        hits += low <= 6 / np.pi * np.arcsin(r / 2) <= high
    assert 180 <= hits <= 199
    assert bootstrap_interval(x, noise, seed=3) == bootstrap_interval(x, noise, seed=3)
    low, high = bootstrap_interval(x, x + noise, noise, seed=3)
    assert low <= partial_spearman(x, x + noise, noise) <= high
