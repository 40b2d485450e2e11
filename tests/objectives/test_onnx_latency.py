"""Latency of the network as it is used: in PyTorch without fake quantisation, in onnxruntime with integers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nasgraph.objectives import Candidate, Evaluator
from nasgraph.objectives import latency as latency_module
from nasgraph.objectives.latency import latency_ms
from nasgraph.objectives.onnx_latency import onnx_latency_ms, session
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.transforms import Prune, Quantize
from nasgraph.transforms.layers import rewritten_layers

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
TASK: Any = SimpleNamespace(inputs=(X,))


def space() -> SearchSpace:
    made = SearchSpace("linear")
    x = made.input("x", X[:3], dynamic={0: "rows"})
    bits = Quantize(weight_bits=Choice("bits", [8, 32]), activation_bits=Choice("activations", [8, 32]))
    hidden = made.add("hidden", Op(nn.Linear, out_features=8), x, transforms=[Prune(keep=0.5), bits])
    made.output(made.add("head", Op(nn.Linear, out_features=3), made.add("relu", Op(nn.ReLU), hidden)))
    return made


def candidate(bits: int, activations: int) -> Candidate:
    arch = {"bits": bits, "activations": activations}
    return Candidate(space(), arch, TASK, None)  # type: ignore[arg-type]  # nothing trains


@pytest.mark.parametrize(("bits", "activations", "tolerance"), [(32, 32, 1e-5), (8, 32, 1e-5), (8, 8, 0.05)])
def test_onnxruntime_runs_the_network_in_its_format(bits: int, activations: int, tolerance: float) -> None:
    torch.set_num_threads(1)
    given = candidate(bits, activations)
    made, inputs = session(given)
    [found] = made.run(None, inputs)
    expected = given.model.eval()(X).detach()
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    assert made.get_session_options().intra_op_num_threads == torch.get_num_threads()


def test_the_ranges_of_the_candidate_stay_open() -> None:
    given = candidate(8, 8)
    before = {name: value.clone() for name, value in given.model.state_dict().items()}
    session(given)
    assert all(torch.equal(value, before[name]) for name, value in given.model.state_dict().items())


def test_it_is_an_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NASGRAPH_SLOTS", "1")
    scored = Evaluator(space(), TASK, ["onnx_latency_ms"])({"bits": 8, "activations": 32})
    assert scored.values["onnx_latency_ms"] > 0 and scored.info["onnx_latency_blocks"] >= 1
    assert onnx_latency_ms.exclusive and onnx_latency_ms.direction == "minimize"


def test_pytorch_is_timed_without_fake_quantisation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[nn.Module] = []

    def timed(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, float]:
        seen.append(model)
        return {"median_ms": 1.0}

    monkeypatch.setattr(latency_module, "measure_latency", timed)
    given = candidate(8, 32)
    assert latency_ms.measure(given) == 1.0
    [model] = seen
    assert not rewritten_layers(model) and rewritten_layers(given.model)
    assert torch.equal(model(X), given.model.eval()(X))
