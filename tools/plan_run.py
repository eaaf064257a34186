"""Plan a run: memory per GPU by part, time, communication, checkpoints and cost.

Nothing is trained, and no GPU is needed. If the tokenizer does not exist yet, set model.vocab_size.
"""

from __future__ import annotations

import json
from argparse import SUPPRESS, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from pipeline import config as configuration
from pipeline.base.cli import ToolParser, add_overrides, option, overrides, require_at_least_one, run
from pipeline.base.errors import UserError
from pipeline.config import Config
from pipeline.config.checks import require
from pipeline.config.reference import meanings
from pipeline.data.tokenizer import Tokenizer
from pipeline.planning.assumptions import Assumptions
from pipeline.planning.calibration import Measured, Proof, calibrated
from pipeline.planning.gpus import GPUS, find_gpu


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the plan, and a table for other numbers of GPUs."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--config", required=True, help="YAML of the run")
    add_overrides(parser)
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs")
    parser.add_argument("--gpu", help=f"GPU type: {', '.join(GPUS)} (default: h100, or that of --calibrate)")
    parser.add_argument(
        "--calibrate",
        nargs="+",
        type=Path,
        default=[],
        metavar="PROOF.json",
        help="take what benchmarks/gpu_proof measured instead of assumptions",
    )
    parser.add_argument("--cost-per-gpu-hour", type=float, help="price per GPU hour, in any currency")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes and seconds")
    group = parser.add_argument_group("assumptions")
    help_of = meanings(Assumptions)
    for item in fields(Assumptions):
        default = "that of the engine on a CPU core" if item.default is None else f"{item.default:g}"
        text = f"{help_of[item.name].rstrip('.')} (default: {default})"
        group.add_argument(option(item.name), type=float, default=SUPPRESS, help=text)
    options = parser.parse_args(arguments)
    require_at_least_one(options, "gpus")
    config = configuration.load(["--config", options.config, *overrides(options)])
    rows, proofs = vocabulary_rows(config), [Proof.read(path) for path in options.calibrate]
    name = gpu_name(options.gpu, proofs)
    gpu = find_gpu(name)
    assumptions(options, {})  # refuses those that are given
    # Imported now: torch takes seconds, and neither help nor a wrong setting needs it.
    from pipeline.engine.build import engine_settings
    from pipeline.planning.data_use import planned_use
    from pipeline.planning.memory import Zero, count_parameters
    from pipeline.planning.plan_report import as_json, basis, describe, describe_table, table
    from pipeline.planning.run_plan import Planner

    zero = Zero.of(engine_settings(config, options.gpus))
    count = count_parameters(config, rows).count
    measured = calibrated(proofs, count, zero.stage, config.engine.compile)
    assumed, sources = assumptions(options, measured)
    planner = Planner(config, zero, rows, gpu, assumed)
    plan = planner.plan(options.gpus, options.cost_per_gpu_hour)
    plans, uses = table(planner, price=options.cost_per_gpu_hour), planned_use(config)
    if options.json:
        rests_on = {key: {"value": value, "source": of} for key, value, of in basis(planner, sources)}
        content = {"plan": as_json(plan), "table": [as_json(each) for each in plans], "basis": rests_on}
        content["data"] = [asdict(use) for use in uses]
        print(json.dumps(content, indent=2))
        return
    print(describe(planner, plan, name, sources))
    print("\n".join(["\nwhat the run uses of its data", *(f"  {use.describe()}" for use in uses)]))
    print("\nwith the largest micro-batch that fits:")
    print(describe_table(plans))


def assumptions(options: Namespace, measured: Mapping[str, Measured]) -> tuple[Assumptions, dict[str, str]]:
    """Return the assumptions, and the source of those that are no default: given comes before measured."""
    given = {item.name: vars(options)[item.name] for item in fields(Assumptions) if item.name in options}
    for name in ("efficiency", "update_share", "link_share"):
        value = given.get(name, 1.0)
        require(0 < value <= 1, f"{option(name)} is {value}: give a share above 0, at most 1.")
    values = {name: each.value for name, each in measured.items()} | given
    sources = {name: f"measured on {each.source}" for name, each in measured.items()}
    return Assumptions(**values), sources | dict.fromkeys(given, "given")


def gpu_name(asked: str | None, proofs: Sequence[Proof]) -> str:
    """Return the GPU to plan for: the one that is asked for, or measured, or an h100."""
    names = [next(name for name, gpu in GPUS.items() if gpu is proof.gpu) for proof in proofs]
    name = asked or (names[0] if names else "h100")
    for proof, measured in zip(proofs, names, strict=True):
        require(
            measured == name,
            f"--calibrate {proof.path} was measured on {proof.card}, which is no {name}: set --gpu to "
            f"{measured}, or leave out what was measured on another card.",
        )
    return name


def vocabulary_rows(config: Config) -> int:
    """Return the rows of the output matrix; read the tokenizer only if model.vocab_size is not set."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    folder = Path(config.data.tokenizer)
    if not folder.exists():
        raise UserError(
            f"data.tokenizer = {folder} does not exist, and model.vocab_size is not set: give one of them, "
            "such as --set model.vocab_size=32000."
        )
    return config.model.rows_for(Tokenizer.load(folder).vocab_size)


if __name__ == "__main__":
    run(main)
