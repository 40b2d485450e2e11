"""Sequences: the next character of a text, and vectors in a row with one class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from nasgraph.errors import ConfigError, DataError, did_you_mean
from nasgraph.tasks.batch import Batch, balanced
from nasgraph.tasks.datasets import data_folder
from nasgraph.tasks.loaded import SPLITS, LoadedTask, Shuffled, stratified

TEXTS = ("sums", "tinyshakespeare")
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
CHUNK = 128  # windows of one forward pass in scoring


# ---- the next character ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A text as numbers, in three parts that follow each other.

    ``tokens`` ``(n,)`` int64: positions in ``characters``, which is sorted and holds every character of the text.
    ``ends``: where training, validation and test part end.
    """

    tokens: Tensor
    characters: str
    ends: tuple[int, int, int]

    def part(self, split: str) -> tuple[int, int]:
        """First position of a split and the first behind it."""
        number = SPLITS.index(split)
        return (0, *self.ends)[number], self.ends[number]

    def encode(self, text: str) -> Tensor:
        """``text`` as numbers ``(len(text),)``. Raises: KeyError: a character that the vocabulary does not have."""
        number = {character: i for i, character in enumerate(self.characters)}
        return torch.tensor([number[character] for character in text], device=self.tokens.device)

    def decode(self, tokens: Tensor) -> str:
        """The text of ``tokens`` ``(n,)``."""
        return "".join(self.characters[i] for i in tokens.tolist())


class TextTask(LoadedTask[Text]):
    """Predict the next character at every position of a window of ``length``.

    An epoch is ``steps`` batches of windows that start anywhere in the training part, drawn from the seed. Validation
    and training part are scored on ``windows`` windows that are spread over them evenly, the test part on all, none
    overlapping. Accuracy is the share of characters predicted, the loss is in nats per character (by ln 2: in bits).
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Text],
        length: int = 64,
        batch_size: int = 32,
        steps: int = 100,
        windows: int = 256,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(name, load, batch_size, device)
        for what, value in (("length", length), ("steps", steps), ("windows", windows)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"task '{name}': {what} is {value!r}, give a whole number of at least 1")
        self.length, self.steps, self.windows = length, steps, windows

    @cached_property
    def sizes(self) -> dict[str, int]:
        """``vocabulary`` and ``classes``, which are the same, and ``length``."""
        count = len(self.data.characters)
        return {"vocabulary": count, "classes": count, "length": self.length}

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The first window of the text, ``(1, length)``."""
        return self._at(torch.tensor([0])).inputs

    @property
    def notes(self) -> dict[str, str]:
        """What the user of an exported model has to know: the characters in the order of their numbers."""
        return {"characters": self.data.characters}

    def batch(self, n: int, seed: int) -> Batch:
        """``n`` windows of the training part; as many as fit side by side, if those are fewer."""
        if n < 1:
            raise ValueError(f"a batch of {n} samples: ask for at least 1")
        every = self._beside("train")
        if n >= len(every):
            return self._at(every)
        return self._at(self._anywhere(n, torch.Generator().manual_seed(seed)))

    def epochs(self, seed: int) -> Iterable[Batch]:
        """``steps`` batches each time it is iterated."""
        return _Windows(self, seed)

    def baseline(self) -> dict[str, dict[str, float]]:
        """What counting reaches: the most frequent character, and that after the character before (a bigram table).

        Counted in the training part, one added to each count, and judged on the windows that models are judged on.

        Returns: by name ``val_accuracy`` and ``test_accuracy`` (fractions), ``val_loss`` and ``test_loss`` (nats per
        character).
        """
        size, (first, behind) = len(self.data.characters), self.data.part("train")
        text = self.data.tokens[first:behind].cpu()
        pairs = torch.bincount(text[:-1] * size + text[1:], minlength=size * size).view(size, size) + 1.0
        single = (torch.bincount(text, minlength=size) + 1.0).expand(size, size)
        found: dict[str, dict[str, float]] = {}
        for name, counts in (("most frequent character", single), ("bigram table", pairs)):
            table = (counts / counts.sum(dim=1, keepdim=True)).log()
            found[name] = {}
            for split in ("val", "test"):
                right, loss, count = 0.0, 0.0, 0
                for batch in self.batches(split):
                    outputs = table[batch.inputs[0].cpu()]
                    alone = Batch((), batch.target.cpu())
                    right += float(alone.correct(outputs).sum())
                    loss += float(alone.losses(outputs).sum())
                    count += len(batch.target)
                found[name] |= {f"{split}_accuracy": right / count, f"{split}_loss": loss / count}
        return found

    def _of_split(self, split: str) -> Iterator[Batch]:
        starts = self._beside(split)
        if split != "test" and len(starts) > self.windows:
            starts = starts[torch.arange(self.windows) * len(starts) // self.windows]
        for part in starts.split(CHUNK):  # type: ignore[no-untyped-call]
            yield self._at(part)

    def _beside(self, split: str) -> Tensor:
        """Where windows start that cover a split without overlap; a target lies behind each position."""
        first, behind = self.data.part(split)
        return torch.arange(first, behind - self.length, self.length)

    def _anywhere(self, n: int, generator: torch.Generator) -> Tensor:
        first, behind = self.data.part("train")
        return torch.randint(first, behind - self.length, (n,), generator=generator)

    def _at(self, starts: Tensor) -> Batch:
        places = (starts[:, None] + torch.arange(self.length)).to(self.device)
        return Batch((self.data.tokens[places],), self.data.tokens[places + 1])


class _Windows:
    def __init__(self, task: TextTask, seed: int) -> None:
        self.task, self.generator = task, torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.task.steps):
            yield self.task._at(self.task._anywhere(self.task.batch_size, self.generator))


def characters(
    dataset: str = "tinyshakespeare",
    path: str | None = None,
    length: int = 64,
    batch_size: int = 32,
    steps: int = 100,
    windows: int = 256,
    val: float = 0.1,
    test: float = 0.1,
    root: str | None = None,
) -> TextTask:
    """Predict the next character of a text: ``tinyshakespeare``, ``sums``, or a UTF-8 file of your own (``path``).

    ``tinyshakespeare`` (1,115,394 characters, 65 different) is ``text/tinyshakespeare.txt`` in ``root``, else in
    ``$NASGRAPH_DATA``. ``sums`` is made here: 6,000 lines such as ``7+85=92``. Training, validation and test part lie
    one behind the other; ``val`` and ``test`` are shares of the text.

    Args:
        length: characters that a model sees.
        batch_size, steps: windows of a training step, and steps of an epoch.
        windows: of the validation part that are scored after each epoch.

    Loading raises DataError: the file is missing, not UTF-8, or too short for three parts.
    Raises: ConfigError: unknown dataset, or a number out of range.
    """
    if path is None and dataset not in TEXTS:
        raise ConfigError(
            f"unknown text '{dataset}'.{did_you_mean(dataset, TEXTS)} Known: {', '.join(TEXTS)}; or name a file of "
            "your own with path."
        )
    if not (val > 0 and test > 0 and val + test < 1):
        raise ConfigError(f"characters: val is {val} and test is {test}: both above 0, their sum below 1")
    named = dataset if path is None else Path(path).name
    load = partial(_text, None if path else dataset, path, root, length, val, test)
    return TextTask(named, load, length, batch_size, steps, windows)


def _text(dataset: str | None, path: str | None, root: str | None, length: int, val: float, test: float) -> Text:
    text = _sums() if dataset == "sums" else _read(_file(dataset, path, root))
    n = len(text)
    ends = (n - round(n * val) - round(n * test), n - round(n * test), n)
    shortest = min(end - start for start, end in zip((0, *ends), ends, strict=False))
    if shortest <= length:
        raise DataError(
            f"'{path or dataset}' has {n} characters: its shortest part has {shortest}, and a window of {length} with "
            f"its target needs {length + 1}. Give a longer text or a smaller length."
        )
    alphabet = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(alphabet)}
    return Text(torch.tensor([number[character] for character in text]), alphabet, ends)


def _file(dataset: str | None, path: str | None, root: str | None) -> Path:
    if path is not None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise DataError(f"there is no text file {file.absolute()}: give path the name of a UTF-8 text file")
        return file
    folder, name = data_folder(root, "text"), f"{dataset}.txt"
    if folder is None:
        raise DataError(
            f"the text {name} is not here: set root or NASGRAPH_DATA to a folder with text/{name} ({SHAKESPEARE}), "
            "name a file of your own with path, or take the dataset sums, which needs none"
        )
    if not (folder / name).is_file():
        raise DataError(
            f"there is no text file {folder / name}: put it there ({SHAKESPEARE}), or name a file of your own with path"
        )
    return folder / name


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 at byte {error.start}: convert it first") from None
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None


def _sums(lines: int = 6000) -> str:
    pairs = torch.randint(100, (lines, 2), generator=torch.Generator().manual_seed(0)).tolist()
    return "".join(f"{a}+{b}={a + b}\n" for a, b in pairs)


# ---- one class per sequence -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Samples are rows. Shapes: ``x`` ``(n, length, features)``, ``y`` ``(n,)``; splits: row numbers, ascending."""

    x: Tensor
    y: Tensor
    train: Tensor
    val: Tensor
    test: Tensor


class RowTask(LoadedTask[Rows]):
    """Classification of sequences of vectors, ``x`` ``(n, length, features)``."""

    @cached_property
    def sizes(self) -> dict[str, int]:
        """``features`` of a vector, ``length`` of a sequence and ``classes``."""
        _, length, features = self.data.x.shape
        return {"features": features, "length": length, "classes": int(self.data.y.max()) + 1}

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The first sequence, ``(1, length, features)``."""
        return (self.data.x[:1],)

    def batch(self, n: int, seed: int) -> Batch:
        """``n`` training samples, or all; the classes' counts differ by at most one where samples suffice."""
        chosen = balanced(self.data.y[self.data.train], n, seed)
        return self._of(self.data.train[chosen.to(self.device)])

    def epochs(self, seed: int) -> Iterable[Batch]:
        """All training samples each time it is iterated, in another order."""
        return Shuffled(self._of, self.data.train, self.batch_size, seed)

    def baseline(self) -> dict[str, dict[str, float]]:
        """What a logistic regression on the flat vectors reaches, its penalty ``C`` chosen by validation accuracy.

        Returns: by its name ``val_accuracy`` and ``test_accuracy`` (fractions) and ``C``.
        """
        x = {split: self.data.x[getattr(self.data, split)].flatten(1).cpu() for split in SPLITS}
        y = {split: self.data.y[getattr(self.data, split)].cpu() for split in x}
        return {"logistic regression": logistic_regression(x, y)}

    def _of_split(self, split: str) -> Iterator[Batch]:
        for part in getattr(self.data, split).split(CHUNK):
            yield self._of(part)

    def _of(self, index: Tensor) -> Batch:
        return Batch((self.data.x[index],), self.data.y[index])


def logistic_regression(x: dict[str, Tensor], y: dict[str, Tensor]) -> dict[str, float]:
    """The least a network has to beat: ``x`` ``(n, features)`` and ``y`` ``(n,)`` by split, features standardised.

    Returns: ``val_accuracy``, ``test_accuracy`` and ``C``, the inverse penalty that is best on validation.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scale = StandardScaler().fit(x["train"].numpy())
    ready = {split: (scale.transform(x[split].numpy()), y[split].numpy()) for split in x}
    best: dict[str, float] = {"val_accuracy": -1.0}
    for exponent in range(-4, 3):
        model = LogisticRegression(C=10.0**exponent, max_iter=5000).fit(*ready["train"])
        val = float(model.score(*ready["val"]))
        if val > best["val_accuracy"]:
            best = {"val_accuracy": val, "test_accuracy": float(model.score(*ready["test"])), "C": 10.0**exponent}
    return best


def digits_rows(
    tokens: int = 8,
    batch_size: int = 64,
    val: float = 0.2,
    test: float = 0.2,
    seed: int = 0,
    digits: Sequence[int] = tuple(range(10)),
) -> RowTask:
    """scikit-learn's 1,797 digits as sequences: 8 rows of 8 pixels (``tokens=8``) or 64 pixels (64). No download.

    Values are 0 to 1; the split keeps the classes' shares and is drawn from ``seed``. ``digits``: only these, in this
    order the classes 0, 1, ...: so one part of them can be learned before another.

    Raises: ConfigError: ``tokens`` does not divide 64, or ``digits`` are not at least two different ones.
    """
    if not isinstance(tokens, int) or tokens < 1 or 64 % tokens:
        raise ConfigError(f"digits_rows: tokens is {tokens!r}, it must divide 64: 8 for rows, 64 for pixels")
    chosen = tuple(digits)
    if len(chosen) < 2 or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(10)):
        raise ConfigError(f"digits_rows: digits is {list(chosen)}, name two or more different ones from 0 to 9")
    return RowTask("digits_rows", partial(_digits, tokens, val, test, seed, chosen), batch_size)


def _digits(tokens: int, val: float, test: float, seed: int, digits: tuple[int, ...]) -> Rows:
    from sklearn.datasets import load_digits

    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    x, y = (pixels / 16.0).float().view(len(pixels), tokens, 64 // tokens), labels.long()
    if digits != tuple(range(10)):
        number = torch.full((10,), -1)
        number[list(digits)] = torch.arange(len(digits))
        kept = number[y] >= 0
        x, y = x[kept], number[y[kept]]
    return Rows(x, y, *stratified(y, val, test, seed, "digits_rows"))
