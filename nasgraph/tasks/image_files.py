"""Image datasets from files: NumPy archives, and the binary files that the authors of MNIST and CIFAR-10 publish.

Nothing is downloaded and nothing is written. No file is read with pickle.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nasgraph.errors import DataError
from nasgraph.tasks.datasets import data_folder

Arrays = tuple[Any, Any, Any, Any]  # training images and labels, test images and labels

ARRAYS = ("train_x", "train_y", "test_x", "test_y")


@dataclass(frozen=True)
class Source:
    """Where a dataset may lie below ``images/``: an archive, or a folder as its authors publish it."""

    title: str
    archives: str  # a pattern
    folder: str
    files: str  # what the folder holds, for messages
    read_folder: Callable[[Path], Arrays]


def read(name: str, root: str | None = None, file: str | None = None) -> Arrays:
    """The images of ``mnist`` or ``cifar10``, as the file has them: uint8 ``(n, height, width[, 3])``; labels ``(n,)``.

    Args:
        root: folder that holds the dataset, or ``images/`` with it; default: ``$NASGRAPH_DATA``.
        file: an archive or folder within it; default: the one that is there.

    Raises: DataError: nothing is there, or a file cannot be read; names what to put where.
    """
    source = SOURCES[name]
    wanted = (
        f"images/{name}.npz with the arrays {', '.join(ARRAYS)}, or images/{source.folder} with {source.files} "
        f"(they are not downloaded)"
    )
    folder = data_folder(root, "images")
    if folder is None:
        raise DataError(f"no {source.title}: set NASGRAPH_DATA (or --data-root, root) to a folder that has {wanted}")
    if file is not None:
        path = folder / file
    else:
        exact = [path for path in (folder / f"{name}.npz", folder / source.folder) if path.exists()]
        found = exact or sorted(folder.glob(source.archives))
        if len(found) > 1:
            names = ", ".join(each.name for each in found)
            raise DataError(f"{source.title}: {folder} has {names}: name one of them with the task's argument file")
        path = found[0] if found else folder / f"{name}.npz"
    if not path.exists():
        raise DataError(f"no {source.title}: there is no {path}. A data folder needs {wanted}")
    try:
        return source.read_folder(path) if path.is_dir() else _archive(path)
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}). It must be {wanted}") from error


def _archive(path: Path) -> Arrays:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        if "train_jpeg" in archive:
            return tuple(
                part
                for split in ("train", "test")
                for part in (
                    _pictures(archive[f"{split}_jpeg"], archive[f"{split}_offset"], path),
                    archive[f"{split}_y"],
                )
            )
        return tuple(archive[name] for name in ARRAYS)


def _pictures(data: Any, offsets: Any, path: Path) -> Any:
    """Decode JPEG files that lie one after another: file ``i`` is ``data[offsets[i]:offsets[i + 1]]``."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise DataError(f"{path} holds JPEG images: pip install 'nasgraph[images]' (Pillow) to read them") from None
    pictures = []
    for start, end in zip(offsets[:-1], offsets[1:], strict=True):
        with Image.open(io.BytesIO(data[start:end].tobytes())) as picture:
            pictures.append(np.asarray(picture.convert("RGB")))
    return np.stack(pictures)


def _idx_files(folder: Path) -> Arrays:
    """MNIST as published: ``train-images-idx3-ubyte`` and so on, gzipped or not."""
    names = (f"{split}-{what}-ubyte" for split in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))
    return tuple(_idx(folder / name) for name in names)


def _idx(path: Path) -> Any:
    """An IDX file: two zeros, the type (8: uint8), the number of axes, their lengths as big-endian int32, the data."""
    zipped = path.with_name(path.name + ".gz")
    content = gzip.decompress(zipped.read_bytes()) if zipped.exists() else path.read_bytes()
    if content[:3] != b"\0\0\x08":
        raise DataError(f"{path} is no IDX file of uint8 numbers")
    lengths = np.frombuffer(content, ">i4", content[3], 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(lengths)


def _cifar_batches(folder: Path) -> Arrays:
    """CIFAR-10's binary version: rows of a label and 3 x 32 x 32 pixels."""

    def rows(names: list[str]) -> tuple[Any, Any]:
        data = np.concatenate([np.fromfile(folder / name, np.uint8) for name in names]).reshape(-1, 1 + 3 * 32 * 32)
        return data[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), data[:, 0]

    return (*rows([f"data_batch_{i}.bin" for i in range(1, 6)]), *rows(["test_batch.bin"]))


SOURCES = {
    "mnist": Source("MNIST", "mnist*.npz", "mnist", "the four published IDX files", _idx_files),
    "cifar10": Source(
        "CIFAR-10", "cifar10*.npz", "cifar-10-batches-bin", "the published binary version", _cifar_batches
    ),
}
