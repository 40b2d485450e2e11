"""nasgraph's exporters pass the exam that is shipped for others'."""

from __future__ import annotations

import pytest

from nasgraph.testing import ExporterExam


class TestCode(ExporterExam):
    format = "code"


class TestSafetensors(ExporterExam):
    format = "safetensors"


class TestTorchExport(ExporterExam):
    format = "torch-export"


@pytest.mark.slow
class TestOnnx(ExporterExam):
    format = "onnx"
