"""Run the parts one after another, each in its own processes, and keep what they found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_proof.parts import Part
from benchmarks.trainings import ROOT, end_with_parent
from pipeline.base.files import replace_text

TAIL = 15  # lines of a failed part's log in the report
GRACE = 10  # seconds between asking a part to end and killing it
ZEROPP = "ds_configs/zeropp.json"


def run_part(part: Part, folder: Path, work: Path, limit: float, dry: bool) -> dict[str, Any]:
    """Run a part and return what became of it.

    Args:
        part: the part.
        folder: gets NAME.log.
        work: where the part may write; its JSON is read from there, even when it failed later.
        limit: seconds.
        dry: hide the GPUs.

    Returns:
        title, kind, command, status ("passed", "failed", "timed out"), seconds, expected_seconds, figures
        (None without any) and, unless it passed, the last lines of its log.
    """
    output, log = work / f"{part.name}.json", folder / f"{part.name}.log"
    places = {"{output}": str(output), "{folder}": str(work)}
    command = [sys.executable, *part.command()]
    for place, path in places.items():
        command = [argument.replace(place, path) for argument in command]
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(dry),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that a part ends with all its processes
            preexec_fn=end_with_parent(),
        )
        try:
            code = process.wait(limit)
            status = "failed" if code else "passed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            end(process)
    found = {
        "title": part.title,
        "kind": part.kind,
        "command": " ".join(["python", *part.command()]),
        "status": status,
        "seconds": round(time.monotonic() - began, 1),
        "expected_seconds": part.seconds,
        "figures": json.loads(output.read_text()) if output.exists() else None,
    }
    if status != "passed":
        with log.open(errors="replace") as lines:
            found["last_lines"] = [line.rstrip() for line in deque(lines, TAIL)]
    return found


def end(process: subprocess.Popen[bytes]) -> None:
    """End every process of a part that is still there: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def environment(dry: bool) -> dict[str, str]:
    """Return the environment of a part: paths, and what a job script of this project sets."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    found = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    found.setdefault("OMP_NUM_THREADS", "8")
    if dry:
        found |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return found


def write_settings(work: Path, gpus: int) -> None:
    """Write the ZeRO++ settings of this number of GPUs."""
    settings = json.loads((ROOT / ZEROPP).read_text())
    settings["zero_optimization"]["zero_hpz_partition_size"] = gpus
    (work / "zeropp.json").write_text(json.dumps(settings))
    settings["zero_optimization"] |= {"zero_quantized_weights": True, "zero_quantized_gradients": True}
    (work / "zeropp_int.json").write_text(json.dumps(settings))


def commit() -> str | None:
    """Return the commit that is measured, with a + when files were changed; None without git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if changed.stdout else "")


def write_both(folder: Path, proof: dict[str, Any], text: str) -> None:
    """Replace proof.json and report.md, so that whoever ends this program finds the last whole ones."""
    for name, content in {"proof.json": json.dumps(proof, indent=1) + "\n", "report.md": text}.items():
        replace_text(folder / name, content)


def chosen(parts: Sequence[Part], only: Sequence[str]) -> list[Part]:
    """Return the parts that are named, or are of a named kind; all without a name."""
    return [part for part in parts if not only or part.name in only or part.kind in only]
