"""What an exporter receives and returns. An exporter is a function ``export(outgoing, folder) -> Written``."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from nasgraph.space import Architecture, SearchSpace


@dataclass(frozen=True)
class Outgoing:
    """A model on its way out: what an exporter may write.

    ``model`` is a copy on the CPU in eval mode, ``examples`` are small inputs for tracing, in the order of the space's
    inputs and with no dynamic axis of length 1 (which tracers would take for a constant).
    """

    model: fx.GraphModule
    space: SearchSpace
    architecture: Architecture
    key: str
    examples: tuple[Tensor, ...]
    metrics: Mapping[str, float | str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return tuple(self.space.inputs)

    @property
    def dynamic(self) -> tuple[dict[int, str], ...]:
        """For each input, the axes whose length may change and their names."""
        return tuple(declared.dynamic for declared in self.space.inputs.values())


@dataclass(frozen=True)
class Written:
    """What an exporter wrote, and how to check it.

    Args:
        path: the file, within the folder that the exporter was given.
        reload: Python source that defines ``load(path)``. It is run in another process, where nasgraph cannot be
            imported, and returns a function of the inputs (positional tensors, to a tensor or array), or a dict of
            tensors, which is compared with the model's ``state_dict``.
        tolerance: largest difference allowed, relative to the largest absolute value of the output (at least 1).
            0: every bit must agree.
        beside: names of other files that this one is of no use without, removed with it if it fails.
        detail: what a reader of the file must know, e.g. what it holds instead of what it cannot hold.
        expected: what the file must equal; None: the live model.
        usage: lines of Python that load the file, for the model card; empty: what the card knows of the format.
    """

    path: Path
    reload: str
    tolerance: float = 1e-4
    beside: tuple[str, ...] = ()
    detail: str = ""
    expected: nn.Module | None = None
    usage: str = ""


@dataclass(frozen=True)
class Exported:
    """One format of one model: written and checked, or failed and why (then there is no file).

    ``max_abs_diff`` is the largest absolute difference from the live model over all input sizes, ``sizes`` has it per
    input size, e.g. ``{"nodes=4, edges=6": 0.0}``. ``note`` is what the exporter says of its file; it stands in
    ``detail`` too, before the differences. ``usage`` are the lines of Python that load it, if the exporter gives any.
    """

    format: str
    path: Path | None
    status: Literal["ok", "failed"]
    max_abs_diff: float | None
    detail: str
    sha256: str | None
    bytes: int | None
    tolerance: float | None = None
    sizes: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    usage: str = ""


def grown(inputs: tuple[Tensor, ...], dynamic: tuple[dict[int, str], ...], least: int = 1) -> tuple[Tensor, ...]:
    """``inputs`` with every dynamic axis longer, by a third and at least ``least``: the last entry is repeated.

    Indices stay valid (nodes are added, none is taken away) and sorted batch vectors stay sorted.
    """
    longer = []
    for tensor, axes in zip(inputs, dynamic, strict=True):
        for axis in axes:
            n = tensor.shape[axis]
            index = torch.arange(n + max(least, n // 3)).clamp(max=n - 1)
            tensor = tensor.index_select(axis, index)
        longer.append(tensor)
    return tuple(longer)


def sizes(inputs: tuple[Tensor, ...], dynamic: tuple[dict[int, str], ...]) -> str:
    """The lengths of the dynamic axes as text: ``nodes=4, edges=6``; ``fixed`` where there are none."""
    lengths = {name: t.shape[axis] for t, axes in zip(inputs, dynamic, strict=True) for axis, name in axes.items()}
    return ", ".join(f"{name}={length}" for name, length in lengths.items()) or "fixed"


def shape_text(tensor: Tensor, dynamic: Mapping[int, str]) -> str:
    """``(nodes, 16) float32``: the shape with the names of its dynamic axes, and the type."""
    parts = [dynamic.get(axis, str(length)) for axis, length in enumerate(tensor.shape)]
    return f"({', '.join(parts)}{',' * (len(parts) == 1)}) {str(tensor.dtype).removeprefix('torch.')}"


def reason(error: BaseException) -> str:
    """An exception in one line: its type and the first lines that say something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2])
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Tracers print graphs and warn of things that no user can change: keep them silent."""
    before = logging.root.manager.disable
    with open(os.devnull, "w") as sink, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
                yield
        finally:
            logging.disable(before)
