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

from benchmarks import trainings
from pipeline import config as configuration
from pipeline.base.cli import overrides
from pipeline.base.errors import UserError
from pipeline.base.files import replacing
from pipeline.checkpoint.load_model import Loaded, load_model
from pipeline.checkpoint.manifest import checkpoints, find
from pipeline.corpus.records import Keys, read_all
from pipeline.evaluation.likelihood import likelihood_of, likelihood_totals, score_answers
from pipeline.monitor.history import METRICS_FILE

EFFORT = ("tokens", "unique_samples", "flops", "seconds")
BOUND = ("bound", "bound_error")
BOUND_DRAWS = 8
BATCH_SIZE = 250
HELD_OUT = "held_out.jsonl"
Texts = tuple[str, ...]  # of a held-out record: prompt and answer, or a text
Scores = dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """What is trained, and how it is scored.

    Attributes:
        variants: settings of pipeline.train by the name of the variant.
        score: gives the scores of a model on held-out records; told whether the checkpoint is the last one.
            The first is the one of the curves, which all checkpoints have.
        columns: names of all scores, in the order of the CSV.
        prepare: makes the dataset and held_out.jsonl in a folder, once; gives the settings that name it.
        config: name of the YAML in configs/reproduction.
        steps: optimizer steps of a run.
        interval: steps between two points of a curve.
        count: examples to make for the training; None = they come from --input.
        items: held-out records that the last checkpoint is scored on.
        curve_items: of these, those that every checkpoint is scored on.
        held_out: records of --input that are kept from training, where the task is about those.
        vocabulary: tokens of the tokenizer, where it is trained on --input.
        twice: variants that are trained for twice the steps.
        keys: of a record in held_out.jsonl.
    """

    variants: dict[str, str]
    score: Callable[[Loaded, Sequence[Texts], bool], Scores]
    columns: tuple[str, ...]
    prepare: Callable[[Path, Namespace], list[str]]
    config: str
    steps: int
    interval: int
    count: int | None
    items: int
    curve_items: int
    held_out: int | None = None
    vocabulary: int | None = None
    twice: frozenset[str] = frozenset()
    keys: tuple[str, ...] = trainings.PAIR


@dataclass(frozen=True)
class Job:
    """One training and the scores of its checkpoints.

    Attributes:
        comparison: that it belongs to.
        run_dir: the folder of the run; held_out.jsonl is in the folder around it.
        variant: name of the objective.
        seed: of weights, order and masks.
        settings: command line of pipeline.train, the objective's included.
        curve_items: held-out records that every checkpoint is scored on.
        items: held-out records that the last one is scored on.
    """

    comparison: Comparison
    run_dir: Path
    variant: str
    seed: int
    settings: tuple[str, ...]
    curve_items: int
    items: int


def compare(options: Namespace, comparison: Comparison) -> None:
    """Do what is left to do, and write the CSV after every job.

    Args:
        options: of the command line of benchmarks/reproduce.py.
        comparison: what is compared.
    """
    data = comparison.prepare(options.folder, options)
    common = ["--config", str(options.config), *data, "--checkpoint.interval", str(options.interval)]
    common += overrides(options)
    variants = chosen_variants(options, comparison)
    for settings in variants.values():
        configuration.load([*common, *settings])  # what is wrong is said once, before anything starts
    jobs = []
    for seed in options.seeds:
        for name, of_variant in variants.items():
            settings = (*common, "--train.seed", str(seed), *of_variant)
            run_dir = options.folder / f"{name}_{seed}"
            jobs.append(Job(comparison, run_dir, name, seed, settings, options.curve_items, options.items))
    rows: list[dict[str, Any]] = []
    for scores in trainings.side_by_side(train_and_score, jobs, options.jobs):
        rows += scores
        write_table(options.output, rows, comparison, list(variants))
        last = max(scores, key=lambda row: row["step"])
        print("  ".join(f"{key} {value}" for key, value in last.items()), flush=True)


def sequence_length(options: Namespace) -> int:
    """Return ``data.sequence_length`` of the runs that a command line asks for."""
    return configuration.load(["--config", str(options.config), *overrides(options)]).data.sequence_length


def split_records(options: Namespace, keys: tuple[str, ...]) -> tuple[list[Texts], list[Texts]]:
    """Return the records of --input to train on, and the last ones, as many as --held-out.

    Raises:
        UserError: if none is left to train on.
    """
    records = [tuple(record.texts) for record in read_all(options.input, Keys(keys))]
    if len(records) <= options.held_out:
        raise UserError(
            f"--input has {len(records)} records, and --held-out is {options.held_out}: lower it."
        )
    return records[: -options.held_out], records[-options.held_out :]


def chosen_variants(options: Namespace, comparison: Comparison) -> dict[str, list[str]]:
    """Return the settings of each variant that is wanted, at each learning rate that is, by its name."""
    variants = {}
    for name in options.variants:
        steps = options.steps * (2 if name in comparison.twice else 1)
        objective = comparison.variants[name].format(last_third=2 * steps // 3 + 1)
        settings = ["--train.steps", str(steps), *objective.split()]
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
    records = read_all([job.run_dir.parent / HELD_OUT], Keys(job.comparison.keys))
    texts = [tuple(record.texts) for record in records][: job.items]
    for folder in folders:
        last = folder == folders[-1]
        count = len(texts) if last else job.curve_items
        step = find(folder)[1].step
        if any(row["step"] == step and row["items"] >= count for row in rows):
            continue
        loaded = load_model(folder, torch.device("cpu"))
        row = {"variant": job.variant, "seed": job.seed, "step": step, "items": count}
        row |= effort(job.run_dir, step) | job.comparison.score(loaded, texts[:count], last)
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
