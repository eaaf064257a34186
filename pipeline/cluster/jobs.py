"""The chain of jobs from a corpus to an exported model: what each needs, and what comes after what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.base.errors import UserError, nearest
from pipeline.cluster.site import Site
from pipeline.config import Config
from pipeline.config.checks import require
from pipeline.data.tokenizer import Tokenizer

# Each stage, and the one that must have ended well before it; where that is left out, the one before that.
STAGES: dict[str, str | None] = {
    "preprocess": None,
    "merge": "preprocess",
    "pretrain": "merge",
    "evaluate": "pretrain",
    "export": "pretrain",
}


@dataclass
class Request:
    """What a user asks for.

    Attributes:
        config: the run.
        stages: names out of STAGES.
        nodes: nodes of the pretraining job.
        shards: array tasks of the preprocessing.
        corpus: arguments of tools/preprocess_data.py besides tokenizer and output prefix.
        evaluation: arguments of tools/evaluate.py besides the checkpoint and the output.
        evaluated_checkpoints: how many of the newest checkpoints are evaluated.
        export: folder of the exported model.
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
    """One sbatch.

    Attributes:
        stage: its name; the script is slurm/STAGE.sbatch.
        options: of sbatch, without the dependency.
        arguments: of the script.
        after: the stage that must have ended well before; None = nothing.
        id: SLURM's number, once it is submitted.
    """

    stage: str
    options: list[str]
    arguments: list[str]
    after: str | None
    id: int | None = None

    def command(self, code: Path, dependency: str | None = None) -> list[str]:
        """Return the command that submits the job; `code` is the folder that holds slurm/."""
        depends = [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
        script = str(code / "slurm" / f"{self.stage}.sbatch")
        return ["sbatch", "--parsable", *self.options, *depends, script, *self.arguments]


def check_request(request: Request, site: Site) -> None:
    """Raise a `UserError` for the first thing that would make a job of the chain fail.

    Checks the stages, the batch against the ranks, and that everything exists which no stage makes.
    """
    config, stages = request.config, request.stages
    for stage in stages:
        require(
            stage in STAGES,
            f"--stages: unknown stage {stage!r}.{nearest(stage, STAGES)} Known: {', '.join(STAGES)}.",
        )
    require(bool(stages), f"--stages is empty: name some of {', '.join(STAGES)}.")
    for name, value in (("--nodes", request.nodes), ("--shards", request.shards)):
        require(value > 0, f"{name} is {value}: it must be 1 or more.")
    tokenizer = Tokenizer.load(Path(config.data.tokenizer))
    if "preprocess" in stages or "merge" in stages:
        require(
            len(config.data.prefixes) == 1,
            f"data.prefixes names {len(config.data.prefixes)} datasets: the preprocess and merge stages make "
            "one; submit them for each dataset on its own, and then pretrain with all.",
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
            f"--nodes {request.nodes} with {site.tasks_per_node} tasks a node are {ranks} ranks: they cannot "
            f"be grouped by engine.sequence_parallel_size = {sequence_size}.",
        )
        config.train.fitted(ranks // sequence_size, sequence_size)
        from pipeline.training import preflight  # imports torch, which status and cancel do not need

        made_before = {"preprocess", "merge"} & set(stages)
        check = preflight.check_engine if made_before else preflight.check_run
        check(config, tokenizer, ranks)
    if "evaluate" in stages:
        require(
            bool(request.evaluation),
            "--evaluate is missing: the evaluate stage needs at least '--data FILE'.",
        )
    if "export" in stages and request.export is not None and request.export.exists():
        raise UserError(f"--export {request.export} exists: remove it, or name another folder.")


def make_plan(request: Request, site: Site, run_dir: Path, config_path: Path) -> list[Job]:
    """Return the jobs in the order in which they are submitted.

    Args:
        request: a checked request.
        site: the cluster.
        run_dir: absolute run folder.
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
    """Return the dependency graph as text, one job a line, indented below the one it waits for."""
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
