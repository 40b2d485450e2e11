"""model.py: what is written is run, in this process, and must give the model's output bit for bit."""

from __future__ import annotations

import ast
import functools
import importlib.util
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasgraph import ops
from nasgraph.build import build
from nasgraph.errors import ExportError
from nasgraph.export import Outgoing
from nasgraph.export.base import grown
from nasgraph.export.code import export, source
from nasgraph.space import Call, Choice, Op, SearchSpace

SCALE = 0.5


def halved(x: Tensor) -> Tensor:
    return F.gelu(x) * SCALE


class Base(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return halved(self.layer(x))


class Mine(Base):
    """A user's own operation, with a base class, a helper function and a constant of its module."""

    def __init__(self, in_features: int, width: int, act: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(in_features, width), act())


class Tied(nn.Module):
    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.there = nn.Linear(in_features, in_features, bias=False)
        self.back = nn.Linear(in_features, in_features, bias=False)
        self.back.weight = self.there.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.back(torch.tanh(self.there(x)))


class GCNConv(nn.Linear):
    """Called like a class of torch_geometric."""


class Model(nn.Linear):
    """Called like the class that is written."""


def two_layers(in_features: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(in_features, width), nn.ReLU(), nn.Linear(width, width))


def graph_space(conv: Op) -> SearchSpace:
    space = SearchSpace("graph")
    x = space.input("x", torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), {0: "nodes"})
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 2]])
    edge_index = space.input("edge_index", edges, {1: "edges"})
    h = space.add("act", Call(torch.relu), space.add("conv", conv, x, edge_index))
    space.output(space.add("head", Op(nn.Linear, out_features=3), h))
    return space


def row_space(*operations: Op) -> SearchSpace:
    """Operations one after the other on rows of 5 numbers."""
    space = SearchSpace("rows")
    node = space.input("x", torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), {0: "batch"})
    for i, operation in enumerate(operations):
        node = space.add(f"step{i}", operation, node)
    space.output(node)
    return space


def image_space() -> SearchSpace:
    space = SearchSpace("images")
    image = space.input("image", torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), {0: "batch"})
    first = space.add("first", Op(nn.Conv2d, out_channels=4, kernel_size=3, padding=1), image)
    norm = space.add("norm", Op(nn.BatchNorm2d), first)
    second = space.add("second", Op(nn.Conv2d, out_channels=4, kernel_size=1), norm)
    mix = space.add("mix", Call(ops.add), space.add("act", Call(F.relu), second), norm)
    pool = space.add("pool", Op(nn.AdaptiveAvgPool2d, output_size=1), mix)
    both = space.add("both", Call(torch.flatten, start_dim=1), pool)
    space.output(space.add("head", Op(nn.Linear, out_features=10), both))
    return space


def outgoing(space: SearchSpace, choices: dict[str, Any] | None = None) -> Outgoing:
    arch = space.architecture(choices or {})
    examples = tuple(
        torch.randn(e.shape, generator=torch.Generator().manual_seed(7)) if e.is_floating_point() else e
        for e in (declared.example for declared in space.inputs.values())
    )
    return Outgoing(build(space, arch).eval(), space, arch, space.key(arch), examples, {"val_accuracy": 0.5})


def imported(path: Path) -> Any:
    name = f"written_{abs(hash(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        module.load().forward(*imported_example(path.parent, module))
    finally:
        del sys.modules[name]
    return module


def imported_example(folder: Path, module: Any) -> list[Tensor]:
    from safetensors.torch import load_file

    example = load_file(folder / "example.safetensors")
    return [example[name] for name in module.Model.forward.__code__.co_varnames[1 : len(example) + 1]]


def written(out: Outgoing, folder: Path) -> str:
    """Write the model, compare the file with it at two sizes, and return the text."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():  # weights and statistics that no constructor makes
        for i, tensor in enumerate(out.model.state_dict().values()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(i)), alpha=0.01)
    path = export(out, folder).path
    text = path.read_text()
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    assert not [module for module in modules if module.partition(".")[0] in ("nasgraph", __name__.partition(".")[0])]
    module = imported(path)
    for inputs in (out.examples, grown(out.examples, out.dynamic)):
        with torch.no_grad():
            expected = out.model(*inputs)
            assert expected.isfinite().all()
            assert torch.equal(module.load()(*inputs), expected)
    return text


def pyg(name: str) -> Any:
    import torch_geometric.nn

    return getattr(torch_geometric.nn, name)


@pytest.mark.parametrize(
    ("conv", "line"),
    [
        (lambda: Op(pyg("GCNConv"), out_channels=8), "self.conv = GCNConv(in_channels=5, out_channels=8)"),
        (
            lambda: Op(pyg("GATConv"), out_channels=4, heads=2),
            "self.conv = GATConv(in_channels=5, out_channels=4, heads=2)",
        ),
        (
            lambda: Op(pyg("GINConv"), nn=Op(two_layers, width=8), train_eps=True),
            "self.conv = GINConv(nn=two_layers(in_features=5, width=8), train_eps=True)",
        ),
        (
            lambda: Op(
                pyg("PNAConv"),
                out_channels=8,
                aggregators=["mean", "max"],
                scalers=["identity", "amplification"],
                deg=(0, 4, 2),
            ),
            None,
        ),
    ],
)
def test_graph_convolutions(conv: Any, line: str | None, tmp_path: Path) -> None:
    if line is None:  # PNAConv wants a tensor, which no line of code can hold: the error says so
        operation = conv()
        operation.kwargs["deg"] = torch.tensor([0, 4, 2])
        with pytest.raises(ExportError, match="node 'conv': an argument of type Tensor cannot be written"):
            source(outgoing(graph_space(operation)))
        return
    text = written(outgoing(graph_space(conv())), tmp_path)
    assert f"        {line}\n" in text
    assert "from torch_geometric.nn import" in text
    assert "conv = self.conv(x, edge_index)\n        act = torch.relu(conv)\n" in text


def test_images(tmp_path: Path) -> None:
    text = written(outgoing(image_space()), tmp_path)
    assert "self.first = nn.Conv2d(in_channels=3, out_channels=4, kernel_size=3, padding=1)" in text
    assert "from torch.nn import functional as F\n" in text
    assert "act = F.relu(second" in text and "mix = act + norm\n" in text
    assert "image (batch, 3, 8, 8) float32" in text


def test_a_users_own_class_is_copied_with_what_it_needs(tmp_path: Path) -> None:
    text = written(outgoing(row_space(Op(Mine, width=7), Op(Mine, width=6, act=nn.ELU))), tmp_path)
    for definition in ("SCALE = 0.5\n", "def halved(", "class Base(nn.Module)", "class Mine(Base)"):
        assert text.count(definition) == 1
    assert "self.step1 = Mine(in_features=7, width=6, act=nn.ELU)" in text
    assert "class Tied" not in text


def test_nasgraphs_own_operations_are_copied(tmp_path: Path) -> None:
    text = written(outgoing(row_space(Op(ops.Zero), Op(nn.Linear, out_features=3))), tmp_path)
    assert "Zero" in text


def test_a_tensor_under_two_names_is_written_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    written(outgoing(row_space(Op(Tied))), tmp_path)
    assert list(load_file(tmp_path / "model.safetensors")) == ["step0.there.weight"]


def test_double_precision(tmp_path: Path) -> None:
    out = outgoing(row_space(Op(nn.Linear, out_features=4), Op(nn.BatchNorm1d)))
    doubled = Outgoing(out.model.double(), out.space, out.architecture, out.key, (out.examples[0].double(),))
    assert "nn.Linear(in_features=5, out_features=4).to(torch.float64)" in written(doubled, tmp_path)


def test_a_class_called_like_one_of_torch_geometric(tmp_path: Path) -> None:
    space = graph_space(Op(pyg("GCNConv"), out_channels=8))
    text = written(outgoing(space), tmp_path / "theirs")
    assert "class GCNConv" not in text
    space = SearchSpace("both")
    x = space.input("x", torch.randn(4, 5), {0: "nodes"})
    edge_index = space.input("edge_index", torch.tensor([[0, 1, 2], [1, 2, 3]]), {1: "edges"})
    theirs = space.add("theirs", Op(pyg("GCNConv"), out_channels=8), x, edge_index)
    space.output(space.add("mine", Op(GCNConv, out_features=2), theirs))
    text = written(outgoing(space), tmp_path / "both")
    assert "self.theirs = torch_geometric.nn.GCNConv(" in text
    assert "self.mine = GCNConv(" in text


def test_a_class_called_like_the_one_written_is_refused() -> None:
    with pytest.raises(ExportError, match="two different things are called 'Model'"):
        source(outgoing(row_space(Op(Model, out_features=2))))


def test_a_class_inside_a_function_is_refused() -> None:
    class Local(nn.Linear):
        pass

    out = outgoing(row_space(Op(Model, out_features=2)))
    out.model.meta["calls"]["step0"] = type(out.model.meta["calls"]["step0"])(Local, {})
    with pytest.raises(ExportError, match="Local is defined inside a function"):
        source(out)


def test_values_of_many_kinds(tmp_path: Path) -> None:
    text = written(
        outgoing(
            row_space(
                Op(functools.partial(nn.Linear, bias=False), out_features=4),
                Op(nn.Hardtanh, min_val=-0.25, max_val=float("inf")),
                Call(operator_heavy),
            )
        ),
        tmp_path,
    )
    assert "nn.Linear(in_features=5, out_features=4, bias=False)" in text
    assert 'max_val=float("inf")' in text


def operator_heavy(x: Tensor) -> Tensor:
    a = (-2) * x + 1 - x / 3
    b = x[:, 1:].sum(dim=-1, keepdim=True) ** 2
    return torch.where(a > b, -a, (a // 1).clamp(min=-1.0)).to(torch.float32) @ torch.ones_like(x).t()


def test_long_lines_are_broken(tmp_path: Path) -> None:
    names = {"alpha" * 5: 1.0, "beta, (" * 5: 2.0}
    text = written(outgoing(row_space(Op(Wordy, first_argument=names, second_argument=list(range(20))))), tmp_path)
    assert max(map(len, text.splitlines())) <= 120


class Wordy(nn.Module):
    def __init__(self, first_argument: dict[str, float], second_argument: list[int]) -> None:
        super().__init__()
        self.scale = sum(first_argument.values()) + sum(second_argument)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_names_of_the_file_and_of_python_as_names_of_nodes(tmp_path: Path) -> None:
    space = SearchSpace("names")
    x = space.input("input", torch.randn(4, 5), {0: "batch"})
    first = space.add("torch", Op(nn.Linear, out_features=4), x)
    second = space.add("halved", Op(Mine, width=4), first)
    space.output(space.add("sum", Call(ops.add), second, space.add("max", Op(nn.ReLU), first)))
    text = written(outgoing(space), tmp_path)
    assert "def forward(self, input: Tensor) -> Tensor:" in text
    assert "torch_ = self.torch(input)" in text


def test_the_docstring_survives_quotes_and_backslashes(tmp_path: Path) -> None:
    out = outgoing(row_space(Op(nn.Linear, out_features=2)))
    odd = Outgoing(out.model, out.space, out.architecture, out.key, out.examples, {"note": 'a """ b \\x \\'})
    assert 'note: a """ b \\x \\\n' in (ast.get_docstring(ast.parse(written(odd, tmp_path))) or "")


LAB = {
    "__init__.py": "",
    "layers.py": '''
        from __future__ import annotations

        import math as m
        from dataclasses import dataclass
        from typing import TYPE_CHECKING

        from torch import nn

        from nasgraph.ops import add as plus

        from . import helpers  # noqa: F401
        from .helpers import *
        from .helpers import marked

        if TYPE_CHECKING:
            from optuna import Trial

        try:
            import not_installed_at_all
        except ImportError:
            not_installed_at_all = None


        @dataclass
        class Settings:
            slope: float = m.pi


        @marked
        class Block(nn.Module):
            """Text with accents: é."""

            def __init__(self, in_features: int, trial: Trial | None = None):
                super().__init__()
                from .helpers import LIMITS as bounds, deep
                self.bounds = bounds
                self.linear = nn.Linear(in_features, deep(in_features))

            def forward(self, x):
                if not_installed_at_all is not None:
                    return x
                y = self.linear(x) * Settings().slope
                return plus(y, starred(x)).clamp(*self.bounds)
    ''',
    "helpers.py": """
        import functools

        LIMITS: tuple = (
            -1.5,
            2.5,
        )

        def marked(cls):
            cls.mark = True
            return cls

        @functools.lru_cache
        def deep(n): return n if n < 1 else deep(n - 1) + 1

        def starred(x):
            from nasgraph.ops import maximum
            return maximum(x, -x)

        unused = open("/nonexistent") if False else None
    """,
}


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    package = tmp_path / "site" / "lab"
    package.mkdir(parents=True)
    for name, text in LAB.items():
        (package / name).write_text(textwrap.dedent(text), encoding="utf-8")
    monkeypatch.syspath_prepend(str(package.parent))
    import lab.layers  # type: ignore[import-not-found]

    yield lab.layers
    for name in [name for name in sys.modules if name.partition(".")[0] == "lab"]:
        del sys.modules[name]


def test_a_users_package_with_every_kind_of_import(lab: Any, tmp_path: Path) -> None:
    text = written(outgoing(row_space(Op(lab.Block))), tmp_path / "out")
    assert "import math as m" in text
    assert "plus = add" in text
    assert "bounds = LIMITS" in text
    assert "Trial" not in text.replace("trial: Trial", "")
    assert "unused" not in text
    assert "lab" not in {word.partition(".")[0] for word in text.split()}


def test_the_file_runs_alone(lab: Any, tmp_path: Path) -> None:
    out = outgoing(row_space(Op(lab.Block), Op(Mine, width=3)))
    written(out, tmp_path / "out")
    block = "import runpy, sys; sys.modules.update(nasgraph=None, lab=None)"
    script = f"{block}; runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-I", "-c", script, str(tmp_path / "out" / "model.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout == "output (4, 3)\n", done.stderr


def test_random_gnns_are_written_exactly(tmp_path: Path) -> None:
    from nasgraph.search_spaces.gnn_node import gnn_node

    space = gnn_node(9, 4, degrees=[0, 2, 3, 4, 1])
    rng = random.Random(0)
    seen = set()
    for i in range(30):
        arch = space.sample(rng)
        seen.update(value for name, value in arch.items() if name.startswith("conv"))
        written(outgoing(space, choices=dict(arch)), tmp_path / str(i))
    assert len(seen) == 13  # all convolutions, and skip


def test_random_cells_are_written_exactly(tmp_path: Path) -> None:
    from nasgraph.search_spaces.nasbench201 import nasbench201

    space = nasbench201(channels=2)
    rng = random.Random(0)
    for i in range(4):
        written(outgoing(space, choices=dict(space.sample(rng))), tmp_path / str(i))


def test_choices_are_in_the_docstring(tmp_path: Path) -> None:
    width = Choice("width", [2, 4], ordered=True)
    space = row_space(Op(nn.Linear, out_features=width))
    assert "Choices: width=4" in written(outgoing(space, choices={"width": 4}), tmp_path)
