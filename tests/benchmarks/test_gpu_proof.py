"""The proof of a GPU: its dry run, its parts, and what it makes of those that fail."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu_proof import __main__ as program
from benchmarks.gpu_proof import peak, prepare, report
from benchmarks.gpu_proof.aims import aims
from benchmarks.gpu_proof.parts import Part, all_parts
from benchmarks.gpu_proof.runner import run_part
from pipeline import config as configuration
from pipeline.base.errors import EXIT_BAD_INPUT, EXIT_FAILED
from pipeline.engine.build import engine_settings
from support.forked import run_forked
from support.programs import ROOT, environment_of_ranks, run_here, run_program

pytestmark = pytest.mark.slow

DRY = "ceilings numerics 125M_zero3 125M_plain resume step tests options sampling".split()


def part(code: str, name: str = "part") -> Part:
    """Return a part that runs a Python text."""
    return Part(name, "a part", ("-c", code, "{output}"), 1, 60, kind="ceilings")


def run(code: str, tmp_path: Path, limit: float = 60) -> dict[str, Any]:
    """Return what becomes of it."""
    return run_part(part(code), tmp_path, tmp_path, limit, dry=True)


def test_the_dry_run(tmp_path: Path) -> None:
    """Every kind of part passes on a CPU, and has its section; the other trainings are the same program."""
    command = ["-m", "benchmarks.gpu_proof", "--dry-run", "--only", *DRY, "--output", str(tmp_path)]
    result = run_forked(*command, timeout=500)
    assert result.returncode == 0, result.stderr
    proof = json.loads((tmp_path / "proof.json").read_text())
    assert list(proof["parts"]) == [each.name for each in all_parts(dry=True) if each.name in DRY]
    assert {each["status"] for each in proof["parts"].values()} == {"passed"}
    assert {each.kind for each in all_parts()} == {each["kind"] for each in proof["parts"].values()}
    figures = {name: each["figures"] for name, each in proof["parts"].items()}
    assert figures["resume"]["kills"] == 1
    assert figures["resume"]["differing"] == 0
    assert figures["numerics"]["beyond"] == []
    assert figures["tests"]["passed"] == figures["tests"]["failed"] == []
    assert len(figures["tests"]["skipped"]) > 5
    memory = figures["125M_zero3"]["memory"]  # the buckets of ZeRO are most of it, and planned
    assert memory["planned / allocated"] == pytest.approx(1, rel=0.07)
    text = (tmp_path / "report.md").read_text()
    for kind, title, _ in report.SECTIONS:
        assert (f"## {title}\n" in text) == (kind != "links")
    assert "no figure means anything" in text
    assert "**no**" not in text


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("gpus", [1, 4])
def test_the_settings_of_every_training_are_valid(gpus: int, dry: bool, tmp_path: Path) -> None:
    """And all files exist; so a long proof does not end with an unknown setting."""
    program.write_settings(tmp_path, gpus)
    names = set()
    for each in all_parts(gpus, dry):
        names.add(each.name)
        assert each.limit > each.seconds
        arguments = [argument.replace("{folder}", str(tmp_path)) for argument in each.arguments]
        if each.kind == "training":
            settings = ["--run_dir", "unused", *arguments[arguments.index("--") + 1 :]]
            config = configuration.load([*settings, "--train.global_batch_size", str(32 * gpus)])
            engine_settings(config, gpus)
        elif each.arguments[0] != "-m":
            assert (ROOT / each.arguments[0]).exists()
    assert ("1B_zeropp_int" in names) == (gpus > 1 and not dry)
    assert ("links" in names) == (gpus > 1)


def test_one_card_takes_less_than_a_quarter_of_an_hour() -> None:
    assert sum(each.seconds for each in all_parts()) + program.MACHINE.seconds < 900


def test_a_part_that_fails_leaves_its_last_lines_and_its_figures(tmp_path: Path) -> None:
    code = "import sys; open(sys.argv[1], 'w').write('{\"a\": 1}'); print('line'); sys.exit('broken')"
    found = run(code, tmp_path)
    assert found["status"] == "failed"
    assert found["figures"] == {"a": 1}
    assert sorted(found["last_lines"]) == ["broken", "line"]
    assert "broken" in (tmp_path / "part.log").read_text()


def test_a_part_beyond_its_limit_is_ended_with_its_children(tmp_path: Path) -> None:
    """Even where they ignore the polite signal."""
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}])"
    found = run(f"{code}; print(p.pid, flush=True); p.wait()", tmp_path, limit=5)
    assert found["status"] == "timed out"
    number = int(found["last_lines"][0])
    for _ in range(50):
        if not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    pytest.fail("the child is still there")


def test_what_fails_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report is there after each part; without time left the last ones are named, not run."""
    good = "import json, os, sys; json.dump({'seen': os.path.exists(sys.argv[2])}, open(sys.argv[1], 'w'))"
    parts = [part("raise SystemExit('broken')", "first"), part(good, "second"), part(good, "third")]
    parts[1] = Part("second", "", ("-c", good, "{output}", str(tmp_path / "report.md")), 1, 60)
    parts[2] = Part("third", "", (), 10_000, 20_000)
    monkeypatch.setattr(program, "all_parts", lambda *_: parts)
    monkeypatch.setattr(program, "MACHINE", part("raise SystemExit(1)", "machine"))
    code = program.main(["--output", str(tmp_path)])
    assert code == EXIT_FAILED
    proof = json.loads((tmp_path / "proof.json").read_text())
    statuses = {name: each["status"] for name, each in proof["parts"].items()}
    assert statuses == {"machine": "failed", "first": "failed", "second": "passed", "third": "no time left"}
    assert proof["parts"]["second"]["figures"] == {"seen": True}
    text = (tmp_path / "report.md").read_text()
    assert "## first: failed\n\n```text\nbroken\n```" in text


def test_an_unknown_part_is_named() -> None:
    result = run_program("-m", "benchmarks.gpu_proof", "--only", "125M_zero4")
    assert result.returncode == EXIT_BAD_INPUT
    assert "--only 125M_zero4 is no part. Did you mean" in result.stderr


def proof_of(ratio: float, mfu: float, memory: float, differing: int, kills: int) -> dict[str, Any]:
    """Return the parts that aims look at."""
    found = {
        "step": {"ratios": {"time, PUMA / random masking": ratio, "time, PUMA / full logits": ratio - 0.7}},
        "125M_zero2": {"mfu": mfu, "objective": "puma", "memory": {"planned / allocated": 1.0}},
        "125M_plain": {"mfu": 0.1, "objective": "puma", "memory": {"planned / allocated": memory}},
        "125M_random": {"mfu": 0.9, "objective": "random_masking"},
        "resume": {"kills": kills, "differing": differing},
        "numerics": {"beyond": ["head"] if differing else []},
    }
    return {name: {"figures": figures} for name, figures in found.items()}


def test_aims_are_judged_by_their_bounds() -> None:
    """Worst memory, either way; a run that was not killed proves nothing; NaN reaches nothing."""
    reached = {aim.name: aim.reached for aim in aims(proof_of(1.01, 0.26, 0.95, 0, 1))}
    assert list(reached.values()) == [True, True, True, None, None, True, True, True]
    missed = {aim.name: aim.reached for aim in aims(proof_of(1.2, 0.2, 0.9, 3, 1))}
    assert list(missed.values()) == [False, False, False, None, None, False, False, False]
    assert [aim.reached for aim in aims(proof_of(math.nan, 0.26, 1.08, 0, 0))][5:7] == [False, None]
    assert aims(proof_of(math.nan, 0.26, 1.08, 0, 0))[0].reached is False
    assert {aim.reached for aim in aims({})} == {None}


def test_what_a_machine_lacks_is_found_through_all_requirements() -> None:
    """By name, version, extra and Python; what is there brings its own requirements."""
    packages: dict[str, tuple[str, list[str]]] = {
        "project": ("1", ["torch>=2.11", "Config_Reader[files]>=2", "old>=3", "other; extra == 'dev'"]),
        "config-reader": (
            "2.1",
            ["yaml-files; extra == 'files'", "spare; extra == 'other'", "compat; python_version < '3.11'"],
        ),
        "yaml-files": ("0.5", ["old"]),
        "old": ("3.5", ["project"]),
    }
    present = prepare.read_present("torch==2.11.0+cu130\nold==2.9\nWarning: not a package\n")
    assert present == {"torch": "2.11.0", "old": "2.9"}
    found = prepare.missing(["project"], present, "3.12", packages.__getitem__)
    assert found == {"project": "1", "config-reader": "2.1", "yaml-files": "0.5", "old": "3.5"}
    with pytest.raises(KeyError, match="compat"):
        prepare.missing(["project"], present, "3.10", packages.__getitem__)


def test_a_machine_without_torch_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    present = tmp_path / "present.txt"
    present.write_text("numpy==2.4.0\n")
    arguments = ["--present", str(present), "--folder", str(tmp_path)]
    assert "names no torch" in run_here(prepare.main, arguments, capsys).complaint()


def test_carried_wheels_are_found_offline(tmp_path: Path) -> None:
    """Whatever a wheel holds is imported; the report's folder gets the logs, packed."""
    wheels, out = tmp_path / "prepared/wheels", tmp_path / "out"
    wheels.mkdir(parents=True)
    with zipfile.ZipFile(wheels / "carried-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sitecustomize.py", "print('carried')")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = environment_of_ranks() | {"PREPARED": str(wheels.parent), "OUT": str(out), "PATH": path}
    environment.pop("PYTHONPATH", None)
    command = ["bash", "benchmarks/gpu_proof/offline.sh", "--list"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "carried"
    assert [line.split()[0] for line in lines[1:-1]] == [each.name for each in all_parts()]
    assert [file.name for file in out.iterdir()] == ["logs.tar.gz"]


def test_the_report_of_a_gpu_names_time_memory_and_links() -> None:
    """Figures that only a GPU has, by hand."""
    gib = 2**30
    memory = {
        "allocated": 10 * gib,
        "reserved": 12 * gib,
        "planned / allocated": 1.05,
        "at_peak": {"pipeline/model/masked_head.py:135 _computed": 3 * gib},
    }
    run = {
        "memory": memory,
        "step_seconds": 0.04,
        "planned_step_seconds": 0.03,
        "update_seconds": 0.005,
        "tokens_per_second": 409_600,
        "mfu": 0.31,
        "objective": "puma",
        "masked_share": 0.5,
        "trace": {
            "step_seconds": 0.05,
            "device_seconds": 0.04,
            "launches": 2300,
            "longest": {"a|b`c": 0.002},
            "longest_on_host": {"wait": 0.004},
        },
    }
    rates = {"all_gather": {str(2**20): 50e9, str(2**28): 300e9}}
    found = {"training": {"125M_zero2": run}, "links": {"links": {"ranks": 8, "rates": rates}}}
    sections = {kind: "\n".join(render(found[kind])) for kind, _, render in report.SECTIONS if kind in found}
    cells = "125M_zero2|40.0 ms|30.0 ms|5.0 ms|409,600|0.310|0.50|0.80|2,300|10.00|1.050|12.00".split("|")
    assert f"| {' | '.join(cells)} |" in sections["training"]
    assert "2.00 ms `a\\|b'c`" in sections["training"], "a kernel's name breaks no table"
    assert "3,072 MiB `pipeline/model/masked_head.py:135 _computed`" in sections["training"]
    assert "| all-gather | 50.0 | 300.0 |" in sections["links"]
    proof = {"parts": {"125M_zero2": {"figures": run}}, "dry_run": False}
    assert ("MFU, 125M_zero2", "0.310", "at least 0.25", "yes") in report.aims_rows(proof)


def test_the_peak_names_the_lines_that_hold_memory_then() -> None:
    """A snapshot by hand: at the peak the second line holds two blocks; the first was released before."""

    def event(action: str, address: int, size: int, *frames: tuple[str, int]) -> dict[str, Any]:
        named = [{"filename": file, "line": line, "name": "f"} for file, line in frames]
        return {"action": action, "addr": address, "size": size, "frames": named}

    head, torch_file = ("/a/pipeline/pipeline/model/masked_head.py", 7), ("/a/torch/nn/functional.py", 1)
    events = [
        event("alloc", 1, 50, head),
        event("free_requested", 99, 10),  # of before
        event("free_requested", 1, 50),
        event("free_completed", 1, 50),
        event("alloc", 1, 40, torch_file, head),
        event("alloc", 2, 20, ("/b/deepspeed/runtime/zero/stage3.py", 3)),
        event("alloc", 3, 5),
        event("free_requested", 2, 20),
        event("alloc", 4, 10, head),
    ]
    assert peak.largest(events) == {
        "pipeline/model/masked_head.py:7 f": 40,
        "deepspeed/runtime/zero/stage3.py:3 f": 20,
        "elsewhere (backward)": 5,
    }
