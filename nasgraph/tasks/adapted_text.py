"""A part of a text, its letters rewritten: what a model that knows another part of it is adapted to."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from functools import partial

import torch

from nasgraph.errors import ConfigError, DataError, did_you_mean
from nasgraph.tasks.text import Text, TextTask, characters

LETTERS: dict[str, Callable[[str], str]] = {
    "same": str,
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "swapcase": str.swapcase,
    "upper": str.upper,
}


def adapted_text(
    part: Sequence[float] = (0.5, 1.0),
    letters: str = "rot13",
    dataset: str = "tinyshakespeare",
    path: str | None = None,
    length: int = 32,
    batch_size: int = 32,
    steps: int = 100,
    windows: int = 256,
    val: float = 0.1,
    test: float = 0.1,
    root: str | None = None,
) -> TextTask:
    """Predict the next character in a part of a text. The vocabulary is that of the whole text.

    Args:
        part: first and last end, as shares of the text; training, validation and test part follow each other in it.
        letters: ``same``; ``rot13``, each letter is the one 13 behind it; ``swapcase``, large ones are small and small
            ones large; ``upper``, all are large.
        dataset, path, root: the text, as of :func:`~nasgraph.tasks.text.characters`; so are the others.

    Loading raises DataError: as there, or ``letters`` makes a character that the text does not have.
    Raises: ConfigError: a number or a name out of range.
    """
    if letters not in LETTERS:
        raise ConfigError(
            f"adapted_text: unknown letters '{letters}'.{did_you_mean(letters, LETTERS)} Known: {', '.join(LETTERS)}."
        )
    ends = tuple(part)
    if len(ends) != 2 or not all(isinstance(end, int | float) for end in ends) or not 0 <= ends[0] < ends[1] <= 1:
        raise ConfigError(f"adapted_text: part is {list(ends)}: give two ascending shares, such as [0.5, 1]")
    whole = characters(dataset, path, length, batch_size, steps, windows, val, test, root)
    load = partial(_part, whole.load, whole.name, ends, letters, length, val, test)
    return TextTask(f"{whole.name}, {letters}", load, length, batch_size, steps, windows)


def _part(
    load: Callable[[], Text], name: str, part: tuple[float, float], letters: str, length: int, val: float, test: float
) -> Text:
    whole = load()
    first, behind = (round(share * len(whole.tokens)) for share in part)
    text = LETTERS[letters](whole.decode(whole.tokens[first:behind]))
    absent = sorted(set(text) - set(whole.characters))
    if absent:
        raise DataError(f"'{name}' has no {absent[0]!r}, which {letters} makes of its letters: take letters: same")
    n = len(text)
    ends = (n - round(n * val) - round(n * test), n - round(n * test), n)
    if min(end - start for start, end in zip((0, *ends), ends, strict=False)) <= length:
        raise DataError(f"part {list(part)} of '{name}' has {n} characters, too few for windows of {length}: take more")
    number = {character: i for i, character in enumerate(whole.characters)}
    return Text(torch.tensor([number[character] for character in text]), whole.characters, ends)
