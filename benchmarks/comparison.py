"""Trainings that differ in their objective alone, and the scores of all their checkpoints, as a CSV.

Every variant and seed is a training of its own by pipeline.train: model, optimizer, batch, examples and their
order are the same for all, the objective differs. Each of its checkpoints is scored on the same held-out
records, and the last one on all of them and with every decoding. What is done is kept: the same command goes
on after an interruption. benchmarks/plot_reproduction.py reads the CSV.
"""

from __future__ import annotations

import csv
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch

import trainings
from pipeline import config as configuration
from pipeline.base.cli import ToolParser, add_overrides, overrides
from pipeline.base.files import replacing
from pipeline.checkpoint.load_model import Loaded, load_model
from pipeline.checkpoint.manifest import checkpoints, find
from pipeline.corpus.records import Keys, read_all
from pipeline.evaluation.likelihood import likelihood_of, likelihood_totals, score_answers
from pipeline.monitor.writers import METRICS_FILE

EFFORT = ("tokens", "unique_samples", "flops", "seconds")
BOUND = ("bound", "bound_error")
BOUND_DRAWS = 8
BATCH_SIZE = 250
Pair = tuple[str, str]
Scores = dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """What is trained, and how it is scored.

    Attributes:
        variants: settings of pipeline.train by the name of the variant.
        twice: variants that are trained for twice the steps.
        score: gives the scores of a model on held-out pairs; told whether the checkpoint is the last one. The
            first is the one of the curves, which all checkpoints have.
        columns: names of all scores, in the order of the CSV.
        keys: of prompt and answer in the held-out file.
    """

    variants: dict[str, str]
    twice: frozenset[str]
    score: Callable[[Loaded, Sequence[Pair], bool], Scores]
    columns: tuple[str, ...]
    keys: tuple[str, str]


@dataclass(frozen=True)
class Job:
    """One training and the scores of its checkpoints.

    Attributes:
        comparison: that it belongs to.
        held_out: file of records.
        run_dir: the folder of the run.
        variant: name of the objective.
        seed: of weights, order and masks.
        settings: command line of pipeline.train, the objective's included.
        curve_items: held-out records that every checkpoint is scored on.
        items: held-out records that the last one is scored on.
    """

    comparison: Comparison
    held_out: Path
    run_dir: Path
    variant: str
    seed: int
    settings: tuple[str, ...]
    curve_items: int
    items: int


def options_of_all(parser: ToolParser, name: str, comparison: Comparison, steps: int, interval: int) -> None:
    """Add the options of every comparison.

    Args:
        parser: gets the options.
        name: of the comparison, in its default paths.
        comparison: its variants can be chosen.
        steps: by default.
        interval: by default.
    """
    root, variants = trainings.ROOT, list(comparison.variants)
    parser.add_argument("--variants", nargs="+", choices=variants, default=variants)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--learning-rates", nargs="+", default=[], metavar="RATE", help="run each variant with each of these"
    )
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps of every run")
    parser.add_argument("--interval", type=int, default=interval, help="steps between two points of a curve")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side, one thread each")
    parser.add_argument("--config", type=Path, default=root / f"configs/reproduction/{name}.yaml")
    add_overrides(parser)
    parser.add_argument("--folder", type=Path, default=Path(f"runs/reproduce_{name}"), help="data and runs")
    parser.add_argument("--output", type=Path, default=Path(f"benchmarks/results/{name}.csv"))


def read_options(parser: ToolParser, arguments: Sequence[str] | None) -> Namespace:
    """Return the options, with the folder made."""
    options = parser.parse_args(arguments)
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    return options


def compare(
    options: Namespace, comparison: Comparison, data: Sequence[str], held_out: Path, curve: int, items: int
) -> None:
    """Do what is left to do, and write the CSV after every job.

    Args:
        options: of the command line.
        comparison: what is compared.
        data: settings that name the dataset.
        held_out: file of records that are scored.
        curve: of these, those that every checkpoint is scored on.
        items: those that the last one is scored on.
    """
    common = ["--config", str(options.config), *data, "--checkpoint.interval", str(options.interval)]
    common += overrides(options)
    variants = chosen_variants(options, comparison)
    for settings in variants.values():
        configuration.load([*common, *settings])  # what is wrong is said once, before anything starts
    jobs = []
    for seed in options.seeds:
        for name, of_variant in variants.items():
            settings = [*common, "--train.seed", str(seed), *of_variant]
            run_dir = options.folder / f"{name}_{seed}"
            jobs.append(Job(comparison, held_out, run_dir, name, seed, tuple(settings), curve, items))
    rows: list[dict[str, Any]] = []
    for scores in trainings.side_by_side(train_and_score, jobs, options.jobs):
        rows += scores
        write_table(options.output, rows, comparison, list(variants))
        last = max(scores, key=lambda row: row["step"])
        print("  ".join(f"{key} {value}" for key, value in last.items()), flush=True)


def chosen_variants(options: Namespace, comparison: Comparison) -> dict[str, list[str]]:
    """Return the settings of each variant that is wanted, at each learning rate that is, by its name."""
    variants = {}
    for name in options.variants:
        steps = options.steps * (2 if name in comparison.twice else 1)
        settings = ["--train.steps", str(steps), *comparison.variants[name].split()]
        if not options.learning_rates:
            variants[name] = settings
        for rate in options.learning_rates:
            variants[f"{name}_{rate}"] = [*settings, "--optimizer.learning_rate", rate]
    return variants


def train_and_score(job: Job) -> list[dict[str, Any]]:
    """Do one job; see `score_checkpoints` for what it returns."""
    job.run_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pipeline.train", *job.settings, "--run_dir", str(job.run_dir)]
    trainings.train(command, job.run_dir)
    return score_checkpoints(job)


def score_checkpoints(job: Job) -> list[dict[str, Any]]:
    """Return a row for each checkpoint; those that have been scored before are read from the run's folder."""
    torch.set_num_threads(1)
    path = job.run_dir / "scores.jsonl"
    rows = [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    folders = checkpoints(job.run_dir)
    records = read_all([job.held_out], Keys(job.comparison.keys))
    pairs = [(record.texts[0], record.texts[1]) for record in records][: job.items]
    for folder in folders:
        last = folder == folders[-1]
        count = len(pairs) if last else job.curve_items
        step = find(folder)[1].step
        if any(row["step"] == step and row["items"] >= count for row in rows):
            continue
        loaded = load_model(folder, torch.device("cpu"))
        row = {"variant": job.variant, "seed": job.seed, "step": step, "items": count}
        row |= effort(job.run_dir, step) | job.comparison.score(loaded, pairs[:count], last)
        rows = [other for other in rows if other["step"] != step] + [row]
        with replacing(path) as file:
            file.writelines(orjson.dumps(each) + b"\n" for each in rows)
    return rows


def bound(loaded: Loaded, pairs: Sequence[tuple[list[int], list[int]]]) -> Scores:
    """Return the bound on the negative log-likelihood (nats an answer), and its standard error.

    Args:
        loaded: the model.
        pairs: token ids of prompts and answers. Their masks are the same for every model.
    """
    scores = score_answers(loaded, pairs, BOUND_DRAWS, BATCH_SIZE)
    columns = ([getattr(s, key) for s in scores] for key in ("nll", "tokens", "bytes"))
    found = likelihood_of(likelihood_totals(*(torch.tensor(column) for column in columns)))
    return dict(zip(BOUND, (found.nll, found.standard_error), strict=True))


def effort(run_dir: Path, step: int) -> dict[str, float]:
    """Return what the training up to `step` has cost, from the run's own metrics."""
    lines = [orjson.loads(line) for line in (run_dir / METRICS_FILE).read_bytes().splitlines()]
    intervals = [line for line in lines if "progress/tokens" in line and line["step"] <= step]
    flops, before = 0.0, 0
    for line in intervals:
        flops += line["progress/flops_per_step"] * (line["step"] - before)
        before = line["step"]
    last = intervals[-1]
    seconds = round(sum(line["time/training"] for line in intervals), 1)
    found = (last["progress/tokens"], int(last["progress/unique_samples"]), flops, seconds)
    return dict(zip(EFFORT, found, strict=True))


def write_table(path: Path, rows: list[dict[str, Any]], comparison: Comparison, names: list[str]) -> None:
    """Write all scores so far, in the order of variant (as in `names`), seed and step."""
    rows = sorted(rows, key=lambda row: (names.index(row["variant"]), row["seed"], row["step"]))
    columns = ["variant", "seed", "step", *EFFORT, "items", *comparison.columns, *BOUND]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow(
                {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
            )
