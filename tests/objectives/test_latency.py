"""Latency against a module that takes a known time, and the lock that measurements share."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from torch import Tensor, nn

from nasgraph.errors import NasgraphError
from nasgraph.objectives.latency import alone, measure_latency


class Sleeper(nn.Module):
    """Takes 5 ms, and notes how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: set[tuple[bool, bool]] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.modes.add((self.training, torch.is_grad_enabled()))
        time.sleep(0.005)
        return x


def test_the_median_is_the_time_of_one_call():
    model = Sleeper()
    measured = measure_latency(model, (torch.zeros(1),), min_seconds=0.1, max_seconds=1.0)
    assert 5.0 <= measured["median_ms"] < 50.0  # other programs may delay it
    assert measured["iqr_ms"] >= 0.0
    assert measured["cpu_share"] < 0.5  # it sleeps
    assert model.modes == {(False, False)}
    assert model.training


def test_a_busy_model_has_more_of_the_processor_than_a_sleeping_one():
    x = torch.randn(300, 300)
    busy = measure_latency(nn.Linear(300, 300), (x,), min_seconds=0.1, max_seconds=1.0)
    asleep = measure_latency(Sleeper(), (x,), min_seconds=0.1, max_seconds=1.0)
    assert asleep["cpu_share"] < busy["cpu_share"] < 1.2
    assert busy["blocks"] >= 4


HOLD = """
import sys, time, torch
from nasgraph.objectives.latency import alone
with alone(torch.device(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_holds_a_device_and_its_end_releases_it(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    device = torch.device("meta")
    other = subprocess.Popen([sys.executable, "-c", HOLD, "meta"], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(NasgraphError, match="another process has measured on meta"), alone(device, timeout_s=0.2):
            pass
        with alone(torch.device("cpu"), timeout_s=0.2):  # another device is free
            pass
    finally:
        other.kill()
        other.communicate()
    with alone(device, timeout_s=5.0):
        pass
