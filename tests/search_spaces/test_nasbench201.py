"""Counts against the published ones, the canonical key against VF2 on all cells, parameters against the benchmark's."""

from __future__ import annotations

import csv
import gzip
import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import networkx as nx
import pytest
import torch
from networkx.algorithms.isomorphism import categorical_node_match

from nasgraph import canonical
from nasgraph.build import build
from nasgraph.canonical import key, simplify, traits
from nasgraph.catalogue import make_space
from nasgraph.errors import SpaceError
from nasgraph.search_spaces.nasbench201 import EDGES, cell_space, from_string, nasbench201, nor_conv, to_string
from nasgraph.space import Architecture, Graph
from nasgraph.tasks import digits_images

KEYS = 5_875  # docs/canonical_key.md explains this number and the others of test_each_rule_explains_its_part


@pytest.fixture(scope="module")
def cells() -> dict[Architecture, Graph]:
    space = cell_space()
    return {arch: space.resolve(arch) for arch in space.enumerate()}


def expression(arch: Architecture, zero: bool) -> str:
    """The rule of the paper's authors: a node is the text of its sum, a skip is its source's text."""
    text = {0: "0"}
    for node in (1, 2, 3):
        terms = []
        for source in range(node):
            operation = arch[f"edge_{source}_{node}"]
            if zero and (operation == "none" or text[source] == "#"):
                terms.append("#")
            else:
                terms.append(text[source] if operation == "skip_connect" else f"({text[source]})@{operation}")
        text[node] = "+".join(sorted(terms))
    return text[3]


def test_there_are_15625_architectures(cells):
    assert len(cells) == cell_space().size() == nasbench201().size() == 5**6 == 15_625


def test_the_published_rule_gives_the_published_6466(cells):
    assert len({expression(arch, zero=True) for arch in cells}) == 6_466
    assert len({expression(arch, zero=False) for arch in cells}) == 12_751


def coded(graph: Graph) -> nx.DiGraph:
    found = nx.DiGraph()
    found.add_node("x", label="input")
    for step in graph.steps:
        found.add_node(step.name, label=step.op.signature)
        for i, name in enumerate(step.sources):
            found.add_node((step.name, i), label="reads")
            found.add_edge(name, (step.name, i))
            found.add_edge((step.name, i), step.name)
    found.nodes[graph.output]["label"] += " output"
    return found


def test_the_canonical_key_gives_5875(cells):
    assert len({key(graph) for graph in cells.values()}) == KEYS


@pytest.mark.slow
def test_keys_are_the_isomorphism_classes_of_the_simplified_cells(cells):
    """VF2 on all pairs of one neighbourhood: labels, what is read and what reads. No order of sources matters here."""
    match = categorical_node_match("label", None)
    assert all(traits(s.op).commutative for graph in cells.values() for s in graph.steps if len(s.sources) > 1)
    simple = {}  # one graph per set of equal texts up to names: most of the cells are equal then
    for graph in map(simplify, cells.values()):
        place = {"x": "x"} | {step.name: str(i) for i, step in enumerate(graph.steps)}
        simple[str([(s.op.signature, [place[n] for n in s.sources]) for s in graph.steps])] = graph
    buckets: dict[tuple, list[tuple[nx.DiGraph, str]]] = defaultdict(list)
    for graph in simple.values():
        label = {"x": "x"} | {step.name: step.op.signature for step in graph.steps}
        readers = Counter((name, label[step.name]) for step in graph.steps for name in step.sources)
        uses = sorted((label[name], reader, count) for (name, reader), count in readers.items())
        bucket = tuple(sorted((label[s.name], *sorted(label[n] for n in s.sources)) for s in graph.steps)), tuple(uses)
        drawing, name = coded(graph), key(graph)
        same = [known for other, known in buckets[bucket] if nx.is_isomorphic(other, drawing, node_match=match)]
        assert same in ([], [name])
        if not same:
            buckets[bucket].append((drawing, name))
    names = [name for members in buckets.values() for _, name in members]
    assert len(names) == len(set(names)) == KEYS


@pytest.mark.slow
def test_each_rule_explains_its_part(cells, monkeypatch):
    """The counts of docs/canonical_key.md: which rule merges how many."""
    own, flatten = canonical.traits, canonical._flatten

    def keys(copies=True, sums=True, shift=True) -> int:
        def some(op):
            found = own(op)
            if op.make is nor_conv and not shift:
                found = replace(found, keeps_zero=True)
            return found if copies else replace(found, pure=False)

        monkeypatch.setattr(canonical, "traits", some)
        monkeypatch.setattr(canonical, "_flatten", flatten if sums else lambda graph: (graph, False))
        return len({key(graph) for graph in cells.values()})

    assert keys(copies=False, sums=False, shift=False) == 6_334  # a layer that reads zero counts as zero
    assert keys(copies=False, sums=False) == 7_031  # it does not: batch normalisation adds a learned shift
    assert keys(sums=False) == 6_844  # equal poolings of one tensor are one
    assert keys(copies=False) == 6_040  # a sum of a sum is a sum
    assert keys() == KEYS
    assert keys(shift=False) == 5_260


def test_two_networks_are_the_same_when_their_cells_are(cells):
    space, rng = nasbench201(cells=2), random.Random(0)
    some = rng.sample(list(cells), 1500)
    pairs = {(key(cells[arch]), space.key(arch)) for arch in some}
    assert len(pairs) == len({cell for cell, _ in pairs}) == len({whole for _, whole in pairs})


def test_strings_round_trip(cells):
    assert len({to_string(arch) for arch in cells}) == 15_625
    assert all(from_string(to_string(arch)) == arch for arch in cells)
    text = "|none~0|+|skip_connect~0|nor_conv_1x1~1|+|nor_conv_3x3~0|avg_pool_3x3~1|none~2|"
    assert dict(from_string(text)) == dict(
        zip((f"edge_{i}_{j}" for i, j in EDGES),
            ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3", "none"), strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("text", ["", "|none~0|", "|conv~0|+|none~0|none~1|+|none~0|none~1|none~2|",
                                  "|none~1|+|none~0|none~1|+|none~0|none~1|none~2|"])  # fmt: skip
def test_other_strings_are_refused(text):
    with pytest.raises(SpaceError, match="no NAS-Bench-201 cell"):
        from_string(text)


def parameters(arch: Architecture, channels: int = 16, classes: int = 10, cells: int = 5) -> int:
    """Closed form: a k x k ReLU-conv-BN layer of c channels has k^2 c^2 + 2c parameters."""
    total = 27 * channels + 2 * channels  # stem
    for width in (channels, 2 * channels, 4 * channels):
        for operation in arch.values():
            kernel = {"nor_conv_1x1": 1, "nor_conv_3x3": 3}.get(operation)
            total += cells * (kernel**2 * width**2 + 2 * width) if kernel else 0
    for width in (channels, 2 * channels):  # reduction: two 3x3 layers and a 1x1 convolution
        total += 9 * width * 2 * width + 4 * width + 9 * 4 * width**2 + 4 * width + width * 2 * width
    return total + 8 * channels + 4 * channels * classes + classes


def test_parameters_of_living_cells_follow_the_closed_form():
    space, rng = nasbench201(cells=2), random.Random(1)
    for _ in range(10):
        arch = space.sample(rng)
        while "none" in arch.values():
            arch = space.mutate(arch, rng)
        assert sum(p.numel() for p in build(space, arch).parameters()) == parameters(arch, cells=2)


def test_parameters_are_the_benchmarks(data_root: Path):
    """The closed form gives the published count of all 9,445 cells in the table; built networks have it too."""
    folder = data_root / "nasbench201"
    with gzip.open(folder / "nb201_accuracy.csv.gz", "rt") as file:
        text = {row["index"]: row["arch_str"] for row in csv.DictReader(file)}
    with gzip.open(folder / "nb201_zero_cost_scores.csv.gz", "rt") as file:
        published = {text[row["index"]]: round(1e6 * float(row["c10_params"])) for row in csv.DictReader(file)}
    assert len(published) == 9_445
    assert all(parameters(from_string(name)) == count for name, count in published.items())
    space = nasbench201()
    for name in random.Random(2).sample(sorted(published), 4):
        assert sum(p.numel() for p in build(space, from_string(name)).parameters()) == published[name]


@pytest.mark.parametrize("text", [
    "|nor_conv_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|avg_pool_3x3~0|nor_conv_3x3~1|none~2|",
    "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|",
    "|none~0|+|none~0|nor_conv_3x3~1|+|none~0|none~1|skip_connect~2|",
])  # fmt: skip
def test_networks_run_forward_and_backward(text):
    model = build(nasbench201(cells=1), from_string(text))
    logits = model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 10) and torch.isfinite(logits).all()
    logits.sum().backward()
    assert model.classifier.weight.grad is not None


def test_stages_double_the_channels_and_halve_the_image():
    model = build(nasbench201(cells=1), from_string("|skip_connect~0|+|none~0|none~1|+|nor_conv_1x1~0|none~1|none~2|"))
    seen = {}
    for name in ("stem", "stage0_cell0_e03", "stage1_cell0_e03", "stage2_cell0_e03"):
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o.shape[1:]))
    model(torch.zeros(1, 3, 32, 32))
    assert [tuple(shape) for shape in seen.values()] == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_images_of_a_task_are_taken_whatever_their_channels_and_size():
    task = digits_images()
    space = make_space("nasbench201", {"channels": 4, "cells": 1}, task.sizes)
    model = build(space, from_string("|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|none~1|nor_conv_1x1~2|"))
    assert space.inputs["image"].example.shape == (2, 1, 8, 8)
    assert model.get_submodule("stem").weight.shape == (4, 1, 3, 3)
    assert model(*task.batch(5, seed=0).inputs).shape == (5, 10)
