"""Settings of the cluster: slurm/site.env, evaluated by bash."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pipeline.base.errors import UserError

SITE_FILE = Path("slurm/site.env")
DURATION_KEYS = ("PRETRAIN_TIME", "PREPROCESS_TIME", "OTHER_TIME")


@dataclass(frozen=True)
class Site:
    """The settings of slurm/site.env that shape the jobs.

    Attributes:
        gpus_per_node: GPUs requested on each node of the pretraining job.
        tasks_per_node: ranks per node.
        cpus_per_task: cores per task.
        times: time limit of each kind of job in sbatch's format; None = the partition's limit.
        seconds_to_save: seconds before the time limit at which the pretraining job is told to stop.
        options: additional sbatch options of every job.
        environment: environment variables of sbatch (SBATCH_ACCOUNT and so on).
    """

    gpus_per_node: int
    tasks_per_node: int
    cpus_per_task: int
    times: dict[str, str | None]
    seconds_to_save: int
    options: list[str]
    environment: dict[str, str]


def read_site(root: Path) -> Site:
    """Return the settings in ``root``/slurm/site.env, or defaults for nodes without GPUs if it is missing.

    Raises:
        UserError: if bash cannot read the file, or a number in it is not a whole number.
    """
    path = root / SITE_FILE
    environment = dict(os.environ) | {"PUMA_CODE": str(root), "SLURM_SUBMIT_DIR": str(root)}
    if path.is_file():
        script = f"set -a; source {shlex.quote(str(path))} >&2 && env -0"
        result = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, cwd=root)
        if result.returncode != 0:
            complaint = result.stderr.decode(errors="replace").strip().splitlines()
            raise UserError(
                f"{path} cannot be read by bash: {complaint[-1] if complaint else 'no reason given'}."
            )
        pairs = (
            item.split("=", 1) for item in result.stdout.decode(errors="replace").split("\0") if "=" in item
        )
        environment = dict(pairs)
    # Set only to evaluate the file; the jobs set their own.
    for name in ("PUMA_CODE", "SLURM_SUBMIT_DIR"):
        environment.pop(name, None)
    return Site(
        gpus_per_node=_number(path, environment, "GPUS_PER_NODE", 0),
        tasks_per_node=max(1, _number(path, environment, "TASKS_PER_NODE", 1)),
        cpus_per_task=max(1, _number(path, environment, "CPUS_PER_TASK", 1)),
        times={key: environment.get(key) or None for key in DURATION_KEYS},
        seconds_to_save=_number(path, environment, "SECONDS_TO_SAVE", 300),
        options=shlex.split(environment.get("SUBMIT_OPTIONS", "")),
        environment=environment,
    )


def _number(path: Path, environment: dict[str, str], name: str, default: int) -> int:
    value = environment.get(name, "") or str(default)
    if not value.isdigit():
        raise UserError(f"{path}: {name} is {value!r}: it must be a whole number, 0 or more.")
    return int(value)
