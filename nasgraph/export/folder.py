"""The folder that a model leaves in: written beside its place, checked, then moved there."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from nasgraph import registry
from nasgraph.errors import DamagedFile, ExportError, NasgraphError
from nasgraph.export import parity
from nasgraph.export.base import Exported, Outgoing, Written, grown, reason, sizes
from nasgraph.export.card import card, versions
from nasgraph.space import Architecture, Label, SearchSpace

FORMATS = ("code", "safetensors", "torch-export", "onnx")
MANIFEST = "parity.json"


@dataclass(frozen=True)
class Request:
    """One model to export. See :func:`export_model` for the fields."""

    model: fx.GraphModule
    folder: Path
    space: SearchSpace
    architecture: Mapping[str, Label]
    formats: Sequence[str] = FORMATS
    inputs: tuple[Tensor, ...] | None = None
    metrics: Mapping[str, float | str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


def export_model(
    model: fx.GraphModule,
    folder: str | os.PathLike[str],
    *,
    space: SearchSpace,
    architecture: Mapping[str, Label],
    formats: Sequence[str] = FORMATS,
    inputs: tuple[Tensor, ...] | None = None,
    metrics: Mapping[str, float | str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    time_limit: float = parity.TIME_LIMIT,
) -> list[Exported]:
    """Write ``model`` to ``folder`` in every format and check each file against the live model.

    A format that fails is a result with status ``failed`` and the reason; its file is not kept, the others are written.
    The caller's model is not changed. Files of an earlier export to the same folder are replaced or removed.

    Args:
        model: what ``nasgraph.build.build(space, architecture)`` made, trained or not, on any device.
        folder: is made; nothing in it is replaced before everything is written. Results have absolute paths.
        formats: names of exporters, or ``module:function`` of your own.
        inputs: for the check; default: the space's examples. With dynamic axes a second size is checked too.
        metrics: measured numbers, for the model card.
        metadata: how the model was made (plain values), for the model card.
        time_limit: seconds for the process that loads the files.

    Raises:
        ConfigError: an unknown format; nothing was written.
        NasgraphError: ``folder`` cannot be written.
    """
    request = Request(
        model, Path(folder), space, architecture, formats, inputs, dict(metrics or {}), dict(metadata or {})
    )
    return export_many([request], time_limit)[0]


def export_many(requests: Sequence[Request], time_limit: float = parity.TIME_LIMIT) -> list[list[Exported]]:
    """:func:`export_model` for several models, which are checked in one process: starting it takes seconds.

    Raises: as :func:`export_model`.
    """
    # The process that loads the files has a working directory of its own.
    requests = [replace(request, folder=Path(request.folder).absolute()) for request in requests]
    exporters = {name: registry.resolve("exporters", name) for request in requests for name in request.formats}
    places: list[Path] = []
    try:
        drafts = []
        for request in requests:
            places.append(_place_beside(request.folder))
            drafts.append(_draft(request, places[-1], exporters))
        questions = [question for draft in drafts for question in draft.questions.values()]
        answers = iter(parity.ask(questions, time_limit * max(1, len(requests))))
        results = []
        for request, place, draft in zip(requests, places, drafts, strict=True):
            checked = [
                _checked(item, draft.questions[item.format].written, next(answers))
                if item.format in draft.questions
                else item
                for item in draft.exported
            ]
            results.append(_finish(draft.outgoing, place, request.folder, checked))
        return results
    finally:
        for place in places:
            shutil.rmtree(place, ignore_errors=True)


@dataclass
class _Draft:
    outgoing: Outgoing
    exported: list[Exported]
    questions: dict[str, parity.Question]


def _draft(request: Request, place: Path, exporters: Mapping[str, Any]) -> _Draft:
    """Write every format to ``place``, unchecked."""
    space = request.space
    architecture = Architecture(dict(request.architecture))
    dynamic = tuple(declared.dynamic for declared in space.inputs.values())
    examples = tuple(_telling(declared.example.detach().cpu()) for declared in space.inputs.values())
    if any(t.shape[axis] < 2 for t, axes in zip(examples, dynamic, strict=True) for axis in axes):
        examples = grown(examples, dynamic)
    model = copy.deepcopy(request.model).cpu().eval()
    outgoing = Outgoing(
        model, space, architecture, space.key(architecture), examples, request.metrics, request.metadata
    )
    given = tuple(tensor.detach().cpu() for tensor in request.inputs) if request.inputs else examples
    larger = grown(examples, dynamic)
    inputs = {sizes(given, dynamic): given, sizes(larger, dynamic): larger}
    draft = _Draft(outgoing, [], {})
    for name in dict.fromkeys(request.formats):
        known = {path for path in place.rglob("*")}
        try:
            written: Written = exporters[name](outgoing, place)
        except Exception as error:
            for path in set(place.iterdir()) - known:
                path.unlink(missing_ok=True)
            detail = str(error) if isinstance(error, ExportError) else reason(error)
            draft.exported.append(Exported(name, None, "failed", None, detail, None, None))
            continue
        draft.exported.append(Exported(name, written.path, "ok", None, written.detail, None, None, written.tolerance))
        draft.questions[name] = parity.Question(
            written, model if written.expected is None else written.expected, inputs
        )
    return draft


def _telling(example: Tensor) -> Tensor:
    """``example``, or random numbers in its place if it is constant: zeros would hide what a layer does."""
    if not example.is_floating_point() or example.numel() < 2 or bool((example != example.flatten()[0]).any()):
        return example
    return torch.randn(example.shape, generator=torch.Generator().manual_seed(0)).to(example.dtype)


def _checked(item: Exported, written: Written, answer: parity.Answer) -> Exported:
    """The result of a format once its file was loaded; the file of one that failed is removed."""
    worst = max(answer.differences.values(), default=None)
    assert item.path is not None
    if answer.failure is not None:
        for path in item.path.parent.glob(item.path.name + "*"):  # with weights that lie beside it
            path.unlink()
        for name in written.beside:
            (item.path.parent / name).unlink(missing_ok=True)
        return replace(item, path=None, status="failed", max_abs_diff=worst, detail=answer.failure)
    differences = [f"{size}: {value:.3g}" for size, value in answer.differences.items()]
    detail = "; ".join([written.detail, *differences] if written.detail else differences)
    note, usage = written.detail, written.usage
    return replace(item, max_abs_diff=worst, detail=detail, note=note, usage=usage, sizes=answer.differences)


def _finish(outgoing: Outgoing, place: Path, folder: Path, checked: list[Exported]) -> list[Exported]:
    """Add what describes the model, then move all files to their folder, the manifest last."""
    finished = []
    for item in checked:
        if item.path is not None:
            final = folder / item.path.relative_to(place)
            item = replace(item, path=final, sha256=_sha256(item.path), bytes=item.path.stat().st_size)
        finished.append(item)
    description = {
        "space": outgoing.space.name,
        "fingerprint": outgoing.space.fingerprint(),
        "key": outgoing.key,
        "choices": dict(sorted(outgoing.architecture.items())),
    }
    _write_json(place / "architecture.json", description)
    (place / "README.md").write_text(card(outgoing, finished), encoding="utf-8")
    files = sorted(path for path in place.rglob("*") if path.is_file())
    for path in files:  # safetensors makes files that only the owner can read
        path.chmod(0o666 & ~_umask())
    manifest = {
        "key": outgoing.key,
        "formats": [
            {
                "format": item.format,
                "file": item.path.relative_to(folder).as_posix() if item.path else None,
                "status": item.status,
                "detail": item.detail,
                "tolerance": item.tolerance,
                "max_abs_diff": item.max_abs_diff,
                "sizes": dict(item.sizes),
            }
            for item in finished
        ],
        "files": {
            path.relative_to(place).as_posix(): {"sha256": _sha256(path), "bytes": path.stat().st_size}
            for path in files
        },
        "threads": torch.get_num_threads(),
        "versions": dict(versions()),
    }
    manifest["sha256"] = _own_sha256(manifest)
    _write_json(place / MANIFEST, manifest)
    try:
        _move(place, folder, [path.relative_to(place) for path in files])
    except OSError as error:
        raise NasgraphError(f"cannot write the folder {folder}: {error.strerror or error}") from error
    return finished


def verify(folder: str | os.PathLike[str]) -> None:
    """See that every file of an exported model is what was written.

    Raises: DamagedFile: names the first file that is missing or changed, or a manifest that cannot be trusted.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    if manifest is None:
        raise DamagedFile(f"{folder / MANIFEST} is missing or damaged: export the model again")
    for name, known in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise DamagedFile(f"{path} is missing: export the model again")
        if _sha256(path) != known["sha256"]:
            raise DamagedFile(f"{path} is not what was written (its SHA-256 differs): export the model again")


def _place_beside(folder: Path) -> Path:
    """A fresh, hidden folder in the same file system as ``folder``."""
    try:
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
        beside = folder if folder.exists() else folder.parent
        return Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=beside))
    except OSError as error:
        raise NasgraphError(f"cannot write the folder {folder}: {error.strerror or error}") from error


def _move(place: Path, folder: Path, files: list[Path]) -> None:
    place.chmod(0o777 & ~_umask())
    if not folder.exists():
        os.replace(place, folder)
        return
    earlier = _read_manifest(folder)
    (folder / MANIFEST).unlink(missing_ok=True)  # while files are replaced, nothing vouches for them
    for name in set(earlier["files"] if earlier else ()) - {file.as_posix() for file in files}:
        if not Path(name).is_absolute() and ".." not in Path(name).parts:
            (folder / name).unlink(missing_ok=True)
    for file in [*files, Path(MANIFEST)]:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(place / file, folder / file)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest if manifest["sha256"] == _own_sha256(manifest) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _own_sha256(manifest: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_json(path: Path, thing: Any) -> None:
    path.write_text(json.dumps(thing, indent=2) + "\n", encoding="utf-8")
