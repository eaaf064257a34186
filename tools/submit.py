"""Submit the chain of SLURM jobs from a corpus to a trained, evaluated and exported model.

`tools/submit.py status RUN` shows its progress, `tools/submit.py cancel RUN` cancels its jobs.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline import config as configuration
from pipeline.base.cli import ToolParser, add_overrides, overrides, run
from pipeline.base.errors import UserError
from pipeline.cluster.jobs import STAGES, Request, check_request, draw, make_jobs
from pipeline.cluster.site import SITE_FILE, read_site
from pipeline.cluster.status import as_table, read_status
from pipeline.cluster.submission import absolute_paths, cancel, prepare, submit, submit_successor

ROOT = Path(__file__).resolve().parents[1]


def submit_chain(arguments: Sequence[str]) -> None:
    """Check, prepare and submit the chain; with --dry-run only print it."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--config", required=True, help="YAML of the run")
    parser.add_argument("--stages", default=",".join(STAGES), help="stages to submit, separated by commas")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the pretraining job")
    parser.add_argument("--shards", type=int, default=1, help="array tasks of the preprocessing job")
    parser.add_argument("--corpus", default="", help="arguments of tools/preprocess_data.py, in one string")
    parser.add_argument("--evaluate", default="", help="arguments of tools/evaluate.py, in one string")
    parser.add_argument("--checkpoints", type=int, default=1, help="number of newest checkpoints to evaluate")
    parser.add_argument("--export", type=Path, help="folder for the exported model (default: RUN/export)")
    add_overrides(parser)
    parser.add_argument("--dry-run", action="store_true", help="print commands and scripts, submit nothing")
    options = parser.parse_args(arguments)
    settings = ["--config", options.config, *overrides(options)]
    here = Path.cwd()
    request = Request(
        absolute_paths(configuration.load(settings), here),
        [stage.strip() for stage in options.stages.split(",") if stage.strip()],
        options.nodes,
        options.shards,
        shlex.split(options.corpus),
        shlex.split(options.evaluate),
        options.checkpoints,
        options.export and options.export.absolute(),
    )
    site = read_site(ROOT)
    if not (ROOT / SITE_FILE).is_file():
        print(
            f"{SITE_FILE} does not exist: assuming one task per node and no GPU. See slurm/site.env.example.",
            file=sys.stderr,
        )
    check_request(request, site)
    run_dir = Path(request.config.run_dir)
    if options.dry_run:
        jobs = make_jobs(request, site, run_dir, run_dir / "slurm" / "config.yaml")
        for job in jobs:
            script = (ROOT / "slurm" / f"{job.stage}.sbatch").read_text(encoding="utf-8")
            dependency = f"afterok:JOB_OF_{job.after.upper()}" if job.after else None
            print(f"### {shlex.join(job.command(run_dir / 'code', dependency))}\n\n{script}")
        print(draw(jobs))
        return
    code, config_path = prepare(ROOT, request.config)
    jobs = make_jobs(request, site, run_dir, config_path)
    submit(jobs, code, run_dir, site, here)
    print(draw(jobs))
    print(as_table(read_status(run_dir)))
    print(f"show progress: python tools/submit.py status {run_dir}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Submit a chain, or run the subcommand status, cancel or successor."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] not in (["status"], ["cancel"], ["successor"]):
        submit_chain(given)
        return
    verb, *rest = given
    parser = ToolParser(f"{verb} the jobs of a run")
    parser.add_argument("run", type=Path, help="run folder")
    if verb == "successor":  # called by slurm/pretrain.sbatch
        parser.add_argument("--exclude", help="nodes to exclude")
    options = parser.parse_args(rest)
    if not options.run.is_dir():
        raise UserError(f"{options.run} does not exist: give a run folder.")
    if verb == "status":
        print(as_table(read_status(options.run)))
    elif verb == "cancel":
        print(f"cancelled {', '.join(map(str, cancel(options.run)))}")
    else:
        print(f"submitted the successor, job {submit_successor(options.run.absolute(), options.exclude)}")


if __name__ == "__main__":
    run(main)
