"""A ``torch.export`` program: runs in plain PyTorch, without the classes that made the model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import fx

from nasgraph.export.base import Outgoing, Written, quiet
from nasgraph.transforms.deploy import deploy
from nasgraph.transforms.layers import rewritten_layers

FILE = "program.pt2"

RELOAD = """
def load(path):
    import torch

    return torch.export.load(path).module()
"""


def export(outgoing: Outgoing, folder: Path) -> Written:
    """Write ``program.pt2``. Axes that the space calls dynamic may have any length.

    Raises: what ``torch.export`` raises, e.g. for an operation that would fix the length of a dynamic axis.
    """
    with quiet():
        made = program(outgoing)
        for module in made.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # paths of this machine
        torch.export.save(made, folder / FILE)
    return Written(folder / FILE, RELOAD)


def program(outgoing: Outgoing) -> torch.export.ExportedProgram:
    """The model as an exported program, dynamic axes named as in the space; weights without masks and quantisers."""
    rewritten = rewritten_layers(outgoing.model)
    model = deploy(outgoing.model).model if rewritten else outgoing.model
    axes = {name: torch.export.Dim(name) for dynamic in outgoing.dynamic for name in dynamic.values()}
    shapes = tuple({axis: axes[name] for axis, name in dynamic.items()} for dynamic in outgoing.dynamic)
    with torch.no_grad():
        return torch.export.export(model, outgoing.examples, dynamic_shapes=shapes)
