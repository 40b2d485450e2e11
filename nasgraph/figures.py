"""The report's figures, as what plotly.js draws: plain dicts of data and layout."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasgraph.compare import Correlation
from nasgraph.pareto import Direction
from nasgraph.readable import kind, number

Figure = dict[str, Any]
Objectives = Sequence[tuple[str, Direction]]
Rows = Sequence[Mapping[str, float]]

# A blue and an orange that differ for colour-blind readers too, and in lightness; each has a pale form.
SEARCH, SEARCH_PALE = "#1f5fae", "#a9c5e6"
RANDOM, RANDOM_PALE = "#b8530b", "#eac39f"
INK, SOFT, RULE = "#1b2430", "#5a6674", "#e3e7ec"
QUARTERS = ("#d5dbe3", "#b3c4da", "#7fa3d1", SEARCH)

MOST_LINES, MOST_AXES = 400, 20  # of the parallel coordinates: more cannot be told apart
LOG_FROM = 10  # ratio of largest to smallest from which an axis is logarithmic


def front_figure(
    objectives: Objectives, search: Rows, random: Rows, hovers: Mapping[str, list[str]], marks: Mapping[str, Any]
) -> Figure:
    """Two objectives against each other, chosen by the page where there are more.

    ``hovers``: texts for the rows of "search" and "random". ``marks``: "search" and "random" masks of the fronts,
    "links" the page anchor of each search row (or None). Each trace has ``columns``: its values by objective.
    """
    traces: list[dict[str, Any]] = []

    def add(which: str, rows: Rows, on_front: bool, label: str, colour: str, symbol: str, size: int) -> None:
        keep = [i for i, front in enumerate(marks[which]) if bool(front) == on_front]
        if not keep:
            return
        traces.append(
            {
                "name": label,
                "mode": "markers",
                "marker": {"color": colour, "symbol": symbol, "size": size, "line": {"width": 1, "color": "#fff"}},
                "text": [hovers[which][i] for i in keep],
                "hovertemplate": "%{text}<extra></extra>",
                "customdata": [marks["links"][i] for i in keep] if which == "search" else None,
                "columns": {name: [rows[i][name] for i in keep] for name, _ in objectives},
            }
        )

    add("random", random, False, "random, dominated", RANDOM_PALE, "diamond", 7)
    add("search", search, False, "search, dominated", SEARCH_PALE, "circle", 7)
    if len(objectives) == 2:
        for which, rows, colour in (("random", random, RANDOM), ("search", search, SEARCH)):
            front = sorted(
                (row for row, on in zip(rows, marks[which], strict=True) if on),
                key=lambda row: [row[name] for name, _ in reversed(objectives)],
            )
            if front:
                traces.append(
                    {
                        "mode": "lines",
                        # what is attained at a place is set by the point on its better side
                        "line": {
                            "color": colour,
                            "width": 1.6,
                            "shape": "hv" if objectives[1][1] == "minimize" else "vh",
                        },
                        "hoverinfo": "skip",
                        "showlegend": False,
                        "columns": {name: [row[name] for row in front] for name, _ in objectives},
                    }
                )
    add("random", random, True, "random, front", RANDOM, "diamond", 10)
    add("search", search, True, "search, front", SEARCH, "circle", 11)
    axes = {name: _axis(name, direction, [row[name] for row in (*search, *random)]) for name, direction in objectives}
    return {
        "data": traces,
        "layout": _layout(hovermode="closest"),
        "axes": axes,
        "pair": [objectives[1][0], objectives[0][0]],
    }


def hypervolume_figure(search: Sequence[float], random: Sequence[float]) -> Figure:
    """Share of the volume that could be dominated, after each trial."""
    data = [_steps(random, "random search", RANDOM, "dash")] if len(random) else []
    data.append(_steps(search, "search", SEARCH))
    for trace in data:
        trace["hovertemplate"] = "after %{x} trials: %{y:.1%}"
    axis = {"title": _title("dominated share of the volume"), "tickformat": ".0%", **_grid()}
    return {"data": data, "layout": _layout(xaxis=_trials_axis(), yaxis=axis, hovermode="x unified")}


def best_figure(
    objective: tuple[str, Direction], search: Sequence[float | None], random: Sequence[float | None]
) -> Figure:
    """Each trial's value of the first objective, and the best so far; None: the trial failed."""
    name, direction = objective
    better: Callable[[float, float], float] = max if direction == "maximize" else min
    data: list[dict[str, Any]] = []
    for values, label, colour, pale, dash in (
        (random, "random search", RANDOM, RANDOM_PALE, "dash"),
        (search, "search", SEARCH, SEARCH_PALE, "solid"),
    ):
        if not values:
            continue
        best: list[float | None] = []
        for value in values:
            last = best[-1] if best else None
            best.append(last if value is None else value if last is None else better(last, value))
        dots = {"mode": "markers", "marker": {"color": pale, "size": 5}, "hoverinfo": "skip", "showlegend": False}
        data.insert(0, {"x": list(range(1, len(values) + 1)), "y": list(values), **dots})
        line = _steps(best, f"{label}: best so far", colour, dash)
        data.append({**line, "text": ["" if b is None else number(name, b) for b in best]})
        data[-1]["hovertemplate"] = "after %{x} trials: %{text}"
    known = [value for value in (*search, *random) if value is not None]
    axis = _axis(name, direction, known)
    return {"data": data, "layout": _layout(xaxis=_trials_axis(), yaxis=axis, hovermode="x unified")}


def loss_figure(losses: Sequence[tuple[int, float, float]]) -> Figure:
    """Loss of the first network of each step, and the mean over its networks; at most 2,000 points of each."""
    every = max(1, len(losses) // 2000)
    shown = [row for i, row in enumerate(losses) if i % every == 0 or i == len(losses) - 1]
    steps = [row[0] for row in shown]
    data = [
        {
            "x": steps,
            "y": [row[place] for row in shown],
            "mode": "lines",
            "name": name,
            "line": {"color": c, "width": 1.5},
        }
        for place, name, c in ((1, "first network", SEARCH), (2, "mean of the step", RANDOM))
    ]
    axes = {"xaxis": {"title": _title("step"), **_grid()}, "yaxis": {"title": _title("loss, nats"), **_grid()}}
    return {"data": data, "layout": _layout(**axes, hovermode="x unified")}


def parallel_figure(
    objectives: Objectives, archs: Sequence[Mapping[str, Any]], rows: Rows, on_front: Sequence[bool], hovers: list[str]
) -> tuple[Figure, str]:
    """One line per network through its choices and objectives; better is up. With a note on what is left out.

    Drawn with plain lines: plotly's own parallel coordinates need WebGL, which not every browser has.
    """
    labels: dict[str, list[Any]] = {}
    for arch in archs:
        for choice in arch:
            labels.setdefault(choice, [])
    labels = dict(sorted(labels.items(), key=lambda item: _natural(item[0])))
    for choice, seen in labels.items():
        found = dict.fromkeys(arch.get(choice, _ABSENT) for arch in archs)
        seen += sorted(found, key=_label_order)
    constant = [choice for choice, seen in labels.items() if len(seen) < 2]
    varied = [choice for choice, seen in labels.items() if len(seen) > 1]
    shown = varied[:MOST_AXES]
    notes = []
    if constant:
        notes.append(f"Not drawn, the same in all networks: {', '.join(constant)}.")
    if len(varied) > len(shown):
        notes.append(f"Only the first {len(shown)} of {len(varied)} choices are drawn.")

    first, direction = objectives[0]
    score = np.array([row[first] for row in rows]) * (1 if direction == "maximize" else -1)
    place = np.empty(len(rows))
    place[np.argsort(score, kind="stable")] = (np.arange(len(rows)) + 0.5) / len(rows)  # 0 worst, 1 best
    drawn = set(range(len(rows)))
    if len(rows) > MOST_LINES:
        others = [i for i in range(len(rows)) if not on_front[i]]
        keep = np.linspace(0, len(others) - 1, MOST_LINES).astype(int)
        drawn = {others[i] for i in keep} | {i for i in range(len(rows)) if on_front[i]}
        notes.append(f"{len(drawn)} of {len(rows)} networks are drawn: the front and an even selection of the others.")

    heights: list[NDArray[np.float64]] = []
    annotations: list[dict[str, Any]] = []
    for x, choice in enumerate(shown):
        seen = labels[choice]
        slot = {label: (p + 0.5) / len(seen) for p, label in enumerate(seen)}
        # within a label, better networks pass higher
        spread = (place - 0.5) * 0.6 / len(seen)
        heights.append(np.array([slot[arch.get(choice, _ABSENT)] for arch in archs]) + spread)
        annotations += [_tick(x, slot[label], "not asked" if label is _ABSENT else str(label)) for label in seen]
    for x, (name, way) in enumerate(objectives, start=len(shown)):
        values = np.array([row[name] for row in rows])
        scaled = np.log(values) if _is_log(values) else values
        low, high = scaled.min(), scaled.max()
        share = (scaled - low) / (high - low) if high > low else np.full(len(values), 0.5)
        heights.append(share if way == "maximize" else 1 - share)
        ends = (values.max(), values.min()) if way == "maximize" else (values.min(), values.max())
        annotations += [_tick(x, 1.0, number(name, ends[0])), _tick(x, 0.0, number(name, ends[1]))]

    groups = [
        (label, colour, [i for i in sorted(drawn) if not on_front[i] and q / 4 <= place[i] < (q + 1) / 4])
        for q, (label, colour) in enumerate(
            zip(("worst quarter", "third quarter", "second quarter", "best quarter"), QUARTERS, strict=True)
        )
    ]
    groups.append(("front", INK, [i for i in sorted(drawn) if on_front[i]]))
    data = []
    for label, colour, members in groups:
        if members:
            axes = len(heights)
            data.append(
                {
                    "mode": "lines",
                    "name": f"{first}: {label}" if label != "front" else "front",
                    "x": [x for _ in members for x in [*range(axes), None]],
                    "y": [y for i in members for y in [*(round(float(h[i]), 4) for h in heights), None]],
                    "text": [text for i in members for text in [*[hovers[i]] * axes, ""]],
                    "hovertemplate": "%{text}<extra></extra>",
                    "line": {"color": colour, "width": 2 if label == "front" else 1.1},
                    "opacity": 0.9 if label == "front" else 0.75,
                }
            )
    names = [*shown, *(f"<b>{_text(name)}</b>" for name, _ in objectives)]
    layout = _layout(
        xaxis={
            "tickvals": list(range(len(names))),
            "ticktext": [name if name.startswith("<b>") else _text(name) for name in names],
            "range": [-0.4, len(names) - 0.6],
            "side": "top",
            "gridcolor": "#c3cad3",
            "zeroline": False,
            "fixedrange": True,
        },
        yaxis={"visible": False, "range": [-0.05, 1.05], "fixedrange": True},
        hovermode="closest",
        annotations=annotations,
    )
    layout["legend"] = {"orientation": "h", "y": -0.02, "yanchor": "top", "x": 0}
    layout["margin"] = {"l": 30, "r": 40, "t": 44, "b": 50}
    return {"data": data, "layout": layout, "width": 80 * len(names)}, " ".join(notes)


def proxies_figure(rows: Sequence[Correlation]) -> Figure:
    """Correlations with their intervals, one line per score."""
    data = []
    for label, estimates, colour, symbol, shift in (
        ("Spearman", [row.rho for row in rows], SEARCH, "circle", -0.14),
        ("partial, given params", [row.partial for row in rows], RANDOM, "diamond", 0.14),
    ):
        known = [(i, found) for i, found in enumerate(estimates) if found is not None]
        # a percentile interval of few rows may lie beside its estimate
        bars = [(found.value, *(found.interval or (found.value, found.value))) for _, found in known]
        data.append(
            {
                "name": label,
                "mode": "markers",
                "x": [value for value, _, _ in bars],
                "y": [i + shift for i, _ in known],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [max(high - value, 0.0) for value, _, high in bars],
                    "arrayminus": [max(value - low, 0.0) for value, low, _ in bars],
                    "thickness": 1.4,
                    "width": 3,
                    "color": colour,
                },
                "marker": {"color": colour, "symbol": symbol, "size": 9},
                "text": [_text(rows[i].name) for i, _ in known],
                "hovertemplate": "%{text}: %{x:.2f}<extra>" + label + "</extra>",
            }
        )
    layout = _layout(
        xaxis={"range": [-1.05, 1.05], "title": _title("rank correlation"), **_grid(), "zerolinecolor": SOFT},
        yaxis={
            "tickvals": list(range(len(rows))),
            "ticktext": [_text(row.name) for row in rows],
            "range": [len(rows) - 0.5, -0.5],
            "automargin": True,
            "showgrid": False,
            "zeroline": False,
        },
        hovermode="closest",
    )
    return {"data": data, "layout": layout, "height": 150 + 38 * len(rows)}


_ABSENT = object()  # the label of a choice that a network was not asked


def _label_order(label: Any) -> tuple[int, float, str]:
    if label is _ABSENT:
        return 0, 0.0, ""
    if isinstance(label, int | float) and not isinstance(label, bool):
        return 1, float(label), ""
    return 2, 0.0, str(label)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts conv2 before conv10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _text(text: str) -> str:
    """Text in a figure: plotly reads a little HTML there."""
    return html.escape(text, quote=False)


def _tick(x: int, y: float, text: str) -> dict[str, Any]:
    look = {"showarrow": False, "font": {"size": 11, "color": INK}, "bgcolor": "rgba(255,255,255,0.8)", "borderpad": 1}
    short = text if len(text) <= 14 else text[:13] + "…"
    return {"x": x, "y": y, "text": _text(short), "hovertext": _text(text), **look}


def _steps(values: Sequence[float | None], name: str, colour: str, dash: str = "solid") -> dict[str, Any]:
    return {
        "name": name,
        "mode": "lines",
        "x": list(range(1, len(values) + 1)),
        "y": list(values),
        "line": {"color": colour, "width": 2.2, "shape": "hv", "dash": dash},
    }


def _is_log(values: Sequence[float] | NDArray[np.float64]) -> bool:
    return len(values) > 0 and min(values) > 0 and max(values) / min(values) >= LOG_FROM


def _axis(name: str, direction: Direction, values: Sequence[float]) -> dict[str, Any]:
    what = kind(name, values)
    arrow = "↑ better" if direction == "maximize" else "↓ better"
    axis: dict[str, Any] = {"title": _title(f"{_text(name)}  ({arrow})"), **_grid()}
    if _is_log(values):
        axis |= {"type": "log", "dtick": "D2" if max(values) / min(values) < 1000 else 1}
    if what == "share":
        axis["tickformat"] = ".1~%"
    elif what in ("count", "bytes"):
        axis["tickformat"] = "~s"
    return axis


def _title(text: str) -> dict[str, Any]:
    return {"text": text, "font": {"size": 13}, "standoff": 10}


def _trials_axis() -> dict[str, Any]:
    return {"title": _title("trials"), "rangemode": "tozero", **_grid()}


def _grid() -> dict[str, Any]:
    return {"gridcolor": RULE, "zeroline": False, "linecolor": "#b4bdc8", "ticks": "outside", "tickcolor": "#b4bdc8"}


def _layout(**more: Any) -> dict[str, Any]:
    return {
        "font": {
            "family": "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif",
            "size": 13,
            "color": INK,
        },
        "paper_bgcolor": "#fff",
        "plot_bgcolor": "#fff",
        "margin": {"l": 66, "r": 20, "t": 40, "b": 54},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {
            "align": "left",
            "bgcolor": "#fff",
            "bordercolor": "#b4bdc8",
            "font": {"color": INK, "size": 12},
        },
        "dragmode": False,
        **more,
    }
