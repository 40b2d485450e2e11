"""Does the written file do what the model does? Asked in another process, in which nasgraph cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nasgraph.export import reload
from nasgraph.export.base import Written

TIME_LIMIT = 300.0  # seconds for the process, whatever it loads


@dataclass(frozen=True)
class Question:
    """A written file, the live model that it should equal, and the inputs to try, by a name for their sizes."""

    written: Written
    model: nn.Module
    inputs: Mapping[str, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Answer:
    """Largest absolute difference for each of the question's inputs (or of the weights), or why the file failed."""

    differences: Mapping[str, float]
    failure: str | None


def ask(questions: Sequence[Question], time_limit: float = TIME_LIMIT) -> list[Answer]:
    """Load every file in a child process, run it, and compare with the live model.

    The child has this process's number of threads, because the last bits depend on it. A file that kills the child, or
    exceeds ``time_limit`` seconds, has failed; the files after it are tried in a new child.
    """
    with tempfile.TemporaryDirectory(prefix="nasgraph-parity-") as name:
        folder = Path(name)
        files = []
        inputs_on_disk: dict[int, str] = {}
        for number, question in enumerate(questions):
            paths = []
            for inputs in question.inputs.values():
                if id(inputs) not in inputs_on_disk:
                    path = folder / f"inputs{len(inputs_on_disk)}.safetensors"
                    _save({str(i): tensor for i, tensor in enumerate(inputs)}, path)
                    inputs_on_disk[id(inputs)] = str(path)
                paths.append(inputs_on_disk[id(inputs)])
            written = question.written
            source = folder / f"{number}_reload.py"
            source.write_text(written.reload)
            files.append({"id": number, "path": str(written.path), "reload": str(source), "inputs": paths})
        failures = _run(files, folder, time_limit)
        return [
            Answer({}, failures[number]) if number in failures else _compare(question, number, folder)
            for number, question in enumerate(questions)
        ]


def _run(files: list[dict[str, object]], folder: Path, time_limit: float) -> dict[object, str]:
    """Run the child until every file has an answer. Returns: why files failed, by id."""
    failures: dict[object, str] = {}
    while files:
        job = folder / "job.json"
        job.write_text(json.dumps({"threads": torch.get_num_threads(), "results": str(folder), "files": files}))
        command = [sys.executable, "-I", "-B", str(Path(reload.__file__).resolve()), str(job)]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=time_limit)
            ending = f"ended with exit code {done.returncode} {done.stderr.strip()[-200:]}".rstrip()
        except subprocess.TimeoutExpired:
            ending = f"was stopped after {time_limit:g} s"
        blamed = False
        for file in files:
            answer = folder / f"{file['id']}.json"
            if answer.exists():
                error = json.loads(answer.read_text())["error"]
                if error is not None:
                    failures[file["id"]] = _one_line(error)
            elif not blamed:  # the one that was being loaded, or the first of a child that did not even start
                failures[file["id"]] = f"the process that loaded it {ending}"
                blamed = True
        files = [f for f in files if f["id"] not in failures and not (folder / f"{f['id']}.json").exists()]
    return failures


def _compare(question: Question, number: int, folder: Path) -> Answer:
    from safetensors.torch import load_file

    differences: dict[str, float] = {}
    for n, (sizes, inputs) in enumerate(question.inputs.items()):
        found = load_file(folder / f"{number}.{n}.safetensors")
        if set(found) != {"output"}:
            return _differences(found, question.model.state_dict(), question.written.tolerance, "weights")
        answer = _differences(found, _expected(question.model, inputs), question.written.tolerance, sizes)
        if answer.failure:
            return answer
        differences.update(answer.differences)
    return Answer(differences, None)


def _differences(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, what: str) -> Answer:
    if set(found) != set(expected):
        return Answer({}, f"its tensors are not the model's: {', '.join(sorted(set(found) ^ set(expected))[:3])}")
    worst = 0.0
    for name, tensor in expected.items():
        other = found[name]
        if other.shape != tensor.shape or other.dtype != tensor.dtype:
            sizes = f"{tuple(other.shape)} {other.dtype}, not {tuple(tensor.shape)} {tensor.dtype}"
            return Answer({}, f"{name} is {sizes} (with {what})")
        if not torch.isfinite(tensor).all():
            return Answer({}, f"{name} of the model itself is not finite (with {what})")
        difference = _difference(other, tensor)
        limit = tolerance * max(1.0, tensor.abs().max().item() if tensor.numel() else 1.0)
        if not difference <= limit:  # also true for NaN
            text = f"{name} differs from the model by {difference:.3g}, more than {limit:.3g} (with {what})"
            return Answer({what: difference}, text)
        worst = max(worst, difference)
    return Answer({what: worst}, None)


def _difference(a: Tensor, b: Tensor) -> float:
    if torch.equal(a, b):
        return 0.0
    return (a.double() - b.double()).abs().max().item()


def _expected(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"output": model(*inputs)}


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}, path)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
