"""The exported folder: every format reloaded in a process without nasgraph, failures recorded, damage found."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nasgraph import ops
from nasgraph.build import build
from nasgraph.errors import ConfigError, DamagedFile, NasgraphError
from nasgraph.export import Exported, Outgoing, Request, Written, export_many, export_model, parity, verify
from nasgraph.export import onnx as onnx_exporter
from nasgraph.export.base import grown, sizes
from nasgraph.space import Call, Choice, Op, SearchSpace

FORMATS = ("code", "safetensors", "torch-export", "onnx")


class Own(nn.Module):
    """A user's own operation."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.linear(x))


def graphs() -> SearchSpace:
    """A node's network: one of four convolutions, then an operation of the user's own."""
    from torch_geometric.nn import MLP, GATConv, GCNConv, GINConv, PNAConv, SAGEConv

    space = SearchSpace("graphs")
    generator = torch.Generator().manual_seed(0)
    x = space.input("x", torch.randn(6, 5, generator=generator), {0: "nodes"})
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 2]])
    edge_index = space.input("edge_index", edges, {1: "edges"})
    mlp = Op(MLP, hidden_channels=8, out_channels=8, num_layers=2, norm=None)
    aggregators, scalers = ["mean", "max", "std"], ["identity", "amplification"]
    convolutions = {
        "gcn": Op(GCNConv, out_channels=8),
        "gat": Op(GATConv, out_channels=4, heads=2),
        "gin": Op(GINConv, nn=mlp),
        "pna": Op(own_pna, out_channels=8, conv=PNAConv, aggregators=aggregators, scalers=scalers),
        "median": Op(SAGEConv, out_channels=8, aggr="median"),
    }
    h = space.add("conv", Choice("conv", convolutions), x, edge_index)
    h = space.add("sum", Call(ops.add), space.add("own", Op(Own), h), h)
    space.output(space.add("head", Op(nn.Linear, out_features=3), space.add("norm", Op(nn.BatchNorm1d), h)))
    return space


def own_pna(in_channels: int, out_channels: int, conv: Any, aggregators: list[str], scalers: list[str]) -> nn.Module:
    made: nn.Module = conv(in_channels, out_channels, aggregators, scalers, deg=torch.tensor([0, 4, 2]))
    return made


def images() -> SearchSpace:
    space = SearchSpace("images")
    image = space.input("image", torch.zeros(2, 3, 8, 8), {0: "batch"})
    first = space.add("first", Op(nn.Conv2d, out_channels=4, kernel_size=3, padding=1), image)
    norm = space.add("norm", Op(nn.BatchNorm2d), first)
    second = space.add("second", Op(nn.Conv2d, out_channels=4, kernel_size=1), norm)
    pool = space.add("pool", Op(nn.AdaptiveAvgPool2d, output_size=2), space.add("sum", Call(ops.add), second, first))
    flat = space.add("flat", Call(torch.flatten, start_dim=1), pool)
    space.output(space.add("head", Op(nn.Linear, out_features=10), flat))
    return space


def rows() -> SearchSpace:
    space = SearchSpace("rows")
    x = space.input("x", torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), {0: "batch"})
    space.output(space.add("head", Op(nn.Linear, out_features=2), space.add("first", Op(nn.Linear, out_features=4), x)))
    return space


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Exported]]]:
    """Five models exported at once, checked with inputs of their own."""
    root = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(1)
    graph = (torch.randn(30, 5, generator=generator), torch.randint(0, 30, (2, 70), generator=generator))
    space = graphs()
    requests = [
        Request(build(space, arch), root / arch["conv"], space, arch, inputs=graph, metrics={"val_accuracy": 0.75})
        for arch in space.enumerate()
    ]
    space = images()
    arch = space.architecture({})
    metadata = {"epochs": 3, "data": {"name": "none"}}
    requests.append(Request(build(space, arch), root / "images", space, arch, metadata=metadata))
    results = export_many(requests)
    return {request.folder.name: (request.folder, found) for request, found in zip(requests, results, strict=True)}


@pytest.mark.parametrize("name", ["gcn", "gat", "gin", "pna", "images"])
def test_every_format_reproduces_the_model_at_two_sizes(name: str, exported: Any) -> None:
    folder, results = exported[name]
    assert [(result.format, result.status, result.detail) for result in results if result.status != "ok"] == []
    assert [result.format for result in results] == list(FORMATS)
    for result in results:
        assert result.path is not None and result.path.parent == folder
        assert result.bytes == result.path.stat().st_size > 0
        if result.format in ("code", "safetensors"):
            assert result.max_abs_diff == 0.0
        else:
            assert result.max_abs_diff is not None and result.max_abs_diff < 1e-5
        two = ["batch=2", "batch=3"] if name == "images" else ["nodes=30, edges=70", "nodes=8, edges=10"]
        assert list(result.sizes) == (["weights"] if result.format == "safetensors" else two)
    verify(folder)


def test_what_a_format_lacks_is_recorded_and_the_others_are_written(exported: Any) -> None:
    folder, results = exported["median"]
    status = {result.format: result.status for result in results}
    assert status == {"code": "ok", "safetensors": "ok", "torch-export": "failed", "onnx": "failed"}
    for result in results[2:]:
        assert "edges" in result.detail
        assert result.path is None
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "architecture.json",
        "example.safetensors",
        "model.py",
        "model.safetensors",
        "parity.json",
    ]
    assert "failed: " in (folder / "README.md").read_text()
    verify(folder)


def test_the_card_has_every_number_and_runs(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, results = exported["gcn"]
    text = (folder / "README.md").read_text()
    assert "| val_accuracy | 0.75 |" in text
    assert "| conv | gcn |" in text
    assert "| x | (nodes, 5) float32 |" in text
    for result in results:
        assert f"| {result.format} | `{result.path.name}` |" in text
    scope: dict[str, Any] = {"x": torch.randn(4, 5), "edge_index": torch.tensor([[0, 1, 3], [1, 2, 3]])}
    monkeypatch.chdir(folder)
    outputs = []
    for block in text.split("```python\n")[3:]:  # torch-export and onnx; the files run in their own process above
        exec(block.partition("```")[0], scope)
        outputs.append(torch.as_tensor(scope["output"]).detach())
    assert len(outputs) == 2
    torch.testing.assert_close(outputs[0], outputs[1])
    assert '"epochs": 3' in (exported["images"][0] / "README.md").read_text()


def test_architecture_json_gives_the_same_network(exported: Any) -> None:
    folder, _ = exported["gat"]
    found = json.loads((folder / "architecture.json").read_text())
    space = graphs()
    assert found["choices"] == {"conv": "gat"}
    assert found["key"] == space.key(space.architecture(found["choices"]))
    assert found["fingerprint"] == space.fingerprint()


def test_onnx_has_the_spaces_names_and_an_ir_that_runtimes_read(exported: Any) -> None:
    import onnx

    folder, _ = exported["gat"]
    model = onnx.load(folder / "model.onnx")
    shapes = {given.name: given.type.tensor_type.shape.dim for given in model.graph.input}
    axes = {name: [axis.dim_param or axis.dim_value for axis in shape] for name, shape in shapes.items()}
    assert axes == {"x": ["nodes", 5], "edge_index": [2, "edges"]}
    assert [given.name for given in model.graph.output] == ["output"]
    assert model.ir_version <= 10


def test_no_path_of_this_machine_leaves(exported: Any) -> None:
    for folder, _ in exported.values():
        for path in folder.iterdir():
            content = path.read_bytes()
            for private in (Path(torch.__file__).parents[1], Path(__file__).parents[2], Path.home() / "x"):
                assert str(private).encode() not in content, path


@pytest.mark.parametrize("name", ["model.safetensors", "program.pt2", "model.onnx", "model.py", "README.md"])
def test_a_flipped_bit_is_found(name: str, exported: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported["gcn"][0], tmp_path / "copy"))
    verify(folder)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(DamagedFile, match=name):
        verify(folder)


def test_a_missing_file_and_a_changed_manifest_are_found(exported: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported["gcn"][0], tmp_path / "copy"))
    (folder / "model.onnx").unlink()
    with pytest.raises(DamagedFile, match=r"model\.onnx is missing"):
        verify(folder)
    manifest = json.loads((folder / "parity.json").read_text())
    del manifest["files"]["model.onnx"]
    (folder / "parity.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedFile, match=r"parity\.json is missing or damaged"):
        verify(folder)
    with pytest.raises(DamagedFile, match=r"parity\.json is missing or damaged"):
        verify(tmp_path)


# ---- exporters that misbehave -----------------------------------------------------------------------------------


def raising(outgoing: Outgoing, folder: Path) -> Written:
    (folder / "half").write_text("half")
    raise RuntimeError("no such thing\n\nas this format\nmore")


def wrong(outgoing: Outgoing, folder: Path) -> Written:
    (folder / "wrong.bin").write_bytes(b"")
    return Written(folder / "wrong.bin", "def load(path):\n    return lambda x: x[:, :2] * 0 + 100")


def needing_nasgraph(outgoing: Outgoing, folder: Path) -> Written:
    (folder / "needs.bin").write_bytes(b"")
    return Written(folder / "needs.bin", "def load(path):\n    import nasgraph.build")


def crashing(outgoing: Outgoing, folder: Path) -> Written:
    (folder / "crash.bin").write_bytes(b"")
    return Written(folder / "crash.bin", "def load(path):\n    import os\n    os.abort()")


def sleeping(outgoing: Outgoing, folder: Path) -> Written:
    (folder / "sleep.bin").write_bytes(b"")
    return Written(folder / "sleep.bin", "def load(path):\n    import time\n    time.sleep(600)")


def test_a_bad_exporter_is_a_recorded_result(tmp_path: Path) -> None:
    space = rows()
    names = [f"{__name__}:{name}" for name in ("raising", "crashing", "wrong", "needing_nasgraph")]
    arch = space.architecture({})
    results = export_model(
        build(space, arch), tmp_path / "out", space=space, architecture=arch, formats=[*names, "safetensors"]
    )
    assert [result.status for result in results] == ["failed"] * 4 + ["ok"]
    details = [result.detail for result in results]
    assert details[0] == "RuntimeError: no such thing as this format"
    assert details[1].startswith("the process that loaded it ended with exit code -6")
    assert "differs from the model by 1" in details[2]
    assert "nasgraph is blocked" in details[3]
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".json", ".json", ".md", ".safetensors"]


def test_an_endless_load_is_stopped(tmp_path: Path) -> None:
    space = rows()
    model = build(space, space.architecture({})).eval()
    question = parity.Question(sleeping(None, tmp_path), model, {})  # type: ignore[arg-type]
    (answer,) = parity.ask([question], time_limit=3)
    assert answer.failure == "the process that loaded it was stopped after 3 s"


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    space = rows()
    arch = space.architecture({})
    with pytest.raises(ConfigError, match="unknown exporter 'onxx'. Did you mean 'onnx'?"):
        export_model(build(space, arch), tmp_path / "a" / "b", space=space, architecture=arch, formats=["code", "onxx"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    space = rows()
    arch = space.architecture({})
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NasgraphError, match=f"cannot write the folder {folder}"):
            export_model(build(space, arch), folder, space=space, architecture=arch, formats=["safetensors"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_callers_model_stays_as_it_was_and_bytes_repeat(tmp_path: Path) -> None:
    space = rows()
    arch = space.architecture({})
    model = build(space, arch).train()
    before, generator = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    for name in ("one", "two"):
        export_model(model, tmp_path / name, space=space, architecture=arch, formats=["code", "safetensors"])
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_relative_folder_is_checked_in_a_process_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nasgraph.transforms import Quantize

    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    space = SearchSpace.from_module(model, [Quantize("(0|2)", weight_bits=3)], inputs=torch.randn(2, 8))
    results = export_model(
        build(space, {}), "o3", space=space, architecture={}, formats=["onnx-qdq", "packed", "safetensors"]
    )
    assert [(item.status, item.detail) for item in results if item.status != "ok"] == []
    assert all(item.path is not None and item.path.parent == tmp_path / "o3" for item in results)
    verify("o3")


def test_the_example_of_the_page_exports_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)[0]
    monkeypatch.chdir(tmp_path)
    task = SimpleNamespace(inputs=(torch.randn(4, 3, 8, 8),))
    names: dict[str, Any] = {"space": images(), "architecture": {}, "task": task}
    exec(code, names)
    assert [(item.format, item.status) for item in names["results"]] == [(name, "ok") for name in FORMATS]
    assert (tmp_path / "models" / "best" / "parity.json").is_file()


def test_a_second_export_replaces_the_first(tmp_path: Path) -> None:
    space = rows()
    arch = space.architecture({})
    (tmp_path / "mine.txt").write_text("not of the export")
    for seed, formats in ((0, ["code", "safetensors"]), (1, ["safetensors"])):
        (result, *_) = export_model(build(space, arch, seed), tmp_path, space=space, architecture=arch, formats=formats)
        verify(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["README.md", "architecture.json", "mine.txt", "model.safetensors", "parity.json"]
    assert result.format == "safetensors"


def test_a_stopped_export_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = rows()
    arch = space.architecture({})
    export_model(build(space, arch), tmp_path / "old", space=space, architecture=arch, formats=["safetensors"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(parity, "ask", stopped)
    for name in ("old", "new"):
        with pytest.raises(KeyboardInterrupt):
            export_model(build(space, arch, 1), tmp_path / name, space=space, architecture=arch, formats=["code"])
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before


def test_weights_too_large_for_one_onnx_file_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_exporter, "ONE_FILE", 10)
    space = SearchSpace("wide")
    x = space.input("x", torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), {0: "batch"})
    space.output(space.add("head", Op(nn.Linear, out_features=1000), x))
    arch = space.architecture({})
    (result,) = export_model(build(space, arch), tmp_path / "out", space=space, architecture=arch, formats=["onnx"])
    assert result.status == "ok", result.detail
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "architecture.json", "parity.json", "model.onnx", "model.onnx.data"}
    (tmp_path / "out" / "model.onnx.data").write_bytes(b"")
    with pytest.raises(DamagedFile, match=r"model\.onnx\.data"):
        verify(tmp_path / "out")


def test_grown_inputs_keep_indices_valid_and_batches_sorted() -> None:
    x, edges, batch = torch.randn(4, 2), torch.tensor([[0, 1, 3], [1, 2, 0]]), torch.tensor([0, 0, 1, 1])
    dynamic = ({0: "nodes"}, {1: "edges"}, {0: "nodes"})
    x2, edges2, batch2 = grown((x, edges, batch), dynamic)
    assert sizes((x2, edges2, batch2), dynamic) == "nodes=5, edges=4"
    assert torch.equal(x2[:4], x) and torch.equal(edges2[:, :3], edges)
    assert edges2.max() < len(x2) and torch.equal(batch2.sort().values, batch2)
