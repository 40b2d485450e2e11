"""Who may import whom, what must stay light, and that nothing we read can run code."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CATALOGUES = ("search_spaces", "predictors")
LIGHT = ("__init__", "errors", "registry", "config", "cli", "declare", "space", "counting", "canonical")
HEAVY = {
    *("torch", "torch_geometric", "torchvision", "transformers", "peft", "torchao", "sklearn", "scipy", "pandas"),
    *("ray", "optuna", "sqlalchemy", "plotly", "moocore", "onnx", "onnxscript", "onnxruntime", "networkx"),
}


def files(*folders: str) -> dict[str, Path]:
    """Module name -> file of the packages as they are installed; the symlinks of the working tree are not followed."""
    found = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT)
            if folder == "nasgraph" and inner.parts[1] in CATALOGUES:
                continue
            module = ".".join(inner.with_suffix("").parts).removesuffix(".__init__")
            found[module if folder == "nasgraph" else f"nasgraph.{module}"] = path
    assert found, f"no Python file in {folders}"
    return found


ENGINE = files("nasgraph")
PLUGINS = files(*CATALOGUES)
EVERYTHING = {**ENGINE, **PLUGINS}


def imports(module: str, path: Path | None = None, text: str | None = None, lazy: bool = True) -> set[str]:
    """Full names that a module imports, ``a.b.c`` for ``from a.b import c``; those of ``if TYPE_CHECKING`` left out.

    ``lazy=False`` leaves out what functions import when they are called.
    """
    tree = ast.parse(path.read_text(encoding="utf-8") if path else text or "")
    package = module if path and path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                walk(child)
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not lazy:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            found.update(f"{base}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(tree)
    return found


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def own_modules(module: str) -> set[str]:
    """The nasgraph modules that a module imports, at any time."""
    found = set()
    for name in imports(module, EVERYTHING[module]):
        if inside(name, "nasgraph"):
            found.add(name if name in EVERYTHING else name.rpartition(".")[0])
    return found


def test_the_reader_of_imports_sees_every_form() -> None:
    text = """
import a, b.c as d
from .sister import x
from .. import aunt
if TYPE_CHECKING:
    import hidden
else:
    import shown
class C:
    import in_class
def f():
    from late import y
try:
    import tried
except ImportError:
    pass
"""
    always = {"a", "b.c", "nasgraph.tasks.sister.x", "nasgraph.aunt", "shown", "in_class", "tried"}
    assert imports("nasgraph.tasks.node", text=text, lazy=False) == always
    assert imports("nasgraph.tasks.node", text=text) == always | {"late.y"}


def test_the_files_are_those_that_we_mean() -> None:
    assert {"nasgraph", "nasgraph.errors", "nasgraph.space", "nasgraph.build"} <= set(ENGINE)
    assert {"nasgraph.search_spaces", "nasgraph.predictors", "nasgraph.predictors.zero_cost"} <= set(PLUGINS)
    assert not set(ENGINE) & set(PLUGINS)


@pytest.mark.parametrize("module", ENGINE)
def test_the_engine_never_imports_the_catalogues(module: str) -> None:
    forbidden = tuple(f"nasgraph.{name}" for name in CATALOGUES)
    assert not [name for name in imports(module, ENGINE[module]) if inside(name, *forbidden, *CATALOGUES)]
    tree = ast.parse(ENGINE[module].read_text(encoding="utf-8"))
    named = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not [text for text in named if inside(text.partition(":")[0], *forbidden)]  # importlib.import_module("...")


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("nasgraph.errors", set()),
        ("nasgraph.registry", {"nasgraph.errors"}),
        ("nasgraph.config", {"nasgraph", "nasgraph.errors", "nasgraph.registry"}),
        ("nasgraph.declare", {"nasgraph.errors"}),
        # canonical, counting and model_space: at call time only, see below; transforms: for type checkers
        (
            "nasgraph.space",
            {
                *("nasgraph.errors", "nasgraph.declare", "nasgraph.canonical", "nasgraph.counting"),
                *("nasgraph.model_space", "nasgraph.transforms", "nasgraph.tryout"),
            },
        ),
        ("nasgraph.counting", {"nasgraph.errors", "nasgraph.declare", "nasgraph.space"}),
        ("nasgraph.canonical", {"nasgraph.errors", "nasgraph.declare", "nasgraph.space"}),
        ("nasgraph.ops", {"nasgraph.errors"}),
        ("nasgraph.build", {"nasgraph.errors", "nasgraph.space", "nasgraph.canonical", "nasgraph.ops"}),
        ("nasgraph.pareto", {"nasgraph.errors"}),
        ("nasgraph.tasks.batch", {"nasgraph.errors"}),
    ],
)
def test_the_core_imports_only_what_lies_below_it(module: str, allowed: set[str]) -> None:
    assert own_modules(module) <= allowed


def test_space_imports_what_lies_above_it_only_when_called() -> None:
    at_once = imports("nasgraph.space", ENGINE["nasgraph.space"], lazy=False)
    below = ("nasgraph.errors", "nasgraph.declare")
    assert not [name for name in at_once if inside(name, "nasgraph") and not inside(name, *below)]


def test_config_dies_at_the_command_line() -> None:
    names = ("cli", "search", "run", "workers", "pretraining", "rank", "warm_start", "catalogue", "doctor", "config")
    top = {f"nasgraph.{name}" for name in names}
    assert {module for module in EVERYTHING if "nasgraph.config" in own_modules(module)} <= top


@pytest.mark.parametrize("module", [module for module in PLUGINS if inside(module, "nasgraph.predictors.zero_cost")])
def test_a_proxy_sees_a_module_and_a_batch(module: str) -> None:
    below = ("nasgraph.errors", "nasgraph.tasks.batch", "nasgraph.predictors", "nasgraph.transforms")
    assert not [name for name in own_modules(module) if not inside(name, *below)]


@pytest.mark.parametrize("module", [module for module in PLUGINS if inside(module, "nasgraph.search_spaces")])
def test_a_space_declares_and_runs_nothing(module: str) -> None:
    below = ["nasgraph.errors", "nasgraph.space", "nasgraph.ops", "nasgraph.search_spaces", "nasgraph.transforms"]
    over_a_model = [f"nasgraph.search_spaces.lora_{name}" for name in ("digits", "text")]
    if inside(module, *over_a_model):  # a model that something has to train
        below += ["nasgraph.pretrained", "nasgraph.tasks.text", "nasgraph.tasks.adapted_text", "nasgraph.training.loop"]
    assert not [name for name in own_modules(module) if not inside(name, *below)]


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy(name: str) -> None:
    module = "nasgraph" if name == "__init__" else f"nasgraph.{name}"
    found = imports(module, ENGINE[module], lazy=False)
    assert not [heavy for heavy in found if heavy.partition(".")[0] in HEAVY]


def test_space_and_canonical_never_import_torch() -> None:
    for module in ("nasgraph.space", "nasgraph.canonical"):
        assert not [name for name in imports(module, ENGINE[module]) if inside(name, "torch", "torch_geometric")]


def loaded_after(statement: str, folder: Path) -> set[str]:
    """Top-level modules in ``sys.modules`` of a new interpreter after a statement."""
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_loaded_after_sees_what_is_loaded(tmp_path: Path) -> None:
    assert "networkx" in loaded_after("import networkx", tmp_path)
    assert not loaded_after("pass", tmp_path) & HEAVY


def test_light_modules_load_nothing_heavy(tmp_path: Path) -> None:
    statement = ";".join(f"import nasgraph.{name}" for name in LIGHT if name != "__init__")
    assert not loaded_after(statement, tmp_path) & HEAVY


@pytest.mark.parametrize("arguments", [["search", "absent.yaml"], ["search", "wrong.yaml"]])
def test_a_bad_config_is_answered_before_anything_heavy_is_loaded(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("space: gnn_nod\ntask: digits_knn\n")
    assert not loaded_after(f"from nasgraph import cli\nassert cli.main({arguments}) == 2", tmp_path) & HEAVY


# --- nothing that is read can run code

UNSAFE = {
    *("eval", "exec", "compile", "__import__"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads", "dill.load"),
    *("dill.loads", "joblib.load", "marshal.load", "marshal.loads", "shelve.open", "pandas.read_pickle"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"),
    *("yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader"),
    *("torch.load", "numpy.load", "os.system", "os.popen"),
}


def unsafe(text: str) -> Iterator[str]:
    """``line: name`` for each use of something that can run code from data, whatever it was imported as.

    ``torch.load(..., weights_only=True)`` and ``numpy.load(..., allow_pickle=False)`` are safe.
    """
    tree = ast.parse(text)
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            known.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})

    def full(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            inner = full(node.value)
            return f"{inner}.{node.attr}" if inner else ""
        return known.get(node.id, node.id) if isinstance(node, ast.Name) else ""

    safe: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            constants = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            name = full(node.func)
            if (name == "torch.load" and constants.get("weights_only") is True) or (
                name == "numpy.load" and constants.get("allow_pickle") is False
            ):
                safe.add(id(node.func))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and id(node) not in safe:
            name = full(node)
            if name in UNSAFE or name == "torch.jit" or name.startswith("torch.jit."):
                yield f"{node.lineno}: {name}"
        if isinstance(node, ast.keyword) and node.arg in ("shell", "allow_pickle", "trust_remote_code"):
            if isinstance(node.value, ast.Constant) and node.value.value is False:
                continue
            yield f"{node.value.lineno}: {node.arg}="


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "run = exec",
        "import pickle\npickle.loads(b'')",
        "from pickle import load as read\nread(f)",
        "import pickle as p\np.Unpickler(f).load()",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "import torch\ntorch.load('a')",
        "import torch\ntorch.load('a', weights_only=False)",
        "import torch\ntorch.jit.script(f)",
        "from torch import jit\njit.trace(f)",
        "from torch.jit import script\nscript(f)",
        "import numpy as np\nnp.load('a', allow_pickle=True)",
        "import numpy as np\nnp.load('a')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import os\nos.system('ls')",
    ],
)
def test_unsafe_code_would_be_found(text: str) -> None:
    assert list(unsafe(text))


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "import re\nre.compile('a')",
        "import pickle\npickle.dumps(1)",
        "import yaml\nyaml.safe_load('a')",
        "import torch\ntorch.load('a', weights_only=True)",
        "import numpy as np\nnp.load('a', allow_pickle=False)",
        "import json\njson.loads('1')",
    ],
)
def test_safe_code_is_left_alone(text: str) -> None:
    assert not list(unsafe(text))


# Not files that a user could be handed, but what our own processes tell each other.
OWN_PROCESSES = {
    "nasgraph.testing": {"pickle.loads"},  # the exams pickle an object and take it back
    "nasgraph.executors": {"pickle.loads"},  # a pipe between a parent and the child that it started
}


@pytest.mark.parametrize("module", EVERYTHING)
def test_no_file_that_we_read_can_run_code(module: str) -> None:
    found = list(unsafe(EVERYTHING[module].read_text(encoding="utf-8")))
    assert not [line for line in found if line.partition(": ")[2] not in OWN_PROCESSES.get(module, set())]


def test_the_exceptions_are_needed() -> None:
    for module, names in OWN_PROCESSES.items():
        found = {line.partition(": ")[2] for line in unsafe(EVERYTHING[module].read_text(encoding="utf-8"))}
        assert found == names, module
