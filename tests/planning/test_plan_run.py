"""The plan of a run: against closed forms, against memory that is really allocated, and against two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch.profiler import ProfilerActivity, profile

from benchmarks import plan_memory, ranks
from pipeline.config import ModelConfig, Recompute
from pipeline.model.sequence import WHOLE
from pipeline.model.transformer import Body
from pipeline.planning.activations import body_memory
from pipeline.planning.memory import Zero
from support.forked import start_forked
from support.programs import ROOT, run_here
from tools import plan_run

pytestmark = pytest.mark.slow

GIB = 2**30
MODEL = {"layers": 10, "hidden_size": 1024, "heads": 16, "intermediate_size": 2816, "vocab_size": 32_000}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(
        json.dumps(
            {
                "run_dir": "unused",
                "data": {"prefixes": ["unused"], "sequence_length": 1024},
                "model": MODEL,
                "optimizer": {"ema_decay": 0.9999},
                "train": {"steps": 10_000, "global_batch_size": 256, "micro_batch_size": 8},
            }
        )
    )
    return str(path)


@pytest.fixture
def call(config: str, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> Any:
        return run_here(plan_run.main, ["--config", config, *arguments], capsys)

    return run


def test_held_out_losses_are_forwards(call: Any) -> None:
    """20 times 512 examples on 8 ranks of 8, with the average; again for what a phase adds, not for a mix."""
    added = {"first_step": 5000, "prefixes": ["unused", "better"]}
    mix = {"first_step": 9000, "prefixes": ["better"]}
    for settings, sets in (([], 1), ([f"data.phases={json.dumps([added, mix])}"], 2)):
        for more, forwards in (([], sets), (["evaluation.bound_draws=4"], sets + 4)):
            given = ["--set", *settings, *more] if settings or more else []
            plan = json.loads(call("--gpus", "8", "--json", *given).output)["plan"]
            seconds = plan["seconds"]
            forward = (seconds["step"] - seconds["update"]) / plan["accumulation"] / 3
            assert plan["held_out_seconds"] == pytest.approx(20 * 2 * 8 * forwards * forward)
    off = call("--gpus", "8", "--json", "--set", "evaluation.interval=0", "evaluation.tasks=[]")
    assert json.loads(off.output)["plan"]["held_out_seconds"] == 0, off.error


def test_the_figures_that_follow_from_the_shapes(call: Any) -> None:
    """ZeRO-3 in bf16 on 8 ranks: 2 + 4 + 12 + 4 bytes a parameter, divided; 16 in a checkpoint; the price."""
    given = ["--cost-per-gpu-hour", "2", "--host-milliseconds", "1"]
    outcome = call("--gpus", "8", "--gpu", "a100-80", *given, "--json")
    assert outcome.code == 0, outcome.error
    plan = json.loads(outcome.output)["plan"]
    parameters = 32_000 * 1024 + 10 * (4 * 1024**2 + 3 * 1024 * 2816 + 2 * 1024) + 1024
    assert plan["parameters"] == parameters
    parts = plan["memory"]["parts"]
    for name, each in {"weights": 2, "gradients": 4, "optimizer states": 12, "moving average": 4}.items():
        assert parts[name] == pytest.approx(each * parameters / 8, rel=1e-6)
    assert parts["gathered weights"] == 2 * parameters, "fewer than stage3_max_live_parameters"
    assert plan["memory"]["total"] == sum(parts.values())
    assert plan["checkpoint"] == 16 * parameters
    tokens = 256 * 1024
    flops = 6 * (parameters - 32_000 * 1024 - 21 * 1024) * tokens  # the usual 6 N D
    flops += 6 * 2 * 1024 * 1024 * tokens * 10  # attention: 12 L H for each token and layer
    flops += 6 * 32_000 * 1024 * tokens / 2  # half of the positions have logits
    assert plan["flops"]["model"] == pytest.approx(flops, rel=1e-9)
    assert plan["seconds"]["computation"] == pytest.approx(flops / 8 / 312e12 / 0.5)
    assert plan["cost"] == pytest.approx(plan["seconds"]["step"] * 10_000 / 3600 * 8 * 2)
    assert plan["communication"]["reduce_scatter"] == plan["accumulation"] * 4 * parameters


@pytest.mark.parametrize(("device", "host", "nvme"), [("cpu", 4 + 4 + 12 + 4, 0), ("nvme", 4, 4 + 12)])
def test_offloaded_parts(call: Any, tmp_path: Path, device: str, host: int, nvme: int) -> None:
    """Bytes a parameter: gradients, their copy for the optimizer, its states, the average."""
    offload = {"device": device} | ({"nvme_path": str(tmp_path)} if device == "nvme" else {})
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": offload}}))
    average = ["optimizer.ema_decay=null"] if device == "nvme" else []
    outcome = call("--gpus", "8", "--json", "--set", f"engine.deepspeed_config={path}", *average)
    assert outcome.code == 0, outcome.error
    plan = json.loads(outcome.output)["plan"]
    assert plan["memory"]["host"] == pytest.approx(host * plan["parameters"] / 8, rel=1e-6)
    assert plan["memory"]["nvme"] == pytest.approx(nvme * plan["parameters"] / 8, rel=1e-6)
    assert "gradients" not in plan["memory"]["parts"]


def test_what_is_left_out_of_the_json_is_deepspeeds_default() -> None:
    ours, theirs = Zero(3), DeepSpeedZeroConfig(stage=3)
    assert ours == Zero(
        3,
        theirs.zero_hpz_partition_size,
        theirs.max_live_parameters,
        theirs.prefetch_bucket_size,
        theirs.max_reuse_distance,
        theirs.param_persistence_threshold,
        theirs.reduce_bucket_size if theirs.contiguous_gradients else 0,
        bool(theirs.overlap_comm),
        theirs.sub_group_size,
    )
    assert ours == Zero.of({"zero_optimization": {"stage": 3}})


def test_the_text_names_what_it_assumes(call: Any) -> None:
    outcome = call("--gpus", "8", "--efficiency", "0.4")
    assert outcome.code == 0, outcome.error
    sources = {line[2:30].strip(): line[40:].strip() for line in outcome.output.splitlines()}
    assert sources["efficiency"] == "given"
    assert sources["overlap"] == "assumed"
    assert sources["memory, GB/s"] == "data sheet"
    assert "fits, up to a micro-batch of" in outcome.output
    last = outcome.output.strip().splitlines()[-1].split()
    assert last[0] == "256", "512 ranks cannot share 256 sequences"


def test_what_does_not_fit_is_followed_by_what_does(call: Any, config: str) -> None:
    """The remedies are tried, so each of them is true."""
    large = ["--set", "model.layers=40", "train.micro_batch_size=32"]
    outcome = call("--gpus", "8", "--gpu", "a100-40", *large)
    assert outcome.code == 0, outcome.error
    assert "DOES NOT FIT" in outcome.output
    assert "engine.activation_checkpointing: blocks" in outcome.output
    again = call("--gpus", "8", "--gpu", "a100-40", *large, "engine.activation_checkpointing=blocks")
    assert "DOES NOT FIT" not in again.output
    smaller = next(line for line in outcome.output.splitlines() if "train.micro_batch_size:" in line)
    number = smaller.split(":")[1].split()[0]
    fitting = call("--gpus", "8", "--gpu", "a100-40", *large[:2], f"train.micro_batch_size={number}")
    assert f"fits, up to a micro-batch of {number}" in fitting.output


def test_both_objectives_of_a_switch_are_planned(call: Any) -> None:
    """Blocks from step 2,001 of 10,000 on: the memory is theirs, and four fifths of the time."""

    def plan(*settings: str) -> Any:
        given = ["--gpus", "8", "--host-milliseconds", "1", "--json"]
        outcome = call(*given, "--set", "model.prediction=shifted", *settings)
        assert outcome.code == 0, outcome.error
        return json.loads(outcome.output)["plan"]

    causal, blocks = "objective.kind=autoregressive", "objective.block_size=32"
    switch = "objective.switch_to=puma", "objective.switch_step=2001"
    first, second, both = plan(causal), plan(blocks), plan(causal, blocks, *switch)
    assert both["memory"] == second["memory"] != first["memory"]
    assert both["seconds"] == first["seconds"]
    assert both["days"] == pytest.approx(0.2 * first["days"] + 0.8 * second["days"])
    assert second["days"] > 1.2 * first["days"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--gpu", "h10"], ["--gpu h10", "'h100'"]),
        (["--gpus", "0"], ["--gpus is 0"]),
        (["--gpus", "7"], ["train.global_batch_size = 256", "7 ranks"]),
        (["--set", "engine.kind=plain"], ["--gpus is 8", "'deepspeed'"]),
        (["--efficiency", "1.5"], ["--efficiency is 1.5"]),
        (["--set", "model.vocab_size=null", "data.tokenizer=nowhere"], ["nowhere", "model.vocab_size"]),
    ],
)
def test_bad_input_is_one_line(call: Any, arguments: list[str], parts: list[str]) -> None:
    complaint = call(*arguments).complaint()
    for part in parts:
        assert part in complaint


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("recompute", ["none", "swiglu", "blocks"])
def test_activations_are_those_that_are_allocated(recompute: Recompute, masked: bool) -> None:
    """Every allocation of five real blocks, by torch's profiler, against the count on two and three."""
    model = ModelConfig(layers=5, hidden_size=64, heads=4, kv_heads=2, intermediate_size=160)
    planned = body_memory(model, recompute, 6, 48, 4, on_gpu=False, masked=masked)
    body = Body(model, 8, WHOLE, recompute)
    for parameter in body.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        hidden = body(torch.zeros(6, 48, dtype=torch.int64), torch.ones(6, 48).bool() if masked else None)
        hidden.backward(torch.ones_like(hidden))
    assert record.profiler is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    peak = np.cumsum([event.nbytes() for event in events]).max()
    assert planned.peak == pytest.approx(peak, rel=0.05)
    assert planned.kept < planned.peak


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["300,000 weights stay gathered", "ZeRO-1, two micro-batches"])
def test_the_plan_is_what_two_ranks_need(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory and collectives of real ZeRO steps; benchmarks/plan_memory.py has more cases."""
    monkeypatch.setattr(ranks, "start_ranks", start_forked)
    ratios = plan_memory.compare(case, 2)["planned / measured"]
    assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), rel=0.15)


def test_the_committed_figures_are_within_15_percent() -> None:
    """What docs/explanation/performance.md says of benchmarks/results/plan_memory.json."""
    results = json.loads((ROOT / "benchmarks/results/plan_memory.json").read_text())["cases"]
    assert set(results) == set(plan_memory.CASES)
    for name, case in results.items():
        ratios = case["planned / measured"]
        assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), rel=0.15), name
