from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from nasgraph.build import build
from nasgraph.errors import ConfigError, DamagedFile, SpaceError
from nasgraph.model_space import ModelSpace
from nasgraph.objectives.bits import count_adapter_parameters
from nasgraph.pretrained import pretrained
from nasgraph.search_spaces.lora_digits import RowTransformer, lora_digits
from nasgraph.tasks.text import digits_rows
from nasgraph.training.loop import TrainSettings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NASGRAPH_CACHE", str(tmp_path))
    return tmp_path / "pretrained"


def small() -> ModelSpace:
    space = lora_digits(layers=1, width=8, ranks=(0, 2), epochs=1)
    assert isinstance(space, ModelSpace)
    return space


def test_the_space_is_over_a_model_that_is_trained_once(cache: Path) -> None:
    space = small()
    (file,) = cache.glob("*.safetensors")
    written = file.stat().st_mtime_ns
    again = small()
    assert file.stat().st_mtime_ns == written and again.fingerprint() == space.fingerprint()
    assert list(space.choices) == [f"rank.blocks.0.{part}" for part in ("attend.enter", "attend.leave", "up", "down")]
    assert space.size() == 2**4
    x = torch.randn(3, 8, 8)
    assert torch.equal(build(space, space.baseline())(x), space.base.model(x))
    made = space.model(space.sample(random.Random(0)))
    trained = {name.partition(".")[0] for name, p in made.named_parameters() if p.requires_grad and "lora" not in name}
    assert trained == {"head"}
    full = space.model(dict.fromkeys(space.choices, 2))
    assert count_adapter_parameters(full) == 2 * ((8 + 24) + (8 + 8) + (8 + 16) + (16 + 8))


def test_what_it_was_trained_with_names_the_file(cache: Path) -> None:
    task, settings = digits_rows(digits=(0, 1)), TrainSettings(epochs=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [RowTransformer(8, 8, 2, 8, 1) for _ in range(2)]
    pretrained(models[0], task, settings)
    pretrained(models[1], task, settings)  # another start
    pretrained(models[1], task, settings, seed=1)
    assert len(list(cache.glob("*.safetensors"))) == 3 == len(list(cache.glob("*.sha256")))


def test_a_damaged_file_is_refused_by_name(cache: Path) -> None:
    small()
    (file,) = cache.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(DamagedFile, match=file.name):
        small()


def test_digits_are_chosen_and_numbered() -> None:
    every, some = digits_rows(), digits_rows(digits=[7, 3])
    assert some.sizes["classes"] == 2
    assert len(some.data.y) == sum(int((every.data.y == digit).sum()) for digit in (3, 7))
    assert torch.equal(some.data.x[some.data.y == 0], every.data.x[every.data.y == 7])
    for wrong in ([1], [1, 1], [1, 10]):
        with pytest.raises(ConfigError, match="two or more different ones"):
            digits_rows(digits=wrong)
    with pytest.raises(SpaceError, match="learned has 2 digits, the task 5 classes"):
        lora_digits(learned=(0, 1))
