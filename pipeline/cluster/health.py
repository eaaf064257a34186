"""Check that a node is fit for a long job: GPUs, disk, inputs, clock, and a short all-reduce.

Each node writes ``REPORT/NODE.json`` twice: after its own checks, and again after the checks between nodes. A
node that hangs or dies in between is identified by its missing results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline import config as configuration
from pipeline.base.errors import UserError
from pipeline.base.files import replacing, write_json
from pipeline.base.object_store import is_remote
from pipeline.checkpoint.manifest import checkpoints, split_step
from pipeline.data.paths import bin_path, facts_path, idx_path

IDLE_MEBIBYTES = 1024
HOTTEST_CELSIUS = 85
FREE_GIBIBYTES = 1.0
CLOCK_SECONDS = 5.0
TIMEOUT = timedelta(seconds=120)
REPEATS = 5  # of the measured all-reduce


@dataclass
class NodeReport:
    """The health of a node.

    Attributes:
        node: node name.
        problems: reasons to exclude the node.
        gpus: number of visible GPUs.
        all_reduce_gigabytes_per_second: bus bandwidth with the other nodes; None if not measured.
        together: failure of the checks between nodes, which cannot be blamed on one node.
        unreadable: training inputs that the node cannot read; a problem only if another node can read them.
    """

    node: str
    problems: list[str] = field(default_factory=list)
    gpus: int = 0
    all_reduce_gigabytes_per_second: float | None = None
    together: str = ""
    unreadable: list[str] = field(default_factory=list)


def check_alone(gpus: int, folders: Sequence[Path], inputs: Sequence[Path] = ()) -> NodeReport:
    """Run the checks that need no other node.

    Args:
        gpus: number of GPUs that must be visible; 0 skips the GPU checks.
        folders: folders that must be writable and have free space.
        inputs: files that training reads; see `training_inputs`.
    """
    report = NodeReport(os.environ.get("SLURMD_NODENAME", socket.gethostname()))
    if gpus:
        report.gpus = check_gpus(report.problems, gpus)
    for folder in folders:
        report.problems += check_folder(folder)
    report.unreadable = [str(path) for path in inputs if not os.access(path, os.R_OK)]
    return report


def training_inputs(settings: Sequence[str]) -> list[Path]:
    """Return the files that every node must be able to read, given the arguments of `pipeline.train`.

    For invalid settings this is the YAML alone: training itself reports the error.
    """
    paths = [Path(path) for option, path in pairwise(settings) if option == "--config"]
    with contextlib.suppress(UserError):
        config = configuration.load(settings)
        paths += [Path(config.data.tokenizer), Path(config.engine.deepspeed_config)]
        for prefix in (Path(prefix) for prefix in config.data.all_prefixes if not is_remote(prefix)):
            paths += [bin_path(prefix), idx_path(prefix), facts_path(prefix)]
        for task in config.evaluation.tasks:
            data = Path(task.data)
            paths.append(data if data.is_file() or not task.samples_text else bin_path(data))
            if task.scorer is not None:
                paths.append(split_step(task.scorer)[0])
        if config.train.initial_weights is not None:
            paths.append(Path(config.train.initial_weights))
        if config.train.branch_from is not None and not checkpoints(Path(config.run_dir)):
            paths.append(split_step(config.train.branch_from)[0])
    return paths


def check_folder(folder: Path) -> list[str]:
    """Return the problems of a folder that must be writable, replace files atomically and have space."""
    probe = folder / f".health_{socket.gethostname()}_{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(probe) as file:
            file.write(b"x" * 4096)
        probe.unlink()
        free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        return [f"{folder} cannot be written: {error.strerror}"]
    if free < FREE_GIBIBYTES:
        return [f"{folder} has {free:.2f} GiB free, {FREE_GIBIBYTES:g} GiB are needed"]
    return []


def check_gpus(problems: list[str], wanted: int) -> int:
    """Append the problems of the GPUs to `problems`, and return the number of GPUs."""
    try:
        lines = _ask_nvidia("--query-gpu=index,memory.used,temperature.gpu")
        strays = _ask_nvidia("--query-compute-apps=pid,process_name")
    except (OSError, subprocess.SubprocessError) as error:
        problems.append(f"nvidia-smi failed: {error}")
        return 0
    if len(lines) < wanted:
        problems.append(f"{len(lines)} GPUs, {wanted} are needed")
    for line in lines:
        index, used, temperature = (part.strip() for part in line.split(","))
        if used.isdigit() and int(used) > IDLE_MEBIBYTES:
            problems.append(f"GPU {index} has {used} MiB in use before the job")
        if temperature.isdigit() and int(temperature) > HOTTEST_CELSIUS:
            problems.append(f"GPU {index} is at {temperature} °C")
    problems.extend(f"stray process on a GPU: {line.strip()}" for line in strays if line.strip())
    return len(lines)


def _ask_nvidia(query: str) -> list[str]:
    """Return the lines that nvidia-smi prints for a query."""
    command = ["nvidia-smi", "--format=csv,noheader,nounits", query]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()


def check_together(report: NodeReport, rank: int, world_size: int, address: str) -> None:
    """Compare clocks and time an all-reduce with one process per node; write the results to `report`.

    Args:
        report: report of this node.
        rank: index of this node.
        world_size: number of nodes.
        address: ``tcp://HOST:PORT`` of the first node.
    """
    on_gpu = report.gpus > 0 and torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=address,
            rank=rank,
            world_size=world_size,
            timeout=TIMEOUT,
        )
        now = torch.zeros(world_size, dtype=torch.float64, device=device)
        dist.barrier()
        now[rank] = time.time()
        dist.all_reduce(now)
        skew = float(now[rank] - now.median())
        if abs(skew) > CLOCK_SECONDS:
            report.problems.append(f"its clock is {skew:+.1f} s off")
        report.all_reduce_gigabytes_per_second = _time_all_reduce(device, world_size)
        dist.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        report.together = f"the nodes could not work together: {' '.join(str(error).split())[:200]}"


def _time_all_reduce(device: torch.device, world_size: int) -> float:
    """Return the bus bandwidth (GB/s) of an all-reduce, as defined by nccl-tests."""
    numbers = torch.ones(2**26 if device.type == "cuda" else 2**20, device=device)
    dist.all_reduce(numbers)  # warm-up: the first one opens the connections
    started = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(numbers)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / REPEATS
    return numbers.numel() * 4 / seconds * 2 * (world_size - 1) / world_size / 1e9


def write_report(folder: Path, report: NodeReport) -> None:
    """Write the report of a node."""
    write_json(folder / f"{report.node}.json", dataclasses.asdict(report))


def bad_nodes(folder: Path, nodes: Sequence[str]) -> dict[str, str]:
    """Return the nodes to exclude, each with its reason: its problems, or a missing report.

    A file that no node can read excludes no node: training reports it.
    """
    paths = {node: folder / f"{node}.json" for node in nodes}
    reports = {
        node: NodeReport(**json.loads(path.read_text(encoding="utf-8")))
        for node, path in paths.items()
        if path.exists()
    }
    nowhere = set.intersection(*(set(report.unreadable) for report in reports.values())) if reports else set()
    bad = {}
    for node in nodes:
        if node not in reports:
            bad[node] = "no report: it did not start the check, or died during it"
            continue
        problems = list(reports[node].problems)
        problems += [
            f"cannot read {path}, which other nodes can read"
            for path in reports[node].unreadable
            if path not in nowhere
        ]
        if problems:
            bad[node] = "; ".join(problems)
    return bad
