"""Check that this machine is ready for a run: packages, GPUs, compilers, file system, SLURM, data."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from pipeline.base.errors import UserError
from pipeline.cluster.health import check_folder, check_gpus
from pipeline.cluster.site import SITE_FILE
from pipeline.config import Config
from pipeline.data.tokenizer import Tokenizer
from pipeline.engine.build import compatible_ops, engine_settings
from pipeline.planning.gpus import GIB, gpu_of_device
from pipeline.planning.memory import Zero
from pipeline.ranks import free_port
from pipeline.training.preflight import check_run

DISTRIBUTION = "puma-pipeline"  # its metadata holds what pyproject.toml declares
LOCKS = ("requirements.txt", "requirements-dev.txt")
SPEED_BYTES = 2**26
SLOW_MEGABYTES = 100.0  # per second; below this, checkpoints slow the run down
TIMEOUT = 120.0  # seconds for an all-reduce between two processes

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        what: what was checked.
        state: ok; warning = only some runs are affected; failed = runs would fail.
        fact: what was found.
        remedy: what to do about it; empty if ok.
    """

    what: str
    state: State
    fact: str
    remedy: str = ""

    @classmethod
    def of(cls, what: str, good: bool, fact: str, remedy: str, otherwise: State = "warning") -> Finding:
        """Return a finding that is ok if `good`, or else in the state `otherwise` and with the remedy."""
        return cls(what, "ok", fact) if good else cls(what, otherwise, fact, remedy)


def check_packages(root: Path) -> Iterator[Finding]:
    """Compare Python and the packages with the ranges in pyproject.toml and with the tested versions.

    Packages at their tested version share one finding. Every other package has its own.
    """
    try:
        about = metadata(DISTRIBUTION)
    except PackageNotFoundError:
        yield Finding(DISTRIBUTION, "failed", "is not installed", f"pip install --editable {root}")
        return
    yield _check_python(platform.python_version(), SpecifierSet(about["Requires-Python"]))
    tested = read_pins([root / name for name in LOCKS])
    as_tested = []
    for each, extra in _declared(about.get_all("Provides-Extra") or []):
        found = _version(each.name)
        wanted = f"pip install '{each.name}{each.specifier}'"
        if found is None and extra:
            remedy = f"pip install '{DISTRIBUTION}[{extra}]' if you use it"
            yield Finding(each.name, "warning", f"is not installed: the extra {extra!r} needs it", remedy)
        elif found is None:
            yield Finding(each.name, "failed", "is missing", wanted)
        elif not each.specifier.contains(found, prereleases=True):
            state: State = "warning" if extra else "failed"
            yield Finding(each.name, state, f"{found} is outside of {each.specifier}", wanted)
        elif (pin := tested.get(canonicalize_name(each.name))) and pin.contains(found, prereleases=True):
            as_tested.append(f"{each.name} {found}")
        else:
            of_the_lock = f", not the tested {pin}" if pin else ""
            yield Finding(each.name, "ok", f"{found} is in the range {each.specifier}{of_the_lock}")
    yield Finding("packages", "ok", f"{len(as_tested)} as tested: {', '.join(as_tested)}")


def read_pins(locks: Sequence[Path]) -> dict[str, SpecifierSet]:
    """Return the versions that the requirements files pin for this interpreter, by normalised name."""
    lines = (line for path in locks for line in path.read_text(encoding="utf-8").splitlines())
    pins = (Requirement(text) for line in lines if (text := line.partition("#")[0].strip()))
    return {
        canonicalize_name(pin.name): pin.specifier
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }


def _check_python(found: str, wanted: SpecifierSet) -> Finding:
    if wanted.contains(found, prereleases=True):
        return Finding("Python", "ok", found)
    remedy = f"install Python {wanted} and call make with PYTHON=/path/to/it"
    return Finding("Python", "failed", f"{found} is outside of {wanted}", remedy)


def _declared(extras: Sequence[str]) -> Iterator[tuple[Requirement, str]]:
    """Yield the requirements for this interpreter, each with its extra ("" for none), except dev."""
    for line in requires(DISTRIBUTION) or []:
        each = Requirement(line)
        for extra in ("", *extras):
            if each.marker is None or each.marker.evaluate({"extra": extra}):
                if extra != "dev":
                    yield each, extra
                break


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_devices() -> Iterator[Finding]:
    """Check GPUs, CUDA and NCCL."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    driver = not hidden and (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists())
    if not torch.cuda.is_available():
        fact = f"torch {torch.__version__} sees no GPU"
        if driver:
            remedy = "a driver is installed: install the CUDA build of torch, and check CUDA_VISIBLE_DEVICES"
            yield Finding("GPUs", "failed", fact, remedy)
        else:
            yield Finding("GPUs", "warning", fact, "training runs on the CPU: enough for a trial only")
        return
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(len(names))) / GIB
    fact = f"{len(names)} x {names[0]}, {memory:.0f} GiB, CUDA {torch.version.cuda}"
    problems: list[str] = []
    if driver and shutil.which("nvidia-smi"):
        check_gpus(problems, len(names))
    if len(set(names)) > 1:
        problems.append(f"mixed GPU types: {', '.join(sorted(set(names)))}")
    yield Finding.of("GPUs", not problems, "; ".join([fact, *problems]), "stop other work on them")
    if gpu_of_device(names[0]) is None:
        yield Finding(
            "peak rate",
            "warning",
            f"{names[0]} is not listed",
            "MFU is not shown; add it to pipeline/planning/gpus.py",
        )
    nccl = torch.distributed.is_nccl_available()
    fact = ".".join(map(str, torch.cuda.nccl.version())) if nccl else "torch was built without it"
    yield Finding.of("NCCL", nccl, fact, "install the CUDA build of torch", "failed")


def check_compilers() -> Iterator[Finding]:
    """Look for the compilers of DeepSpeed's kernels and of flex_attention."""
    for program, needed in (
        ("gcc", "engine.fused_head and engine.compile on a GPU"),
        ("g++", "offloading (DeepSpeedCPUAdam) and engine.compile on a CPU"),
        ("ninja", "offloading"),
        ("nvcc", "DeepSpeed's CUDA kernels (quantised collectives)"),
    ):
        path = shutil.which(program)
        remedy = f"install it or load its module; only needed for {needed}"
        yield Finding.of(program, path is not None, path or "not on the PATH", remedy)


def check_ops(config: Config | None) -> Iterator[Finding]:
    """Check that DeepSpeed can compile its kernels; those that `config` needs must compile."""
    wanted = {"cpu_adam": "offload_optimizer", "async_io": "NVMe", "quantizer": "quantised collectives"}
    needed: set[str] = set()
    if config is not None and config.engine.kind == "deepspeed":
        zero = Zero.of(engine_settings(config))
        needed |= {"cpu_adam"} if zero.optimizer != "gpu" else set()
        needed |= {"async_io"} if "nvme" in (zero.optimizer, zero.weights) else set()
        needed |= {"quantizer"} if zero.quantized_weights or zero.quantized_gradients else set()
    for name, good in compatible_ops(list(wanted)).items():
        fact = "can be compiled" if good else f"cannot be compiled; used for {wanted[name]}"
        remedy = "run `ds_report`: a compiler, libaio-dev or the CUDA toolkit is missing"
        yield Finding.of(f"DeepSpeed {name}", good, fact, remedy, "failed" if name in needed else "warning")


def check_file_system(folder: Path) -> Iterator[Finding]:
    """Check what checkpoints need from a folder: atomic replacement, locks, write speed."""
    problems = check_folder(folder)
    if problems:
        yield Finding(f"{folder}", "failed", "; ".join(problems), "choose a writable folder with free space")
        return
    yield Finding(
        f"{folder}", "ok", f"atomic replacement works, {shutil.disk_usage(folder).free / GIB:,.0f} GiB free"
    )
    with tempfile.TemporaryDirectory(dir=folder, prefix=".setup_") as temporary:
        locked = _locks(Path(temporary) / "lock")
        yield Finding.of(
            f"{folder}: locks",
            locked,
            "work" if locked else "have no effect on this file system",
            "a second run in the same folder is then detected only by heartbeats (35 s)",
        )
        speed = _write_megabytes_per_second(Path(temporary) / "data")
    fact = f"{speed:,.0f} MB/s written and synced by one process"
    remedy = "checkpoints will be slow: use a faster file system"
    yield Finding.of(f"{folder}: speed", speed >= SLOW_MEGABYTES, fact, remedy)


def _locks(path: Path) -> bool:
    """Return whether a lock keeps a second descriptor out."""
    with path.open("w") as first, path.open("w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def _write_megabytes_per_second(path: Path) -> float:
    block = os.urandom(2**20)
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(SPEED_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return SPEED_BYTES / 1e6 / (time.perf_counter() - started)


def check_slurm(root: Path) -> Iterator[Finding]:
    """Look for SLURM and the site settings."""
    if shutil.which("sbatch") is None:
        yield Finding("SLURM", "warning", "sbatch is not on the PATH", "only tools/submit.py needs it")
        return
    answer = subprocess.run(["sbatch", "--version"], capture_output=True, text=True).stdout.strip()
    answer = answer or "sbatch does not report its version"
    there = (root / SITE_FILE).is_file()
    remedy = f"copy {SITE_FILE}.example to {SITE_FILE} and fill it in"
    yield Finding.of("SLURM", there, answer + ("" if there else f", no {SITE_FILE}"), remedy)


def check_configuration(config: Config) -> Iterator[Finding]:
    """Check the settings of a run against its data and tokenizer."""
    try:
        check_run(config, Tokenizer.load(Path(config.data.tokenizer)))
    except UserError as error:
        fact, _, remedy = str(error).rpartition(": ")
        yield Finding("configuration", "failed", fact or str(error), remedy)
    else:
        yield Finding("configuration", "ok", f"{config.run_dir}: settings, data and tokenizer are consistent")


def check_two_ranks(root: Path) -> Iterator[Finding]:
    """Run the node health check with two processes, on two GPUs or on the CPU."""
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() > 1
    port = free_port()
    with tempfile.TemporaryDirectory() as temporary:
        ranks = []
        for rank in range(2):
            environment = os.environ | {
                "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank), "SLURMD_NODENAME": f"rank_{rank}",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port - 1),
                "PYTHONPATH": os.pathsep.join([str(root), *sys.path]),
                "CUDA_VISIBLE_DEVICES": str(rank) if on_gpu else "",
            }  # fmt: skip
            command = [sys.executable, str(root / "tools" / "check_node.py"), "--report", temporary]
            command += ["--gpus", "1"] if on_gpu else []
            ranks.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            )
        try:
            errors = [p.communicate(timeout=TIMEOUT)[1].decode(errors="replace") for p in ranks]
        except subprocess.TimeoutExpired:
            errors = [f"no answer after {TIMEOUT:.0f} s"]
            for process in ranks:
                process.kill()
        reports = [json.loads(path.read_text()) for path in sorted(Path(temporary).glob("*.json"))]
    rates = [report["all_reduce_gigabytes_per_second"] for report in reports]
    what = f"all-reduce of 2 ranks ({'NCCL' if on_gpu else 'gloo'})"
    if len(rates) == 2 and None not in rates:
        yield Finding(what, "ok", f"{min(rates):.2f} GB/s")
        return
    said = " ".join(" ".join(errors).split())[-300:] or "one process did not answer"
    yield Finding(what, "failed", said, "check NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, and firewalls")


def all_checks(
    root: Path, folders: list[Path], config: Config | None
) -> list[Callable[[], Iterator[Finding]]]:
    """Return the checks in order, the slow one last."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        lambda: check_packages(root),
        check_devices,
        check_compilers,
        lambda: check_ops(config),
        *(lambda folder=folder: check_file_system(folder) for folder in folders),
        lambda: check_slurm(root),
    ]
    if config is not None:
        checks.append(lambda: check_configuration(config))
    return [*checks, lambda: check_two_ranks(root)]
