"""The code that an export ships stands alone, and is the package's own."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.decoding import decoding, drawing, schedule
from pipeline.huggingface.export import CODE
from pipeline.huggingface.standalone import standalone
from pipeline.objectives import noise, policies, seam
from support.programs import ROOT

DECODING = CODE / "decoding_masked_diffusion.py"


def test_the_source_of_the_package_comes_along() -> None:
    text = standalone(DECODING)
    for one in (
        decoding.decode, decoding.decode_by, schedule.fill_counts, drawing.restricted, policies.Policy,
        seam.take_highest, seam.Scores,
    ):  # fmt: skip
        source = re.sub(r"\bnoise\.(\w)", r"\1", inspect.getsource(one))  # the module's names are there
        assert text.count(source) == 1, one.__name__
    assert inspect.getsource(noise.uniform) in text
    assert "ProgressiveUnmasking" not in text, "of each module only what is needed"


def test_nothing_is_missing_and_nothing_refers_to_the_package() -> None:
    """It runs without our package, and every name that it exports is there."""
    text = standalone(DECODING)
    imported = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert not {name for name in imported if name.startswith("pipeline")}
    names: dict[str, object] = {"__name__": "shipped"}
    module = type(sys)("shipped")
    sys.modules["shipped"] = module
    try:
        exec(compile(text, "shipped.py", "exec"), module.__dict__)
        names = module.__dict__
    finally:
        del sys.modules["shipped"]
    assert set(names["__all__"]) <= names.keys()  # type: ignore[call-overload]


@pytest.mark.slow
def test_it_reads_like_the_package(tmp_path: Path) -> None:
    """By the same rules of style, without an unused import or an unknown name."""
    path = tmp_path / DECODING.name
    path.write_text(standalone(DECODING))
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check"], ["format", "--check"]):
        settings = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", str(path)]
        done = subprocess.run([*ruff, *command, *settings], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_other_files_are_copied_as_they_are() -> None:
    for name in ("modeling", "generation", "configuration", "tokenization"):
        path = CODE / f"{name}_masked_diffusion.py"
        assert standalone(path) == path.read_text()
