"""The main job at the command line: search, resume after a kill, report, export, score, spaces, and bad input."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from nasgraph import database, manifest, search
from nasgraph.cli import main
from nasgraph.config import Config, parse
from nasgraph.errors import ConfigError, DamagedFile, NotFinite, SearchStopped, SpaceError
from nasgraph.executors import InProcess
from nasgraph.run import Run
from nasgraph.screen import ScreenTable, screen
from nasgraph.search import _Role
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.transforms import Lora
from nasgraph.workers import Worker, parts

TINY = {
    "space": {"name": "gnn_node", "layers": 2, "widths": [8, 16]},
    "task": "digits_knn",
    "train": {"epochs": 4, "patience": 4},
    "screen": {"candidates": 8, "proxies": ["ntk_cond", "grad_norm"], "keep": 3, "samples": 16},
    "search": {"trials": 8, "workers": 0},
    "final": {"top": 2, "seeds": 2},
    "export": ["code", "safetensors"],
}


def tiny(**changes: object) -> Config:
    return parse({**TINY, **changes})


def write(path: Path, values: dict[str, object]) -> Path:
    path.write_text(json.dumps(values))  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny search, in this process."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert search.start(tiny(), folder, quiet=True) == 0
    return folder


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "pareto.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def results(run: Path) -> list[tuple[object, ...]]:
    """All that a search found, without wall times."""
    opened = Run.open(run)
    return [
        (name, r.number, r.state, r.arch, r.key, r.values, r.reused)
        for name in ("search", "random")
        for r in opened.records(name)
    ]


def test_a_run_leaves_what_it_promises(run: Path) -> None:
    facts = manifest.read(run / "manifest.json")
    assert facts["status"] == "finished"
    assert facts["config"]["search"]["trials"] == 8
    assert {"load", "screen", "search", "random", "final", "report"} <= set(facts["seconds"])
    for name in ("report.html", "pareto.csv", "study.db", "screen.db"):
        assert (run / name).stat().st_size > 0
    for path, digest in facts["artifacts"].items():
        assert manifest.sha256(run / path) == digest
    assert any(path.startswith("models/") for path in facts["artifacts"])


def test_the_front_is_of_the_trials_and_no_trial_dominates_it(run: Path) -> None:
    trials = [values for name, _, state, _, _, values, _ in results(run) if name == "search" and state == "scored"]
    for row in rows(run):
        accuracy, params = float(row["val_accuracy"]), float(row["params"])
        assert {"val_accuracy": accuracy, "params": params} in [
            {"val_accuracy": t["val_accuracy"], "params": t["params"]}
            for t in trials  # type: ignore[index]
        ]
        for t in trials:
            better = t["val_accuracy"] >= accuracy and t["params"] <= params  # type: ignore[index]
            equal = t["val_accuracy"] == accuracy and t["params"] == params  # type: ignore[index]
            assert not better or equal


def test_exported_models_run_without_nasgraph(run: Path) -> None:
    folders = [path for path in (run / "models").iterdir() if path.is_dir()]
    assert 1 <= len(folders) <= 2
    block = (
        "import runpy, sys; sys.modules['nasgraph'] = None\n"
        "sys.argv = ['model.py']; runpy.run_path('model.py', run_name='__main__')"
    )
    for folder in folders:
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=folder, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr


def test_the_search_is_the_same_again_and_resume_repeats_nothing(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert search.start(tiny(), again, quiet=True) == 0
    assert results(again) == results(run)
    before = (again / "study.db").read_bytes()
    assert search.resume(again, quiet=True) == 0
    assert results(again) == results(run)
    assert len((again / "study.db").read_bytes()) == len(before)


def test_known_architectures_are_tried_first(tmp_path: Path) -> None:
    known = {"depth": "1", "conv1": "gcn", "head": "gcn", "width": 8, "activation": "relu", "norm": "none"}
    known |= {"input_dropout": 0.5, "dropout": 0.5, "propagate": "none"}
    plain = {"final": {"top": 1, "seeds": 1}, "export": ["safetensors"]}
    settings = tiny(**plain, search={"trials": 5, "workers": 0, "baseline": False, "start": [known]})
    assert search.start(settings, tmp_path / "run", quiet=True) == 0
    records = Run.open(tmp_path / "run").records("search")
    assert dict(records[0].arch) == known
    assert len(records) == 5
    with pytest.raises(SpaceError, match="has no option 'gnc'"):
        wrong = {"trials": 5, "start": [{**known, "conv1": "gnc"}]}
        search.start(tiny(**plain, search=wrong), tmp_path / "wrong", quiet=True)
    assert not (tmp_path / "wrong").exists()


def test_more_trials_extend_a_finished_run(tmp_path: Path) -> None:
    long, short = tmp_path / "long", tmp_path / "short"
    plain = {"screen": None, "final": {"top": 1, "seeds": 1}}
    assert search.start(tiny(**plain, search={"trials": 7, "workers": 0, "baseline": False}), long, quiet=True) == 0
    assert search.start(tiny(**plain, search={"trials": 4, "workers": 0, "baseline": False}), short, quiet=True) == 0
    assert search.resume(short, ["search.trials=7"], quiet=True) == 0
    assert results(short) == results(long)


def test_kill_and_resume_give_the_uninterrupted_result(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    config = write(tmp_path / "tiny.yaml", TINY)
    command = [sys.executable, "-m", "nasgraph.cli", "search", str(config), "--out", str(folder), "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "study.db").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(["resume", str(folder), "--quiet"]) == 0
    assert results(folder) == results(run)


def test_child_processes_find_the_same_in_the_screen(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    settings = tiny(search={"trials": 4, "workers": 2, "sampler": "random", "timeout_s": 120}, export=["safetensors"])
    assert search.start(settings, folder, quiet=True) == 0
    first, second = Run.open(run).screened(), Run.open(folder).screened()
    assert [(row.key, row.values) for row in first] == [(row.key, row.values) for row in second]


def test_report_and_export_of_a_finished_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").exists()
    key = rows(run)[-1]["key"]
    out = tmp_path / "best"
    assert main(["export", str(run), "--key", key[:12], "--format", "code", "safetensors", "--out", str(out)]) == 0
    assert {"model.py", "model.safetensors", "architecture.json"} <= {path.name for path in out.iterdir()}
    assert main(["export", str(run), "--key", "k1-zzz"]) == 2
    assert "0 keys of" in capsys.readouterr().err


def test_score_writes_a_row_per_architecture(tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"
    command = ["score", "gnn_node", "--task", "digits_knn", "--proxy", "grad_norm", "params", "-n", "5"]
    assert main([*command, "--set", "space.layers=2", "--out", str(out), "--quiet"]) == 0
    with out.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["index"] for row in found] == ["0", "1", "2", "3", "4"]
    assert all(float(row["params"]) > 0 and float(row["flops"]) > 0 and row["key"].startswith("k1-") for row in found)
    assert os.listdir(tmp_path) == ["scores.csv"]


def test_spaces_lists_and_describes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spaces"]) == 0
    assert "gnn_node" in capsys.readouterr().out
    picture = tmp_path / "space.svg"
    assert main(["spaces", "gnn_node", "--set", "layers=2", "--draw", str(picture)]) == 0
    assert "architectures" in capsys.readouterr().out
    assert picture.read_text().startswith("<svg")
    assert main(["spaces", "gnn_nod"]) == 2
    assert main(["spaces", "gnn_node", "--set", "layer=2"]) == 2
    assert "Did you mean 'layers'?" in capsys.readouterr().err


def test_doctor_finds_this_machine_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0, capsys.readouterr().out


USERS_SPACES = """
from nasgraph.search_spaces.gnn_node import gnn_node
from nasgraph.space import Choice

def no_options(features, classes):
    return Choice("width", [])

def impossible(features, classes):
    space = gnn_node(features, classes, layers=1)
    space.constrain("even odd widths", lambda arch: arch["width"] % 2 == 1)
    return space

def breaks(features, classes):
    return features / 0
"""


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("no_options", "choice 'width' has no options"),
        ("impossible", "met the constraint 'even odd widths'"),
        ("breaks", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_users_broken_space_costs_one_line(
    function: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"users_{function}.py").write_text(USERS_SPACES)
    monkeypatch.chdir(tmp_path)
    config = write(tmp_path / "bad.yaml", {**TINY, "space": f"users_{function}:{function}"})
    assert main(["search", str(config), "--out", "out", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "study.db").exists()


# ---- bad input: one line, exit code 2, nothing trained, nothing lost ----


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": {"name": "planetoid", "dataset": "Coral"}}, "Did you mean 'Cora'?"),
        ({"task": {"name": "planetoid", "dataset": "Cora"}, "data_root": "/no/such/folder"}, "/no/such/folder"),
        ({"space": {"name": "gnn_node", "layer": 2}}, "Did you mean 'layers'?"),
        ({"space": "tests_space_of_nobody:space"}, "there is no module tests_space_of_nobody"),
        ({"search": {"sampler": {"name": "nsga2", "populaton_size": 3}}}, "Did you mean 'population_size'?"),
        ({"limits": {"val_accuracy": 1}}, "is maximised"),
        ({"limits": {"params": float("nan")}}, "limits.params"),
        ({"search": {"sampler": "optuna.samplers:NoSampler"}}, "has no NoSampler"),
        ({"search": {"workers": 0, "memory_gb": 1}}, "memory_gb: needs child processes"),
        ({"screen": {"proxies": ["os:nothing_there"]}}, "os has no nothing_there"),
        ({"export": ["os:nothing_there"]}, "os has no nothing_there"),
        ({"threads": 100_000}, "processors of this machine"),
        ({"objectives": ["val_accuracy", "latency_ms"], "search": {"workers": 2}}, "latency_ms"),
    ],
)
def test_a_bad_config_trains_nothing(
    change: dict[str, object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path / "bad.yaml", {**TINY, **change})
    assert main(["search", str(config), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "study.db").exists()


def test_a_search_without_a_result_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path / "no.yaml", {**TINY, "limits": {"params": 1}, "search": {"trials": 2, "workers": 0}})
    assert main(["search", str(config), "--out", str(tmp_path / "out"), "--quiet"]) == 1
    assert "all of 2 trials failed, 2 of them with 'limit', e.g. params is" in " ".join(capsys.readouterr().out.split())


def test_a_stopped_scoring_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"
    score = ["score", "gnn_node", "--task", "digits_knn", "--set", "space.layers=1", "--out", str(out), "--quiet"]
    settings = parse({**TINY, "space": {"name": "gnn_node", "layers": 1}, "search": {"workers": 0}})
    with ScreenTable(out.with_name("scores.csv.db")) as table, InProcess(Worker(settings)) as executor:
        screen(parts(settings).space, table, 4, 0, _Role("score", executor))
    assert main([*score, "--proxy", "naswot", "params", "-n", "2"]) == 0
    with out.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["index"] for row in found] == ["0", "1"] and "naswot" in found[0]


def test_a_second_resume_leaves_a_running_one_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "manifest.json").read_bytes()
    with database.lock(run / "run.lock", "held"):
        assert main(["resume", str(run), "--trials", "9", "--quiet"]) == 2
    assert "another process is running" in capsys.readouterr().err
    assert (run / "manifest.json").read_bytes() == before
    assert main(["resume", str(run), "--trials", "3", "--quiet"]) == 2
    assert "holds 8 trials already" in capsys.readouterr().err


def test_a_taken_folder_is_left_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="nasgraph resume"):
        search.start(tiny(), run)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        search.start(tiny(), tmp_path)
    file = tmp_path / "note.txt"
    with pytest.raises(ConfigError, match="is a file"):
        search.start(tiny(), file)
    with pytest.raises(ConfigError, match="cannot make the folder .*Not a directory"):
        search.start(tiny(), file / "run")
    assert main(["resume", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_damage_is_refused_by_name(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    for name in ("manifest.json", "study.db", "screen.db", "final.json"):
        copy = Path(shutil.copytree(run, tmp_path / name.partition(".")[0]))
        content = (copy / name).read_bytes()
        for extra in copy.glob(f"{name}-*"):
            extra.unlink()
        (copy / name).write_bytes(b"x" * 100 + content[100 : len(content) // 2])
        assert main(["resume", str(copy), "--quiet"]) == 2, name
        error = capsys.readouterr().err
        assert str(copy / name) in error
        assert "damaged" in error or "not what was written" in error


def test_what_is_searched_cannot_change_on_resume(run: Path) -> None:
    with pytest.raises(ConfigError, match="seed cannot change"):
        search.resume(run, ["seed=3"])
    facts = manifest.read(run / "manifest.json")
    with pytest.raises(DamagedFile):
        manifest.write(run / "broken.json", {"status": facts["status"]})
        manifest.read(run / "broken.json")


def adapted(image_channels: int, image_size: int, classes: int) -> SearchSpace:
    """An image classifier with an adapter of some rank. Size: 3."""
    space = SearchSpace("adapted")
    h = space.input("image", torch.zeros(2, image_channels, image_size, image_size), {0: "batch"})
    h = space.add("flat", Op(nn.Flatten), h)
    ranks = [Lora(rank=Choice("rank", [1, 2, 4]))]
    space.output(space.add("head", Op(nn.Linear, out_features=classes), h, transforms=ranks))
    return space


def blind(model: nn.Module, batch: object) -> float:
    """A proxy that judges nothing."""
    raise NotFinite("blind is nan")


ADAPTED = {
    "space": f"{__name__}:adapted",
    "task": "digits_images",
    "train": {"epochs": 1},
    "search": {"sampler": "random", "trials": 2, "workers": 0, "baseline": False},
    "export": ["safetensors"],
}


@pytest.mark.parametrize("proxy", ["snip", "synflow"])
@pytest.mark.parametrize("more", [{}, {"supernet": {"policy": "uniform", "epochs": 1}}])
def test_proxies_that_cannot_judge_new_adapters_are_refused_at_the_start(
    proxy: str, more: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    screening = {"candidates": 3, "proxies": [proxy, "grad_norm"], "keep": 2}
    values: dict[str, object] = {**ADAPTED, **more, "screen": screening}
    if more:
        values["search"] = {"trials": 2, "workers": 0, "baseline": False, "score": "supernet"}
    config = write(tmp_path / "config.yaml", values)
    assert main(["search", str(config), "--out", str(tmp_path / "run"), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"nasgraph: screen: {proxy} cannot judge the adapter 'head.") and said.count("\n") == 1
    assert "grad_norm" in said and not (tmp_path / "run").exists()
    beside = {**screening, "rank_by": ["grad_norm"]}
    if not more:
        assert search.start(parse({**values, "screen": beside}), tmp_path / "run", quiet=True) == 0
        assert all(proxy in row.info["missing"] for row in Run.open(tmp_path / "run").screened())


def test_a_screen_that_ranks_nothing_stops_the_search(tmp_path: Path) -> None:
    screening = {"candidates": 3, "proxies": [f"{__name__}:blind"], "keep": 2}
    with pytest.raises(SearchStopped, match="each of its 3 candidates failed: not_finite: .*blind is nan.*rank_by"):
        search.start(parse({**ADAPTED, "screen": screening}), tmp_path / "run", quiet=True)
    assert not Run.open(tmp_path / "run").records("search")
