"""Code that an export ships: imports from this package become the source of what they name."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections import defaultdict
from pathlib import Path

import pipeline

PACKAGE = pipeline.__name__
ROOT = Path(pipeline.__file__).parents[1]


class _Module:
    """A parsed module.

    Attributes:
        path: its file.
        tree: its syntax tree.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)

    @functools.cached_property
    def definitions(self) -> dict[str, ast.stmt]:
        """The statement that defines each name of the module."""
        found: dict[str, ast.stmt] = {}
        for statement in self.tree.body:
            if isinstance(statement, ast.FunctionDef | ast.ClassDef):
                found[statement.name] = statement
            elif isinstance(statement, ast.Assign | ast.AnnAssign):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                names = (
                    node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)
                )
                found |= dict.fromkeys(names, statement)
        return found

    @functools.cached_property
    def imports(self) -> dict[str, tuple[str, str | None]]:
        """Module and name behind each imported name; no name for ``import module``."""
        found: dict[str, tuple[str, str | None]] = {}
        for statement in self.tree.body:
            if isinstance(statement, ast.ImportFrom):
                module = "." * statement.level + (statement.module or "")
                found |= {alias.asname or alias.name: (module, alias.name) for alias in statement.names}
            elif isinstance(statement, ast.Import):
                found |= {
                    alias.asname or alias.name.split(".")[0]: (alias.name, None) for alias in statement.names
                }
        return found

    def source(self, statement: ast.stmt) -> str:
        """Return the source of a statement with its decorators and the comment above it."""
        lines = self.text.splitlines()
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))]) - 1
        while first and lines[first - 1].startswith("#"):
            first -= 1
        return "\n".join(lines[first : statement.end_lineno])


class _Collector:
    """The definitions that some names need, in the order of their modules."""

    def __init__(self) -> None:
        self.needed: dict[str, dict[str, ast.stmt]] = defaultdict(dict)  # by module and name
        self.uses: dict[str, set[str]] = defaultdict(set)  # modules of this package that a module uses
        self.outside: dict[str, set[str | None]] = defaultdict(set)  # names imported from other packages
        self.owners: dict[str, str] = {}

    def need(self, where: str, name: str) -> str:
        """Collect a name of a module with all that it needs; return the module that defines it."""
        module = _parsed(where)
        if name not in module.definitions:
            origin, original = module.imports[name]
            assert original == name, f"{where}: {name} is imported under another name"
            return self.need(origin, name)
        owner = self.owners.setdefault(name, where)
        assert owner == where, f"{name} is defined in {where} and in {owner}: rename one of them"
        if name not in self.needed[where]:
            statement = self.needed[where][name] = module.definitions[name]
            for node in ast.walk(statement):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    self._need_attribute(node.value.id, node.attr, where)
                elif isinstance(node, ast.Name):
                    self._need_used(node.id, where)
        return where

    def _need_attribute(self, module: str, name: str, where: str) -> None:
        """Collect a name of an imported module, such as ``noise.uniform``."""
        origin, imported = _parsed(where).imports.get(module, ("", None))
        if _is_module(origin, imported):
            self.uses[where].add(self.need(f"{origin}.{imported}", name))

    def _need_used(self, name: str, where: str) -> None:
        """Collect a name that the code of a module uses, if it is no local or built-in one."""
        module = _parsed(where)
        if name in module.definitions:
            self.need(where, name)
        elif name in module.imports:
            origin, imported = module.imports[name]
            if not origin.startswith(PACKAGE):
                self.outside[origin].add(imported)
            elif not _is_module(origin, imported):
                self.uses[where].add(self.need(origin, name))

    def ordered(self) -> list[str]:
        """Return the modules, each one behind those that it uses."""
        found: list[str] = []

        def visit(where: str) -> None:
            if where not in found:
                for used in sorted(self.uses[where] - {where}):
                    visit(used)
                found.append(where)

        for where in list(self.needed):
            visit(where)
        return found

    def section(self, where: str) -> str:
        """Return the source of the needed definitions of a module."""
        module = _parsed(where)
        statements = sorted(set(self.needed[where].values()), key=lambda statement: statement.lineno)
        parts = [f"# {module.path.relative_to(ROOT).as_posix()}\n# {_summary(module.tree)}\n"]
        for before, statement in zip([None, *statements], statements, strict=False):
            constants = [isinstance(one, ast.Assign | ast.AnnAssign) for one in (before, statement)]
            blank = 0 if all(constants) else 1 if constants[1] and before is None else 2
            parts.append("\n" * blank + module.source(statement) + "\n")
        text = "".join(parts)
        for alias, (origin, name) in module.imports.items():
            if _is_module(origin, name):  # its definitions are in the same file now
                text = re.sub(rf"\b{alias}\.(\w+)", r"\1", text)
        return text


def standalone(path: Path) -> str:
    """Return the code of a file; if it imports from this package, with the source in place of the imports.

    Such a file holds nothing else than imports and ``__all__``. Of each module comes only what is needed.
    """
    module = _Module(path)
    names = {name: origin for name, (origin, _) in module.imports.items() if origin.startswith(PACKAGE)}
    if not names:
        return module.text
    collector = _Collector()
    for name, origin in names.items():
        collector.need(origin, name)
    exported = module.source(module.definitions["__all__"])
    sections = [collector.section(where) for where in collector.ordered()]
    head = f'"""{ast.get_docstring(module.tree)}"""\n\nfrom __future__ import annotations\n\n'
    return head + _imports(collector.outside) + "\n" + "\n\n".join([*sections, exported + "\n"])


def _imports(outside: dict[str, set[str | None]]) -> str:
    """Return the import statements: first those of the standard library, then the others."""
    groups: tuple[list[str], list[str]] = [], []
    for module, names in sorted(outside.items(), key=lambda item: (None not in item[1], item[0])):
        lines = groups[module.split(".")[0] not in sys.stdlib_module_names]
        if None in names:
            lines.append(f"import {module}\n")
        chosen = sorted(name for name in names if name is not None)
        if chosen:
            lines.append(f"from {module} import {', '.join(chosen)}\n")
    return "\n".join("".join(lines) for lines in groups)


@functools.cache
def _parsed(where: str) -> _Module:
    return _Module(_file_of(where))


def _is_module(origin: str, name: str | None) -> bool:
    return origin.startswith(PACKAGE) and name is not None and _file_of(f"{origin}.{name}").is_file()


def _file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _summary(tree: ast.Module) -> str:
    return (ast.get_docstring(tree) or "").splitlines()[0]
