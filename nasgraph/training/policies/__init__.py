"""Path policies: which architectures of a supernet one step trains, and on what.

A policy is a class with ``sample`` and, if it learns, ``observe``:

- ``sample(step, rng)`` returns the architectures of one update: plain ones, or as :class:`Path` with a weight, shares
  of hard and soft targets, and a teacher (an earlier path of the step, or a network).
- ``observe(step)`` is called after the update with a :class:`Step`: its number, paths, losses, gradient norms.
- ``state()`` and ``load(state)`` carry what was learned through a checkpoint: JSON values, and tensors at the top
  level.

What a step trains depends on (seed, step) and on that state, never on what a forward pass draws. The constructor takes
of ``space``, ``supernet`` and ``steps`` what it needs, by these names; the rest has defaults. ``docs/policies.md``
shows all policies and how to write one.
"""

from nasgraph.training.policies.base import Key, Path, Policy, Step
from nasgraph.training.policies.bins import Bins
from nasgraph.training.policies.fair import Fair
from nasgraph.training.policies.importance import Importance
from nasgraph.training.policies.nested import Nested
from nasgraph.training.policies.ordered_dropout import OrderedDropout
from nasgraph.training.policies.progressive import Progressive
from nasgraph.training.policies.sandwich import Sandwich
from nasgraph.training.policies.sizes import by_size, extremes
from nasgraph.training.policies.uniform import Uniform

__all__ = [
    "Bins",
    "Fair",
    "Importance",
    "Key",
    "Nested",
    "OrderedDropout",
    "Path",
    "Policy",
    "Progressive",
    "Sandwich",
    "Step",
    "Uniform",
    "by_size",
    "extremes",
]
