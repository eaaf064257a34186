"""What pyproject.toml declares is what the code imports and what the lock pins."""

from __future__ import annotations

import ast
import os
import shutil
import sys
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import build_meta

from support.programs import ROOT

LOCKS = ("requirements.txt", "requirements-dev.txt")
NOT_IMPORTED = {  # what a package imports that does not declare it, or only for some of its versions
    "protobuf": "sentencepiece's description of a model",
    "tensorboard": "torch.utils.tensorboard",
}


@pytest.fixture(scope="module")
def about(tmp_path_factory: pytest.TempPathFactory) -> Message:
    """Return the metadata that an installation of this checkout would have."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        path = folder / build_meta.prepare_metadata_for_build_wheel(str(folder)) / "METADATA"
    finally:
        os.chdir(before)
    return Parser().parsestr(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def declared(about: Message) -> dict[str, dict[str, Requirement]]:
    """Return the requirements by extra ("" for none) and normalised name."""
    extras = ["", *about.get_all("Provides-Extra", [])]
    found: dict[str, dict[str, Requirement]] = {extra: {} for extra in extras}
    for line in about.get_all("Requires-Dist", []):
        each = Requirement(line)
        extra = next(e for e in extras if each.marker is None or each.marker.evaluate({"extra": e}))
        found[extra][canonicalize_name(each.name)] = each
    return found


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the top-level names that a module imports, each with the extra that it is imported under."""

    def visit(node: ast.AST, extra: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.With):
            for item in node.items:
                call = item.context_expr
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "extra":
                    extra = ast.literal_eval(call.args[0])
        elif isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], extra) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0], extra
        for child in ast.iter_child_nodes(node):
            yield from visit(child, extra)

    yield from visit(tree, "")


def third_party() -> Iterator[tuple[Path, str, str, set[str]]]:
    """Yield file, import, extra and the distributions that may bring it, for all imports of the product."""
    owners = packages_distributions()
    for folder in ("pipeline", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name, extra in imports(ast.parse(path.read_text(encoding="utf-8"))):
                if name in sys.stdlib_module_names or name in ("pipeline", "tools"):
                    continue
                if "remote_code" in path.parts:  # it becomes a part of exported models
                    extra = "hf"
                yield path, name, extra, {canonicalize_name(owner) for owner in owners.get(name, [name])}


def test_every_import_is_declared(declared: dict[str, dict[str, Requirement]]) -> None:
    """In the core, or in the extra that the import names."""
    seen = 0
    for path, name, extra, owners in third_party():
        seen += 1
        assert extra in declared, f"{path}: there is no extra {extra!r}"
        assert owners & {*declared[""], *declared[extra]}, f"{path}: {name} is not declared ({extra=})"
    assert seen > 100


def test_nothing_is_declared_in_vain(declared: dict[str, dict[str, Requirement]]) -> None:
    needed = {owner for _, _, _, owners in third_party() for owner in owners} | set(NOT_IMPORTED)
    for extra, requirements in declared.items():
        if extra != "dev":
            assert set(requirements) <= needed, extra


def test_every_pin_lies_within_its_range(declared: dict[str, dict[str, Requirement]]) -> None:
    """A pin belongs to one declared package; all that `make demo` and `make test` need is pinned."""
    ranges = {name: each for requirements in declared.values() for name, each in requirements.items()}
    pinned: dict[str, set[str]] = {}
    for lock in LOCKS:
        pinned[lock] = set()
        for line in (ROOT / lock).read_text(encoding="utf-8").splitlines():
            if not (text := line.partition("#")[0].strip()):
                continue
            pin = Requirement(text)
            [specifier] = pin.specifier
            name = canonicalize_name(pin.name)
            assert specifier.operator == "=="
            assert name in ranges, f"{lock}: {text} is not declared in pyproject.toml"
            assert specifier.version in ranges[name].specifier, f"{text} is outside of {ranges[name]}"
            pinned[lock].add(name)
    assert set(declared[""]) <= pinned[LOCKS[0]]
    # triton: the Makefile installs it where torch has not brought its own.
    assert set(ranges) - {"puma-pipeline", "wandb", "triton"} == pinned[LOCKS[0]] | pinned[LOCKS[1]]


def test_development_needs_all_that_tests_import(declared: dict[str, dict[str, Requirement]]) -> None:
    """`dev` brings the other extras; wandb is stood in for."""
    assert declared["dev"]["puma-pipeline"].extras == set(declared) - {"", "dev", "wandb"}


def test_python_is_bounded_as_in_the_makefile(about: Message) -> None:
    assert about["Requires-Python"] == "<3.13,>=3.10"
    assert "(3, 10) <= v <= (3, 12)" in (ROOT / "Makefile").read_text(encoding="utf-8")
