"""The report of a search: one HTML page that opens from disk, with every figure and number that a reader needs.

Each result stands beside an equal-budget random search, each proxy beside parameters and FLOPs. A section without data
says why. Nothing is loaded from a network, and a content security policy names the page's own scripts by their hash:
text that came from a trial cannot run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from nasgraph import figures
from nasgraph.compare import Comparison, Correlation, Estimate, correlations, joined
from nasgraph.pareto import Direction
from nasgraph.readable import column, duration, number

if TYPE_CHECKING:
    from nasgraph.screen import ScreenRow
    from nasgraph.study import TrialRecord

FEW = 10  # networks below which a correlation says next to nothing
DETAIL = 160  # characters of a failure's detail that are shown at once
TEST = "test_accuracy"


@dataclass(frozen=True)
class FrontRow:
    """A Pareto-optimal network as the report shows it.

    Args:
        key: its canonical key.
        arch: choice -> label.
        values: what the search measured, by objective.
        final: what was measured after retraining, by metric; empty if it was not retrained.
        drawing: SVG, or an empty string.
        exports: one dict per exported file: ``format``, ``path`` (absolute, or relative to the report),
            ``max_abs_diff`` (between its outputs and the model's, or None), ``status`` (``ok``, or what is wrong),
            ``detail``.
    """

    key: str
    arch: Mapping[str, Any]
    values: Mapping[str, float]
    final: Mapping[str, float] = field(default_factory=dict)
    drawing: str = ""
    exports: Sequence[Mapping[str, Any]] = ()


def write_report(
    path: Path,
    *,
    title: str,
    trials: Sequence[TrialRecord],
    baseline: Sequence[TrialRecord],
    objectives: Sequence[tuple[str, Direction]],
    screen: Sequence[ScreenRow],
    front: Sequence[FrontRow],
    references: Mapping[str, Mapping[str, float]],
    manifest: Mapping[str, Any],
    losses: Sequence[tuple[int, float, float]] = (),
) -> Path:
    """Write one self-contained HTML page to ``path`` and return it.

    Args:
        trials, baseline: the search and the random search, in the order they ran; both are compared over as many
            trials as the shorter one has.
        objectives: (name, direction); best-so-far curves and the proxies' correlations use the first.
        screen: rows of the training-free screen; empty if there was none.
        references: values of named baselines by metric, e.g. ``{"logistic regression": {"test_accuracy": 0.9}}``.
        manifest: of the run; its ``supernet`` says that candidates were scored by one.
        losses: of the supernet's training: step, loss of its first network, mean loss of its networks.

    Raises: ValueError: no objectives, or a scored trial with a value that is not finite.
    """
    if not objectives:
        raise ValueError("a report needs at least one objective")
    run = Comparison(trials, baseline, objectives)
    drawn: dict[str, figures.Figure] = {}
    sections = [
        ("front", "Pareto front", _front_section(run, front, references, drawn, "supernet" in manifest)),
        ("progress", "Against random search", _progress_section(run, drawn)),
        ("choices", "Choices and objectives", _choices_section(run, drawn)),
        ("models", "Networks of the front", _models_section(run, front, path.parent)),
        ("proxies", "Training-free proxies", _proxies_section(run, screen, drawn)),
        ("failures", "Failures", _failures_section(trials, baseline, screen)),
        ("manifest", "Manifest", _manifest_section(manifest)),
    ]
    if "supernet" in manifest:
        sections.insert(1, ("supernet", "Supernet", _supernet_section(manifest["supernet"], losses, drawn)))
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in sections)
    summary = f"{_summary(run, front, references)}<nav aria-label='Sections'>{links}</nav>"
    plotly, code = _plotly(), _resource("report.js")
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'; img-src data: blob:; "
    page = Template(_resource("report.html")).substitute(
        title=_e(title),
        policy=policy + f"script-src {_hash(plotly)} {_hash(code)}",
        summary=summary,
        sections="\n".join(
            f'<section aria-labelledby="{name}"><h2 id="{name}">{heading}</h2>\n{body}</section>'
            for name, heading, body in sections
        ),
        figures=_json(drawn),
        plotly=plotly,
        code=code,
    )
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8", errors="replace", newline="\n")
    os.replace(temporary, path)
    return path


# ---- sections -----------------------------------------------------------------------------------------------------


def _summary(run: Comparison, front: Sequence[FrontRow], references: Mapping[str, Mapping[str, float]]) -> str:
    if not run.trials:
        return '<p class="lead">No trial has finished yet.</p>'
    name, optimal = run.names[0], sum(run.search_front)
    scored = sum(record.state == "scored" for record in run.trials)
    networks = _count(len({record.key for record in run.trials}), "distinct network")
    text = f"{_count(len(run.trials), 'trial')} of {networks} found {_count(optimal, 'Pareto-optimal network')}"
    text += f" for {_and(run.names)}."
    tiles = [
        ("trials", str(len(run.trials)), f"{scored} scored, {len(run.trials) - scored} failed"),
        ("Pareto-optimal", str(optimal), f"of {_count(len(run.search_rows), 'scored network')}"),
    ]
    best, random_best = run.best(run.trials), run.best(run.random)
    if best is not None:
        beside = "no random search" if random_best is None else f"random search {number(name, random_best)}"
        tiles.append((f"best {name}", number(name, best), beside))
    tested = [row for row in front if TEST in row.final]
    if tested:
        # that of the network which the search puts first: the best of several tests would flatter
        chosen = min(tested, key=lambda row: run.order(row.values))
        known = [f"{label} {number(TEST, values[TEST])}" for label, values in references.items() if TEST in values]
        tiles.append((f"its {TEST}", number(TEST, chosen.final[TEST]), "; ".join(known) or "no reference"))
    if not run.random:
        text += " No random search was run, so nothing here says whether the search is better than chance."
    elif len(run.names) > 1 and run.reference is not None:
        ours, theirs = run.search_volume[run.budget - 1], run.random_volume[run.budget - 1]
        tiles.append(("dominated volume", _share(ours), f"random search {_share(theirs)}"))
        verdict = "more than" if ours > theirs else "less than" if ours < theirs else "as much as"
        text += f" In {_count(run.budget, 'trial')} it dominated {_share(ours)} of the volume, {verdict} the "
        text += f"{_share(theirs)} of random search with as many trials."
    tiles.append(("time in trials", duration(sum(record.seconds for record in run.trials)), "summed over workers"))
    shown = "".join(f"<div><dt>{_e(a)}</dt><dd>{_e(b)}<small>{_e(c)}</small></dd></div>" for a, b, c in tiles)
    return f'<p class="lead">{_e(text)}</p><dl class="tiles">{shown}</dl>'


def _front_section(
    run: Comparison,
    front: Sequence[FrontRow],
    references: Mapping[str, Mapping[str, float]],
    drawn: dict[str, figures.Figure],
    shared: bool,
) -> str:
    if not run.search_rows:
        return _empty("No trial was scored, so there is no front.")
    plot = _front_plot(run, front, references, drawn) if len(run.names) > 1 else ""
    note = f"Values of {_and(run.names)} are those of the search. They chose these networks, so they are optimistic."
    retrained = any(row.final for row in front)
    if shared:
        note += " An accuracy of the search is the supernet's estimate: no network was trained for it."
        note += " The columns marked final were measured after fine-tuning its extraction." if retrained else ""
    else:
        note += " The columns marked final were measured after training anew." if retrained else ""
    note += "" if retrained else " No network was retrained."
    return f'{plot}<p class="soft">{_e(note)}</p>' + _scroll(_front_table(run, front, references))


def _supernet_section(
    about: Mapping[str, Any], losses: Sequence[tuple[int, float, float]], drawn: dict[str, figures.Figure]
) -> str:
    text = (
        f"<p>One store of {about['numbers']:,} numbers, trained for {_count(about['steps'], 'step')} by the policy "
        f"{_e(str(about['policy']))}. It scored every network of both searches; the scores rank networks, they are not "
        "what these reach when they are trained.</p>"
    )
    if not losses:
        return text + _empty("The curve of its loss was not kept.")
    drawn["plot-supernet"] = figures.loss_figure(losses)
    caption = "Training loss of each step in nats: of the step's first network, and the mean over its networks."
    return text + _figure("plot-supernet", "Training loss of the supernet over steps", caption)


def _front_plot(
    run: Comparison,
    front: Sequence[FrontRow],
    references: Mapping[str, Mapping[str, float]],
    drawn: dict[str, figures.Figure],
) -> str:
    cards = {row.key: f"#model-{_slug(row.key)}" for row in front}
    figure = figures.front_figure(
        run.objectives,
        [record.values for record in run.search_rows],
        [record.values for record in run.random_rows],
        {"search": [_hover(run, r) for r in run.search_rows], "random": [_hover(run, r) for r in run.random_rows]},
        {"search": run.search_front, "random": run.random_front, "links": [cards.get(r.key) for r in run.search_rows]},
    )
    figure["references"] = [
        {"name": _e(label), "values": {name: values[name] for name in run.names if name in values}}
        for label, values in references.items()
    ]
    drawn["plot-front"] = figure
    caption = "Each point is a network: point at it for its choices, click one of the search's front for its drawing."
    picks = ""
    if len(run.names) > 2:
        caption += f" The front is that of all {len(run.names)} objectives; on two of them, parts of it look dominated."
        for axis, label, picked in zip("xy", ("across", "up"), figure["pair"], strict=True):
            options = "".join(f"<option{' selected' if n == picked else ''}>{_e(n)}</option>" for n in run.names)
            picks += f'<label>{label}: <select id="plot-front-{axis}">{options}</select></label>'
        picks = f'<div class="pick">{picks}</div>'
    return picks + _figure("plot-front", f"Scatter of {_and(run.names)}, search and random search", caption)


@dataclass(frozen=True)
class _Line:
    """A line of the front's table."""

    label: str  # HTML
    key: str
    values: Mapping[str, float]
    final: Mapping[str, float] = field(default_factory=dict)
    mark: str = ""


def _front_table(run: Comparison, front: Sequence[FrontRow], references: Mapping[str, Mapping[str, float]]) -> str:
    random = [record for record, on in zip(run.random_rows, run.random_front, strict=True) if on]

    def against(values: Mapping[str, float], others: Sequence[Mapping[str, float]], name: str) -> str:
        return "" if not others else f"dominated by {name}" if run.dominated(values, others) else "not dominated"

    def link(key: str) -> str:
        return f'<a href="#model-{_slug(key)}"><code>{_e(_short(key))}</code></a>'

    ours, theirs = [row.values for row in front], [record.values for record in random]
    search_lines = [
        _Line(link(row.key), row.key, row.values, row.final, against(row.values, theirs, "random"))
        for row in sorted(front, key=lambda row: run.order(row.values))
    ]
    random_lines = [
        _Line(f"<code>{_e(_short(r.key))}</code>", r.key, r.values, mark=against(r.values, ours, "search"))
        for r in sorted(random, key=lambda record: run.order(record.values))
    ]
    finals = list(dict.fromkeys(metric for values in (r.final for r in front) for metric in values))
    finals += [m for m in dict.fromkeys(m for v in references.values() for m in v) if m not in (*finals, *run.names)]
    # a reference was not searched: a value that the front has after retraining stands there
    named = [
        _Line(_e(label), label, {m: v for m, v in values.items() if m not in finals}, values)
        for label, values in references.items()
    ]
    found = f"{_count(run.budget, 'trial')}: {_count(len(random), 'network')}" if run.random else "none"
    groups = [
        ("search", f"Search: {_count(len(front), 'network')}", search_lines, "The front was not passed to the report."),
        (
            "random",
            f"Random search, {found}",
            random_lines,
            "No trial of it was scored." if run.random else "None was run.",
        ),
        ("named", "References", named, "None was given."),
    ]
    lines = [line for _, _, members, _ in groups for line in members]
    columns = [_cells(name, [line.values for line in lines]) for name in run.names]
    columns += [_cells(name, [line.final for line in lines]) for name in finals if not _is_spread(name, finals)]
    better = {"maximize": "↑ better", "minimize": "↓ better"}
    heads = [(name, better[way]) for name, way in run.objectives]
    heads += [(name, "final") for name in finals if not _is_spread(name, finals)]
    head = "".join(f'<th scope="col" class="n">{_e(name)}<small>{note}</small></th>' for name, note in heads)
    body, number_of = "", iter(range(len(lines)))
    for look, heading, members, why in groups:
        body += (
            f'<tbody class="group {look}"><tr><th scope="rowgroup" colspan="{len(heads) + 2}">{_e(heading)}</th></tr>'
        )
        if not members:
            body += f'<tr><td colspan="{len(heads) + 2}" class="soft">{why}</td></tr>'
        for line in members:
            i = next(number_of)
            cells = "".join(cells[i] for cells in columns)
            mark = f'<td class="soft">{line.mark}</td>'
            body += f'<tr><th scope="row" title="{_e(line.key)}">{line.label}</th>{cells}{mark}</tr>'
        body += "</tbody>"
    return (
        f'<table><thead><tr><th scope="col">network</th>{head}<th scope="col">against the other run</th></tr></thead>'
        f"{body}</table>"
    )


def _cells(name: str, rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Cells of the metric ``name``; ``x_mean`` shows ``x_std`` beside it."""
    known = [i for i, row in enumerate(rows) if name in row]
    texts = dict(zip(known, column(name, [float(rows[i][name]) for i in known]), strict=True))
    cells = []
    for i, row in enumerate(rows):
        spread = name.removesuffix("_mean") + "_std"
        beside = f" ± {number(spread, row[spread])}" if name.endswith("_mean") and spread in row else ""
        cells.append(
            f'<td class="n" title="{row[name]!r}">{_e(texts[i] + beside)}</td>'
            if i in texts
            else '<td class="n soft">–</td>'
        )
    return cells


def _is_spread(name: str, names: Sequence[str]) -> bool:
    return name.endswith("_std") and name.removesuffix("_std") + "_mean" in names


def _progress_section(run: Comparison, drawn: dict[str, figures.Figure]) -> str:
    if not run.search_rows:
        return _empty("No trial was scored, so there is no progress to show.")
    if not run.random:
        text = _empty("No random search was run, so its curves are missing. Run one with as many trials to compare.")
    else:
        text = f"<p>Compared over {_count(run.budget, 'trial')} of each run; failed and repeated trials count. "
        if len(run.trials) > run.budget:
            text += (
                f"The search has {len(run.trials)} trials, random search fewer: past {run.budget} nothing is compared. "
            )
        text += "It is one run of each: a small difference can be luck.</p>"
    name = run.names[0]
    if len(run.names) > 1 and run.reference is not None:
        drawn["plot-volume"] = figures.hypervolume_figure(run.search_volume, run.random_volume)
        point = ", ".join(f"{n} {number(n, float(v))}" for n, v in zip(run.names, run.reference, strict=True))
        caption = (
            "Hypervolume after each trial, as a share of the box between the reference point and the best value of "
            f"each objective, over both runs. Reference point of both: {point} (the worst values of all networks here, "
            "and a tenth of the range beyond)."
        )
        text += _figure("plot-volume", "Hypervolume over trials", caption)
    else:
        text += f'<p class="soft">With one objective, the hypervolume says what the best {_e(name)} says.</p>'
    search, random = (
        [record.values[name] if record.state == "scored" else None for record in records]
        for records in (run.trials, run.random)
    )
    drawn["plot-best"] = figures.best_figure(run.objectives[0], search, random)
    return text + _figure(
        "plot-best", f"Best {name} over trials", f"Best {name} so far, and each trial's value (dots)."
    )


def _choices_section(run: Comparison, drawn: dict[str, figures.Figure]) -> str:
    if len(run.search_rows) < 2:
        return _empty("Fewer than two networks were scored: there is nothing to compare.")
    drawn["plot-choices"], note = figures.parallel_figure(
        run.objectives,
        [record.arch for record in run.search_rows],
        [record.values for record in run.search_rows],
        run.search_front,
        [_hover(run, record, choices=False) for record in run.search_rows],
    )
    caption = (
        "Each line is a network of the search: its choices, then its objectives (bold), better up. Within a choice, "
        f"networks with better {run.names[0]} pass higher. Click a name in the legend to hide or show its lines. {note}"
    )
    return _figure("plot-choices", "Parallel coordinates of choices and objectives", caption, scroll=True)


def _models_section(run: Comparison, front: Sequence[FrontRow], folder: Path) -> str:
    if not front:
        return _empty("No network was put on the front.")
    cards = ""
    for row in sorted(front, key=lambda row: run.order(row.values)):
        slug, short = _slug(row.key), _e(_short(row.key))
        measured = [(m, _cells(m, [row.values])[0]) for m in row.values]
        for m in row.final:
            if not _is_spread(m, list(row.final)):
                measured.append((f"{m}, final" if m in row.values else m, _cells(m, [row.final])[0]))
        values = "".join(f'<tr><th scope="row">{_e(label)}</th>{cell}</tr>' for label, cell in measured)
        source = base64.b64encode(row.drawing.encode()).decode()
        # as an image: a script in an SVG image does not run
        drawing = (
            f'<div class="drawing"><img src="data:image/svg+xml;base64,{source}" alt="Graph of network {short}"></div>'
            if row.drawing
            else '<p class="soft">No drawing was passed to the report.</p>'
        )
        chosen = "".join(
            f'<tr><th scope="row">{_e(str(c))}</th><td>{_e(str(v))}</td></tr>' for c, v in row.arch.items()
        )
        cards += (
            f'<article class="model" id="model-{slug}"><h3><code title="{_e(row.key)}">{short}</code></h3>'
            f"<table>{values}</table>{drawing}"
            f"<details><summary>{_count(len(row.arch), 'choice')}</summary><table>{chosen}</table></details>"
            f"{_exports(row, folder)}</article>"
        )
    return f'<div class="models">{cards}</div>'


def _exports(row: FrontRow, folder: Path) -> str:
    if not row.exports:
        return '<p class="soft">Not exported.</p>'
    lines = ""
    for export in row.exports:
        path, difference = str(export.get("path") or ""), export.get("max_abs_diff")
        if path and Path(path).is_absolute():
            path = os.path.relpath(path, folder)
        name = f'<a href="{_e(quote(Path(path).as_posix()))}">{_e(Path(path).name)}</a>' if path else "–"
        shown = "–" if difference is None else f"{float(difference):.1e}" if difference else "0"
        status, detail = str(export.get("status", "")), str(export.get("detail") or "")
        check = _e(status) if status == "ok" else f'<span class="bad">{_e(status)}</span> {_e(detail[:DETAIL])}'
        lines += (
            f'<tr><th scope="row">{_e(str(export.get("format", "")))}</th><td>{name}</td>'
            f'<td class="n">{shown}</td><td class="detail">{check}</td></tr>'
        )
    head = "".join(f'<th scope="col">{text}</th>' for text in ("export", "file", "max. difference", "check"))
    return _scroll(f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>")


def _proxies_section(run: Comparison, screen: Sequence[ScreenRow], drawn: dict[str, figures.Figure]) -> str:
    if not screen:
        return _empty("No screen was run: there are no training-free scores.")
    pairs = joined(screen, [*run.search_rows, *run.random_rows])
    name, n = run.names[0], len(pairs)
    scored = sum(row.reason is None for row in screen)
    text = (
        f"<p>{_count(len(screen), 'candidate')} screened, {scored:,} with all scores; {_count(n, 'distinct network')} "
    )
    text += f"of these had {_e(name)} measured later (n = {n}).</p>"
    if n < 4:
        return text + _empty("With fewer than 4 networks, no correlation is defined.")
    if n < FEW:
        text += _empty(f"n = {n} is too few to tell these scores apart.")
    rows = correlations(pairs, run.objectives[0])
    drawn["plot-proxies"] = figures.proxies_figure(rows)
    caption = (
        f"Rank correlation of each score with {name}; positive: a larger score goes with a better {name}. Given "
        "params: the partial correlation with the number of parameters held fixed, which is what the score adds to "
        "counting them. Bars: 95 % bootstrap intervals, each for one score alone. The networks were picked, by a score "
        "or by a sampler; among picked networks a score differs less, and its correlation tends to be smaller than "
        "over the whole space."
    )
    return (
        text
        + _figure("plot-proxies", f"Correlation of each score with {name}", caption)
        + _scroll(_proxies_table(rows))
    )


def _proxies_table(rows: Sequence[Correlation]) -> str:
    def cells(found: Estimate | None) -> str:
        if found is None:
            return '<td class="n">–</td><td class="n soft"></td>'
        low, high = found.interval or (None, None)
        interval = "" if low is None or high is None else f"{_signed(low)} to {_signed(high)}"
        return f'<td class="n">{_signed(found.value)}</td><td class="n soft">{interval}</td>'

    lines = ""
    for row in rows:
        if not row.n:
            verdict = "not measured"
        elif row.partial is None or row.partial.interval is None:
            verdict = "–"
        else:
            low, high = row.partial.interval
            verdict = "yes" if low > 0 or high < 0 else "not shown"
        look = ' class="size"' if row.is_size else ""
        lines += f'<tr{look}><th scope="row">{_e(row.name)}</th>{cells(row.rho)}{cells(row.partial)}'
        lines += f'<td class="n">{row.n}</td><td>{verdict}</td></tr>'
    numbers = ("Spearman", "95 %", "given params", "95 %", "n")
    head = "".join(f'<th scope="col" class="n">{text}</th>' for text in numbers)
    return (
        "<table><caption>Sizes of the network, shaded, are what a proxy is held against.</caption>"
        f'<thead><tr><th scope="col">score</th>{head}<th scope="col">adds to params</th></tr></thead>'
        f"<tbody>{lines}</tbody></table>"
    )


def _failures_section(
    trials: Sequence[TrialRecord], baseline: Sequence[TrialRecord], screen: Sequence[ScreenRow]
) -> str:
    runs: dict[str, Sequence[TrialRecord | ScreenRow]] = {"search": trials, "random search": baseline, "screen": screen}
    failed = {name: [row for row in rows if row.reason is not None] for name, rows in runs.items()}
    counts = {name: Counter(str(row.reason) for row in rows) for name, rows in failed.items()}
    total = sum(counts.values(), Counter[str]())
    if not total:
        return _empty("Nothing failed.")
    example = {str(row.reason): row for rows in reversed(failed.values()) for row in reversed(rows)}
    shown = [name for name, rows in runs.items() if rows]
    head = "".join(f'<th scope="col" class="n">{name}<small>of {len(runs[name]):,}</small></th>' for name in shown)
    lines = ""
    for reason, _ in total.most_common():
        row = example[reason]
        detail = (row.detail or "").strip() or "no detail"
        first = detail.splitlines()[0]
        text = _e(first[:DETAIL] + ("…" if len(first) > DETAIL else ""))
        if detail != first or len(first) > DETAIL:
            text += f"<details><summary>all of it</summary><pre>{_e(detail)}</pre></details>"
        text += f'<div class="soft">network <code title="{_e(row.key)}">{_e(_short(row.key))}</code></div>'
        numbers = "".join(f'<td class="n">{counts[name][reason]:,}</td>' for name in shown)
        lines += f'<tr><th scope="row">{_e(reason)}</th>{numbers}<td class="detail">{text}</td></tr>'
    return _scroll(
        f'<table><thead><tr><th scope="col">reason</th>{head}<th scope="col">the first of them</th></tr></thead>'
        f"<tbody>{lines}</tbody></table>"
    )


def _manifest_section(manifest: Mapping[str, Any]) -> str:
    if not manifest:
        return _empty("No manifest was passed to the report.")
    lines = ""
    for name, value in manifest.items():
        if isinstance(value, Mapping | list | tuple) and value:
            whole = json.dumps(value, indent=2, default=str, ensure_ascii=False)
            text = (
                f"<details><summary>{_count(len(value), 'entry', 'entries')}</summary><pre>{_e(whole)}</pre></details>"
            )
        else:
            text = f"<code>{_e(value if isinstance(value, str) else json.dumps(value, default=str))}</code>"
        lines += f'<tr><th scope="row">{_e(str(name))}</th><td class="detail">{text}</td></tr>'
    return "<p class='soft'>What was run: enough to repeat it.</p>" + _scroll(f"<table><tbody>{lines}</tbody></table>")


# ---- pieces -------------------------------------------------------------------------------------------------------


def _e(text: str) -> str:
    return html.escape(text, quote=True)


def _empty(text: str) -> str:
    return f'<p class="empty">{_e(text)}</p>'


def _scroll(table: str) -> str:
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _figure(name: str, label: str, caption: str, scroll: bool = False) -> str:
    plot = f'<div class="plot" id="{name}" role="img" aria-label="{_e(label)}"></div>'
    plot = f'<div class="scroll" tabindex="0">{plot}</div>' if scroll else plot
    plot += "<noscript>The figure needs JavaScript; the tables do not.</noscript>"
    return f"<figure>{plot}{f'<figcaption>{_e(caption)}</figcaption>' if caption else ''}</figure>"


def _count(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _short(key: str) -> str:
    return key if len(key) <= 14 else key[:10]


def _slug(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _share(value: float) -> str:
    return f"{100 * value:.1f}\u202f%"


def _hover(run: Comparison, record: TrialRecord, choices: bool = True) -> str:
    lines = [f"<b>{_e(_short(record.key))}</b>, trial {record.number}"]
    lines += [f"{_e(name)}: {number(name, record.values[name])}" for name in run.names]
    if choices:
        taken = [f"{_e(str(choice))}={_e(str(label))}" for choice, label in record.arch.items()]
        lines += [", ".join(taken[i : i + 3]) for i in range(0, min(len(taken), 24), 3)]
        lines += ["…"] if len(taken) > 24 else []
    return "<br>".join(lines)


def _json(data: Any) -> str:
    """JSON that is safe inside a script element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _resource(name: str) -> str:
    return resources.files("nasgraph").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
