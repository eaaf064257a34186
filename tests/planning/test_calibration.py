"""A plan on measured rates: against a proof written by hand, whose training the plan then repeats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.planning.assumptions import host_milliseconds
from pipeline.planning.calibration import SCHEMA
from support.programs import ROOT, Outcome, run_here
from tools import plan_run

pytestmark = pytest.mark.slow

GIB = 2**30
CARD = "NVIDIA H100 80GB HBM3"
FLOPS, BANDWIDTH, LINK = 989e12, 3.35e12, 450e9  # of its data sheet
LAYERS, WIDTH, VOCABULARY, LENGTH, BATCH = 10, 1024, 32_000, 1024, 8
PARAMETERS = VOCABULARY * WIDTH + LAYERS * (4 * WIDTH**2 + 3 * WIDTH * 2816 + 2 * WIDTH) + WIDTH
TOKENS = BATCH * LENGTH
EXECUTED = 6 * TOKENS * (PARAMETERS - VOCABULARY * WIDTH - (2 * LAYERS + 1) * WIDTH)  # products of weights
EXECUTED += 12 * TOKENS * LENGTH * WIDTH * LAYERS + 6 * TOKENS / 2 * VOCABULARY * WIDTH  # attention, head
STEP, UPDATE = 0.080, 0.005


def training(step: float, parameters: int = PARAMETERS, stage: int = 3, **more: Any) -> dict[str, Any]:
    """Return the figures of a training on one GPU, which keeps it busy for `step` seconds."""
    memory = {"beside_torch": 1.5 * GIB, "reserved": 23 * GIB, "allocated": 21 * GIB, "card": 80 * GIB}
    return {
        "parameters": parameters,
        "ranks": 1,
        "zero": {"stage": stage, "optimizer": "gpu"},
        "objective": "puma",
        "layers": LAYERS,
        "step_seconds": step,
        "update_seconds": UPDATE,
        "executed_flops": EXECUTED,
        "memory": memory,
    } | more


def proof(parts: dict[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Return the content of a proof.json."""
    kinds = {"ceilings": "ceilings", "links": "links"}
    entries = {name: {"kind": kinds.get(name, "training"), "figures": of} for name, of in parts.items()}
    return {"schema": SCHEMA, "dry_run": False, "machine": {"device": CARD}, "parts": entries} | more


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Return a function that plans by these proofs, on one GPU unless told."""
    config = tmp_path / "run.yaml"
    model = {"layers": LAYERS, "hidden_size": WIDTH, "heads": 16, "intermediate_size": 2816}
    data = {"prefixes": ["unused"], "sequence_length": LENGTH}
    train = {"steps": 10_000, "global_batch_size": BATCH, "micro_batch_size": BATCH}
    content = {"run_dir": "unused", "data": data, "model": model | {"vocab_size": VOCABULARY}, "train": train}
    config.write_text(json.dumps(content))

    def run(*proofs: dict[str, Any], more: tuple[str, ...] = ("--gpus", "1")) -> Outcome:
        paths = []
        for number, each in enumerate(proofs):
            paths.append(tmp_path / f"proof_{number}.json")
            paths[-1].write_text(json.dumps(each))
        calibrate = ["--calibrate", *map(str, paths)] if paths else []
        return run_here(plan_run.main, ["--config", str(config), *calibrate, *more], capsys)

    return run


def plan_of(outcome: Outcome) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return plan and basis of a JSON output."""
    assert outcome.code == 0, outcome.error
    content = json.loads(outcome.output)
    return content["plan"], content["basis"]


def test_the_plan_repeats_the_measured_step(call: Any) -> None:
    """Efficiency, update and memory follow from the training in closed form; their source is named."""
    plan, basis = plan_of(call(proof({"1B_zero3": training(STEP)}), more=("--gpus", "1", "--json")))
    assert plan["seconds"]["computation"] == pytest.approx(STEP - UPDATE)
    assert plan["seconds"]["update"] == pytest.approx(UPDATE)
    assert plan["seconds"]["step"] == pytest.approx(STEP)
    assert plan["mfu"] == pytest.approx(EXECUTED / STEP / FLOPS)
    assert basis["efficiency"]["value"] == pytest.approx(EXECUTED / (STEP - UPDATE) / FLOPS)
    assert basis["update_share"]["value"] == pytest.approx(40 * PARAMETERS / UPDATE / BANDWIDTH)
    assert basis["reserved_gib"]["value"] == 1.5
    assert basis["fragmentation"]["value"] == pytest.approx(2 / 80)
    assert plan["usable"] == int(79 * GIB * (1 - 2 / 80) - 1.5 * GIB)
    sources = {name: each["source"] for name, each in basis.items()}
    assert sources["efficiency"] == f"measured on {CARD}, 1B_zero3"
    assert sources["masked_share"] == sources["link_share"] == "assumed"
    assert sources["host_milliseconds"] == "benchmarks/host_time.py"
    assert sources["memory, GB/s"] == "data sheet"


def test_a_step_shorter_than_the_assumed_launches_is_repeated_too(call: Any) -> None:
    """10 blocks in 4 ms: less than the host takes on a CPU core."""
    plan, basis = plan_of(call(proof({"fast": training(0.009)}), more=("--gpus", "1", "--json")))
    assert plan["seconds"]["step"] == pytest.approx(0.009)
    assert basis["host_milliseconds"]["value"] == pytest.approx(0.4)


def test_the_host_takes_what_the_benchmark_measured() -> None:
    """The plan's times are those of the committed file, a block of its 14."""
    content = json.loads((ROOT / "benchmarks/results/host_time.json").read_text())
    for kind, stage in {"plain": 0, "ZeRO-2": 2, "ZeRO-3": 3}.items():
        for name, compiled in ((kind, False), (f"{kind}, compiled", True)):
            of_block = 1e3 * content["step_seconds"][name] / content["layers"]
            assert host_milliseconds(stage, compiled) == pytest.approx(of_block, abs=0.05)


def test_a_step_that_waits_for_the_host_does_not_shrink_with_its_micro_batch(call: Any) -> None:
    """Busy for a quarter of the step: the rest is the host's time, the same for every micro-batch."""
    waiting = training(STEP, trace={"device_seconds": STEP / 4})
    plan, basis = plan_of(call(proof({"1B_zero3": waiting}), more=("--gpus", "1", "--json")))
    assert plan["seconds"]["step"] == pytest.approx(STEP)
    assert basis["efficiency"]["value"] == pytest.approx(4 * EXECUTED / (STEP - UPDATE) / FLOPS)
    assert basis["host_milliseconds"]["value"] == pytest.approx(1e3 * (STEP - UPDATE) / LAYERS)
    small, _ = plan_of(call(proof({"1B_zero3": waiting}), more=("--gpus", "8", "--json")))
    assert small["micro_batch"] == BATCH // 8
    assert small["seconds"]["computation"] == pytest.approx(STEP - UPDATE)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({"far": training(1.0, PARAMETERS * 4), "near": training(STEP, PARAMETERS * 2)}, "near"),
        ({"stage2": training(1.0, stage=2), "stage3": training(STEP)}, "stage3"),
        ({"compiled": training(1.0, compiled=True), "eager": training(STEP)}, "eager"),
        ({"random": training(1.0, objective="random_masking"), "puma": training(STEP)}, "puma"),
        ({"many": training(1.0, ranks=8), "alone": training(STEP, PARAMETERS * 9)}, "alone"),
    ],
    ids=["size", "stage", "compiled", "objective", "ranks"],
)
def test_the_nearest_training_counts(call: Any, others: dict[str, Any], expected: str) -> None:
    _, basis = plan_of(call(proof(others), more=("--gpus", "1", "--json")))
    assert basis["efficiency"]["source"].endswith(f", {expected}")
    assert basis["efficiency"]["value"] == pytest.approx(EXECUTED / (STEP - UPDATE) / FLOPS)


def test_links_and_the_host_are_measured_too_and_what_is_given_counts(call: Any) -> None:
    """Two proofs of one card; collectives at half of the data sheet's rate."""
    one = proof({"ceilings": {"host_bytes_per_second": 55e9}, "1B_zero3": training(STEP)})
    eight = proof({"links": {"ranks": 8, "link_bytes_per_second": LINK / 2}, "1B": training(1.0, ranks=8)})
    outcome = call(one, eight, more=("--gpus", "8", "--efficiency", "0.3", "--json"))
    plan, basis = plan_of(outcome)
    assert basis["link_share"] == {"value": 0.5, "source": f"measured on 8 x {CARD}, links"}
    assert basis["host_gigabytes_per_second"] == {"value": 55, "source": f"measured on {CARD}, ceilings"}
    assert basis["efficiency"] == {"value": 0.3, "source": "given"}
    moved = plan["communication"]["all_gather"] + plan["communication"]["reduce_scatter"]
    assert plan["seconds"]["communication"] == pytest.approx(moved * 7 / 8 / (LINK / 2))
    text = call(one, eight, more=("--gpus", "8")).output
    assert f"measured on {CARD}, 1B_zero3" in text
    assert "8 x h100" in text


@pytest.mark.parametrize(
    ("content", "more", "complaint"),
    [
        ({"figures": 1}, (), "is no proof of a GPU"),
        (proof({}, schema=0), (), "has format 0"),
        (proof({}, dry_run=True), (), "is of a dry run"),
        (proof({}, machine={"device": "NVIDIA GeForce"}), (), "whose data sheet is missing"),
        (proof({}), ("--gpu", "a100-80"), "which is no a100-80: set --gpu to h100"),
    ],
    ids=["other file", "format", "dry run", "unknown card", "other card"],
)
def test_what_is_no_measurement_is_refused(
    call: Any, content: dict[str, Any], more: tuple[str, ...], complaint: str
) -> None:
    assert complaint in call(content, more=more).complaint()
