"""A model as a readable Python file that needs torch, safetensors and the libraries its layers come from."""

from __future__ import annotations

import enum
import functools
import inspect
import keyword
import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from nasgraph.build import Made
from nasgraph.errors import ExportError
from nasgraph.export import placed, weights
from nasgraph.export.base import Outgoing, Written, shape_text
from nasgraph.export.sources import Names
from nasgraph.model_space import Base

FILE = "model.py"
EXAMPLE = "example.safetensors"
WIDTH = 110
OWN_NAMES = frozenset({"Model", "load"})
IMPORTS = {  # what every file uses
    "Path": "from pathlib import Path",
    "torch": "import torch",
    "load_file": "from safetensors.torch import load_file",
    "Tensor": "from torch import Tensor",
    "nn": "from torch import nn",
}

RELOAD = """
def load(path):
    import importlib.util
    import sys

    spec = importlib.util.spec_from_file_location("exported_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["exported_model"] = module  # torch_geometric looks there for the types in a layer's signature
    spec.loader.exec_module(module)
    return module.load()
"""

# What operators of the model's code are written as; the places are filled with the operands.
INFIX: dict[Any, str] = {
    operator.add: "{} + {}",
    operator.iadd: "{} + {}",
    operator.sub: "{} - {}",
    operator.mul: "{} * {}",
    operator.imul: "{} * {}",
    operator.truediv: "{} / {}",
    operator.floordiv: "{} // {}",
    operator.mod: "{} % {}",
    operator.pow: "{} ** {}",
    operator.matmul: "{} @ {}",
    operator.and_: "{} & {}",
    operator.or_: "{} | {}",
    operator.eq: "{} == {}",
    operator.ne: "{} != {}",
    operator.lt: "{} < {}",
    operator.le: "{} <= {}",
    operator.gt: "{} > {}",
    operator.ge: "{} >= {}",
    operator.neg: "-{}",
    operator.invert: "~{}",
}


def export(outgoing: Outgoing, folder: Path) -> Written:
    """Write ``model.py``, and beside it the weights that it loads and an example of its inputs.

    Raises: ExportError: an operation whose source cannot be copied or imported; names it.
    """
    if not (folder / weights.FILE).exists():
        weights.export(outgoing, folder)
    text = source(outgoing)
    write_example(outgoing, folder)
    (folder / FILE).write_text(text, encoding="utf-8")
    return Written(folder / FILE, RELOAD, tolerance=0.0)


def write_example(outgoing: Outgoing, folder: Path) -> None:
    """Write ``example.safetensors``: a small input."""
    from safetensors.torch import save_file

    examples = {n: t.contiguous() for n, t in zip(outgoing.names, outgoing.examples, strict=True)}
    save_file(examples, folder / EXAMPLE)


def source(
    outgoing: Outgoing, file: str = weights.FILE, loading: Sequence[str] = (), uses: Sequence[Callable[..., Any]] = ()
) -> str:
    """The text of ``model.py``: a class ``Model``, a function ``load``, and what they need.

    Args:
        file: the file of the weights.
        loading: lines between ``model = Model()`` and ``return model.eval()``; default: ``file`` is its state.
        uses: functions that ``loading`` calls; they are copied.
    """
    calls = placed.calls(outgoing.model.meta.get("calls", {}), outgoing.model)
    names = Names(OWN_NAMES)
    for name, statement in IMPORTS.items():
        names.need(name, statement, "an import that every exported file has")
    for function in uses:
        names.embed(function)
    for thing in _named_things(outgoing.model.graph, calls):  # copies first: their names cannot be changed
        names.embed(thing)
    submodules = [_submodule(name, calls, outgoing.model, names) for name in _submodules(outgoing.model.graph)]
    forward = _forward(outgoing.model.graph, names)
    parts = [
        _docstring(outgoing, file),
        "from __future__ import annotations",
        _imports(names),
        *names.in_order(),
        _model(outgoing, submodules, forward),
        _load(file, loading or _state(outgoing)),
        _main(outgoing),
    ]
    return "\n\n\n".join(["\n\n".join(parts[:3]), *parts[3:]]) + "\n"


def functions(docstring: str, uses: Sequence[Callable[..., Any]]) -> str:
    """The text of a file that has ``uses`` and what they need, and no model."""
    names = Names()
    for function in uses:
        names.embed(function)
    head = [f'"""{docstring}"""', "from __future__ import annotations", _imports(names)]
    return "\n\n\n".join(["\n\n".join(head), *names.in_order()]) + "\n"


# ---- the parts of the file --------------------------------------------------------------------------------------


def _docstring(outgoing: Outgoing, file: str) -> str:
    parameters = sum(parameter.numel() for parameter in outgoing.model.parameters())
    choices = ", ".join(f"{name}={label}" for name, label in sorted(outgoing.architecture.items()))
    lines = [
        f"An architecture of the search space {outgoing.space.name}, found with nasgraph.",
        "",
        *_wrapped(f"Choices: {choices or 'none'}", 112),
        f"Canonical key: {outgoing.key}",
        "Inputs: " + "; ".join(f"{name} {shape}" for name, shape in _shapes(outgoing)),
        f"Parameters: {parameters:,}",
        *(f"{name}: {value}" for name, value in outgoing.metrics.items()),
        "",
        f"``load()`` returns it with the weights of {file}, which lies beside this file.",
    ]
    text = "\n".join(lines).replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    return f'"""{text}\n"""'


def _imports(names: Names) -> str:
    plain = set()
    bound: dict[str, set[str]] = {}
    for statement in set().union(*names.imports.values()):
        if statement.startswith("import "):
            plain.add(statement)
        else:
            module, _, name = statement.removeprefix("from ").partition(" import ")
            bound.setdefault(module, set()).add(name)
    lines = [*sorted(plain), *(f"from {module} import {', '.join(sorted(bound[module]))}" for module in sorted(bound))]
    standard = [line for line in lines if line.split()[1].partition(".")[0] in sys.stdlib_module_names]
    return "\n".join([*standard, "", *(line for line in lines if line not in standard)])


def _model(outgoing: Outgoing, submodules: list[str], forward: list[str]) -> str:
    arguments = ", ".join(f"{_argument(name)}: Tensor" for name in outgoing.names)
    shapes = ", ".join(f"{name} ``{shape}``" for name, shape in _shapes(outgoing))
    body = [
        "class Model(nn.Module):",
        f'    """Inputs: {shapes}."""',
        "",
        "    def __init__(self) -> None:",
        "        super().__init__()",
        *submodules,
        "",
        f"    def forward(self, {arguments}) -> Tensor:",
        *forward,
    ]
    return "\n".join(body)


def _load(file: str, loading: Sequence[str]) -> str:
    lines = [
        "def load(folder: str | Path | None = None) -> Model:",
        f'    """The model in eval mode, weights from {file} in ``folder`` (default: beside this file)."""',
        f'    file = (Path(folder) if folder else Path(__file__).resolve().parent) / "{file}"',
        "    model = Model()",
        *(f"    {line}" for line in loading),
        "    return model.eval()",
    ]
    return "\n".join(lines)


def _state(outgoing: Outgoing) -> list[str]:
    shared = weights.shared_tensors(outgoing.model.state_dict())
    return [
        "weights = load_file(file)",
        *(f"weights[{name!r}] = weights[{kept!r}]  # one tensor, two names" for name, kept in shared.items()),
        "model.load_state_dict(weights)",
    ]


def _main(outgoing: Outgoing) -> str:
    given = ", ".join(f'example["{name}"]' for name in outgoing.names)
    return "\n".join(
        [
            'if __name__ == "__main__":',
            f'    example = load_file(Path(__file__).resolve().parent / "{EXAMPLE}")',
            "    with torch.no_grad():",
            f"        output = load()({given})",
            '    print("output", tuple(output.shape))',
        ]
    )


def _shapes(outgoing: Outgoing) -> Iterator[tuple[str, str]]:
    for name, example, dynamic in zip(outgoing.names, outgoing.examples, outgoing.dynamic, strict=True):
        yield name, shape_text(example, dynamic)


# ---- __init__ and forward ---------------------------------------------------------------------------------------


def _submodules(graph: fx.Graph) -> list[str]:
    return list(dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "call_module"))


def _submodule(name: str, calls: Mapping[str, Made], model: nn.Module, names: Names) -> str:
    if name not in calls:
        raise ExportError(f"nothing tells how the submodule '{name}' was made: export models that build() made")
    try:
        call = _value(calls[name], names)
    except ExportError as error:
        raise ExportError(f"node '{name}': {error}") from None
    types = {t.dtype for t in model.get_submodule(name).state_dict().values() if t.is_floating_point()}
    if len(types) == 1 and types != {torch.float32}:
        call += f".to({types.pop()})"
    text = f"        self.{name} = {call}"
    return text if len(text) <= WIDTH else "\n".join(_broken(text, 8))


def _forward(graph: fx.Graph, names: Names) -> list[str]:
    for node in graph.nodes:
        if node.op == "call_function" and node.target not in INFIX:
            names.reference(node.target)
    variables: dict[fx.Node, str] = {}
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"        return {_value(node.args[0], names, variables)}")
            continue
        wanted = str(node.target) if node.op in ("placeholder", "call_module") else node.name
        variables[node] = _unused(_argument(wanted), {*variables.values(), *names.bound, "self"})
        if node.op != "placeholder":
            text = f"        {variables[node]} = {_operation(node, names, variables)}"
            lines.extend([text] if len(text) <= WIDTH else _broken(text, 8))
    return lines


def _operation(node: fx.Node, names: Names, variables: Mapping[fx.Node, str]) -> str:
    arguments = [_value(argument, names, variables) for argument in node.args]
    keywords = [f"{name}={_value(argument, names, variables)}" for name, argument in node.kwargs.items()]
    if node.op == "call_module":
        return f"self.{node.target}({', '.join(arguments + keywords)})"
    if node.op == "call_method":
        return f"{arguments[0]}.{node.target}({', '.join(arguments[1:] + keywords)})"
    if node.op != "call_function":
        raise ExportError(f"'{node.name}' is a {node.op} of the graph, which cannot be written as code")
    if node.target in INFIX:
        return INFIX[node.target].format(*(f"({a})" if a.startswith("-") else a for a in arguments))
    if node.target is operator.getitem:
        return f"{arguments[0]}[{arguments[1]}]"
    if node.target is getattr:
        return f"{arguments[0]}.{node.args[1]}"
    assert callable(node.target)
    return f"{names.reference(node.target)}({', '.join(arguments + keywords)})"


def _argument(name: str) -> str:
    return name + "_" if keyword.iskeyword(name) else name


def _unused(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


# ---- values -----------------------------------------------------------------------------------------------------


def _value(thing: Any, names: Names, variables: Mapping[fx.Node, str] | None = None) -> str:
    """``thing`` as an expression. Raises: ExportError: it has no text that gives it back."""

    def write(item: Any) -> str:
        return _value(item, names, variables)

    if isinstance(thing, fx.Node):
        return (variables or {})[thing]
    if isinstance(thing, Base):
        if thing.made is None:
            raise ExportError(
                f"code cannot make {thing}: declare the space with from_module(..., make=Op(MyModel, ...))"
            )
        return write(thing.made)
    if isinstance(thing, Made):
        return _call(thing.make, thing.kwargs, write, names)
    if isinstance(thing, functools.partial):
        names.need("functools", "import functools", "the standard library's")
        arguments = [write(item) for item in thing.args] + [f"{n}={write(item)}" for n, item in thing.keywords.items()]
        return f"functools.partial({', '.join([names.reference(thing.func), *arguments])})"
    if isinstance(thing, enum.Enum):
        return f"{names.reference(type(thing))}.{thing.name}"
    if isinstance(thing, float) and not math.isfinite(thing):
        return f'float("{thing}")'
    if thing is None or thing is Ellipsis or isinstance(thing, bool | int | float | complex | str | bytes):
        return "..." if thing is Ellipsis else repr(thing)
    if isinstance(thing, torch.dtype | torch.layout | torch.memory_format):
        return str(thing)
    if isinstance(thing, torch.device):
        return f"torch.device({str(thing)!r})"
    if isinstance(thing, slice):
        parts = [write(item) for item in (thing.start, thing.stop, thing.step)]
        return f"slice({', '.join(parts)})"
    if isinstance(thing, tuple):
        return f"({', '.join(map(write, thing))}{',' * (len(thing) == 1)})"
    if isinstance(thing, list):
        return f"[{', '.join(map(write, thing))}]"
    if isinstance(thing, set | frozenset):
        return f"{type(thing).__name__}([{', '.join(sorted(map(write, thing)))}])"
    if isinstance(thing, Mapping):
        return "{" + ", ".join(f"{write(key)}: {write(item)}" for key, item in thing.items()) + "}"
    if callable(thing) and not isinstance(thing, nn.Module):
        return names.reference(thing)
    raise ExportError(f"an argument of type {type(thing).__name__} cannot be written as code: {str(thing)[:60]}")


def _call(make: Callable[..., Any], kwargs: Mapping[str, Any], write: Callable[[Any], str], names: Names) -> str:
    positional: list[str] = []
    while isinstance(make, functools.partial):
        positional = [write(argument) for argument in make.args] + positional
        kwargs = {**make.keywords, **kwargs}
        make = make.func
    order = _parameters(make)
    by_place = sorted(kwargs, key=lambda name: order.index(name) if name in order else len(order))
    arguments = positional + [f"{name}={write(kwargs[name])}" for name in by_place]
    return f"{names.reference(make)}({', '.join(arguments)})"


def _parameters(make: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(make).parameters)
    except ValueError:  # written in C
        return []


def _named_things(graph: fx.Graph, calls: Mapping[str, Made]) -> Iterator[Any]:
    """Every class and function that the model's code will name."""

    def inside(thing: Any) -> Iterator[Any]:
        if isinstance(thing, functools.partial):
            yield from inside((thing.func, thing.args, thing.keywords))
        elif isinstance(thing, Base):
            yield from inside(thing.made)
        elif isinstance(thing, Made):
            yield from inside((thing.make, thing.kwargs))
        elif isinstance(thing, Mapping):
            yield from inside(tuple(thing.values()))
        elif isinstance(thing, list | tuple | set):
            for item in thing:
                yield from inside(item)
        elif isinstance(thing, enum.Enum):
            yield type(thing)
        elif callable(thing) and not isinstance(thing, nn.Module | torch.dtype):
            yield thing

    for name in _submodules(graph):
        yield from inside(calls.get(name))
    for node in graph.nodes:
        if node.op == "call_function" and node.target not in INFIX and node.target not in (operator.getitem, getattr):
            yield node.target


# ---- layout -----------------------------------------------------------------------------------------------------


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _broken(text: str, indent: int) -> list[str]:
    """A line that is too long, broken at the commas of its first call or dict, and those lines again."""
    start = min((place for place in (text.find("(", indent), text.find("{", indent)) if place >= 0), default=-1)
    if len(text) <= WIDTH or start < 0:
        return [text]
    depth, quote, pieces, piece = 0, "", [], ""
    for position in range(start, len(text)):
        letter = text[position]
        if quote:
            quote = "" if letter == quote and text[position - 1] != "\\" else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        if depth == 0:
            break
        if letter == "," and depth == 1 and not quote:
            pieces.append(piece.strip())
            piece = ""
        elif position > start:
            piece += letter
    pieces.append(piece.strip())
    inner = " " * (indent + 4)
    lines = [line for piece in pieces if piece for line in _broken(f"{inner}{piece},", indent + 4)]
    return [text[: start + 1], *lines, " " * indent + text[position:]]
