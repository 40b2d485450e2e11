"""A model that a space is put over, trained once and kept: spaces over a model need the same numbers each time."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nasgraph.errors import DamagedFile, DataError
from nasgraph.tasks.base import Task
from nasgraph.tasks.datasets import cache_folder
from nasgraph.training.loop import TrainSettings


def pretrained(model: nn.Module, task: Task, settings: TrainSettings, seed: int = 0) -> nn.Module:
    """``model`` trained on ``task``, in place and in evaluation mode; at the second call its numbers are read.

    They lie in the cache (``$NASGRAPH_CACHE``) under what they depend on: the model's start, the data, the settings,
    the seed and torch's version. Who trains reads the file like everybody else, so all processes have the same bits.

    Raises: DamagedFile: the file is not what was written. DataError: the cache cannot be written.
    """
    from safetensors.torch import load_file, save_file

    folder = cache_folder() / "pretrained"
    path = folder / f"{_key(model, task, settings, seed)}.safetensors"
    if not path.exists():
        task.fit(model, settings, seed)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix="new-") as scratch:
                new = Path(scratch) / path.name
                save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, new)
                _checksum(new).write_text(_sha256(new))
                os.replace(_checksum(new), _checksum(path))
                os.replace(new, path)
        except OSError as error:
            raise DataError(f"cannot keep {path}: {error}. Set NASGRAPH_CACHE to another folder.") from error
    if not _checksum(path).exists() or _checksum(path).read_text() != _sha256(path):
        raise DamagedFile(f"{path} is not what was written (its SHA-256 differs): delete it, it is made again")
    model.load_state_dict(load_file(path))
    return model.eval()


def _key(model: nn.Module, task: Task, settings: TrainSettings, seed: int) -> str:
    known: dict[str, Any] = {"task": task.fingerprint(), "settings": asdict(settings), "seed": seed}
    digest = hashlib.sha256(json.dumps({**known, "torch": torch.__version__}, sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _checksum(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
