from __future__ import annotations

import itertools
import random
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nasgraph.draw import Box, Edge, _layout, _order, crossings, draw, draw_architecture, draw_space
from nasgraph.errors import SpaceError
from nasgraph.ops import add, concat
from nasgraph.space import Call, Choice, Op, SearchSpace
from nasgraph.transforms import Lora

SVG = "{http://www.w3.org/2000/svg}"


class Mean(nn.Module):
    """Stands for a graph convolution: it reads node features and edges."""

    def __init__(self, out_channels: int, heads: int = 1) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        return x


class Sum(Mean):
    pass


def gnn() -> SearchSpace:
    """Up to three convolutions; the head reads from any of them, a skip may go past two."""
    space = SearchSpace("small <gnn>")
    x = space.input("x", torch.randn(4, 16), dynamic={0: "nodes"})
    edges = space.input("edge_index", torch.tensor([[0, 1, 2], [1, 2, 3]]), dynamic={1: "edges"})
    width = Choice("width", [8, 16, 32], ordered=True)
    h = space.add("stem", Op(nn.Linear, out_features=width), x)
    nodes = [h]
    for i in range(1, 4):
        kind = Choice(f"conv{i}", [Op(Mean, out_channels=width), Op(Sum, out_channels=width, heads=1)])
        h = space.add(f"layer{i}", kind, h, edges)
        nodes.append(h)
    pooled = space.add("joined", Call(concat), Choice("skip", {"none": nodes[3], "early": nodes[1]}), nodes[0])
    last = Choice("read", {"one": nodes[1], "two": nodes[2], "joined": pooled})
    space.output(space.add("head", Op(nn.Linear, out_features=3), last))
    return space


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ET.fromstring(svg).iter(f"{SVG}text")]


def lines_of(svg: str) -> tuple[int, int]:
    """How many arrows are solid, and how many dashed."""
    paths = [path for path in ET.fromstring(svg).iter(f"{SVG}path") if path.get("fill") == "none"]
    dashed = sum(path.get("stroke-dasharray") is not None for path in paths)
    return len(paths) - dashed, dashed


def test_a_network_shows_its_operations() -> None:
    space = gnn()
    arch = space.architecture({"read": "joined", "skip": "early", "width": 16, "conv1": "Sum"})
    svg = draw_architecture(space, arch)
    shown = texts(svg)
    for text in ("x", "edge_index", "stem", "Sum(out_channels=16, heads=1)", "+ edge_index", "concat", "output"):
        assert text in shown
    assert "layer2" not in shown  # not reached
    # x -> stem -> layer1 -> joined, stem -> joined -> head -> output
    assert lines_of(svg) == (6, 0)
    assert svg == draw_architecture(space, arch)
    with pytest.raises(SpaceError, match="skip"):
        draw_architecture(space, {"read": "joined"})


def test_a_space_shows_its_choices() -> None:
    svg = draw_space(gnn())
    shown = texts(svg)
    for text in (
        "conv2: Mean | Sum",
        "width: 8 | 16 | 32",
        "skip: none = layer3 | early = layer1",
        "+ edge_index",
    ):
        assert text in shown
    # solid: x -> stem -> layer1 -> layer2 -> layer3, stem -> joined, head -> output; dashed: 2 of skip, 3 of read
    assert lines_of(svg) == (6, 5)


def test_a_choice_of_outputs_is_drawn() -> None:
    space = SearchSpace("s")
    x = space.input("x", torch.randn(2, 3))
    a = space.add("output", Op(nn.Linear, out_features=3), x)
    b = space.add("b", Call(add), a, a)
    space.output(Choice("depth", {"1": a, "2": b}))
    svg = draw_space(space)
    assert "output′" in texts(svg) and "depth: 1 = output | 2 = b" in texts(svg)
    assert "2×" in texts(svg)  # b reads a twice
    assert lines_of(svg) == (2, 2)


def test_labels_are_escaped_and_cut() -> None:
    nasty = '<script>alert("1")</script> & \x00\ud800'
    svg = draw([Box("a", (nasty, "word " * 200)), Box("b", kind="output")], [Edge("a", "b")], title=nasty)
    root = ET.fromstring(svg)  # well-formed
    assert not list(root.iter(f"{SVG}script"))
    assert root.get("aria-label", "").startswith('<script>alert("1")</script> &')
    assert "…" in texts(svg)
    assert "word " * 200 in "".join(root.itertext())  # the tooltip has all of it


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="cycle"):
        draw([Box("a"), Box("b")], [Edge("a", "b"), Edge("b", "a")])
    with pytest.raises(ValueError, match="'c'"):
        draw([Box("a")], [Edge("a", "c")])
    with pytest.raises(ValueError, match="two boxes are called 'a'"):
        draw([Box("a"), Box("a")], [])
    ET.fromstring(draw([], []))


@st.composite
def dags(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    count = draw(st.integers(1, 12))
    pairs = list(itertools.combinations(range(count), 2))
    return count, draw(st.lists(st.sampled_from(pairs), unique=True, max_size=25)) if pairs else []


@settings(deadline=None)
@given(dags(), st.randoms(use_true_random=False))
def test_boxes_are_in_layers_and_lines_cross_none(dag: tuple[int, list[tuple[int, int]]], rng: random.Random) -> None:
    count, edges = dag
    widths = [rng.uniform(20, 200) for _ in range(count)]
    heights = [rng.uniform(20, 90) for _ in range(count)]
    plan = _layout(widths, heights, edges)
    boxes = [
        (plan.x[i] - widths[i] / 2, plan.y[i], plan.x[i] + widths[i] / 2, plan.y[i] + heights[i]) for i in range(count)
    ]
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]  # no overlap
    for x0, y0, x1, y1 in boxes:
        assert x0 >= 0 and y0 >= 0 and x1 <= plan.width and y1 <= plan.height
    for (a, b), points in zip(edges, plan.paths, strict=True):
        assert boxes[a][3] < boxes[b][1]  # arrows point down
        assert points[0][1] == boxes[a][3] and points[-1][1] == boxes[b][1]
        for (x, top), (nx, bottom) in itertools.pairwise(points):
            assert bottom >= top
            if x == nx:  # the straight pieces pass beside the boxes of their layer
                others = [box for i, box in enumerate(boxes) if i not in (a, b)]
                assert not any(box[0] < x < box[2] and box[1] < bottom and top < box[3] for box in others)


def test_crossings_are_counted_and_cut() -> None:
    def slow(rows: list[list[int]], links: list[tuple[int, int]]) -> int:
        at = {i: (depth, p) for depth, row in enumerate(rows) for p, i in enumerate(row)}
        return sum(
            at[a][0] == at[c][0] and (at[a][1] - at[c][1]) * (at[b][1] - at[d][1]) < 0
            for (a, b), (c, d) in itertools.combinations(links, 2)
        )

    rng = random.Random(0)
    for _ in range(30):
        layer = [0] * 6 + [1] * 6 + [2] * 6
        links = [
            (rng.randrange(6 * d, 6 * d + 6), rng.randrange(6 * d + 6, 6 * d + 12)) for d in (0, 1) for _ in range(9)
        ]
        plain = [list(range(6 * d, 6 * d + 6)) for d in range(3)]
        assert crossings(plain, links) == slow(plain, links)
        assert crossings(_order(layer, links), links) <= crossings(plain, links)
    # a tree drawn from shuffled leaves is untangled completely
    leaves = [(i % 2, 2 + i) for i in range(8)]
    assert crossings(_order([0, 0] + [1] * 8, leaves), leaves) == 0


def test_numbers_are_plain() -> None:
    assert not re.search(r"nan|inf", draw([Box("a"), Box("b")], [Edge("a", "b")]))


class Twice(nn.Module):
    """Runs its first layer again behind the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.first(self.second(self.first(x)))
        return out


def test_a_space_over_a_model_is_drawn_as_its_modules() -> None:
    rules = [Lora("*", rank=Choice("rank.{name}", [0, 2]))]
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    text = draw_space(SearchSpace.from_module(plain, rules, inputs=torch.randn(2, 4)))
    ET.fromstring(text)
    assert "rank.0: 0 | 2" in text and "rank.2: 0 | 2" in text and text.count("Linear") >= 2 and "2 modules" in text
    again = draw_space(SearchSpace.from_module(Twice(), rules, inputs=torch.randn(2, 4)))
    assert "rank.first: 0 | 2" in again and "rank.second: 0 | 2" in again
