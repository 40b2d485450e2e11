"""A supernet in a folder: ``checkpoint.json`` and the tensors that it names, as safetensors.

Each save writes the tensors under a name of their own and then replaces the JSON in one step, so a process that is
killed at any moment leaves the checkpoint before or the new one. Both are checked by SHA-256 when they are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import nasgraph
from nasgraph.canonical import KEY_VERSION
from nasgraph.errors import ConfigError, DamagedFile, NasgraphError, SpaceError
from nasgraph.space import SearchSpace
from nasgraph.training.loop import TrainSettings, _optimizer

if TYPE_CHECKING:
    from nasgraph.supernet.store import Supernet
    from nasgraph.supernet.structure import Key
    from nasgraph.tasks.base import Task

FILE = "checkpoint.json"
VERSION = 1


def save(supernet: Supernet, folder: str | os.PathLike[str]) -> Path:
    """Write ``supernet`` with the state of its training. Returns: the path of the JSON file."""
    from safetensors.torch import save as to_bytes

    place = Path(folder)
    tensors = {json.dumps(key): parameter.detach().cpu().contiguous() for key, parameter in _own(supernet).items()}
    optimizer: dict[str, Any] | None = None
    if supernet.optimizer is not None and supernet.settings is not None:
        state = supernet.optimizer.state_dict()
        plain: dict[str, dict[str, Any]] = {}
        for index, values in state["state"].items():
            for name, value in values.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer/{index}/{name}"] = value.detach().cpu().contiguous()
                else:
                    plain.setdefault(str(index), {})[name] = value
        optimizer = {"settings": asdict(supernet.settings), "plain": plain}
    policy: tuple[str, dict[str, Any]] | None = None
    if supernet.policy_state is not None:
        name, learned = supernet.policy_state
        policy = name, {key: value for key, value in learned.items() if not isinstance(value, torch.Tensor)}
        tensors |= {
            f"policy/{key}": learned[key].detach().cpu().contiguous() for key in learned if key not in policy[1]
        }
    data = to_bytes(tensors)
    sha256 = hashlib.sha256(data).hexdigest()
    about: dict[str, Any] = {
        "version": VERSION,
        "nasgraph": nasgraph.__version__,
        "key_version": KEY_VERSION,
        "space": supernet.space.name,
        "fingerprint": supernet.space.fingerprint(),
        "seed": supernet.seed,
        "share": supernet.share,
        "step": supernet.step,
        "optimizer": optimizer,
        "policy": policy,
        "tensors": f"{sha256[:32]}.safetensors",
        "sha256": sha256,
    }
    try:
        place.mkdir(parents=True, exist_ok=True)
        _write(place / about["tensors"], data)
        write(place / FILE, about)
        for old in place.glob("*.safetensors"):
            if old.name != about["tensors"] and re.fullmatch("[0-9a-f]{32}", old.stem):
                old.unlink(missing_ok=True)
    except OSError as error:
        raise NasgraphError(f"cannot write the checkpoint {place}: {error}. The one before is kept") from error
    return place / FILE


def load(
    folder: str | os.PathLike[str], space: SearchSpace, task: Task | None = None, into: Supernet | None = None
) -> Supernet:
    """The supernet in ``folder``; see :meth:`nasgraph.supernet.Supernet.load`.

    ``into``: one for ``space`` that is filled, in place of a new one: its store has sizes of its own.
    """
    from safetensors.torch import load as from_bytes

    from nasgraph.supernet.store import Supernet

    place = Path(folder)
    about = read(place / FILE, VERSION, "checkpoint")
    if about["key_version"] != KEY_VERSION:
        raise SpaceError(
            f"checkpoint {place} has keys of version {about['key_version']}, this nasgraph has {KEY_VERSION}: "
            f"use nasgraph {about['nasgraph']}, or train anew"
        )
    if about["space"] != space.name or about["fingerprint"] != space.fingerprint():
        same = " with other choices, operations or sizes" if about["space"] == space.name else ""
        raise SpaceError(f"checkpoint {place} is of space '{about['space']}'{same}, not of '{space.name}': train anew")
    try:
        data = (place / about["tensors"]).read_bytes()
    except OSError as error:
        raise DamagedFile(f"checkpoint {place}: cannot read {about['tensors']}: {error}") from error
    if hashlib.sha256(data).hexdigest() != about["sha256"]:
        raise DamagedFile(f"checkpoint {place}: {about['tensors']} is not what was written (SHA-256 differs)")
    tensors = from_bytes(data)
    supernet = Supernet(space, task, about["seed"], about.get("share")) if into is None else into
    supernet.seed = about["seed"]
    expected = {json.dumps(key): tuple(parameter.shape) for key, parameter in _own(supernet).items()}
    found = {name: tuple(t.shape) for name, t in tensors.items() if not name.startswith(("optimizer/", "policy/"))}
    if expected != found:
        wrong = min(set(expected.items()) ^ set(found.items()))[0]
        raise SpaceError(f"checkpoint {place} does not fit this version of the operations: {wrong} differs; train anew")
    with torch.no_grad():
        for key, parameter in _own(supernet).items():
            parameter.copy_(tensors[json.dumps(key)])
    supernet.step = about["step"]
    if about["policy"]:
        name, learned = about["policy"]
        learned |= {key[len("policy/") :]: tensor for key, tensor in tensors.items() if key.startswith("policy/")}
        supernet.policy_state = (name, learned)
    if about["optimizer"] is not None:
        supernet.settings = TrainSettings(**about["optimizer"]["settings"])
        supernet.optimizer = _optimizer(list(supernet.parameters()), supernet.settings)
        supernet.optimizer.load_state_dict(_optimizer_state(supernet.optimizer, about["optimizer"]["plain"], tensors))
    return supernet


def _own(supernet: Supernet) -> dict[Key, torch.nn.Parameter]:
    """What is stored, by the first of its keys."""
    first: dict[int, Key] = {}
    for key, parameter in supernet.store.items():
        first.setdefault(id(parameter), key)
    return {key: supernet.store[key] for key in first.values()}


def _optimizer_state(
    optimizer: torch.optim.Optimizer, plain: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in plain.items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, kind = name.split("/")
            state.setdefault(int(index), {})[kind] = tensor
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def read(path: Path, version: int, what: str) -> dict[str, Any]:
    """The JSON file that :func:`write` wrote; ``what`` is what messages call its folder.

    Raises: ConfigError: there is none, or it is of another version. DamagedFile: it is not what was written.
    """
    place = path.parent
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no {what} in {place}: {path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{what} {place}: cannot read {path.name}: {error}") from error
    if not isinstance(about, dict) or about.get("checksum") != _checksum(about):
        raise DamagedFile(f"{what} {place}: {path.name} is not what was written (its checksum differs)")
    if about["version"] != version:
        raise ConfigError(f"{what} {place} has version {about['version']}, this nasgraph reads {version}")
    return about


def write(path: Path, about: Mapping[str, Any]) -> None:
    """``about`` as JSON with its checksum, in one step."""
    text = json.dumps({**about, "checksum": _checksum(about)}, indent=1, sort_keys=True)
    _write(path, (text + "\n").encode())


def _checksum(about: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in about.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _write(path: Path, data: bytes) -> None:
    """All of it under its name, or nothing."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
