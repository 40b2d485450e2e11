"""PyG's datasets from a folder of raw files or the network, without writing where the data lies.

PyG writes ``processed/`` beside ``raw/``, which a read-only folder refuses and parallel workers corrupt. So raw files
are copied, or downloaded, into a new folder of the cache, PyG processes them there, and the finished folder gets its
final name in one step: a reader sees all of it or nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from nasgraph.errors import ConfigError, DataError, did_you_mean

FAMILIES = {
    "Planetoid": ("Cora", "CiteSeer", "PubMed"),
    "Amazon": ("Computers", "Photo"),
    "Coauthor": ("CS", "Physics"),
    "TUDataset": (
        *("MUTAG", "PROTEINS", "IMDB-BINARY", "IMDB-MULTI", "ENZYMES", "NCI1", "NCI109", "PTC_MR", "DD", "AIDS"),
        *("Mutagenicity", "COLLAB", "REDDIT-BINARY", "REDDIT-MULTI-5K"),
    ),
}


def check_name(family: str, name: str) -> None:
    """Raises: ConfigError: ``family`` has no dataset of that name."""
    known = FAMILIES[family]
    if name not in known:
        raise ConfigError(f"unknown {family} dataset '{name}'.{did_you_mean(name, known)} Known: {', '.join(known)}.")


def cache_folder() -> Path:
    """``$NASGRAPH_CACHE``, else ``$XDG_CACHE_HOME/nasgraph``, else ``~/.cache/nasgraph``."""
    if "NASGRAPH_CACHE" in os.environ:
        return Path(os.environ["NASGRAPH_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nasgraph"


def data_folder(root: str | None, kind: str) -> Path | None:
    """Where data lie: ``root``, else ``$NASGRAPH_DATA``, or the folder ``kind`` in it. None: none is named."""
    given = root or os.environ.get("NASGRAPH_DATA")
    if not given:
        return None
    folder = Path(given).expanduser()
    return folder / kind if (folder / kind).is_dir() else folder


def graphs_folder(root: str | None) -> Path | None:
    """Where raw graphs lie: see :func:`data_folder`."""
    return data_folder(root, "graphs")


def load(family: str, name: str, root: str | None = None) -> Any:
    """The first, and of node datasets the only, ``torch_geometric.data.Data`` of a dataset. See :func:`dataset`."""
    return dataset(family, name, root)[0]


def dataset(family: str, name: str, root: str | None = None) -> Any:
    """A dataset as PyG's class gives it.

    Args:
        family: ``Planetoid``, ``Amazon``, ``Coauthor`` or ``TUDataset``: PyG's class.
        name: the dataset, spelled as PyG spells it.
        root: folder with ``<family>/<name>/raw``, or with ``graphs/<family>/<name>/raw``; it is only read. Default:
            ``$NASGRAPH_DATA``; without that, PyG downloads into the cache.

    Raises: ConfigError: unknown name. DataError: raw files are missing, cannot be read or cannot be downloaded.
    """
    check_name(family, name)
    graphs = graphs_folder(root)
    raw = None if graphs is None else graphs / family / name / "raw"
    if raw is not None and not raw.is_dir():
        raise DataError(
            f"no {family} dataset {name}: there is no folder {raw}. Put PyG's raw files there, name another data "
            f"folder, or name none (root, NASGRAPH_DATA) to download it into {cache_folder()}."
        )
    folder = cache_folder() / family / _version(raw)
    try:
        if not (folder / name / "processed").is_dir():
            _process(family, name, raw, folder)
        return _dataset(family, name, folder, raw)
    except OSError as error:
        raise DataError(f"cannot keep {name} in {folder}: {error}. Set NASGRAPH_CACHE to another folder.") from error


def _version(raw: Path | None) -> str:
    """Name of the cached copy: changes with the raw files and with PyG, whose processed form may change."""
    import torch_geometric

    if raw is None:
        return f"downloaded-{torch_geometric.__version__}"
    digest = hashlib.sha256()
    for path in sorted(raw.iterdir()):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return f"{digest.hexdigest()[:16]}-{torch_geometric.__version__}"


def _process(family: str, name: str, raw: Path | None, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="new-") as scratch:
        new = Path(scratch) / name
        if raw is not None:
            (new / "raw").mkdir(parents=True)
            for path in raw.iterdir():
                if path.is_file():
                    shutil.copyfile(path, new / "raw" / path.name)
        _dataset(family, name, Path(scratch), raw)
        try:
            new.rename(folder / name)
        except OSError:  # not empty: another process was first, and its copy is as good
            if not (folder / name / "processed").is_dir():
                raise


def _dataset(family: str, name: str, folder: Path, raw: Path | None) -> Any:
    import torch_geometric.datasets

    cls = getattr(torch_geometric.datasets, family)

    def download(dataset: Any) -> None:
        """Called by PyG when a raw file is missing."""
        if raw is not None:
            names = dataset.raw_file_names
            wanted = ", ".join([names] if isinstance(names, str) else names)
            raise DataError(f"{family} dataset {name}: a raw file is missing in {raw}. It needs {wanted}.")
        try:
            cls.download(dataset)
        except Exception as error:
            raise DataError(
                f"cannot download {family} dataset {name} ({type(error).__name__}: {error}). Put PyG's raw files into "
                f"<folder>/{family}/{name}/raw and set NASGRAPH_DATA=<folder>."
            ) from error

    with contextlib.redirect_stderr(io.StringIO()):  # PyG prints "Processing... Done!"
        try:
            return type(family, (cls,), {"download": download})(str(folder), name)
        except (DataError, OSError, MemoryError):
            raise
        except Exception as error:
            raise DataError(
                f"{family} dataset {name}: raw files of {raw or 'the download'} cannot be read "
                f"({type(error).__name__}: {error}). Fetch them again."
            ) from error
