"""Turn TinyGSM's raw records, a question and a Python program each, into files to train on and to hold out.

Left out are records without a question, programs that are no Python function, copies, and questions that
share 13 words in a row with one of --benchmark (give GSM8K's test file). All programs of a question are on
the same side, and which side depends on the question alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import orjson

from pipeline.base.cli import ToolParser, run
from pipeline.base.errors import UserError
from pipeline.base.files import replacing
from pipeline.base.progress import Progress
from pipeline.corpus.recipes.tinygsm import Selection
from pipeline.corpus.records import Keys, check_inputs, read_all

EVERY = 10_000  # records between two reports


def main(arguments: Sequence[str] | None = None) -> None:
    """Write train.jsonl, held_out.jsonl and counts.json, whole or not at all."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        type=Path,
        help="jsonl or parquet, compressed or not",
    )
    parser.add_argument("--question-key", default="question", help="key of the word problem")
    parser.add_argument("--code-key", default="code", help="key of the program")
    parser.add_argument(
        "--benchmark",
        nargs="*",
        action="extend",
        type=Path,
        default=[],
        help="files with a question key each",
    )
    parser.add_argument("--held-out-share", type=float, default=0.001, help="share of the questions held out")
    parser.add_argument("--output", required=True, type=Path, help="folder for the files")
    options = parser.parse_args(arguments)
    if not 0 <= options.held_out_share < 1:
        raise UserError(f"--held-out-share is {options.held_out_share}: give a share from 0 to below 1.")
    keys = Keys((options.question_key, options.code_key))
    check_inputs(options.input, keys)
    asked = [record.texts[0] for record in read_all(options.benchmark, Keys(("question",)))]
    selection = Selection(asked, options.held_out_share)
    bad = selection.counts
    paths = {part: options.output / f"{part}.jsonl" for part in ("train", "held_out")}
    with (
        closing(Progress(None, 0, "record")) as progress,
        replacing(paths["train"]) as train,
        replacing(paths["held_out"]) as held_out,
    ):
        records = read_all(options.input, keys, lambda source, position, record: bad.update([record.reason]))
        for done, record in enumerate(records, start=1):
            part = selection.part(*record.texts)
            if part is not None:
                line = orjson.dumps(dict(zip(("prompt", "answer"), record.texts, strict=True)))
                (train if part == "train" else held_out).write(line + b"\n")
            if done % EVERY == 0:
                progress.advance(done)
                progress.report(", ".join(f"{n:,} {what}" for what, n in selection.counts.most_common()))
        if not selection.counts["train"]:
            raise UserError(f"--input holds nothing to train on: {dict(selection.counts)}.")
    with replacing(options.output / "counts.json") as file:
        file.write(orjson.dumps(selection.counts, option=orjson.OPT_INDENT_2) + b"\n")
    print("  ".join(f"{what}: {count:,}" for what, count in selection.counts.most_common()))


if __name__ == "__main__":
    run(main)
