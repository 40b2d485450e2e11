"""Progressive shrinking."""

from __future__ import annotations

import bisect
import random
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nasgraph.errors import ConfigError, SpaceError, did_you_mean
from nasgraph.space import TRIES, Architecture, Label, SearchSpace
from nasgraph.training.policies.base import Path, Policy
from nasgraph.training.policies.sizes import at_least, by_size, extremes, with_labels

if TYPE_CHECKING:
    from nasgraph.supernet import Supernet

Allowed = dict[str, tuple[Label, ...]]


class Progressive(Policy):
    """From the largest network to smaller ones, taught by it (Cai et al., Once-for-All, ICLR 2020, section 3.3).

    The first stage trains the largest network, one a step. Each further stage allows more labels, those before
    included, and draws ``n`` architectures a step, uniformly over what is allowed. Their loss is
    ``cross-entropy + kd_ratio * KL`` from a frozen copy of the largest network, taken as the first stage ends. The copy
    runs in evaluation mode (the paper's runs in training mode, so its targets depend on the batch). Learning rates are
    those of ``train``; the paper has one for each stage.

    Decisions without a size, such as operations, are free from the start. Of ``teachers`` networks of the largest size
    that differ in them, the teacher is the one of the best validation accuracy.

    Args:
        stages: what each stage after the first allows: a list of choices all of whose labels it opens, or a mapping of
            choice to labels. A name may be a pattern, ``kernel*``. Default: choices whose names differ only in digits
            make a stage; the stages are in the order of how much smaller a network they can make, least first (in
            Once-for-All: kernel, then depth and width).
        starts: the step with which each of ``stages`` begins; default: all stages are equally long.
        n: architectures in a step after the first stage.
        kd_ratio: 0: no teacher.
        teachers: among how many networks the teacher is chosen.

    Raises: SpaceError: a label that the space does not have. ConfigError: another argument is wrong.
    """

    def __init__(
        self,
        space: SearchSpace,
        supernet: Supernet,
        steps: int,
        stages: Sequence[Sequence[str] | Mapping[str, Sequence[Label]]] | None = None,
        starts: Sequence[int] | None = None,
        n: int = 2,
        kd_ratio: float = 1.0,
        teachers: int = 8,
    ) -> None:
        if not kd_ratio >= 0:
            raise ConfigError(f"kd_ratio is {kd_ratio!r}: give 0 or a number above")
        self.space, self.supernet, self.n, self.kd_ratio = space, supernet, at_least("n", n, 1), kd_ratio
        self.teachers = at_least("teachers", teachers, 1)
        largest, _ = extremes(space, supernet.params)
        self.allowed = self._stages(largest, _automatic(supernet, largest) if stages is None else stages)
        more = len(self.allowed) - 1
        self.starts = [steps * (i + 1) // (more + 1) for i in range(more)] if starts is None else list(starts)
        if len(self.starts) != more or self.starts != sorted(self.starts):
            raise ConfigError(f"starts is {self.starts}: give {more} steps that ascend, one for each stage")
        self._teacher: tuple[Architecture, nn.Module] | None = None

    def stage(self, step: int) -> int:
        """Which stage ``step`` belongs to, from 0."""
        return bisect.bisect_right(self.starts, step)

    def sample(self, step: int, rng: random.Random) -> list[Path]:
        stage = self.stage(step)
        if stage == 0:
            return [Path(self._draw(0, rng))]
        if self.kd_ratio == 0:
            return [Path(self._draw(stage, rng)) for _ in range(self.n)]
        if self._teacher is None:
            best = self._best()
            self._teacher = best, self.supernet.calibrated(best)
        return [Path(self._draw(stage, rng), soft=self.kd_ratio, teacher=self._teacher[1]) for _ in range(self.n)]

    def state(self) -> dict[str, Any]:
        if self._teacher is None:
            return {"teacher": None}
        arch, model = self._teacher
        return {"teacher": dict(arch), **_tensors(model)}

    def load(self, state: Mapping[str, Any]) -> None:
        self._teacher = None
        if state["teacher"] is not None:
            arch = Architecture(state["teacher"])
            model = self.supernet.extract(arch).eval()
            with torch.no_grad():
                for name, tensor in _tensors(model).items():
                    tensor.copy_(state[name])
            self._teacher = arch, model

    def _draw(self, stage: int, rng: random.Random) -> Architecture:
        allowed = self.allowed[stage]
        for _ in range(TRIES):
            found = self.space.decide(lambda choice: rng.choice(allowed.get(choice.name, choice.labels)))
            if not self.space.violated(found):
                return found
        raise SpaceError(f"no architecture of stage {stage + 1} met the constraints of '{self.space.name}': {allowed}")

    def _best(self) -> Architecture:
        rng = random.Random("teachers")
        found = list(dict.fromkeys(self._draw(0, rng) for _ in range(self.teachers)))
        if len(found) == 1:
            return found[0]
        scores = self.supernet.evaluate(found)
        return found[scores.index(max(scores))]

    def _stages(
        self, largest: Mapping[str, Label], stages: Sequence[Sequence[str] | Mapping[str, Sequence[Label]]]
    ) -> list[Allowed]:
        """What each stage allows, of the choices that are not free from the start."""
        opened: list[dict[str, Sequence[Label]]] = []
        for stage in stages:
            if isinstance(stage, str):
                raise ConfigError(f"stage {stage!r} is a text: give a list of choices")
            labels: dict[str, Sequence[Label]] = {}
            for pattern in stage:
                names = [name for name in self.space.choices if fnmatchcase(name, pattern)]
                if not names:
                    hint = did_you_mean(pattern, self.space.choices)
                    raise ConfigError(
                        f"a stage names '{pattern}', and space '{self.space.name}' has no such choice.{hint}"
                    )
                for name in names:
                    labels[name] = stage[pattern] if isinstance(stage, Mapping) else self.space.choices[name].labels
            opened.append(labels)
        first: Allowed = {}
        for name in dict.fromkeys(name for labels in opened for name in labels):
            choice = self.space.choices[name]
            if name not in largest and not choice.ordered:
                raise ConfigError(
                    f"no option of '{name}' makes a network larger: it is free from the start, in no stage"
                )
            first[name] = (largest.get(name, choice.labels[-1]),)
        found = [first]
        for labels in opened:
            allowed = dict(found[-1])
            for name, more in labels.items():
                for label in more:
                    self.space.choices[name].option(label)
                allowed[name] = tuple(dict.fromkeys([*allowed[name], *more]))
            found.append(allowed)
        return found


def _automatic(supernet: Supernet, largest: Mapping[str, Label]) -> list[list[str]]:
    space = supernet.space
    order = by_size(space, supernet.params)
    groups: dict[str, list[str]] = {}
    for name in largest:
        groups.setdefault(re.sub(r"\d+", "", name), []).append(name)
    if not groups:
        raise ConfigError(f"no choice of space '{space.name}' makes a network larger: there is nothing to shrink")

    def left(names: list[str]) -> int:
        """Parameters when these choices are at their smallest and the others at their largest."""
        labels = {**largest, **{name: order[name][0] for name in names}}
        return supernet.params(with_labels(space, labels, random.Random("stages")))

    return sorted(groups.values(), key=left, reverse=True)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
