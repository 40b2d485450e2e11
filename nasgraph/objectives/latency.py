"""Latency: measured alone on the device, after warm-up, as a median with its spread, or not reported."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nasgraph.errors import NasgraphError
from nasgraph.objectives.base import Candidate, Objective, check_alone, slots
from nasgraph.transforms.deploy import deploy


def measure_latency(
    model: Callable[..., Any], inputs: tuple[Tensor, ...], min_seconds: float = 0.3, max_seconds: float = 10.0
) -> dict[str, float | int]:
    """Wall-clock time of ``model(*inputs)`` in evaluation mode without gradients, on all threads that PyTorch has now.

    Args: model: a module, or any function of the inputs.

    Three calls warm up. Then ``torch.utils.benchmark`` repeats blocks of calls for at least ``min_seconds``, until the
    interquartile range is below 10% of the median or ``max_seconds`` have passed.

    Returns: ``median_ms``, ``iqr_ms``, ``blocks`` (timed), ``threads``, and ``cpu_share``: processor time per thread
    and wall-clock time. On a CPU with one thread it is near 1; much below, something else had the processor.
    """
    from torch.utils.benchmark import Timer

    threads = torch.get_num_threads()
    module = model if isinstance(model, nn.Module) else nn.Module()
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            for _ in range(3):
                model(*inputs)
            timer = Timer("model(*inputs)", globals={"model": model, "inputs": inputs}, num_threads=threads)
            wall, cpu = time.perf_counter(), time.process_time()
            measured = timer.adaptive_autorange(min_run_time=min_seconds, max_run_time=max_seconds)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    finally:
        module.train(training)
    return {
        "median_ms": measured.median * 1e3,
        "iqr_ms": measured.iqr * 1e3,
        "blocks": len(measured.times),
        "threads": threads,
        "cpu_share": cpu / wall / threads,
    }


@contextmanager
def alone(device: torch.device, timeout_s: float = 600.0) -> Iterator[None]:
    """Hold the device's lock, so that measurements of all nasgraph processes of one user take turns.

    The lock is a file in the temporary folder that the kernel releases when its holder ends, however it ends.
    On a system without ``fcntl`` there is no lock.

    Raises: NasgraphError: another process held it for ``timeout_s`` seconds.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    import getpass

    path = Path(tempfile.gettempdir()) / f"nasgraph-{getpass.getuser()}-{str(device).replace(':', '-')}.lock"
    deadline = time.monotonic() + timeout_s
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise NasgraphError(
                        f"another process has measured on {device} for {timeout_s:.0f} s: let it end, then resume"
                    ) from None
                time.sleep(0.05)
        yield


def _latency_ms(candidate: Candidate) -> float:
    """Of the network as it is used: masks and rounded weights are in the weights and cost nothing at run time."""
    check_alone([latency_ms], slots())
    model, inputs = deploy(candidate.model).model, candidate.task.inputs
    with alone(inputs[0].device):
        measured = measure_latency(model, inputs)
    candidate.info.update({f"latency_{name}": value for name, value in measured.items()})
    return float(measured["median_ms"])


latency_ms = Objective("latency_ms", "minimize", _latency_ms, "ms", exclusive=True)
