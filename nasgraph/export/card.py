"""The model card: what the model is, what was measured, and how each file is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nasgraph.export.base import Exported, Outgoing, shape_text

HOW = {
    "code": (
        "`model.py`: plain PyTorch, needs no nasgraph",
        "from model import load  # with this folder on sys.path\n\nmodel = load()\noutput = model({inputs})",
    ),
    "safetensors": (
        "`model.safetensors`: the weights alone",
        'from safetensors.torch import load_file\n\nweights = load_file("model.safetensors")',
    ),
    "torch-export": (
        "`program.pt2`: a `torch.export` program",
        'import torch\n\nmodel = torch.export.load("program.pt2").module()\noutput = model({inputs})',
    ),
    "onnx": (
        "`model.onnx`: for onnxruntime and others",
        'import onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")\n'
        "(output,) = session.run(None, {{{arrays}}})",
    ),
    "peft": (
        "`peft/`: adapters for the model that the space was put over, which is not in this folder",
        "from peft import PeftModel\n\n"
        "# of a run whose space comes with it: your_model = nasgraph.run.Run.open(Path(run_folder)).space.base.copy()\n"
        'model = PeftModel.from_pretrained(your_model, "peft")',
    ),
    "packed": (
        "`packed.safetensors`: weights at the bits they have; `packed_model.py` unpacks them and needs no nasgraph",
        "from packed_model import load  # with this folder on sys.path\n\nmodel = load()\noutput = model({inputs})",
    ),
    "onnx-qdq": (
        "`model_qdq.onnx`: integer weights behind DequantizeLinear, for onnxruntime and others. Without the option "
        "onnxruntime may round the inputs of products to 8 bits",
        "import onnxruntime\n\noptions = onnxruntime.SessionOptions()\n"
        'options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")\n'
        'session = onnxruntime.InferenceSession("model_qdq.onnx", options)\n'
        "(output,) = session.run(None, {{{arrays}}})",
    ),
}


def card(outgoing: Outgoing, exported: Sequence[Exported]) -> str:
    """The text of ``README.md``."""
    parameters = sum(parameter.numel() for parameter in outgoing.model.parameters())
    values: dict[str, Any] = {"parameters": parameters, **outgoing.metrics}
    parts = [
        f"# {outgoing.space.name} `{outgoing.key}`",
        f"An architecture of the search space {outgoing.space.name}, found with nasgraph.",
        "## Architecture",
        _table(("choice", "option"), sorted((name, str(label)) for name, label in outgoing.architecture.items())),
        "## Inputs",
        _table(
            ("name", "shape and type"),
            [
                (name, shape_text(example, dynamic))
                for name, example, dynamic in zip(outgoing.names, outgoing.examples, outgoing.dynamic, strict=True)
            ],
        ),
        "## Measured",
        _table(("measure", "value"), [(name, _number(value)) for name, value in values.items()]),
        "## Files",
        "Each file was loaded in a process without nasgraph and compared with the live model (largest absolute "
        "difference of the output; 0 means that every bit agrees). `parity.json` holds the SHA-256 of every file.",
        _table(("format", "file", "input size", "difference", "status"), _parity(exported)),
        "## Load",
        *_loading(outgoing, exported),
    ]
    if outgoing.metadata:
        text = json.dumps(outgoing.metadata, indent=2, default=str, sort_keys=True)
        parts += ["## How it was made", f"```json\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


def _parity(exported: Sequence[Exported]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for item in exported:
        file = f"`{item.path.name}`" if item.path else ""
        if item.status == "failed":
            rows.append((item.format, file, "", "", f"failed: {item.detail}"))
        sizes = item.sizes.items() if item.path else ()
        rows += [(item.format, file, size, f"{value:.3g}", _status(item)) for size, value in sizes]
    return rows


def _status(item: Exported) -> str:
    return f"{item.status}: {item.note}" if item.note else item.status


def _loading(outgoing: Outgoing, exported: Sequence[Exported]) -> list[str]:
    inputs = ", ".join(outgoing.names)
    arrays = ", ".join(f'"{name}": {name}.numpy()' for name in outgoing.names)
    parts = []
    for item in exported:
        if item.status == "ok" and item.path and (item.format in HOW or item.usage):
            title, code = HOW.get(item.format, (f"`{item.path.name}`", ""))
            parts += [title, f"```python\n{item.usage or code.format(inputs=inputs, arrays=arrays)}\n```"]
    return parts


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "None."
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def versions() -> Mapping[str, str]:
    """Versions of what wrote the files, from the packages' metadata (nothing is imported)."""
    import importlib.metadata
    import platform

    found = {"python": platform.python_version()}
    for package in ("nasgraph", "torch", "torch-geometric", "safetensors", "onnx", "onnxscript", "onnxruntime"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
