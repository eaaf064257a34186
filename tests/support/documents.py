"""The project's documents, taken apart: links, commands, settings, names of tests."""

from __future__ import annotations

import re
import shlex

from support.programs import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def text_of(page: str) -> str:
    """Return a document by its path below the root."""
    return (ROOT / page).read_text(encoding="utf-8")


def prose(text: str) -> str:
    """Return a document without its code blocks."""
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    titles = [re.sub(r"[`*]|\[(.*?)\]\(.*?\)", r"\1", line) for line in headings(text)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def headings(text: str) -> list[str]:
    """Return the titles of all headings."""
    return re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)


def links(text: str) -> list[str]:
    """Return the targets of all links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def blocks(text: str, language: str, heading: str | None = None) -> list[str]:
    """Return the code blocks of a language, of the whole document or of the section below a heading."""
    if heading is not None:
        found = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
        assert found is not None, heading
        text = found.group(1)
    return [content for kind, content in FENCE.findall(text) if kind == language]


def commands(text: str, heading: str | None = None) -> list[str]:
    """Return the commands of the bash blocks, as they stand there."""
    lines = [line.strip() for block in blocks(text, "bash", heading) for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def words(command: str) -> list[str]:
    """Return the words of a command; what a shell would compute is one word, and a comment none."""
    return shlex.split(re.sub(r"\$\([^)]*\)", "COMPUTED", command), comments=True)
