"""Train Sudoku solvers by PUMA, by random masking and by what lies between them, and score all alike.

usage: python benchmarks/reproduce_sudoku.py --seeds 1 2 3 --jobs 2

Every variant and seed is a training of its own by pipeline.train: model, optimizer, batch, puzzles and their
order are the same for all, the objective differs. Each of its checkpoints is scored on the same held-out
puzzles, and the last one on all of them and with every decoding. What is done is kept: the same command goes
on after an interruption. The result is a CSV; benchmarks/plot_reproduction.py draws it.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
import trainings

from pipeline import checkpoint
from pipeline import config as configuration
from pipeline.cli import ToolParser, UserError, overrides, run
from pipeline.data.records import Keys, read_all
from pipeline.evaluation.likelihood import likelihood_of, likelihood_totals, score_answers
from pipeline.evaluation.sudoku import is_solved
from pipeline.files import replacing
from pipeline.monitor.writers import METRICS_FILE
from pipeline.sampling import Loaded, SamplingSettings, complete, load_model

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {
    "puma": "--objective.stages 6",
    "puma_turns": "--objective.stages 6 --objective.turns 32",
    "puma_12": "--objective.stages 12",
    "puma_threshold": "--objective.stages 6 --objective.threshold 0.9",
    "puma_schedule": "--objective.stages 6 --objective.stages_maximum 12 --objective.stages_increment 2"
    " --objective.stages_first_increase 300 --objective.stages_interval 150",
    "puma_mixed": "--objective.stages 6 --objective.random_share 0.25",
    "puma_margin": "--objective.stages 6 --objective.policy margin",
    "chain_random_order": "--objective.stages 6 --objective.policy random",
    "chain_left_to_right": "--objective.stages 6 --objective.policy left_to_right",
    "random": "--objective.kind random_masking",
    "random_stratified": "--objective.kind random_masking --objective.mask_count bernoulli"
    " --objective.stratified true",
}
DECODINGS = {
    "solved_1": SamplingSettings(tokens_per_step=1),
    "solved_2": SamplingSettings(tokens_per_step=2),
    "solved_4": SamplingSettings(tokens_per_step=4),
    "solved_threshold": SamplingSettings(threshold=0.9),
}
COLUMNS = [
    "variant", "seed", "step", "tokens", "unique_puzzles", "flops", "seconds", "puzzles", *DECODINGS,
    "bound", "bound_error",
]  # fmt: skip
BOUND_DRAWS = 8


@dataclass(frozen=True)
class Job:
    """One training and the scores of its checkpoints.

    Attributes:
        folder: where data and runs are.
        variant: name of the objective.
        seed: of weights, order and masks.
        settings: command line of pipeline.train.
        curve_puzzles: held-out puzzles that every checkpoint is scored on.
        puzzles: held-out puzzles that the last one is scored on.
    """

    folder: Path
    variant: str
    seed: int
    settings: tuple[str, ...]
    curve_puzzles: int
    puzzles: int

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return self.folder / f"{self.variant}_{self.seed}"


def train(job: Job) -> None:
    """Run the training to its end, from wherever it stands."""
    command = [sys.executable, "-m", "pipeline.train", *job.settings, "--run_dir", str(job.run_dir)]
    command += ["--train.seed", str(job.seed), *VARIANTS[job.variant].split()]
    job.run_dir.mkdir(parents=True, exist_ok=True)
    trainings.train(command, job.run_dir)


def score(job: Job) -> list[dict[str, Any]]:
    """Return a row for each checkpoint; those that have been scored before are read from the run's folder."""
    torch.set_num_threads(1)
    path = job.run_dir / "scores.jsonl"
    rows = [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    folders = checkpoint.checkpoints(job.run_dir)
    keys = Keys(("prompt", "answer"))
    pairs = [tuple(record.texts) for record in read_all([job.folder / "held_out.jsonl"], keys)][: job.puzzles]
    for folder in folders:
        last = folder == folders[-1]
        count = len(pairs) if last else job.curve_puzzles
        step = checkpoint.find(folder)[1].step
        if any(row["step"] == step and row["puzzles"] >= count for row in rows):
            continue
        loaded = load_model(folder, torch.device("cpu"))
        decodings = DECODINGS if last else {"solved_1": DECODINGS["solved_1"]}
        row = {"variant": job.variant, "seed": job.seed, "step": step, "puzzles": count}
        row |= effort(job.run_dir, step) | score_model(loaded, pairs[:count], decodings)
        rows = [other for other in rows if other["step"] != step] + [row]
        with replacing(path) as file:
            file.writelines(orjson.dumps(each) + b"\n" for each in rows)
    return rows


def score_model(
    loaded: Loaded, pairs: Sequence[tuple[str, ...]], decodings: dict[str, SamplingSettings]
) -> dict[str, float]:
    """Return the share of the puzzles that each decoding solves, and the bound (nats an answer)."""
    puzzles = [prompt for prompt, _ in pairs]
    cells = len(puzzles[0])
    figures = {}
    for name, settings in decodings.items():
        answers = complete(loaded, puzzles, settings, cells, batch_size=250)
        solved = [is_solved(p, a.text, round(cells**0.5)) for p, a in zip(puzzles, answers, strict=True)]
        figures[name] = sum(solved) / len(solved)
    encode = loaded.tokenizer.encode
    tokens = [(encode(prompt).tolist(), encode(answer).tolist()) for prompt, answer in pairs]
    scores = score_answers(loaded, tokens, BOUND_DRAWS, 250)
    columns = ([getattr(s, key) for s in scores] for key in ("nll", "tokens", "bytes"))
    bound = likelihood_of(likelihood_totals(*(torch.tensor(column) for column in columns)))
    return figures | {"bound": bound.nll, "bound_error": bound.standard_error}


def effort(run_dir: Path, step: int) -> dict[str, float]:
    """Return what the training up to `step` has cost, from the run's own metrics."""
    lines = [orjson.loads(line) for line in (run_dir / METRICS_FILE).read_bytes().splitlines()]
    intervals = [line for line in lines if "progress/tokens" in line and line["step"] <= step]
    flops, before = 0.0, 0
    for line in intervals:
        flops += line["progress/flops_per_step"] * (line["step"] - before)
        before = line["step"]
    return {
        "tokens": intervals[-1]["progress/tokens"],
        "unique_puzzles": int(intervals[-1]["progress/unique_samples"]),
        "flops": flops,
        "seconds": round(sum(line["time/training"] for line in intervals), 1),
    }


def train_and_score(job: Job) -> list[dict[str, Any]]:
    """Do one job; see `score` for what it returns."""
    train(job)
    return score(job)


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write all scores so far, in the order of variant, seed and step."""
    names = list(VARIANTS)
    rows = sorted(rows, key=lambda row: (names.index(row["variant"]), row["seed"], row["step"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow(
                {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
            )


def read_command_line(arguments: Sequence[str] | None) -> Any:
    """Return the options."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=1600, help="optimizer steps of every run")
    parser.add_argument("--interval", type=int, default=100, help="steps between two points of a curve")
    parser.add_argument("--size", type=int, default=6, help="rows of a puzzle")
    parser.add_argument("--clues", type=int, default=20, help="given cells of a puzzle")
    parser.add_argument("--count", type=int, default=20000, help="puzzles to train on")
    parser.add_argument("--puzzles", type=int, default=1000, help="held-out puzzles for the last step")
    parser.add_argument("--curve-puzzles", type=int, default=200, help="held-out puzzles for every point")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side, one thread each")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/reproduction/sudoku.yaml")
    parser.add_argument("--set", nargs="+", default=[], help="more settings, as KEY=VALUE")
    parser.add_argument("--folder", type=Path, default=Path("runs/reproduce_sudoku"), help="data and runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sudoku.csv"))
    options = parser.parse_args(arguments)
    for setting in options.set:
        if "=" not in setting:
            raise UserError(f"--set {setting}: write KEY=VALUE, such as optimizer.learning_rate=3e-4.")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what is left to do, and write the CSV after every job."""
    options = read_command_line(arguments)
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data = trainings.sudoku_settings(folder, options.size, options.clues, options.count, options.puzzles)
    settings = ["--config", str(options.config), *data, "--train.steps", str(options.steps)]
    settings += ["--checkpoint.interval", str(options.interval)]
    settings += overrides(options)
    configuration.load(settings)  # what is wrong is said once, before anything starts
    limits = options.curve_puzzles, options.puzzles
    jobs = [
        Job(folder, variant, seed, tuple(settings), *limits)
        for seed in options.seeds
        for variant in options.variants
    ]
    rows: list[dict[str, Any]] = []
    for scores in trainings.side_by_side(train_and_score, jobs, options.jobs):
        rows += scores
        write_table(options.output, rows)
        last = max(scores, key=lambda row: row["step"])
        print("  ".join(f"{key} {value}" for key, value in last.items()), flush=True)


if __name__ == "__main__":
    run(main)
