from __future__ import annotations

import pytest
import torch

from nasgraph.build import build
from nasgraph.errors import SpaceError
from nasgraph.objectives.sparsity import count_kept_flops, count_kept_parameters
from nasgraph.search_spaces.prune_cnn import prune_cnn
from nasgraph.testing import SpaceExam

SMALL = {"image_size": 8, "classes": 3, "layers": 2, "widths": (2, 4), "keeps": (0.25, 0.5, 1.0)}


class TestExam(SpaceExam):
    space = staticmethod(lambda: prune_cnn(**SMALL))  # type: ignore[arg-type]
    classes = 3
    formats = ("code", "torch-export")


def test_sizes_and_costs_in_closed_form() -> None:
    assert prune_cnn().size() == 16**3 and prune_cnn(**SMALL).size() == 36  # type: ignore[arg-type]
    model = build(prune_cnn(), {"width1": 8, "keep1": 0.5, "width2": 16, "keep2": 0.25, "width3": 32, "keep3": 1.0})
    kept = 9 * 8 // 2 + 9 * 8 * 16 // 4 + 9 * 16 * 32
    assert count_kept_parameters(model) == kept + 2 * (8 + 16 + 32) + 33 * 10
    flops = 2 * (9 * 8 // 2 * 28**2 + 9 * 8 * 16 // 4 * 14**2 + 9 * 16 * 32 * 7**2 + 32 * 10)
    assert count_kept_flops(model, (torch.zeros(1, 1, 28, 28),)) == flops


def test_a_space_without_layers_is_refused() -> None:
    with pytest.raises(SpaceError, match="layers is 0"):
        prune_cnn(layers=0)
