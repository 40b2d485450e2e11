"""nasgraph's exporters pass the exam that is shipped for others'."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from nasgraph.export import Outgoing, Written
from nasgraph.testing import ExporterExam

RELOAD = """
def load(path):
    import numpy, torch
    return {name: torch.from_numpy(array) for name, array in numpy.load(path).items()}
"""


def npz(outgoing: Outgoing, folder: Path) -> Written:
    """The example of docs/export.md."""
    arrays = {name: tensor.numpy() for name, tensor in outgoing.model.state_dict().items()}
    numpy.savez(folder / "weights.npz", **arrays)
    return Written(folder / "weights.npz", RELOAD, tolerance=0.0)


class TestAUsersOwn(ExporterExam):
    format = f"{__name__}:npz"


class TestCode(ExporterExam):
    format = "code"


class TestSafetensors(ExporterExam):
    format = "safetensors"


class TestTorchExport(ExporterExam):
    format = "torch-export"


@pytest.mark.slow
class TestOnnx(ExporterExam):
    format = "onnx"
