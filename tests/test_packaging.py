"""What is installed is what is in the repository, under the names that we promise."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nasgraph

ROOT = Path(__file__).parents[1]
MAPPED = {"search_spaces": "nasgraph/search_spaces", "predictors": "nasgraph/predictors", "configs": "nasgraph/configs"}


def run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Files of the working tree that git does not ignore, symlinks among them."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git and a checkout: the wheel is compared with what git knows")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout
    return sorted(name for name in set(listed.split("\0")) - {""} if os.path.lexists(ROOT / name))


@pytest.fixture(scope="module")
def wheel(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from an sdist that is built from a clean copy: no stale ``build/`` folder can help it."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", source, cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of an environment with the wheel that sees this one's dependencies, but not the checkout."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=folder.parent)
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).stdout.strip()
    Path(purelib, "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # its .pth files are not read
    return folder / "bin"


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(wheel: Path, tracked: list[str]) -> None:
    expected = set()
    for name in tracked:
        folder, _, inner = name.partition("/")
        if (ROOT / name).is_symlink() or name.endswith(".md") or folder not in {"nasgraph", *MAPPED}:
            continue
        expected.add(f"{MAPPED.get(folder, folder)}/{inner}")
    assert {"nasgraph/py.typed", "nasgraph/search_spaces/__init__.py", "nasgraph/configs/quickstart.yaml"} <= expected
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        licenses = [name for name in archive.namelist() if name.endswith("dist-info/licenses/LICENSE")]
    assert found == expected
    assert licenses


def test_the_wheel_works_in_an_empty_folder(installed: Path, metadata: Message, tmp_path: Path) -> None:
    code = """
import pathlib, nasgraph, nasgraph.search_spaces, nasgraph.predictors
from nasgraph import registry
folder = pathlib.Path(nasgraph.__file__).parent
print(folder)
for package in (nasgraph.search_spaces, nasgraph.predictors):
    assert pathlib.Path(package.__file__).parent.parent == folder
assert (folder / "configs" / "quickstart.yaml").is_file()
assert all(registry.names(kind) for kind in registry.KINDS)
"""
    folder = run(installed / "python", "-c", code, cwd=tmp_path).stdout.strip()
    assert Path(folder).is_relative_to(installed.parent)
    version = run(installed / "nasgraph", "--version", cwd=tmp_path).stdout.split()
    assert version == ["nasgraph", metadata["Version"]] == ["nasgraph", nasgraph.__version__]


def test_a_users_folders_of_the_same_names_do_not_hide_ours(installed: Path, tmp_path: Path) -> None:
    for name in ("search_spaces", "predictors", "configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "search_spaces" / "mine.py").write_text("def space(): return 'the user'\n")
    code = """
from nasgraph import registry
assert registry.resolve("spaces", "search_spaces.mine:space")() == "the user"
assert registry.resolve("spaces", "gnn_node").__module__ == "nasgraph.search_spaces.gnn_node"
"""
    run(installed / "python", "-c", code, cwd=tmp_path)


@pytest.mark.parametrize("name", ["search_spaces", "predictors"])
def test_a_catalogue_refuses_its_own_name(name: str) -> None:
    done = run(sys.executable, "-c", f"import {name}", cwd=ROOT, check=False)
    assert done.returncode == 1
    assert f"ImportError: import this package as nasgraph.{name}, not as {name}" in done.stderr


@pytest.mark.parametrize("name", MAPPED)
def test_the_links_for_type_checkers_are_committed_as_links(name: str, tracked: list[str]) -> None:
    link = ROOT / "nasgraph" / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}"
    assert run("git", "ls-files", "--stage", f"nasgraph/{name}", cwd=ROOT).stdout.startswith("120000 ")


def third_party_imports(path: Path) -> set[str]:
    """Top-level names of what a file imports anywhere, without the standard library and nasgraph itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"nasgraph"}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported(metadata: Message, tracked: list[str]) -> None:
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    core = {canonicalize_name(each.name) for each in requirements if each.marker is None}
    optional = {canonicalize_name(each.name) for each in requirements if each.marker and "dev" not in str(each.marker)}
    distributions = packages_distributions()
    imported: set[str] = set()
    for name in tracked:
        if name.endswith(".py") and name.partition("/")[0] in {"nasgraph", "search_spaces", "predictors"}:
            if name == "nasgraph/testing.py":
                continue  # exams for plug-ins: for those who have pytest
            for module in third_party_imports(ROOT / name):
                owners = {canonicalize_name(each) for each in distributions.get(module, [module])}
                assert owners & (core | optional), f"{name} imports {module}, which pyproject.toml does not declare"
                imported |= owners
    at_run_time = {"onnx", "onnxscript", "onnxruntime"}  # by torch.onnx.export, and by the source of an exported loader
    assert core - imported - at_run_time == set()


def test_every_dependency_has_a_lower_bound_and_a_tested_version_above_it(metadata: Message) -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (specifier,) = pin.specifier
            assert specifier.operator == "==" and "+" not in specifier.version, f"{line}: one public version is needed"
            pins[canonicalize_name(pin.name)] = specifier.version
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    assert len(requirements) > 10
    for requirement in requirements:
        if requirement.marker and "dashboard" in str(requirement.marker):
            continue  # not needed by any test
        assert {each.operator for each in requirement.specifier} <= {">="}, f"{requirement}: lower bounds only"
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_make_and_readme_name_the_same_commands() -> None:
    makefile, readme = (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    used = set(re.findall(r"^\s*make (\w+)", readme, re.MULTILINE))
    assert {"search", "test"} <= used <= targets
