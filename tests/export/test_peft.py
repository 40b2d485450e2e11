from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nasgraph.build import build
from nasgraph.export import Exported, Request, export_many, export_model
from nasgraph.space import Choice, Op, SearchSpace
from nasgraph.supernet import Supernet
from nasgraph.transforms.lora import Lora, adapters, merge
from tests.transforms.toys import Scale

peft = pytest.importorskip("peft")


class Net(nn.Module):
    """Layers of each kind, two of them with names that end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6, padding_idx=0)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.out = nn.Linear(8, 8)
        self.block = nn.ModuleDict({"out": nn.Linear(8, 8)})
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.words(tokens).transpose(1, 2)).relu().mean(-1)
        out: Tensor = self.head(self.block["out"](self.out(x).relu()))
        return out


TOKENS = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(0))


def seeded(make: Any, *arguments: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: nn.Module = make(*arguments)
        return made.eval()


def stirred(model: nn.Module) -> nn.Module:
    """With every trainable number moved."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def space_of(model: nn.Module, train: tuple[str, ...] = (), **settings: Any) -> SearchSpace:
    rank = Choice("rank.{name}", [0, 1, 2, 4])
    rules = [Lora("(words|conv|out|block.out)", rank=rank, **settings)]
    return SearchSpace.from_module(model, rules, inputs=TOKENS, dynamic={"tokens": {0: "batch"}}, train=train)


RANKS = {"rank.words": 2, "rank.conv": 4, "rank.out": 1, "rank.block.out": 0}


SCALES: dict[str, Callable[[int], float]] = {
    "alpha/r_max": lambda r: 6 * r / 4,
    "alpha/r": lambda r: 6,
    "alpha/sqrt(r)": lambda r: 6 * r**0.5,
}
CASES = {f"{scale}{train}": (scale, train, RANKS) for scale in SCALES for train in ((), ("head",))}
CASES |= {  # names that end alike
    f"out={out}, block.out={other}": (
        "alpha/r",
        (),
        {"rank.words": 0, "rank.conv": 0, "rank.out": out, "rank.block.out": other},
    )
    for out, other in ((1, 4), (1, 0), (0, 4))
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.up(x)).relu())
        return out


class Alike(nn.Module):
    """``head``, ``b.head`` and ``overhead`` end alike; ``norm`` and ``b.norm`` have running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.overhead = Block(), nn.Linear(8, 8)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.overhead(self.b(x))))
        return out


ROWS = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def alike(train: tuple[str, ...] = (), where: str = "b.up") -> SearchSpace:
    return SearchSpace.from_module(seeded(Alike), [Lora(where, rank=2)], inputs=ROWS, train=train)


def trained(model: nn.Module) -> nn.Module:
    """After a few steps, on inputs with other means and variances than the running statistics."""
    stirred(model).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(3 * ROWS + 2).square().mean().backward()
        optimizer.step()
    return model.eval()


ALIKE: dict[str, tuple[str, ...]] = {"norms": (), "heads": ("head",), "norm and head": ("b.norm", "head")}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, nn.Module, Exported]]:
    """All that is exported here, checked by one child process: importing PEFT takes seconds."""
    requests, spaces = [], {"bert": bert_space()}
    spaces |= {name: space_of(seeded(Net), train, scale=scale, alpha=6.0) for name, (scale, train, _) in CASES.items()}
    for i, (name, space) in enumerate(spaces.items()):
        ranks = CASES[name][2] if name in CASES else dict(zip(space.choices, [0, 2, 8, 4], strict=True))
        model = stirred(build(space, ranks)).eval()
        requests.append(Request(model, tmp_path_factory.mktemp("m") / str(i), space, ranks, formats=["peft"]))
    for name, train in ALIKE.items():
        spaces[name] = alike(train)
        folder = tmp_path_factory.mktemp("m") / "alike"
        requests.append(Request(trained(build(spaces[name], {})), folder, spaces[name], {}, formats=["peft"]))
    results = export_many(requests)
    return {
        name: (request.folder / "peft", request.model, result)
        for name, request, (result,) in zip(spaces, requests, results, strict=True)
    }


@pytest.mark.parametrize("case", list(CASES))
def test_peft_loads_the_folder_with_equal_logits(
    case: str, exported: dict[str, tuple[Path, nn.Module, Exported]]
) -> None:
    folder, adapted, result = exported[case]
    scale, train, choices = CASES[case]
    ranks = {name.removeprefix("rank."): rank for name, rank in choices.items() if rank}
    assert result.status == "ok", result.detail
    assert result.path == folder / "adapter_model.safetensors"
    assert f"{len(ranks)} adapter{'s' * (len(ranks) > 1)} for Net, which is not in the folder" in result.detail
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    factors = {f"^{re.escape(name)}": SCALES[scale](rank) for name, rank in ranks.items()}
    assert config["alpha_pattern"] == pytest.approx(factors)
    assert config["modules_to_save"] == (["head"] if train else None)
    keys = {name.split(".lora_")[0] for name in load_file(folder / "adapter_model.safetensors") if ".lora_" in name}
    assert keys == {f"base_model.model.{name}" for name in ranks}
    loaded = peft.PeftModel.from_pretrained(seeded(Net), str(folder)).eval()
    torch.testing.assert_close(loaded(TOKENS), adapted(TOKENS), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(loaded(TOKENS), seeded(Net)(TOKENS), atol=1e-2)


@pytest.mark.parametrize("case", list(ALIKE))
def test_peft_loads_models_with_batch_norm_and_names_that_end_alike(
    case: str, exported: dict[str, tuple[Path, nn.Module, Exported]]
) -> None:
    folder, adapted, result = exported[case]
    assert result.status == "ok", result.detail
    loaded = peft.PeftModel.from_pretrained(seeded(Alike), str(folder)).eval()
    torch.testing.assert_close(loaded(ROWS), adapted(ROWS), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(loaded(ROWS), seeded(Alike)(ROWS), atol=1e-2)
    moved = {name.removeprefix("model.") for name, b in adapted.named_buffers() if name.endswith("mean") and b.any()}
    assert moved == ({"b.norm.running_mean"} if "b.norm" in ALIKE[case] else set())


def test_a_buffer_that_the_users_model_lacks_is_refused(tmp_path: Path) -> None:
    space = alike()
    model = build(space, {})
    model.get_buffer("model.b.norm.running_mean").add_(1)
    (result,) = export_model(model, tmp_path, space=space, architecture={}, formats=["peft"])
    assert result.status == "failed" and "'running_mean' of the layer 'b.norm' is not that of your" in result.detail


def test_a_module_that_peft_would_save_too_has_no_adapter(tmp_path: Path) -> None:
    detail = refusal(tmp_path, alike(("head",), "b.head"), {})
    assert "'b.head' ends as 'head', which is trained, and has an adapter" in detail and "rename" in detail


def refusal(tmp_path: Path, space: SearchSpace, architecture: dict[str, Any]) -> str:
    model = build(space, architecture)
    (result,) = export_model(model, tmp_path, space=space, architecture=architecture, formats=["peft"])
    assert result.status == "failed" and not (tmp_path / "peft" / "adapter_config.json").exists()
    return result.detail


def test_what_peft_cannot_hold_is_refused(tmp_path: Path) -> None:
    space = space_of(seeded(Net))
    assert "every rank is 0" in refusal(tmp_path, space, dict.fromkeys(RANKS, 0))
    vera = SearchSpace.from_module(seeded(Net), [Lora("out", rank=2, kind="vera")], inputs=TOKENS)
    assert "only kind='plain' fits" in refusal(tmp_path, vera, {})
    both = SearchSpace.from_module(seeded(Net), [Lora("out", rank=2), Scale("conv", power=1)], inputs=TOKENS)
    assert "also changed by Scale" in refusal(tmp_path, both, {})
    trained = SearchSpace.from_module(seeded(Net), [Lora("out", rank=2)], inputs=TOKENS, train=["out"])
    assert "'out' is trained itself and has an adapter" in refusal(tmp_path, trained, {})
    declared = SearchSpace("declared")
    x = declared.input("x", torch.randn(2, 3))
    declared.output(declared.add("out", Op(nn.Linear, out_features=2), x, transforms=[Lora(rank=2)]))
    assert "take the formats code or safetensors" in refusal(tmp_path, declared, {})


def test_the_example_of_the_page_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "lora.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert [(item.status, item.path) for item in names["results"]] == [
        ("ok", tmp_path / "adapted" / "peft" / "adapter_model.safetensors")
    ]


# ---- a Hugging Face model -------------------------------------------------------------------------------------------


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, num_labels=3, **sizes)
    return seeded(transformers.BertForSequenceClassification, config)


IDS = torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] * 9])


def bert_space() -> SearchSpace:
    return SearchSpace.from_module(
        bert(),
        [Lora("*.attention.*.(query|value)", rank=Choice("rank.{name}", [0, 2, 4, 8]), scale="alpha/r_max", alpha=64)],
        inputs={"input_ids": IDS, "attention_mask": MASK},
        dynamic={"input_ids": {0: "batch"}, "attention_mask": {0: "batch"}},
        output="logits",
        train=["classifier"],
    )


def test_a_supernet_of_the_ranks_of_a_bert() -> None:
    space = bert_space()
    assert space.size() == 4**4
    assert torch.equal(build(space, space.baseline())(IDS, MASK), bert()(IDS, MASK).logits)
    supernet = Supernet(space)
    adapter = sum(p.numel() for (_, _, name), p in supernet.store.items() if ".beside." in name)
    assert adapter == 4 * 8 * (32 + 32)
    rng = random.Random(0)
    for _ in range(3):
        ranks = space.sample(rng)
        assert torch.equal(supernet.subnet(ranks).eval()(IDS, MASK), supernet.extract(ranks).eval()(IDS, MASK))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_peft_loads_the_adapters_of_a_bert(exported: dict[str, tuple[Path, nn.Module, Exported]]) -> None:
    folder, adapted, result = exported["bert"]
    assert result.status == "ok", result.detail
    assert {adapter.rank for adapter in adapters(adapted).values()} == {2, 4, 8}
    loaded = peft.PeftModel.from_pretrained(bert(), str(folder)).eval()
    logits = loaded(IDS, MASK).logits
    torch.testing.assert_close(logits, adapted(IDS, MASK), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(logits, bert()(IDS, MASK).logits, atol=1e-2)
    torch.testing.assert_close(merge(copy.deepcopy(adapted))(IDS, MASK), logits, rtol=1e-5, atol=1e-5)
