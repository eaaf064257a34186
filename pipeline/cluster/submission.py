"""Submit a chain of jobs, and record it in the run folder.

``RUN/slurm/submission.json`` lists the jobs with their ids. The jobs write ``RUN/slurm/journal.tsv``. They
run the code in ``RUN/code`` with the settings in ``RUN/slurm/config.yaml``, so later changes of the checkout
do not affect a submitted run.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import config as configuration
from pipeline.base.errors import UserError
from pipeline.base.files import replace_text, write_json
from pipeline.base.object_store import is_remote
from pipeline.cluster.jobs import Job
from pipeline.cluster.site import Site
from pipeline.config import Config

CODE = (
    "pipeline",
    "tools",
    "slurm",
    "configs",
    "ds_configs",
    "requirements.txt",
    "pyproject.toml",
    "README.md",
)


@dataclass
class Submission:
    """A submitted chain of jobs.

    Attributes:
        directory: working directory of sbatch; relative paths in the arguments refer to it.
        jobs: the jobs with their ids.
    """

    directory: str
    jobs: list[Job]

    def job(self, stage: str) -> Job | None:
        """Return the job of a stage, or None if the chain has no such stage."""
        return next((job for job in self.jobs if job.stage == stage), None)


def submission_path(run_dir: Path) -> Path:
    """Return the path of the record of a run's jobs."""
    return run_dir / "slurm" / "submission.json"


def read_submission(run_dir: Path) -> Submission:
    """Return the submitted chain of a run; raise a `UserError` if its file is missing or damaged."""
    path = submission_path(run_dir)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Submission(content["directory"], [Job(**job) for job in content["jobs"]])
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {run_dir} was not submitted by tools/submit.py.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): cancel the jobs with scancel and submit again."
        ) from None


def write_submission(run_dir: Path, submission: Submission) -> None:
    """Record a submitted chain."""
    write_json(submission_path(run_dir), dataclasses.asdict(submission))


def absolute_paths(config: Config, base: Path) -> Config:
    """Return the configuration with every path made absolute with respect to `base`."""

    def absolute(path: str) -> str:
        return path if is_remote(path) else str((base / path).absolute())

    config = copy.deepcopy(config)
    data, train = config.data, config.train
    config.run_dir = absolute(config.run_dir)
    config.engine.deepspeed_config = absolute(config.engine.deepspeed_config)
    data.tokenizer, data.prefixes = absolute(data.tokenizer), [absolute(prefix) for prefix in data.prefixes]
    for phase in data.phases:
        phase.prefixes = [absolute(prefix) for prefix in phase.prefixes]
    data.cache = data.cache and absolute(data.cache)
    train.initial_weights = train.initial_weights and absolute(train.initial_weights)
    train.branch_from = train.branch_from and absolute(train.branch_from)
    for task in config.evaluation.tasks:
        task.data = absolute(task.data)
        task.scorer = task.scorer and absolute(task.scorer)
    return config


def prepare(root: Path, config: Config) -> tuple[Path, Path]:
    """Copy the code into the run folder and write the resolved configuration there.

    Args:
        root: folder of the code.
        config: configuration of the run, with absolute paths.

    Returns:
        The folder of the copy, and the path of the written configuration.
    """
    run_dir = Path(config.run_dir)
    code, writing = run_dir / "code", run_dir / ".code.writing"
    shutil.rmtree(writing, ignore_errors=True)
    for name in CODE:
        source, target = root / name, writing / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        elif source.is_file():
            shutil.copy2(source, target)
    shutil.rmtree(code, ignore_errors=True)
    writing.rename(code)
    (run_dir / "slurm" / "logs").mkdir(parents=True, exist_ok=True)
    path = run_dir / "slurm" / "config.yaml"
    replace_text(path, configuration.to_yaml(config))
    return code, path


def call(command: Sequence[str], directory: str | Path, environment: dict[str, str]) -> str:
    """Return the output of a SLURM command; raise a `UserError` with its error message if it fails."""
    try:
        result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not on the PATH: run this on a login node of the cluster."
        ) from None
    if result.returncode != 0:
        complaint = " ".join(result.stderr.split()) or f"exit code {result.returncode}"
        raise UserError(f"{command[0]} failed: {complaint}. The command: {' '.join(command)}")
    return result.stdout.strip()


def submit(jobs: list[Job], code: Path, run_dir: Path, site: Site, directory: Path) -> Submission:
    """Submit the jobs in order; if one is rejected, cancel those already submitted."""
    environment = site.environment | {"PUMA_CODE": str(code), "PUMA_RUN": str(run_dir)}
    submission = Submission(str(directory), jobs)
    try:
        for job in jobs:
            before = submission.job(job.after) if job.after else None
            dependency = f"afterok:{before.id}" if before else None
            job.id = int(call(job.command(code, dependency), directory, environment).split(";")[0])
    except UserError:
        for job in jobs:
            if job.id is not None:
                call(["scancel", str(job.id)], directory, environment)
        raise
    write_submission(run_dir, submission)
    return submission


def submit_successor(run_dir: Path, exclude: str | None) -> int:
    """Submit a copy of the running pretraining job, and make its dependents wait for the copy.

    Args:
        run_dir: run folder.
        exclude: nodes to exclude, in sbatch's format.

    Returns:
        The id of the new job.
    """
    submission = read_submission(run_dir)
    job = submission.job("pretrain")
    if job is None:
        raise UserError(f"{submission_path(run_dir)} has no pretraining job.")
    # sbatch would pass the running job's variables to the new job.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    if exclude:  # sbatch honours only the last --exclude
        name = "--exclude="
        before = [option for option in job.options if option.startswith(name)]
        nodes = ",".join([*(option.removeprefix(name) for option in before), exclude])
        job.options = [*(option for option in job.options if option not in before), name + nodes]
    code = Path(os.environ["PUMA_CODE"])
    running = os.environ.get("SLURM_JOB_ID", str(job.id))
    new = call(job.command(code, f"afterany:{running}"), submission.directory, environment)
    job.id = int(new.split(";")[0])
    for dependent in submission.jobs:
        if dependent.after == "pretrain":
            update = ["scontrol", "update", f"JobId={dependent.id}", f"Dependency=afterok:{job.id}"]
            call(update, submission.directory, environment)
    write_submission(run_dir, submission)
    return job.id


def cancel(run_dir: Path) -> list[int]:
    """Cancel the jobs of a run, dependents first; return their ids. Running training saves before it ends."""
    numbers = [job.id for job in reversed(read_submission(run_dir).jobs) if job.id is not None]
    for number in numbers:
        call(["scancel", str(number)], run_dir, dict(os.environ))
    return numbers
