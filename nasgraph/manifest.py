"""What was run: versions, seeds, hashes. One JSON file per run, enough to repeat it and to notice damage."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nasgraph.errors import DamagedFile, NasgraphError

PACKAGES = (
    "nasgraph", "torch", "torch-geometric", "optuna", "ray", "networkx", "scikit-learn", "numpy", "onnx", "onnxruntime",
)  # fmt: skip


def environment(threads: int, device: str) -> dict[str, Any]:
    """Versions, machine and code state: what the bits of a result depend on beside config and data."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "device": device,
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def write(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest in one step: a reader, or a kill, meets the old file or the new one.

    Raises: NasgraphError: the folder cannot be written or the disk is full.
    """
    with writing(path) as file:
        file.write(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


@contextmanager
def writing(path: Path) -> Iterator[io.StringIO]:
    """A text file that appears whole or not at all. Raises: NasgraphError: it cannot be written."""
    text = io.StringIO(newline="")
    yield text
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise NasgraphError(
            f"cannot write {path}: {error.strerror or error}; free the disk or choose another --out"
        ) from None


def read(path: Path) -> dict[str, Any]:
    """The manifest at ``path``.

    Raises: NasgraphError: there is none. DamagedFile: it is not what was written.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NasgraphError(f"{path.parent} holds no run: there is no {path.name} in it") from None
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{path} is damaged ({error}): restore it, or start a new run in another folder") from None
    for key in ("config", "space", "task", "seconds"):
        if not isinstance(found, dict) or not isinstance(found.get(key), dict):
            raise DamagedFile(f"{path} is damaged (no {key} in it): restore it, or start a new run in another folder")
    return found


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hashes(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file, by its path relative to ``folder``."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(paths)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the working directory's repository and whether it was changed; None outside of one."""

    def ask(*arguments: str) -> str | None:
        try:
            return subprocess.run(
                ["git", *arguments], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    commit = ask("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "changed": bool(ask("status", "--porcelain"))}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
