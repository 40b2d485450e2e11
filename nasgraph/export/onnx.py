"""ONNX, for onnxruntime and everything else that reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nasgraph.export.base import Outgoing, Written, quiet
from nasgraph.export.program import program

FILE = "model.onnx"
IR_VERSION = 10  # the newest that every onnxruntime since 1.18 reads; onnx itself may write a newer one
ONE_FILE = 2**31  # bytes: protobuf cannot hold more, larger weights go into one file beside the model

RELOAD = """
def load(path):
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    expected = INPUTS
    assert set(names) <= set(expected), f"inputs are called {names}, not {expected}"

    def run(*inputs):
        given = {name: tensor.numpy() for name, tensor in zip(expected, inputs) if name in names}
        return session.run(None, given)[0]

    return run
"""


def export(outgoing: Outgoing, folder: Path) -> Written:
    """Write ``model.onnx``: inputs and dynamic axes are called as in the space, the output ``output``.

    Raises: what ``torch.onnx`` raises for operations that ONNX does not have.
    """
    path = folder / FILE
    written_ = made(outgoing)
    written_.model.ir_version = min(written_.model.ir_version, IR_VERSION)
    size = sum(tensor.nbytes for tensor in outgoing.model.state_dict().values())
    with quiet():
        written_.save(path, external_data=size > ONE_FILE * 0.9)
    return Written(path, RELOAD.replace("INPUTS", repr(list(outgoing.names))))


def made(outgoing: Outgoing, **settings: Any) -> torch.onnx.ONNXProgram:
    """The model in ONNX. ``settings``: of ``torch.onnx.export``."""
    dynamic = tuple(dict(axes) for axes in outgoing.dynamic)
    with quiet(), torch.no_grad():
        found = torch.onnx.export(
            program(outgoing),
            outgoing.examples,
            dynamo=True,
            verbose=False,
            input_names=list(outgoing.names),
            output_names=["output"],
            dynamic_shapes=dynamic,
            **settings,
        )
        assert found is not None
        for node in found.model.graph.all_nodes():
            node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # paths of this machine
    return found
