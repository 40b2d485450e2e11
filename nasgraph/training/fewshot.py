"""Few-shot supernets: a space is split where its options train against each other, and each part trains on alone.

A supernet makes all options of a choice share the other parameters. Where two options pull these in different
directions, each disturbs the other's score. So after some training the options of one choice are put into two groups
(:mod:`nasgraph.training.splitting` says how), and each group gets a copy of the store: two smaller supernets, *leaves*,
that go on from the same weights (Zhao et al., Few-shot NAS, ICML 2021).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from nasgraph import registry
from nasgraph.errors import ConfigError, SpaceError, did_you_mean
from nasgraph.space import Architecture, Label, SearchSpace
from nasgraph.supernet import SAMPLES, Subnet, Supernet
from nasgraph.supernet import checkpoint as checkpoints
from nasgraph.training.policies import Policy
from nasgraph.training.splitting import MEASURES, Measure, Split, best_split

if TYPE_CHECKING:
    from nasgraph.ranking import RankReport
    from nasgraph.tasks.base import Task

FILE = "few_shot.json"
VERSION = 1


@dataclass(frozen=True)
class Domain:
    """The part of a space that a leaf has: the labels that it keeps of some choices.

    Of two leaves, the first also has the architectures that do not ask the choice; the other ``asks`` it.
    """

    labels: Mapping[str, tuple[Label, ...]]
    asks: tuple[str, ...] = ()

    def __contains__(self, architecture: Mapping[str, Label]) -> bool:
        asked = all(name in architecture for name in self.asks)
        return asked and all(architecture[n] in kept for n, kept in self.labels.items() if n in architecture)

    def space(self, whole: SearchSpace) -> SearchSpace:
        """``whole`` with these architectures only."""
        space = whole.narrowed(self.labels)
        for name in self.asks:
            space.constrain(f"asks {name}", partial(_asks, name))
        return space

    def halves(self, choice: str, groups: Sequence[Sequence[Label]]) -> tuple[Domain, Domain]:
        """Without and with the second group of labels of ``choice``."""
        first, second = ({**self.labels, choice: tuple(group)} for group in groups)
        return Domain(first, self.asks), Domain(second, (*self.asks, choice))


def _asks(name: str, architecture: Mapping[str, Label]) -> bool:
    return name in architecture


class FewShot:
    """Supernets of the parts of a space; each architecture belongs to exactly one. Has the methods of a Supernet.

    Made by :meth:`split` from a trained supernet.
    """

    def __init__(
        self, space: SearchSpace, leaves: Iterable[tuple[Domain, Supernet]], splits: Iterable[Split] = ()
    ) -> None:
        self.space, self.leaves, self.splits = space, tuple(leaves), tuple(splits)

    @classmethod
    def split(
        cls,
        supernet: Supernet | FewShot,
        by: str | Measure = "gradients",
        leaves: int = 2,
        *,
        repeats: int = 20,
        samples: int = 128,
        balanced: bool = False,
        seed: int = 0,
    ) -> FewShot:
        """Split ``supernet`` (of a few-shot supernet each leaf) into ``leaves``, in halves of halves.

        Each leaf begins with the weights of what it is a part of, so right after the split every architecture gives the
        same bits as before. Optimizers begin anew. A choice is split once at most on the way to a leaf. ``supernet`` is
        not changed.

        Args:
            by: how far apart options are: ``"gradients"``, ``"lid"``, or a function (:data:`Measure`).
            leaves: a power of 2. Every half is measured on its own, with the weights of ``supernet``; to train in
                between, split in 2, train, and split the result in 2.
            repeats: random networks that each option is measured in. The papers have 100 (GM-NAS) and 50 (NAS-LID).
            samples: training samples that each sees.
            balanced: the two groups' sizes differ by at most one.

        Raises: ConfigError: another ``by``, ``leaves`` or ``repeats``. SpaceError: no choice left to split.
        """
        if leaves < 2 or leaves & (leaves - 1):
            raise ConfigError(f"a supernet cannot be split into {leaves}: give a power of 2, at least 2")
        if repeats < 1:
            raise ConfigError(f"repeats is {repeats}: give at least 1")
        if isinstance(by, str) and by not in MEASURES:
            raise ConfigError(f"unknown split by '{by}'.{did_you_mean(by, MEASURES)} Known: {', '.join(MEASURES)}")
        measure = MEASURES[by] if isinstance(by, str) else by
        old = supernet if isinstance(supernet, FewShot) else cls(supernet.space, [(Domain({}), supernet)])
        new, splits = [], list(old.splits)
        for domain, parent in old.leaves:
            parts = [domain]
            while len(parts) < leaves:
                halves: list[Domain] = []
                for part in parts:
                    split = best_split(
                        parent, part.space(old.space), measure, part.labels, repeats, samples, balanced, seed
                    )
                    splits.append(split)
                    halves += part.halves(split.choice, split.groups)
                parts = halves
            new += [(part, inherited(parent, part.space(old.space))) for part in parts]
        return cls(old.space, new, splits)

    def __repr__(self) -> str:
        return f"FewShot({self.space.name!r}, {len(self.leaves)} leaves, {self.numel:,} numbers)"

    @property
    def task(self) -> Task:
        """What the leaves learn. Raises: ConfigError: they were made without a task."""
        return self.leaves[0][1].task

    @property
    def numel(self) -> int:
        """How many numbers the stores hold."""
        return sum(supernet.numel for _, supernet in self.leaves)

    @property
    def step(self) -> int:
        """Updates done since the split, over all leaves."""
        return sum(supernet.step for _, supernet in self.leaves)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The stored parameters, leaf after leaf."""
        for _, supernet in self.leaves:
            yield from supernet.parameters()

    def to(self, device: str | torch.device) -> FewShot:
        """Move all stores, in place."""
        for _, supernet in self.leaves:
            supernet.to(device)
        return self

    def leaf(self, architecture: Mapping[str, Label]) -> Supernet:
        """The supernet that has ``architecture``. Raises: SpaceError: it is of another space."""
        for domain, supernet in self.leaves:
            if architecture in domain:
                return supernet
        raise SpaceError(f"no leaf of '{self.space.name}' has {Architecture(architecture).to_json()}")

    def subnet(self, architecture: Mapping[str, Label]) -> Subnet:
        """See :meth:`nasgraph.supernet.Supernet.subnet`."""
        return self.leaf(architecture).subnet(architecture)

    def extract(self, architecture: Mapping[str, Label]) -> fx.GraphModule:
        """See :meth:`nasgraph.supernet.Supernet.extract`."""
        return self.leaf(architecture).extract(architecture)

    def calibrated(self, architecture: Mapping[str, Label], samples: int = SAMPLES) -> fx.GraphModule:
        """See :meth:`nasgraph.supernet.Supernet.calibrated`."""
        return self.leaf(architecture).calibrated(architecture, samples)

    def params(self, architecture: Mapping[str, Label]) -> int:
        """How many parameters ``architecture`` has."""
        return self.leaf(architecture).params(architecture)

    def has_batch_norm(self, architecture: Mapping[str, Label]) -> bool:
        """Whether the scores of ``architecture`` need statistics of their own."""
        return self.leaf(architecture).has_batch_norm(architecture)

    def evaluate(
        self, architectures: Iterable[Mapping[str, Label]], samples: int = SAMPLES, split: str = "val"
    ) -> list[float]:
        """Accuracy (a fraction) of each architecture by its leaf; see :meth:`nasgraph.supernet.Supernet.evaluate`."""
        found = [Architecture(architecture) for architecture in architectures]
        scores: dict[Architecture, float] = {}
        for _, supernet in self.leaves:
            mine = [architecture for architecture in found if self.leaf(architecture) is supernet]
            scores.update(zip(mine, supernet.evaluate(mine, samples, split), strict=True))
        return [scores[architecture] for architecture in found]

    def rank_report(self, truth: Callable[[Architecture], float], *args: Any, **kwargs: Any) -> RankReport:
        """See :meth:`nasgraph.supernet.Supernet.rank_report`."""
        from nasgraph.ranking import rank_report

        return rank_report(self, truth, *args, **kwargs)

    def train(
        self,
        policy: str | Callable[[Supernet], Policy],
        steps: int,
        *,
        arguments: Mapping[str, Any] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        on_step: Callable[[int, Sequence[float]], None] | None = None,
        **others: Any,
    ) -> list[float]:
        """Train one leaf after the other until each has done ``steps`` updates since the split, those before included.

        So it goes on after :meth:`load`, as a :class:`~nasgraph.supernet.Supernet` does.

        Args:
            policy: its name, or a function that makes it for a leaf: ``lambda leaf: Uniform(leaf.space)``.
            arguments: of the policy, if it is a name.
            checkpoint: a folder that :meth:`save` writes before the first step; then each leaf is written as it trains.
            on_step: steps are counted over all leaves: those of the second begin at ``steps``.
            others: of :meth:`nasgraph.supernet.Supernet.train`: settings, seed, reduction, samples, every ...

        Returns: of each step done here the mean loss of its architectures, in nats.
        """
        if checkpoint is not None:
            self.save(checkpoint)
        history: list[float] = []
        for i, (_, leaf) in enumerate(self.leaves):
            if isinstance(policy, str):
                offered = {"space": leaf.space, "supernet": leaf, "steps": steps}
                made: Policy = registry.make("policies", policy, arguments or {}, offered)
            else:
                made = policy(leaf)
            place = None if checkpoint is None else Path(checkpoint) / _folder(leaf)
            told = None if on_step is None else partial(_counted, on_step, i * steps)
            history += leaf.train(made, steps, checkpoint=place, on_step=told, **others)
        return history

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write each leaf with its training state into a folder of its own, then ``few_shot.json``, at once.

        Returns: the path of the JSON file.
        """
        place = Path(folder)
        for _, supernet in self.leaves:
            supernet.save(place / _folder(supernet))
        about: dict[str, Any] = {
            "version": VERSION,
            "space": self.space.name,
            "fingerprint": self.space.fingerprint(),
            "leaves": [asdict(domain) | {"folder": _folder(supernet)} for domain, supernet in self.leaves],
            "splits": [asdict(split) for split in self.splits],
        }
        checkpoints.write(place / FILE, about)
        return place / FILE

    @staticmethod
    def load(folder: str | os.PathLike[str], space: SearchSpace, task: Task | None = None) -> FewShot:
        """What :meth:`save` wrote.

        Raises: SpaceError: it is of another space or key version. DamagedFile: a file is not what was written.
            ConfigError: there is no few-shot supernet.
        """
        place = Path(folder)
        about = checkpoints.read(place / FILE, VERSION, "few-shot supernet")
        if about["space"] != space.name or about["fingerprint"] != space.fingerprint():
            same = " with other choices, operations or sizes" if about["space"] == space.name else ""
            raise SpaceError(f"{place / FILE} is of space '{about['space']}'{same}, not of '{space.name}': train anew")
        whole, leaves = Supernet(space, task), []
        for leaf in about["leaves"]:
            labels = {name: tuple(kept) for name, kept in leaf["labels"].items()}
            domain = Domain(labels, tuple(leaf["asks"]))
            supernet = inherited(whole, domain.space(space))  # for its sizes
            leaves.append((domain, checkpoints.load(place / leaf["folder"], supernet.space, task, into=supernet)))
        splits = []
        for split in about["splits"]:
            first, second = split["groups"]
            splits.append(Split(split["choice"], (tuple(first), tuple(second)), split["scores"]))
        return FewShot(space, leaves, splits)


def inherited(parent: Supernet, space: SearchSpace) -> Supernet:
    """A supernet for ``space``, part of the parent's, whose architectures are those of the parent to the bit.

    It has a copy of all that the parent stores for the options that are left, at the parent's sizes: cut smaller, a
    parameter that is computed from a larger one would be another.
    """
    leaf = Supernet(space, parent._task, parent.seed)
    left = {key[:2] for key in leaf.store}
    kept = {key: parameter for key, parameter in parent.store.items() if key[:2] in left}
    copies = {id(parameter): nn.Parameter(parameter.detach().clone()) for parameter in kept.values()}
    leaf.store = {key: copies[id(parameter)] for key, parameter in kept.items()}  # one under two keys stays one
    leaf._names = {option: names for option, names in parent._names.items() if option in left}
    return leaf.to(parent.device)


def _counted(on_step: Callable[[int, Sequence[float]], None], before: int, step: int, losses: Sequence[float]) -> None:
    on_step(before + step, losses)


def _folder(leaf: Supernet) -> str:
    """Named after its space, so a folder never mixes the leaves of two splits."""
    return f"leaf-{leaf.space.fingerprint()[:12]}"
