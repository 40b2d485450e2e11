"""Latency where integer formats are really run: in onnxruntime, on the file that ``onnx-qdq`` writes."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import fx

from nasgraph.objectives.base import Candidate, Objective, check_alone, slots
from nasgraph.objectives.latency import alone, measure_latency
from nasgraph.space import Architecture
from nasgraph.transforms import freeze_ranges


def session(candidate: Candidate) -> tuple[Any, dict[str, Any]]:
    """The candidate's network in an ``onnxruntime.InferenceSession`` on the CPU, and the task's inputs by their names.

    As many threads as PyTorch has now. Ranges of activations are those of the task's inputs. All else is onnxruntime's
    default, so that it takes its integer kernels; they round more than the network does (docs/export.md says how much).

    Raises: what the export raises for operations that ONNX does not have.
    """
    import onnxruntime

    from nasgraph.export.base import Outgoing, grown
    from nasgraph.export.qdq import export

    model, inputs = copy.deepcopy(candidate.model).cpu().eval(), tuple(x.cpu() for x in candidate.task.inputs)
    freeze_ranges(model, [inputs])
    space = candidate.space
    declared = list(space.inputs.values())
    examples = tuple(each.example.cpu() for each in declared)
    if any(x.shape[axis] < 2 for x, each in zip(examples, declared, strict=True) for axis in each.dynamic):
        examples = grown(examples, tuple(each.dynamic for each in declared))
    assert isinstance(model, fx.GraphModule)
    architecture = Architecture(dict(candidate.arch))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        written = export(Outgoing(model, space, architecture, space.key(architecture), examples), Path(folder))
        made = onnxruntime.InferenceSession(str(written.path), options, providers=["CPUExecutionProvider"])
    named = dict(zip(space.inputs, inputs, strict=True))
    return made, {given.name: named[given.name].numpy() for given in made.get_inputs()}


def _onnx_latency_ms(candidate: Candidate) -> float:
    check_alone([onnx_latency_ms], slots())
    made, given = session(candidate)
    with alone(torch.device("cpu")):
        measured = measure_latency(lambda: made.run(None, given), ())
    candidate.info.update({f"onnx_latency_{name}": value for name, value in measured.items()})
    return float(measured["median_ms"])


onnx_latency_ms = Objective("onnx_latency_ms", "minimize", _onnx_latency_ms, "ms", exclusive=True)
