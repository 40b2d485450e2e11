"""Every transform sits the exam that we ask of a user's own."""

from __future__ import annotations

from nasgraph.space import Choice
from nasgraph.testing import TransformExam
from nasgraph.transforms import Lora, LowRank, Prune, Quantize


class TestLora(TransformExam):
    transform = Lora(rank=Choice("rank", [0, 2, 4]))


class TestLowRank(TransformExam):
    transform = LowRank(rank=Choice("rank", [2, 4, None]))


class TestPrune(TransformExam):
    transform = Prune(keep=Choice("keep", [0.25, 0.5, 1.0]))


class TestQuantize(TransformExam):
    transform = Quantize(weight_bits=Choice("bits", [1, 2, 4, 8, 32]), activation_bits=Choice("activation", [4, 8, 32]))
