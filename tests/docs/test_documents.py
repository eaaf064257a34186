"""The documents against the project: links, paths, settings, tests, commands, the list of modules."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import config as configuration
from pipeline.base.cli import ToolParser
from pipeline.base.errors import UserError
from pipeline.config import reference
from pipeline.config.load import check_keys, flatten, known_keys
from support.documents import PAGES, anchors, blocks, commands, links, prose, text_of, words
from support.programs import ROOT

ARCHITECTURE = "docs/explanation/architecture.md"
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
PATH = r"(?<![\w/.])((?:pipeline|tools|tests|configs|ds_configs|benchmarks|docs|slurm)/[\w./]*[\w/])(?!\*)"
MADE_BY_USERS = {"slurm/site.env"}
WITHOUT_PARSER = {"guard_cost", "checkpoint_stall"}  # their arguments are settings of a run


@EACH_PAGE
def test_every_relative_link_resolves(page: Path) -> None:
    """To a file of the project, and to a heading in it."""
    for link in links(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs/README.md"
    linked = {(index.parent / link).resolve() for link in links(index.read_text(encoding="utf-8"))}
    assert {page for page in PAGES if ROOT / "docs" in page.parents} - linked == {index}


@EACH_PAGE
def test_every_path_exists(page: Path) -> None:
    """Of code, tools, tests, configurations and documents, wherever a page names one."""
    if page.name in ("CHANGELOG.md", "run_files.md", "CONTRIBUTING.md"):  # of the past, of a run, of recipes
        return
    text = page.read_text(encoding="utf-8")
    for path in re.findall(PATH, text):
        if path not in MADE_BY_USERS:
            assert (ROOT / path).exists(), path
    if str(page).endswith(ARCHITECTURE):  # which leaves pipeline/ out
        for path in re.findall(r"`([a-z_]+/[\w/]*(?:\.py)?)`", text):
            assert (ROOT / "pipeline" / path).exists() or (ROOT / path).exists(), path


@EACH_PAGE
def test_every_setting_exists(page: Path) -> None:
    """`section.key`, alone or with a value, and every YAML block."""
    text, known = page.read_text(encoding="utf-8"), known_keys()
    sections = {key for key in known if "." not in key}
    for key in re.findall(r"`(\w+\.\w+)(?:: [^`]*)?`", prose(text)):
        if key.split(".")[0] in sections and not key.endswith((".py", ".md", ".yaml")):
            assert key in known, key
    for block in blocks(text, "yaml"):
        check_keys(list(flatten(yaml.safe_load(block))), page.name)


def test_every_test_that_a_document_names_exists() -> None:
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))}
    written = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 20
    assert named <= written, sorted(named - written)


def test_the_settings_reference_is_what_the_code_says() -> None:
    assert text_of("docs/reference/settings.md") == reference.page(), "run make reference"


def test_the_architecture_lists_every_module() -> None:
    """Each module and package has a line of its own, and each line a module or package."""
    listed: dict[str, str] = {}
    folders: list[str] = []
    [tree] = [block for block in blocks(text_of(ARCHITECTURE), "") if block.startswith("pipeline/")]
    for line in tree.splitlines():
        indent, name, meaning = re.fullmatch(r"( *)(\S+)(?: {2,}(\S.*))?", line).groups()  # type: ignore[union-attr]
        folders = [*folders[: len(indent) // 2], name]
        listed["".join(folders)] = meaning
    assert all(listed[path] for path in listed if path != "pipeline/")
    modules = {path.relative_to(ROOT) for path in (ROOT / "pipeline").rglob("*.py")}
    packages = {f"{path.parent}/" for path in modules if path.name == "__init__.py"}
    named = [path for path in modules if path.name != "__init__.py"]
    assert len({path.name for path in named}) == len(named), "two modules have one name"
    expected = packages | {str(path) for path in named}
    missing, gone = sorted(expected - set(listed)), sorted(set(listed) - expected)
    assert not missing, f"{ARCHITECTURE} lacks a line for {missing}"
    assert not gone, f"{ARCHITECTURE} lists {gone}, which do not exist"


class Parsed(Exception):
    """A command line was accepted; the program is not run."""


@pytest.fixture
def only_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every tool and benchmark stop where its command line is read."""
    read: Callable[..., Any] = ToolParser.parse_args

    def parse_and_stop(parser: ToolParser, args: Any = None, namespace: Any = None) -> Any:
        read(parser, args, namespace)
        raise Parsed

    monkeypatch.setattr(ToolParser, "parse_args", parse_and_stop)
    monkeypatch.syspath_prepend(str(ROOT))


@EACH_PAGE
def test_every_command_is_accepted(
    page: Path, only_parse: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the parser of its program: options, choices, required arguments, and the settings of a training."""
    monkeypatch.chdir(ROOT)
    for command in commands(page.read_text(encoding="utf-8")):
        for part in command.split(" && "):
            try:
                accept(words(part))
            except (SystemExit, UserError) as error:
                pytest.fail(f"{part}\n{error}\n{capsys.readouterr().err}")


def accept(command: list[str]) -> None:
    """Have a command read by its program; those that are not the project's are left alone."""
    program, *rest = command
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert rest[0] in targets, command
    elif program == "sbatch":
        script = next(word for word in rest if word.endswith(".sbatch"))
        assert (ROOT / script).exists(), command
        if Path(script).name == "preprocess.sbatch":
            accept(["python", "tools/preprocess_data.py", *rest[rest.index(script) + 1 :]])
    elif Path(program).name in ("python", "torchrun"):
        places = [i for i, word in enumerate(rest) if word == "-m" or word.endswith(".py")]
        start = places[0]
        if rest[start] == "-m":
            accept_module(rest[start + 1], rest[start + 2 :])
        else:
            tool = Path(rest[start])
            assert (ROOT / tool).exists(), tool
            accept_program(f"tools.{tool.stem}", rest[start + 1 :])
    elif program.startswith("slurm/"):
        assert (ROOT / program).exists(), command


def accept_module(name: str, arguments: list[str]) -> None:
    """Have the settings of a training checked, and the arguments of a benchmark read."""
    if name != "pipeline.train":
        accept_program(name, arguments)
        return
    if "--help" in arguments:
        return
    files = [i for i, word in enumerate(arguments) if word == "--config"]
    made = [i for i in files if not (ROOT / arguments[i + 1]).exists()]  # by an earlier command
    assert len(made) < len(files), arguments
    without = {place for i in made for place in (i, i + 1)}
    configuration.load([word for i, word in enumerate(arguments) if i not in without])


def accept_program(module: str, arguments: list[str]) -> None:
    """Have the arguments of a tool or a benchmark read; another module must exist."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    package, _, name = module.partition(".")
    if spec.submodule_search_locations:
        module += ".__main__"
    if package in ("tools", "benchmarks") and name not in WITHOUT_PARSER:
        with pytest.raises(Parsed):
            importlib.import_module(module).main(arguments)
