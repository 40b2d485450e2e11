"""A search that scores by a supernet: what it leaves, kill and resume in each phase, NaN, fine-tuning, bad input."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nasgraph import manifest, pretraining, search
from nasgraph.cli import main
from nasgraph.config import Config, parse
from nasgraph.errors import ConfigError, DamagedFile, SpaceError
from nasgraph.objectives import Scored
from nasgraph.run import Run
from nasgraph.supernet import Supernet
from nasgraph.training.fewshot import FewShot
from nasgraph.workers import Worker, parts

TINY = {
    "space": {"name": "gnn_node", "layers": 1, "widths": [8, 16]},
    "task": "digits_knn",
    "train": {"lr": 0.02},
    "supernet": {"policy": "uniform", "epochs": 12, "lr": 0.02, "checkpoint_every": 3},
    "search": {"score": "supernet", "trials": 10, "workers": 0, "finetune": 4},
    "final": {"top": 1, "seeds": 2},
    "export": ["safetensors"],
}


def tiny(**changes: object) -> Config:
    return parse({**TINY, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert search.start(tiny(), folder, quiet=True) == 0
    return folder


@pytest.fixture(scope="module")
def supernet(run: Path) -> Supernet:
    made = parts(tiny())
    return Supernet.load(run / "supernet", made.space, made.task)


def results(folder: Path) -> list[tuple[object, ...]]:
    """All that a search found, without wall times."""
    run = Run.open(folder)
    trials = [(n, r.number, r.state, r.arch, r.key, r.values) for n in ("search", "random") for r in run.records(n)]
    return [*trials, *sorted((key, final.values) for key, final in run.finals.items())]


def test_trials_are_scored_by_the_supernet_and_nothing_is_trained(run: Path, supernet: Supernet) -> None:
    for name in ("search", "random"):
        records = Run.open(run).records(name)
        assert len(records) == 10
        for record in records:
            assert record.values == {
                "val_accuracy": supernet.evaluate([record.arch])[0],
                "params": supernet.params(record.arch),
            }
            assert "train_seconds" not in record.info


def test_a_run_leaves_the_supernet_and_says_what_it_is(run: Path, supernet: Supernet) -> None:
    facts = manifest.read(run / "manifest.json")
    about = facts["supernet"]
    assert supernet.step == about["steps"] == 12
    assert (about["policy"], about["steps_per_epoch"]) == ("uniform", 1)
    assert facts["seconds"]["supernet"] > 0
    for name, digest in about["sha256"].items():
        assert manifest.sha256(run / "supernet" / name) == digest
    rows = pretraining.read_history(run / "supernet")
    assert [row[0] for row in rows] == list(range(1, 13))
    assert rows[-1][1] == about["loss"]
    page = (run / "report.html").read_text()
    assert 'id="plot-supernet"' in page and "estimate" in page


def test_the_front_is_fine_tuned_and_never_worse_than_extracted(run: Path, supernet: Supernet) -> None:
    opened = Run.open(run)
    assert opened.chosen()
    for record in opened.chosen():
        final = opened.finals[record.key]
        assert final.values["extracted_val_accuracy"] == record.values["val_accuracy"]
        assert final.values["val_accuracy"] >= record.values["val_accuracy"]
        assert final.info["seeds"] == 2
        weights = load_file(run / "models" / record.key / "model.safetensors")
        extracted = supernet.extract(record.arch).state_dict()
        tuned = not all(torch.equal(weights[name], tensor) for name, tensor in extracted.items())
        assert tuned == (final.info["kept"] == "fine-tuned")


def test_without_fine_tuning_the_export_is_the_extraction(run: Path, supernet: Supernet, tmp_path: Path) -> None:
    record = Run.open(run).chosen()[0]
    settings = tiny(search={**TINY["search"], "finetune": 0})  # type: ignore[dict-item]
    payload = {"architecture": dict(record.arch), "folder": str(tmp_path / "model"), "metadata": {}}
    result = Worker(settings, run / "supernet")(("finish", payload))
    assert isinstance(result, Scored), result
    assert result.values["val_accuracy"] == result.values["extracted_val_accuracy"] == record.values["val_accuracy"]
    assert (result.info["seeds"], result.info["kept"]) == (1, "as extracted")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    expected = dict(supernet.extract(record.arch).named_parameters())
    assert expected and all(torch.equal(weights[name], parameter) for name, parameter in expected.items())


def test_export_by_key_does_what_the_final_phase_does(run: Path, tmp_path: Path) -> None:
    key = Run.open(run).chosen()[0].key
    out = tmp_path / "best"
    assert main(["export", str(run), "--key", key[:12], "--out", str(out)]) == 0
    ours, theirs = load_file(out / "model.safetensors"), load_file(run / "models" / key / "model.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


KILLS = """
import os, signal
from pathlib import Path
from nasgraph.objectives import Objective
from nasgraph.training.policies import Uniform

def once(name):
    if not Path(name).exists():
        Path(name).touch()
        os.kill(os.getpid(), signal.SIGKILL)

class Kills(Uniform):
    def sample(self, step, rng):
        if step == 8:
            once("killed_in_training")
        return super().sample(step, rng)

calls = 0

def measure(candidate):
    global calls
    calls += 1
    if calls == 7:
        once("killed_in_study")
    return float(candidate.params)

size = Objective("size", "minimize", measure)
"""


def test_kill_and_resume_give_the_uninterrupted_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("users_kills.py").write_text(KILLS)
    learner = {**TINY["supernet"], "policy": "users_kills:Kills"}  # type: ignore[dict-item]
    values = {**TINY, "supernet": learner, "objectives": ["val_accuracy", "users_kills:size"], "export": []}
    Path("tiny.yaml").write_text(json.dumps(values))
    command = [sys.executable, "-m", "nasgraph.cli"]
    for arguments, mark in (("search tiny.yaml --out killed", "training"), ("resume killed", "study")):
        done = subprocess.run([*command, *arguments.split(), "--quiet"], check=False, timeout=200, capture_output=True)
        assert done.returncode == -9, done.stderr
        assert Path(f"killed_in_{mark}").exists()
        assert len(list(Path("killed/supernet").glob("*.safetensors"))) == 1
        assert Path("killed/study.db").exists() == (mark == "study")
    assert len(Run.open(Path("killed")).records("search")) == 6
    assert main(["resume", "killed", "--quiet"]) == 1  # no format, so nothing was exported
    assert main(["search", "tiny.yaml", "--out", "whole", "--quiet"]) == 1
    assert results(Path("killed")) == results(Path("whole"))
    killed, whole = (manifest.read(Path(name) / "manifest.json")["supernet"] for name in ("killed", "whole"))
    assert {n for n in killed["sha256"] if n.endswith("tensors")} == {n for n in whole["sha256"] if "tensors" in n}
    assert Path("killed/supernet/history.csv").read_bytes() == Path("whole/supernet/history.csv").read_bytes()


def test_nan_stops_with_step_path_and_the_last_good_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "nan.yaml"
    config.write_text(json.dumps({**TINY, "supernet": {"epochs": 50, "lr": 1e30, "checkpoint_every": 1}}))
    out = tmp_path / "out"
    assert main(["search", str(config), "--out", str(out), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "step 1: the loss of {" in error and '"conv1"' in error
    assert f"the last good checkpoint is kept in {out / 'supernet'}" in error
    assert manifest.read(out / "manifest.json")["status"] == "stopped"
    assert not (out / "study.db").exists()
    made = parts(tiny())
    kept = Supernet.load(out / "supernet", made.space, made.task)
    assert kept.step == 1
    assert all(bool(parameter.isfinite().all()) for parameter in kept.parameters())


def test_a_relaxation_proposes_the_first_trial_once(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "relaxed"
    small = {**TINY["search"], "trials": 3, "baseline": False}  # type: ignore[dict-item]
    settings = tiny(differentiable={"method": "tangle", "steps": 2}, search=small, export=[])
    search.start(settings, folder, quiet=True)
    found = manifest.read(folder / "manifest.json")["differentiable"]
    assert found["method"] == "tangle"
    assert dict(Run.open(folder).records("search")[0].arch) == found["architecture"]
    tensors = [{path.name for path in (place / "supernet").glob("*.safetensors")} for place in (run, folder)]
    assert tensors[0] == tensors[1]  # it searched in a copy
    search.resume(folder, ["search.trials=5"], quiet=True)
    assert len(Run.open(folder).records("search")) == 5
    assert manifest.read(folder / "manifest.json")["differentiable"] == found


def test_another_supernet_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    made = parts(tiny())
    other = parts(tiny(space={"name": "gnn_node", "layers": 1, "widths": [8, 32]}))
    Supernet(other.space, other.task).save(tmp_path / "supernet")
    with pytest.raises(SpaceError, match=r"supernet is of space 'gnn_node' with other choices"):
        pretraining.begin(tiny(), made.space, made.task, tmp_path / "supernet")
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    Supernet(made.space, made.task, seed=1).save(copy / "supernet")
    with pytest.raises(DamagedFile, match="is not what this run trained"):
        search.resume(copy, quiet=True)
    with pytest.raises(DamagedFile, match="is not what this run trained"):
        search.export(copy, "k1-", None, tmp_path / "out")
    shutil.rmtree(copy / "supernet")
    with pytest.raises(DamagedFile, match="is not what this run trained"):
        search.resume(copy, quiet=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"supernet": {"policy": "sandwhich"}}, "unknown policy 'sandwhich'. Did you mean 'sandwich'?"),
        ({"supernet": None}, "search.score is supernet, but there is no section supernet"),
        ({"search": {}}, "supernet: nothing asks it: set search.score to supernet"),
        ({"supernet": None, "search": {"finetune": 3}}, "search.finetune: only networks of a supernet"),
        ({"supernet": None, "search": {}, "differentiable": {"method": "tangle"}}, "differentiable: it searches in"),
        ({"differentiable": {"method": "tangl"}}, "unknown relaxation 'tangl'. Did you mean 'tangle'?"),
        ({"supernet": {"epoch": 3}}, "unknown key 'supernet.epoch'. Did you mean 'epochs'?"),
        ({"supernet": {"reduction": "max"}}, "'supernet.reduction': input should be 'sum' or 'mean'"),
    ],
)
def test_a_wrong_key_is_named_before_anything_is_made(change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(**change)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("learner", "said"),
    [
        ({"policy": {"name": "sandwich", "m": 2}}, "policy 'sandwich' has no argument 'm'"),
        ({"policy": "uniform", "distill": "kl"}, "policy 'uniform' has no argument 'distill'"),
        ({"policy": "os:getcwd_of_nobody"}, "os has no getcwd_of_nobody"),
        ({"policy": "uniform", "optimizer": "adm"}, "Did you mean 'adam'?"),
    ],
)
def test_a_policy_that_cannot_be_made_leaves_no_folder(learner: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        search.start(tiny(supernet=learner), tmp_path / "out", quiet=True)
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_was_trained_cannot_change_on_resume(run: Path) -> None:
    for key in ("supernet.epochs=20", "supernet.lr=0.1", "search.finetune=3", "search.score=train"):
        with pytest.raises(ConfigError, match="cannot change when a run goes on"):
            search.resume(run, [key], quiet=True)


def test_epochs_are_passes_over_the_training_set(tmp_path: Path) -> None:
    settings = tiny(supernet={**TINY["supernet"], "batch": 60, "epochs": 2})  # type: ignore[dict-item]
    made = parts(settings)
    learner = pretraining.begin(settings, made.space, made.task, tmp_path / "supernet")
    assert (learner.epoch, learner.steps) == (4, 8)  # 200 labelled nodes
    notes: list[str] = []
    learner.train(notes.append)
    assert len(notes) == learner.supernet.step == 8
    with (tmp_path / "supernet" / "history.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 8


def test_a_stopped_training_is_not_taken_for_a_finished_one(tmp_path: Path) -> None:
    settings = tiny()
    made = parts(settings)
    learner = pretraining.begin(settings, made.space, made.task, tmp_path / "supernet")

    def interrupt(note: str) -> None:
        if learner.supernet.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learner.train(interrupt)
    again = pretraining.begin(settings, made.space, made.task, tmp_path / "supernet")
    assert (again.step, again.total, len(again.history)) == (3, 12, 3)


def test_a_split_supernet_scores_by_its_parts_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    split = {"by": "gradients", "repeats": 1, "samples": 40, "epochs": 2}
    search_few = {**TINY["search"], "trials": 4, "baseline": False, "finetune": 1}  # type: ignore[dict-item]
    learner = {"policy": "uniform", "epochs": 2, "checkpoint_every": 1, "split": split}
    settings = tiny(supernet=learner, search=search_few, final={"top": 1, "seeds": 1}, export=[])
    made = parts(settings)
    learning = pretraining.begin(settings, made.space, made.task, Path("stopped"))

    def interrupt(note: str) -> None:
        if learning.step == 4 and learning.parts:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learning.train(interrupt)
    again = pretraining.begin(settings, made.space, made.task, Path("stopped"))
    assert (again.parts is not None, again.step, again.total) == (True, 3, 6)
    again.train(lambda note: None)
    search.start(settings, Path("run"), quiet=True)
    whole = pretraining.load(settings, made.space, made.task, Path("run/supernet"))
    resumed = pretraining.load(settings, made.space, made.task, Path("stopped"))
    assert isinstance(whole, FewShot) and isinstance(resumed, FewShot) and len(whole.leaves) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    for record in Run.open(Path("run")).records("search"):
        assert record.values["val_accuracy"] == whole.evaluate([record.arch])[0]
    about = manifest.read(Path("run/manifest.json"))["supernet"]
    assert about["steps"] == 6 and len(about["splits"]) == 1
    assert [row[0] for row in pretraining.read_history(Path("run/supernet"))] == list(range(1, 7))
