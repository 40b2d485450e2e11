"""Text and sequence tasks: windows and their targets, splits that do not touch, baselines by counting."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasgraph import registry, search
from nasgraph.build import build
from nasgraph.catalogue import make_space
from nasgraph.console import Display
from nasgraph.errors import ConfigError, DataError
from nasgraph.supernet import Supernet
from nasgraph.tasks import Batch, RowTask, Task, TextTask, characters, digits_rows
from nasgraph.training import TrainSettings, evaluate
from nasgraph.training.policies import Sandwich

SHORT = {"length": 8, "batch_size": 16, "steps": 20, "windows": 40}


@pytest.fixture(scope="module")
def sums() -> TextTask:
    return characters("sums", **SHORT)


def own(folder: Path, text: str, **arguments: Any) -> TextTask:
    (folder / "own.txt").write_text(text, encoding="utf-8")
    return characters(path=str(folder / "own.txt"), **arguments)


# ---- batches of sequences -------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Returns its table's rows of the tokens: logits that are known."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


def test_losses_of_sequences_by_equation() -> None:
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    tokens, target = torch.tensor([[0, 1, 2], [3, 4, 0]]), torch.tensor([[1, 1, 4], [0, 2, 2]])
    model, batch = Fixed(table), Batch((tokens,), target)
    outputs = batch.outputs(model)
    assert outputs.shape == (6, 5) and batch.logits(model).shape == (2, 3, 5)
    expected = [
        sum(-math.log(float(torch.softmax(table[i], 0)[j])) for i, j in zip(a.tolist(), b.tolist(), strict=True)) / 3
        for a, b in zip(tokens, target, strict=True)
    ]
    assert batch.losses(outputs).tolist() == pytest.approx(expected)
    assert batch.losses(batch.logits(model)).tolist() == pytest.approx(expected)
    assert batch.loss(model).item() == pytest.approx(sum(expected) / 2)
    right = [
        [int(table[i].argmax()) == j for i, j in zip(a.tolist(), b.tolist(), strict=True)]
        for a, b in zip(tokens, target, strict=True)
    ]
    assert batch.correct(outputs).tolist() == pytest.approx([sum(row) / 3 for row in right])
    assert evaluate(model, [batch, batch])[0] == pytest.approx(sum(map(sum, right)) / 6)


# ---- windows --------------------------------------------------------------------------------------------------------


def test_a_target_is_the_character_behind(sums: TextTask) -> None:
    text = sums.data.decode(sums.data.tokens)
    for batch in [sums.batch(30, seed=1), *sums.batches("val"), *sums.epochs(0)]:
        (tokens,) = batch.inputs
        assert tokens.shape == batch.target.shape and tokens.shape[1] == 8
        assert torch.equal(tokens[:, 1:], batch.target[:, :-1])
        for row in range(len(tokens)):
            assert sums.data.decode(tokens[row]) + sums.data.decode(batch.target[row, -1:]) in text


def test_splits_lie_one_behind_the_other_and_share_nothing(tmp_path: Path) -> None:
    """Of a text in which each character occurs once, a window tells where it was taken."""
    text = "".join(chr(0x4E00 + i) for i in range(1000))
    task = own(tmp_path, text, length=8, windows=1000, batch_size=50, steps=40)

    def read(batches: Iterable[Batch]) -> set[int]:
        return {int(i) for batch in batches for i in torch.cat([batch.inputs[0], batch.target]).unique()}

    seen = {split: read(task.batches(split)) for split in ("train", "val", "test")}
    assert task.data.ends == (800, 900, 1000)
    assert max(seen["train"]) < 800 <= min(seen["val"]) <= max(seen["val"]) < 900 <= min(seen["test"])
    drawn = read([*task.epochs(3), task.batch(500, 0)])
    assert drawn == set(range(800))
    for split, first, last in (("val", 800, 900), ("test", 900, 1000)):
        targets = [int(i) for batch in task.batches(split) for i in batch.target.flatten()]
        assert sorted(targets) == list(range(first + 1, first + 1 + (last - first - 1) // 8 * 8))  # each once


def test_validation_is_a_part_spread_evenly_and_the_test_is_all() -> None:
    task = characters("sums", length=16, windows=10)
    counts = {split: sum(len(batch.target) for batch in task.batches(split)) for split in ("train", "val", "test")}
    first, behind = task.data.part("test")
    assert counts == {"train": 10, "val": 10, "test": (behind - first - 1) // 16}
    starts = torch.cat([batch.inputs[0] for batch in task.batches("val")])
    assert len(starts.unique(dim=0)) == 10


def test_windows_are_drawn_from_the_seed(sums: TextTask) -> None:
    one, again, other = (torch.cat([batch.inputs[0] for batch in sums.epochs(seed)]) for seed in (0, 0, 1))
    assert one.shape == (20 * 16, 8)
    assert torch.equal(one, again) and not torch.equal(one, other)
    drawn = sums.epochs(0)
    first, second = (torch.cat([batch.inputs[0] for batch in drawn]) for _ in range(2))
    assert torch.equal(first, one) and not torch.equal(second, one)
    assert torch.equal(sums.batch(9, 4).inputs[0], sums.batch(9, 4).inputs[0])
    assert not torch.equal(sums.batch(9, 4).inputs[0], sums.batch(9, 5).inputs[0])


def test_a_batch_holds_what_there_is(sums: TextTask) -> None:
    first, behind = sums.data.part("train")
    assert len(sums.batch(10**9, 0).target) == (behind - first - 1) // 8
    with pytest.raises(ValueError, match="at least 1"):
        sums.batch(0, 0)


def test_sums_are_right(sums: TextTask) -> None:
    lines = sums.data.decode(sums.data.tokens).splitlines()
    assert len(lines) == 6000
    for line in lines:
        question, answer = line.split("=")
        first, second = question.split("+")
        assert int(first) + int(second) == int(answer)
    assert sums.sizes == {"vocabulary": 13, "classes": 13, "length": 8}


def test_shakespeare(data_root: Path) -> None:
    task = characters(root=str(data_root))
    assert task.sizes == {"vocabulary": 65, "classes": 65, "length": 64}
    assert len(task.data.tokens) == 1_115_394
    text = (data_root / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    assert task.data.decode(task.data.tokens) == text
    assert characters(root=str(data_root / "text")).fingerprint() == task.fingerprint()


def test_text_to_numbers_and_back(sums: TextTask) -> None:
    assert sums.data.decode(sums.data.encode("12+34=46\n")) == "12+34=46\n"
    assert list(sums.data.characters) == sorted(sums.data.characters)
    assert sums.notes == {"characters": sums.data.characters}


# ---- learning -------------------------------------------------------------------------------------------------------


def test_baselines_by_counting(sums: TextTask) -> None:
    """A slow table, made of the text itself."""
    data = sums.data
    first, behind = data.part("train")
    text = data.decode(data.tokens[first:behind])
    single, pairs, before = Counter(text), Counter(zip(text, text[1:], strict=False)), Counter(text[:-1])
    found = sums.baseline()
    right, loss, most, count = 0, 0.0, 0, 0
    for batch in sums.batches("val"):
        for a, b in zip(batch.inputs[0].flatten().tolist(), batch.target.flatten().tolist(), strict=True):
            a, b = data.characters[a], data.characters[b]
            right += max(data.characters, key=lambda c, a=a: pairs[a, c]) == b
            most += max(data.characters, key=lambda c: single[c]) == b
            loss -= math.log((pairs[a, b] + 1) / (before[a] + 13))
            count += 1
    assert found["bigram table"]["val_accuracy"] == pytest.approx(right / count)
    assert found["bigram table"]["val_loss"] == pytest.approx(loss / count, rel=1e-5)
    assert found["most frequent character"]["val_accuracy"] == pytest.approx(most / count)


def test_a_report_names_each_baseline(sums: TextTask) -> None:
    run = SimpleNamespace(facts={})
    search._references(run, SimpleNamespace(task=sums), Display(quiet=True))  # type: ignore[arg-type]
    found = {
        name: {key: value for key, value in values.items() if "accuracy" in key}
        for name, values in sums.baseline().items()
    }
    assert run.facts["references"] == found and set(found) == {"most frequent character", "bigram table"}


def test_a_decoder_learns_more_than_pairs(sums: TextTask) -> None:
    space = make_space("transformer_decoder", {"layers": 1, "widths": [32], "heads": [2], "ratios": [2]}, sums.sizes)
    model = build(space, next(space.enumerate()))
    fit = sums.fit(model, TrainSettings(epochs=6, lr=0.01), seed=0)
    assert fit.val > sums.baseline()["bigram table"]["val_accuracy"] + 0.05
    scored = sums.score(model, "val")
    assert scored == {"accuracy": pytest.approx(fit.val), "loss": pytest.approx(fit.val_loss)}
    again = build(space, next(space.enumerate()))
    assert sums.fit(again, TrainSettings(epochs=2, lr=0.01), seed=0).history == fit.history[:2]


def test_a_supernet_learns_text(sums: TextTask) -> None:
    """With distillation over every position."""
    space = make_space("transformer_decoder", {"layers": 2, "widths": [8, 16], "heads": [1, 2]}, sums.sizes)
    supernet = Supernet(space, sums)
    history = supernet.train(
        Sandwich(space, supernet=supernet), 12, settings=TrainSettings(lr=0.01), samples=16, reduction="mean"
    )
    assert history[-1] < history[0]
    arch = next(space.enumerate())
    assert supernet.evaluate([arch]) == [pytest.approx(sums.score(supernet.extract(arch), "val")["accuracy"])]


# ---- what a task is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: characters("sums", **SHORT), digits_rows])
def test_is_a_task_and_pickles_small(make: Any) -> None:
    task = make()
    assert isinstance(task, Task)
    before = task.fingerprint()
    packed = pickle.dumps(task)
    assert len(packed) < 1000
    other = pickle.loads(packed)
    assert other.fingerprint() == before and "data" not in pickle.loads(packed).__dict__
    moved = task.to("cpu")
    assert moved.fingerprint() == before and moved.batch_size == task.batch_size and repr(moved) == repr(task)
    assert all(torch.equal(a, b) for a, b in zip(task.inputs, moved.inputs, strict=True))
    assert task.inputs[0].shape[0] == 1
    with pytest.raises(ValueError, match="no split 'tset'"):
        task.score(nn.Identity(), "tset")


def test_fingerprints_tell_data_and_splits_apart(tmp_path: Path) -> None:
    found = {
        own(tmp_path, "abcde" * 100, length=4).fingerprint(),
        own(tmp_path, "abcde" * 99 + "abced", length=4).fingerprint(),
        own(tmp_path, "ABCDE" * 100, length=4).fingerprint(),
        own(tmp_path, "abcde" * 100, length=4, val=0.2).fingerprint(),
    }
    assert len(found) == 4


@pytest.mark.parametrize("name", ["characters", "digits_rows"])
def test_tasks_are_installed(name: str) -> None:
    assert registry.resolve("tasks", name).__name__ == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "sumz"}, "unknown text 'sumz'.*sums"),
        ({"dataset": "sums", "length": 0}, "length is 0"),
        ({"dataset": "sums", "batch_size": 0}, "batch_size is 0"),
        ({"dataset": "sums", "windows": 1.5}, "windows is 1.5"),
        ({"dataset": "sums", "val": 0.5, "test": 0.5}, "sum below 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        characters(**arguments)


def test_missing_or_wrong_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NASGRAPH_DATA", raising=False)
    with pytest.raises(DataError, match=r"no text file .*nothing.txt: give path"):
        _ = characters(path=str(tmp_path / "nothing.txt")).data
    with pytest.raises(DataError, match=r"NASGRAPH_DATA to a folder with text/tinyshakespeare.txt \(https"):
        _ = characters().data
    with pytest.raises(DataError, match=r"no text file .*tinyshakespeare.txt: put it there"):
        _ = characters(root=str(tmp_path)).data
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    with pytest.raises(DataError, match="latin.txt is not UTF-8 at byte 1"):
        _ = characters(path=str(tmp_path / "latin.txt")).data
    with pytest.raises(DataError, match="has 100 characters: its shortest part has 10, and a window of 16"):
        _ = own(tmp_path, "abcde" * 20, length=16).data


# ---- digits as sequences --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [8, 64, 16])
def test_digits_are_rows_of_pixels(tokens: int) -> None:
    from sklearn.datasets import load_digits

    task = digits_rows(tokens)
    images = torch.from_numpy(load_digits().images).float() / 16
    assert task.sizes == {"features": 64 // tokens, "length": tokens, "classes": 10}
    assert torch.equal(task.data.x.flatten(1), images.flatten(1))
    if tokens == 8:
        assert torch.equal(task.data.x[:, 3], images[:, 3, :])


def test_digits_are_split_by_class_without_overlap() -> None:
    data = digits_rows().data
    parts = [data.train, data.val, data.test]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1797))
    for label in range(10):
        total = int((data.y == label).sum())
        assert [int((data.y[part] == label).sum()) for part in parts[1:]] == [round(0.2 * total)] * 2
    assert not torch.equal(digits_rows(seed=1).data.test, data.test)


def test_every_row_of_an_epoch_once_in_batches() -> None:
    task = digits_rows(batch_size=100)
    epochs = task.epochs(0)
    first, second = ([batch for batch in epochs] for _ in range(2))
    assert [len(batch.target) for batch in first] == [99, *[98] * 10]  # 1,079 in all
    for epoch in (first, second):
        seen = torch.cat([batch.inputs[0] for batch in epoch]).flatten(1)
        assert torch.equal(seen.sum(0), task.data.x[task.data.train].flatten(1).sum(0))
    assert not torch.equal(first[0].inputs[0], second[0].inputs[0])
    assert task.batch(50, 0).target.bincount().tolist() == [5] * 10


def test_an_encoder_learns_digits() -> None:
    task: RowTask = digits_rows()
    space = make_space("transformer_encoder", {"layers": 1, "widths": [32], "heads": [2], "ratios": [2]}, task.sizes)
    fit = task.fit(build(space, next(space.enumerate())), TrainSettings(epochs=6, lr=0.01), seed=0)
    assert fit.val > 0.7


def test_baseline_of_digits() -> None:
    found = digits_rows().baseline()["logistic regression"]
    assert 0.93 < found["val_accuracy"] < 0.99 and 0.93 < found["test_accuracy"] < 0.99


@pytest.mark.parametrize("tokens", [0, 7, 8.0])
def test_tokens_must_divide_the_image(tokens: Any) -> None:
    with pytest.raises(ConfigError, match="must divide 64"):
        digits_rows(tokens)
