"""Write the settings reference as Markdown from the dataclasses and their docstrings (``make reference``)."""

from __future__ import annotations

import dataclasses
import sys
import typing
from typing import Any

import jsonargparse
import yaml

from pipeline.config.data import PhaseConfig
from pipeline.config.load import Config, described
from pipeline.config.run import TaskConfig
from pipeline.config.training import LargerBatchConfig

HEAD = """\
# Settings

<!-- Written by `make reference` from the docstrings in pipeline/config/: edit those, not this page. -->

Every key of a run's YAML, by section. `--section.key VALUE` on the command line overrides the file. Unknown
keys, values out of range and settings without effect are refused before a run starts.
`python -m pipeline.train --help` prints the same.
"""


def page() -> str:
    """Return the reference page: a table for the top-level keys and one per section."""
    sections = typing.get_type_hints(Config)
    parts = [HEAD, _section("run", Config)]
    parts += [_section(name, hint) for name, hint in sections.items() if dataclasses.is_dataclass(hint)]
    parts += [_section("data.phases", PhaseConfig), _section("train.batch_ramp", LargerBatchConfig)]
    parts += [_section("evaluation.tasks", TaskConfig)]
    return "\n".join(parts)


def _section(name: str, cls: Any) -> str:
    """Return heading, description and table of one dataclass, without its nested sections."""
    help_of = meanings(cls)
    lines = [
        f"## {name}",
        "",
        cls.__doc__.splitlines()[0],
        "",
        "| key | value | default | meaning |",
        "|---|---|---|---|",
    ]
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(hints[item.name]):
            cells = [f"`{item.name}`", described(hints[item.name]), _default(item), help_of[item.name]]
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def meanings(cls: Any) -> dict[str, str]:
    """Return what the docstring of a dataclass says of each field."""
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(cls)
    return {action.dest: " ".join((action.help or "").split()) for action in parser._actions}


def _default(item: dataclasses.Field[Any]) -> str:
    """Return the default in YAML notation."""
    if item.default_factory is not dataclasses.MISSING:
        return f"`{item.default_factory()}`"
    if item.default is dataclasses.MISSING:
        return "required"
    return f"`{yaml.safe_dump(item.default).splitlines()[0]}`"


if __name__ == "__main__":
    sys.stdout.write(page())
