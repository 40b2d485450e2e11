"""What a format can never hold is known before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from nasgraph.cli import main
from nasgraph.config import parse
from nasgraph.errors import ExportError
from nasgraph.export.fits import check_formats
from nasgraph.run import Run
from nasgraph.search import start
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.transforms import Lora, LowRank, Prune, Quantize, Transform

RANK, BITS, KEEP = Choice("rank", [0, 2]), Choice("bits", [4, 32]), Choice("keep", [0.5, 1.0])
CONFIGS = Path(__file__).parents[2] / "configs"


def over(*rules: Transform, make: bool = True) -> SearchSpace:
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.Flatten(), nn.Linear(16, 4))
    made = Op(nn.Sequential) if make else None
    return SearchSpace.from_module(model, list(rules), inputs=torch.randn(2, 3, 4), make=made)


def declared(layer: Op, *transforms: Transform) -> SearchSpace:
    space = SearchSpace("declared")
    x = space.input("x", torch.randn(2, 8, 8), {0: "rows"})
    space.output(space.add("layer", layer, x, transforms=list(transforms)))
    return space


LINEAR, CONV = Op(nn.Linear, out_features=4), Op(nn.Conv1d, out_channels=4, kernel_size=1)

REFUSED = {
    "peft: no model of the user's": ("peft", lambda: declared(LINEAR, Lora(rank=RANK)), "not put over one"),
    "peft: no adapter": ("peft", lambda: over(Prune("2", keep=KEEP)), r"no rule gives a layer an adapter \(Lora\)"),
    "peft: rank 0": ("peft", lambda: over(Lora("2", rank=0), Prune("0", keep=KEEP)), "no rule gives a layer"),
    "peft: always quantised": (
        "peft",
        lambda: over(Lora("2", rank=RANK), Quantize("2", weight_bits=4)),
        "always changed by Quantize",
    ),
    "peft: another kind": ("peft", lambda: over(Lora("2", rank=RANK, kind="vera")), "kind='plain'"),
    "torchao: no code": ("torchao", lambda: over(Quantize("2", weight_bits=BITS), make=False), "give the space make="),
    "torchao: a convolution": ("torchao", lambda: over(Quantize("0", weight_bits=BITS)), "no nn.Linear"),
    "torchao: many bits": ("torchao", lambda: over(Quantize("2", weight_bits=Choice("b", [16, None]))), "no nn.Linear"),
    "torchao: inputs alone": ("torchao", lambda: over(Quantize("2", activation_bits=8)), "no nn.Linear"),
    "torchao: masks": ("torchao", lambda: declared(LINEAR, Prune(keep=KEEP), LowRank(rank=2)), "no nn.Linear"),
    "torchao: declared convolution": ("torchao", lambda: declared(CONV, Quantize(weight_bits=BITS)), "no nn.Linear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_never_be_held_is_refused(case: str) -> None:
    name, space, why = REFUSED[case]
    with pytest.raises(ExportError, match=f"^the format {name} can hold no network of space .*: .*{why}"):
        check_formats(["safetensors", name], space())


def own_function(width: int) -> nn.Module:
    return nn.Linear(width, 4)


@pytest.mark.parametrize(
    ("name", "space"),
    [
        ("peft", lambda: over(Lora("2", rank=RANK), Quantize("0", weight_bits=BITS))),  # 32 bits are no change
        ("peft", lambda: over(Lora("2", rank=RANK, kind=Choice("kind", ["vera", "plain"])))),
        ("torchao", lambda: over(Quantize("2", weight_bits=BITS))),
        ("torchao", lambda: declared(LINEAR, Quantize(weight_bits=BITS))),
        ("torchao", lambda: declared(Op(own_function, width=8), Quantize(weight_bits=2))),
        ("packed", lambda: over(Prune("2", keep=KEEP), make=False)),
    ],
)
def test_what_some_networks_fit_passes(name: str, space: object) -> None:
    check_formats([name], space())  # type: ignore[operator]


@pytest.mark.parametrize("name", ["peft", "torchao"])
def test_a_search_refuses_it_before_it_trains(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIGS / {"peft": "joint_gnn.yaml", "torchao": "prune_cnn.yaml"}[name]
    out = tmp_path / "run"
    assert main(["search", str(config), "--out", str(out), "--quiet", "--set", f"export=[code,{name}]"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"nasgraph: the format {name} can hold no network of space") and said.count("\n") == 1
    assert not out.exists()


def never(outgoing: object, folder: Path) -> None:
    """An exporter that fails."""
    raise ExportError("not today")


def test_a_run_that_writes_no_format_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "space": "tests.quantised_spaces:perceptron",
        "task": "digits_images",
        "train": {"epochs": 1},
        "search": {"sampler": "random", "trials": 1, "workers": 0, "baseline": False},
        "final": {"top": 1, "seeds": 1},
        "export": [f"{__name__}:never"],
    }
    assert start(parse(values), tmp_path / "none", quiet=True) == 1
    (final,) = Run.open(tmp_path / "none").finals.values()
    assert [item["status"] for item in final.exports] == ["failed"]
    assert start(parse({**values, "export": ["safetensors", *values["export"]]}), tmp_path / "one", quiet=True) == 0  # type: ignore[misc]
