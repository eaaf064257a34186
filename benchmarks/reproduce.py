"""Train models that differ in their objective alone on one of several tasks, and score all alike.

usage: python -m benchmarks.reproduce --task addition --seeds 1 2 3 --jobs 2

See benchmarks/comparison.py for what is equal in all of them; the same command resumes an interrupted
comparison. The result is a CSV; benchmarks/plot_reproduction.py draws it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import comparison, trainings
from benchmarks.reproduction.addition import ADDITION_5, ADDITION_6
from benchmarks.reproduction.questions import QUESTIONS
from benchmarks.reproduction.sudoku import SUDOKU_4, SUDOKU_6
from benchmarks.reproduction.text import TEXT
from benchmarks.reproduction.word_problems import TINYGSM
from pipeline.base.cli import ToolParser, add_overrides, option, run
from pipeline.base.errors import UserError

TASKS = {
    "addition": ADDITION_5,
    "addition6": ADDITION_6,
    "sudoku4": SUDOKU_4,
    "sudoku6": SUDOKU_6,
    "text": TEXT,
    "questions": QUESTIONS,
    "tinygsm": TINYGSM,
}
WITH_INPUT = [name for name, task in TASKS.items() if task.count is None]
SIZES = {
    "steps": "optimizer steps of every run",
    "interval": "steps between two points of a curve",
    "items": "held-out records for the last step",
    "curve_items": "held-out records for every point",
    "count": "examples to train on, where the task makes them",
    "held_out": "records of --input to keep from training",
    "vocabulary": "tokens of the tokenizer, where it is trained on text",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the variants of a task."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--variants", nargs="+", help="by default all of the task")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--learning-rates", nargs="+", default=[], metavar="RATE", help="run each variant with each of these"
    )
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side, one thread each")
    parser.add_argument("--config", type=Path, help="default: the task's in configs/reproduction")
    add_overrides(parser)
    parser.add_argument("--folder", type=Path, help="data and runs (default: runs/reproduce_TASK)")
    parser.add_argument("--output", type=Path, help="CSV (default: benchmarks/results/TASK.csv)")
    parser.add_argument(
        "--input", nargs="+", type=Path, help=f"files of records, for {', '.join(WITH_INPUT)}"
    )
    sizes = parser.add_argument_group("sizes", "by default the task's")
    for name, meaning in SIZES.items():
        sizes.add_argument(option(name), type=int, help=meaning)
    options = parser.parse_args(arguments)
    task = TASKS[options.task]
    if (options.task in WITH_INPUT) != bool(options.input):
        raise UserError(f"--input belongs to the tasks {', '.join(WITH_INPUT)}, --task is {options.task}.")
    for name in SIZES:
        given, usual = getattr(options, name), getattr(task, name)
        if usual is None and given is not None:
            raise UserError(f"{option(name)} has no effect with --task {options.task}: leave it out.")
        setattr(options, name, usual if given is None else given)
    options.variants = options.variants or list(task.variants)
    for name in options.variants:
        if name not in task.variants:
            raise UserError(
                f"--variants {name} is none of {options.task}: choose from {', '.join(task.variants)}."
            )
    options.config = options.config or trainings.ROOT / f"configs/reproduction/{task.config}.yaml"
    options.folder = (options.folder or Path(f"runs/reproduce_{options.task}")).resolve()
    options.output = options.output or Path(f"benchmarks/results/{options.task}.csv")
    options.folder.mkdir(parents=True, exist_ok=True)
    comparison.compare(options, task)


if __name__ == "__main__":
    run(main)
