"""Train with your objective and others for a few hundred steps on your data, and print a table (Markdown).

usage: python -m benchmarks.pilot --config configs/tiny_text.yaml --steps 300

Model, data, optimizer and batch are those of the YAML; the learning rate is constant after its warm-up. With
--learning-rates each objective runs with each of them. The held-out loss uses the same masks for all, and the
averaged weights where the run keeps them. It says little of decoding: with tasks in the YAML (the list
evaluation.tasks) the table has their scores, too. The same command resumes an interrupted pilot.

--also compares anything else with the configured run, such as another optimizer. --output keeps the curves of
the held-out loss; benchmarks/summarize_reproduction.py tells the steps to a loss from them.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import orjson

from benchmarks import trainings
from benchmarks.plot_reproduction import markdown, spread
from benchmarks.reproduction.arms import arms
from benchmarks.reproduction.curves import HELD_OUT_LOSS
from pipeline import config as configuration
from pipeline.base.cli import ToolParser, add_overrides, overrides, run
from pipeline.base.errors import UserError
from pipeline.base.files import replace_text
from pipeline.config import Config, ObjectiveConfig
from pipeline.monitor.history import METRICS_FILE

TASKS = "evaluation/"  # begins the names of their curves
LOSS = ("held_out/ema_loss", "held_out/loss")  # the first that a run has


def as_pilot(config: Config, steps: int) -> Config:
    """Return what all runs share: few steps, a constant learning rate, no objective yet."""
    block = config.objective.block_size
    warmup = min(config.schedule.warmup_steps, steps // 5)
    interval = max(1, steps // 10)
    return dataclasses.replace(
        config,
        objective=ObjectiveConfig(block_size=block),
        schedule=configuration.ScheduleConfig(kind="wsd", warmup_steps=warmup),
        train=dataclasses.replace(config.train, steps=steps, log_interval=interval),
        checkpoint=dataclasses.replace(config.checkpoint, interval=steps),
        evaluation=dataclasses.replace(config.evaluation, interval=interval),
    )


def settings_of(objective: ObjectiveConfig) -> str:
    """Return the settings of an objective that are not the default ones, as on a command line."""
    default = dataclasses.asdict(ObjectiveConfig())
    changed = {key: x for key, x in dataclasses.asdict(objective).items() if x != default[key]}
    return " ".join(f"--objective.{key} {value}" for key, value in changed.items())


def run_all(options: Namespace) -> list[list[str]]:
    """Train what is not trained yet; return the table, the head first."""
    config = configuration.load(["--config", str(options.config), *overrides(options)])
    configured = settings_of(config.objective)
    known = {"configured": configured, **arms(config.objective.stages)}
    for name in options.variants or []:
        if name not in known:
            raise UserError(f"--variants {name} is unknown: choose from {', '.join(known)}.")
    variants = {name: known[name] for name in (known if options.variants is None else options.variants)}
    variants |= {name: f"{configured} {settings}" for name, settings in options.also}
    options.folder.mkdir(parents=True, exist_ok=True)
    common = options.folder.resolve() / "pilot.yaml"
    replace_text(common, configuration.to_yaml(as_pilot(config, options.steps)))
    ends: dict[str, list[dict[str, float]]] = {}
    curves: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for seed in options.seeds:
        for name, settings_of_variant in variants.items():
            for rate in options.learning_rates or [str(config.optimizer.learning_rate)]:
                label = f"{name}_{rate}" if options.learning_rates else name
                run_dir = options.folder.resolve() / f"{label}_{seed}"
                run_dir.mkdir(exist_ok=True)
                own = settings_of_variant.format(last_third=2 * options.steps // 3 + 1)
                settings = ["--config", str(common), "--run_dir", str(run_dir), *own.split()]
                settings += ["--train.seed", str(seed), "--optimizer.learning_rate", rate]
                configuration.load(settings)
                trainings.train([*options.launcher, *settings], run_dir, {})
                figures, curves[label, seed] = figures_of(run_dir)
                ends.setdefault(label, []).append(figures)
    if options.output:
        write_curves(options.output, curves, config.evaluation.samples)
    return table(ends)


def figures_of(run_dir: Path) -> tuple[dict[str, float], list[tuple[int, float]]]:
    """Return held-out loss, scores of tasks and speed of a run at its end, and the held-out loss by step."""
    lines = [orjson.loads(line) for line in (run_dir / METRICS_FILE).read_bytes().splitlines()]
    last = {key: value for line in lines for key, value in line.items()}
    name = next((key for key in LOSS if key in last), None)
    if name is None:
        raise UserError(f"{run_dir} has no held-out loss: give data.split a validation part, such as 95,5,0.")
    tasks = {
        key.removeprefix(TASKS).removesuffix("/accuracy"): value
        for key, value in last.items()
        if key.startswith(TASKS) and key.endswith("/accuracy")
    }
    curve = [(line["step"], line[name]) for line in lines if name in line]
    return {"held-out loss": last[name], **tasks, "tokens/s": last["tokens_per_second"]}, curve


def write_curves(path: Path, curves: dict[tuple[str, int], list[tuple[int, float]]], examples: int) -> None:
    """Write the curves as benchmarks/reproduce.py writes its own; `examples` have made each point."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("variant", "seed", "step", "items", HELD_OUT_LOSS))
    for label_and_seed, curve in curves.items():
        rows.writerows((*label_and_seed, step, examples, f"{loss:.6g}") for step, loss in curve)
    replace_text(path, text.getvalue())


def table(ends: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """Return a row an objective, the best held-out loss first."""
    columns = list(next(iter(ends.values()))[0])
    rows = [["objective", "seeds", *columns]]
    for label, each in sorted(ends.items(), key=lambda item: mean(end[columns[0]] for end in item[1])):
        cells = [spread([end[key] for end in each], 0 if key == "tokens/s" else 3) for key in columns]
        rows.append([label, str(len(each)), *cells])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--config", type=Path, required=True, help="YAML of your run")
    add_overrides(parser)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of every run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--variants", nargs="*", help="objectives (default: all); none to leave it at --also")
    parser.add_argument(
        "--also",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "SETTINGS"),
        help='the configured run with other settings, such as: muon "--optimizer.kind muon"',
    )
    parser.add_argument("--learning-rates", nargs="+", default=[], metavar="RATE", help="default: the YAML's")
    parser.add_argument("--folder", type=Path, default=Path("runs/pilot"), help="gets the runs")
    parser.add_argument("--output", type=Path, help="CSV for the curves of the held-out loss")
    parser.add_argument(
        "--launcher",
        type=shlex.split,
        default=f"{shlex.quote(sys.executable)} -m pipeline.train",
        help='before the settings, such as "torchrun --nproc-per-node 8 -m pipeline.train"',
    )
    print(markdown(run_all(parser.parse_args(arguments))))


if __name__ == "__main__":
    run(main)
