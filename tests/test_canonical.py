"""Oracles: networkx's VF2 for isomorphism, the network's own output for simplification."""

from __future__ import annotations

import itertools
import json
import os
import pydoc
import random
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networkx.algorithms.isomorphism import categorical_node_match
from torch import Tensor, nn

from nasgraph.build import build_graph
from nasgraph.canonical import KEY_VERSION, TABLE, key, simplify, traits
from nasgraph.ops import Zero, add, concat, maximum
from nasgraph.space import ConcreteOp, Graph, SearchSpace, Step


def plain(first: Tensor, *rest: Tensor) -> Tensor:
    return first


def free(first: Tensor, *rest: Tensor) -> Tensor:
    return first


free.commutative = True


def op(make, is_call=None, **kwargs) -> ConcreteOp:
    return ConcreteOp(make, kwargs, make.__name__, not isinstance(make, type) if is_call is None else is_call)


def network(*steps: tuple, inputs=("x",), output=None) -> Graph:
    """``(name, make or op, *sources)`` each; the output is the last step unless it is given."""
    made = tuple(Step(n, o if isinstance(o, ConcreteOp) else op(o), tuple(sources)) for n, o, *sources in steps)
    return Graph(tuple(inputs), made, output or made[-1].name)


def shuffled(graph: Graph, rng: random.Random) -> Graph:
    """The same network: new names, another topological order, commutative sources in another order."""
    new = {step.name: f"n{i}" for step, i in zip(graph.steps, rng.sample(range(900), len(graph.steps)), strict=True)}
    new |= {name: name for name in graph.inputs}
    steps, todo, known = [], list(graph.steps), set(graph.inputs)
    while todo:
        step = rng.choice([step for step in todo if known.issuperset(step.sources)])
        todo.remove(step)
        known.add(step.name)
        sources = [new[name] for name in step.sources]
        if traits(step.op).commutative:
            rng.shuffle(sources)
        steps.append(Step(new[step.name], step.op, tuple(sources)))
    return Graph(graph.inputs, tuple(steps), new[graph.output])


def isomorphic(first: Graph, second: Graph) -> bool:
    """By VF2, on graphs where every "vertex reads vertex" is a vertex of its own, labelled with its position."""

    def coded(graph: Graph) -> nx.DiGraph:
        found = nx.DiGraph()
        for i, name in enumerate(graph.inputs):
            found.add_node(name, label=("input", i, name == graph.output))
        for step in graph.steps:
            found.add_node(step.name, label=("step", step.op.signature, step.name == graph.output))
            for i, name in enumerate(step.sources):
                found.add_node((step.name, i), label=("reads", -1 if traits(step.op).commutative else i))
                found.add_edge(name, (step.name, i))
                found.add_edge((step.name, i), step.name)
        return found.subgraph(nx.ancestors(found, graph.output) | {graph.output})

    return nx.is_isomorphic(coded(first), coded(second), node_match=categorical_node_match("label", None))


@st.composite
def labelled(draw, steps=5) -> Graph:
    """Small graphs with few labels, so that two of them are often isomorphic; nothing in them can be simplified."""
    names, made = ["x", "y"], []
    for i in range(draw(st.integers(1, steps))):
        make = draw(st.sampled_from([plain, free]))
        sources = draw(st.lists(st.sampled_from(names[-4:]), min_size=1, max_size=2))
        made.append(Step(f"s{i}", op(make), tuple(sources)))
        names.append(f"s{i}")
    return Graph(("x", "y"), tuple(made), names[-1])


# ---- the key ----------------------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(labelled(), labelled())
def test_keys_are_equal_exactly_when_vf2_finds_an_isomorphism(first, second):
    assert (key(first) == key(second)) == isomorphic(first, second)


@settings(max_examples=200, deadline=None)
@given(labelled(steps=12), st.randoms(use_true_random=False))
def test_names_and_order_do_not_count(graph, rng):
    assert key(shuffled(graph, rng)) == key(graph)


@settings(max_examples=200, deadline=None)
@given(labelled(steps=8), st.randoms(use_true_random=False), st.data())
def test_one_source_exchanged_is_told_apart_as_vf2_does(graph, rng, data):
    at = data.draw(st.integers(0, len(graph.steps) - 1))
    step = graph.steps[at]
    place = data.draw(st.integers(0, len(step.sources) - 1))
    other = data.draw(st.sampled_from([*graph.inputs, *(s.name for s in graph.steps[:at])]))
    sources = (*step.sources[:place], other, *step.sources[place + 1 :])
    changed = Graph(
        graph.inputs, (*graph.steps[:at], Step(step.name, step.op, sources), *graph.steps[at + 1 :]), graph.output
    )
    assert (key(shuffled(changed, rng)) == key(graph)) == isomorphic(changed, graph)


def test_all_small_graphs_fall_into_as_many_keys_as_classes():
    """Every graph of three steps, two labels and two sources each: keys and VF2 give the same classes."""
    graphs = []
    for shape in itertools.product(*([*itertools.product(range(n), repeat=2)] for n in (1, 2, 3))):
        for makes in itertools.product([plain, free], repeat=3):
            names = ["x", "a", "b", "c"]
            steps = [
                Step(name, op(make), tuple(names[i] for i in sources))
                for name, make, sources in zip("abc", makes, shape, strict=True)
            ]
            if {"a", "b"} <= {name for step in steps for name in step.sources}:
                graphs.append(Graph(("x",), tuple(steps), "c"))
    alike: dict[tuple[str, ...], list[Graph]] = {}  # VF2 is slow: compare only graphs of the same labels
    for graph in graphs:
        classes = alike.setdefault(tuple(sorted(step.op.label for step in graph.steps)), [])
        match = [key(member) for member in classes if isomorphic(member, graph)]
        assert match in ([], [key(graph)])
        if not match:
            classes.append(graph)
    assert sum(map(len, alike.values())) == len({key(graph) for graph in graphs}) > 50


def incidence(edges) -> Graph:
    """An undirected graph as a network: a step per vertex, a commutative step per edge, and one that reads them all."""
    vertices = sorted({v for edge in edges for v in edge})
    steps = [Step(f"v{v}", op(plain), ("x",)) for v in vertices]
    steps += [Step(f"e{a}_{b}", op(free), (f"v{a}", f"v{b}")) for a, b in edges]
    steps.append(Step("out", op(free), tuple(f"e{a}_{b}" for a, b in edges)))
    return Graph(("x",), tuple(steps), "out")


HARD = {
    "hexagon": nx.cycle_graph(6),
    "two triangles": nx.disjoint_union(nx.cycle_graph(3), nx.cycle_graph(3)),
    "prism": nx.circular_ladder_graph(3),
    "K33": nx.complete_bipartite_graph(3, 3),
    "cube": nx.hypercube_graph(3),
    "Moebius ladder": nx.circulant_graph(8, [1, 4]),
    "Petersen": nx.petersen_graph(),
    "pentagonal prism": nx.circular_ladder_graph(5),
}


def test_regular_graphs_which_refinement_alone_cannot_tell_apart():
    graphs = {name: incidence(nx.convert_node_labels_to_integers(g).edges) for name, g in HARD.items()}
    assert len({key(graph) for graph in graphs.values()}) == len(HARD)
    rng = random.Random(0)
    for graph in graphs.values():
        assert {key(shuffled(graph, rng)) for _ in range(5)} == {key(graph)}


def test_many_equal_branches_are_fast():
    """12 interchangeable branches have 12! orders; automorphisms leave about 12 squared of them to look at."""
    steps = [(f"b{i}", op(nn.Linear, out_features=4), "x") for i in range(12)]
    steps += [(f"c{i}", op(nn.BatchNorm1d), f"b{i}") for i in range(12)]
    graph = network(*steps, ("out", add, *(f"c{i}" for i in range(12))))
    assert key(shuffled(graph, random.Random(1))) == key(graph)


def test_one_layer_used_twice_is_not_two_layers():
    once = network(("a", op(nn.Linear, out_features=4), "x"), ("out", add, "a", "a"))
    twice = network(
        ("a", op(nn.Linear, out_features=4), "x"), ("b", op(nn.Linear, out_features=4), "x"), ("out", add, "a", "b")
    )
    assert key(once) != key(twice)


def test_the_order_of_sources_counts_unless_the_operation_commutes():
    def both(make):
        layers = [("a", op(nn.Linear, out_features=4), "x"), ("b", op(nn.Linear, out_features=4, bias=False), "x")]
        return [key(network(*layers, ("out", make, *order))) for order in ("ab", "ba")]

    assert len(set(both(add))) == len(set(both(maximum))) == 1
    assert len(set(both(concat))) == 2


def test_arguments_inputs_and_the_output_count():
    keys = {
        key(network(("a", op(nn.Linear, out_features=4), "x"))),
        key(network(("a", op(nn.Linear, out_features=8), "x"))),
        key(network(("a", op(nn.Linear, out_features=4), "y"), inputs=("x", "y"))),
        key(Graph(("x", "y"), (), "x")),
        key(Graph(("x", "y"), (), "y")),
    }
    assert len(keys) == 5


def test_two_classes_of_one_name_in_two_modules_are_two_labels():
    ours, theirs = type("Block", (nn.Module,), {}), type("Block", (nn.Module,), {})
    ours.__module__, theirs.__module__ = "project.first", "project.second"
    assert key(network(("a", ours, "x"))) != key(network(("a", theirs, "x")))


def golden() -> dict[str, Graph]:
    linear = op(nn.Linear, out_features=8)
    return {
        "input": Graph(("x",), (), "x"),
        "linear": network(("a", linear, "x")),
        "residual": network(("a", linear, "x"), ("r", nn.ReLU, "a"), ("s", add, "r", "a")),
        "two inputs": network(
            ("a", linear, "x"), ("b", linear, "y"), ("c", concat, "b", "a"), ("d", op(nn.Linear, out_features=2), "c"),
            inputs=("x", "y"),
        ),
        "twins": network(("a", linear, "x"), ("b", linear, "x"), ("m", maximum, "a", "b"), ("s", add, "m", "a")),
    }  # fmt: skip


GOLDEN = {
    "input": "k1-08aa5265ebe4fea5adeb3d36bde9ed22",
    "linear": "k1-0a331e17ee67674e41c2c64fd84e9595",
    "residual": "k1-0992d28ab6de98cfb29c304ebd3bf2b0",
    "two inputs": "k1-8c50443b354ad960588676e4471d8707",
    "twins": "k1-6343006abf6daae4ae1156e7ad4e8765",
}


def test_golden_keys():
    """Frozen: old results are found by key. Whoever changes one of these must raise KEY_VERSION."""
    assert KEY_VERSION == "k1"
    assert {name: key(graph) for name, graph in golden().items()} == GOLDEN


@pytest.mark.parametrize("seed", ["1", "2"])
def test_keys_do_not_depend_on_the_process(seed):
    code = "import json, tests.test_canonical as t; print(json.dumps({n: t.key(g) for n, g in t.golden().items()}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": seed},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == GOLDEN


# ---- simplification ---------------------------------------------------------------------------------------------


def names(graph: Graph) -> list[str]:
    return [step.name for step in graph.steps]


LINEAR = op(nn.Linear, out_features=4)


@pytest.mark.parametrize("make", [op(nn.Identity), op(nn.Dropout, p=0.0), op(nn.Dropout, p=0), op(add), op(concat)])
def test_identities_vanish(make):
    graph = simplify(network(("a", LINEAR, "x"), ("i", make, "a"), ("b", LINEAR, "i")))
    assert names(graph) == ["a", "b"] and graph.steps[1].sources == ("a",)


def test_a_network_of_identities_is_its_input():
    assert simplify(network(("i", nn.Identity, "x"), ("s", add, "i"))) == Graph(("x",), (), "x")


def test_a_zero_that_is_added_vanishes_with_all_that_feeds_it():
    graph = network(("a", LINEAR, "x"), ("z", Zero, "a"), ("r", nn.ReLU, "z"), ("b", LINEAR, "x"), ("s", add, "r", "b"))
    assert names(simplify(graph)) == ["b"]


def test_a_zero_output_is_one_step():
    graph = network(("r", nn.ReLU, "x"), ("z", Zero, "r"), ("p", op(nn.Tanh), "z"), ("s", add, "p", "z"))
    assert simplify(graph).steps == (Step("z", op(Zero), ("x",)),)


def test_batch_norm_of_zero_is_a_learned_constant_and_stays():
    graph = simplify(network(("z", Zero, "x"), ("n", nn.BatchNorm1d, "z"), ("s", add, "n", "x")))
    assert names(graph) == ["z", "n", "s"]
    fixed = op(nn.BatchNorm1d, affine=False)
    assert names(simplify(network(("z", Zero, "x"), ("n", fixed, "z"), ("s", add, "n", "x")))) == []


def test_a_zero_takes_its_shape_from_the_earliest_tensor_that_has_it():
    graph = network(("a", LINEAR, "x"), ("r", nn.ReLU, "a"), ("z", Zero, "r"), ("c", concat, "x", "z"))
    assert [(step.name, step.sources) for step in simplify(graph).steps] == [
        ("a", ("x",)), ("z", ("a",)), ("c", ("x", "z")),
    ]  # fmt: skip


def test_a_parameter_free_step_is_done_once():
    graph = network(("p", nn.ReLU, "x"), ("q", nn.ReLU, "x"), ("a", LINEAR, "p"), ("s", add, "a", "q"))
    assert names(simplify(graph)) == ["p", "a", "s"]
    random_ones = network(("p", nn.Dropout, "x"), ("q", nn.Dropout, "x"), ("s", add, "p", "q"))
    assert names(simplify(random_ones)) == ["p", "q", "s"]


def test_sums_of_sums_become_one_where_nobody_else_reads_them():
    layers = [("a", LINEAR, "x"), ("b", LINEAR, "x"), ("s", add, "a", "b")]
    assert simplify(network(*layers, ("t", add, "s", "x"))).steps[-1].sources == ("a", "b", "x")
    shared = network(*layers, ("c", LINEAR, "s"), ("t", add, "s", "c"))
    assert simplify(shared) == shared


def test_operations_declare_their_own_traits():
    class Halve(nn.Module):
        keeps_zero = True

    class Other(Halve):
        pass

    assert names(simplify(network(("z", Zero, "x"), ("h", Halve, "z"), ("s", add, "h", "x")))) == []
    assert "h" in names(simplify(network(("z", Zero, "x"), ("h", Other, "z"), ("s", add, "h", "x"))))


# ---- simplification against the network itself ------------------------------------------------------------------

WIDTH = 4
SAME = [op(nn.ReLU), op(nn.Identity), op(Zero), op(nn.BatchNorm1d), op(nn.BatchNorm1d, affine=False), op(nn.Tanh),
        op(nn.Sigmoid), op(nn.LayerNorm), op(nn.Dropout, p=0.0)]  # fmt: skip
TO_WIDTH = [op(nn.Linear, out_features=WIDTH), op(nn.Linear, out_features=WIDTH, bias=False)]


@st.composite
def real(draw) -> Graph:
    """Networks of real operations, with many zeros, identities and copies in them."""
    width = {"x": WIDTH, "y": WIDTH + 1}
    steps = []
    for i in range(draw(st.integers(2, 10))):
        kind = draw(st.sampled_from(["same", "same", "width", "sum", "sum", "max", "concat"]))
        alike = [name for name in width if width[name] == WIDTH]
        if kind in ("sum", "max"):
            sources = draw(st.lists(st.sampled_from(alike), min_size=1, max_size=3))
            made, size = op(add if kind == "sum" else maximum), WIDTH
        elif kind == "concat":
            sources = draw(st.lists(st.sampled_from([*width]), min_size=1, max_size=3))
            made, size = op(concat), sum(width[name] for name in sources)
        else:
            sources = [draw(st.sampled_from([*width][-4:]))]
            made = draw(st.sampled_from(SAME if kind == "same" else TO_WIDTH))
            size = width[sources[0]] if kind == "same" else WIDTH
        steps.append(Step(f"s{i}", made, tuple(sources)))
        width[f"s{i}"] = size
    return Graph(("x", "y"), tuple(steps), steps[-1].name)


def evaluated(graph: Graph, train: bool) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(5, WIDTH, generator=generator), torch.randn(5, WIDTH + 1, generator=generator)]
    space = SearchSpace("any")
    for name, example in zip(graph.inputs, inputs, strict=True):
        space.input(name, example)
    model = build_graph(space, graph).double().train(train)
    for name, parameter in model.named_parameters():  # away from the start, where every shift is zero
        draw = torch.Generator().manual_seed(sum(map(ord, name)) * 31 + len(name))
        parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        return model(*(tensor.double() for tensor in inputs))


@settings(max_examples=300, deadline=None)
@given(real(), st.booleans())
def test_simplification_changes_no_output(graph, train):
    simple = simplify(graph)
    assert len(simple.steps) <= len(graph.steps)
    assert torch.allclose(evaluated(simple, train), evaluated(graph, train), rtol=1e-6, atol=1e-8)


@settings(max_examples=400, deadline=None)
@given(real(), st.randoms(use_true_random=False))
def test_simplification_is_done_once_and_sees_no_names(graph, rng):
    simple = simplify(graph)
    assert simplify(simple) == simple
    other = shuffled(graph, rng)
    assert key(other) == key(graph) == key(simple)
    assert isomorphic(simplify(other), simple)


def _sample_of(name: str, path: str):
    """A module of the class called ``path`` and inputs of zeros for it; None: nothing here makes one."""
    cls = pydoc.locate(path)
    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    if path.startswith("torch_geometric") and "Conv" in name:
        return lambda **kw: cls(4, 4, **kw), (torch.zeros(4, 4), edges)
    if "Conv" in name or "Pool" in name:
        axes = int(name[-2])
        argument = (4,) if "Adaptive" in name else (2,) if "Pool" in name else (3, 4, 2)
        return lambda **kw: cls(*argument, **kw), (torch.zeros(2, 3, *[8] * axes),)
    if "BatchNorm" in name and name[-1] == "d":
        return lambda **kw: cls(3, **kw), (torch.zeros(4, 3, *[2] * int(name[-2])),)
    if name == "GroupNorm":
        return lambda **kw: cls(1, 4, **kw), (torch.zeros(4, 4),)
    if name in ("LayerNorm", "RMSNorm", "BatchNorm", "GraphNorm"):
        return lambda **kw: cls(4, **kw), (torch.zeros(4, 4),)
    if name == "Linear":
        return lambda **kw: cls(4, 3, **kw), (torch.zeros(4, 4),)
    if name in ("Dropout1d", "FeatureAlphaDropout"):
        return lambda **kw: cls(**kw), (torch.zeros(2, 4, 4),)
    if name in ("Dropout2d", "Dropout3d"):
        return lambda **kw: cls(**kw), (torch.zeros(2, 4, *[2] * int(name[-2])),)
    return lambda **kw: cls(**kw), (torch.zeros(4, 4),)


VARIANTS = [{}, {"bias": False}, {"affine": False}, {"elementwise_affine": False}, {"p": 0.0}]


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("path", [path for path in TABLE if path.startswith("torch") and ".nn." in path])
def test_the_table_says_what_the_modules_do(path):
    """Each claim about torch's and PyG's own modules is tried on a module with random parameters."""
    pytest.importorskip("torch_geometric")
    name = path.rpartition(".")[2]
    make, inputs = _sample_of(name, path)
    tried = 0
    for kwargs in VARIANTS:
        try:
            module = make(**kwargs)
        except TypeError:
            continue
        claims = TABLE[path](kwargs)
        torch.manual_seed(0)
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        tried += 1
        if claims.keeps_zero:
            assert all(not module.train(train)(*inputs).any() for train in (True, False)), kwargs
        noise = (torch.randn(inputs[0].shape), *inputs[1:])
        if claims.keeps_shape:
            assert module(*noise).shape == noise[0].shape
        if claims.identity:
            assert torch.equal(module(*noise), noise[0])
        if claims.pure:
            assert not list(module.state_dict()) and torch.equal(module(*noise), module(*noise))
    assert tried
