"""Rank reports: correlations against scipy, top-k overlap against a plain enumeration, reports of made-up scores."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from nasgraph.build import build
from nasgraph.cli import main
from nasgraph.errors import ConfigError, NotFinite
from nasgraph.ranking import RankReport, kendall, rank_report, ranked, stand_alone, top_overlap
from nasgraph.search_spaces.gnn_node import gnn_node
from nasgraph.space import Architecture
from nasgraph.supernet import Supernet
from nasgraph.tasks import NodeTask, digits_knn
from nasgraph.training import TrainSettings
from nasgraph.training.policies import Uniform


@pytest.fixture(scope="module")
def task() -> NodeTask:
    return digits_knn()


@pytest.fixture(scope="module")
def supernet(task: NodeTask) -> Supernet:
    space = gnn_node(**task.sizes, layers=2, widths=(8, 16))
    made = Supernet(space, task, seed=0)
    made.train(Uniform(space), 5)
    return made


def size(supernet: Supernet) -> Callable[[Architecture], float]:
    return lambda architecture: float(supernet.params(architecture))


@pytest.fixture(scope="module")
def report(supernet: Supernet) -> RankReport:
    """The truth is the size, so size ranks perfectly and nothing is left once it is held fixed."""
    small = {"small": lambda architecture: -float(supernet.params(architecture))}
    return rank_report(supernet, size(supernet), n=10, proxies=("grad_norm",), extra=small, training_seconds=3.0)


# ---- parts ------------------------------------------------------------------------------------------------------


def brute_overlap(scores: list[float], truth: list[float], k: int) -> float:
    """The mean overlap over all ways to draw both sets of k that respect the order."""

    def sets(values: list[float]) -> list[set[int]]:
        found = []
        for chosen in itertools.combinations(range(len(values)), k):
            rest = [values[i] for i in range(len(values)) if i not in chosen]
            if not rest or min(values[i] for i in chosen) >= max(rest):
                found.append(set(chosen))
        return found

    pairs = [len(a & b) / k for a in sets(scores) for b in sets(truth)]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(6))
def test_top_overlap_is_the_mean_over_all_fair_draws_among_the_tied(seed: int) -> None:
    rng = random.Random(seed)
    scores = [float(rng.randrange(4)) for _ in range(7)]
    truth = [float(rng.randrange(4)) for _ in range(7)]
    for k in range(1, 7):
        assert top_overlap(scores, truth, k) == pytest.approx(brute_overlap(scores, truth, k))


def test_top_overlap_of_known_cases() -> None:
    assert top_overlap([1, 2, 3, 4], [1, 2, 3, 4], 2) == 1.0
    assert top_overlap([1, 2, 3, 4], [4, 3, 2, 1], 2) == 0.0
    assert top_overlap([1, 1, 1, 1], [1, 2, 3, 4], 1) == 0.25  # a score that says nothing is chance


def slow_tau_b(x: list[float], y: list[float]) -> float:
    """Pairs, counted one by one (Kendall 1945)."""
    both = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i in range(len(x)) for j in range(i)]
    in_x, in_y = sum(a != 0 for a, _ in both), sum(b != 0 for _, b in both)
    return float(sum(a * b for a, b in both) / math.sqrt(in_x * in_y))


def test_kendall_counts_pairs_and_is_not_defined_for_a_constant() -> None:
    rng = random.Random(0)
    x, y = [float(rng.randrange(5)) for _ in range(30)], [float(rng.randrange(5)) for _ in range(30)]
    assert kendall(x, y) == pytest.approx(slow_tau_b(x, y))
    assert math.isnan(kendall([1, 1, 1], [1, 2, 3]))
    assert math.isnan(kendall([1, 2], [1, 2]))


def test_a_row_agrees_with_scipy_and_leaves_out_what_has_no_score() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=200)
    params = rng.normal(size=200)
    scores = list(0.8 * truth + 0.6 * params + rng.normal(size=200))
    gaps = [None if i % 10 == 0 else float(score) for i, score in enumerate(scores)]
    row = ranked("score", "proxy", gaps, list(truth), list(params), top=(1, 5, 500))
    kept = [i for i in range(200) if i % 10]
    x, y, z = (np.array(column)[kept].astype(float) for column in (scores, truth, params))
    assert row.n == 180 and row.top.keys() == {1, 5}
    assert row.spearman == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert row.kendall == pytest.approx(scipy.stats.kendalltau(x, y).statistic)
    ranks = [scipy.stats.rankdata(column) for column in (x, y, z)]
    rest = [a - np.polyval(np.polyfit(ranks[2], a, 1), ranks[2]) for a in ranks[:2]]
    assert row.partial == pytest.approx(np.corrcoef(*rest)[0, 1])  # what regression on the ranks leaves
    assert row.pick == y[x.argmax()]
    for value, (low, high) in (
        (row.spearman, row.spearman_interval),
        (row.kendall, row.kendall_interval),
        (row.partial, row.partial_interval),
    ):
        assert low < value < high and high - low < 0.35
    # Fisher's interval of Spearman's rho: tanh(atanh(r) +- 1.96 sqrt((1 + r^2 / 2) / (n - 3))), Bonett & Wright 2000
    half = 1.96 * math.sqrt((1 + row.spearman**2 / 2) / 177)
    low, high = (math.tanh(math.atanh(row.spearman) + sign * half) for sign in (-1, 1))
    assert row.spearman_interval == pytest.approx((low, high), abs=0.04)


def test_the_expected_best_of_n_is_a_mean_over_all_draws() -> None:
    truth = (0.1, 0.5, 0.2, 0.9, 0.5)
    report = RankReport((), truth, {}, (), 1.0, None)
    for n in (1, 2, 3, 5):
        draws = [max(chosen) for chosen in itertools.combinations(truth, n)]
        assert report.best_of(n) == pytest.approx(sum(draws) / len(draws))
    assert report.best_of(50) == 0.9 and math.isnan(report.best_of(0))


def test_the_interval_of_kendall_is_that_of_resampled_rows() -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(6, size=40).astype(float)
    y = x + rng.integers(8, size=40)
    resampled = []
    for _ in range(1000):
        rows = rng.integers(40, size=40)
        resampled.append(kendall(x[rows], y[rows]))
    row = ranked("score", "proxy", list(x), list(y), [1.0] * 40)
    assert row.kendall_interval == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.04)


# ---- reports ----------------------------------------------------------------------------------------------------


def test_a_perfect_score_is_perfect_and_its_opposite_is_not(report: RankReport) -> None:
    params, small = report.row("params"), report.row("small")
    assert params.spearman == params.kendall == pytest.approx(1.0)
    assert params.top[1] == 1.0 and params.pick == max(report.truth)
    assert small.spearman == pytest.approx(-1.0) and small.pick == min(report.truth)
    assert math.isnan(params.partial) and math.isnan(small.partial)  # nothing is left beside size
    assert [row.name for row in report.rows] == ["accuracy", "small", "params", "flops", "live_params", "grad_norm"]
    assert report.best_proxy is not None and report.best_proxy.name == "grad_norm"


def test_scores_are_what_the_parts_give_alone(report: RankReport, supernet: Supernet, task: NodeTask) -> None:
    from nasgraph.predictors.zero_cost import grad_norm, live_params

    assert report.scores["accuracy"] == tuple(supernet.evaluate(report.architectures))
    models = [build(supernet.space, architecture, 0) for architecture in report.architectures]
    assert report.scores["grad_norm"] == tuple(grad_norm(model, task.batch(32, 0)) for model in models)
    assert report.scores["live_params"] == tuple(live_params(model, task.batch(32, 0)) for model in models)
    assert len({supernet.space.key(architecture) for architecture in report.architectures}) == 10


def test_the_same_seed_gives_the_same_architectures_and_scores(report: RankReport, supernet: Supernet) -> None:
    again = rank_report(supernet, size(supernet), n=10, proxies=("grad_norm",))
    assert again.architectures == report.architectures
    assert again.scores["accuracy"] == report.scores["accuracy"]
    other = rank_report(supernet, size(supernet), n=10, seed=1, proxies=())
    assert other.architectures != report.architectures and other.best_proxy is None


def test_equal_wall_clock_is_stated(report: RankReport) -> None:
    timed = RankReport(report.architectures, report.truth, report.scores, report.rows, 24.0, 30.0)
    spent = 30.0 + timed.row("accuracy").seconds
    assert timed.trainings("accuracy") == int(spent / 2.4)  # 24 s for 10 trainings
    assert timed.trainings("params") == int(timed.row("params").seconds / 2.4)
    assert f"{timed.trainings('accuracy')} architectures train alone" in str(timed)
    unknown = RankReport(report.architectures, report.truth, report.scores, report.rows, 24.0, None)
    assert unknown.trainings("accuracy") is None and "training: not known" in str(unknown)
    table = RankReport(report.architectures, report.truth, report.scores, report.rows, 0.001, 30.0)
    assert table.trainings("accuracy") is None  # a table costs nothing: no time to compare with


def test_a_report_reads_and_is_written(report: RankReport, tmp_path: Path) -> None:
    text = str(report)
    assert "Best proxy in hindsight: grad_norm" in text
    assert [line.split()[0] for line in text.splitlines()[1:7]] == [row.name for row in report.rows]
    assert all(word in text.splitlines()[0] for word in ("Spearman", "Kendall", "given params", "top 5", "seconds"))
    about = json.loads(report.to_json(tmp_path / "rank.json").read_text())
    assert about["rows"][2]["name"] == "params" and about["rows"][2]["partial"] is None
    assert about["best_proxy_in_hindsight"] == "grad_norm" and about["training_seconds"] == 3.0
    with report.to_csv(tmp_path / "rank.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["truth"]) for line in lines] == list(report.truth)
    assert [float(line["accuracy"]) for line in lines] == list(report.scores["accuracy"])
    assert [Architecture.from_json(line["architecture"]) for line in lines] == list(report.architectures)


def test_training_alone_is_a_truth(supernet: Supernet, task: NodeTask) -> None:
    settings = TrainSettings(epochs=3)
    truth = stand_alone(supernet.space, task, settings, seeds=(0, 1))
    architecture = supernet.space.sample(random.Random(0))
    alone = [task.fit(build(supernet.space, architecture, seed), settings, seed).val for seed in (0, 1)]
    assert truth(architecture) == sum(alone) / 2


def test_failures_are_left_out_and_told(supernet: Supernet) -> None:
    calls = itertools.count()

    def truth(architecture: Architecture) -> float:
        if next(calls) % 3 == 0:
            raise NotFinite("loss is nan in epoch 2")
        return float(supernet.params(architecture))

    picky = itertools.count()

    def proxy(model: object, batch: object) -> float:
        if next(picky) == 0:
            raise NotFinite("proxy is inf")
        return float(next(picky))

    report = rank_report(supernet, truth, n=9, proxies=(proxy,))
    assert len(report.truth) == 6 and len(report.failed) == 3
    assert "Left out: 3" in str(report) and "nan in epoch 2" in str(report)
    assert report.row("proxy").n == 5 and report.scores["proxy"][0] is None


def test_the_same_network_counts_once(supernet: Supernet) -> None:
    rng = random.Random(0)
    four = [supernet.space.sample(rng) for _ in range(4)]
    report = rank_report(supernet, size(supernet), [*four, *four], proxies=())
    assert report.architectures == tuple(four)


def test_loss_and_flatness_are_scores(supernet: Supernet) -> None:
    from nasgraph.supernet.flatness import subnet_flatness

    report = rank_report(supernet, size(supernet), n=4, proxies=(), scores=("loss", "flatness"))
    for architecture, flat in zip(report.architectures, report.scores["flatness"], strict=True):
        assert flat == subnet_flatness(supernet, architecture)
    assert all(loss is not None and loss < 0 for loss in report.scores["loss"])


def test_bad_input(supernet: Supernet) -> None:
    with pytest.raises(ConfigError, match="'acuracy': accuracy, loss, readout or flatness"):
        rank_report(supernet, size(supernet), n=4, scores=("acuracy",))
    with pytest.raises(ConfigError, match="Did you mean 'ntk_cond'"):
        rank_report(supernet, size(supernet), n=4, proxies=("ntk_con",))
    with pytest.raises(ConfigError, match="needs at least 3"):
        rank_report(supernet, size(supernet), n=2, proxies=())


# ---- a run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a small supernet of digits."""
    folder = tmp_path_factory.mktemp("rank")
    values = {
        "space": {"name": "gnn_node", "layers": 2, "widths": [8, 16]},
        "task": "digits_knn",
        "supernet": {"policy": "uniform", "epochs": 3},
        "train": {"epochs": 2},
        "search": {"score": "supernet", "sampler": "random", "trials": 3, "workers": 0, "baseline": False},
        "final": {"top": 1, "seeds": 1},
        "export": ["safetensors"],
    }
    (folder / "small.yaml").write_text(json.dumps(values), encoding="utf-8")
    assert main(["search", str(folder / "small.yaml"), "--out", str(folder / "run"), "--quiet"]) == 0
    return folder / "run"


def test_the_command_ranks_the_supernet_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rank", str(run), "-n", "4", "--proxy", "grad_norm", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "Best proxy in hindsight: grad_norm" in said and "Supernet's training: not known" not in said
    about = json.loads((run / "rank.json").read_text())
    assert about["n"] == 4 and about["training_seconds"] > 0
    with (run / "rank.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    task = digits_knn()
    supernet = Supernet.load(run / "supernet", gnn_node(**task.sizes, layers=2, widths=(8, 16)), task)
    architectures = [Architecture.from_json(line["architecture"]) for line in lines]
    assert [float(line["accuracy"]) for line in lines] == supernet.evaluate(architectures)
    truth = stand_alone(supernet.space, task, TrainSettings(epochs=2))
    assert float(lines[0]["truth"]) == truth(architectures[0])


def test_the_truth_may_be_a_function_of_ones_own(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_truth.py").write_text("def width(architecture):\n    return float(architecture['width'])\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["rank", str(run), "-n", "6", "--truth", "my_truth:width", "--quiet"]) == 0
    assert set(json.loads((run / "rank.json").read_text())) >= {"rows", "training_seconds"}
    with (run / "rank.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            assert float(line["truth"]) == json.loads(line["architecture"])["width"]


def test_a_run_without_a_supernet_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads((run / "manifest.json").read_text())
    for change, words in (
        (lambda facts: facts.pop("supernet"), "is not trained yet: nasgraph resume"),
        (lambda facts: facts["config"].update(supernet=None, search={"trials": 3}), "has no section supernet"),
    ):
        change(facts)
        (tmp_path / "manifest.json").write_text(json.dumps(facts))
        assert main(["rank", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1
    assert main(["rank", str(tmp_path / "nowhere")]) == 2
    assert main(["rank", str(run), "--proxy", "ntk_con"]) == 2
    assert "Did you mean 'ntk_cond'" in capsys.readouterr().err


@pytest.mark.slow
def test_nasbench201_on_real_images(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short training of a small skeleton: params order the cells, and the shared loss says something too."""
    monkeypatch.setenv("NASGRAPH_DATA", str(data_root))
    path = Path(__file__).parents[1] / "benchmarks" / "nasbench201_ranking.py"
    spec = importlib.util.spec_from_file_location("nasbench201_ranking", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    report, test = module.report(data_root, paths=4000, n=60)
    assert len(report.truth) == len(test) >= 50
    assert report.row("params").kendall > 0.5  # published, over all cells: 0.58
    assert report.row("loss").kendall > 0.1
    assert report.training_seconds is not None and report.training_seconds > 0
