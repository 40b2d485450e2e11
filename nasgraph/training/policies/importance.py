"""Paths drawn by gradient norm."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from nasgraph.space import TRIES, Architecture, Choice, Label, Op, SearchSpace, Switch
from nasgraph.training.policies.base import Path, Policy, Step
from nasgraph.training.policies.sizes import share

Score = tuple[str, Label]  # choice, label


class Importance(Policy):
    """Operations are drawn as their gradients are large (Lu et al., PA&DA, CVPR 2023).

    The score of an operation is the sum of the gradient norms of its parameters, a moving average over the steps that
    drew it. Of a choice between ``K`` operations, label ``o`` is drawn with the probability ::

        p(o) = floor / K + (1 - floor) * (tau * score(o) / sum of scores + (1 - tau) / K),    tau = step / steps

    so an operation without parameters, whose score is 0, is still drawn (the paper's own code gives it probability 0 at
    the end). An operation that was not drawn yet counts as the mean of the others. All other decisions are uniform.

    Only the path half of the paper is here: mini-batches are not drawn by importance.

    Args:
        steps: of the whole training; ``tau`` grows to 1.
        floor: the share of the probability that stays uniform.
        reweight: the loss is weighted by ``1 / (K p)`` of each operation drawn, so the expected gradient is that of
            uniform paths; the weights' spread grows with the number of choices.
        decay: of the moving average, the weight of what was before.

    Raises: ConfigError: an argument is wrong.
    """

    def __init__(
        self, space: SearchSpace, steps: int, floor: float = 0.1, reweight: bool = False, decay: float = 0.5
    ) -> None:
        self.space, self.steps, self.reweight = space, steps, reweight
        self.floor, self.decay = share("floor", floor), share("decay", decay)
        self.scores: dict[Score, float] = {}
        self.learned = {
            choice.name
            for node in space._ops
            for choice in space.choices.values()
            if _decides(choice, space._ops[node])
        }

    def probabilities(self, choice: Choice, step: int) -> list[float]:
        """Of each label of ``choice``; they sum to 1."""
        uniform = 1 / len(choice.labels)
        known = [self.scores[choice.name, label] for label in choice.labels if (choice.name, label) in self.scores]
        total = sum(known)
        if choice.name not in self.learned or total == 0:
            return [uniform] * len(choice.labels)
        scores = [self.scores.get((choice.name, label), total / len(known)) for label in choice.labels]
        tau = min(1.0, step / self.steps)
        mixed = [tau * score / sum(scores) + (1 - tau) * uniform for score in scores]
        return [self.floor * uniform + (1 - self.floor) * p for p in mixed]

    def weight(self, architecture: Architecture, step: int) -> float:
        """``product of 1 / (K p)``: how much less likely than among uniform paths it is not to be drawn."""
        result = 1.0
        for name, label in architecture.items():
            choice = self.space.choices[name]
            result /= len(choice.labels) * self.probabilities(choice, step)[choice.labels.index(label)]
        return result

    def sample(self, step: int, rng: random.Random) -> list[Path]:
        found = self._draw(step, rng)
        return [Path(found, weight=self.weight(found, step) if self.reweight else 1.0)]

    def _draw(self, step: int, rng: random.Random) -> Architecture:
        for _ in range(TRIES):
            found = self.space.decide(lambda choice: rng.choices(choice.labels, self.probabilities(choice, step))[0])
            if not self.space.violated(found):
                return found
        return self.space.sample(rng)

    def observe(self, step: Step) -> None:
        (path,) = step.paths
        norms: defaultdict[str, float] = defaultdict(float)
        for (node, _, _), norm in step.gradient_norms().items():
            norms[node] += norm / path.weight
        new: defaultdict[Score, float] = defaultdict(float)
        for step_ in self.space.resolve(path.architecture).steps:
            for decision in _decisions(self.space._ops[step_.name], path.architecture):
                new[decision] += norms[step_.name]
        for decision, score in new.items():
            before = self.scores.get(decision, score)
            self.scores[decision] = self.decay * before + (1 - self.decay) * score

    def state(self) -> dict[str, Any]:
        return {"scores": [[choice, label, score] for (choice, label), score in self.scores.items()]}

    def load(self, state: Mapping[str, Any]) -> None:
        self.scores = {(choice, label): score for choice, label, score in state["scores"]}


def _decides(choice: Choice, op: Op | Choice | Switch) -> bool:
    """Whether ``choice`` takes part in which operation the node is."""
    if isinstance(op, Op):
        return False
    decision = op.choice if isinstance(op, Switch) else op
    return decision is choice or any(_decides(choice, option) for _, option in op.declared)


def _decisions(op: Any, architecture: Architecture) -> Iterator[Score]:
    """The decisions that make a node the operation that it is."""
    while not isinstance(op, Op):
        decision = op.choice if isinstance(op, Switch) else op
        label = architecture[decision.name]
        yield decision.name, label
        op = op.cases[label] if isinstance(op, Switch) else op.option(label)
