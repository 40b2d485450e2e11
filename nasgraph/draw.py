"""Drawings of networks and search spaces: layered graphs as plain SVG, top to bottom.

Layers by longest path, order within a layer by barycentres (Sugiyama, Tagawa & Toda 1981), positions by least squares.
The colours read on light and on dark pages. There are no ids, scripts or style sheets: many drawings fit on one page.
"""

from __future__ import annotations

import textwrap
from bisect import bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from xml.sax.saxutils import escape, quoteattr

from nasgraph.model_space import ModelSpace
from nasgraph.space import ConcreteOp, Label, SearchSpace

LINE, CHAR, PAD = 15.0, 6.4, 10.0  # pixels: height of a line of text, width of a character, padding of a box
GAP_X, GAP_Y, MARGIN = 22.0, 34.0, 14.0  # pixels: between boxes, between layers, around the drawing
WRAP, MOST_LINES = 38, 9  # characters in a line of a box, lines in a box; the tooltip has the full text
SWEEPS = 8

FILL = {"input": "#e9eef5", "op": "#ffffff", "output": "#e4f1e8"}
STROKE, EDGE, TEXT, SOFT = "#7d8a9a", "#8996a6", "#1b2430", "#4d5a69"


@dataclass(frozen=True)
class Box:
    """A node of a drawing: its name, the lines of text below the name, and what it is."""

    name: str
    lines: tuple[str, ...] = ()
    kind: Literal["input", "op", "output"] = "op"


@dataclass(frozen=True)
class Edge:
    """An arrow between two boxes by name; dashed: only if a choice takes it."""

    source: str
    target: str
    dashed: bool = False


def draw_architecture(space: SearchSpace, arch: Mapping[str, Label]) -> str:
    """SVG of one network of ``space``: its operations with their decided arguments.

    Inputs that are never an operation's first source (``edge_index``, ``batch``) are named in the boxes that read them
    instead of being joined to all of them.

    Raises: SpaceError: ``arch`` is not an architecture of ``space``.
    """
    graph = space.resolve(arch)
    boxes, edges = [Box(name, (), "input") for name in graph.inputs], []
    aside = _aside(graph.inputs, [read for step in graph.steps for read in enumerate(step.sources)])
    for step in graph.steps:
        lines = [_op_text(step.op), *(f"+ {name}" for name in step.sources if name in aside)]
        boxes.append(Box(step.name, tuple(lines)))
        edges += [Edge(source, step.name) for source in step.sources if source not in aside]
    boxes.append(Box(_free("output", boxes), (), "output"))
    edges.append(Edge(graph.output, boxes[-1].name))
    return draw(boxes, edges, title=f"Network of space {space.name}: {len(graph.steps)} operations")


def draw_space(space: SearchSpace) -> str:
    """SVG of all nodes of ``space`` and all edges that an architecture may have.

    Dashed edges are taken by a choice; the box that reads through a choice lists its options. Of a space over a model:
    the modules that its rules fit, and the data flow between them.
    """
    if isinstance(space, ModelSpace):
        return _draw_modules(space)
    graph, declared = space.graph(), space.describe()
    choices = declared["choices"]

    def options(name: str) -> str:
        pairs = []
        for label, option in zip(choices[name]["labels"], choices[name]["options"], strict=True):
            node = option.get("node", label) if isinstance(option, dict) else label
            pairs.append(str(label) if node == label else f"{label} = {node}")
        return f"{name}: {' | '.join(pairs)}"

    aside = _aside(space.inputs, [(position, source) for source, _, position in graph.edges(data="position")])
    boxes, edges = [Box(name, (), "input") for name in space.inputs], []
    for name, (op, reads) in declared["nodes"].items():
        lines = [] if "choice" in op else [graph.nodes[name]["op"]]
        lines += [options(choice) for choice in _choices_in((op, reads), choices)]
        lines += [f"+ {source}" for source in graph.predecessors(name) if source in aside]
        boxes.append(Box(name, tuple(lines)))
        for source, _, choice in graph.in_edges(name, data="choice"):
            if source not in aside:
                edges.append(Edge(source, name, dashed=choice is not None))
    if declared["output"] is not None:
        taken = _choices_in(declared["output"], choices)
        boxes.append(Box(_free("output", boxes), tuple(options(choice) for choice in taken), "output"))
        for name, is_output in graph.nodes(data="output"):
            if is_output:
                edges.append(Edge(name, boxes[-1].name, dashed=bool(taken)))
    return draw(boxes, edges, title=f"Search space {space.name}: {len(declared['nodes'])} nodes")


def _draw_modules(space: ModelSpace) -> str:
    import networkx

    boxes, flow = [], networkx.DiGraph()
    graph = space.graph()
    for name, module in graph.nodes(data=True):
        choices = [f"{each}: {' | '.join(map(str, space.choices[each].labels))}" for each in module["choices"]]
        boxes.append(Box(name, (module["op"], *choices)))
    flow.add_nodes_from(box.name for box in boxes)
    for first, second in graph.edges():
        if not networkx.has_path(flow, second, first):  # of a module that runs again, the way back is not drawn
            flow.add_edge(first, second)
    edges = [Edge(first, second) for first, second in flow.edges]
    return draw(boxes, edges, title=f"Search space {space.name}: {len(boxes)} modules")


def draw(boxes: Sequence[Box], edges: Iterable[Edge], title: str = "") -> str:
    """SVG of a directed acyclic graph. Edges between the same two boxes become one, with their number beside it.

    Raises: ValueError: two boxes of one name, an edge of an unknown box, or a cycle.
    """
    names = [box.name for box in boxes]
    if len(set(names)) != len(names):
        raise ValueError(f"two boxes are called {Counter(names).most_common(1)[0][0]!r}")
    joined: dict[tuple[str, str], list[Edge]] = defaultdict(list)
    for edge in edges:
        if edge.source not in names or edge.target not in names:
            raise ValueError(f"edge {edge.source!r} -> {edge.target!r} names a box that is not there")
        joined[edge.source, edge.target].append(edge)

    index = {name: i for i, name in enumerate(names)}
    texts = [_fit(box) for box in boxes]
    widths = [max(len(line) for line in text) * CHAR + 2 * PAD for text in texts]
    heights = [len(text) * LINE + PAD for text in texts]
    title = _clean(title)
    plan = _layout(widths, heights, [(index[a], index[b]) for a, b in joined])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {plan.width:.0f} {plan.height:.0f}" '
        f'width="{plan.width:.0f}" height="{plan.height:.0f}" role="img" aria-label={quoteattr(title)} '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="11.5">',
        f"<title>{escape(title)}</title>",
    ]
    for points, group in zip(plan.paths, joined.values(), strict=True):
        parts += _arrow(points, dashed=all(edge.dashed for edge in group), times=len(group))
    for i, box in enumerate(boxes):
        parts += _box(box, texts[i], plan.x[i], plan.y[i], widths[i], heights[i])
    return "\n".join([*parts, "</svg>"])


def _arrow(points: Sequence[tuple[float, float]], dashed: bool, times: int) -> list[str]:
    """A path that goes straight down within layers and swings sideways between them."""
    (x, y), end = points[0], points[-1]
    path = f"M{x:.1f},{y:.1f}"
    for nx, ny in points[1:]:
        tip = ny - 5 if (nx, ny) == end else ny  # the arrowhead covers the rest
        middle = (y + tip) / 2
        path += (
            f" V{ny:.1f}"
            if nx == x and (nx, ny) != end
            else f" C{x:.1f},{middle:.1f} {nx:.1f},{middle:.1f} {nx:.1f},{tip:.1f}"
        )
        x, y = nx, ny
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    head = f"M{x - 3.5:.1f},{y - 6.5:.1f} H{x + 3.5:.1f} L{x:.1f},{y:.1f} Z"
    parts = [
        f'<path d="{path}" fill="none" stroke="{EDGE}" stroke-width="1.3"{dash}/>',
        f'<path d="{head}" fill="{EDGE}"/>',
    ]
    if times > 1:
        parts.append(f'<text x="{x + 6:.1f}" y="{y - 6:.1f}" fill="{EDGE}">{times}×</text>')
    return parts


def _box(box: Box, text: Sequence[str], x: float, top: float, width: float, height: float) -> list[str]:
    parts = [
        f"<g><title>{escape(chr(10).join(map(_clean, (box.name, *box.lines))))}</title>",
        f'<rect x="{x - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'rx="{5 if box.kind == "op" else 11}" fill="{FILL[box.kind]}" stroke="{STROKE}"/>',
    ]
    for row, line in enumerate(text):
        look = f'fill="{SOFT}"' if row else f'fill="{TEXT}" font-weight="600"'
        y = top + PAD / 2 + LINE * (row + 0.75)
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" {look}>{escape(line)}</text>')
    return [*parts, "</g>"]


# ---- text of a box ------------------------------------------------------------------------------------------------


def _fit(box: Box) -> list[str]:
    """The lines that a box shows: wrapped, and cut with an ellipsis where there are too many."""
    texts = [_clean(text) for text in (box.name, *box.lines)]
    lines = [piece for text in texts for piece in (textwrap.wrap(text, WRAP, subsequent_indent="  ") or [""])]
    return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "…"]


def _clean(text: str) -> str:
    """``text`` with spaces for what XML does not allow: control characters and lone surrogates."""
    return "".join(c if c.isprintable() else " " for c in text)


def _op_text(op: ConcreteOp) -> str:
    arguments = ", ".join(f"{name}={_value_text(value)}" for name, value in op.kwargs.items())
    return f"{op.label}({arguments})" if arguments else op.label


def _value_text(value: Any) -> str:
    if isinstance(value, ConcreteOp):
        return _op_text(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value_text, value))}]"
    if callable(value):
        return str(getattr(value, "__name__", value))
    return str(value)


def _aside(inputs: Iterable[str], reads: Sequence[tuple[int, str]]) -> set[str]:
    """The inputs that something reads, but nothing in the first position; ``reads``: (position, source)."""
    first = {source for position, source in reads if position == 0}
    return {name for name in inputs if name in {source for _, source in reads} - first}


def _choices_in(plain: Any, choices: Mapping[str, Any]) -> list[str]:
    """Names of the choices that a part of a space's description mentions, each once, options of choices included."""
    found: dict[str, None] = {}

    def look(thing: Any) -> None:
        if isinstance(thing, dict):
            name = thing.get("choice") if len(thing) == 1 else None
            if isinstance(name, str) and name in choices and name not in found:
                found[name] = None
                look(choices[name]["options"])
            for item in thing.values():
                look(item)
        elif isinstance(thing, list | tuple):
            for item in thing:
                look(item)

    look(plain)
    return list(found)


def _free(name: str, boxes: Iterable[Box]) -> str:
    taken = {box.name for box in boxes}
    while name in taken:
        name += "′"
    return name


# ---- layout -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Pixels: centres ``x`` and tops ``y`` of the boxes, the points that each edge goes through, the drawing's size."""

    x: list[float]
    y: list[float]
    paths: list[list[tuple[float, float]]]
    width: float
    height: float


def _layout(widths: Sequence[float], heights: Sequence[float], edges: Sequence[tuple[int, int]]) -> _Plan:
    layer = _layers(len(widths), edges)
    # A long edge has a place of its own in the layers that it passes, so that it crosses no box.
    chains, wide = [], list(widths)
    for a, b in edges:
        between = range(layer[a] + 1, layer[b])
        chains.append([a, *range(len(layer), len(layer) + len(between)), b])
        layer += between
        wide += [4.0] * len(between)
    links = [pair for chain in chains for pair in zip(chain, chain[1:], strict=False)]
    rows = _order(layer, links)
    x = _positions(rows, wide, links)
    left = min((centre - width / 2 for centre, width in zip(x, wide, strict=True)), default=0.0) - MARGIN
    x = [centre - left for centre in x]

    tops, bottoms, y = [], [], MARGIN
    for row in rows:
        tops.append(y)
        bottoms.append(y + max(heights[i] for i in row if i < len(heights)))
        y = bottoms[-1] + GAP_Y
    leaving, entering = _ports(chains, x, wide, at=0), _ports(chains, x, wide, at=-1)
    paths = []
    for chain, start, end in zip(chains, leaving, entering, strict=True):
        first = layer[chain[0]]
        points = [(start, tops[first] + heights[chain[0]]), (start, bottoms[first])]
        for place in chain[1:-1]:
            points += [(x[place], tops[layer[place]]), (x[place], bottoms[layer[place]])]
        paths.append([*points, (end, tops[layer[chain[-1]]])])
    return _Plan(
        x=x[: len(widths)],
        y=[tops[depth] for depth in layer[: len(widths)]],
        paths=paths,
        width=max((centre + width / 2 for centre, width in zip(x, wide, strict=True)), default=0.0) + MARGIN,
        height=(bottoms[-1] if bottoms else MARGIN) + MARGIN,
    )


def _layers(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """Longest path from a source, per node. Raises: ValueError: there is a cycle."""
    readers: dict[int, list[int]] = defaultdict(list)
    waiting = [0] * count
    for a, b in edges:
        readers[a].append(b)
        waiting[b] += 1
    layer = [0] * count
    ready = [i for i in range(count) if not waiting[i]]
    for i in ready:  # grows while it is read
        for reader in readers[i]:
            layer[reader] = max(layer[reader], layer[i] + 1)
            waiting[reader] -= 1
            if not waiting[reader]:
                ready.append(reader)
    if len(ready) < count:
        raise ValueError("the graph has a cycle: it cannot be drawn in layers")
    return layer


def _order(layer: Sequence[int], links: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The nodes of each layer, left to right: the order with the fewest crossings that the sweeps met."""
    rows: list[list[int]] = [[] for _ in range(max(layer, default=-1) + 1)]
    for i, depth in enumerate(layer):
        rows[depth].append(i)
    above, below = _neighbours(links)
    best, fewest = [list(row) for row in rows], crossings(rows, links)
    for sweep in range(SWEEPS):
        if not fewest:
            break
        near, order = (above, rows) if sweep % 2 == 0 else (below, rows[::-1])
        place = {i: p for row in rows for p, i in enumerate(row)}
        for row in order:
            # a node without neighbours on that side keeps its place
            weight = {i: sum(place[j] for j in near[i]) / len(near[i]) if near[i] else place[i] for i in row}
            row.sort(key=weight.__getitem__)
            place.update({i: p for p, i in enumerate(row)})
        found = crossings(rows, links)
        if found < fewest:
            best, fewest = [list(row) for row in rows], found
    return best


def crossings(rows: Sequence[Sequence[int]], links: Sequence[tuple[int, int]]) -> int:
    """How many pairs of links between neighbouring layers cross."""
    place = {i: (depth, p) for depth, row in enumerate(rows) for p, i in enumerate(row)}
    between: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for a, b in links:
        between[place[a][0]].append((place[a][1], place[b][1]))
    total = 0
    for ends in between.values():
        seen: list[int] = []
        for _, end in sorted(ends):
            total += len(seen) - bisect_right(seen, end)
            insort(seen, end)
    return total


def _positions(rows: Sequence[Sequence[int]], widths: Sequence[float], links: Sequence[tuple[int, int]]) -> list[float]:
    """Centres: each node near the mean of its neighbours, in order and without overlap."""
    x = [0.0] * sum(len(row) for row in rows)
    for row in rows:
        for i, centre in zip(row, _spread([0.0] * len(row), [widths[i] for i in row]), strict=True):
            x[i] = centre
    above, below = _neighbours(links)
    linked = {i for link in links for i in link}
    for sweep in range(2 * SWEEPS):
        near, order = (above, rows) if sweep % 2 == 0 else (below, rows[::-1])
        for row in order:
            centres = {i: sum(x[j] for j in near[i]) / len(near[i]) if near[i] else x[i] for i in row if i in linked}
            beside = sum(centres.values()) / max(len(centres), 1)
            wish = [centres.get(i, beside) for i in row]  # a box without edges stays near the others
            for i, centre in zip(row, _spread(wish, [widths[i] for i in row]), strict=True):
                x[i] = centre
    return x


def _spread(wish: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Centres nearest to ``wish`` in least squares that keep boxes ``GAP_X`` apart: pool adjacent violators."""
    offset, offsets = 0.0, []
    for i, width in enumerate(widths):
        offset += (widths[i - 1] + width) / 2 + GAP_X if i else 0.0
        offsets.append(offset)
    blocks: list[tuple[float, int]] = []  # (sum of wishes, how many boxes)
    for want, start in zip(wish, offsets, strict=True):
        total, count = want - start, 1
        while blocks and blocks[-1][0] / blocks[-1][1] >= total / count:
            last, size = blocks.pop()
            total, count = total + last, count + size
        blocks.append((total, count))
    bases = [total / count for total, count in blocks for _ in range(count)]
    return [base + start for base, start in zip(bases, offsets, strict=True)]


def _neighbours(links: Sequence[tuple[int, int]]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    above: dict[int, list[int]] = defaultdict(list)
    below: dict[int, list[int]] = defaultdict(list)
    for a, b in links:
        above[b].append(a)
        below[a].append(b)
    return above, below


def _ports(chains: Sequence[Sequence[int]], x: Sequence[float], widths: Sequence[float], at: int) -> list[float]:
    """Where each chain leaves (``at=0``) or enters (``at=-1``) its box: side by side, in the order they come from."""
    groups: dict[int, list[int]] = defaultdict(list)
    for number, chain in enumerate(chains):
        groups[chain[at]].append(number)
    found = [0.0] * len(chains)
    for box, numbers in groups.items():
        numbers.sort(key=lambda n: x[chains[n][1 if at == 0 else -2]])
        step = min(14.0, 0.7 * widths[box] / len(numbers))
        for place, number in enumerate(numbers):
            found[number] = x[box] + (place - (len(numbers) - 1) / 2) * step
    return found
