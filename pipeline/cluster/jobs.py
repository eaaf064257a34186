"""The chain of jobs from a corpus to an exported model: their options, arguments and dependencies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.base.errors import UserError, nearest
from pipeline.base.object_store import is_remote
from pipeline.cluster.site import Site
from pipeline.config import Config
from pipeline.config.checks import require
from pipeline.data.tokenizer import Tokenizer

# Each stage, and the stage it depends on. If that one is not submitted, the dependency moves up the chain.
STAGES: dict[str, str | None] = {
    "preprocess": None,
    "merge": "preprocess",
    "pretrain": "merge",
    "evaluate": "pretrain",
    "export": "pretrain",
}


@dataclass
class Request:
    """The chain of jobs that the user requests.

    Attributes:
        config: configuration of the run.
        stages: names from STAGES.
        nodes: nodes of the pretraining job.
        shards: array tasks of the preprocessing job.
        corpus: arguments of tools/preprocess_data.py, without tokenizer and output prefix.
        evaluation: arguments of tools/evaluate.py, without checkpoint and output.
        evaluated_checkpoints: number of newest checkpoints to evaluate.
        export: folder for the exported model; None = RUN/export.
    """

    config: Config
    stages: Sequence[str]
    nodes: int = 1
    shards: int = 1
    corpus: list[str] = field(default_factory=list)
    evaluation: list[str] = field(default_factory=list)
    evaluated_checkpoints: int = 1
    export: Path | None = None


@dataclass
class Job:
    """One sbatch job.

    Attributes:
        stage: stage name; the script is slurm/STAGE.sbatch.
        options: options of sbatch, without the dependency.
        arguments: arguments of the script.
        after: the stage that must succeed first; None = no dependency.
        id: SLURM job id, once submitted.
    """

    stage: str
    options: list[str]
    arguments: list[str]
    after: str | None
    id: int | None = None

    def command(self, code: Path, dependency: str | None = None) -> list[str]:
        """Return the command that submits the job; `code` is the folder that contains slurm/."""
        depends = [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
        script = str(code / "slurm" / f"{self.stage}.sbatch")
        return ["sbatch", "--parsable", *self.options, *depends, script, *self.arguments]


def check_request(request: Request, site: Site) -> None:
    """Raise a `UserError` for the first problem that would make a job of the chain fail.

    Checks the stages, the global batch against the ranks, and that every input exists that no stage creates.
    """
    config, stages = request.config, request.stages
    for stage in stages:
        require(
            stage in STAGES,
            f"--stages: unknown stage {stage!r}.{nearest(stage, STAGES)} Known: {', '.join(STAGES)}.",
        )
    require(bool(stages), f"--stages is empty: name at least one of {', '.join(STAGES)}.")
    for name, value in (("--nodes", request.nodes), ("--shards", request.shards)):
        require(value > 0, f"{name} is {value}: it must be 1 or more.")
    tokenizer = Tokenizer.load(Path(config.data.tokenizer))
    if "preprocess" in stages or "merge" in stages:
        require(
            len(config.data.all_prefixes) == 1,
            f"data.prefixes and data.phases name {len(config.data.all_prefixes)} datasets: the preprocess "
            "and merge stages build only one. Submit these two stages once per dataset, then pretrain with "
            "all of them.",
        )
        require(
            not is_remote(config.data.prefixes[0]),
            f"data.prefixes is {config.data.prefixes[0]}, but the preprocess and merge stages write to "
            "a file system: give a path there, or leave these stages out.",
        )
    if "preprocess" in stages:
        require(
            bool(request.corpus), "--corpus is missing: the preprocess stage needs at least '--input FILES'."
        )
        require(
            request.shards == 1 or "merge" in stages,
            f"--shards is {request.shards} without the merge stage: add merge to --stages.",
        )
    if "pretrain" in stages:
        sequence_size = config.engine.sequence_parallel_size
        ranks = request.nodes * site.tasks_per_node
        require(
            ranks % sequence_size == 0,
            f"--nodes {request.nodes} with {site.tasks_per_node} tasks per node is {ranks} ranks: it must be "
            f"a multiple of engine.sequence_parallel_size = {sequence_size}.",
        )
        config.train.fitted(ranks // sequence_size, sequence_size)
        from pipeline.training import preflight  # imports torch; status and cancel do not need it

        not_here = {"preprocess", "merge"} & set(stages) or any(map(is_remote, config.data.all_prefixes))
        check = preflight.check_engine if not_here else preflight.check_run
        check(config, tokenizer, ranks)
    if "evaluate" in stages:
        require(
            bool(request.evaluation),
            "--evaluate is missing: the evaluate stage needs at least '--data FILE'.",
        )
    if "export" in stages and request.export is not None and request.export.exists():
        raise UserError(f"--export {request.export} exists: remove it, or name another folder.")


def make_jobs(request: Request, site: Site, run_dir: Path, config_path: Path) -> list[Job]:
    """Return the jobs of the chain in submission order.

    Args:
        request: a checked request.
        site: settings of the cluster.
        run_dir: absolute path of the run folder.
        config_path: absolute path of the resolved configuration.
    """
    config = request.config
    logs = run_dir / "slurm" / "logs"
    one_task = [f"--cpus-per-task={site.cpus_per_task}"]
    shape = [f"--nodes={request.nodes}", f"--ntasks-per-node={site.tasks_per_node}", *one_task]
    if site.gpus_per_node:
        shape.append(f"--gpus-per-node={site.gpus_per_node}")
    one_gpu = ["--gpus-per-node=1"] if site.gpus_per_node else []
    output = str(request.export or run_dir / "export")
    prefix = config.data.prefixes[0]
    details = {
        "preprocess": (
            [f"--array=0-{request.shards - 1}", *one_task],
            [*request.corpus, "--tokenizer", config.data.tokenizer, "--output-prefix", prefix],
        ),
        "merge": (one_task, [prefix]),
        "pretrain": ([*shape, f"--signal=B:USR1@{site.seconds_to_save}"], [str(run_dir), str(config_path)]),
        "evaluate": (
            [f"--array=0-{request.evaluated_checkpoints - 1}", *one_task, *one_gpu],
            [str(run_dir), *request.evaluation],
        ),
        "export": (one_task, [str(run_dir), output]),
    }
    jobs = []
    for stage in STAGES:
        if stage not in request.stages:
            continue
        options, arguments = details[stage]
        limit = site.times[
            {"pretrain": "PRETRAIN_TIME", "preprocess": "PREPROCESS_TIME"}.get(stage, "OTHER_TIME")
        ]
        number = "%A_%a" if any(option.startswith("--array") for option in options) else "%j"
        common = [f"--job-name={run_dir.name}-{stage}", f"--output={logs}/{stage}_{number}.log"]
        if limit:
            common.append(f"--time={limit}")
        jobs.append(
            Job(stage, [*common, *options, *site.options], arguments, _stage_before(stage, request.stages))
        )
    return jobs


def _stage_before(stage: str, stages: Sequence[str]) -> str | None:
    before = STAGES[stage]
    while before is not None and before not in stages:
        before = STAGES[before]
    return before


def draw(jobs: Sequence[Job]) -> str:
    """Draw the dependency graph as text: one job per line, indented below the job it waits for."""
    lines = []

    def below(parent: str | None, depth: int) -> None:
        for job in jobs:
            if job.after == parent:
                arrow = "" if depth == 0 else "   " * (depth - 1) + "└─ after success: "
                array = next((o.split("=")[1] for o in job.options if o.startswith("--array=")), "")
                lines.append(f"{arrow}{job.stage}{f' [array {array}]' if array else ''}")
                below(job.stage, depth + 1)

    below(None, 0)
    return "\n".join(lines)
