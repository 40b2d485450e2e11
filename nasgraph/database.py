"""SQLite files of a run: opened the same way everywhere, locked, checked, and refused by name when damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nasgraph.errors import ConfigError, DamagedFile, NasgraphError

BUSY_SECONDS = 60.0


def connect(path: Path) -> sqlite3.Connection:
    """A connection in WAL mode: a killed process loses no committed row, readers and the writer do not block.

    ``synchronous=NORMAL``: a power cut may take back the last commits, never damage the file.
    """
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
    except BaseException:
        connection.close()
        raise
    return connection


def check(path: Path, remedy: str) -> None:
    """Refuse a file that SQLite finds damaged. ``remedy`` ends the message. Raises: DamagedFile."""
    if not path.exists():
        return
    try:
        connection = connect(path)
        try:
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and "malformed" not in str(error):
            raise NasgraphError(f"cannot open {path}: {error}") from error
        found = str(error)
    if found != "ok":
        raise DamagedFile(f"{path} is damaged ({' '.join(found.split())}). {remedy}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write (disk full, no permission) into one line that names the file. Raises: NasgraphError."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise NasgraphError(
            f"cannot write {path}: {error}. What was recorded before is kept: make room, then resume"
        ) from error


@contextmanager
def lock(path: Path, message: str | None) -> Iterator[None]:
    """Hold ``path`` (a file, made if needed, or a folder) alone. The system lets go of it when the process ends,
    however it ends. With ``message`` None, wait for it.

    Raises: ConfigError: another holds it; says ``message``.
    """
    if sys.platform == "win32":  # no flock: two searches on one run are then the user's care
        yield
        return
    import fcntl

    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if message else 0))
        except BlockingIOError:
            raise ConfigError(message or "") from None
        yield
    finally:
        with suppress(OSError):
            os.close(handle)


def digest(thing: Any) -> str:
    """SHA-256 of ``thing`` as canonical JSON: floats to the last bit, keys sorted."""
    return hashlib.sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()


def derive_seed(*parts: Any) -> int:
    """A seed below 2**32 that depends on all ``parts`` (plain values) and on nothing else."""
    return int(digest(parts)[:8], 16)
