"""Image classification in mini-batches: images stay as small as they came until a batch needs them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasgraph import registry
from nasgraph.errors import ConfigError, DataError
from nasgraph.tasks import image_files
from nasgraph.tasks.batch import Batch, balanced
from nasgraph.tasks.loaded import SPLITS, LoadedTask, moved
from nasgraph.training.loop import TrainSettings

SCORED = 256  # images of a batch that is only scored
OPAQUE = 4  # channels that an image may have beside red, green, blue: transparency


@dataclass(frozen=True)
class ImageData:
    """Images with a class each, in three disjoint sets.

    Shapes: ``*_x`` ``(n, channels, size, size)`` uint8 or float32; ``*_y`` ``(n,)`` int64, 0 to classes - 1.
    """

    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor


class ImageTask(LoadedTask[ImageData]):
    """Image classification. Pixels are shifted and scaled to mean 0 and variance 1 per channel of the training images.

    Args:
        name, load, device: see :class:`~nasgraph.tasks.loaded.LoadedTask`.
        batch_size: most images of a training mini-batch; batches of an epoch are equally large, up to one image.
        shift: in training, move each image by up to so many pixels along each axis, what enters is black (0).
        flip: in training, mirror each image left to right with probability 1/2.

    Raises: ConfigError: ``batch_size`` is below 2 (BatchNorm needs two) or ``shift`` below 0.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], ImageData],
        batch_size: int = 64,
        shift: int = 0,
        flip: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        for argument, value, least in (("batch_size", batch_size, 2), ("shift", shift, 0)):
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}: {argument} is {value!r}, it must be a whole number of at least {least}")
        super().__init__(name, load, batch_size, device)
        self.shift, self.flip = shift, flip

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in ("sizes", "_scale")}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """``image_channels``, ``image_size`` (height and width) and ``classes``."""
        _, channels, size, _ = self.data.train_x.shape
        return {"image_channels": channels, "image_size": size, "classes": int(self.data.train_y.max()) + 1}

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """One training image, ``(1, channels, size, size)``: costs and latency are those of a single image.

        In the memory format of a tensor that comes from elsewhere, which may take another kernel than that of batches.
        """
        return (self.normalised(self.data.train_x[:1]).clone(memory_format=torch.contiguous_format),)

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over the training images, ``(channels, 1, 1)``."""
        channels = self.data.train_x.transpose(0, 1).flatten(1)
        if channels.dtype == torch.uint8:  # counted, so the result is exact whatever adds it up
            counts = torch.stack([torch.bincount(channel, minlength=256) for channel in channels]).double()
            values = torch.arange(256, device=channels.device).double()
            mean = counts @ values / channels.shape[1]
            variance = (counts @ values.square()) / channels.shape[1] - mean.square()
        else:
            variance, mean = torch.var_mean(channels.double(), dim=1, correction=0)
        deviation = variance.clamp(min=0).sqrt()
        deviation = torch.where(deviation > 0, deviation, 1.0)  # a channel of one value
        return mean.float().view(-1, 1, 1), deviation.float().view(-1, 1, 1)

    def normalised(self, images: Tensor) -> Tensor:
        """``images`` ``(n, channels, size, size)`` as models see them: float32, by the training images' statistics.

        In channels-last format: on a CPU convolutional networks then train 1.3 to 2 times as fast.
        """
        mean, deviation = self._scale
        return ((images.float() - mean) / deviation).clone(memory_format=torch.channels_last)

    def batches(self, split: str) -> Batches:
        """``"train"``, ``"val"`` or ``"test"`` in the images' own order; pixels are normalised batch by batch."""
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}: there are {', '.join(SPLITS)}")
        return Batches(self, getattr(self.data, f"{split}_x"), getattr(self.data, f"{split}_y"), SCORED)

    def _of_split(self, split: str) -> Iterator[Batch]:
        return iter(self.batches(split))

    def epochs(self, seed: int) -> Batches:
        """Training batches; order and augmentation depend on ``seed`` and the epoch's number only."""
        return Batches(self, self.data.train_x, self.data.train_y, self.batch_size, seed, self.shift, self.flip)

    def batch(self, n: int, seed: int) -> Batch:
        """``n`` training images, or all, not augmented; the classes' counts differ by at most one where they last."""
        chosen = balanced(self.data.train_y, n, seed).to(self.device)
        return Batch((self.normalised(self.data.train_x[chosen]),), self.data.train_y[chosen])

    def baseline(self) -> dict[str, float]:
        """What a logistic regression on the pixels reaches: the least a network has to beat.

        Trained by the same loop (Adam, weight decay 0.001, up to 30 epochs with early stopping); its learning rate is
        chosen by validation accuracy.

        Returns: ``val_accuracy`` and ``test_accuracy`` (fractions) and ``lr``.
        """
        plain = ImageTask(self.name, self.load)
        plain.__dict__["data"] = moved(self.data, "cpu")
        pixels, classes = math.prod(self.data.train_x.shape[1:]), self.sizes["classes"]
        best: dict[str, float] = {"val_accuracy": -1.0}
        for lr in (0.0003, 0.001, 0.003, 0.01):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))
            settings = TrainSettings(epochs=30, lr=lr, weight_decay=0.001, patience=4)
            val = plain.fit(model, settings, seed=0).val
            if val > best["val_accuracy"]:
                test = plain.score(model, "test")["accuracy"]
                best = {"val_accuracy": val, "test_accuracy": test, "lr": lr}
        return best


class Batches:
    """Mini-batches of equal size, up to one image; each iteration is an epoch with an order of its own.

    Args:
        seed: of order and augmentation; None: the images' own order, and no augmentation.
        shift, flip: see :class:`ImageTask`.
    """

    def __init__(
        self,
        task: ImageTask,
        images: Tensor,
        labels: Tensor,
        size: int,
        seed: int | None = None,
        shift: int = 0,
        flip: bool = False,
    ) -> None:
        self.task, self.images, self.labels, self.size = task, images, labels, size
        self.seed, self.shift, self.flip = seed, shift, flip
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.labels) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        if self.seed is None:
            for part in torch.arange(len(self.labels), device=self.labels.device).tensor_split(len(self)):
                yield Batch((self.task.normalised(self.images[part]),), self.labels[part])
            return
        digest = hashlib.sha256(f"{self.seed}/{self.epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        self.epoch += 1
        for part in torch.randperm(len(self.labels), generator=generator).tensor_split(len(self)):
            part = part.to(self.labels.device)
            images = self.images[part]
            if self.shift:
                images = shifted(images, self.shift, generator)
            if self.flip:
                mirrored = torch.rand(len(part), generator=generator) < 0.5
                images = torch.where(mirrored.view(-1, 1, 1, 1).to(images.device), images.flip(-1), images)
            yield Batch((self.task.normalised(images),), self.labels[part])


def shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each of ``images`` ``(n, c, h, w)`` moved by -most to most pixels along each axis; zeros come in."""
    n, _, height, width = images.shape
    down, right = torch.randint(0, 2 * most + 1, (2, n, 1), generator=generator).to(images.device)
    rows = down + torch.arange(height, device=images.device)
    columns = right + torch.arange(width, device=images.device)
    padded = F.pad(images, (most, most, most, most)).permute(0, 2, 3, 1)
    every = torch.arange(n, device=images.device).view(-1, 1, 1)
    return padded[every, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def mnist(
    train_samples: int | None = None,
    val: float = 0.2,
    batch_size: int = 64,
    shift: int = 0,
    flip: bool = False,
    seed: int = 0,
    root: str | None = None,
    file: str | None = None,
) -> ImageTask:
    """Handwritten digits, 28 x 28, grey (LeCun et al. 1998), from ``images/mnist.npz`` or the published IDX files.

    Split: the published test images; of the others the share ``val`` of each class, drawn from ``seed``, for
    validation. ``root`` and ``file``: see :func:`nasgraph.tasks.image_files.read`.

    Args:
        train_samples: train on so many images, the classes balanced; default: all that validation leaves.

    Raises: ConfigError: a number out of range. Loading raises DataError.
    """
    load = partial(_from_files, "mnist", root, file, *_split_arguments("mnist", train_samples, val), seed)
    return ImageTask("mnist", load, batch_size, shift, flip)


def cifar10(
    train_samples: int | None = None,
    val: float = 0.2,
    batch_size: int = 64,
    shift: int = 0,
    flip: bool = False,
    seed: int = 0,
    root: str | None = None,
    file: str | None = None,
) -> ImageTask:
    """Colour photographs of 10 classes, 32 x 32 (Krizhevsky 2009), from ``images/cifar10.npz`` or the binary version.

    Split and arguments: see :func:`mnist`. The usual augmentation is ``shift=4, flip=True``.
    """
    load = partial(_from_files, "cifar10", root, file, *_split_arguments("cifar10", train_samples, val), seed)
    return ImageTask("cifar10", load, batch_size, shift, flip)


def digits_images(
    train_samples: int | None = None,
    val: float = 0.2,
    batch_size: int = 32,
    shift: int = 0,
    flip: bool = False,
    seed: int = 0,
) -> ImageTask:
    """scikit-learn's 1,797 digits, 8 x 8, grey: real images that need no download.

    Split, drawn from ``seed``: of each class a quarter for the test and the share ``val`` of the rest for validation.
    """
    load = partial(_digits, *_split_arguments("digits_images", train_samples, val), seed)
    return ImageTask("digits_images", load, batch_size, shift, flip)


def images_from_function(
    function: str,
    train_samples: int | None = None,
    val: float = 0.2,
    batch_size: int = 64,
    shift: int = 0,
    flip: bool = False,
    seed: int = 0,
) -> ImageTask:
    """Your own images: ``module:function`` returns training images, training labels, test images, test labels.

    Shapes: images ``(n, size, size)`` or ``(n, size, size, channels)``, uint8 or float; labels ``(n,)``, whole
    numbers from 0 on; NumPy arrays or tensors. The share ``val`` of each class's training images, drawn from ``seed``,
    is for validation. Loading raises DataError naming what is wrong.
    """
    load = partial(_from_function, function, *_split_arguments(function, train_samples, val), seed)
    return ImageTask(function, load, batch_size, shift, flip)


def _split_arguments(name: str, train_samples: int | None, val: float) -> tuple[int | None, float]:
    if train_samples is not None and (not isinstance(train_samples, int) or train_samples < 2):
        raise ConfigError(f"{name}: train_samples is {train_samples!r}, it must be a whole number of at least 2")
    if not isinstance(val, int | float) or not 0 < val < 1:
        raise ConfigError(f"{name}: val is {val!r}, it must be a share between 0 and 1")
    return train_samples, val


def _from_files(
    name: str, root: str | None, file: str | None, train_samples: int | None, val: float, seed: int
) -> ImageData:
    return checked(image_files.read(name, root, file), name, train_samples, val, seed)


def _from_function(function: str, train_samples: int | None, val: float, seed: int) -> ImageData:
    return checked(registry.make("tasks", function, {}), function, train_samples, val, seed)


def _digits(train_samples: int | None, val: float, seed: int) -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.from_numpy(digits.images).to(torch.uint8)
    y = torch.from_numpy(digits.target).long()
    rest, test = stratified(y, 0.25, seed)
    return checked((x[rest], y[rest], x[test], y[test]), "digits_images", train_samples, val, seed)


def checked(arrays: Any, name: str, train_samples: int | None = None, val: float = 0.2, seed: int = 0) -> ImageData:
    """Training images, training labels, test images, test labels, checked and split; see :func:`images_from_function`.

    Raises: DataError: something is missing or has the wrong type, shape or range; the message names it.
    """
    if not isinstance(arrays, tuple | list) or len(arrays) != 4:
        form = f"{len(arrays)} things" if isinstance(arrays, tuple | list) else f"a {type(arrays).__name__}"
        raise DataError(f"'{name}' gave {form}: training images, training labels, test images, test labels are needed")
    x, y = _images(arrays[0], name, "training"), _labels(arrays[1], arrays[0], name, "training")
    test_x, test_y = _images(arrays[2], name, "test"), _labels(arrays[3], arrays[2], name, "test")
    if x.shape[1:] != test_x.shape[1:] or x.dtype != test_x.dtype:
        raise DataError(f"'{name}': training images are {_form(x)}, test images {_form(test_x)}: make them alike")
    counts = y.bincount()
    if len(counts) < 2 or int(counts.min()) < 2:
        few = int(counts.argmin())
        raise DataError(f"'{name}': class {few} has {int(counts.min())} training images; it needs 2, of 2 classes")
    if int(test_y.max()) >= len(counts):
        raise DataError(f"'{name}': a test label is {int(test_y.max())}, training labels go to {len(counts) - 1}")
    training, validation = stratified(y, val, seed)
    if train_samples is not None:
        if train_samples > len(training):
            raise DataError(f"'{name}': train_samples is {train_samples}, but validation leaves {len(training)}")
        training = training[balanced(y[training], train_samples, seed).sort().values]
    return ImageData(x[training], y[training], x[validation], y[validation], test_x, test_y)


def stratified(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of the rest, and of ``share`` of each class, rounded, at least one on either side; both ascending."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    taken = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        mine = order[labels[order] == label]
        taken[mine[: min(max(1, round(share * len(mine))), len(mine) - 1)]] = True
    return (~taken).nonzero().flatten(), taken.nonzero().flatten()


def _images(array: Any, name: str, what: str) -> Tensor:
    x = _tensor(array, name, f"{what} images")
    if x.dim() == 3:
        x = x.unsqueeze(-1)
    if x.dim() != 4 or x.numel() == 0:
        raise DataError(f"'{name}': {what} images are {_form(x)}; (n, size, size) or (n, size, size, channels) needed")
    if x.shape[1] != x.shape[2]:
        first = x.shape[2] == x.shape[3] and x.shape[1] <= OPAQUE
        out = "put the channels last" if first else "crop or pad them to squares"
        raise DataError(f"'{name}': {what} images are {_form(x)}, which is not square: {out}")
    if x.dtype != torch.uint8:
        if not x.is_floating_point():
            raise DataError(f"'{name}': {what} images are {_form(x)}: uint8 or float is needed")
        x = x.float()
        if not bool(x.isfinite().all()):
            raise DataError(f"'{name}': {what} images hold {int((~x.isfinite()).sum())} values that are not finite")
    return x.permute(0, 3, 1, 2).contiguous()


def _labels(array: Any, images: Any, name: str, what: str) -> Tensor:
    y = _tensor(array, name, f"{what} labels")
    if y.dim() != 1 or len(y) != len(images) or y.is_floating_point() or y.dtype == torch.bool:
        raise DataError(f"'{name}': {what} labels are {_form(y)}, they must be whole numbers of shape ({len(images)},)")
    if int(y.min()) < 0:
        raise DataError(f"'{name}': a {what} label is {int(y.min())}: classes count from 0")
    return y.long()


def _tensor(array: Any, name: str, what: str) -> Tensor:
    try:
        return array.detach().cpu() if isinstance(array, Tensor) else torch.from_numpy(np.array(array))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"'{name}': {what} are a {type(array).__name__}, no array or tensor ({error})") from error


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
