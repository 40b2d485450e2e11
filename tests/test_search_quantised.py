"""A search over quantised activations: what is exported has fixed ranges, and is what was scored."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from nasgraph import search
from nasgraph.config import Config, parse
from nasgraph.run import Run
from nasgraph.supernet import Supernet
from nasgraph.transforms.quantizers import ActivationQuantizer
from nasgraph.workers import parts

TINY = {
    "space": "tests.quantised_spaces:perceptron",
    "task": "digits_images",
    "objectives": ["val_accuracy", "model_bits"],
    "train": {"epochs": 2, "lr": 0.01},
    "search": {"sampler": "random", "trials": 4, "workers": 0, "baseline": False},
    "final": {"top": 1, "seeds": 2},
    "export": ["code", "safetensors", "packed", "torch-export", "onnx-qdq"],
}
LEARNED = {"name": TINY["space"], "activations": "lsq"}
SHARED = {
    "supernet": {"policy": "uniform", "epochs": 6, "batch": 256, "lr": 0.01},
    "search": {**TINY["search"], "score": "supernet", "finetune": 1},  # type: ignore[dict-item]
}
RUNS = {
    "trained, dynamic": TINY,
    "trained, learned": {**TINY, "space": LEARNED},
    "supernet, dynamic": {**TINY, **SHARED},
    "supernet, learned": {**TINY, **SHARED, "space": LEARNED},
}


SLOW = [name if name == "trained, learned" else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]


@pytest.fixture(scope="module", params=SLOW)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    folder, settings = tmp_path_factory.mktemp("runs") / "run", parse(RUNS[request.param])
    assert search.start(settings, folder, quiet=True) == 0
    return folder, settings


def exported(folder: Path, name: str = "model") -> ModuleType:
    (place,) = (folder / "models").iterdir()
    spec = importlib.util.spec_from_file_location(f"exported_{name}", place / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_what_is_exported_is_what_was_scored(run: tuple[Path, Config]) -> None:
    folder, settings = run
    (final,) = Run.open(folder).finals.values()
    assert {item["status"] for item in final.exports} == {"ok"}, final.exports
    task = parts(settings).task
    for name in ("model", "packed_model"):
        model = exported(folder, name).load()
        assert task.score(model, "val")["accuracy"] == final.values["val_accuracy"]
        assert task.score(model, "test")["accuracy"] == final.values["test_accuracy"]
    (place,) = (folder / "models").iterdir()
    weights = load_file(place / "model.safetensors")
    for layer in ("hidden", "head"):
        assert weights[f"{layer}.on_input.quantize.lowest"] < weights[f"{layer}.on_input.quantize.highest"]
    assert weights["head.on_input.quantize.lowest"] == 0  # behind a ReLU
    assert "ranges frozen on 1024 training samples" in (place / "README.md").read_text(encoding="utf-8")


def test_onnx_quantises_activations_and_agrees_with_pytorch(run: tuple[Path, Config]) -> None:
    folder, settings = run
    (place,) = (folder / "models").iterdir()
    graph = onnx.load(place / "model_qdq.onnx").graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("QuantizeLinear") == 2 and operators.count("DequantizeLinear") == 4
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(place / "model_qdq.onnx", options, providers=["CPUExecutionProvider"])
    batch = parts(settings).task.batch(64, 5)
    with torch.no_grad():
        expected = exported(folder).load()(*batch.inputs)
    (found,) = session.run(None, {"image": batch.inputs[0].contiguous().numpy()})
    assert float((torch.from_numpy(found) - expected).abs().max()) <= 1e-5


def test_finishing_again_gives_the_same_bits(run: tuple[Path, Config], tmp_path: Path) -> None:
    folder, _ = run
    again = Path(shutil.copytree(folder, tmp_path / "again"))
    shutil.rmtree(again / "models")
    (again / "final.json").unlink()
    assert search.resume(again, quiet=True) == 0
    (one,), (other,) = (list((place / "models").iterdir()) for place in (folder, again))
    for name in ("model.safetensors", "packed.safetensors", "model_qdq.onnx", "model.py"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    before, after = (next(iter(Run.open(place).finals.values())) for place in (folder, again))
    assert before.values == after.values


def test_candidates_stay_dynamic_and_views_equal_extractions(run: tuple[Path, Config]) -> None:
    folder, settings = run
    if settings.supernet is None:
        return
    made = parts(settings)
    supernet = Supernet.load(folder / "supernet", made.space, made.task)
    for record in Run.open(folder).records("search"):
        assert record.values["val_accuracy"] == supernet.evaluate([record.arch])[0]
        alone = supernet.extract(record.arch).eval()
        assert not any("lowest" in m._buffers for m in alone.modules() if isinstance(m, ActivationQuantizer))
        (x,) = made.task.batch(32, 1).inputs
        assert torch.equal(alone(x), supernet.subnet(record.arch).eval()(x))
