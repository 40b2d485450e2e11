"""Names to objects, and what a user is told when a name is wrong."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nasgraph import errors, registry
from nasgraph.errors import ConfigError
from nasgraph.objectives import Objective

_numbers = itertools.count()


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes a module into the working directory and returns its name, which no other test has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)

    def write(text: str) -> str:
        name = f"users_file_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("users_"):
            del sys.modules[name]


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_installed_name_resolves(kind: str) -> None:
    assert registry.names(kind) == sorted(registry.names(kind)) != []
    for name in registry.names(kind):
        found = registry.resolve(kind, name)
        assert isinstance(found, Objective) if kind == "objectives" else callable(found), name


def test_a_misspelt_name_is_refused_with_the_nearest_and_all_known_names() -> None:
    with pytest.raises(ConfigError) as caught:
        registry.check("spaces", "gnn_nod")
    message = str(caught.value)
    assert message.startswith("unknown space 'gnn_nod'. Did you mean 'gnn_node'? Known: ")
    assert all(name in message for name in registry.names("spaces"))
    assert "\n" not in message


def test_the_kind_is_named_in_the_singular() -> None:
    for kind, word in (("proxies", "proxy"), ("tasks", "task"), ("objectives", "objective")):
        with pytest.raises(ConfigError, match=f"^unknown {word} 'zzzzzzzz'. Known: "):
            registry.check(kind, "zzzzzzzz")


def test_a_name_of_another_kind_is_unknown() -> None:
    registry.check("proxies", "gradsign")
    with pytest.raises(ConfigError, match="unknown objective 'gradsign'"):
        registry.check("objectives", "gradsign")


def test_a_kind_that_does_not_exist_is_a_bug_of_the_caller() -> None:
    with pytest.raises(KeyError, match="no such kind"):
        registry.names("flavours")


def test_users_own_code_is_found_in_the_working_directory(user_module: Callable[[str], str]) -> None:
    name = user_module("def mine(): return 7\nclass Nested:\n    value = 3\n")
    assert registry.resolve("spaces", f"{name}:mine")() == 7
    assert registry.resolve("spaces", f"{name}:Nested.value") == 3


def test_a_users_folder_called_search_spaces_does_not_hide_the_catalogue(
    user_module: Callable[[str], str], tmp_path: Path
) -> None:
    package = tmp_path / "search_spaces"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mine.py").write_text("def space(): return 'the user'\n")
    try:
        assert registry.resolve("spaces", "search_spaces.mine:space")() == "the user"
        assert registry.resolve("spaces", "gnn_node").__module__ == "nasgraph.search_spaces.gnn_node"
    finally:
        for name in ("search_spaces", "search_spaces.mine"):
            sys.modules.pop(name, None)


def test_check_imports_nothing(user_module: Callable[[str], str]) -> None:
    name = user_module("raise RuntimeError('imported')\n")
    registry.check("tasks", f"{name}:mine")
    assert name not in sys.modules


@pytest.mark.parametrize("name", [":mine", "module:", "folder/file.py:x", "a:b:c", "a b:c", ".relative:x", "a..b:c"])
def test_what_is_not_module_attribute_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="module:attribute"):
        registry.resolve("spaces", name)


def test_a_missing_module_is_named_with_where_we_looked(user_module: Callable[[str], str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.resolve("spaces", "users_absent.file:mine")
    assert "there is no module users_absent.file" in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_module_that_needs_another_says_which(user_module: Callable[[str], str]) -> None:
    name = user_module("import users_absent_dependency\n")
    with pytest.raises(ConfigError, match=f"{name} needs users_absent_dependency, which is not installed"):
        registry.resolve("spaces", f"{name}:mine")


def test_a_missing_attribute_gets_a_suggestion(user_module: Callable[[str], str]) -> None:
    name = user_module("def my_space(): ...\nnumber = 5\n")
    with pytest.raises(ConfigError, match=f"{name} has no my_spcae. Did you mean 'my_space'"):
        registry.resolve("spaces", f"{name}:my_spcae")
    with pytest.raises(ConfigError, match="has no number.absent"):
        registry.resolve("spaces", f"{name}:number.absent")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\nx = = 2\n", r"SyntaxError: .*line 2\)"),
        ("\n\nvalue = 1 / 0\n", r"ZeroDivisionError: .*line 3\)"),
        ("raise ValueError('two\\nlines')\n", r"ValueError: two lines .*line 1\)"),
    ],
)
def test_a_module_that_fails_says_where_in_one_line(user_module: Callable[[str], str], text: str, told: str) -> None:
    name = user_module(text)
    with pytest.raises(ConfigError, match=told) as caught:
        registry.resolve("spaces", f"{name}:mine")
    assert "\n" not in str(caught.value) and f"{name}.py" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("gcm", " Did you mean 'gcn'?"), ("GCN", " Did you mean 'gcn'?"), ("sage", " Did you mean 'SAGE'?"), ("qqqq", "")],
)
def test_did_you_mean(name: str, suggestion: str) -> None:
    assert errors.did_you_mean(name, iter(["gcn", "gat", "SAGE"])) == suggestion


def test_did_you_mean_of_nothing() -> None:
    assert errors.did_you_mean("gcn", []) == ""


def test_users_mistakes_have_one_base_class_and_failures_of_candidates_are_not_among_them() -> None:
    mistakes = [errors.ConfigError, errors.SpaceError, errors.DataError, errors.DamagedFile, errors.ExportError]
    assert all(issubclass(mistake, errors.NasgraphError) for mistake in [*mistakes, errors.SearchStopped])
    assert issubclass(errors.NotFinite, ValueError) and not issubclass(errors.NotFinite, errors.NasgraphError)
