"""Image tasks: files as they are published, splits, mini-batches, augmentation against plain loops, training."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nasgraph.errors import ConfigError, DataError
from nasgraph.tasks import Batch, Task
from nasgraph.tasks.images import (
    ImageTask,
    checked,
    cifar10,
    digits_images,
    images_from_function,
    mnist,
    shifted,
    stratified,
)
from nasgraph.training import TrainSettings

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def digits() -> ImageTask:
    return digits_images()


class CNN(nn.Module):
    """Two convolutions with BatchNorm and a linear layer; for grey images."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Flatten(), nn.LazyLinear(10)),
            )
            self.layers(torch.zeros(2, 1, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


# ---- data and splits -----------------------------------------------------------------------------------------------


def test_digits_are_split_by_class_and_whole(digits: ImageTask) -> None:
    assert isinstance(digits, Task)
    assert digits.sizes == {"image_channels": 1, "image_size": 8, "classes": 10}
    assert digits.inputs[0].shape == (1, 1, 8, 8)
    parts = {split: getattr(digits.data, f"{split}_y").bincount() for split in SPLITS}
    every = sum(parts.values())
    assert int(every.sum()) == 1797
    assert torch.allclose(parts["test"], (every * 0.25).round().long(), atol=1)
    assert torch.allclose(parts["val"], ((every - parts["test"]) * 0.2).round().long(), atol=1)
    assert digits.data.train_x.dtype == torch.uint8


def test_digits_keep_every_image_once(digits: ImageTask) -> None:
    from sklearn.datasets import load_digits

    images = torch.cat([getattr(digits.data, f"{split}_x") for split in SPLITS]).flatten(1)
    labels = torch.cat([getattr(digits.data, f"{split}_y") for split in SPLITS])
    have = torch.cat([images.long(), labels[:, None]], dim=1).tolist()
    x, y = load_digits(return_X_y=True)
    assert sorted(have) == sorted([*map(int, row), int(label)] for row, label in zip(x, y, strict=True))


def test_a_seed_draws_the_split(digits: ImageTask) -> None:
    again, other = digits_images(), digits_images(seed=1)
    assert again.fingerprint() == digits.fingerprint() != other.fingerprint()
    assert digits_images(train_samples=100).fingerprint() != digits.fingerprint()


def test_stratified_takes_the_share_of_each_class() -> None:
    labels = torch.tensor([0] * 10 + [1] * 5 + [2] * 2)
    rest, taken = stratified(labels, 0.2, seed=3)
    assert labels[taken].bincount().tolist() == [2, 1, 1]
    assert torch.equal(torch.cat([rest, taken]).sort().values, torch.arange(17))
    assert labels[stratified(labels, 0.9, seed=3)[0]].bincount().tolist() == [1, 1, 1]  # something is left of each


def test_train_samples_cuts_the_training_images_only(digits: ImageTask) -> None:
    few = digits_images(train_samples=50)
    assert few.data.train_y.bincount().tolist() == [5] * 10
    assert torch.equal(few.data.val_x, digits.data.val_x)
    with pytest.raises(DataError, match="train_samples is 5000, but validation leaves 1078"):
        digits_images(train_samples=5000).data  # noqa: B018


def test_a_task_pickles_small_and_comes_back_the_same(digits: ImageTask) -> None:
    task = digits_images(batch_size=7, shift=1, flip=True)
    task.sizes, task.inputs  # noqa: B018 - load
    text = pickle.dumps(task)
    again = pickle.loads(text)
    assert len(text) < 1000
    assert again.fingerprint() == digits.fingerprint()
    assert (again.batch_size, again.shift, again.flip) == (7, 1, True)
    moved = task.to("cpu")
    assert (moved.batch_size, moved.shift, moved.flip) == (7, 1, True)


def test_the_fingerprint_sees_every_tensor(digits: ImageTask) -> None:
    seen = {digits.fingerprint()}
    for split in SPLITS:
        for part in ("x", "y"):
            changed = digits_images()
            getattr(changed.data, f"{split}_{part}").view(-1)[-1] += 1
            seen.add(changed.fingerprint())
    assert len(seen) == 7


def test_pixels_are_normalised_by_the_training_images() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)
    x[..., 2] = 9  # a channel of one value
    y, test_x = np.arange(40) % 2, 255 - x[:4]
    for images, tests in ((x, test_x), (x.astype(np.float64) / 255, test_x / 255)):
        task = ImageTask("mine", partial(checked, (images, y, tests, y[:4]), "mine"))
        train = task.data.train_x.double().numpy()
        mean = train.mean((0, 2, 3), keepdims=True)
        deviation = train.std((0, 2, 3), keepdims=True)
        deviation[0, 2] = 1.0
        expected = (task.data.test_x.double().numpy() - mean) / deviation
        (batch,) = task.batches("test")
        assert np.allclose(batch.inputs[0].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_channels_last_and_inputs_are_not(channels: int) -> None:
    """An exported model is compared on ``inputs``: read from a file, they have to take the same kernels to the bit."""
    x = np.zeros((20, 4, 4, channels), dtype=np.uint8)
    task = ImageTask("mine", partial(checked, (x, np.arange(20) % 2, x[:4], np.arange(4) % 2), "mine"), shift=1)
    plain, last = (16 * channels, 16, 4, 1), (16 * channels, 1, 4 * channels, channels)
    assert [tensor.stride() for tensor in task.inputs] == [plain]
    for batches in ([task.batch(4, 0)], task.batches("train"), task.epochs(0)):
        assert {batch.inputs[0].stride() for batch in batches} == {last}


# ---- batches -------------------------------------------------------------------------------------------------------


def epoch(task: ImageTask, seed: int) -> tuple[list[int], Tensor, Tensor]:
    """Sizes, images and labels of one pass."""
    batches = list(task.epochs(seed))
    images = torch.cat([batch.inputs[0] for batch in batches])
    return [len(b.target) for b in batches], images, torch.cat([batch.target for batch in batches])


def test_an_epoch_has_each_image_once_in_batches_of_equal_size() -> None:
    task = digits_images(train_samples=161, batch_size=32)
    sizes, images, labels = epoch(task, seed=5)
    assert sizes == [27, 27, 27, 27, 27, 26]  # and no batch of a single image, which BatchNorm refuses
    plain = task.normalised(task.data.train_x)
    distance = (images.flatten(1)[:, None] - plain.flatten(1)[None]).abs().amax(dim=2)
    assert torch.equal(distance.argmin(dim=1).sort().values, torch.arange(161))
    assert torch.equal(task.data.train_y[distance.argmin(dim=1)], labels)


def test_every_epoch_has_its_own_order_and_a_seed_repeats_them(digits: ImageTask) -> None:
    def labels(seed: int) -> list[list[int]]:
        batches = digits.epochs(seed)
        return [torch.cat([batch.target for batch in batches]).tolist() for _ in range(2)]

    first, again, other = labels(0), labels(0), labels(1)
    assert first == again
    assert first[0] != first[1]
    assert first != other


def test_shifts_move_each_image_by_its_own_whole_pixels() -> None:
    images = torch.randint(1, 255, (200, 2, 5, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    moved = shifted(images, 2, torch.Generator().manual_seed(1))
    seen = set()
    for image, after in zip(images.numpy(), moved.numpy(), strict=True):
        found = []
        for down in range(-2, 3):
            for right in range(-2, 3):
                expected = np.zeros_like(image)
                for i in range(5):
                    for j in range(5):
                        if 0 <= i + down < 5 and 0 <= j + right < 5:
                            expected[:, i, j] = image[:, i + down, j + right]
                if (expected == after).all():
                    found.append((down, right))
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) == 25


def test_about_half_of_the_images_are_mirrored() -> None:
    _, plain, _ = epoch(digits_images(batch_size=64), seed=0)
    _, flipped, _ = epoch(digits_images(batch_size=64, flip=True), seed=0)
    same = (flipped == plain).flatten(1).all(1)
    mirrored = (flipped == plain.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 0.45 < float(mirrored.float().mean()) < 0.55


def test_a_batch_is_balanced_drawn_from_the_training_images_and_repeatable(digits: ImageTask) -> None:
    for n in (7, 30, 999_999):
        batch = digits.batch(n, seed=4)
        counts = batch.target.bincount(minlength=10)
        assert isinstance(batch, Batch)
        assert len(batch.target) == min(n, len(digits.data.train_y))
        assert n > 1000 or int(counts.max() - counts.min()) <= 1
    assert torch.equal(digits.batch(30, 4).inputs[0], digits.batch(30, 4).inputs[0])
    assert not torch.equal(digits.batch(30, 4).inputs[0], digits.batch(30, 5).inputs[0])


def test_a_cnn_beats_the_logistic_regression_and_two_fits_give_the_same_bits(digits: ImageTask) -> None:
    baseline = digits.baseline()
    models = [CNN(), CNN()]
    state = torch.random.get_rng_state()
    fits = [digits.fit(model, TrainSettings(epochs=6, lr=0.003), seed=0) for model in models]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert fits[0].history == fits[1].history
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert digits.score(models[0], "val") == {"accuracy": fits[0].val, "loss": fits[0].val_loss}
    assert 0.9 < baseline["test_accuracy"] < digits.score(models[0], "test")["accuracy"]


def test_wrong_arguments_are_named() -> None:
    for wrong, said in (
        ({"batch_size": 1}, "batch_size is 1, it must be a whole number of at least 2"),
        ({"shift": -1}, "shift is -1"),
        ({"val": 1.0}, "val is 1.0, it must be a share between 0 and 1"),
        ({"train_samples": 1}, "train_samples is 1, it must be a whole number of at least 2"),
    ):
        with pytest.raises(ConfigError, match=said):
            digits_images(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no split 'valid'"):
        digits_images().score(CNN(), "valid")


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "train_x": rng.integers(0, 256, (30, 4, 4), dtype=np.uint8),
        "train_y": (np.arange(30) % 3).astype(np.uint8),
        "test_x": rng.integers(0, 256, (6, 4, 4), dtype=np.uint8),
        "test_y": (np.arange(6) % 3).astype(np.uint8),
    }


def idx(array: Any) -> bytes:
    return struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_idx_files_zipped_or_not_are_the_arrays_of_an_archive(arrays: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    np.savez(tmp_path / "images" / "mnist.npz", **arrays)
    from_archive = mnist(root=str(tmp_path))
    folder = tmp_path / "other" / "images" / "mnist"
    folder.mkdir(parents=True)
    (folder / "train-images-idx3-ubyte").write_bytes(idx(arrays["train_x"]))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(arrays["train_y"])))
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(arrays["test_x"])))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(arrays["test_y"]))
    assert mnist(root=str(tmp_path / "other")).fingerprint() == from_archive.fingerprint()
    assert torch.equal(from_archive.data.test_x, torch.from_numpy(arrays["test_x"]).unsqueeze(1))


def test_cifar_batches_are_a_label_and_three_planes(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        rows = rng.integers(0, 256, (20, 3073), dtype=np.uint8)
        rows[:, 0] = np.arange(20) % 10
        (folder / name).write_bytes(rows.tobytes())
    data = cifar10(root=str(tmp_path)).data
    assert data.test_x.shape == (20, 3, 32, 32)
    assert torch.equal(data.test_x.flatten(1), torch.from_numpy(rows[:, 1:]))
    assert len(data.train_y) + len(data.val_y) == 100


def test_jpeg_images_are_decoded(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    colours = [(250, 10, 30), (20, 200, 90), (0, 0, 0), (90, 90, 255)]
    files = []
    for colour in colours:
        buffer = io.BytesIO()
        image.new("RGB", (8, 8), colour).save(buffer, "JPEG", quality=95)
        files.append(buffer.getvalue())
    packed = np.frombuffer(b"".join(files), np.uint8)
    offsets = np.cumsum([0, *map(len, files)])
    labels = np.array([0, 1, 0, 1])
    np.savez(
        tmp_path / "cifar10.npz",
        **{f"{split}_{name}": value for split in ("train", "test")
           for name, value in (("jpeg", packed), ("offset", offsets), ("y", labels))},
    )  # fmt: skip
    decoded = cifar10(root=str(tmp_path), val=0.5).data.test_x
    expected = torch.tensor(colours)[:, :, None, None].expand(4, 3, 8, 8)
    assert int((decoded.int() - expected).abs().max()) <= 3


def test_what_is_missing_is_named_with_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrays: dict[str, Any]
) -> None:
    monkeypatch.delenv("NASGRAPH_DATA", raising=False)
    with pytest.raises(DataError, match=r"no MNIST: set NASGRAPH_DATA .* images/mnist.npz with the arrays train_x"):
        mnist().data  # noqa: B018
    with pytest.raises(DataError, match=r"no CIFAR-10: there is no .*cifar10.npz. .*images/cifar-10-batches-bin with"):
        cifar10(root=str(tmp_path)).data  # noqa: B018
    np.savez(tmp_path / "mnist_a.npz", **arrays)
    monkeypatch.setenv("NASGRAPH_DATA", str(tmp_path))
    assert mnist().sizes["image_size"] == 4
    np.savez(tmp_path / "mnist_b.npz", **arrays)
    with pytest.raises(DataError, match="has mnist_a.npz, mnist_b.npz: name one of them with the task's argument file"):
        mnist().data  # noqa: B018
    assert mnist(file="mnist_b.npz").sizes["image_size"] == 4


@pytest.mark.parametrize("damage", ["short", "text", "no array", "no idx", "short idx"])
def test_a_damaged_file_is_named(damage: str, tmp_path: Path, arrays: dict[str, Any]) -> None:
    path = tmp_path / "mnist.npz"
    if damage == "no array":
        del arrays["test_y"]
    np.savez(path, **arrays)
    if damage == "short":
        path.write_bytes(path.read_bytes()[:200])
    if damage == "text":
        path.write_text("<html>not found</html>")
    if "idx" in damage:
        path.unlink()
        path = tmp_path / "mnist"
        path.mkdir()
        content = b"\x1f\x8b" if damage == "no idx" else idx(arrays["train_x"])[:100]
        (path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=rf"{path}\S* (cannot be read|is no IDX file)") as error:
        mnist(root=str(tmp_path)).data  # noqa: B018
    assert "\n" not in str(error.value)


def test_real_images_are_what_their_publishers_say(data_root: Path) -> None:
    pytest.importorskip("PIL")
    digits, photos = mnist(root=str(data_root)), cifar10(root=str(data_root), train_samples=1000)
    assert digits.sizes == {"image_channels": 1, "image_size": 28, "classes": 10}
    assert [len(getattr(digits.data, f"{split}_y")) for split in SPLITS] == [8000, 2000, 10000]
    mean, deviation = (float(each) / 255 for each in digits._scale)
    assert (mean, deviation) == (pytest.approx(0.1307, abs=0.005), pytest.approx(0.3081, abs=0.005))  # of all 60,000
    assert photos.sizes == {"image_channels": 3, "image_size": 32, "classes": 10}
    assert photos.data.val_y.bincount().tolist() == photos.data.train_y.bincount().tolist() == [100] * 10
    means = (photos._scale[0].flatten() / 255).tolist()
    assert means == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.02)  # of all 50,000


# ---- the user's own --------------------------------------------------------------------------------------------------


def mine() -> Any:
    rng = np.random.default_rng(0)
    return rng.random((20, 5, 5)), np.arange(20) % 2, torch.rand(4, 5, 5), [0, 1, 0, 1]


def test_a_function_of_the_user_is_called_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_pictures.py").write_text(
        "import numpy as np\n"
        "def load():\n"
        "    x = np.arange(20 * 5 * 5 * 3, dtype=np.uint8).reshape(20, 5, 5, 3)\n"
        "    return x, np.arange(20) % 4, x[:4], np.arange(4)\n"
    )
    monkeypatch.chdir(tmp_path)
    task = images_from_function("my_pictures:load")
    assert task.sizes == {"image_channels": 3, "image_size": 5, "classes": 4}
    assert task.data.train_x.shape[1:] == (3, 5, 5)
    with pytest.raises(ConfigError, match="my_pictures has no save"):
        images_from_function("my_pictures:save").data  # noqa: B018


def test_arrays_tensors_and_lists_are_taken_and_floats_stay() -> None:
    data = checked(mine(), "mine")
    assert data.train_x.dtype == data.test_x.dtype == torch.float32
    assert data.train_x.shape == (16, 1, 5, 5)


def wrong(position: int, value: Any) -> list[Any]:
    given = list(mine())
    given[position] = value
    return given


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "gave a NoneType"),
        (mine()[:2], "gave 2 things"),
        (wrong(0, "images"), "training images are a str"),
        (wrong(0, np.zeros((20, 5))), r"training images are float64 of shape \(20, 5\)"),
        (wrong(0, np.zeros((20, 5, 4))), "not square: crop or pad"),
        (wrong(0, np.zeros((20, 3, 5, 5))), "not square: put the channels last"),
        (wrong(0, np.zeros((20, 5, 5), dtype=np.int64)), "uint8 or float is needed"),
        (wrong(0, np.full((20, 5, 5), np.nan)), "500 values that are not finite"),
        (wrong(2, np.zeros((4, 6, 6))), "make them alike"),
        (wrong(1, np.zeros(20)), r"training labels are float64 .* whole numbers of shape \(20,\)"),
        (wrong(1, np.arange(19) % 2), r"training labels are int64 of shape \(19,\)"),
        (wrong(1, np.arange(20) % 2 - 1), "a training label is -1"),
        (wrong(1, np.zeros(20, dtype=int)), "2 classes"),
        (wrong(1, np.arange(20) % 2 * 2), "class 1 has 0 training images"),
        (wrong(3, [0, 1, 2, 0]), "a test label is 2, training labels go to 1"),
    ],
)
def test_wrong_images_are_named(given: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        checked(given, "mine")
