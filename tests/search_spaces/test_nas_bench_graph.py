"""NAS-Bench-Graph: the benchmark's own numbers are the oracle for the space and for the rows of its table."""

from __future__ import annotations

import itertools
import json
import pickle
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import nasgraph.canonical
from nasgraph.build import build
from nasgraph.canonical import simplify
from nasgraph.errors import ConfigError, DamagedFile, DataError, SpaceError
from nasgraph.executors import InProcess
from nasgraph.objectives import Failed, Scored
from nasgraph.predictors.nas_bench_graph import Table, TableEvaluator
from nasgraph.search_spaces.nas_bench_graph import (
    LINKS,
    OPS,
    PRESETS,
    architecture,
    cell,
    cell_hash,
    nas_bench_graph,
    preset,
    representative,
    row,
)
from nasgraph.space import Architecture, SearchSpace
from nasgraph.study import Study
from nasgraph.supernet import Supernet
from nasgraph.testing import SpaceExam, node_batch

ALL_DESIGNS = [(link, ops) for link in LINKS for ops in itertools.product(OPS, repeat=4) if set(ops) != {"skip"}]


class TestNasBenchGraph(SpaceExam):
    space = staticmethod(lambda: nas_bench_graph("cora", features=5, classes=3, width=8))
    classes = 3


@pytest.fixture(scope="module")
def published(data_root: Path) -> dict[str, dict[str, object]]:
    text = (data_root / "nas_bench_graph" / "reference.json").read_text()
    return json.loads(text)


# ---- the space --------------------------------------------------------------------------------------------------


def test_every_design_once() -> None:
    space = nas_bench_graph("computers")
    assert space.size() == 9 * 9**4 == 59_049
    assert sorted(cell(found) for found in space.enumerate()) == sorted(ALL_DESIGNS)


def test_presets_are_the_published_ones(published: dict[str, dict[str, dict[str, object]]]) -> None:
    for dataset, ours in PRESETS.items():
        theirs = published[dataset]["hyper_parameters_as_published"]
        assert (ours.features, ours.classes, ours.width) == (theirs["features"], theirs["classes"], theirs["dim"])
        assert (ours.dropout, ours.lr, ours.weight_decay) == (theirs["dropout"], theirs["lr"], theirs["weight_decay"])
        assert (ours.optimizer, ours.epochs) == (str(theirs["optimizer"]).lower(), theirs["epochs"])
        layers = published[dataset].get("correction_from_parameter_counts", theirs)
        assert (int(ours.pre), int(ours.post)) == (layers["pre_layers"], layers["post_layers"])


def test_the_encoding_is_the_published_one(published: dict[str, dict[str, object]]) -> None:
    assert [list(link) for link in LINKS] == published["_encoding"]["links"]
    assert list(OPS) == published["_encoding"]["op_names"]


def by_hand(model: nn.Module, found: Architecture, pre: bool, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """The cell as a loop: what the paper's figure says, for a built model's own layers in evaluation mode."""
    link, ops = cell(found)
    values, raw = [model.pre(x) if pre else x], [True]
    for i, (read, op) in enumerate(zip(link, ops, strict=True), 1):
        h = values[read]
        if pre or not raw[read]:
            h = getattr(model, f"norm{i}")(h).relu() if hasattr(model, f"norm{i}") else None
        layer = getattr(model, f"node{i}", getattr(model, f"raw{i}", None))
        if h is None or (op != "skip" and layer is None):  # not built: the output does not depend on it
            values.append(values[read])
        else:
            values.append(h if op == "skip" else layer(h) if op == "fc" else layer(h, edges))
        raw.append(op == "skip" and raw[read])
    leaves = [values[i] for i in range(1, 5) if i not in link and not raw[i]]
    h = torch.cat(leaves, 1).relu()
    after = [module for name, module in model.named_children() if name.startswith("post")]
    return model.head(after[0](h) if after else h)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dataset", ["cora", "pubmed", "computers", "physics"])
def test_networks_compute_what_the_cell_says(dataset: str, apart: bool) -> None:
    space, rng = nas_bench_graph(dataset, features=5, classes=3, width=8, apart=apart), random.Random(0)
    x, edges = node_batch().inputs
    for found in itertools.chain((space.sample(rng) for _ in range(60)), map(space.architecture, SKIPS)):
        model = build(space, found).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):  # so that it is not the identity
                module.running_mean.uniform_(-1, 1)
        torch.testing.assert_close(model(x, edges), by_hand(model, found, PRESETS[dataset].pre, x, edges))


def test_declared_apart_the_networks_are_the_same_and_the_weights_are_not_shared() -> None:
    together, apart = (nas_bench_graph("cora", features=20, classes=3, width=8, apart=given) for given in (False, True))
    rng = random.Random(0)
    for _ in range(40):
        found = together.sample(rng)
        assert apart.architecture(found) == found and apart.key(found) == together.key(found)
    stores = [Supernet(space).store for space in (together, apart)]
    assert stores[0]["node2", "gcn", "lin.weight"].shape == stores[1]["raw2", "gcn", "lin.weight"].shape == (8, 20)
    assert {node for node, _, _ in stores[1]} >= {"node2", "raw2"} and not any("raw" in key[0] for key in stores[0])
    assert {node for node, _, _ in stores[1] if node.startswith("post")} >= {"post_leaves4", "post_leaves1234"}


SKIPS = [
    architecture((0, 0, 1, 1), ("skip", "gcn", "fc", "skip")),  # leaf 4 only passes the input on
    architecture((0, 1, 2, 2), ("skip", "skip", "gat", "skip")),
    architecture((0, 1, 2, 3), ("gcn", "skip", "skip", "gin")),
    architecture((0, 0, 0, 0), ("skip", "skip", "skip", "arma")),
    architecture((0, 1, 1, 1), ("sage", "skip", "skip", "cheb")),
]


def test_dropout_stands_where_the_benchmark_has_it() -> None:
    space = nas_bench_graph("cora", features=5, classes=3, width=8)
    model = build(space, architecture((0, 1, 2, 3), ("skip", "gcn", "fc", "gin")))
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert rates == {"drop": 0.7, "drop3": 0.7, "drop4": 0.7}  # nodes 1 and 2 read the raw input


def test_skips_only_are_no_member() -> None:
    space = nas_bench_graph()
    nothing = architecture(LINKS[0], ["skip"] * 4)
    assert space.violated(nothing) == ["not skips only"]
    with pytest.raises(DataError, match="skips only"):
        row(nothing)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"dataset": "coro"}, "Did you mean 'cora'"), ({"width": 10}, "width 10")]
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        nas_bench_graph(**arguments)


# ---- designs and rows -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> dict[tuple[tuple[int, ...], tuple[str, ...]], int]:
    return {design: cell_hash(*representative(*design)) for design in ALL_DESIGNS}


def test_designs_reach_exactly_the_rows(rows: dict[object, int], data_root: Path) -> None:
    table = Table("cora", data_root)
    assert len(rows) == 59_040
    assert set(rows.values()) == set(table.hash.tolist())
    assert len(table) == 26_206
    assert [row(found) for found in table.architectures()] == table.hash.tolist()


def test_equal_designs_share_a_row() -> None:
    """The benchmark's README: [0, 1, 2, 1] and [0, 1, 1, 2] with nodes renamed are one design. Of LINKS, by hand."""
    for one, other in [
        (((0, 0, 0, 1), ("gat", "fc", "gcn", "gin")), ((0, 0, 0, 1), ("gat", "gcn", "fc", "gin"))),
        (((0, 0, 1, 2), ("gat", "fc", "gcn", "gin")), ((0, 0, 1, 2), ("fc", "gat", "gin", "gcn"))),
        (((0, 1, 2, 2), ("gat", "fc", "gin", "gcn")), ((0, 1, 2, 2), ("gat", "fc", "gcn", "gin"))),
        # a skip between two nodes, and one at the start of the only chain
        (((0, 1, 2, 3), ("gat", "skip", "gcn", "gin")), ((0, 1, 2, 3), ("skip", "gat", "gcn", "gin"))),
        # a skip that only passes the input on is no leaf
        (((0, 0, 0, 0), ("gat", "skip", "gcn", "gin")), ((0, 1, 1, 1), ("skip", "gat", "gcn", "gin"))),
    ]:
        assert cell_hash(*representative(*one)) == cell_hash(*representative(*other))
    # a skip beside another reader stays: its leaf is concatenated
    assert representative((0, 1, 1, 1), ("gat", "gcn", "gin", "skip"))[0] == (0, 1, 1, 1)


@pytest.mark.parametrize("dataset", list(PRESETS))
def test_no_key_stands_for_two_rows(dataset: str) -> None:
    """Designs that the benchmark measured apart are different networks (a sample; docs/spaces.md has all)."""
    space, seen = nas_bench_graph(dataset, features=5, classes=3, width=8), {}
    for link, ops in random.Random(0).sample(ALL_DESIGNS, 2000):
        found = architecture(link, ops)
        assert seen.setdefault(space.key(found), row(found)) == row(found)


def test_designs_of_a_row_differ_for_known_reasons(
    rows: dict[tuple[tuple[int, ...], tuple[str, ...]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without skips, the order of concatenated leaves is all that keeps two designs of one row apart."""
    space = nas_bench_graph("cora", features=5, classes=3, width=8)
    groups: dict[int, list[Architecture]] = {}
    for (link, ops), number in rows.items():
        if "skip" not in ops:
            groups.setdefault(number, []).append(architecture(link, ops))
    several = [group for group in groups.values() if len(group) > 1]
    sample = random.Random(0).sample(several, 200)
    assert all(len({space.key(found) for found in group}) == len(group) for group in sample)
    name = "nasgraph.ops.concat"
    rule = nasgraph.canonical.TABLE[name]
    monkeypatch.setitem(nasgraph.canonical.TABLE, name, lambda kwargs: replace(rule(kwargs), commutative=True))
    assert all(len({space.key(found) for found in group}) == 1 for group in sample)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "any_order", "expected"),
    [
        ("cora", False, (50_688, 11_598, 2_988, 0)),
        ("cora", True, (31_658, 1_612, 1_612, 0)),
        ("computers", False, (55_800, 11_598, 2_988, 0)),
        ("computers", True, (35_558, 1_612, 1_612, 0)),
    ],
)
def test_keys_and_rows(
    dataset: str, any_order: bool, expected: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of docs/spaces.md: keys, rows with several keys, those with a skip, keys with several rows."""
    if any_order:
        name = "nasgraph.ops.concat"
        rule = nasgraph.canonical.TABLE[name]
        monkeypatch.setitem(nasgraph.canonical.TABLE, name, lambda kwargs: replace(rule(kwargs), commutative=True))
    space = nas_bench_graph(dataset, features=5, classes=3, width=8)
    keys: dict[int, set[str]] = {}
    rows: dict[str, set[int]] = {}
    for found in space.enumerate():
        key, number = space.key(found), row(found)
        keys.setdefault(number, set()).add(key)
        rows.setdefault(key, set()).add(number)
    several = [number for number, names in keys.items() if len(names) > 1]
    with_skip = sum(str(OPS.index("skip")) in f"{number:05}"[1:] for number in several)
    assert len(keys) == 26_206
    assert (len(rows), len(several), with_skip, sum(len(numbers) > 1 for numbers in rows.values())) == expected


# ---- parameters -------------------------------------------------------------------------------------------------


def closed_form(link: Sequence[int], ops: Sequence[str], dataset: str) -> tuple[int, int]:
    """Parameters by the benchmark's formula, and how many of them are batch norms that nothing runs through."""
    p = preset(dataset)
    d, count, unused = p.width, (p.features + 1) * p.width * p.pre, 0
    widths = [d if p.pre else p.features]
    for read, op in zip(link, ops, strict=True):
        i = widths[read]
        count += 2 * d + {
            "gat": i * d + 3 * d, "gcn": i * d + d, "gin": i * d + d, "fc": i * d + d, "cheb": 2 * i * d + d,
            "sage": 2 * i * d + d, "graph": 2 * i * d + d, "arma": 2 * i * d + d * d + d, "skip": 0,
        }[op]  # fmt: skip
        unused += 2 * d * (i == p.features and not p.pre)
        widths.append(i if op == "skip" else d)
    joined = d * sum(i not in link for i in range(1, 5))
    head = (joined + 1) * d + (d + 1) * p.classes if p.post else (joined + 1) * p.classes
    return count + head, unused


@pytest.mark.parametrize("dataset", ["cora", "citeseer", "pubmed", "computers"])
def test_parameters_equal_the_table_on_every_row(dataset: str, data_root: Path) -> None:
    table = Table(dataset, data_root)
    ours = [closed_form(*cell(found), dataset)[0] for found in table.architectures()]
    assert ours == (table.para * 1e6).round().astype(int).tolist()


def test_parameters_on_physics(data_root: Path) -> None:
    table = Table("physics", data_root)
    ours = np.array([closed_form(*cell(found), "physics")[0] for found in table.architectures()])
    assert (ours == (table.para * 1e6).round()).sum() == 24_639  # the other rows agree with no number of layers


@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dataset", list(PRESETS))
def test_built_networks_have_the_parameters_of_the_formula(dataset: str, step: int, data_root: Path) -> None:
    """Every ``step``-th row: modules are made once per operation and width, and counted along the network."""
    space, found = nas_bench_graph(dataset), Table(dataset, data_root).architectures()[::step]
    known: dict[tuple[str, int], tuple[int, int]] = {}
    for one in found:
        total, unused = closed_form(*cell(one), dataset)
        assert counted(space, one, known) == total - unused, one
    for one in random.Random(0).sample(found, 20):
        total, unused = closed_form(*cell(one), dataset)
        assert sum(p.numel() for p in build(space, one).parameters()) == total - unused, one


def counted(space: SearchSpace, found: Architecture, known: dict[tuple[str, int], tuple[int, int]]) -> int:
    features = space.inputs["x"].example.shape[1]
    edges = space.inputs["edge_index"].example
    widths, total = {"x": features}, 0
    for step in simplify(space.resolve(found)).steps:
        read = [widths[name] for name in step.sources if name != "edge_index"]
        if step.op.is_call:
            widths[step.name] = sum(read)
            continue
        signature = (step.op.signature, read[0])
        if signature not in known:
            module = one_step(step.op, read[0])
            inputs = (torch.zeros(4, read[0]), edges)[: len(step.sources)]
            known[signature] = (sum(p.numel() for p in module.parameters()), module.eval()(*inputs).shape[1])
        parameters, widths[step.name] = known[signature]
        total += parameters
    return total


def one_step(op: object, width: int) -> nn.Module:
    """The module that ``op`` makes for an input of ``width`` channels, by building a network of it alone."""
    from nasgraph.search_spaces.inputs import graph_inputs
    from nasgraph.space import ConcreteOp, Op

    def declared(made: ConcreteOp) -> Op:
        kwargs = {name: declared(item) if isinstance(item, ConcreteOp) else item for name, item in made.kwargs.items()}
        return Op(made.make, label=made.label, takes=made.takes, **kwargs)

    assert isinstance(op, ConcreteOp)
    space = SearchSpace("one")
    space.output(space.add("only", declared(op), *graph_inputs(space, width)))
    return build(space, space.architecture({})).get_submodule("only")


# ---- the table --------------------------------------------------------------------------------------------------

# Spearman over all rows, as measured by others on the same table (two digits).
CORRELATIONS = {  # dataset: (validation, test), (parameters, test)
    "cora": (0.73, 0.15),
    "citeseer": (0.93, 0.21),
    "pubmed": (0.54, 0.07),
    "physics": (0.87, 0.14),
    "computers": (0.72, 0.08),
}


@pytest.mark.parametrize("dataset", list(PRESETS))
def test_rank_correlations(dataset: str, data_root: Path) -> None:
    table = Table(dataset, data_root)
    found = [table.lookup(one) for one in table.architectures()]
    column = {name: [row[name] for row in found] for name in Table.COLUMNS}
    assert spearmanr(column["valid_perf"], column["perf"])[0] == pytest.approx(CORRELATIONS[dataset][0], abs=0.006)
    assert spearmanr(column["para"], column["perf"])[0] == pytest.approx(CORRELATIONS[dataset][1], abs=0.006)


def test_lookup_gives_the_published_best(published: dict[str, dict[str, dict]], data_root: Path) -> None:
    for dataset in PRESETS:
        table = Table(dataset, data_root)
        for which in ("best_by_test", "best_by_valid"):
            best = published[dataset][which]
            found = architecture(best["link"], best["ops"])
            assert row(found) == best["hash"]
            values = table.lookup(found)
            assert values["perf"] * 100 == pytest.approx(best["test"], abs=1e-4)
            assert values["valid_perf"] * 100 == pytest.approx(best["valid"], abs=1e-4)
            assert values["latency"] == pytest.approx(best["latency_s"])
            assert values["para"] == pytest.approx(best["params_M"])


@pytest.mark.parametrize("dataset", list(PRESETS))
def test_random_search_reaches_what_it_is_known_to_reach(dataset: str, data_root: Path) -> None:
    """100 rows at random, the best by validation accuracy: its mean test accuracy over 1,000 searches."""
    known = json.loads((data_root / "nas_bench_graph" / "random_search_reference.json").read_text())[dataset]["100"]
    table, rng = Table(dataset, data_root), np.random.default_rng(0)
    drawn = [rng.choice(len(table), 100, replace=False) for _ in range(1000)]
    reached = [100 * table.perf[rows[table.valid_perf[rows].argmax()]] for rows in drawn]
    error = known["select_by_valid_test_std"] / 1000**0.5
    assert np.mean(reached) == pytest.approx(known["select_by_valid_test_mean"], abs=6 * error)


def test_a_study_runs_on_the_table(data_root: Path, tmp_path: Path) -> None:
    evaluate = pickle.loads(pickle.dumps(TableEvaluator("citeseer", data_root, ["valid_perf", "latency"])))
    space = nas_bench_graph("citeseer")
    objectives = [("valid_perf", "maximize"), ("latency", "minimize")]
    study = Study(tmp_path / "study.db", "table", space, objectives, "random", 0)
    with InProcess(evaluate) as executor:
        records = study.run(20, executor)
    table = Table("citeseer", data_root)
    for record in records:
        if record.state == "scored":
            found = table.lookup(record.arch)
            assert record.values == {"valid_perf": found["valid_perf"], "latency": found["latency"]}
            assert record.info["perf"] == found["perf"]
    assert sum(record.state == "scored" for record in records) >= 19


def test_an_evaluator_answers_for_what_has_no_row(data_root: Path) -> None:
    evaluate = TableEvaluator("cora", data_root, ["valid_perf", "para"])
    assert isinstance(evaluate(architecture(LINKS[3], ["gcn"] * 4)), Scored)
    failed = evaluate(architecture(LINKS[3], ["skip"] * 4))
    assert isinstance(failed, Failed) and "skips only" in failed.detail
    with pytest.raises(ConfigError, match="'perf'"):
        TableEvaluator("cora", data_root, ["perf"])


def test_files_that_are_no_table_are_refused(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="Did you mean 'cora'"):
        Table("core", data_root)
    with pytest.raises(DataError, match="no nas_bench_graph_light.npz"):
        Table("cora", tmp_path)
    monkeypatch.delenv("NASGRAPH_DATA", raising=False)
    with pytest.raises(DataError, match="NASGRAPH_DATA"):
        Table("cora")
    whole = (data_root / "nas_bench_graph" / "nas_bench_graph_light.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    array = tmp_path / "array.npz"
    with array.open("wb") as file:
        np.save(file, np.zeros(3))
    for content in (b"", b"not a zip", whole[: len(whole) // 2], array.read_bytes()):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(DamagedFile, match=r"bad\.npz"):
            Table("cora", tmp_path / "bad.npz")
    (tmp_path / "bad.npz").write_bytes(flipped)
    refused = 0
    for dataset in PRESETS:  # the flipped bit lies in one member, which only its dataset reads
        try:
            Table(dataset, tmp_path / "bad.npz")
        except DamagedFile:
            refused += 1
    assert refused == 1
