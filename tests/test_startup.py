"""Help and refusals come before anything heavy is imported: torch alone takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.startup import HARNESS, REFUSED
from pipeline.config.objective import POLICY_NAMES, UNSCORED
from pipeline.objectives.policies import POLICIES
from support.programs import ROOT

HEAVY = set("torch deepspeed megatron transformers lm_eval datasets s3fs tensorboard matplotlib".split())
TOOLS = {f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py")}
# Ask one program after another for its help, or for what it refuses; all of them in one process.
ASK = """
import contextlib, importlib, io, json, sys
sys.path.insert(0, ".")
imported = {}
for name, refused in json.loads(sys.argv[1]).items():
    for arguments in (["--help"], ["--no-such-option", "1"], refused.split()):
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            try:
                importlib.import_module(name).main(arguments)
            except Exception as error:
                if type(error).__name__ != "UserError":
                    raise
    imported[name] = sorted({module.split(".")[0] for module in sys.modules})
print(json.dumps(imported))
"""


@pytest.mark.slow
def test_help_and_refusals_import_nothing_heavy() -> None:
    assert set(REFUSED) == TOOLS | {"-m pipeline.train", HARNESS}, "the benchmark times every program"
    programs = {
        name.removeprefix("-m ").removesuffix(".py").replace("/", "."): refused
        for name, refused in REFUSED.items()
        if name != HARNESS  # reads sys.argv: see its own test
    }
    result = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(programs)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    imported = json.loads(result.stdout)
    assert list(imported) == list(programs)
    for name, modules in imported.items():
        assert not HEAVY & set(modules), f"{name} imports {HEAVY & set(modules)}"


@pytest.mark.slow
def test_datasets_import_neither_megatrons_trainer_nor_torchs_compiler() -> None:
    code = "import sys; from pipeline.data import datasets; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    imported = set(result.stdout.split())
    assert "megatron.core.datasets.gpt_dataset" in imported, result.stderr
    assert not {"megatron.core", "megatron.core.utils", "torch._dynamo"} & imported


def test_the_light_names_of_the_policies_are_the_policies() -> None:
    """The settings name them without importing them."""
    assert tuple(POLICIES) == POLICY_NAMES
    assert {name for name, policy in POLICIES.items() if policy.by_scores is None} == set(UNSCORED)
