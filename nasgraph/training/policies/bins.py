"""Complexity bins."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nasgraph.errors import ConfigError
from nasgraph.space import TRIES, Architecture, Choice, Label, SearchSpace
from nasgraph.training.policies.base import Policy, Step
from nasgraph.training.policies.sizes import at_least, by_size, share

if TYPE_CHECKING:
    from nasgraph.supernet import Supernet


class Bins(Policy):
    """Architectures uniform in cost, a little more from bins that lag behind (after Zhang et al., ShiftNAS, ICCV 2023).

    Uniform decisions give costs like a sum of dice: hardly ever a small or a large network. So the range of costs is
    cut into bins, and a step draws a bin and then one of a pool of architectures in it. The pool's decisions are
    uniform each, but not independent: for each of its architectures one ratio ``t``, uniform in [0, 1], is drawn, and
    a size with ``m`` labels takes the one at ``Binomial(m - 1, t)``. So every bin gets members.

    Every ``every`` steps an architecture of each bin is scored on the validation split. The bins' probabilities are
    ``(1 - shift) / bins + shift * gap / sum of gaps``, with ``gap`` the moving average of a bin's validation loss minus
    that of the best bin. This is a cheap stand-in: the paper follows the gradient of the validation loss.

    Args:
        cost: of an architecture; default: its number of parameters.
        bins: how many.
        log: the bins are equally wide in the logarithm of the cost; else in the cost itself, as in the paper, whose
            costs differ less: where they differ a hundredfold, nearly all architectures are in the first bin.
        least: a bin with fewer architectures of the pool is joined to the next: its few would be trained too often.
        n: architectures in a step.
        pool: how many architectures are drawn beforehand.
        every: steps between two measurements; 0: bins stay equally likely.
        shift: share of the probability that follows the gaps.
        decay: of the moving average, the weight of what was before.
        seed: of the pool and of the architectures measured.

    Raises: ConfigError: an argument is wrong, or ``log`` with a cost that is not above 0.
    """

    def __init__(
        self,
        space: SearchSpace,
        supernet: Supernet,
        cost: Callable[[Architecture], float] | None = None,
        bins: int = 8,
        log: bool = True,
        least: int = 8,
        n: int = 1,
        pool: int = 512,
        every: int = 100,
        shift: float = 0.5,
        decay: float = 0.5,
        seed: int = 0,
    ) -> None:
        self.space, self.supernet, self.cost = space, supernet, cost or supernet.params
        self.n, self.every, self.seed = at_least("n", n, 1), at_least("every", every, 0), seed
        self.shift, self.decay = share("shift", shift), share("decay", decay)
        self.members = self._filled(
            at_least("bins", bins, 1), at_least("pool", pool, 1), log, at_least("least", least, 1)
        )
        self.losses: list[float | None] = [None] * len(self.members)

    def probabilities(self) -> list[float]:
        """Of each bin, from the cheapest; they sum to 1."""
        uniform = [1 / len(self.members)] * len(self.members)
        known = [loss for loss in self.losses if loss is not None]
        if len(known) < len(self.losses):
            return uniform
        gaps = [loss - min(known) for loss in known]
        if sum(gaps) == 0:
            return uniform
        return [(1 - self.shift) * p + self.shift * gap / sum(gaps) for p, gap in zip(uniform, gaps, strict=True)]

    def sample(self, step: int, rng: random.Random) -> list[Architecture]:
        return [rng.choice(members) for members in rng.choices(self.members, self.probabilities(), k=self.n)]

    def observe(self, step: Step) -> None:
        if self.every == 0 or (step.number + 1) % self.every:
            return
        rng = random.Random(f"bins/{self.seed}/{step.number}")
        for i, members in enumerate(self.members):
            model = self.supernet.calibrated(rng.choice(members))
            loss = self.supernet.task.score(model, "val")["loss"]
            before = self.losses[i]
            if math.isfinite(loss):
                self.losses[i] = loss if before is None else self.decay * before + (1 - self.decay) * loss

    def state(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load(self, state: Mapping[str, Any]) -> None:
        if len(state["losses"]) == len(self.members):  # else of a training with other bins
            self.losses = list(state["losses"])

    def _filled(self, bins: int, pool: int, log: bool, least: int) -> list[list[Architecture]]:
        """The pool, by bins of cost."""
        order = by_size(self.space, self.supernet.params)
        rng = random.Random(f"pool/{self.seed}")
        drawn = list(dict.fromkeys(_spread(self.space, order, rng) for _ in range(pool)))
        costs = [float(self.cost(arch)) for arch in drawn]
        if log:
            if min(costs) <= 0:
                raise ConfigError(f"bins with log need costs above 0, not {min(costs):g}")
            costs = [math.log(cost) for cost in costs]
        low, width = min(costs), (max(costs) - min(costs)) / bins
        found: list[list[Architecture]] = [[] for _ in range(bins)]
        for arch, cost in zip(drawn, costs, strict=True):
            found[min(bins - 1, int((cost - low) / width)) if width > 0 else 0].append(arch)
        joined: list[list[Architecture]] = []
        for members in found:
            if joined and len(joined[-1]) < least:
                joined[-1] += members
            else:
                joined.append(members)
        if len(joined) > 1 and len(joined[-1]) < least:
            last = joined.pop()
            joined[-1] += last
        return joined


def _spread(space: SearchSpace, order: Mapping[str, tuple[Label, ...]], rng: random.Random) -> Architecture:
    """A random architecture whose sizes are large or small together."""
    for _ in range(TRIES):
        ratio = rng.random()

        def pick(choice: Choice, ratio: float = ratio) -> Label:
            labels = order.get(choice.name)
            if labels is None:
                return rng.choice(choice.labels)
            return labels[sum(rng.random() < ratio for _ in labels[1:])]

        found = space.decide(pick)
        if not space.violated(found):
            return found
    return space.sample(rng)
