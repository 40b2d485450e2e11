from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from nasgraph.build import build
from nasgraph.errors import ConfigError, DataError, SpaceError
from nasgraph.model_space import ModelSpace
from nasgraph.objectives.bits import count_adapter_parameters
from nasgraph.search_spaces.lora_text import lora_text
from nasgraph.tasks.adapted_text import adapted_text

TEXT = "ThE QuIcK brown FOX jumps over the LAZY dog; alas! " * 8 + "the quick brown fox JUMPS over the lazy dog.\n" * 12


@pytest.fixture(autouse=True)
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("NASGRAPH_CACHE", str(tmp_path))
    file = tmp_path / "text.txt"
    alphabet = "".join(map(chr, [*range(65, 91), *range(97, 123)]))
    file.write_text(TEXT + alphabet, encoding="utf-8")
    return str(file)


def test_a_part_of_a_text_keeps_its_vocabulary(text: str) -> None:
    whole = adapted_text((0, 1), "same", path=text, length=4)
    first, second = (adapted_text(part, "same", path=text, length=4) for part in ((0, 0.5), (0.5, 1)))
    assert whole.data.characters == first.data.characters == second.data.characters
    assert torch.equal(torch.cat([first.data.tokens, second.data.tokens]), whole.data.tokens)
    n = len(second.data.tokens)
    assert second.data.ends == (n - 2 * round(0.1 * n), n - round(0.1 * n), n)
    assert first.fingerprint() != second.fingerprint()


@pytest.mark.parametrize("letters", ["rot13", "swapcase", "upper"])
def test_letters_are_rewritten_one_by_one(text: str, letters: str) -> None:
    same, other = (adapted_text((0, 0.5), kind, path=text, length=4).data for kind in ("same", letters))
    before, after = same.decode(same.tokens), other.decode(other.tokens)
    assert len(before) == len(after) and before != after
    for a, b in zip(before, after, strict=True):
        if not a.isalpha():
            assert a == b
        elif letters == "rot13":
            assert (ord(b.lower()) - ord(a.lower())) % 26 == 13 and a.isupper() == b.isupper()
        else:
            assert b == (a.upper() if letters == "upper" else a.swapcase())


def test_what_a_part_cannot_be_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown letters 'rot31'.*rot13"):
        adapted_text(letters="rot31")
    for part in ((0.5, 0.5), (0.5,), (-0.1, 1.0), (0.5, 2.0)):
        with pytest.raises(ConfigError, match="two ascending shares"):
            adapted_text(part)
    with pytest.raises(DataError, match="too few for windows of 64"):
        _ = adapted_text((0.0, 0.3), path=text, length=64).data
    (tmp_path / "small.txt").write_text("only small letters " * 20)
    with pytest.raises(DataError, match="has no 'A', which upper makes"):
        _ = adapted_text(letters="upper", path=str(tmp_path / "small.txt"), length=4).data


def test_a_rank_for_every_linear_layer(text: str) -> None:
    space = lora_text(length=8, path=text, layers=1, width=8, heads=2, ranks=(0, 2), epochs=1)
    assert isinstance(space, ModelSpace)
    parts = [f"blocks.0.{part}" for part in ("attend.enter", "attend.leave", "up", "down")]
    assert list(space.choices) == [f"rank.{name}" for name in (*parts, "head")]
    task = adapted_text(path=text, length=8)
    (tokens,) = task.batch(3, 0).inputs
    assert torch.equal(build(space, space.baseline())(tokens), space.base.model(tokens))
    made = space.model(space.sample(random.Random(0)))
    assert all("lora" in name for name, p in made.named_parameters() if p.requires_grad)
    full, size = space.model(dict.fromkeys(space.choices, 2)), task.sizes["vocabulary"]
    assert count_adapter_parameters(full) == 2 * ((8 + 24) + (8 + 8) + (8 + 32) + (32 + 8) + (8 + size))
    changed = tokens.clone()
    changed[:, 5:] = 0
    torch.testing.assert_close(full(changed)[:, :5], full(tokens)[:, :5])  # no position sees what follows
    with pytest.raises(SpaceError, match=f"the text has {size} characters, the task 10"):
        lora_text(10, length=8, path=text, layers=1, width=8, heads=2, epochs=1)
