"""DeepSpeed's private names: all of them in one module, found in this version, and missed by name."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from deepspeed.profiling.flops_profiler import FlopsProfiler

from pipeline.base.errors import UserError
from pipeline.engine.deepspeed import private
from pipeline.model import masked_head
from pipeline.model.batch import Vocabulary
from pipeline.model.masked_head import MaskedHead
from support.forked import run_forked
from support.programs import ROOT

pytestmark = pytest.mark.slow

FOLDER = ROOT / "pipeline/engine/deepspeed"
BUILD = """
import sys
from pipeline import config as configuration
from pipeline.engine.deepspeed import DeepSpeedEngine
from pipeline.model import masked_head
from pipeline.model.batch import Vocabulary
from pipeline.ranks import join_ranks

config = configuration.load(sys.argv[1:])
DeepSpeedEngine(config, join_ranks("cpu"), Vocabulary(16, 16, 3))
print("every name was found")
"""
# Of the objects that private.py looks into; what it reads beside the names of its tables is public.
OWNERS = {"deepspeed": private.MODULE_NAMES, "engine": private.ENGINE_NAMES}
OWNERS["self.optimizer"] = private.OPTIMIZER_NAMES[1] + private.OPTIMIZER_NAMES[3]
PUBLIC = {"deepspeed": {"__version__"}, "engine": set[str](), "self.optimizer": set[str]()}


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_this_version_has_every_name(tmp_path: Path, stage: int) -> None:
    """An engine looks for the names when it is built; what is missing is in the error."""
    settings = tmp_path / "zero.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    arguments = ["--run_dir", "x", "--data.prefixes", "[x]", "--engine.device", "cpu"]
    arguments += ["--engine.deepspeed_config", str(settings)]
    result = run_forked("-c", BUILD, *arguments)
    assert "every name was found" in result.stdout, result.stderr


def test_a_name_that_is_missing_is_named() -> None:
    state = SimpleNamespace(state={})
    optimizer = SimpleNamespace(
        **dict.fromkeys((*private.OPTIMIZER_NAMES[3], "clip_grad"), 0), optimizer=state
    )
    engine = SimpleNamespace(checkpoint_engine=0, _copy_recovery_script=0, optimizer=optimizer)
    engine._config = SimpleNamespace(load_universal_checkpoint=False)
    private.check_names(engine, 3)
    del optimizer._get_norm_groups
    with pytest.raises(UserError, match=r"at ZeRO stage 3, has no engine\.optimizer\._get_norm_groups"):
        private.check_names(engine, 3)


def test_the_profile_counts_products_with_a_dtype_of_their_result() -> None:
    """The head of a bf16 model multiplies with an fp32 result on a GPU; the meta device does so, too."""
    rows, width, size = 6, 16, 40
    with torch.device("meta"):
        weight = torch.nn.Parameter(torch.empty(size, width, dtype=torch.bfloat16))
        hidden = torch.empty(rows, width, dtype=torch.bfloat16, requires_grad=True)
        targets, weights = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    head = MaskedHead(weight, Vocabulary(size, size, 3))
    adds = masked_head._adds_to_fp32(weight.device, weight.dtype)  # from torch 2.13 on
    profiler = FlopsProfiler(head)
    with private.counting_any_product():
        profiler.start_profile()
    with (
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),
        mock.patch.object(torch, "autocast", return_value=contextlib.nullcontext()),
    ):
        head(hidden, targets, weights)
    flops = profiler.get_total_flops()
    profiler.end_profile()
    assert torch.mm(hidden, weight.T, out_dtype=torch.float32).dtype == torch.float32, "torch is as before"
    product = 2 * rows * width * size
    # Logits and both gradients; the meta device adds the last one by an mm of its own.
    assert flops == (4 * product + size * width if adds else 3 * product)


def attributes(module: Path) -> set[str]:
    """Return every chain of attributes in a module and every beginning of one, such as engine.optimizer."""
    tree = ast.parse(module.read_text())
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_the_tables_hold_what_private_py_touches() -> None:
    everything = attributes(FOLDER / "private.py")
    for owner, names in OWNERS.items():
        found = {name.removeprefix(f"{owner}.") for name in everything if name.startswith(f"{owner}.")}
        assert set(names) <= found, "a table has a name that nothing touches"
        known = {name for name in found for each in names if f"{each}.".startswith(f"{name}.")}
        known |= {name for name in found for each in names if name.startswith(f"{each}.")}  # of what it gives
        assert found - known == PUBLIC[owner], "private.py touches a name that no table has"


def test_no_other_module_touches_a_private_name() -> None:
    for module in FOLDER.glob("*.py"):
        if module.name != "private.py":
            hidden = {name for name in attributes(module) if re.search(r"\._(?!_)", name)}
            assert {name for name in hidden if not name.startswith("self._")} == set(), module.name
