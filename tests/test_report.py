from __future__ import annotations

import hashlib
import html.parser
import json
import re
import runpy
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nasgraph.compare import Comparison, correlations, joined
from nasgraph.draw import draw_architecture
from nasgraph.figures import parallel_figure
from nasgraph.pareto import Direction, hypervolume
from nasgraph.readable import column, duration, number
from nasgraph.report import FrontRow, write_report
from nasgraph.screen import ScreenRow
from nasgraph.space import Architecture, Choice, Op, SearchSpace
from nasgraph.statistics import partial_spearman, spearman
from nasgraph.study import TrialRecord

TWO: list[tuple[str, Direction]] = [("val_accuracy", "maximize"), ("params", "minimize")]
THREE: list[tuple[str, Direction]] = [*TWO, ("latency_ms", "minimize")]
NASTY = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"


class Conv(nn.Module):
    """Stands for a graph convolution."""

    def __init__(self, out_channels: int, heads: int = 1) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        return x


class Attention(Conv):
    pass


def make_space() -> SearchSpace:
    space = SearchSpace("gnn")
    x = space.input("x", torch.randn(4, 16), dynamic={0: "nodes"})
    edges = space.input("edge_index", torch.tensor([[0, 1, 2], [1, 2, 3]]), dynamic={1: "edges"})
    width = Choice("width", [8, 16, 32, 64, 128], ordered=True)
    nodes = [space.add("stem", Op(nn.Linear, out_features=width), x)]
    for i in range(1, 5):
        heads = Choice(f"heads{i}", [1, 2, 4], ordered=True)
        kind = [
            Op(Conv, label="mean", out_channels=width),
            Op(Attention, label="attention", out_channels=width, heads=heads),
        ]
        nodes.append(space.add(f"layer{i}", Choice(f"conv{i}", kind), nodes[-1], edges))
    space.output(
        space.add("head", Op(nn.Linear, out_features=7), Choice("depth", {str(i): nodes[i] for i in range(1, 5)}))
    )
    return space


def measure(arch: Architecture, rng: np.random.Generator) -> dict[str, float]:
    """Numbers as a search on citation graphs gives them."""
    width, depth = int(arch["width"]), int(arch["depth"])  # type: ignore[arg-type, call-overload]
    attention = sum(arch[f"conv{i}"] == "attention" for i in range(1, depth + 1))
    params = 1433 * width + depth * width * width + 7 * width + 4 * attention * width
    accuracy = 0.70 + 0.022 * np.log2(width / 8) + 0.012 * attention - 0.018 * abs(depth - 2) + rng.normal(0, 0.008)
    latency = 0.8 + 0.4 * depth + 0.5 * attention + width / 100 + rng.normal(0, 0.03)
    return {"val_accuracy": round(float(accuracy), 4), "params": float(params), "latency_ms": round(float(latency), 4)}


def make_records(
    space: SearchSpace, count: int, seed: int, guided: bool = False, nasty: bool = False
) -> list[TrialRecord]:
    import random

    draw, rng = random.Random(seed), np.random.default_rng(seed)  # fails some trials
    records: list[TrialRecord] = []
    for number_ in range(count):
        arch = space.sample(draw)
        best = sorted((r for r in records if r.state == "scored"), key=lambda r: -r.values["val_accuracy"])[:6]
        if guided and len(best) == 6 and draw.random() < 0.85:
            arch = space.mutate(draw.choice(best).arch, draw)
        key = hashlib.sha256(arch.to_json().encode()).hexdigest()[:16]
        if rng.random() < 0.06:
            reason, detail = (
                ("out_of_memory", "RuntimeError: 2.1 GiB wanted, 1.0 GiB allowed")
                if number_ % 2
                else ("error", "boom\nline 2")
            )
            detail = NASTY if nasty else detail
            records.append(TrialRecord(number_, "failed", arch, key, {}, {}, reason, detail, 0.4, False))
        else:
            values = measure(arch, np.random.default_rng(int(key, 16)))  # a network has one score
            records.append(TrialRecord(number_, "scored", arch, key, values, {}, None, None, 4.2, False))
    return records


def make_screen(records: Sequence[TrialRecord], count: int, seed: int) -> list[ScreenRow]:
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        record = records[i] if i < len(records) else None
        if record is None or record.state == "failed":
            base = record or records[0]
            rows.append(ScreenRow(i, f"other{i}", base.arch, {}, "not_finite", "synflow is inf", 0.1))
            continue
        params, accuracy = record.values["params"], record.values["val_accuracy"]
        values = {
            "gradsign": 100 * accuracy + rng.normal(0, 2),
            "synflow": np.log(params) + rng.normal(0, 0.3),
            "naswot": rng.normal(0, 1),
            "params": params,
            "flops": params * 2708 * (1 + 0.1 * rng.random()),
        }
        rows.append(ScreenRow(i, record.key, record.arch, {k: float(v) for k, v in values.items()}, None, None, 0.1))
    return rows


def make_report(path: Path, objectives: list[tuple[str, Direction]], nasty: bool = False, **changes: Any) -> Path:
    space = make_space()
    search, random_ = make_records(space, 120, 1, guided=True, nasty=nasty), make_records(space, 120, 2)
    run = Comparison(search, random_, objectives)
    rng, front = np.random.default_rng(5), []
    for record, on in zip(run.search_rows, run.search_front, strict=True):
        if on:
            test = record.values["val_accuracy"] - 0.01 + rng.normal(0, 0.004)
            final = {"test_accuracy": round(test, 4), "val_accuracy": record.values["val_accuracy"] - 0.002}
            final |= {"test_accuracy_mean": round(test - 0.003, 4), "test_accuracy_std": 0.0041}
            exports = [
                {"format": "onnx", "path": f"models/{record.key}/model.onnx", "max_abs_diff": 2.4e-07, "status": "ok"},
                {"format": "code", "path": f"models/{record.key}/model.py", "max_abs_diff": 0.0, "status": "ok"},
                {
                    "format": "torch-export",
                    "path": "",
                    "max_abs_diff": None,
                    "status": "failed",
                    "detail": "no such op",
                },
            ]
            drawing = draw_architecture(space, record.arch)
            front.append(FrontRow(record.key, record.arch, record.values, final, drawing, exports))
    facts: dict[str, Any] = {
        "title": f"{NASTY if nasty else 'gnn on Cora'}",
        "trials": search,
        "baseline": random_,
        "objectives": objectives,
        "screen": make_screen(search, 300, 3),
        "front": front,
        "references": {
            "logistic regression": {"val_accuracy": 0.592, "test_accuracy": 0.571, "params": 10038.0},
            "published GCN": {"test_accuracy": 0.815},
        },
        "manifest": {
            "nasgraph": "0.1.0",
            "seed": 1,
            "threads": 1,
            "packages": {"torch": "2.13.0"},
            "data": {"sha256": "ab" * 32},
        },
    }
    return write_report(path, **{**facts, **changes})


class Page(html.parser.HTMLParser):
    """Tags, ids, headings and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._open[-1:]):
            self.words.append(data)

    def figures(self, path: Path) -> dict[str, Any]:
        text = path.read_text(encoding="utf-8")
        found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)
        assert found
        return dict(json.loads(found[1]))


# ---- the numbers --------------------------------------------------------------------------------------------------


def test_both_runs_share_budget_reference_and_scale() -> None:
    space = make_space()
    search, random_ = make_records(space, 40, 1), make_records(space, 60, 2)
    run = Comparison(search, random_, TWO)
    assert run.budget == 40 and len(run.random) == 40
    scored = [r for r in [*search, *random_[:40]] if r.state == "scored"]
    assert run.reference is not None and run.ideal is not None
    worst, best = min(r.values["val_accuracy"] for r in scored), max(r.values["val_accuracy"] for r in scored)
    assert run.reference[0] == pytest.approx(worst - 0.1 * (best - worst))
    assert run.ideal.tolist() == [best, min(r.values["params"] for r in scored)]
    box = abs(run.reference - run.ideal).prod()
    for n in (1, 17, 40):
        rows = run.table([r for r in search[:n] if r.state == "scored"])
        assert run.search_volume[n - 1] == pytest.approx(hypervolume(rows, run.directions, run.reference) / box)
    assert 0 < run.random_volume[-1] <= 1


def test_failed_trials_cost_budget_and_twins_count_once() -> None:
    space = make_space()
    good = [r for r in make_records(space, 10, 1) if r.state == "scored"]
    failed = TrialRecord(1, "failed", good[0].arch, "k", {}, {}, "error", "boom", 0.1, False)
    run = Comparison([failed, good[0], failed, good[0], good[1]], [], TWO)
    assert run.search_volume[0] == 0 and run.search_volume[1] == run.search_volume[2] == run.search_volume[3] > 0
    assert len(run.search_rows) == 2
    assert Comparison([failed], [failed], TWO).reference is None


def test_correlations_join_screen_and_trials() -> None:
    search = make_records(make_space(), 80, 1)
    pairs = joined(make_screen(search, 100, 3), search)
    assert {row.key for row, _ in pairs} == {r.key for r in search if r.state == "scored"}
    rows = {row.name: row for row in correlations(pairs, TWO[0])}
    assert list(rows)[:2] == ["params", "flops"] and set(rows) == {"params", "flops", "gradsign", "synflow", "naswot"}
    accuracy = [trial.values["val_accuracy"] for _, trial in pairs]
    params = [trial.values["params"] for _, trial in pairs]
    score = [row.values["gradsign"] for row, _ in pairs]
    found = rows["gradsign"]
    assert found.n == len(pairs) and found.rho and found.partial and found.rho.interval
    assert found.rho.value == pytest.approx(spearman(score, accuracy))
    assert found.partial.value == pytest.approx(partial_spearman(score, accuracy, params))
    assert found.rho.interval[0] < found.rho.value < found.rho.interval[1]
    assert rows["params"].partial is None
    # for an objective that is minimised, a score that grows with it is a bad one
    worse = {row.name: row for row in correlations(pairs, ("latency_ms", "minimize"))}
    latency = [trial.values["latency_ms"] for _, trial in pairs]
    assert worse["gradsign"].rho and worse["gradsign"].rho.value == pytest.approx(-spearman(score, latency))


def test_sizes_come_from_the_trial_where_the_screen_has_none() -> None:
    search = make_records(make_space(), 40, 1)
    screen = [
        ScreenRow(r.index, r.key, r.arch, {"naswot": r.values["naswot"]}, None, None, 0.1)
        for r in make_screen(search, 40, 3)
        if r.reason is None
    ]
    rows = {row.name: row for row in correlations(joined(screen, search), TWO[0])}
    assert rows["params"].rho is not None and rows["naswot"].partial is not None
    assert rows["flops"].n == 0 and rows["flops"].rho is None


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("val_accuracy", 0.974, "97.4 %"),
        ("params", 12345, "12.3 k"),
        ("params", 999, "999"),
        ("params", 999_999, "1.00 M"),
        ("flops", 1.5e9, "1.50 G"),
        ("weight_bytes", 4096, "4.10 kB"),
        ("latency_ms", 1.2, "1.20 ms"),
        ("loss", 0.123456, "0.1235"),
        ("loss", -3, "−3"),
        ("val_accuracy", 97.4, "97.40"),  # not a share
    ],
)
def test_numbers_are_readable(name: str, value: float, text: str) -> None:
    assert number(name, value).replace("\u202f", " ") == text


def test_different_numbers_look_different() -> None:
    assert [t.replace("\u202f", " ") for t in column("val_accuracy", [0.9741, 0.9742])] == ["97.41 %", "97.42 %"]
    assert column("params", [12345.0, 12346.0]) == ["12.345\u202fk", "12.346\u202fk"]
    assert column("params", []) == []
    assert [duration(s).replace("\u202f", " ") for s in (0.42, 59.7, 185, 7260)] == [
        "0.42 s",
        "1 min",
        "3 min 5 s",
        "2 h 1 min",
    ]


def test_parallel_coordinates_put_better_up() -> None:
    rows = [{"acc": a, "params": p} for a, p in ((0.5, 10.0), (0.9, 1000.0), (0.7, 100.0))]
    archs: list[dict[str, Any]] = [{"w": 8, "same": 1}, {"w": 64, "same": 1, "h": 2}, {"w": 16, "same": 1}]
    figure, note = parallel_figure(
        [("acc", "maximize"), ("params", "minimize")], archs, rows, [False, True, False], ["a", "b", "c"]
    )
    lines = {trace["text"][i]: trace["y"][i : i + 4] for trace in figure["data"] for i in range(0, len(trace["y"]), 5)}
    assert lines["a"][2:] == [0.0, 1.0] and lines["b"][2:] == [1.0, 0.0] and lines["c"][2:] == [0.5, 0.5]
    assert lines["a"][0] < lines["c"][0] < lines["b"][0]  # 8 < 16 < 64
    assert lines["a"][1] < 0.5 < lines["b"][1]  # "not asked" is lowest
    assert "same" in note


# ---- the page -----------------------------------------------------------------------------------------------------


def test_the_page_has_every_section(tmp_path: Path) -> None:
    path = make_report(tmp_path / "report.html", TWO)
    page = Page(path)
    headings = [attrs["id"] for tag, attrs in page.tags if tag == "h2"]
    assert headings == ["front", "progress", "choices", "models", "proxies", "failures", "manifest"]
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.tags:
        if tag == "a" and (attrs["href"] or "").startswith("#"):
            assert (attrs["href"] or "")[1:] in ids  # links within the page lead somewhere
        assert tag != "img" or attrs["alt"]
        assert not re.match(r"(?:https?:)?//", attrs.get("src") or attrs.get("href") or "")
    assert set(page.figures(path)) == {"plot-front", "plot-volume", "plot-best", "plot-choices", "plot-proxies"}
    for text in (
        "Random search, 120 trials",
        "logistic regression",
        "57.1",
        "out_of_memory",
        "2.4e-07",
        "no such op",
        "_mean",
    ):
        assert text in page.text
    assert "±" in page.text
    assert path.read_text(encoding="utf-8").count("plotly.js v") == 1
    assert list(tmp_path.iterdir()) == [path]


def test_the_page_is_the_same_when_written_again(tmp_path: Path) -> None:
    first, second = (make_report(tmp_path / name, TWO).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_empty_sections_say_why(tmp_path: Path) -> None:
    path = make_report(tmp_path / "r.html", TWO, baseline=[], screen=[], front=[], references={}, manifest={})
    page = Page(path)
    for text in ("No random search was run", "No screen was run", "No network was put on the front", "No manifest"):
        assert text in page.text
    path = make_report(
        tmp_path / "r.html", TWO, trials=[], baseline=[], screen=[], front=[], references={}, manifest={}
    )
    page = Page(path)
    for text in ("No trial has finished yet", "No trial was scored", "Nothing failed"):
        assert text in page.text
    assert page.figures(path) == {}


def test_one_objective_has_no_front_plot(tmp_path: Path) -> None:
    path = make_report(tmp_path / "r.html", TWO[:1])
    assert set(Page(path).figures(path)) == {"plot-best", "plot-choices", "plot-proxies"}
    with pytest.raises(ValueError, match="objective"):
        write_report(
            path, title="t", trials=[], baseline=[], objectives=[], screen=[], front=[], references={}, manifest={}
        )


def test_three_objectives_are_picked_in_pairs(tmp_path: Path) -> None:
    path = make_report(tmp_path / "r.html", THREE)
    page = Page(path)
    assert [attrs["id"] for tag, attrs in page.tags if tag == "select"] == ["plot-front-x", "plot-front-y"]
    traces = page.figures(path)["plot-front"]["data"]
    assert all(set(trace["columns"]) == {"val_accuracy", "params", "latency_ms"} for trace in traces)


def test_what_a_trial_says_is_text(tmp_path: Path) -> None:
    path = make_report(
        tmp_path / "r.html",
        TWO,
        nasty=True,
        references={NASTY: {"val_accuracy": 0.5}},
        manifest={NASTY: NASTY, "nested": {NASTY: NASTY}},
    )
    page = Page(path)
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "figures"}, {}, {}]
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert NASTY in page.text  # shown as it is
    assert "'unsafe-inline'; img" in str(page.tags)  # for styles only


def test_the_documented_example_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "report.md").read_text(encoding="utf-8")
    script = tmp_path / "example.py"
    script.write_text(text.split("```python\n")[1].split("```")[0], encoding="utf-8")
    runpy.run_path(str(script))
    assert capsys.readouterr().out.split("\n") == ["[ True  True False]", "True", ""]


# ---- in a browser -------------------------------------------------------------------------------------------------


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium found (looked for chromium, chromium-browser, google-chrome)")
    return subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--enable-logging=stderr", f"--user-data-dir={profile}",
            "--virtual-time-budget=8000", *options, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


def complaints(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if "CONSOLE" in line]


def test_the_figures_are_drawn_in_a_browser(tmp_path: Path) -> None:
    path = make_report(tmp_path / "report.html", THREE, nasty=True)
    found = browse(path, tmp_path / "profile", "--window-size=1200,3000", "--dump-dom")
    assert complaints(found.stderr) == []
    for name in Page(path).figures(path):
        plot = found.stdout[found.stdout.index(f'id="{name}"') :]
        plot = plot[: plot.index("</figure>")]
        assert "main-svg" in plot and re.search(r'class="(?:point|js-line)"', plot), f"{name} is empty"
    assert "<title>&lt;script&gt;" in found.stdout  # not "owned"


def test_the_browser_test_sees_errors(tmp_path: Path) -> None:
    path = tmp_path / "broken.html"
    path.write_text("<script>nothing.here()</script>")
    found = browse(path, tmp_path / "profile", "--dump-dom")
    assert any("nothing is not defined" in line for line in complaints(found.stderr))
