"""A wrong config costs one line that names the key and the way out, before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from nasgraph import config
from nasgraph.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SOUND = {"space": "gnn_node", "task": "digits_knn"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_that_we_ship_are_valid(path: Path) -> None:
    assert config.load(path).space.name


def test_defaults_and_short_forms() -> None:
    found = config.parse(SOUND)
    assert (found.space.name, found.space.arguments) == ("gnn_node", {})
    assert found.search.sampler.name == "nsga2"
    assert found.screen is None


def test_plugin_arguments_are_kept() -> None:
    found = config.parse({"space": {"name": "gnn_node", "layers": 4}, "task": "digits_knn"})
    assert found.space.arguments == {"layers": 4}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spce": 1}, "unknown key 'spce'. Did you mean 'space'?"),
        ({"search": {"trails": 3}}, "unknown key 'search.trails'. Did you mean 'trials'?"),
        ({"search": {"trials": "many"}}, "'search.trials': input should be a valid integer"),
        ({"search": {"trials": 0}}, "'search.trials': input should be greater than or equal to 1, got 0"),
        ({"train": {"lr": -1}}, "'train.lr': input should be greater than 0"),
        ({"space": "gnn_nod"}, "unknown space 'gnn_nod'. Did you mean 'gnn_node'?"),
        ({"task": "digits"}, "unknown task 'digits'. Did you mean 'digits_knn'?"),
        ({"objectives": ["val_acuracy"]}, "unknown objective 'val_acuracy'. Did you mean 'val_accuracy'?"),
        ({"objectives": ["params", "params"]}, "'objectives': named twice"),
        ({"search": {"sampler": "nsga"}}, "unknown sampler 'nsga'. Did you mean 'nsga2'?"),
        ({"screen": {"proxies": ["gradsin"]}}, "unknown proxy 'gradsin'. Did you mean 'gradsign'?"),
        ({"screen": {"proxies": ["snip"], "rank_by": ["zico"]}}, "screen.rank_by: 'zico' is not in screen.proxies"),
        ({"limits": {"parms": 3}}, "limits: 'parms' is not an objective. Did you mean 'params'?"),
        ({"export": ["onx"]}, "unknown exporter 'onx'. Did you mean 'onnx'?"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.parse({**SOUND, **change}, "my.yaml")
    assert str(error.value).startswith("my.yaml: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_that_is_not_in_this_folder_is_called_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="One is installed with nasgraph: give its name, 'prune_cnn'"):
        config.load(Path("configs/prune_cnn.yaml"))
    with pytest.raises(ConfigError, match=r"no config no/such.yaml. There are: .*quickstart"):
        config.load(Path("no/such.yaml"))
    with pytest.raises(ConfigError, match="Did you mean 'prune_cnn'"):
        config.load(Path("prun_cnn"))


def test_missing_key_and_missing_file_and_bad_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'task' is missing"):
        config.parse({"space": "gnn_node"})
    (tmp_path / "cora.yaml").write_text("space: [\n")
    with pytest.raises(ConfigError, match=r"cora.yaml line \d: not valid YAML"):
        config.load(tmp_path / "cora.yaml")
    with pytest.raises(ConfigError, match="Did you mean '.*cora.yaml'"):
        config.load(tmp_path / "cor.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="a mapping of keys is needed"):
        config.load(tmp_path / "list.yaml")


def test_overrides_reach_nested_keys_and_turn_short_forms_long() -> None:
    values = config.override(SOUND, ["search.trials=7", "space.layers=4", "train={lr: 0.1}", "search.sampler=tpe"])
    found = config.parse(values)
    assert found.search.trials == 7
    assert found.space.arguments == {"layers": 4}
    assert found.train.lr == 0.1
    assert found.search.sampler.name == "tpe"
    assert SOUND == {"space": "gnn_node", "task": "digits_knn"}, "the caller's values are left alone"
    with pytest.raises(ConfigError, match="write key=value"):
        config.override(SOUND, ["search.trials"])


def test_help_and_config_errors_do_not_import_torch() -> None:
    code = (
        "import sys; from nasgraph.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "from nasgraph import config\n"
        "assert main(['search', 'no/such.yaml']) == 2\n"
        "heavy = {'torch', 'optuna', 'ray', 'sklearn', 'torch_geometric', 'plotly', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("nasgraph: there is no config no/such.yaml")
    assert time.monotonic() - start < 30
