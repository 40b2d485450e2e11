"""Training a store: what one step does, what is kept when it fails, and going on from a checkpoint."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nasgraph.errors import ConfigError, DamagedFile, NotFinite, SpaceError
from nasgraph.search_spaces.gnn_node import gnn_node
from nasgraph.space import Architecture, SearchSpace
from nasgraph.supernet import Supernet, recalibrate
from nasgraph.supernet import checkpoint as checkpoints
from nasgraph.tasks.node import NodeData, NodeTask
from nasgraph.training import TrainSettings, policies
from nasgraph.training.policies import Policy, Step, Uniform

SGD = TrainSettings(optimizer="sgd", lr=0.1, weight_decay=0.0)


def data() -> NodeData:
    """90 nodes of 3 classes that their features tell apart, edges within a class."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.nn.functional.one_hot(y, 3).float().repeat(1, 4) + 0.3 * torch.randn(90, 12, generator=generator)
    source = torch.arange(90).repeat(3)
    target = (source + 3 * torch.randint(1, 30, (270,), generator=generator)) % 90
    nodes = torch.randperm(90, generator=generator)
    return NodeData(x, torch.stack([source, target]), y, nodes[:30].sort()[0], nodes[30:60], nodes[60:])


TASK = NodeTask("blocks", data)


def space() -> SearchSpace:
    return gnn_node(12, 3, layers=2, widths=(8, 16))


class Fixed(Policy):
    """These architectures in every step; remembers what it observed."""

    def __init__(self, paths: Sequence[Architecture], distill: bool = False) -> None:
        self.paths, self.distill = list(paths), distill
        self.seen: list[tuple[int, list[float]]] = []

    def sample(self, step: int, rng: random.Random) -> Sequence[Architecture | policies.Path]:
        if not self.distill:
            return self.paths
        first, *others = self.paths
        return [first, *(policies.Path(arch, hard=0, soft=1, teacher=0) for arch in others)]

    def observe(self, step: Step) -> None:
        self.seen.append((step.number, list(step.losses)))

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load(self, state: Mapping[str, Any]) -> None:
        self.seen = [(step, list(losses)) for step, losses in state["seen"]]


def without_dropout(n: int) -> list[Architecture]:
    made, rng, found = space(), random.Random(1), []
    while len(found) < n:
        arch = made.architecture({**made.sample(rng), "input_dropout": 0.0})
        if not any(arch.get(name) for name in ("dropout", "attention_dropout")):
            found.append(arch)
    return found


def numbers(supernet: Supernet) -> dict[Any, torch.Tensor]:
    return {key: parameter.detach().clone() for key, parameter in supernet.store.items()}


def same(one: Mapping[Any, torch.Tensor], other: Mapping[Any, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("distill", [False, True])
def test_a_step_is_the_sum_or_the_mean_of_its_gradients(reduction: str, distill: bool) -> None:
    """The oracle: each architecture extracted, its gradient taken alone, and added where its slices lie."""
    paths = without_dropout(3)
    supernet, batch = Supernet(space(), TASK), TASK.batch(1000, 0)
    before, total = numbers(supernet), {key: torch.zeros_like(p) for key, p in supernet.store.items()}
    teacher = None
    for arch in paths:
        alone = supernet.extract(arch).train()
        out = batch.outputs(alone)
        loss = batch.losses(out).mean()
        if distill and teacher is not None:
            p, q = teacher.softmax(1), out.softmax(1)
            loss = (p * (p.log() - q.log())).sum(1).mean()
        teacher = out.detach() if teacher is None else teacher
        loss.backward()
        own = dict(alone.named_parameters())
        for piece in supernet._structure(arch).pieces:
            gradient = own[piece.name].grad
            if gradient is not None:
                place = total[piece.key]
                (place if piece.cut is None else piece.cut(place)).add_(gradient)
    supernet.train(Fixed(paths, distill), 1, settings=SGD, reduction=reduction)
    scale = 0.1 if reduction == "sum" else 0.1 / len(paths)
    for key, parameter in supernet.store.items():
        torch.testing.assert_close(parameter.detach(), before[key] - scale * total[key], rtol=1e-4, atol=1e-6)


class Asked(Policy):
    """These paths in every step; remembers gradient norms."""

    def __init__(self, paths: Sequence[policies.Path]) -> None:
        self.paths = paths
        self.norms: dict[policies.Key, float] = {}

    def sample(self, step: int, rng: random.Random) -> Sequence[policies.Path]:
        return self.paths

    def observe(self, step: Step) -> None:
        assert step.paths == self.paths and step.architectures == [path.architecture for path in self.paths]
        self.norms = step.gradient_norms()


def test_a_path_has_a_weight_and_a_teacher_of_its_own() -> None:
    """The oracle: weight * (hard * CE + soft * sum p (log p - log q)) by autograd on the extracted networks."""
    one, two, third = without_dropout(3)
    supernet, batch = Supernet(space(), TASK), TASK.batch(1000, 0)
    teacher = supernet.extract(third).eval()
    p = batch.outputs(teacher).detach().softmax(1)
    paths = [policies.Path(one, weight=2.0), policies.Path(two, weight=0.5, hard=0.3, soft=0.7, teacher=teacher)]
    gradients: dict[Any, torch.Tensor] = {key: torch.zeros_like(each) for key, each in supernet.store.items()}
    losses = []
    for path in paths:
        alone = supernet.subnet(path.architecture).train()
        q = batch.outputs(alone).softmax(1)
        ce = -q[torch.arange(len(q)), batch.target].log().mean()
        losses.append(path.hard * ce + path.soft * (p * (p.log() - q.log())).sum(1).mean())
        found = torch.autograd.grad(path.weight * losses[-1], list(supernet.parameters()), allow_unused=True)
        for key, gradient in zip(supernet.store, found, strict=True):
            gradients[key] += 0 if gradient is None else gradient
    before, policy = numbers(supernet), Asked(paths)
    (mean,) = supernet.train(policy, 1, settings=SGD)
    assert mean == pytest.approx(sum(float(loss.detach()) for loss in losses) / 2, rel=1e-5)  # before the weights
    for key, parameter in supernet.store.items():
        torch.testing.assert_close(parameter.detach(), before[key] - 0.1 * gradients[key], rtol=1e-4, atol=1e-6)
        assert policy.norms.get(key, 0.0) == pytest.approx(float(gradients[key].norm()), rel=1e-4, abs=1e-6)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_entries_of_the_gradient_are_clipped() -> None:
    paths = [policies.Path(arch) for arch in without_dropout(2)]
    free, clipped = Supernet(space(), TASK), Supernet(space(), TASK)
    before = numbers(free)
    free.train(Asked(paths), 1, settings=SGD)
    clipped.train(Asked(paths), 1, settings=SGD, clip=0.01)
    largest = 0.0
    for key, parameter in clipped.store.items():
        gradient = (before[key] - free.store[key].detach()) / 0.1
        largest = max(largest, float(gradient.abs().max()))
        moved = before[key] - 0.1 * gradient.clamp(-0.01, 0.01)
        torch.testing.assert_close(parameter.detach(), moved, rtol=0, atol=1e-6)
    assert largest > 0.02
    with pytest.raises(ConfigError, match="clip is 0: give a number above 0"):
        free.train(Asked(paths), 2, clip=0)


def test_a_teacher_is_an_earlier_path_or_a_network() -> None:
    one, two = without_dropout(2)
    supernet = Supernet(space(), TASK)
    with pytest.raises(ValueError, match="path 1 cannot teach: it is not an earlier path of the step"):
        supernet.train(Asked([policies.Path(one, soft=1, teacher=1), policies.Path(two)]), 1)
    with pytest.raises(ValueError, match="needs a teacher"):
        policies.Path(one, soft=1)


def test_what_no_path_uses_stays() -> None:
    supernet = Supernet(space(), TASK)
    before, paths = numbers(supernet), without_dropout(1)
    used = {piece.key for piece in supernet._structure(paths[0]).pieces}
    supernet.train(Fixed(paths), 3, settings=TrainSettings(weight_decay=0.1))
    for key, parameter in supernet.store.items():
        assert key in used or torch.equal(parameter, before[key])


def test_training_teaches() -> None:
    """Policies are asked the same by their exam, on a smaller space."""
    supernet = Supernet(space(), TASK)
    archs = [supernet.space.sample(random.Random(i)) for i in range(20)]
    before = supernet.evaluate(archs)
    supernet.train(Uniform(supernet.space), 400, settings=TrainSettings(lr=0.03))
    assert sum(supernet.evaluate(archs)) / 20 > sum(before) / 20 + 0.2


def test_evaluation_is_that_of_the_extracted_network() -> None:
    supernet = Supernet(space(), TASK)
    archs = [supernet.space.sample(random.Random(i)) for i in range(20)]
    assert {supernet.has_batch_norm(arch) for arch in archs} == {True, False}
    for arch, score in zip(archs, supernet.evaluate(archs), strict=True):
        model = recalibrate(supernet.extract(arch), [TASK.batch(1000, 0)])
        assert score == TASK.score(model, "val")["accuracy"]


def test_training_leaves_the_generator_alone() -> None:
    supernet = Supernet(space(), TASK)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    supernet.train(Uniform(supernet.space), 2)
    assert torch.equal(torch.rand(2), expected)


# ---- what fails -----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_nan_stops_with_step_and_path(tmp_path: Path) -> None:
    good, bad = without_dropout(2)

    class Poisoned(Fixed):
        def sample(self, step: int, rng: random.Random) -> Sequence[Architecture | policies.Path]:
            if step == 4:
                with torch.no_grad():
                    supernet.store["head", str(bad["head"]), _weight(bad)].mul_(torch.nan)
            return [good, bad] if step == 4 else [good]

    supernet = Supernet(space(), TASK)
    with pytest.raises(NotFinite, match=r"step 4: the loss of \{.*\} is nan") as error:
        supernet.train(Poisoned([]), 10, checkpoint=tmp_path, every=2)
    assert bad.to_json() in str(error.value) or good.to_json() in str(error.value)
    assert supernet.step == 4
    kept = Supernet.load(tmp_path, space(), TASK)
    assert kept.step == 4 and all(bool(p.isfinite().all()) for p in kept.parameters())


def _weight(arch: Architecture) -> str:
    return {"linear": "weight", "sage": "lin_l.weight"}.get(str(arch["head"]), "lin.weight")


def test_a_step_that_fails_is_not_taken() -> None:
    broken = NodeTask("broken", data)
    broken.data.x[0, 0] = torch.inf
    supernet = Supernet(space(), broken)
    before = numbers(supernet)
    with pytest.raises(NotFinite, match="step 0"):
        supernet.train(Fixed(without_dropout(2)), 3)
    assert same(before, numbers(supernet))
    assert all(parameter.grad is None for parameter in supernet.parameters())


def test_an_unknown_reduction_is_refused() -> None:
    supernet = Supernet(space(), TASK)
    with pytest.raises(ConfigError, match="Did you mean 'mean'"):
        supernet.train(Uniform(supernet.space), 1, reduction="men")


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_resumed_training_has_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    settings = TrainSettings(optimizer=optimizer, lr=0.01)
    whole, policy = Supernet(space(), TASK), Fixed([])
    rng = random.Random(0)
    policy.paths = [whole.space.sample(rng) for _ in range(3)]
    history = whole.train(policy, 8, settings=settings)

    part = Supernet(space(), TASK)
    first = part.train(Fixed(policy.paths), 5, settings=settings, checkpoint=tmp_path, every=2)
    resumed, other = Supernet.load(tmp_path, space(), TASK), Fixed(policy.paths)
    assert resumed.step == 5 and same(numbers(resumed), numbers(part))
    last = resumed.train(other, 8, settings=settings)
    assert first + last == history
    assert same(numbers(resumed), numbers(whole))
    assert other.seen == policy.seen


def test_tensors_that_a_policy_learned_are_kept(tmp_path: Path) -> None:
    class Mean(Policy):
        mean = torch.zeros(2, dtype=torch.float64)
        name = "new"

        def sample(self, step: int, rng: random.Random) -> Sequence[Architecture]:
            return without_dropout(1)

        def observe(self, step: Step) -> None:
            self.mean, self.name = self.mean + step.losses[0] / 3, f"after {step.number}"

        def state(self) -> dict[str, Any]:
            return {"mean": self.mean, "name": self.name}

        def load(self, state: Mapping[str, Any]) -> None:
            self.mean, self.name = state["mean"], state["name"]

    supernet, policy, other = Supernet(space(), TASK), Mean(), Mean()
    supernet.train(policy, 2, checkpoint=tmp_path)
    Supernet.load(tmp_path, space(), TASK).resume(other)
    assert torch.equal(other.mean, policy.mean) and bool(policy.mean.all())
    assert other.name == "after 1"


def test_the_last_checkpoint_replaces_the_one_before(tmp_path: Path) -> None:
    supernet = Supernet(space(), TASK)
    supernet.train(Uniform(supernet.space), 5, checkpoint=tmp_path, every=2)
    assert len(list(tmp_path.iterdir())) == 2
    assert json.loads((tmp_path / "checkpoint.json").read_text())["step"] == 5


def test_a_checkpoint_that_is_cut_off_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kill does between the two files."""
    supernet = Supernet(space(), TASK)
    supernet.train(Uniform(supernet.space), 1, checkpoint=tmp_path)
    before = numbers(supernet)
    write = checkpoints._write

    def killed(path: Path, content: bytes) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(checkpoints, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        supernet.train(Uniform(supernet.space), 2, checkpoint=tmp_path)
    assert same(numbers(Supernet.load(tmp_path, space(), TASK)), before)


def test_another_space_is_refused_by_name(tmp_path: Path) -> None:
    supernet = Supernet(space(), TASK)
    supernet.save(tmp_path)
    with pytest.raises(SpaceError, match="is of space 'gnn_node' with other choices, operations or sizes"):
        Supernet.load(tmp_path, gnn_node(12, 3, layers=2, widths=(8, 32)))
    with pytest.raises(SpaceError, match="is of space 'gnn_node', not of 'other'"):
        Supernet.load(tmp_path, SearchSpace("other"))


def test_another_key_version_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Supernet(space(), TASK).save(tmp_path)
    monkeypatch.setattr(checkpoints, "KEY_VERSION", "k9")
    with pytest.raises(SpaceError, match="keys of version k1, this nasgraph has k9"):
        Supernet.load(tmp_path, space(), TASK)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_damaged_file_is_refused(suffix: str, tmp_path: Path) -> None:
    Supernet(space(), TASK).save(tmp_path)
    (path,) = tmp_path.glob(f"*{suffix}")
    content = bytearray(path.read_bytes())
    place = content.index(b'"step": 0') + 8 if suffix == ".json" else len(content) - 3
    content[place] = ord("7")
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match="not what was written"):
        Supernet.load(tmp_path, space(), TASK)


def test_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no checkpoint in"):
        Supernet.load(tmp_path, space(), TASK)
