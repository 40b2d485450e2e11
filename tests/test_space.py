"""Random spaces against brute force: all labels of all choices, decided one by one."""

from __future__ import annotations

import functools
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from nasgraph.declare import make_name
from nasgraph.errors import SpaceError
from nasgraph.ops import add, concat
from nasgraph.space import Architecture, Call, Choice, Op, SearchSpace, Switch

MOST = 4000  # architectures that brute force looks at


def alpha(size: int = 1, other: int = 1) -> nn.Module:
    return nn.Linear(size, other)


def beta(size: int = 1, other: int = 1) -> nn.Module:
    return nn.Linear(size, other)


@st.composite
def spaces(draw) -> SearchSpace:
    """Spaces with shared, nested and switched choices in operations, arguments, sources and the output."""
    space = SearchSpace("random")
    nodes = [space.input("x", torch.zeros(2, 3))]
    count = itertools.count()
    values = [Choice("shared", [1, 2, 3]), Choice("deep", {"plain": 1, "nested": Choice("inner", [5, 6])})]
    values.append(Switch(values[0], {1: 7}, default=Choice("switched", ["p", "q"])))

    def value():
        kind = draw(st.integers(0, 5))
        if kind < 3:
            return values[kind]
        if kind == 3:
            return 2 * values[0] + draw(st.sampled_from([1, values[0]]))
        return [1, values[1]] if kind == 4 else draw(st.integers(1, 3))

    def operation():
        make = draw(st.sampled_from([alpha, beta]))
        kwargs = {name: value() for name in draw(st.sets(st.sampled_from(["size", "other"])))}
        return Op(make, label=f"op{next(count)}", takes=draw(st.sampled_from([None, 1, 2])), **kwargs)

    def source():
        kind = draw(st.integers(0, 3))
        if kind == 0 or len(nodes) < 2:
            return draw(st.sampled_from(nodes))
        some = draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=3, unique=True))
        if kind == 1:
            return Switch(values[0], {2: some[0]}, default=some[-1])
        return Choice(f"source{next(count)}", some)

    for i in range(draw(st.integers(1, 4))):
        op = operation()
        if draw(st.booleans()):
            op = Choice(f"op{next(count)}", [op, operation()])
        nodes.append(space.add(f"n{i}", op, *(source() for _ in range(draw(st.integers(1, 2))))))
    space.output(source() if draw(st.booleans()) else nodes[-1])
    return space


@functools.lru_cache(maxsize=64)
def everything(space: SearchSpace) -> list[Architecture]:
    """All architectures, by brute force over every label of every choice; discards spaces that have too many."""
    names = [*space.choices]
    labels = [choice.labels for choice in space.choices.values()]
    assume(functools.reduce(lambda n, some: n * len(some), labels, 1) <= MOST)
    combinations = (dict(zip(names, some, strict=True)) for some in itertools.product(*labels))
    return [*dict.fromkeys(space.architecture(some) for some in combinations)]


def some(examples=60):
    return settings(max_examples=examples, deadline=None)


# ---- what a space contains --------------------------------------------------------------------------------------


@some(200)
@given(spaces())
def test_size_and_enumeration_agree_with_brute_force(space):
    known = everything(space)
    found = list(space.enumerate())
    assert len(found) == len(set(found)) == space.size() == len(known)
    assert set(found) == set(known)


@some()
@given(spaces(), st.integers(0, 99))
def test_samples_are_architectures(space, seed):
    found = space.sample(random.Random(seed))
    assert found in everything(space)
    assert space.sample(random.Random(seed)) == found


@some()
@given(spaces(), st.integers(0, 99))
def test_what_an_architecture_decides_is_what_its_network_needs(space, seed):
    """Each active choice is asked once, and the network cannot be made without any one of them."""
    arch = space.sample(random.Random(seed))
    asked = []

    def pick(choice):
        asked.append(choice.name)
        return arch[choice.name]

    assert space.decide(pick) == arch
    assert sorted(asked) == sorted(arch)
    for name in arch:
        with pytest.raises(SpaceError, match=f"does not decide '{name}'"):
            space.resolve({other: label for other, label in arch.items() if other != name})


@some()
@given(spaces(), st.integers(0, 99))
def test_networks_are_in_topological_order_and_all_of_it_is_reached(space, seed):
    graph = space.resolve(space.sample(random.Random(seed)))
    known, read = {*graph.inputs}, {graph.output}
    for step in graph.steps:
        assert known.issuperset(step.sources) and step.sources
        known.add(step.name)
    for step in reversed(graph.steps):
        assert step.name in read
        read.update(step.sources)


@some()
@given(spaces(), st.integers(0, 99))
def test_json_round_trip(space, seed):
    arch = space.sample(random.Random(seed))
    again = Architecture.from_json(arch.to_json())
    assert again == arch and hash(again) == hash(arch) and again.to_json() == arch.to_json()
    assert space.architecture(json.loads(arch.to_json())) == arch
    assert pickle.loads(pickle.dumps(arch)) == arch


# ---- moves ------------------------------------------------------------------------------------------------------


@some(150)
@given(spaces(), st.integers(0, 99), st.integers(1, 2))
def test_a_mutation_changes_what_it_promises(space, seed, changes):
    known, rng = everything(space), random.Random(seed)
    arch = space.sample(rng)
    mutable = [name for name in arch if len(space.choices[name].labels) > 1]
    if not mutable:
        with pytest.raises(SpaceError, match="nothing to mutate"):
            space.mutate(arch, rng)
        return
    other = space.mutate(arch, rng, changes)
    changed = [name for name in arch if name in other and other[name] != arch[name]]
    assert other in known and 1 <= len(changed) <= changes
    if changes == 1 or set(arch) == set(other):
        assert len(changed) == min(changes, len(mutable))


@some(100)
@given(spaces(), st.integers(0, 99))
def test_neighbours_are_all_that_differ_in_one_active_choice(space, seed):
    known = everything(space)
    arch = space.sample(random.Random(seed))
    found = list(space.neighbours(arch))
    moves = sorted(str((n, other[n])) for other in found for n in arch if n in other and other[n] != arch[n])
    assert moves == sorted(str((n, label)) for n in arch for label in space.choices[n].labels if label != arch[n])
    assert set(found) <= set(known) and arch not in found
    for other in found:  # what became active takes its first option
        assert all(other[n] == space.choices[n].labels[0] for n in other if n not in arch)


@some(100)
@given(spaces(), st.integers(0, 99))
def test_crossover_takes_each_choice_from_a_parent(space, seed):
    rng = random.Random(seed)
    first, second = space.sample(rng), space.sample(rng)
    child = space.crossover(first, second, rng)
    assert child in everything(space)
    for name, label in child.items():
        assert label in [parent[name] for parent in (first, second) if name in parent] or not (
            name in first or name in second
        )


# ---- the walk ---------------------------------------------------------------------------------------------------


def deep() -> SearchSpace:
    space = SearchSpace("deep")
    nodes = [space.input("x", torch.zeros(2, 3))]
    width = Choice("width", [4, 8], ordered=True)
    for i in range(1, 4):
        op = Choice(f"op{i}", [Op(alpha, size=width, other=Choice(f"heads{i}", [1, 2])), Op(beta, size=width)])
        nodes.append(space.add(f"n{i}", op, nodes[-1]))
    space.output(Choice("depth", {"1": nodes[1], "2": nodes[2], "3": nodes[3]}))
    return space


def test_only_what_the_output_reaches_is_asked():
    asked = []

    def pick(choice):
        asked.append(choice.name)
        return {"depth": "2", "op2": "alpha", "op1": "beta", "heads2": 2, "width": 8}[choice.name]

    arch = deep().decide(pick)
    assert asked == ["depth", "op2", "width", "heads2", "op1"]
    assert list(arch) == asked
    # depth d: width twice; each layer is beta, or alpha with one of two numbers of heads
    assert deep().size() == 2 * (3 + 3**2 + 3**3)


def test_a_shared_choice_is_one_decision():
    graph = deep().resolve({"depth": "2", "op2": "beta", "op1": "beta", "width": 8})
    assert [step.op.kwargs for step in graph.steps] == [{"size": 8}, {"size": 8}]


def test_arithmetic_over_choices():
    space = SearchSpace("arithmetic")
    x = space.input("x", torch.zeros(2, 3))
    a, b = Choice("a", [6]), Choice("b", [4])
    sums = {
        "add": a + b, "radd": 1 + a, "sub": a - b, "rsub": 10 - a, "mul": a * b, "rmul": 3 * a,
        "floor": a // b, "rfloor": 20 // a, "div": a / b, "rdiv": 3 / a, "nested": (a + b) * (a - 1), "in": [a, (b, 1)],
    }  # fmt: skip
    space.output(space.add("n", Op(alpha, **sums), x))
    assert space.resolve({"a": 6, "b": 4}).steps[0].op.kwargs == {
        "add": 10, "radd": 7, "sub": 2, "rsub": 4, "mul": 24, "rmul": 18,
        "floor": 1, "rfloor": 3, "div": 1.5, "rdiv": 0.5, "nested": 50, "in": [6, (4, 1)],
    }  # fmt: skip


def test_a_switch_follows_its_choice():
    space = SearchSpace("switch")
    x = space.input("x", torch.zeros(2, 3))
    wiring = Choice("wiring", ["chain", "star"])
    first = space.add("first", Op(alpha), x)
    second = space.add("second", Op(alpha, size=Switch(wiring, {"chain": 1}, default=2)), first)
    space.output(space.add("out", Call(add), second, Switch(wiring, {"chain": second, "star": first})))
    assert space.resolve({"wiring": "star"}).steps[-1].sources == ("second", "first")
    assert space.resolve({"wiring": "chain"}).steps[1].op.kwargs == {"size": 1}
    assert space.size() == 2
    with pytest.raises(SpaceError, match="no case for 'star'"):
        Switch(wiring, {"chain": 1})
    with pytest.raises(SpaceError, match="Did you mean 'chain'"):
        Switch(wiring, {"chian": 1}, default=2)


def test_an_operation_reads_as_many_sources_as_it_takes():
    space = SearchSpace("takes")
    x, y = space.input("x", torch.zeros(2, 3)), space.input("y", torch.zeros(2, 3))
    never = space.add("never", Op(alpha, size=Choice("unasked", [1, 2])), y)
    h = space.add("h", Choice("op", [Op(nn.ReLU), Op(alpha, takes=1)]), x, never)
    space.output(h)
    assert space.size() == 2
    assert all([step.name for step in space.resolve(arch).steps] == ["h"] for arch in space.enumerate())


def test_a_large_space_is_counted_at_once():
    space = SearchSpace("large")
    nodes = [space.input("x", torch.zeros(2, 3))]
    for i in range(40):
        nodes.append(space.add(f"n{i}", Op(alpha, size=Choice(f"c{i}", range(1, 8))), nodes[-1]))
    space.output(nodes[-1])
    assert space.size() == 7**40


# ---- constraints ------------------------------------------------------------------------------------------------


@some()
@given(spaces(), st.integers(0, 99), st.integers(2, 3))
def test_constraints_hold_for_everything_that_comes_out(space, seed, modulus):
    known = everything(space)

    def holds(arch):
        return sum(map(ord, arch.to_json())) % modulus != 0

    allowed = {arch for arch in known if holds(arch)}
    assume(len(allowed) * 10 > len(known))
    space.constrain("sum", holds)
    assert set(space.enumerate()) == allowed
    rng = random.Random(seed)
    arch = space.sample(rng)
    assert arch in allowed and space.violated(arch) == []
    assert set(space.neighbours(arch)) <= allowed
    assert space.crossover(arch, space.sample(rng), rng) in allowed


def test_an_impossible_constraint_is_named():
    space = deep()
    space.constrain("fine", lambda arch: True)
    space.constrain("wide", lambda arch: arch["width"] > 8)
    with pytest.raises(SpaceError, match="met the constraint 'wide' in 1000 draws"):
        space.sample(random.Random(0))
    assert list(space.enumerate()) == []
    assert space.violated(space.architecture({"depth": "1", "op1": "beta", "width": 4})) == ["wide"]
    with pytest.raises(SpaceError, match="'wide' is declared twice"):
        space.constrain("wide", lambda arch: True)


# ---- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, ordered, message", [
    ([], False, "no options"),
    ([1, 1], False, "two options labelled 1"),
    ([Op(alpha), Op(alpha, size=2)], False, "two options labelled 'alpha'"),
    ([[1, 2]], False, "no natural label"),
    ([2, 1], True, "ascending numbers"),
    (["a", "b"], True, "ascending numbers"),
    ({(1, 2): 3}, False, "not a plain value"),
])  # fmt: skip
def test_choices_declared_wrongly(options, ordered, message):
    with pytest.raises(SpaceError, match=message):
        Choice("c", options, ordered=ordered)


def test_nodes_declared_wrongly():
    space, other = SearchSpace("one"), SearchSpace("two")
    x, foreign = space.input("x", torch.zeros(2, 3)), other.input("foreign", torch.zeros(2, 3))
    with pytest.raises(SpaceError, match="has no output"):
        space.sample(random.Random(0))
    with pytest.raises(SpaceError, match="'x' is declared twice"):
        space.add("x", Op(alpha), x)
    with pytest.raises(SpaceError, match="reads 'foreign', which belongs to space 'two'"):
        space.add("n", Op(alpha), foreign)
    with pytest.raises(SpaceError, match="belongs to space 'two'"):
        space.output(Choice("out", [x, foreign]))
    with pytest.raises(SpaceError, match="reads nothing"):
        space.add("n", Op(alpha))
    for name in ("a-b", "1a", "class"):
        with pytest.raises(SpaceError, match="not an identifier"):
            space.add(name, Op(alpha), x)
    with pytest.raises(SpaceError, match="must be a Op or a Choice"):
        space.add("n", nn.ReLU, x)
    with pytest.raises(SpaceError, match="must be a Node or a Choice"):
        space.add("n", Op(alpha), Choice("numbers", [1, 2]))
    space.add("a", Op(alpha, size=Choice("size", [1, 2])), x)
    with pytest.raises(SpaceError, match="'size' is declared twice"):
        space.add("b", Op(alpha, size=Choice("size", [1, 2])), x)
    with pytest.raises(SpaceError, match="no name: use a class or a function"):
        Op(lambda: nn.ReLU())


def test_architectures_that_do_not_fit():
    space = deep()
    with pytest.raises(SpaceError, match="no choice 'widht'. Did you mean 'width'"):
        space.architecture({"widht": 4})
    with pytest.raises(SpaceError, match="'op1' has no option 'bta'. Did you mean 'beta'"):
        space.architecture({"depth": "1", "op1": "bta", "width": 4})
    with pytest.raises(SpaceError, match="has no option 'gamma'"):
        space.resolve({"depth": "1", "op1": "gamma", "width": 4})
    with pytest.raises(SpaceError, match="does not decide 'depth'"):
        space.architecture({})
    for text in ("[1]", '{"a": [1]}', "{", '"a"'):
        with pytest.raises(SpaceError, match="not an architecture"):
            Architecture.from_json(text)


def test_architectures_are_frozen():
    arch = Architecture({"a": 1})
    with pytest.raises(TypeError):
        arch["a"] = 2
    source = {"a": 1}
    copy = Architecture(source)
    source["a"] = 2
    assert copy["a"] == 1 and copy == arch and len({arch, copy}) == 1


def test_inactive_choices_are_dropped():
    arch = deep().architecture({"depth": "1", "op1": "beta", "width": 4, "op3": "alpha", "heads3": 2})
    assert sorted(arch) == ["depth", "op1", "width"]


# ---- descriptions -----------------------------------------------------------------------------------------------


def test_the_networkx_view():
    graph = deep().graph()
    assert list(graph.nodes) == ["x", "n1", "n2", "n3"]
    assert graph.nodes["x"] == {"kind": "input", "op": "", "output": False}
    assert graph.nodes["n1"] == {"kind": "op", "op": "alpha | beta", "output": True}
    assert [edge[:2] for edge in graph.edges] == [("x", "n1"), ("n1", "n2"), ("n2", "n3")]
    space = SearchSpace("sources")
    x, y = space.input("x", torch.zeros(2, 3)), space.input("y", torch.zeros(2, 3))
    space.output(space.add("n", Call(concat), x, Choice("which", [x, y])))
    assert sorted((a, d["position"], d["choice"]) for a, _, d in space.graph().edges(data=True)) == [
        ("x", 0, None), ("x", 1, "which"), ("y", 1, "which"),
    ]  # fmt: skip


def variant(size=(1, 2), make=alpha, takes=None, ordered=False, name="v", output="n", constraint=None, shape=(2, 3)):
    space = SearchSpace(name)
    x = space.input("x", torch.zeros(shape))
    n = space.add("n", Op(make, takes=takes, size=Choice("size", size, ordered=ordered)), x, x)
    m = space.add("m", Op(make), n)
    space.output({"n": n, "m": m}[output])
    if constraint:
        space.constrain(constraint, lambda arch: True)
    return space


def test_the_fingerprint_follows_the_declaration():
    changes = [{"size": (1, 3)}, {"size": {"1": 1, "2": 2}}, {"make": beta}, {"takes": 1}, {"ordered": True},
               {"name": "w"}, {"output": "m"}, {"constraint": "c"}, {"shape": (2, 4)}]  # fmt: skip
    prints = [variant(**change).fingerprint() for change in ({}, *changes)]
    assert len(set(prints)) == len(prints)
    assert variant().fingerprint() == prints[0]


def test_fingerprints_and_hashes_survive_other_processes(tmp_path):
    """Another hash seed: the same fingerprint, and a pickled architecture is found in a set of its own there."""
    arch = deep().sample(random.Random(0))
    (tmp_path / "arch").write_bytes(pickle.dumps(arch))
    code = (
        "import pickle, sys, tests.test_space as t; arch = pickle.loads(open(sys.argv[1], 'rb').read());"
        "assert arch in {t.Architecture(dict(arch))};"
        "print(t.cell().fingerprint(), t.cell().sample(t.random.Random(7)).to_json())"
    )
    printed = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "arch")],
            env={**os.environ, "PYTHONHASHSEED": seed}, cwd=Path(__file__).parents[1], capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        printed.add(done.stdout.strip())
    assert printed == {f"{cell().fingerprint()} {cell().sample(random.Random(7)).to_json()}"}


def cell() -> SearchSpace:
    from nasgraph.search_spaces.nasbench201 import cell_space

    return cell_space()


def test_names_of_operations_are_the_shortest_that_find_them():
    assert make_name(nn.Linear) == "torch.nn.Linear"
    assert make_name(nn.functional.relu) == "torch.nn.functional.relu"
    assert make_name(torch.cat) == "torch.cat"
    assert make_name(SearchSpace) == "nasgraph.space.SearchSpace"
    assert make_name(functools.partial(nn.Linear, bias=False)) == 'torch.nn.Linear<[[], {"bias": false}]>'


def test_arguments_without_a_lasting_name_are_refused():
    space = SearchSpace("object")
    space.output(space.add("n", Op(alpha, size=object()), space.input("x", torch.zeros(2, 3))))
    with pytest.raises(SpaceError, match="no name that lasts"):
        space.key({})


def test_size_with_mirrored_switches():
    """Two switches that read one choice the other way round are not alike."""
    space = SearchSpace("mirror")
    x = space.input("x", None)
    c, w, z = Choice("c", ["a", "b"]), Choice("w", [1, 2, 3]), Choice("z", [1, 2, 3])
    d = Choice("d", {"p": Switch(c, {"a": w, "b": 4}), "q": Switch(c, {"b": w, "a": 4})})
    first = space.add("first", Op(make_layer, out_features=d), x)
    space.output(space.add("second", Op(make_layer, out_features=Switch(c, {"a": z, "b": 5})), first))
    assert space.size() == len(list(space.enumerate())) == 16


def test_a_constraint_that_raises_is_named():
    space = SearchSpace("bad")
    space.output(space.add("first", Op(make_layer, out_features=Choice("w", [1, 2])), space.input("x", None)))
    space.constrain("narrow", lambda arch: arch["nope"] < 3)
    with pytest.raises(SpaceError, match="constraint 'narrow' .* KeyError: 'nope'"):
        space.sample(random.Random(0))


def make_layer(out_features):
    raise AssertionError("never made")
